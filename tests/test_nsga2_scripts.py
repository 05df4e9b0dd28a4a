"""`search.py --mode nsga2` end to end, and picks from an existing front."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

import pytest
from conftest import ROOT, script

from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import read_json, read_jsonl, write_json
from apq.resume import Resume
from methods.nsga2 import front_finder
from methods.nsga2 import front_search as command
from methods.nsga2.config import NSGA2S, Nsga2Config
from methods.nsga2.front_records import load_front

search, quant_aware, report = (script(name) for name in ("search", "quant_aware", "test"))

FLAGS = ["--mode", "nsga2", "--population", "40", "--generations", "12"]
THREE = ["--objectives", "size,accuracy,latency"]


@pytest.fixture
def here(tmp_path, monkeypatch, few_digits):
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def searches(monkeypatch):
    """The `Resume` of every search that is started."""
    started, real = [], front_finder.find_front

    def counted(*args, **kwargs):
        started.append(args[-1])
        return real(*args, **kwargs)

    monkeypatch.setattr(command, "find_front", counted)
    return started


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_from_front_to_accuracy(here, capsys):
    """The whole way: front, pick, finetune, test."""
    search([*FLAGS, "--exp_name", "a", "--pick", "latency<=0.04", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["picked"]["latency"] <= 0.04
    assert found["costs"]["full"]["latency_ms"] == pytest.approx(found["picked"]["latency"])
    assert read_json(here / "exps/a/arch") == [found["subnet"]["arch"], found["subnet"]["policy"]]
    quant_aware(["--exp_name", "a", "--recipe", "tiny", "--epochs", "1"])
    capsys.readouterr()
    report(["--exp_dir", "exps/a", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["subnet"] == found["subnet"]
    assert shown["costs"] == found["costs"]
    assert shown["top1"] > 0.5
    before = files_of(here / "exps/a")
    with pytest.raises(UserError, match=r"is finetuned; pick into another experiment: --front exps/a"):
        search(["--mode", "nsga2", "--exp_name", "a", "--pick", "latency<=0.03"])
    assert files_of(here / "exps/a") == before
    search(["--mode", "nsga2", "--exp_name", "b", "--front", "exps/a", "--pick", "latency<=0.03"])
    assert files_of(here / "exps/a") == before
    assert read_json(here / "exps/b/lat")[0] <= 0.03


def test_what_an_experiment_holds(here, capsys):
    search([*FLAGS, *THREE, "--exp_name", "a"])
    text = capsys.readouterr().out
    folder = here / "exps/a"
    assert {p.name for p in folder.iterdir()} == {
        "arch",
        "lat",
        "config.json",
        "history.jsonl",
        "front.json",
        "front.png",
        "made_by.json",
    }
    front, config = read_json(folder / "front.json"), read_json(folder / "config.json")
    assert all(list(point["objectives"]) == ["accuracy", "size", "latency"] for point in front)
    sizes = [point["objectives"]["size"] for point in front]
    assert sizes == sorted(sizes)
    best = max(front, key=lambda point: point["objectives"]["accuracy"])  # without --pick
    assert read_json(folder / "arch") == [best["arch"], best["policy"]]
    assert read_json(folder / "lat") == [best["objectives"]["size"]]
    assert (config["pick"], config["picked"]) == (None, best["objectives"])
    assert f"{best['objectives']['accuracy']:.2%}" in text
    assert f"front of {len(front)} subnets" in text
    assert len(read_jsonl(folder / "history.jsonl")) == 13
    assert (folder / "front.png").read_bytes().startswith(b"\x89PNG")
    loaded, _ = load_front(Experiment(folder))
    assert loaded.values.tolist() == [list(point["objectives"].values()) for point in front]


def test_a_later_pick_needs_no_search(here, searches, capsys):
    search([*FLAGS, *THREE, "--exp_name", "a"])
    before = files_of(here / "exps/a")
    front = read_json(here / "exps/a/front.json")
    assert len(searches) == 1
    middle = front[len(front) // 2]["objectives"]
    for flags in ([], [*FLAGS, *THREE], ["--objectives", "accuracy,size,latency", "--scope", "full"]):
        text = f"size<={middle['size']!r},latency<={middle['latency']!r}"
        search(["--mode", "nsga2", "--exp_name", "a", "--pick", text, *flags, "--json"])
        found = json.loads(capsys.readouterr().out.splitlines()[-1])["picked"]
        within = [p for p in front if all(p["objectives"][k] <= middle[k] for k in ("size", "latency"))]
        best = max(within, key=lambda point: point["objectives"]["accuracy"])
        assert found == best["objectives"]
        assert read_json(here / "exps/a/arch") == [best["arch"], best["policy"]]
    after = files_of(here / "exps/a")
    changed = {name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys()
    assert changed <= {"arch", "lat", "config.json", "front.png", "made_by.json"}
    cheapest = front[0]["objectives"]["size"]
    with pytest.raises(
        UserError, match=f"no point of the front has size<{cheapest:.15g}; the cheapest: size {cheapest:g}"
    ):
        search(["--mode", "nsga2", "--exp_name", "a", "--pick", f"size<{cheapest}"])
    assert files_of(here / "exps/a") == after
    assert len(searches) == 1


def test_a_pick_removes_the_exported_files_of_the_subnet_before(here):
    search([*FLAGS, "--exp_name", "a"])
    with Experiment(here / "exps/a").adding("model.onnx") as file:
        file.write_bytes(b"exported")
    search(["--mode", "nsga2", "--exp_name", "a", "--pick", "latency<=0.03"])
    assert not (here / "exps/a/model.onnx").exists()
    assert "model.onnx" not in read_json(here / "exps/a/config.json")["files"]


def test_picks_into_another_experiment(here, searches):
    search([*FLAGS, "--exp_name", "a", "--scope", "published"])
    search(["--mode", "nsga2", "--front", "exps/a", "--exp_name", "b"])
    for name in ("arch", "lat", "front.json", "history.jsonl"):
        assert (here / "exps/a" / name).read_bytes() == (here / "exps/b" / name).read_bytes()
    assert read_json(here / "exps/b/config.json")["front"] == "exps/a"
    assert read_json(here / "exps/b/config.json")["scope"] == "published"
    with pytest.raises(UserError, match=r"exists.*--overwrite"):
        search(["--mode", "nsga2", "--front", "exps/a", "--exp_name", "b"])
    search(["--mode", "nsga2", "--front", "exps/a", "--exp_name", "b", "--pick", "latency<=0.04", "--overwrite"])
    assert read_json(here / "exps/b/lat")[0] <= 0.04
    assert len(searches) == 1


@pytest.mark.parametrize("killed_at", [3, 9])
def test_a_killed_search_continues(here, monkeypatch, killed_at):
    monkeypatch.setattr(command, "SAVE_SECONDS", 0.0)
    search([*FLAGS, *THREE, "--exp_name", "whole"])
    saved, real = [], Resume.save

    def save(*args):
        real(*args)
        saved.append(args)
        if len(saved) == killed_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Resume, "save", save)
        with pytest.raises(KeyboardInterrupt):
            search([*FLAGS, *THREE, "--exp_name", "killed"])
    folder = here / "exps/killed"
    assert [file.name for file in folder.iterdir()] == ["front.state.pt"]
    with pytest.raises(UserError, match=r"nsga2\.seed was 0, is 1; give --overwrite"):
        search([*FLAGS, *THREE, "--seed", "1", "--exp_name", "killed"])
    search([*FLAGS, *THREE, "--exp_name", "killed", "--overwrite"])  # of the same search: it continues, too
    ours, theirs = files_of(folder), files_of(here / "exps/whole")
    for files in (ours, theirs):
        del files["made_by.json"]  # it names the time
    assert ours == theirs


def test_nothing_fits_after_a_search_and_the_front_is_kept(here, searches):
    with pytest.raises(UserError, match=r"no point of the front has latency<=.*size<=.*exps/a has the front"):
        search([*FLAGS, *THREE, "--exp_name", "a", "--pick", "latency<=0.01317,size<=2530"])
    assert read_json(here / "exps/a/config.json")["pick"] is None
    search(["--mode", "nsga2", "--exp_name", "a", "--pick", "latency<=0.04"])
    assert len(searches) == 1


def test_overwrite_searches_anew(here, searches):
    search([*FLAGS, "--exp_name", "a"])
    with pytest.raises(UserError, match="exists"):
        search([*FLAGS, "--exp_name", "a"])
    search([*FLAGS, "--exp_name", "a", "--pick", "latency<=0.04", "--seed", "1", "--overwrite"])
    assert len(searches) == 2
    assert read_json(here / "exps/a/config.json")["nsga2"]["seed"] == 1
    search(["--constraint", "0.05", "--population", "20", "--generations", "2", "--exp_name", "a", "--overwrite"])
    assert not (here / "exps/a/front.json").exists()
    with pytest.raises(UserError, match="has no front"):
        search(["--mode", "nsga2", "--front", "exps/a", "--exp_name", "b"])


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--objectives", "latency,size"], "accuracy and 1 to 3 costs"),
        (["--objectives", "accuracy"], "accuracy and 1 to 3 costs"),
        (["--objectives", "accuracy,size,size"], "accuracy and 1 to 3 costs"),
        (["--objectives", "accuracy,latency,energy,size,flops"], "accuracy and 1 to 3 costs"),
        (["--objectives", "accuracy,speed"], "'speed'.*bitops"),
        (
            ["--objectives", "accuracy,latency", "--pick", "energy<=3"],
            "'energy' is not a cost of this front; known: latency",
        ),
        (
            ["--population", "9", "--pick", "latency<=0.001"],
            "below the cheapest subnet of space digits, which needs 0.013164 ms",
        ),
        (["--front", "exps/none"], "has no front"),
        (["--population", "1"], "population"),
        (["--mutation_prob", "0"], "mutation_prob"),
        (["--type", "energy"], r"--type: .* --objectives names the costs .*--mode nsga2 --help"),
        (["--constraint", "0.05"], "--constraint: .* --pick gives the bounds"),
        (["--parent_ratio", "0.5"], "unrecognized arguments: --parent_ratio"),
        (["--acc_predictor_dir", "nowhere"], "nowhere"),
        (
            ["--mode", "evolution", "--constraint", "1", "--pick", "latency<=1"],
            r"unrecognized.*--pick .*--mode evolution",
        ),
        (
            ["--mode", "evolution", "--constraint", "1", "--objectives", "accuracy,size"],
            "unrecognized.*--objectives",
        ),
        (["--mode", "coarse_to_fine", "--front", "exps/a"], r"unrecognized arguments: --front .*--mode coarse_to_fine"),
    ],
)
def test_mistakes_get_one_clear_line(here, searches, flags, match):
    with pytest.raises(UserError, match=match):
        search(["--mode", "nsga2", *flags])
    assert not searches
    assert not (here / "exps").exists()


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--population", "41"], "population was 40, is 41"),
        (["--generations", "0", "--crossover_prob", "0"], "crossover_prob was 0.1, is 0.0; generations was 12, is 0"),
        (
            ["--nsga2", "published"],
            "crossover_prob was 0.1, is 0.007; generations was 12, is 1000; population",
        ),
        (["--objectives", "accuracy,energy"], "objectives was .*, is "),
        (["--scope", "published", "--seed", "3"], "scope was .full., is .published.; seed was 0, is 3"),
        (["--acc_predictor_dir", "models/glyphs"], "acc_predictor_dir was .models/digits., is .models/glyphs."),
        (["--config", "wide.json"], "cost model changed"),
        (["--pick", "size<=3"], "'size' is not a cost of this front"),
    ],
)
def test_a_pick_from_a_front_of_another_search_is_refused(here, searches, flags, match):
    write_json(here / "wide.json", {"columns": 64})
    search([*FLAGS, "--exp_name", "a"])
    before = files_of(here / "exps/a")
    with pytest.raises(UserError, match=match):
        search(["--mode", "nsga2", "--exp_name", "a", "--pick", "latency<=0.04", *flags])
    assert len(searches) == 1
    assert files_of(here / "exps/a") == before


def test_published_settings_have_one_name(here):
    """QFA's nsgaii_search.py, main: population 500, 1,000 generations, crossover 0.007, mutation 0.02."""
    published = Nsga2Config(population=500, generations=1000, crossover_prob=0.007, mutation_prob=0.02)
    assert NSGA2S["published"] == published
    search([*FLAGS, "--nsga2", "published", "--seed", "2", "--exp_name", "a"])
    expected = {**asdict(published), "population": 40, "generations": 12, "seed": 2}
    assert read_json(here / "exps/a/config.json")["nsga2"] == expected
    search([*FLAGS, "--mode", "nsga2", "--nsga2", "published", "--exp_name", "a", "--pick", "latency<=0.04"])


