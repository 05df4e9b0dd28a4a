"""Two processes under torchrun give the result of one. Processes with different settings stop."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from apq.files import read_jsonl
from apq.lock import locked
from apq.presets import DIGITS
from dataset.pairs import PairStore

TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def call(command, cwd, **env):
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_two_processes_train_as_one(tmp_path):
    """Progressive shrinking, a finetune with a moving average, learned steps and mixed precision by the sandwich rule;
    last batches of odd size."""
    found = []
    for name, launcher in (("one", [sys.executable]), ("two", TWO)):
        (tmp_path / name).mkdir()
        call([*launcher, ROOT / "tests/shared_training.py", tmp_path / name], ROOT)
        found.append(torch.load(tmp_path / name / "all.pt"))
    one, two = found
    for part in ("net", "finetuned", "learned", "mixed"):
        for key, tensor in one[part].items():
            torch.testing.assert_close(two[part][key], tensor, atol=1e-9, rtol=1e-7, msg=key)
    assert [record["largest_top1"] for record in one["records"]] == [r["largest_top1"] for r in two["records"]]
    assert one["top1"] == two["top1"]


def test_the_scripts_under_torchrun(tmp_path):
    call([*TWO, ROOT / "train.py", "--recipe", "tiny"], tmp_path)
    done = call([*TWO, ROOT / "search.py", "--prepare", "acc"], tmp_path)
    assert "24 pairs measured" in done.stderr
    assert "on 2 process(es)" in done.stderr
    folder = tmp_path / "dataset/NetInfo/digits/acc"
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["meta.json", "pairs-1.jsonl", "pairs.jsonl"]
    together = PairStore(folder).load(DIGITS)
    indices = [record["index"] for name in files[1:] for record in read_jsonl(folder / name)]
    assert sorted(indices) == list(range(24))
    call([sys.executable, ROOT / "search.py", "--prepare", "acc", "--netinfo", "alone", "--overwrite"], tmp_path)
    alone = PairStore(tmp_path / "alone/acc").load(DIGITS)
    assert (together[0] == alone[0]).all()
    assert together[1] == pytest.approx(alone[1], abs=1e-12)
    call([*TWO, ROOT / "search.py", "--prepare", "acc_quant"], tmp_path)
    shown = call([*TWO, ROOT / "search.py", "--constraint", "0.05", "--generations", "5"], tmp_path).stdout
    assert shown.count("best subnet of space digits") == 1
    done = call(
        [*TWO, ROOT / "quant_aware.py", "--accumulate", "4", "--batch_size", "17", "--amp", "--epochs", "1"], tmp_path
    )
    assert done.stdout.count("best validation top-1") == 1
    assert "unused" not in done.stderr  # DistributedDataParallel looks for unused parameters and finds none
    assert call([*TWO, ROOT / "test.py"], tmp_path).stdout.count("test images") == 1
    analysed = call([*TWO, "-m", "report.analyse", "diagram", "exps/test"], tmp_path, PYTHONPATH=str(ROOT))
    assert analysed.stdout.count("plot:") == 1
    assert sorted(path.name for path in (tmp_path / "exps").iterdir()) == ["test"]


def test_a_run_of_two_processes_is_told_once_and_ends(tmp_path):
    with locked(tmp_path / "models/digits"):
        command = [str(word) for word in (*TWO, ROOT / "train.py", "--recipe", "tiny")]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert done.stderr.count(f"models/digits is in use by process {os.getpid()}") == 1
    assert not (tmp_path / "models").exists()


def test_two_processes_find_the_front_of_one(tmp_path):
    (tmp_path / "models").symlink_to(ROOT / "models")
    sizes = ["--n_coarse", "5", "--intervals", "2", "--n_fine", "1", "--recipe", "tiny"]
    for name, launcher in (("one", [sys.executable]), ("two", TWO)):
        done = call([*launcher, ROOT / "search.py", "--mode", "coarse_to_fine", *sizes, "--exp_name", name], tmp_path)
        assert done.stdout.count("without finetune") == 1
    one, two = (tmp_path / "exps" / name for name in ("one", "two"))
    for file in ("arch", "front.json", "evaluated.jsonl", "config.json"):
        assert (one / file).read_bytes() == (two / file).read_bytes(), file
    assert not list(two.glob("evaluated-*.jsonl"))  # merged


def test_processes_that_disagree_stop(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), "--recipe", "tiny", "--seed", str(rank)],
            cwd=tmp_path,
            env={**os.environ, **env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    messages = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [2, 2]
    assert all("process 1 has another seed than process 0" in message for message in messages)
    assert not (tmp_path / "models").exists()
