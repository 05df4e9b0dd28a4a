"""Search results are written whole and read back equal. Damaged ones are one-line errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import read_json, write_json
from apq.genes import largest_subnet, smallest_subnet
from apq.layers import layers_of
from apq.policy import Policy, layer_names
from apq.presets import APQ_IMAGENET, DIGITS
from apq.resume import Journal
from apq.search_result import PolicyChoice, SearchResult, SubnetChoice, read_result
from apq.subnet import architecture_of, policy_of

LAYERS = layers_of(DIGITS, largest_subnet(DIGITS))
NAMES = layer_names(LAYERS)
SUBNET = SearchResult(
    method="evolution",
    choice=SubnetChoice(space=DIGITS, subnet=smallest_subnet(DIGITS), models=Path("models/digits")),
    cost=0.029,
    quantity="latency",
    unit="ms",
    limit=0.03,
    predicted_top1=0.957,
    cost_model={"accelerator": {}, "table": None},
    settings={"evolution": {"seed": 0}},
    history=({"generation": 0},),
    front=({"objectives": {"latency": 0.029}},),
)
POLICY = SearchResult(
    method="ddpg",
    choice=PolicyChoice(
        policy=Policy(quantizer="linear", names=NAMES, bits=((8, -1), *((4, 6),) * (len(NAMES) - 1))),
        layers=LAYERS,
        model="mobilenet_v2_small",
        recipe="glyphs",
        image_bits=8,
        ratio=0.6,
        of_what="the 8-bit cost",
        n_priced=len(NAMES),
        original_top1=0.9,
    ),
    cost=0.05,
    quantity="latency",
    unit="ms",
    limit=0.06,
    cost_model={"accelerator": {}, "table": None, "measured": None},
    settings={"search": {"min_bit": 2}, "agent": None},
)


@pytest.mark.parametrize("result", [SUBNET, POLICY, replace(SUBNET, limit=None, front=None, measured_top1=0.5)])
def test_a_result_comes_back_equal(tmp_path, result):
    experiment = Experiment(tmp_path / "e")
    with experiment.replaced() as new:
        result.write(new)
    found = read_result(experiment)
    assert found == result
    assert found.path == experiment.path
    assert set(found.made_by.versions) >= {"apq", "python", "torch", "numpy"}
    assert set(read_json(experiment.config)["files"]) == {item.name for item in experiment.path.iterdir()}


def test_what_was_chosen_is_asked_for_by_kind():
    assert SUBNET.found_subnet.space == DIGITS
    assert POLICY.found_policy.model == "mobilenet_v2_small"
    with pytest.raises(UserError, match="no space was searched"):
        _ = POLICY.found_subnet
    with pytest.raises(UserError, match="not the policy"):
        _ = SUBNET.found_policy


def test_an_experiment_with_another_kind_of_choice_is_named(tmp_path):
    for result, kind in ((SUBNET, "found_policy"), (POLICY, "found_subnet")):
        result.write(experiment := Experiment(tmp_path / kind))
        with pytest.raises(UserError, match=f"^{experiment.path} holds"):
            getattr(read_result(experiment), kind)


@pytest.mark.parametrize("points", [{}, 5, [1]])
def test_other_data_is_no_front(tmp_path, points):
    SUBNET.write(experiment := Experiment(tmp_path))
    write_json(experiment.front, points)
    with pytest.raises(UserError, match=r"front\.json must hold a list of objects"):
        read_result(experiment)


@pytest.mark.parametrize("key", ["space", "acc_predictor_dir", "accelerator", "table"])
@pytest.mark.parametrize("value", [None, [1]])
def test_a_config_without_a_needed_key_is_refused(tmp_path, key, value):
    experiment = Experiment(tmp_path)
    SUBNET.write(experiment)
    config = read_json(experiment.config)
    del config[key]
    write_json(experiment.config, config)
    with pytest.raises(UserError, match=f"config.json is not the record of a search: it lacks {key}"):
        read_result(experiment)
    if (key, value) != ("table", None):
        write_json(experiment.config, {**config, key: value})
        with pytest.raises(UserError, match=f"{key} cannot be"):
            read_result(experiment)


@pytest.mark.parametrize("data", [[], "text", {"format": 3}, {"format": True}])
def test_other_data_is_no_config(tmp_path, data):
    experiment = Experiment(tmp_path)
    SUBNET.write(experiment)
    write_json(experiment.config, data)
    with pytest.raises(UserError, match=r"config\.json"):
        read_result(experiment)


def test_a_published_experiment_has_the_published_settings(tmp_path):
    subnet = largest_subnet(APQ_IMAGENET)
    write_json(tmp_path / "arch", [architecture_of(APQ_IMAGENET, subnet), policy_of(APQ_IMAGENET, subnet)])
    found = read_result(Experiment(tmp_path))
    assert found.found_subnet == SubnetChoice(space=APQ_IMAGENET, subnet=subnet, models=Path("models"))
    assert found.method == "published"


@pytest.mark.parametrize("name", ["oqa-4bit", "oqa-2bit"])
def test_results_of_before_are_read(name):
    found = read_result(Experiment(ROOT / "exps" / name))
    assert found.method == "coarse_to_fine"
    assert found.measured_top1 == read_json(ROOT / "exps" / name / "acc")[0]
    assert len(found.front) > 10


def test_an_unfinished_search_says_so(tmp_path):
    (tmp_path / "search.state.pt").write_bytes(b"")
    with pytest.raises(UserError, match="is not finished: continue it with the same command"):
        read_result(Experiment(tmp_path))
    with pytest.raises(UserError, match=r"run search\.py"):
        read_result(Experiment(tmp_path / "none"))


def test_a_later_result_leaves_nothing_of_the_one_before(tmp_path):
    experiment = Experiment(tmp_path)
    with experiment.replaced() as new:
        SUBNET.write(new)
        (new.path / "history.png").write_text("a picture")
    with experiment.adding("depths.png") as picture:
        picture.write_text("drawn of it")
    with experiment.replaced() as new:
        replace(POLICY, history=()).write(new)
    names = {"config.json", "history.jsonl", "lat", "made_by.json", "policy.json"}
    assert {item.name for item in tmp_path.iterdir()} == names


def test_replacing_keeps_to_its_folder(tmp_path):
    """A list of files is data: it cannot make a search remove files elsewhere."""
    (tmp_path / "precious").write_text("mine")
    experiment = Experiment(tmp_path / "e")
    for tampered in ("../precious", str(tmp_path / "precious"), "e/../../precious"):
        with experiment.replaced() as new:
            SUBNET.write(new)
        config = read_json(experiment.config)
        write_json(experiment.config, {**config, "files": [*config["files"], tampered]})
    with experiment.replaced() as new:
        SUBNET.write(new)
    assert (tmp_path / "precious").exists()


def test_journals_of_a_killed_search_go_and_lines_of_others_do_not(tmp_path):
    experiment, others = Experiment(tmp_path / "e"), tmp_path / "e/notes.jsonl"
    asked = {"coarse_to_fine": {}, "seed": 0}
    Journal(tmp_path / "e/evaluated.json", "evaluated", "search", "remove it").start(asked)
    Journal(tmp_path / "e/evaluated.json", "evaluated", "search", "remove it", 3).append({"index": 0})
    others.write_text('{"mine": 1}\n')
    with experiment.replaced() as new:
        SUBNET.write(new)
    assert others.read_text() == '{"mine": 1}\n'
    assert not list((tmp_path / "e").glob("evaluated*"))


def test_an_older_result_that_lists_no_files_is_replaced_whole(tmp_path):
    experiment = Experiment(tmp_path)
    SUBNET.write(experiment)  # as a pick writes into an experiment of before: made_by.json has no list
    (tmp_path / "front.png").write_text("a picture")
    with experiment.replaced() as new:
        replace(SUBNET, front=None).write(new)
    assert not experiment.front.exists()
    assert not (tmp_path / "front.png").exists()


@pytest.mark.parametrize(
    ("data", "fine"), [({}, True), ({"host": "a"}, True), ([], False), ({"versions": "all"}, False)]
)
def test_where_a_result_comes_from_is_read_with_care(tmp_path, data, fine):
    SUBNET.write(Experiment(tmp_path))
    write_json(tmp_path / "made_by.json", data)
    if fine:
        assert read_result(Experiment(tmp_path)).made_by.command == ""
    else:
        with pytest.raises(UserError, match=r"made_by\.json: "):
            read_result(Experiment(tmp_path))


def test_settings_cannot_stand_for_other_keys(tmp_path):
    with pytest.raises(UserError, match="settings cannot be called space"):
        replace(SUBNET, settings={"space": 1}).write(Experiment(tmp_path))
