"""Kill -9 at random moments of every stage, then the same command again: the result is that of a run without kills."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from preloaded import Preloaded

from apq.files import read_jsonl

KILLS = 3
ENV = {"APQ_PLUGINS": "kill_plugin", "PYTHONPATH": str(ROOT / "tests")}


@pytest.fixture(scope="module")
def run_both(tmp_path_factory, preloaded, preloaded_twin):
    """Runs a command in two folders, without kills in `whole` and killed three times in `killed`; has their `root`."""
    root = tmp_path_factory.mktemp("kill")
    for side in ("whole", "killed"):
        (root / side).mkdir()
    return Both(root, preloaded, preloaded_twin)


class Both:
    """The two folders. Processes of one have another seed of Python's hashes than those of the other."""

    def __init__(self, root: Path, whole: Preloaded, killed: Preloaded) -> None:
        self.root, self.servers = root, {"whole": whole, "killed": killed}

    def start(self, side, command):
        return self.servers[side].start([ROOT / command[0], *command[1:]], cwd=self.root / side, env=ENV)

    def finish(self, command, sides=("whole", "killed")):
        for run in [self.start(side, command) for side in sides]:
            assert run.wait() == 0, run.stderr

    def __call__(self, command, watched, seed, step):
        self.finish(command, ["whole"])
        self.kill_thrice(command, self.root / "killed" / watched, random.Random(seed), step)
        self.finish(command, ["killed"])

    def kill_thrice(self, command, watched, moments, step):
        """Kill the command three times, each time after progress and a random wait of up to `step` seconds."""
        for _ in range(KILLS):
            before, run = progress(watched), self.start("killed", command)
            while progress(watched) == before:
                assert run.poll() is None, f"{command} ended before it could be killed: {run.stderr}"
                time.sleep(0.002)
            time.sleep(moments.uniform(0, step))
            run.kill()
            assert run.wait() == -signal.SIGKILL, f"{command} had ended before the kill"
        assert watched.exists()

    def read(self, name, read=Path.read_text):
        """A file of both folders."""
        return [read(self.root / side / name) for side in self.servers]


def progress(path: Path):
    """A value that changes whenever the work makes progress."""
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else None


def same_tensors(both, name, key):
    one, other = both.read(name, lambda path: torch.load(path, weights_only=True)[key])
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def same_files(both, folder, names):
    for name in names:
        one, other = both.read(f"{folder}/{name}")
        assert one == other, name


def test_supernet_training(run_both):
    command = ["train.py", "--recipe", "tiny"]
    run_both(command, "models/digits/supernet.state.pt", 0, 0.1)
    assert same_tensors(run_both, "models/digits/supernet.pt", "state_dict")
    same_files(run_both, "models/digits", ["training.json"])


def test_pair_gathering(run_both):
    command = ["search.py", "--prepare", "acc", "--acc_train_sample", "40"]
    run_both(command, "dataset/NetInfo/digits/acc/pairs.jsonl", 1, 0.2)
    pairs = run_both.read("dataset/NetInfo/digits/acc/pairs.jsonl", read_jsonl)
    assert pairs[0] == pairs[1]
    assert [record["index"] for record in pairs[0]] == list(range(40))
    assert same_tensors(run_both, "models/digits/acc.pt", "state_dict")


def test_predictor_training(run_both):
    """On many pairs, copies of the gathered ones, so that training takes long enough."""
    for side in ("whole", "killed"):
        folder = run_both.root / side / "dataset/NetInfo/digits/acc"
        lines = (folder / "pairs.jsonl").read_text().splitlines()
        longer = [line.replace('{"index": ', '{"index": ' + str(n), 1) for n in range(1, 10) for line in lines]
        numbered = [f'{{"index": {i}, {line.split(", ", 1)[1]}' for i, line in enumerate(lines + longer)]
        (folder / "pairs.jsonl").write_text("\n".join(numbered) + "\n")
    command = ["search.py", "--prepare", "acc", "--overwrite", "--acc_train_sample", "400"]
    run_both(command, "models/digits/acc.state.pt", 2, 0.15)
    assert same_tensors(run_both, "models/digits/acc.pt", "state_dict")
    assert not (run_both.root / "killed/models/digits/acc.state.pt").exists()


