"""The episodes of an agent: act, turn the actions into a candidate, score it, learn."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from apq.errors import UserError
from apq.files import Record
from apq.limits import LARGEST_LAYER
from apq.resume import NOT_KEPT, Resume, State
from apq.schema import array, each, fields, mapping, number, whole
from methods.search.agent import Agent
from methods.search.observations import Observations
from methods.search.settings import AgentConfig

OWN = ("episode", "reward", "best_reward", "noise")  # keys of a record that do not come from `score`


@dataclass(frozen=True, kw_only=True)
class Found:
    """The best candidate, the number of its episode, and one record an episode.

    A record has the number of the episode, its reward, the best reward so far, the width of the exploration noise, and
    the facts that `score` returned.
    """

    candidate: np.ndarray
    episode: int
    history: list[Record]

    @property
    def record(self) -> Record:
        """The record of the best candidate."""
        return self.history[self.episode]


def find(
    observations: Observations,
    decide: Callable[[np.ndarray], np.ndarray],
    score: Callable[[np.ndarray, int], tuple[float, dict[str, float]]],
    config: AgentConfig,
    *,
    resume: Resume = NOT_KEPT,
    log: Callable[[Record], None] = lambda record: None,
) -> Found:
    """Run all episodes of an agent with these observations.

    `decide` turns the actions (steps,) of an episode, from 0 to 1, into a candidate of whole numbers. `score` returns
    its reward and other facts; a candidate that comes up again keeps its first score. While a candidate is scored, the
    agent learns from earlier episodes in another thread. The same seed gives the same result.

    The state is saved after an episode when that is due. `log` is called with each record, also with those of a state.
    """
    agent = Agent(observations, config)
    candidates, history = _restored(agent, resume.load(partial(_check, agent, decide)))
    for record in history:
        log(record)
    scored = {candidate.tobytes(): record for candidate, record in zip(candidates, history, strict=True)}
    # One thread, because the layers of the agent are too small to gain from more.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as learner:
        for episode in range(len(history), config.episodes):
            noise = agent.noise if episode > config.warmup else 1.0
            states, actions = agent.act()
            candidate = np.asarray(decide(actions), dtype=np.int64)
            learning = learner.submit(agent.learn)
            if (before := scored.get(candidate.tobytes())) is None:
                reward, facts = score(candidate, episode)
            else:
                reward, facts = before["reward"], {key: before[key] for key in before if key not in OWN}
            learning.result()
            agent.observe(states, actions, reward)
            best = max(reward, history[-1]["best_reward"]) if history else reward
            record = {"episode": episode, "reward": reward, "best_reward": best, "noise": noise, **facts}
            candidates.append(candidate)
            history.append(record)
            scored[candidate.tobytes()] = record
            log(record)
            if resume.due:
                resume.save({"agent": agent.state_dict(), "candidates": np.stack(candidates), "history": history})
    best_episode = int(np.argmax([record["reward"] for record in history]))
    return Found(candidate=candidates[best_episode], episode=best_episode, history=history)


def _check(agent: Agent, decide: Callable[[np.ndarray], np.ndarray], state: Any) -> None:
    """UserError unless these episodes can have saved the state."""
    shape = np.shape(decide(np.zeros(len(agent.observations))))  # of a candidate
    n = len(state["history"]) if isinstance(state, dict) and isinstance(state.get("history"), list) else 0
    fields(
        agent=agent.check_state, candidates=array("i", n, *shape, low=-1, high=LARGEST_LAYER), history=each(mapping)
    )(state)
    scores = dict.fromkeys(("reward", "best_reward", "noise"), number())
    for place, record in enumerate(state["history"]):
        facts = {key: number() for key in record if key not in OWN}
        fields(episode=whole(place, place), **scores, **facts)(record)
    if state["agent"]["seen"] != n:
        raise UserError("its agent has seen other episodes")


def _restored(agent: Agent, state: State | None) -> tuple[list[np.ndarray], list[Record]]:
    """Restore the agent from a state. Returns the candidates and records of its episodes, none without a state."""
    if state is None:
        return [], []
    agent.load_state_dict(state["agent"])
    return list(state["candidates"]), state["history"]
