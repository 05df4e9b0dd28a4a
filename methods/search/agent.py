"""The agent of HAQ and AMC: deep deterministic policy gradients (Lillicrap et al., arXiv 1509.02971).

Each step of an episode has one action from 0 to 1. All steps get the reward of the episode, less a moving average. The
agent runs on the CPU, because its networks are too small to gain from a GPU.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import ndtr, ndtri
from torch import Tensor, nn

from apq.checkpoint import check_fit, check_optimizer
from apq.errors import UserError
from apq.resume import State
from apq.schema import MOST, each, fields, generator, mapping, number, optional, whole
from methods.search.observations import Observations
from methods.search.settings import AgentConfig

SMALLEST_NOISE = 1e-6  # sampling divides by the noise
LAST_LAYER = 3e-3  # bound of the initial weights: actions start near 0.5, values near 0


def truncated_normal(mean: float, width: float, rng: np.random.Generator) -> float:
    """Draw from a normal distribution truncated to 0 to 1, by inverting its distribution function."""
    low, high = ndtr((0.0 - mean) / width), ndtr((1.0 - mean) / width)
    return float(np.clip(mean + width * ndtri(low + (high - low) * rng.random()), 0.0, 1.0))


class Replay:
    """The latest episodes. All have the same number of steps; each has one reward."""

    def __init__(self, n_episodes: int, n_steps: int, state_size: int) -> None:
        self.states = np.zeros((n_episodes, n_steps, state_size), dtype=np.float32)
        self.actions = np.zeros((n_episodes, n_steps), dtype=np.float32)
        self.rewards = np.zeros(n_episodes, dtype=np.float32)
        self.seen = 0

    def __len__(self) -> int:
        return min(self.seen, len(self.rewards))

    def add(self, states: np.ndarray, actions: np.ndarray, reward: float) -> None:
        """Store an episode, in place of the oldest one if there is no room."""
        at = self.seen % len(self.rewards)
        self.states[at], self.actions[at], self.rewards[at] = states, actions, reward
        self.seen += 1

    def sample(self, n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Draw n steps: states (n, S), actions, rewards (n, 1), next states (n, S), 1 where a step follows (n, 1)."""
        n_steps = self.actions.shape[1]
        episode, step = rng.integers(len(self), size=n), rng.integers(n_steps, size=n)
        after = np.minimum(step + 1, n_steps - 1)
        columns = self.actions[episode, step], self.rewards[episode], (step < n_steps - 1).astype(np.float32)
        actions, rewards, goes_on = (torch.from_numpy(column)[:, None] for column in columns)
        states, following = self.states[episode, step], self.states[episode, after]
        return torch.from_numpy(states), actions, rewards, torch.from_numpy(following), goes_on


