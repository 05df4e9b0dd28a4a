"""A state that no run can have saved is told, and with --overwrite replaced: whatever in it is missing or changed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from test_architecture import FLOOR, files_of
from test_ddpg import FEATURES, QUICK, decide, score
from test_sequential import STATE, whole_way

from apq import schema
from apq.checkpoint import load_checkpoint, save_checkpoint
from apq.errors import UserError
from apq.presets import DIGITS
from apq.resume import FORMAT, Resume
from elastic_nn.networks import DynamicProxylessNASNets
from elastic_nn.training.finetune import finetune
from elastic_nn.training.progressive_shrinking import SupernetPlan, train_supernet
from elastic_nn.training.recipe import TrainConfig
from elastic_nn.training.recipes import RECIPES
from elastic_nn.training.session import Session
from methods.nsga2.config import Nsga2Config
from methods.nsga2.front_finder import Objective, find_front
from methods.search.episodes import find
from methods.search.evolution_finder import EvolutionConfig, EvolutionFinder
from utils.predictor_training import PredictorConfig, train_predictor

CPU, MOST_DAMAGES = torch.device("cpu"), 24
SHORT = replace(RECIPES["tiny"], phases=RECIPES["tiny"].phases[:2])


def accuracy(genes):
    return genes.sum(1) / 1000


def cost(genes):
    return 1.0 + genes[:, :8].sum(1)


def evolution(resume, few):
    config = EvolutionConfig(population=8, generations=3)
    return EvolutionFinder(DIGITS, accuracy, cost, 100.0, config).run(resume=resume).history


def nsga2(resume, few):
    objectives = [Objective(name="top1", score=accuracy, maximise=True), Objective(name="cost", score=cost)]
    return find_front(DIGITS, objectives, Nsga2Config(population=8, generations=3), resume=resume).history


def episodes(resume, few):
    return find(FEATURES, decide, score, QUICK, resume=resume).history


def finetuned(resume, few):
    torch.manual_seed(1)
    net = DynamicProxylessNASNets(space=DIGITS).get_active_subnet()
    config = TrainConfig(epochs=1, lr=0.1, batch_size=64)
    return finetune(net, Session(splits=few, device=CPU), config, side=32, resume=resume)[0]


def supernet(resume, few):
    plan = SupernetPlan(space=DIGITS, recipe=SHORT)
    return train_supernet(plan, Session(splits=few, device=CPU, seed=3), resume)[1]


def predictor(resume, few):
    from apq.genes import sample

    genes = sample(DIGITS, 12, np.random.default_rng(0))
    config = PredictorConfig(epochs=2, hidden=8)
    return train_predictor(genes, accuracy(genes), DIGITS, quantize=True, config=config, resume=resume)[1]


WORKS = {work.__name__: work for work in (evolution, nsga2, episodes, finetuned, supernet, predictor)}
FREE = {"history", "records", "epochs"}  # told to people: their contents may be anything, the rest depends on them not


@dataclass(frozen=True)
class Damage:
    """A change of one place of a state."""

    place: tuple[Any, ...]
    what: str
    value: Callable[[Any], Any]

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.place))} {self.what}"

    def applied(self, state):
        state = copy.deepcopy(state)
        inner = state
        for key in self.place[:-1]:
            inner = inner[key]
        if self.what == "missing":
            del inner[self.place[-1]]
        else:
            inner[self.place[-1]] = self.value(inner[self.place[-1]])
        return state


LEAVES = {
    "text": lambda value: "x",
    "object": lambda value: {"x": 1},
    "list": lambda value: [["x"]],
}
TENSORS = {
    "longer": lambda tensor: torch.cat([tensor.reshape(-1), torch.zeros(7).to(tensor)]),
    "of another type": lambda tensor: tensor.to(torch.complex64),
    "not a number": lambda tensor: torch.full_like(tensor.double(), np.nan),
}


def damages(value, place=()):
    """All changes of a state, of its parts and of theirs."""
    if place:
        if place[-2:-1] != ("state",):  # an optimizer has no state of a parameter that it has not changed
            yield Damage(place, "missing", copy.copy)
        kinds = TENSORS if isinstance(value, torch.Tensor) else LEAVES
        yield from (Damage(place, what, change) for what, change in kinds.items())
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        if not FREE & {*map(str, place), str(key)} and (key == "__ndarray__" or not isinstance(key, int) or key < 3):
            yield from damages(item, (*place, key))


def told(work, damage):
    """The error of work that finds a damaged state."""
    try:
        work()
    except UserError as error:
        return str(error) if "; give --overwrite to start anew" in str(error) else f"no remedy: {error}"
    return f"believed: {damage}"


@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
def test_damaged_states_are_told_and_replaced(few, tmp_path, monkeypatch, work):
    resume = Resume(tmp_path / "a.state.pt", {"seed": 0}, "search")
    whole = work(resume, few)
    assert work(resume, few) == whole  # from the state
    saved = load_checkpoint(resume.file)
    every = list(damages(saved["state"]))
    assert len(every) > 20
    top = [damage for damage in every if len(damage.place) == 1]
    n = MOST_DAMAGES // 4 if work in (finetuned, supernet) else MOST_DAMAGES  # building networks takes long
    chosen = [damage for part in (top, every) for damage in random.Random(0).sample(part, min(n, len(part)))]
    for damage in chosen:
        save_checkpoint(resume.file, {**saved, "state": damage.applied(saved["state"])})
        assert "a.state.pt is damaged: " in told(partial(work, resume, few), damage)
    assert work(Resume(resume.file, {"seed": 0}, "search", restart=True), few) == whole


def test_all_work_checks_its_state():
    files = [file for room in FLOOR for file in files_of(room)]
    assert not [str(file) for file in files if "resume.load()" in file.read_text()]


@pytest.mark.parametrize("key", ["format", "asked", "state"])
@pytest.mark.parametrize(
    "value",
    [None, "x", [1], {"x": 1}, torch.ones(2), "[" * 10**5],
    ids=["none", "text", "list", "object", "tensor", "deep"],
)
def test_what_states_are_wrapped_in(tmp_path, key, value):
    resume = Resume(tmp_path / "a.state.pt", {"seed": 0}, "search")
    resume.save({"n": np.arange(3)})
    save_checkpoint(resume.file, {**load_checkpoint(resume.file), key: value})
    check = schema.fields(n=schema.array("i", 3))
    with pytest.raises(UserError, match="--overwrite"):
        resume.load(check)
    assert Resume(resume.file, {"seed": 0}, "search", restart=True).load(check) is None


@pytest.mark.parametrize(
    "stored", [1, "x", torch.ones(3, dtype=torch.bfloat16), torch.nn.Parameter(torch.ones(3))], ids=str
)
def test_arrays_of_states(tmp_path, stored):
    resume = Resume(tmp_path / "a.state.pt", {}, "search")
    save_checkpoint(resume.file, {"format": FORMAT, "asked": "{}", "state": {"n": {"__ndarray__": stored}}})
    if isinstance(stored, torch.nn.Parameter):
        assert resume.load()["n"].tolist() == [1, 1, 1]
        return
    with pytest.raises(UserError, match="for an array; give --overwrite"):
        resume.load()


def test_a_flipped_bit_of_a_state_is_told(tmp_path):
    """Most bytes of a state are numbers that any value fits: only a checksum tells."""
    resume = Resume(tmp_path / "a.state.pt", {}, "search")
    resume.save({"w": torch.arange(500.0)})
    whole = resume.file.read_bytes()
    start = whole.index(torch.arange(500.0).numpy().tobytes())
    for place in range(start, start + 2000, 97):
        resume.file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match="checksum"):
            resume.load()


def test_a_sequential_search_checks_its_stages(few, tmp_path):
    whole = whole_way(few, tmp_path)
    saved = load_checkpoint(tmp_path / STATE)
    state = saved["state"]
    every = [d for d in damages(state) if "weights" not in d.place[:-1]]
    every += [Damage(("pruned", "weights", next(iter(state["pruned"]["weights"]))), "longer", TENSORS["longer"])]
    every += [Damage(("pruned", "episode"), "beyond", lambda episode: 10**6)]
    for damage in random.Random(1).sample(every, 4) + every[-2:]:
        save_checkpoint(tmp_path / STATE, {**saved, "state": damage.applied(state)})
        assert "sequential.state.pt is damaged: " in told(partial(whole_way, few, tmp_path), damage)
    assert whole_way(few, tmp_path, restart=True).bits.policy == whole.bits.policy
