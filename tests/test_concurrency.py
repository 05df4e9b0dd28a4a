"""Two processes at once in one folder: each result is whole and of one run, and the other run is told."""

from __future__ import annotations

import json
import random
import re
import shutil
import time

import pytest
import torch
from conftest import ROOT
from few_images import IN_OTHER_PROCESSES
from preloaded import Preloaded

from apq.files import read_json, read_jsonl

ROUNDS = 50
TOLD = re.compile(r"\w+\.py: \S+ is in use by process \d+ \(.+\): wait until it ends, or choose another\n")
SEARCH = ["search", "--constraint", "0.05", "--generations", "2", "--population", "20", "--overwrite", "--exp_name"]
TRAIN = ["train", "--model", "mobilenet_v1_small", "--images", "digits", "--recipe", "tiny", "--epochs", "1"]
PREPARE = ["search", "--prepare", "acc", "--acc_train_sample", "10", "--netinfo", "pairs", "--recipe", "tiny"]
FINETUNE = ["quant_aware", "--epochs", "1", "--recipe", "tiny", "--overwrite", "--exp_name"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A working folder with the shipped models, and `start(run, run, ...)`, which begins scripts there at once."""
    root = tmp_path_factory.mktemp("side-by-side")
    (root / "models").symlink_to(ROOT / "models")
    env = {**IN_OTHER_PROCESSES, "APQ_CACHE": str(root / "cache")}
    with Preloaded("side_by_side") as preloaded:

        def start(*commands):
            lines = [[ROOT / f"{name}.py", *words] for name, *words in commands]
            return preloaded.start_all(lines, cwd=root, env=env)

        yield root, start


@pytest.fixture
def runs(here):
    """Runs scripts side by side: (exit code, stdout, stderr) of each."""
    _, start = here
    return lambda *commands: ended(start(*commands))


def ended(runs):
    return [(run.wait(), run.stdout, run.stderr) for run in runs]


def files_of(folder):
    """The files, without pictures and the record of the command, which has a date."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".png", ".tar")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != "made_by.json"}


def winners(answers):
    """Which runs succeeded. The others have been told why not, in one line."""
    for code, _, err in answers:
        assert code == 0 or (code == 2 and TOLD.fullmatch(err)), err
    return [i for i, (code, _, _) in enumerate(answers) if code == 0]


def test_two_searches_of_one_experiment(here, runs):
    root, _ = here
    alone = []
    for seed in ("0", "1"):
        runs([*SEARCH, "alone", "--seed", seed])
        alone.append(files_of(root / "exps/alone"))
    assert alone[0]["config.json"] != alone[1]["config.json"]
    told = 0
    for _ in range(ROUNDS):
        answers = runs(*([*SEARCH, "a", "--seed", seed] for seed in ("0", "1")))
        won = winners(answers)
        assert files_of(root / "exps/a") in [alone[seed] for seed in won]
        assert sorted(path.name for path in (root / "exps").iterdir()) == ["a", "alone"]
        told += 2 - len(won)
    assert told > ROUNDS / 2


def test_two_trainings_in_one_folder(here, runs):
    root, _ = here
    alone = []
    for seed in ("0", "1"):
        runs([*TRAIN, "--seed", seed, "--overwrite", "--out", "trained/alone"])
        alone.append(torch.load(root / "trained/alone/model.pt", weights_only=True))
    told = 0
    for _ in range(ROUNDS):
        shutil.rmtree(root / "trained/m", ignore_errors=True)
        answers = runs(*([*TRAIN, "--seed", seed, "--overwrite", "--out", "trained/m"] for seed in ("0", "1")))
        won = winners(answers)
        made = torch.load(root / "trained/m/model.pt", weights_only=True)
        assert made["seed"] in won
        weights = alone[made["seed"]]["state_dict"]
        assert all(torch.equal(tensor, weights[key]) for key, tensor in made["state_dict"].items())
        assert [path.name for path in (root / "trained/m").iterdir()] == ["model.pt"]
        assert sorted(path.name for path in (root / "trained").iterdir()) == ["alone", "m"]
        told += 2 - len(won)
    assert told > ROUNDS / 2


def test_two_gatherings_of_pairs_in_one_store(here, runs):
    root, _ = here
    for name in ("one", "other"):
        (root / "folders" / name).mkdir(parents=True)
        shutil.copy(ROOT / "models/digits/supernet.pt", root / "folders" / name)
    commands = [[*PREPARE, "--overwrite", "--acc_predictor_dir", f"folders/{name}"] for name in ("one", "other")]
    runs(commands[0])
    alone = read_jsonl(root / "pairs/acc/pairs.jsonl")
    assert [record["index"] for record in alone] == list(range(10))
    told = 0
    for _ in range(ROUNDS):
        shutil.rmtree(root / "pairs")
        told += 2 - len(winners(runs(*commands)))
        assert read_jsonl(root / "pairs/acc/pairs.jsonl") == alone
        assert {path.name for path in (root / "pairs/acc").iterdir()} == {"meta.json", "pairs.jsonl"}
        assert [path.name for path in (root / "pairs").iterdir()] == ["acc"]
    assert told > ROUNDS / 2


def test_a_report_during_a_finetune(here, runs):
    """It shows the old or the new network, with its own accuracy. It begins at a random moment of the finetune."""
    root, start = here
    runs([*SEARCH, "e"])
    shown = {}
    show = ["test", "--exp_dir", "exps/e", "--json"]
    for seed in ("0", "1"):
        began = time.monotonic()
        runs([*FINETUNE, "e", "--seed", seed])
        lasts = time.monotonic() - began
        shown[seed] = json.loads(runs(show)[0][1])
        shown[seed]["acc"] = read_json(root / "exps/e/acc")
    assert shown["0"]["loss"] != shown["1"]["loss"]
    moments = random.Random(0)
    for i in range(ROUNDS // 2):
        seed, before = ("0", "1") if i % 2 == 0 else ("1", "0")
        begun = start([*FINETUNE, "e", "--seed", seed])
        time.sleep(moments.uniform(0, lasts))
        answers = ended(begun + start(show))
        assert winners(answers) == [0, 1]
        losses = {shown[seed]["loss"], shown[before]["loss"]}
        assert json.loads(answers[1][1])["loss"] in losses
        assert read_json(root / "exps/e/acc") == shown[seed]["acc"]
    assert json.loads(runs(show)[0][1])["loss"] == shown[seed]["loss"]


def test_a_search_and_a_finetune_of_one_experiment(here, runs):
    """Whichever comes second is told, or finds a whole experiment."""
    root, _ = here
    runs([*SEARCH, "f"])
    for seed in range(5):
        answers = runs([*FINETUNE, "f"], [*SEARCH, "f", "--seed", str(seed)])
        assert winners(answers)
        made = read_json(root / "exps/f/config.json")
        files = {str(path.relative_to(root / "exps/f")) for path in (root / "exps/f").rglob("*") if path.is_file()}
        assert files == set(made["files"])
        assert ("acc" in files) == ("checkpoint/model_best.pth.tar" in files)
