"""The episodes of an agent: act, decide on a candidate, score it, learn."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apq.checkpoint import load_checkpoint, save_checkpoint
from apq.errors import UserError
from methods.search.agent import Agent
from methods.search.settings import AgentConfig

SAVE_SECONDS = 2.0
OWN = ("episode", "reward", "best_reward", "noise")  # what a record says beside the facts of its score
STATE_KEYS = ("asked", "agent", "candidates", "history")


@dataclass(frozen=True, kw_only=True)
class Found:
    """The best candidate met, the episode that met it, and one record an episode: its number, reward, the best reward
    so far, the exploration's width, and the facts that the score came with."""

    candidate: np.ndarray
    episode: int
    history: list[dict[str, Any]]

    @property
    def record(self) -> dict[str, Any]:
        """The record of the best candidate."""
        return self.history[self.episode]


def find(
    features: np.ndarray,
    decide: Callable[[np.ndarray], np.ndarray],
    score: Callable[[np.ndarray, int], tuple[float, dict[str, float]]],
    config: AgentConfig,
    *,
    state_file: Path | None = None,
    asked: dict[str, Any] | None = None,
    restart: bool = False,
    write: bool = True,
    log: Callable[[dict[str, Any]], None] = lambda record: None,
) -> Found:
    """Run all episodes of an agent whose steps have these `features` (steps, S - 1).

    `decide` makes a whole-numbered candidate of an episode's actions (steps,) in 0..1; `score` gives its reward and
    what else is known of it, once for each candidate: the same one again has the same score. While it works the agent
    learns from the episodes before, in another thread. The same seed gives the same result.

    With a `state_file` the state is saved every few seconds (by the process that may `write`) and the same call
    continues; `asked` is all that the result depends on: the state of another search is an error, or with `restart` it
    is dropped.
    """
    agent = Agent(features, config)
    candidates: list[np.ndarray] = []
    history: list[dict[str, Any]] = []
    if state_file is not None and (state := _load(state_file, asked, restart)) is not None:
        agent.load_state_dict(state["agent"])
        candidates, history = list(state["candidates"].numpy()), state["history"]
        for record in history:
            log(record)
    known = {candidate.tobytes(): record for candidate, record in zip(candidates, history, strict=True)}
    saved = time.monotonic()
    # Beside the scoring, so that on two cores, or with the network on a GPU, an episode takes as long as its score. The
    # thread keeps to one core, as its layers are small.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as learner:
        for episode in range(len(history), config.episodes):
            noise = agent.noise if episode >= config.warmup else 1.0
            states, actions = agent.act()
            candidate = np.asarray(decide(actions), dtype=np.int64)
            learning = learner.submit(agent.learn)
            if (before := known.get(candidate.tobytes())) is None:
                reward, facts = score(candidate, episode)
            else:
                reward, facts = before["reward"], {key: before[key] for key in before if key not in OWN}
            learning.result()
            agent.observe(states, actions, reward)
            best = max(reward, history[-1]["best_reward"]) if history else reward
            record = {"episode": episode, "reward": reward, "best_reward": best, "noise": noise, **facts}
            candidates.append(candidate)
            history.append(record)
            known[candidate.tobytes()] = record
            log(record)
            if state_file is not None and write and time.monotonic() - saved > SAVE_SECONDS:
                _save(state_file, asked, agent, candidates, history)
                saved = time.monotonic()
    best_episode = int(np.argmax([record["reward"] for record in history]))
    return Found(candidate=candidates[best_episode], episode=best_episode, history=history)


def _save(
    file: Path,
    asked: dict[str, Any] | None,
    agent: Agent,
    candidates: list[np.ndarray],
    history: list[dict[str, Any]],
) -> None:
    tried = torch.from_numpy(np.stack(candidates))
    save_checkpoint(file, {"asked": asked, "agent": agent.state_dict(), "candidates": tried, "history": history})


def _load(file: Path, asked: dict[str, Any] | None, restart: bool) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        state = load_checkpoint(file, STATE_KEYS)
        if state["asked"] == asked:
            return state
        raise UserError(f"{file} belongs to another search")
    except UserError as error:
        if restart:
            return None
        raise UserError(f"{error}; remove it or give --overwrite") from error