class Agent:
    """Actor, critic and their target networks. The state of a step is what it observes."""

    def __init__(self, observations: Observations, config: AgentConfig) -> None:
        self.config, self.observations = config, observations
        n_steps, size = len(observations), observations.size
        self.rng = np.random.default_rng(config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.actor, self.critic = _mlp(size, config.hidden), _mlp(size + 1, config.hidden)
        self.targets = copy.deepcopy(nn.ModuleList([self.actor, self.critic])).requires_grad_(False)
        self.optimizers = [
            torch.optim.Adam(net.parameters(), lr=lr, fused=True)
            for net, lr in ((self.actor, config.actor_lr), (self.critic, config.critic_lr))
        ]
        self.replay = Replay(config.replay_episodes, n_steps, size)
        self.average_reward: float | None = None
        self.first = observations.first  # the last action that the next episode begins with

    @property
    def noise(self) -> float:
        """Width of the exploration noise in the next episode."""
        config = self.config
        return max(config.noise * config.noise_decay ** max(0, self.replay.seen - config.warmup), SMALLEST_NOISE)

    def act(self) -> tuple[np.ndarray, np.ndarray]:
        """Act for one episode. Returns states (steps, S) float64 and actions (steps,) from 0 to 1."""
        observations = self.observations
        if self.replay.seen <= self.config.warmup:
            actions = self.rng.random(len(observations))
            return observations.episode(actions, self.first), actions
        # For one state at a time numpy is faster than torch.
        weights = [parameter.detach().numpy() for parameter in self.actor.parameters()]
        actions, noise = np.zeros(len(observations)), self.noise
        state, last = observations.rows.astype(np.float32), self.first
        for i in range(len(actions)):
            state[i, observations.last] = last
            actions[i] = truncated_normal(_actor_output(state[i], weights), noise, self.rng)
            last = observations.taken(actions[i])
        return observations.episode(actions, self.first), actions

    def observe(self, states: np.ndarray, actions: np.ndarray, reward: float) -> None:
        """Store an episode for replay."""
        self.replay.add(states, actions, reward)
        self.first = self.observations.first_after(states)

    def learn(self) -> None:
        """Take the gradient steps of one episode, once warm-up is over."""
        if self.replay.seen > self.config.warmup:
            for _ in range(self.config.updates * len(self.observations)):
                self.update(*self.replay.sample(self.config.batch_size, self.rng))

    def update(self, states: Tensor, actions: Tensor, rewards: Tensor, following: Tensor, goes_on: Tensor) -> None:
        """Take one gradient step of critic and actor on a batch of steps, then update the targets."""
        config = self.config
        target_actor, target_critic = self.targets
        batch_mean = rewards.mean().item()
        before = batch_mean if self.average_reward is None else self.average_reward
        self.average_reward = before + config.reward_momentum * (batch_mean - before)
        with torch.no_grad():
            next_actions = target_actor(following).sigmoid_()
            next_values = target_critic(torch.cat([following, next_actions], dim=1))
            target_values = rewards - self.average_reward + config.discount * goes_on * next_values
        values = self.critic(torch.cat([states, actions], dim=1))
        self._step(self.optimizers[1], F.mse_loss(values, target_values))
        chosen = self.actor(states).sigmoid()
        self._step(self.optimizers[0], -self.critic(torch.cat([states, chosen], dim=1)).mean())
        sources = [*self.actor.parameters(), *self.critic.parameters()]
        with torch.no_grad():
            torch._foreach_lerp_(list(self.targets.parameters()), sources, config.target_rate)

    def _step(self, optimizer: torch.optim.Adam, loss: Tensor) -> None:
        (group,) = optimizer.param_groups
        # The actor's loss passes through the critic, whose own gradients it must not change.
        for parameter, grad in zip(group["params"], torch.autograd.grad(loss, group["params"]), strict=True):
            parameter.grad = grad
        optimizer.step()

    def state_dict(self) -> State:
        """All that the next episode depends on, as tensors and plain data."""
        replay = self.replay
        return {
            "nets": [net.state_dict() for net in (self.actor, self.critic, self.targets)],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "replay": [torch.from_numpy(array) for array in (replay.states, replay.actions, replay.rewards)],
            "seen": replay.seen,
            "average_reward": self.average_reward,
            "first": self.first,
            "rng": json.dumps(self.rng.bit_generator.state),  # its numbers have 128 bits
        }

    def check_state(self, state: Any) -> None:
        """UserError unless an agent with the same observations and settings can have saved the state."""
        nets = self.actor, self.critic, self.targets
        arrays = self.replay.states, self.replay.actions, self.replay.rewards
        fields(
            nets=each(mapping, len(nets)),
            optimizers=each(mapping, len(self.optimizers)),
            replay=each(lambda value: None, len(arrays)),
            seen=whole(0, MOST),
            average_reward=optional(number()),
            first=number(),
            rng=_check_generator,
        )(state)
        for net, saved in zip(nets, state["nets"], strict=True):
            check_fit(saved, net.state_dict())
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            check_optimizer(saved, optimizer)
        numbered = {str(i): torch.from_numpy(own) for i, own in enumerate(arrays)}
        check_fit({str(i): saved for i, saved in enumerate(state["replay"])}, numbered)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of an agent with the same observations and settings."""
        for net, saved in zip((self.actor, self.critic, self.targets), state["nets"], strict=True):
            net.load_state_dict(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        replay = self.replay
        for array, saved in zip((replay.states, replay.actions, replay.rewards), state["replay"], strict=True):
            array[:] = saved.numpy()
        replay.seen, self.average_reward, self.first = state["seen"], state["average_reward"], state["first"]
        self.rng.bit_generator.state = json.loads(state["rng"])


def _check_generator(text: Any) -> None:
    """UserError unless this is the state of a generator of random numbers, as JSON."""
    try:
        generator(json.loads(text))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError("it must be the state of a generator of random numbers") from error


def _mlp(n_in: int, hidden: int) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(n_in, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))
    nn.init.uniform_(net[-1].weight, -LAST_LAYER, LAST_LAYER)
    nn.init.uniform_(net[-1].bias, -LAST_LAYER, LAST_LAYER)
    return net


def _actor_output(state: np.ndarray, weights: list[np.ndarray]) -> float:
    w1, b1, w2, b2, w3, b3 = weights
    hidden = np.maximum(w2 @ np.maximum(w1 @ state + b1, 0) + b2, 0)
    return float(1 / (1 + np.exp(-(w3 @ hidden + b3)[0])))
