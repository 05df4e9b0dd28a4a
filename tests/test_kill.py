"""Kill -9 at random moments of every stage, then the same command again: the result is that of a run without kills."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from apq.files import read_json, read_jsonl

KILLS = 3


def start(command, cwd):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(ROOT / command[0]), *command[1:]]
    return subprocess.Popen(words, cwd=cwd, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(command, cwd):
    process = start(command, cwd)
    message = process.communicate(timeout=300)[1]
    assert process.returncode == 0, message


def progress(path: Path):
    """A value that changes whenever the work makes progress."""
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else None


def kill_thrice(command, cwd, watched, moments, step):
    """Kill the command three times, each time after progress and a random wait of up to `step` seconds."""
    for _ in range(KILLS):
        before, process = progress(watched), start(command, cwd)
        while progress(watched) == before:
            assert process.poll() is None, f"{command} ended before it could be killed: {process.communicate()[1]}"
            time.sleep(0.002)
        time.sleep(moments.uniform(0, step))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"{command} had ended before the kill"
    assert watched.exists()


def run_both(command, root, watched, seed, step):
    """Run the command in two folders: without kills in `whole`, killed three times in `killed`."""
    finish(command, root / "whole")
    kill_thrice(command, root / "killed", root / "killed" / watched, random.Random(seed), step)
    finish(command, root / "killed")


def same_tensors(root, name, key):
    one, other = (torch.load(root / side / name, weights_only=True)[key] for side in ("whole", "killed"))
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("kill")
    for side in ("whole", "killed"):
        (path / side).mkdir()
    return path


def test_supernet_training(root):
    command = ["train.py", "--recipe", "tiny"]
    run_both(command, root, "models/digits/supernet.state.pt", 0, 0.4)
    assert same_tensors(root, "models/digits/supernet.pt", "state_dict")
    records = [read_json(root / side / "models/digits/training.json") for side in ("whole", "killed")]
    assert records[0] == records[1]


def test_pair_gathering(root):
    command = ["search.py", "--prepare", "acc", "--acc_train_sample", "60"]
    run_both(command, root, "dataset/NetInfo/digits/acc/pairs.jsonl", 1, 0.6)
    pairs = [read_jsonl(root / side / "dataset/NetInfo/digits/acc/pairs.jsonl") for side in ("whole", "killed")]
    assert pairs[0] == pairs[1]
    assert [record["index"] for record in pairs[0]] == list(range(60))
    assert same_tensors(root, "models/digits/acc.pt", "state_dict")


def test_predictor_training(root):
    """On many pairs, copies of the gathered ones, so that training takes long enough."""
    for side in ("whole", "killed"):
        folder = root / side / "dataset/NetInfo/digits/acc"
        lines = (folder / "pairs.jsonl").read_text().splitlines()
        longer = [line.replace('{"index": ', '{"index": ' + str(n), 1) for n in range(1, 25) for line in lines]
        numbered = [f'{{"index": {i}, {line.split(", ", 1)[1]}' for i, line in enumerate(lines + longer)]
        (folder / "pairs.jsonl").write_text("\n".join(numbered) + "\n")
    command = ["search.py", "--prepare", "acc", "--overwrite", "--acc_train_sample", "1500"]
    run_both(command, root, "models/digits/acc.state.pt", 2, 1.0)
    assert same_tensors(root, "models/digits/acc.pt", "state_dict")
    assert not (root / "killed/models/digits/acc.state.pt").exists()


def test_search(root):
    for side in ("whole", "killed"):
        finish(["search.py", "--prepare", "acc_quant", "--acc_train_sample", "12"], root / side)
    command = ["search.py", "--constraint", "0.05", "--population", "100", "--generations", "2500", "--exp_name", "e"]
    run_both(command, root, "exps/e/search.state.pt", 3, 0.5)
    for name in ("arch", "lat", "history.jsonl", "config.json"):
        one, other = ((root / side / "exps/e" / name).read_text() for side in ("whole", "killed"))
        assert one == other, name
    assert not (root / "killed/exps/e/search.state.pt").exists()


def test_search_of_a_front(root):
    command = ["search.py", "--mode", "nsga2", "--population", "200", "--generations", "2500", "--exp_name", "front"]
    command += ["--acc_predictor_dir", str(ROOT / "models/digits")]  # as shipped: the test needs none before it
    run_both(command, root, "exps/front/front.state.pt", 6, 0.5)
    for name in ("arch", "lat", "history.jsonl", "config.json", "front.json"):
        one, other = ((root / side / "exps/front" / name).read_text() for side in ("whole", "killed"))
        assert one == other, name
    assert not (root / "killed/exps/front/front.state.pt").exists()


def test_finetune(root):
    command = ["quant_aware.py", "--exp_name", "e", "--epochs", "8"]
    run_both(command, root, "exps/e/checkpoint/checkpoint.pth.tar", 4, 0.5)
    assert same_tensors(root, "exps/e/checkpoint/model_best.pth.tar", "state_dict")
    assert read_json(root / "whole/exps/e/acc") == read_json(root / "killed/exps/e/acc")


def test_search_of_bits(root):
    for side in ("whole", "killed"):
        words = ["--images", "digits", "--recipe", "tiny", "--epochs", "1"]
        finish(["train.py", "--model", "mobilenet_v1_small", *words], root / side)
    command = ["search.py", "--mode", "ddpg", "--model", "mobilenet_v1_small", "--recipe", "tiny", "--exp_name", "bits"]
    command += ["--train_episode", "120", "--preserve_ratio", "0.8"]
    run_both(command, root, "exps/bits/agent.state.pt", 5, 0.5)
    for name in ("policy.json", "lat", "history.jsonl", "config.json"):
        one, other = ((root / side / "exps/bits" / name).read_text() for side in ("whole", "killed"))
        assert one == other, name
    assert not (root / "killed/exps/bits/agent.state.pt").exists()