@pytest.mark.parametrize("damage", ["{}", "[]", "[1]", '[{"objectives": {}}]', "torn"])
def test_a_damaged_front_is_an_error(here, damage):
    search([*FLAGS, "--exp_name", "a"])
    (here / "exps/a/front.json").write_text(damage)
    with pytest.raises(UserError, match=r"front\.json"):
        search(["--mode", "nsga2", "--exp_name", "a", "--pick", "latency<=0.04"])


def test_a_bare_pick_starts_no_search(here, searches):
    with pytest.raises(UserError, match=r"exps/typo has no front to pick from; search one first: search.py"):
        search(["--mode", "nsga2", "--exp_name", "typo", "--pick", "latency<=0.04"])
    assert not searches
    assert not (here / "exps/typo").exists()


def test_a_pick_that_is_killed_leaves_the_front(here, monkeypatch):
    search([*FLAGS, "--exp_name", "a"])
    before, real = read_json(here / "exps/a/front.json"), os.replace
    limit = before[0]["objectives"]["latency"]
    for n_writes in range(1, 6):
        written = []

        def replace(*args, written=written, n_writes=n_writes):
            written.append(args)
            if len(written) == n_writes:
                raise KeyboardInterrupt
            real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                search(["--mode", "nsga2", "--exp_name", "a", "--pick", f"latency<={limit}"])
            except KeyboardInterrupt:
                assert read_json(here / "exps/a/front.json") == before
                assert load_front(Experiment(here / "exps/a"))
    search(["--mode", "nsga2", "--exp_name", "a", "--pick", f"latency<={limit}"])
    assert read_json(here / "exps/a/arch") == [before[0]["arch"], before[0]["policy"]]


def test_a_search_that_is_killed_while_it_is_written_continues(here, monkeypatch):
    command, real = [*FLAGS, "--exp_name", "a", "--pick", "latency<=0.04"], os.replace

    def replace(source, target):
        if str(target).endswith("/arch"):  # the last of the files: the front is written already, beside the experiment
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            search(command)
    assert not (here / "exps/a/front.json").exists()
    search(command)
    assert load_front(Experiment(here / "exps/a"))
