"""Two processes under torchrun give the result of one. Processes with different settings stop."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from few_images import IN_OTHER_PROCESSES

from apq.files import read_jsonl
from apq.lock import locked
from apq.presets import DIGITS
from dataset.pairs import PairStore

TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

# A machine with one GPU, as far as a program is told
ONE_GPU = """
import sys, torch
from apq.device import resolve_device
torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 1)
print(resolve_device(sys.argv[1] if len(sys.argv) > 1 else "auto"))
"""


@pytest.fixture
def both(two_processes):
    """What two processes print together, on stdout and stderr."""

    def call(line, cwd):
        ranks = two_processes(line, cwd, **IN_OTHER_PROCESSES)
        said = "".join(rank.stderr for rank in ranks)
        assert [rank.returncode for rank in ranks] == [0, 0], said[-3000:]
        return "".join(rank.stdout for rank in ranks), said

    return call


@pytest.fixture
def one(preloaded):
    """What one process prints on stdout."""

    def call(line, cwd):
        run = preloaded.call(line, cwd=cwd, env=IN_OTHER_PROCESSES)
        assert run.returncode == 0, run.stderr[-3000:]
        return run.stdout

    return call


def torchrun(command, cwd, **env):
    """A command under torchrun, in new processes."""
    words = [str(word) for word in (*TWO, *command)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)


def test_processes_that_tests_start_run_on_the_cpu(tmp_path, preloaded, two_processes):
    """Also two of them on a machine with one GPU, of which the second would have none."""
    (file := tmp_path / "which.py").write_text(ONE_GPU)
    assert preloaded.call([file], cwd=tmp_path).stdout == "cpu\n"
    assert preloaded.call([file, "cuda"], cwd=tmp_path).stdout == "cuda:0\n"
    assert [rank.stdout for rank in two_processes([file], tmp_path)] == ["cpu\n", "cpu\n"]


def test_two_processes_train_as_one(tmp_path, one, both):
    """Progressive shrinking, a finetune with a moving average, learned steps and mixed precision by the sandwich rule;
    last batches of odd size."""
    found = []
    for name, call in (("one", one), ("two", both)):
        (tmp_path / name).mkdir()
        call([ROOT / "tests/shared_training.py", tmp_path / name], ROOT)
        found.append(torch.load(tmp_path / name / "all.pt"))
    one, two = found
    for part in ("net", "finetuned", "learned", "mixed"):
        for key, tensor in one[part].items():
            torch.testing.assert_close(two[part][key], tensor, atol=1e-9, rtol=1e-7, msg=key)
    assert [record["largest_top1"] for record in one["records"]] == [r["largest_top1"] for r in two["records"]]
    assert one["top1"] == two["top1"]


def test_the_scripts_in_two_processes(tmp_path, one, both):
    both([ROOT / "train.py", "--recipe", "tiny"], tmp_path)
    _, said = both([ROOT / "search.py", "--prepare", "acc"], tmp_path)
    assert said.count("24 pairs measured") == 1
    assert "on 2 process(es)" in said
    folder = tmp_path / "dataset/NetInfo/digits/acc"
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["meta.json", "pairs-1.jsonl", "pairs.jsonl"]
    together = PairStore(folder).load(DIGITS)
    indices = [record["index"] for name in files[1:] for record in read_jsonl(folder / name)]
    assert sorted(indices) == list(range(24))
    one([ROOT / "search.py", "--prepare", "acc", "--netinfo", "alone", "--overwrite"], tmp_path)
    alone = PairStore(tmp_path / "alone/acc").load(DIGITS)
    assert (together[0] == alone[0]).all()
    assert together[1] == pytest.approx(alone[1], abs=1e-12)
    both([ROOT / "search.py", "--prepare", "acc_quant"], tmp_path)
    shown, _ = both([ROOT / "search.py", "--constraint", "0.05", "--generations", "5"], tmp_path)
    assert shown.count("best subnet of space digits") == 1
    finetune = ["--accumulate", "4", "--batch_size", "17", "--amp", "--epochs", "1"]
    done = torchrun([ROOT / "quant_aware.py", *finetune], tmp_path, **IN_OTHER_PROCESSES)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("best validation top-1") == 1
    assert "unused" not in done.stderr  # DistributedDataParallel looks for unused parameters and finds none
    assert both([ROOT / "test.py"], tmp_path)[0].count("test images") == 1
    assert both(["-m", "report.analyse", "diagram", "exps/test"], tmp_path)[0].count("plot:") == 1
    assert sorted(path.name for path in (tmp_path / "exps").iterdir()) == ["test"]


def test_a_run_of_two_processes_is_told_once_and_ends(tmp_path):
    with locked(tmp_path / "models/digits"):
        done = torchrun([ROOT / "train.py", "--recipe", "tiny"], tmp_path)
    assert done.returncode != 0
    assert done.stderr.count(f"models/digits is in use by process {os.getpid()}") == 1
    assert not (tmp_path / "models").exists()


def test_two_processes_find_the_front_of_one(tmp_path, one, both):
    (tmp_path / "models").symlink_to(ROOT / "models")
    sizes = ["--n_coarse", "5", "--intervals", "2", "--n_fine", "1", "--recipe", "tiny"]
    command = [ROOT / "search.py", "--mode", "coarse_to_fine", *sizes, "--exp_name"]
    assert one([*command, "one"], tmp_path).count("without finetune") == 1
    assert both([*command, "two"], tmp_path)[0].count("without finetune") == 1
    found, shared = (tmp_path / "exps" / name for name in ("one", "two"))
    for file in ("arch", "front.json", "evaluated.jsonl", "config.json"):
        assert (found / file).read_bytes() == (shared / file).read_bytes(), file
    assert not list(shared.glob("evaluated-*.jsonl"))  # merged


def test_processes_that_disagree_stop(tmp_path, two_processes):
    line, other = ([ROOT / "train.py", "--recipe", "tiny", "--seed", seed] for seed in range(2))
    ranks = two_processes(line, tmp_path, other)
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert all("process 1 has another seed than process 0" in rank.stderr for rank in ranks)
    assert not (tmp_path / "models").exists()
