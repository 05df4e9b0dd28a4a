"""docs/extending.md is true: its files are put outside the product, its commands run, and what they leave is right."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from apq.experiment import Experiment
from apq.files import read_json
from apq.layers import layers_of
from apq.search_result import read_result

PAGE = (ROOT / "docs/extending.md").read_text()
FILES = dict(re.findall(r"```python\n# plugins/(\w+\.py)\n(.*?)```", PAGE, re.DOTALL))


def commands(section):
    """The lines of the shell blocks of a section."""
    text = re.split(r"\n## ", PAGE.split(f"\n## {section}\n")[1])[0]
    return "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", "").splitlines()


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with the page's files in `plugins`, from which the product is used and in which nothing of it lies."""
    path = tmp_path_factory.mktemp("outside")
    (path / "plugins").mkdir()
    for name, code in FILES.items():
        (path / "plugins" / name).write_text(code)
    (path / "models").mkdir()
    (path / "models/digits").symlink_to(ROOT / "models/digits")
    return path


def with_plugins(here, *more):
    """The variables with which the files of the page are plugins. `more` are plugins of the tests."""
    names = [*(name.removesuffix(".py") for name in FILES), *more]
    paths = [here / "plugins", ROOT, ROOT / "tests"]
    return {"APQ_PLUGINS": ",".join(names), "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}


def in_a_new_process(line, here, *more):
    """Run a line of the page and return what it prints."""
    env = {**os.environ, **with_plugins(here, *more)}
    words = shlex.join([sys.executable, *words_of(line)]) if line.startswith("python ") else line
    done = subprocess.run(
        words, cwd=here, env=env, shell=True, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return done.stdout


def words_of(line):
    """What follows `python` in a line, with scripts of the checkout."""
    first, *rest = shlex.split(line)[1:]
    return [first if first.startswith("-") else str(ROOT / first), *rest]


@pytest.fixture
def run(here, preloaded):
    """Runs a line of the page and returns what it prints. `more` are plugins of the tests."""

    def call(line, *more):
        if not line.startswith("python "):
            return in_a_new_process(line, here)
        done = preloaded.call(words_of(line), cwd=here, env=with_plugins(here, *more))
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        return done.stdout

    return call


def test_the_page_has_a_file_for_each_table():
    assert set(FILES) == {"learned_clip.py", "random_search.py", "roofline.py", "parity.py"}


def test_a_quantizer(here, run):
    for line in commands("A quantizer"):
        shown = run(line, "few_images_plugin")
    assert "learned-clip policy of mobilenet_v2_small, " in shown
    assert "all 8 bits" in shown  # by the cost model of the search
    config, policy = (read_json(here / "exps/clips" / name) for name in ("config.json", "policy.json"))
    assert (policy["quantizer"], config["type"]) == ("learned-clip", "latency")
    assert policy["strategy"][0] == [8, -1]  # weights and activations, the image as it is
    assert config["ratio"] <= 0.6  # the default budget, of the cost at 8 bits
    assert "learned-clip policy" in run("python -m lut --model exps/clips")
    code = """
import torch
from elastic_nn.modules.quant_layers import quantized_layers
from elastic_nn.networks.supernet_file import load_quantized_supernet
from apq.cli import import_plugins
from pathlib import Path
import_plugins()
net, _ = load_quantized_supernet(Path("models/clipped/supernet.pt"))
assert net.scheme.name == "learned-clip"
layers = quantized_layers(net)
torch.save({name: (layer.weight, layer.weight_quant(layer.weight), *layer.weight_quant.scale_and_zero_point(),
                   layer.weight_quant.code_range) for name, layer in layers.items()}, "codes.pt")
"""
    (here / "codes.py").write_text(code)
    run(f"python {here / 'codes.py'}")
    codes = torch.load(here / "codes.pt", weights_only=True)
    assert len(codes) > 20
    for weight, quantized, scale, zero_point, (low, high) in codes.values():
        expected = (weight / scale + zero_point).round().clamp(low, high)
        torch.testing.assert_close((expected - zero_point) * scale, quantized)
        assert scale > 0
    trained = torch.load(here / "models/clipped/supernet.pt", weights_only=True)
    clips = [value.item() for key, value in trained["state_dict"].items() if key.endswith(".clip")]
    assert len(set(clips)) > len(clips) / 2  # each learned its own


def test_a_search_method(here, run):
    assert "the best of many random subnets" in in_a_new_process("python search.py --help", here)
    assert "--tries" in run("python search.py --mode random --help")
    for line in commands("A search method"):
        shown = run(line)
    found = read_result(Experiment(here / "exps/lucky"))
    assert found.method == "random"
    assert found.cost <= 0.04
    assert found.settings == {"random": {"tries": 10_000, "seed": 0}}
    assert found.made_by.command.endswith("--mode random --constraint 0.04 --exp_name lucky")
    assert "space digits, 400 test images" in shown
    assert read_json(here / "exps/lucky/acc")[0] > 0.5


def test_a_cost_model(here, run):
    *lines, last = commands("A cost model")
    for line in lines:
        run(line)
    shown = json.loads(run(f"{last} --json"))
    assert shown["priced_by"].startswith("roofline with bitops_per_ms 10000000000.0, bytes_per_ms 200000.0")
    found = read_result(Experiment(here / "exps/roof")).found_subnet
    layers = layers_of(found.space, found.subnet)
    by_hand = sum(max(layer.bitops / 1e10, layer.size_bytes / 2e5) for layer in layers)
    assert shown["costs"]["full"]["latency_ms"] == pytest.approx(by_hand)
    assert by_hand <= 0.05


def test_a_data_set(here, run):
    of_space, of_model = commands("A data set and its space")
    run(of_space, "few_images_plugin")
    run(of_model)
    supernet = torch.load(here / "models/parity/supernet.pt", weights_only=True)
    assert supernet["images"] == {"dataset": "parity"}
    assert supernet["state_dict"]["classifier.weight"].shape[0] == 2
    model = torch.load(here / "models/parity-net/model.pt", weights_only=True)
    assert model["model"]["dataset"] == "parity"
    assert model["val_top1"] > 0.5


def test_nothing_of_the_product_was_touched(here):
    """The files that stand in for a user's are the only code outside."""
    assert {path.name for path in here.rglob("*.py")} == {*FILES, "codes.py"}
    assert np.all([path.resolve().is_relative_to(here) for path in here.rglob("*.py")])
