"""The agent of HAQ and its episodes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from apq.errors import UserError
from apq.resume import Resume
from methods.search.agent import Agent, Replay, truncated_normal
from methods.search.episodes import find
from methods.search.observations import with_last_action
from methods.search.settings import AgentConfig

FEATURES = with_last_action(np.random.default_rng(0).random((6, 3)).astype(np.float32))
QUICK = AgentConfig(episodes=12, warmup=4, hidden=16, batch_size=8)
TARGET = np.array([0.2, 0.9, 0.5, 0.1, 0.7, 0.3])


def decide(actions):
    return np.round(100 * actions).astype(int)


def score(candidate, episode):
    return -float(np.mean((candidate / 100 - TARGET) ** 2)), {"accuracy": float(candidate.mean())}


@pytest.mark.parametrize(("mean", "width"), [(0.5, 0.5), (0.05, 0.2), (1.0, 0.01)])
def test_truncated_normal(mean, width):
    rng = np.random.default_rng(0)
    drawn = np.array([truncated_normal(mean, width, rng) for _ in range(4000)])
    expected = stats.truncnorm(-mean / width, (1 - mean) / width, loc=mean, scale=width)
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert drawn.mean() == pytest.approx(expected.mean(), abs=4 * expected.std() / np.sqrt(4000))
    assert drawn.std() == pytest.approx(expected.std(), rel=0.06)


def test_warmup_is_one_episode_longer_than_its_number(monkeypatch):
    """train() of HAQ's rl_quantize.py draws while `episode <= warmup`, from episode 0: with 4 the first five. DDPG's
    select_action has the noise init_delta delta_decay^(episode - warmup): in episode 5 it is 0.5 * 0.99."""
    widths = []

    def drawn_with(mean, width, rng):
        widths.append(width)
        return 0.25

    monkeypatch.setattr("methods.search.agent.truncated_normal", drawn_with)
    agent, acted = Agent(FEATURES, QUICK), []
    for _ in range(8):
        states, actions = agent.act()
        acted.append((actions == 0.25).all())
        agent.observe(states, actions, 0.0)
    assert acted == [False] * 5 + [True] * 3
    assert widths == pytest.approx(6 * [0.495] + 6 * [0.49005] + 6 * [0.4851495])
    history = find(FEATURES, decide, score, replace(QUICK, episodes=8)).history
    assert [record["noise"] for record in history] == pytest.approx([1.0] * 5 + [0.495, 0.49005, 0.4851495])


def acting_agent(**changes):
    """An agent after its last random episode."""
    agent = Agent(FEATURES, replace(QUICK, warmup=0, **changes))
    agent.observe(*agent.act(), 0.0)
    return agent


def test_states_end_in_the_action_before():
    agent = acting_agent()
    states, actions = agent.act()
    assert states.shape == (6, 4)
    assert (states[:, :-1] == FEATURES.rows[:, :-1]).all()
    assert states[:, -1].tolist() == pytest.approx([0, *actions[:-1]])
    # numpy and torch agree on the actor
    agent = acting_agent(noise=1e-9)
    states, actions = agent.act()
    with torch.no_grad():
        expected = agent.actor(torch.from_numpy(states).float()).sigmoid().squeeze(1)
    np.testing.assert_allclose(actions, expected, atol=1e-5)


def test_replay_keeps_the_last_episodes():
    replay = Replay(3, 2, 1)
    for i in range(5):
        replay.add(np.full((2, 1), i), np.full(2, i), i)
    assert len(replay) == 3
    states, actions, rewards, following, goes_on = replay.sample(200, np.random.default_rng(0))
    assert set(rewards.flatten().tolist()) == {2, 3, 4}
    assert (states == rewards).all()
    assert (actions == rewards).all()
    assert (following == rewards).all()
    assert 0.3 < goes_on.mean() < 0.7


def test_one_update_by_hand():
    """Average reward, target of the critic and update of the target networks, against a plain computation."""
    config = replace(QUICK, discount=0.5, target_rate=0.1)
    agent = Agent(FEATURES, config)
    before = {key: value.clone() for key, value in agent.targets.state_dict().items()}
    states, following = torch.rand(8, 4), torch.rand(8, 4)
    actions, rewards = torch.rand(8, 1), torch.rand(8, 1)
    goes_on = torch.tensor([[1.0], [0.0]] * 4)
    target_actor, target_critic = agent.targets
    with torch.no_grad():
        values = target_critic(torch.cat([following, target_actor(following).sigmoid()], dim=1))
        target_values = rewards - rewards.mean() + 0.5 * goes_on * values  # the first batch sets the average
    critic = Agent(FEATURES, config).critic
    optimizer = torch.optim.Adam(critic.parameters(), lr=config.critic_lr)
    (critic(torch.cat([states, actions], dim=1)) - target_values).square().mean().backward()
    optimizer.step()
    agent.update(states, actions, rewards, following, goes_on)
    assert agent.average_reward == pytest.approx(rewards.mean().item())
    for own, expected in zip(agent.critic.parameters(), critic.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)
    sources = dict(torch.nn.ModuleList([agent.actor, agent.critic]).state_dict())
    for key, value in agent.targets.state_dict().items():
        torch.testing.assert_close(value, 0.9 * before[key] + 0.1 * sources[key])
    agent.update(states, actions, rewards + 1, following, goes_on)
    assert agent.average_reward == pytest.approx(rewards.mean().item() + 0.5)


def test_actor_climbs_the_critic():
    """After one step of the actor the critic values its actions higher, and the critic itself has not changed."""
    agent = Agent(FEATURES, replace(QUICK, actor_lr=1e-3, critic_lr=1e-12))
    torch.nn.init.normal_(agent.critic[-1].weight)
    states = torch.rand(64, 4)

    def value():
        with torch.no_grad():
            return agent.critic(torch.cat([states, agent.actor(states).sigmoid()], dim=1)).mean().item()

    before = value()
    agent.update(states, torch.rand(64, 1), torch.rand(64, 1), states, torch.ones(64, 1))
    assert value() > before


def test_same_seed_same_search():
    first, again = (find(FEATURES, decide, score, QUICK) for _ in range(2))
    assert first.history == again.history
    assert (first.candidate == again.candidate).all()
    assert find(FEATURES, decide, score, replace(QUICK, seed=1)).history != first.history


def test_finds_better_than_random():
    config = AgentConfig(episodes=150, hidden=64, actor_lr=1e-3)
    for seed in range(3):
        agent = find(FEATURES, decide, score, replace(config, seed=seed))
        random = find(FEATURES, decide, score, replace(config, seed=seed, warmup=150))
        late = np.mean([record["reward"] for record in agent.history[-30:]])
        assert late > np.mean([record["reward"] for record in random.history])
        assert agent.record["reward"] > random.record["reward"]


def test_best_is_the_first_of_the_best():
    found = find(FEATURES, decide, lambda candidate, episode: (min(episode, 5), {}), QUICK)
    assert found.episode == 5
    assert [record["best_reward"] for record in found.history] == [0, 1, 2, 3, 4, *[5] * 7]


@pytest.mark.parametrize("text", ["", "not a checkpoint"])
def test_damaged_states(tmp_path, text):
    file = tmp_path / "state"
    file.write_text(text)
    with pytest.raises(UserError, match="give --overwrite to start anew, or remove it"):
        find(FEATURES, decide, score, QUICK, resume=Resume(file, {}, "search"))
    whole = find(FEATURES, decide, score, QUICK)
    assert find(FEATURES, decide, score, QUICK, resume=Resume(file, {}, "search", True)).history == whole.history


def test_known_candidates_are_not_scored_again():
    asked = []

    def count(candidate, episode):
        asked.append(tuple(candidate))
        return float(candidate.sum()), {"accuracy": 0.0}

    found = find(FEATURES, lambda actions: (actions > 0.5).astype(int)[:2], count, QUICK)
    assert len(asked) == len(set(asked)) <= 4
    assert len(found.history) == 12


@pytest.mark.parametrize("stop", [2, 9])
def test_resumes(tmp_path, stop):
    whole = find(FEATURES, decide, score, QUICK)
    resume, other = (Resume(tmp_path / "state.pt", {"a": a}, "search") for a in (1, 2))

    def killed(candidate, episode):
        if episode == stop:
            raise KeyboardInterrupt
        return score(candidate, episode)

    with pytest.raises(KeyboardInterrupt):
        find(FEATURES, decide, killed, QUICK, resume=resume)
    scored = []
    resumed = find(FEATURES, decide, lambda c, e: scored.append(e) or score(c, e), QUICK, resume=resume)
    assert scored[0] == stop
    assert resumed.history == whole.history
    assert (resumed.candidate == whole.candidate).all()
    with pytest.raises(UserError, match="belongs to another search: a was 1, is 2"):
        find(FEATURES, decide, score, QUICK, resume=other)
    other.restart = True
    assert find(FEATURES, decide, score, QUICK, resume=other).history == whole.history


@pytest.mark.parametrize(
    "wrong",
    [{"episodes": 0}, {"warmup": -1}, {"noise": 0.0}, {"target_rate": 0.0}, {"discount": 1.5}, {"updates": -1}],
)
def test_bad_settings(wrong):
    with pytest.raises(UserError):
        AgentConfig(**wrong)
