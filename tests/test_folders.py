"""An experiment removes only files that it wrote."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import ROOT, script
from example_results import files_of, found, replaced_by

from apq.checkpoint import save_checkpoint
from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import read_json, write_json
from apq.genes import largest_subnet
from apq.manifest import contents_of, listed_files
from apq.presets import DIGITS
from apq.resume import Journal, Resume
from apq.search_result import read_result

RESULT = found(DIGITS, largest_subnet(DIGITS))
SEARCH = ["--constraint", "0.05", "--generations", "1", "--population", "20"]
analyse = script("report/analyse")


def fill(folder):
    return replaced_by(RESULT, folder)


def state(path):
    Resume(path, {"seed": 0}, "search").save({"a": 1})


FOREIGN = {
    "a folder of models": ("model.pt", "training.json"),
    "a training in a folder of models": (lambda folder: state(folder / "model.state.pt"),),
    "a checkpoint": ("checkpoint/epoch-3.pt",),
    "a checkpoint of the published name": ("checkpoint/model_best.pth.tar", "checkpoint/checkpoint.pth.tar"),
    "an accuracy": ("acc",),
    "a front": ("front.json",),
    "what looks staged": (".new/weights",),
    "a project": ("main.py", "config.json", "data/x.csv"),
    "a project that lists its files": (lambda folder: write_json(folder / "config.json", {"files": ["a"]}), "a"),
    "weights called a state": (lambda folder: torch.save({"net.weight": torch.ones(2)}, folder / "net.state.pt"),),
    "lines": ("evaluated.jsonl",),
    "records": (lambda folder: write_json(folder / "evaluated.json", {"mine": 1}), "evaluated.jsonl"),
    "a hidden file": (".config.json.original",),
}


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("what", FOREIGN)
def test_a_folder_of_others_is_refused_before_any_work(tmp_path, monkeypatch, what, overwrite):
    folder = tmp_path / "theirs"
    folder.mkdir()
    for item in FOREIGN[what]:
        if callable(item):
            item(folder)
        else:
            (folder / item).parent.mkdir(exist_ok=True)
            (folder / item).write_text("mine")
    before = files_of(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"holds .*which no run wrote there"):
        script("search")([*SEARCH, "--exp_dir", "theirs", *overwrite])
    (tmp_path / "models").unlink()
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("name", ["notes", "checkpoint/mine.pt", "plots/a.png", ".DS_Store"])
def test_what_others_put_into_an_experiment_stays(tmp_path, name):
    """Also what came while a run worked: finished work is not refused for it."""
    experiment = fill(tmp_path / "a")
    (experiment.path / name).parent.mkdir(exist_ok=True)
    (experiment.path / name).write_text("mine")
    number = (experiment.path / name).stat().st_ino
    for rewritten in (experiment.replaced, experiment.edited):
        with rewritten() as new:
            RESULT.write(new)
            (experiment.path / "late").write_text("mine")
        assert (experiment.path / name).read_text() == (experiment.path / "late").read_text() == "mine"
        assert (experiment.path / name).stat().st_ino == number  # the file itself, not a copy
        assert read_result(experiment).cost == RESULT.cost
        assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_new_folders_with_files_of_systems_are_used(tmp_path):
    for name in (".gitkeep", ".DS_Store", "._front.json"):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_text("")
    Experiment(tmp_path / "a").check_free(overwrite=False)
    fill(tmp_path / "a")
    assert {".gitkeep", ".DS_Store", "._front.json", "arch"} <= {path.name for path in (tmp_path / "a").iterdir()}


@pytest.mark.parametrize("name", ["front.json", "net.state.pt", "acc"])
def test_names_of_ours_are_not_for_others(tmp_path, name):
    experiment = fill(tmp_path / "a")
    (experiment.path / name).parent.mkdir(exist_ok=True)
    if name == "net.state.pt":
        torch.save({"net.weight": torch.ones(2)}, experiment.path / name)
    else:
        (experiment.path / name).write_text("mine")
    before = files_of(tmp_path)
    for rewritten in (experiment.replaced, experiment.edited):
        refused = pytest.raises(UserError, match=f"holds {name.partition('/')[0]}.*, which no run wrote there")
        with refused, rewritten() as new:
            RESULT.write(new)
        assert files_of(tmp_path) == before


def test_the_list_of_files_covers_what_later_commands_add(tmp_path):
    experiment = fill(tmp_path / "a")
    with experiment.edited() as new:  # as a finetune does
        write_json(new.acc, [0.5])
        save_checkpoint(new.best_checkpoint, {"w": torch.ones(1)})
    with experiment.adding("bits.png") as picture:  # as test.py does
        picture.write_text("drawn")
    with experiment.edited() as new:  # as a pick does
        RESULT.write(new)
    assert set(read_json(experiment.config)["files"]) == set(files_of(experiment.path))
    assert {"acc", "checkpoint/model_best.pth.tar", "bits.png"} <= listed_files(experiment.path)
    fill(experiment.path)
    assert set(files_of(experiment.path)) == {"arch", "config.json", "history.jsonl", "lat", "made_by.json"}
    (experiment.path / "bits.png").write_text("mine")
    with pytest.raises(UserError, match=r"bits\.png exists, and no run wrote it"), experiment.adding("bits.png"):
        pass
    assert (experiment.path / "bits.png").read_text() == "mine"


@pytest.mark.parametrize("name", ["oqa-4bit", "oqa-2bit"])
def test_experiments_of_before_can_be_replaced_and_finetuned(tmp_path, name):
    shutil.copytree(ROOT / "exps" / name, tmp_path / name)
    experiment = Experiment(tmp_path / name)
    before = read_result(experiment)
    assert not contents_of(experiment.path).foreign
    with experiment.edited() as new:
        write_json(new.acc, [0.5])
    assert read_result(experiment) == before
    assert set(read_json(experiment.config)["files"]) == set(files_of(experiment.path))
    fill(experiment.path)
    assert set(files_of(experiment.path)) == {"arch", "config.json", "history.jsonl", "lat", "made_by.json"}


def test_a_published_experiment_can_be_replaced(tmp_path):
    write_json(tmp_path / "a/arch", [{}, {}])
    write_json(tmp_path / "a/acc", [0.7])
    (tmp_path / "a/checkpoint").mkdir()
    (tmp_path / "a/checkpoint/model_best.pth.tar").write_bytes(b"weights")
    with pytest.raises(UserError, match="give --overwrite"):
        Experiment(tmp_path / "a").check_free(overwrite=False)
    fill(tmp_path / "a")
    assert not (tmp_path / "a/checkpoint").exists()


def test_a_picture_of_others_is_not_drawn_over(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "mine.png").write_bytes(b"\x89PNG of mine")
    words = ["diagram", "exps/oqa-4bit", "--out"]
    with pytest.raises(UserError, match="exists; choose another --out or give --overwrite"):
        analyse([*words, str(tmp_path / "mine.png")])
    assert (tmp_path / "mine.png").read_bytes() == b"\x89PNG of mine"
    for more in ([], ["--overwrite"]):
        analyse([*words, str(tmp_path / "drawn.png"), *more])


def test_a_training_record_of_others_is_not_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "mine/training.json", {"epochs": 3})
    for words in ([], ["--overwrite"]):
        with pytest.raises(UserError, match=r"training\.json exists, and no training wrote it"):
            script("train")(["--recipe", "tiny", "--out", "mine", *words])
    assert read_json(tmp_path / "mine/training.json") == {"epochs": 3}


def test_a_journal_leaves_lines_whose_names_begin_like_its_own(tmp_path):
    (tmp_path / "pairs-of-mine.jsonl").write_text("mine")
    journal = Journal(tmp_path / "meta.json", "pairs", "gathering", "remove it")
    journal.start({"seed": 0})
    journal.append({"index": 0})
    journal.start({"seed": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "pairs-of-mine.jsonl"]
