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
from conftest import ROOT, script
from example_spaces import TINY
from few_images import IN_OTHER_PROCESSES

import apq.experiment
import methods.prepare.predictor
from apq.checkpoint import load_checkpoint, save_checkpoint
from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import read_json, read_jsonl, write_json
from apq.genes import genes_of, sample, subnets_of
from apq.model_folder import ModelFolder
from apq.presets import DIGITS
from apq.resume import Resume
from apq.search_result import read_result
from apq.stages import Stage
from apq.strata import PairStrata
from apq.subnet import spec_of, subnet_from_spec
from benchmarks.refine import main as benchmark
from dataset import load_splits
from dataset.pairs import ADDED, PairStore
from elastic_nn.networks.supernet_file import load_quantized_supernet, load_supernet, save_supernet, with_quantizers
from elastic_nn.quantizers import BATCHQUANT, scheme_named
from elastic_nn.training.engine import derived_seed
from elastic_nn.training.inheritance import first_supernet
from elastic_nn.training.pairs import short_finetune_top1, subnet_top1
from elastic_nn.training.recipe import OutlierRule
from elastic_nn.training.recipes import RECIPES
from elastic_nn.training.session import Session
from lut.bitfusion import BitFusion
from lut.population import PopulationCost
from methods.nsga2.measuring import MEASURED_BY, seed_of
from methods.search.candidates import Pool
from methods.search.measurement import Measurement
from utils.kernel_regression import KernelConfig
from utils.predictor_training import PredictorConfig, train_predictor

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
LOADED = {}  # supernets, by the contents of their files
PRICE = PopulationCost(SPACE, "latency", BitFusion(), SPACE.budget_scope)
PREDICTOR, STATE = Path("models/small/acc_quant.pt"), Path("exps/a/refine.state.pt")


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
    monkeypatch.setattr("methods.search.refine_task.load_quantized_supernet", loaded_once)
    monkeypatch.setattr("methods.evolution.task.plot_history", lambda history, path, **options: path.touch())
    monkeypatch.setattr("methods.nsga2.recording.plot_predicted_front", lambda *args: args[4].touch())
    return measured


def loaded_once(path, space):
    """The supernet of a file, as it is: most of the time of a search here would be to build it again."""
    content = path.read_bytes() if path.exists() else None
    if content not in LOADED:
        LOADED[content] = load_quantized_supernet(path, space)
    return LOADED[content]


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
    own = {key_of(one) for one in read_jsonl(theirs.path / "pairs.jsonl")}
    (other,) = [s for s in subnets_of(SPACE, sample(SPACE, 20, np.random.default_rng(3))) if key(s) not in own][:1]
    last = read_jsonl(theirs.path / "pairs.jsonl")[-1]
    meta = read_json(theirs.path / "meta.json")
    with store.locked():
        store.open(SPACE, {k: v for k, v in meta.items() if k != "space"}, 0)
        for subnet in (other, subnet_from_spec(SPACE, {**last["arch"], **last["policy"]})):
            store.append(SPACE, store.next_index(), subnet, accuracy_of(subnet))


def key(subnet):
    return key_of(spec_of(SPACE, subnet))


def key_of(spec):
    return json.dumps([spec["arch"], spec["policy"]])


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


# What a search finds


