"""`search.py --refine ROUNDS --measure N`: searches that measure what they find and learn from it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import script
from example_spaces import TINY

import apq.experiment
import methods.prepare.predictor
from apq.files import read_json, read_jsonl
from apq.genes import genes_of, sample, subnets_of
from apq.model_folder import ModelFolder
from apq.resume import Resume
from apq.stages import Stage
from apq.subnet import spec_of, subnet_from_spec
from dataset import load_splits
from dataset.pairs import PairStore
from elastic_nn.networks.supernet_file import save_supernet
from elastic_nn.quantizers import BATCHQUANT
from elastic_nn.training.inheritance import first_supernet
from methods.search.measurement import Measurement

search = script("search")

CPU = torch.device("cpu")
SPACE = replace(
    TINY,
    name="small",
    resolutions=(16,),
    stages=(Stage(width=8, stride=2, depths=(1, 2)), Stage(width=16, stride=1, depths=(1, 2))),
)
N_PAIRS = 14
MODELS = ["--acc_predictor_dir", "models/small"]
PREPARE = ["--prepare", "acc_quant", *MODELS, "--acc_train_sample", str(N_PAIRS), "--members", "2"]
EVOLUTION = ["--constraint", "1", *MODELS, "--population", "16", "--generations", "2"]
FRONT = ["--mode", "nsga2", *MODELS, "--population", "16", "--generations", "2"]
MODES = {"evolution": EVOLUTION, "nsga2": FRONT}
REFINE = ["--refine", "2", "--measure", "5"]
PAIRS = Path("dataset/NetInfo/small/acc_quant")
ARCHIVE = PAIRS.with_name("acc_quant_measured")


@pytest.fixture(scope="module")
def made(tmp_path_factory, few_digits):
    """A supernet of random weights with its pairs and a predictor of two small MLPs."""
    root = tmp_path_factory.mktemp("refine")
    folder = ModelFolder(root / "models/small")
    folder.path.mkdir(parents=True)
    torch.manual_seed(0)
    splits = load_splits(SPACE)
    supernet = first_supernet(SPACE, BATCHQUANT, None, splits, 64, CPU)
    save_supernet(folder.supernet, supernet, "tiny-qfa", splits.source)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        quick(patch)
        search(PREPARE)
    return root


def quick(patch):
    """Predictors are trained for few epochs."""
    short = partial(methods.prepare.predictor.PredictorConfig, epochs=3)
    patch.setattr(methods.prepare.predictor, "PredictorConfig", short)


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A folder with copies of all that was made."""
    shutil.copytree(made / "models", tmp_path / "models")
    shutil.copytree(made / "dataset", tmp_path / "dataset")
    monkeypatch.chdir(tmp_path)
    quick(monkeypatch)
    return tmp_path


def files_of(name):
    """All that a search wrote, without when and how."""
    folder = Path("exps") / name
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "made_by.json"}


def archived():
    """(index, spec, accuracy) of all that is in the archive."""
    return read_jsonl(ARCHIVE / "pairs.jsonl") if ARCHIVE.exists() else []


@pytest.fixture
def made_up(monkeypatch):
    """Searches measure no network and draw no pictures. Returns the subnets that they would have measured, in order."""
    measured = []

    def top1(self, subnet):
        measured.append(subnet)
        return accuracy_of(subnet)

    monkeypatch.setattr(Measurement, "top1", top1)
    monkeypatch.setattr("methods.evolution.task.plot_history", lambda history, path, **options: path.touch())
    monkeypatch.setattr("methods.nsga2.recording.plot_predicted_front", lambda *args: args[4].touch())
    return measured


def accuracy_of(subnet):
    """An accuracy that depends on all genes."""
    genes = genes_of(SPACE, [subnet])[0]
    return float(0.3 + 0.4 * np.sin(genes @ np.arange(1, len(genes) + 1)) ** 2)


def refined(mode, name, *more):
    search([*MODES[mode], *REFINE, "--exp_name", name, *more])


# Killed anywhere


class Interrupted:
    """Counts the moments before and after each write of a state, a measurement or a result. Interrupts at one."""

    def __init__(self, patch, at=None):
        self.n, self.at = 0, at
        for owner, name in ((Resume, "save"), (PairStore, "append"), (apq.experiment, "put_in_place")):
            patch.setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, call):
        def run(*args, **options):
            self.moment()
            found = call(*args, **options)
            self.moment()
            return found

        return run

    def moment(self):
        self.n += 1
        if self.n == self.at:
            raise KeyboardInterrupt


def add_to_archive():
    """What another search of this supernet would add: a subnet that no search here chooses, and one that was chosen."""
    store, theirs = PairStore(ARCHIVE), PairStore(Path("whole") / ARCHIVE)
    own = {json.dumps(one["arch"]) + json.dumps(one["policy"]) for one in read_jsonl(theirs.path / "pairs.jsonl")}
    (other,) = [s for s in subnets_of(SPACE, sample(SPACE, 20, np.random.default_rng(3))) if key(s) not in own][:1]
    last = read_jsonl(theirs.path / "pairs.jsonl")[-1]
    meta = read_json(theirs.path / "meta.json")
    with store.locked():
        store.open(SPACE, {k: v for k, v in meta.items() if k != "space"}, 0)
        for subnet in (other, subnet_from_spec(SPACE, {**last["arch"], **last["policy"]})):
            store.append(SPACE, store.next_index(), subnet, accuracy_of(subnet))


def key(subnet):
    spec = spec_of(SPACE, subnet)
    return json.dumps(spec["arch"]) + json.dumps(spec["policy"])


@pytest.mark.parametrize("mode", MODES)
def test_a_search_that_is_killed_anywhere_continues_to_the_same_result(here, made_up, monkeypatch, mode):
    monkeypatch.setattr("apq.resume.SAVE_SECONDS", 0.0)  # states in each generation
    with monkeypatch.context() as patch:
        moments = Interrupted(patch)
        refined(mode, "whole")
    whole, subnets = files_of("whole"), archived()
    shutil.copytree("dataset", "whole/dataset")
    shutil.rmtree(ARCHIVE)
    n = len(made_up)
    assert moments.n > 20
    for at in range(1 + [*MODES].index(mode), moments.n + 1, 2):  # of each mode every second moment
        made_up.clear()
        with monkeypatch.context() as patch:
            Interrupted(patch, at)
            with pytest.raises(KeyboardInterrupt):
                refined(mode, "killed")
        if others := at % 4 > 1:  # at 1 it had not begun: what the archive holds then counts
            add_to_archive()
        refined(mode, "killed")
        assert files_of("killed") == whole, at
        assert len(made_up) <= n + 1  # what was not written is measured again
        if not others:
            assert archived() == subnets
        shutil.rmtree("exps/killed")
        shutil.rmtree(ARCHIVE)