def test_search(run_both):
    run_both.finish(["search.py", "--prepare", "acc_quant", "--acc_train_sample", "12", "--recipe", "tiny"])
    command = ["search.py", "--constraint", "0.05", "--population", "100", "--generations", "300", "--exp_name", "e"]
    run_both(command, "exps/e/search.state.pt", 3, 0.15)
    same_files(run_both, "exps/e", ["arch", "lat", "history.jsonl", "config.json"])
    assert not (run_both.root / "killed/exps/e/search.state.pt").exists()


def test_search_that_measures(run_both):
    """By the predictor that the search before it needed; its measurements are in an archive of each folder."""
    command = ["search.py", "--constraint", "0.05", "--population", "100", "--generations", "20", "--exp_name", "m"]
    command += ["--refine", "2", "--measure", "8"]
    run_both(command, "dataset/NetInfo/digits/acc_quant_measured/pairs.jsonl", 8, 0.15)
    same_files(run_both, "exps/m", ["arch", "lat", "history.jsonl", "config.json"])
    same_files(run_both, "dataset/NetInfo/digits/acc_quant_measured", ["pairs.jsonl", "meta.json"])
    assert not list((run_both.root / "killed/exps/m").glob("*.state.pt"))


def test_search_of_a_front(run_both):
    command = ["search.py", "--mode", "nsga2", "--population", "200", "--generations", "500", "--exp_name", "front"]
    command += ["--acc_predictor_dir", str(ROOT / "models/digits")]  # as shipped: the test needs none before it
    run_both(command, "exps/front/front.state.pt", 6, 0.15)
    same_files(run_both, "exps/front", ["arch", "lat", "history.jsonl", "config.json", "front.json"])
    assert not (run_both.root / "killed/exps/front/front.state.pt").exists()


def test_finetune(run_both):
    command = ["quant_aware.py", "--exp_name", "e", "--epochs", "16"]
    run_both(command, "exps/e/checkpoint/checkpoint.pth.tar", 4, 0.1)
    assert same_tensors(run_both, "exps/e/checkpoint/model_best.pth.tar", "state_dict")
    same_files(run_both, "exps/e", ["acc"])


def test_search_of_bits(run_both):
    words = ["--images", "digits", "--recipe", "tiny", "--epochs", "1"]
    run_both.finish(["train.py", "--model", "mobilenet_v1_small", *words])
    command = ["search.py", "--mode", "ddpg", "--model", "mobilenet_v1_small", "--recipe", "tiny", "--exp_name", "bits"]
    command += ["--train_episode", "40", "--preserve_ratio", "0.8", "--hidden", "16"]
    command += ["--warmup", "1", "--lr_a", "0.01", "--lr_c", "0.01"]  # the agent learns before it is killed
    run_both(command, "exps/bits/agent.state.pt", 5, 0.15)
    same_files(run_both, "exps/bits", ["policy.json", "lat", "history.jsonl", "config.json"])
    assert not (run_both.root / "killed/exps/bits/agent.state.pt").exists()


def test_search_of_bits_by_sensitivity(run_both):
    command = ["search.py", "--mode", "sensitivity", "--model", "mobilenet_v1_small", "--recipe", "tiny"]
    command += ["--preserve_ratio", "0.8", "--exp_name", "by_loss"]
    run_both(command, "exps/by_loss/sensitivity.state.jsonl", 7, 0.15)
    same_files(run_both, "exps/by_loss", ["policy.json", "lat", "history.jsonl", "config.json"])
    assert not list((run_both.root / "killed/exps/by_loss").glob("*.state*"))