def of_json(capsys, *words):
    """What a search prints with --json."""
    capsys.readouterr()
    search([*words, "--json"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_subnets_are_measured_as_pairs_are_and_the_numbers_are_those_of_the_files(here, capsys):
    """Without anything made up: a supernet whose subnets are measured as they are."""
    shown = of_json(capsys, *EVOLUTION, *REFINE, "--exp_name", "a")
    supernet, _ = load_supernet(here / "models/small/supernet.pt")
    session = Session(splits=load_splits(SPACE), device=CPU)
    for record in archived():
        subnet = subnet_from_spec(SPACE, {**record["arch"], **record["policy"]})
        n_images = RECIPES["tiny-qfa"].recalibration_images
        assert record["accuracy"] == subnet_top1(supernet, subnet, session, session.splits.val, n_images)
    assert [record["index"] for record in archived()] == [*range(5)]
    config, recorded = read_json(here / "exps/a/config.json"), read_json(PAIRS / "meta.json")
    assert read_json(ARCHIVE / "meta.json") == recorded
    arch, policy = read_json(here / "exps/a/arch")
    (found,) = [one for one in archived() if (one["arch"], one["policy"]) == (arch, policy)]
    assert shown["top1"] == config["top1"] == found["accuracy"]
    assert shown["predicted_accuracy"] == config["predicted_accuracy"]
    assert shown["refined"] == config["refined"]
    rounds = shown["refined"]["rounds"]
    assert [one["measured"] for one in rounds] == [3, 2]
    assert [band["measured"] for band in shown["refined"]["bands"]] == [2]
    assert {"mean_difference", "mean_absolute_difference", "low", "high"} < {*shown["refined"]["bands"][0]}
    assert {record["round"] for record in read_jsonl(here / "exps/a/history.jsonl")} == {1, 2}
    assert not list((here / "exps/a").glob("*state*"))

    said = of_json(capsys, *FRONT, "--measure", "4", "--refine", "3", "--exp_name", "b")
    front = read_json(here / "exps/b/front.json")
    accuracies = {key_of(one): one["accuracy"] for one in archived()}
    measured = [(i, point) for i, point in enumerate(front) if point["measured_accuracy"] is not None]
    for _, point in measured:
        assert point["measured_accuracy"] == accuracies[key_of(point)]
    assert said["measured"] == [
        {"index": i, "predicted": p["objectives"]["accuracy"], "measured": p["measured_accuracy"]} for i, p in measured
    ]
    assert (said["top1"], said["picked"]) in [(p["measured_accuracy"], p["objectives"]) for p in front]
    gaps = [p["objectives"]["accuracy"] - p["measured_accuracy"] for _, p in measured]
    assert said["mean_difference"] == pytest.approx(np.mean(gaps))
    # What the evolution measured is not measured again, and all rounds together measure four.
    assert len(archived()) <= 5 + 4
    assert sum(one["measured"] for one in said["refined"]["rounds"]) == 4


def test_the_gap_of_a_round_is_that_of_its_predictor_before_it_learned(here, made_up, capsys):
    """By hand: the first round's predictions are those of MLPs as in the folder, trained on all pairs but two."""
    shown = of_json(capsys, *EVOLUTION, *REFINE, "--exp_name", "a")
    first = made_up[:3]
    settings = load_checkpoint(here / PREDICTOR)["predictor_training"]
    config = PredictorConfig(**{**settings, "holdout": 1e-9})
    predictor, scores = train_predictor(*PairStore(here / PAIRS).load(SPACE), SPACE, quantize=True, config=config)
    assert scores.n_train == N_PAIRS - 2
    predicted = predictor.predict(genes_of(SPACE, first))
    gaps = predicted - np.array([accuracy_of(subnet) for subnet in first])
    found = shown["refined"]["rounds"][0]
    assert found["mean_difference"] == pytest.approx(gaps.mean(), abs=1e-7)
    assert found["mean_absolute_difference"] == pytest.approx(np.abs(gaps).mean(), abs=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_the_archive_measures_each_subnet_once_and_serves_later_searches(here, made_up, mode, capsys):
    refined(mode, "a")
    refined(mode, "b", "--seed", "1")
    assert len({key(subnet) for subnet in made_up}) == len(made_up) == len(archived())
    n = len(made_up)
    shutil.rmtree("exps/a")
    capsys.readouterr()
    search([*PREPARE, "--overwrite", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["data"]["n_measured"] == n
    assert facts["data"]["n_pairs"] == N_PAIRS
    assert facts["scores"]["n_holdout"] == 3  # of fourteen, as without
    assert facts["scores"]["n_train"] == N_PAIRS - 3 + n
    again = of_json(capsys, *MODES[mode], *REFINE, "--exp_name", "a", "--seed", "2")
    assert len({key(subnet) for subnet in made_up}) == len(made_up) == len(archived())
    assert again["predictor_scores"]["n_train"] >= N_PAIRS - 3 + n


def test_an_archive_of_other_work_is_refused_before_any_work(here, made_up, monkeypatch, capsys):
    refined("evolution", "a")
    before = (ARCHIVE / "pairs.jsonl").read_bytes()
    write_json(ARCHIVE / "meta.json", {**read_json(ARCHIVE / "meta.json"), "recalibration_images": 1})
    made_up.clear()
    for mode in MODES:
        with pytest.raises(UserError, match=r"belongs to another measurement.*recalib.* remove .*_measured to measure"):
            refined(mode, "b")
    monkeypatch.setattr("methods.prepare.predictor.gather_missing", lambda *args: made_up.append("pairs"))
    with pytest.raises(UserError, match="belongs to another measurement of subnets by searches"):
        search([*PREPARE, "--overwrite"])
    assert not made_up
    assert not (here / "exps/b").exists()
    assert (ARCHIVE / "pairs.jsonl").read_bytes() == before


@pytest.mark.parametrize("mode", MODES)
def test_a_small_space_is_measured_as_a_whole(here, made_up, mode, capsys):
    """There are fewer candidates than --measure; within a tight budget one, which is measured already."""
    words = [*MODES[mode], "--refine", "3", "--measure", "60", "--exp_name", "a", "--population", "8"]
    words += ["--generations", "1"]
    shown = of_json(capsys, *words)
    rounds = shown["refined"]["rounds"]
    assert sum(one["measured"] for one in rounds) <= len(archived()) == len(made_up) < 60
    if mode == "evolution":  # the cheapest subnet needs 0.00474 ms
        for name in ("b", "c"):
            found = of_json(capsys, *words, "--constraint", "0.00475", "--exp_name", name)
        assert [one["measured"] for one in found["refined"]["rounds"]] == [0, 0, 0]
        assert found["refined"]["bands"] == []
        assert found["refined"]["rounds"][0]["mean_difference"] is None
        assert found["top1"] in [one["accuracy"] for one in archived()]


def test_risk_ranks_the_measured_ones_too(here, made_up, capsys):
    shown = of_json(capsys, *EVOLUTION, *REFINE, "--risk", "1", "--exp_name", "a")
    config = read_json(here / "exps/a/config.json")
    assert config["risk"] == 1
    assert shown["top1"] in [one["accuracy"] for one in archived()]
    front = of_json(capsys, *FRONT, *REFINE, "--risk", "1", "--exp_name", "b")
    points = read_json(here / "exps/b/front.json")
    assert front["top1"] == max(point["measured_accuracy"] for point in points)


def test_a_refined_front_is_picked_from_and_measured_later(here, made_up, capsys):
    refined("nsga2", "a")
    points = read_json(here / "exps/a/front.json")
    limit = points[0]["objectives"]["latency"]
    shown = of_json(capsys, "--mode", "nsga2", "--exp_name", "a", "--pick", f"latency<={limit}")
    assert shown["picked"] == points[0]["objectives"]
    assert shown["refined"]
    before = {i for i, point in enumerate(points) if point["measured_accuracy"] is not None}
    search(["--mode", "nsga2", "--exp_name", "a", "--measure", "all"])
    after = read_json(here / "exps/a/front.json")
    assert all(point["measured_accuracy"] is not None for point in after)
    assert [after[i] for i in before] == [points[i] for i in before]


def test_a_bound_that_no_point_meets_leaves_the_front(here, made_up, monkeypatch):
    """Some subnet of the space is within the bound, but none that the search found."""
    monkeypatch.setattr("methods.nsga2.front_search.check_bounds", lambda *args: None)
    with pytest.raises(UserError, match="exps/a has the front, with its most accurate point"):
        refined("nsga2", "a", "--pick", "latency<=0.0001")
    points = read_json(here / "exps/a/front.json")
    arch, _ = read_json(here / "exps/a/arch")
    assert arch == max(points, key=lambda point: point["objectives"]["accuracy"])["arch"]
    assert not list((here / "exps/a").glob("*state*"))


# Unfinished work of others


def interrupted(patch, mode, name, at, *more):
    with patch.context() as own:
        Interrupted(own, at)
        with pytest.raises(KeyboardInterrupt):
            refined(mode, name, *more)


def test_a_search_of_other_settings_does_not_continue(here, made_up, monkeypatch):
    interrupted(monkeypatch, "evolution", "a", 8)
    with pytest.raises(UserError, match=r"refine\.state\.pt belongs to another search: .*refine\.measure was 5, is 6"):
        refined("evolution", "a", "--measure", "6")
    made_up.clear()
    shutil.rmtree(ARCHIVE)
    refined("evolution", "a", "--measure", "6", "--overwrite")
    with pytest.raises(UserError, match="exists; choose another --exp_name or give --overwrite"):
        refined("evolution", "a")
    shutil.rmtree(ARCHIVE)
    refined("evolution", "b", "--measure", "6")
    assert files_of("a")["arch"] == files_of("b")["arch"]
    refined("evolution", "a", "--overwrite")
    assert not list(Path("exps/a").glob("*state*"))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("known",), None),
        (("known", "top1"), np.array([0.5])),
        (("known", "genes"), np.full((0, 3), 9)),
        (("rounds", 0, "genes"), np.full((2, 24), 99)),
        (("rounds", 0, "predicted"), np.zeros(1)),
        (("rounds", 0, "history"), 3),
        (("rounds",), []),
        (("pool",), None),
    ],
    ids=str,
)
def test_damaged_states_are_told_and_replaced(here, made_up, monkeypatch, place, value):
    interrupted(monkeypatch, "evolution", "a", 8)
    resume = Resume(STATE, json.loads(load_checkpoint(STATE)["asked"]), "search")
    state = inner = resume.load()
    assert len(state["rounds"]) == 1
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    resume.save(state)
    with pytest.raises(UserError, match=r"refine\.state\.pt is damaged: .*; give --overwrite to start anew"):
        refined("evolution", "a")
    if place == ("pool",):
        refined("evolution", "a", "--overwrite")


# Mistakes


def without(key):
    def change():
        data = load_checkpoint(PREDICTOR)
        del data[key]
        save_checkpoint(PREDICTOR, data)

    return change


def with_data(**facts):
    def change():
        data = load_checkpoint(PREDICTOR)
        save_checkpoint(PREDICTOR, {**data, "data": {**data["data"], **facts}})

    return change


def with_training(**facts):
    def change():
        data = load_checkpoint(PREDICTOR)
        save_checkpoint(PREDICTOR, {**data, "predictor_training": {**data["predictor_training"], **facts}})

    return change


def fewer_pairs():
    file = PAIRS / "pairs.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))


def of_other_images():
    write_json(PAIRS / "meta.json", {**read_json(PAIRS / "meta.json"), "images": {"dataset": "other"}})


def of_another_supernet():
    data = load_checkpoint(Path("models/small/supernet.pt"))
    data["state_dict"]["classifier.bias"] += 1
    save_checkpoint(Path("models/small/supernet.pt"), data)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("data"), "does not say which pairs it was trained on.* --prepare acc_quant .*--overwrite"),
        (with_data(n_pairs="x"), "damaged record of its pairs"),
        (with_data(pairs=3), "damaged record of its pairs"),
        (with_data(n_measured=-1), "damaged record of its pairs"),
        (with_training(hidden="x"), "settings are damaged: hidden is x"),
        (with_training(seed=None), "settings are damaged: seed is None"),
        (with_training(holdout=7.0), "holdout is the fraction"),
        (partial(shutil.rmtree, PAIRS), "no pairs in dataset/NetInfo/small/acc_quant; gather them"),
        (fewer_pairs, "has 13 of the 14 pairs of models/small/acc_quant.pt"),
        (of_other_images, "belongs to another gathering of pairs: images.dataset was .other., is .digits."),
        (of_another_supernet, "belongs to another gathering of pairs: supernet changed"),
        (Path("models/small/supernet.pt").unlink, "no supernet at models/small/supernet.pt"),
    ],
)
def test_what_is_missing_or_other_is_told_before_any_work(here, made_up, mode, change, message):
    change()
    with pytest.raises(UserError, match=message) as error:
        refined(mode, "a")
    assert "\n" not in str(error.value)
    assert not made_up
    assert not (here / "exps/a").exists()
    assert not ARCHIVE.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*EVOLUTION, "--measure", "3"], "belong to --refine"),
        ([*EVOLUTION, "--recipe", "tiny-qfa"], "belong to --refine"),
        ([*EVOLUTION, "--refine", "3"], "--refine 3 needs --measure N"),
        ([*EVOLUTION, "--refine", "3", "--measure", "2"], "--refine 3 needs --measure N.* at least one a round"),
        ([*EVOLUTION, "--refine", "0", "--measure", "2"], "--refine: '0' is not"),
        ([*EVOLUTION, *REFINE, "--constraint", "1e-6"], "below the cheapest subnet of space small"),
        ([*FRONT, "--refine", "3"], "--refine 3 needs --measure N"),
        ([*FRONT, "--refine", "3", "--measure", "2"], "--refine 3 needs --measure N"),
        ([*FRONT, "--refine", "3", "--measure", "all"], "--refine 3 needs --measure N.* at most 1000000"),
        ([*FRONT, *REFINE, "--front", "exps/b"], "no --front and no --finetune_epochs"),
        ([*FRONT, *REFINE, "--finetune_epochs", "1"], "no --front and no --finetune_epochs"),
        ([*FRONT, *REFINE, "--pick", "latency<=1e-6"], "latency<=1e-06|below the cheapest"),
    ],
)
def test_mistakes_in_flags_are_told_before_any_work(here, made_up, words, message):
    with pytest.raises(UserError, match=message) as error:
        search([*words, "--exp_name", "a"])
    assert "\n" not in str(error.value)
    assert not made_up
    assert not (here / "exps/a").exists()


def test_a_kernel_has_room_for_what_will_be_measured(here, made_up):
    search([*PREPARE[:-2], "--predictor", "kernel", "--overwrite"])
    with pytest.raises(UserError, match="6014 pairs are too many for a kernel, at most 5000: train MLPs"):
        refined("evolution", "a", "--measure", "6000")
    refined("evolution", "a")
    assert len(archived()) == len(made_up) == 5


# Other pairs, other supernets, several processes


def test_stratified_pairs_and_outliers(here, made_up, monkeypatch, capsys):
    """How pairs were drawn does not matter to measured subnets, which are never outliers."""
    rule = OutlierRule(distances=(1e-9,), neighbours=2)  # every pair is one but for the first of each point
    recipe = replace(RECIPES["tiny-qfa"], pair_strata=PairStrata(), pair_outliers=replace(rule, distances=(40.0,)))
    monkeypatch.setitem(RECIPES, "tiny-qfa", recipe)
    monkeypatch.setattr("elastic_nn.training.pairs.subnet_top1", lambda net, subnet, *rest: accuracy_of(subnet))
    drawn = [*PREPARE, "--overwrite", "--netinfo", "strata"]
    search(drawn)
    refined("evolution", "a")
    meta = read_json(Path("strata/acc_quant_measured/meta.json"))
    assert meta == {k: v for k, v in read_json(Path("strata/acc_quant/meta.json")).items() if k != "strata"}
    n = len(made_up)
    strict = replace(recipe, pair_outliers=replace(rule, distances=(9.0,)))
    monkeypatch.setitem(RECIPES, "tiny-qfa", strict)
    capsys.readouterr()
    search([*drawn, "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["data"]["n_measured"] == n == 5
    left = N_PAIRS + n - shown["data"]["outliers"]["n"]
    assert n < shown["scores"]["n_train"] <= left


def test_a_float_supernet_with_pairs_of_an_earlier_version(tmp_path, few_digits, monkeypatch, capsys):
    """As shipped: a predictor of one MLP, pairs that do not record all that a finetune has by now."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    shutil.copytree(ROOT / "dataset/NetInfo/digits/acc_quant", tmp_path / "dataset/NetInfo/digits/acc_quant")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.kernel_predictor.KernelConfig", partial(KernelConfig, steps=2))
    flags = ["--constraint", "0.05", "--population", "16", "--generations", "2", "--refine", "1", "--measure", "2"]
    meta = read_json(Path("dataset/NetInfo/digits/acc_quant/meta.json"))
    assert not {*ADDED} & {*meta["finetune"]}
    shown = of_json(capsys, *flags, "--exp_name", "a")
    pairs = PairStore(Path("dataset/NetInfo/digits/acc_quant_measured"))
    recorded = pairs.made_by()
    assert recorded["finetune"] == {**meta["finetune"], **ADDED}
    supernet = with_quantizers(load_supernet(ROOT / "models/digits/supernet.pt")[0], scheme_named(meta["quantizer"]))
    recipe = replace(RECIPES["digits"], quantizer=meta["quantizer"])
    (genes, _), top1 = pairs.load(DIGITS)[0], pairs.load(DIGITS)[1]
    (subnet,) = subnets_of(DIGITS, genes[None])
    session = Session(splits=load_splits(DIGITS), device=CPU, seed=derived_seed(0, *genes.tolist()))
    assert top1[0] == short_finetune_top1(supernet, subnet, session, recipe)
    assert shown["top1"] in top1
    assert len(top1) == 2
    longer = replace(recipe, pair_finetune=replace(recipe.pair_finetune, dropout=0.5))
    monkeypatch.setitem(RECIPES, "digits", longer)
    with pytest.raises(UserError, match=r"another gathering of pairs: finetune\.dropout was 0\.0, is 0\.5"):
        search([*flags, "--exp_name", "b"])
    assert not Path("exps/b").exists()


def test_one_mlp_is_told_and_a_kernel_takes_its_place(here, made_up, capsys, monkeypatch):
    monkeypatch.setattr("utils.kernel_predictor.KernelConfig", partial(KernelConfig, steps=2))
    search([*PREPARE[:-2], "--overwrite"])
    capsys.readouterr()
    refined("nsga2", "a", "--risk", "1")  # the kernel says how uncertain it is
    assert capsys.readouterr().err.count("is one MLP, which cannot say how uncertain it is") == 1
    with pytest.raises(UserError, match="--risk 1 needs a predictor that says how uncertain it is"):
        search([*FRONT, "--risk", "1", "--exp_name", "b"])


def test_two_processes_find_what_one_does(here, two_processes, preloaded):
    """They measure what is asked, together, and each subnet once."""
    found = {}
    for mode in MODES:
        line = [ROOT / "search.py", *MODES[mode], *REFINE, "--exp_name"]
        alone = preloaded.call([*line, f"{mode}-one"], cwd=here, env=IN_OTHER_PROCESSES)
        assert alone.returncode == 0, alone.stderr
        found[mode] = sorted((key_of(one), one["accuracy"]) for one in archived())
        shutil.rmtree(ARCHIVE)
        ranks = two_processes([*line, f"{mode}-two"], here, **IN_OTHER_PROCESSES)
        assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr[-3000:]
        both = [one for file in sorted(ARCHIVE.glob("*.jsonl")) for one in read_jsonl(file)]
        assert sorted((key_of(one), one["accuracy"]) for one in both) == found[mode]
        assert files_of(f"{mode}-two") == files_of(f"{mode}-one")
        assert sum("best subnet" in rank.stdout or "front of" in rank.stdout for rank in ranks) == 1
        shutil.rmtree(ARCHIVE)


def test_two_processes_are_told_of_a_mistake_once(here, two_processes):
    ranks = two_processes([ROOT / "search.py", *EVOLUTION, "--refine", "3"], here, **IN_OTHER_PROCESSES)
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert sum("needs --measure N" in rank.stderr for rank in ranks) == 1
    assert not (here / "exps/test").exists()


def test_the_benchmark(here, monkeypatch, capsys):
    """Two seeds; what is done is not done again."""
    halved = lambda self, subnet: accuracy_of(subnet) / (2 if self.splits.val is self.splits.test else 1)  # noqa: E731
    monkeypatch.setattr(Measurement, "top1", halved)
    flags = ["--models", "models/small", "--random", "10", "--measured", "4", "--rounds", "2", "--n_budgets", "2"]
    flags += ["--generations", "1", "--seeds", "0", "1", "--out", "runs.jsonl"]
    benchmark(flags)
    table = capsys.readouterr().out
    runs = read_jsonl(here / "runs.jsonl")
    assert [(run["method"], run["seed"]) for run in runs] == [(m, s) for s in (0, 1) for m in ("one-shot", "refined")]
    assert not ARCHIVE.exists()  # the archives of the runs are their own
    for run in runs:
        assert run["test"] == [None if top1 is None else top1 / 2 for top1 in run["validation"]]
        known = [pair for pair in zip(run["costs"], run["budgets"], strict=True) if pair[0] is not None]
        assert known
        assert all(cost <= budget * (1 + 1e-9) for cost, budget in known)
    # The loosest budget has results of both methods and seeds; a refined front may have no point for the tightest.
    gains = np.array([100 * (runs[i + 1]["test"][-1] - runs[i]["test"][-1]) for i in (0, 2)])
    assert f"| {gains.mean():.2f} ± {gains.std(ddof=1):.2f} |" in table.splitlines()[-4]
    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.refine.one_shot", None)
        benchmark(flags)
    assert capsys.readouterr().out == table
    with pytest.raises(UserError, match="14 pairs, not 24"):
        benchmark([*flags, "--random", "20", "--out", "other.jsonl"])


def test_later_finetunes_have_the_seed_of_those_before(here, made_up):
    """Those of a search that measures have the seed of the pairs, not of the search."""
    refined("nsga2", "a", "--seed", "3")
    searched = read_result(Experiment(Path("exps/a")))
    assert seed_of(searched) == 3  # measured as they are
    by = {**searched.settings[MEASURED_BY], "finetune": {"seed": 0}}
    assert seed_of(replace(searched, settings={**searched.settings, MEASURED_BY: by})) == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_search_says_what_its_predictor_does_not_know(here, made_up, mode, capsys):
    refined(mode, "a")
    n = len(archived())
    capsys.readouterr()
    search([*MODES[mode], "--exp_name", "b"])
    assert f"searches have measured {n} subnets that this predictor does not know" in capsys.readouterr().err
    search([*PREPARE, "--overwrite"])
    capsys.readouterr()
    search([*MODES[mode], "--exp_name", "c"])
    assert "does not know" not in capsys.readouterr().err


def test_the_result_is_the_most_accurate_measured_subnet(here, made_up, capsys):
    """By hand, of all that was measured within the budget; random pairs do not count while there are others."""
    shown = of_json(capsys, *EVOLUTION, *REFINE, "--exp_name", "a")
    assert shown["top1"] == max(map(accuracy_of, made_up))


def test_pairs_are_the_result_where_all_candidates_are_pairs(here, made_up, monkeypatch, capsys):
    """A space so small, or a budget so tight, that nothing is left to measure."""
    genes, accuracies = PairStore(here / PAIRS).load(SPACE)
    found = Pool(genes=genes, costs=np.arange(len(genes), dtype=float), first=0)
    monkeypatch.setattr("methods.evolution.refining.Pool", lambda **_: found)
    shown = of_json(capsys, *EVOLUTION, *REFINE, "--exp_name", "a")
    assert not made_up
    assert shown["top1"] == accuracies.max()
    assert [one["measured"] for one in shown["refined"]["rounds"]] == [0, 0]


def test_points_of_a_refined_front_are_measured_and_none_dominates_another(here, made_up, capsys):
    """By brute force: the front is that of all measured subnets, and --pick takes the most accurate by measurement."""
    said = of_json(capsys, *FRONT, *REFINE, "--exp_name", "a")
    front = read_json(here / "exps/a/front.json")
    points = [(one["objectives"]["latency"], one["measured_accuracy"]) for one in front]
    every = [(float(PRICE.predict(genes_of(SPACE, [net]))[0]), accuracy_of(net)) for net in made_up]
    best = {one for one in every if not any(o[0] <= one[0] and o[1] >= one[1] and o != one for o in every)}
    np.testing.assert_allclose(sorted(points), sorted(best))
    assert said["top1"] == max(top1 for _, top1 in points)
    limit = sorted(cost for cost, _ in points)[len(points) // 2]
    said = of_json(capsys, *FRONT[:2], "--pick", f"latency<={limit!r}", "--exp_name", "a")
    assert said["top1"] == max(top1 for cost, top1 in points if cost <= limit)


def test_what_a_round_would_pick_is_measured(here, made_up, capsys):
    """Also the cheapest subnet, where --pick allows no other."""
    limit = PRICE.cheapest()[0] * (1 + 1e-9)
    said = of_json(capsys, *FRONT, *REFINE, "--pick", f"latency<={limit!r}", "--exp_name", "a")
    assert said["picked"]["latency"] <= limit
    assert said["top1"] in map(accuracy_of, made_up)


def test_a_predictor_of_pairs_that_are_there_has_their_quantizer(tmp_path, few_digits, monkeypatch, capsys):
    """As shipped: the recipe's quantizer is another one by now."""
    shutil.copytree(ROOT / "models/digits", tmp_path / "models/digits")
    shutil.copytree(ROOT / "dataset/NetInfo/digits/acc_quant", tmp_path / "dataset/NetInfo/digits/acc_quant")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.kernel_predictor.KernelConfig", partial(KernelConfig, steps=2))
    asked = ["--prepare", "acc_quant", "--predictor", "kernel", "--overwrite", "--json"]
    assert RECIPES["digits"].quantizer != "linear-published"
    shown = of_json(capsys, *asked)
    assert shown["data"]["quantizer"] == "linear-published"
    assert shown["data"]["n_pairs"] == 300
    with pytest.raises(UserError, match='quantizer was "linear-published", is "linear"'):
        search([*asked, "--quantizer", "linear"])
