"""OQA supernets by the scripts: of 4 bits, of 3 bits from that, from a float one; and error messages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import script
from example_results import write_found
from few_images import N_TEST

from apq.bit_widths import at_bits
from apq.errors import UserError
from apq.files import read_json, write_json
from apq.genes import smallest_subnet
from apq.presets import OQA_MBV2_GLYPHS
from apq.space import space_to_dict
from elastic_nn.modules.quant_layers import quantizers
from elastic_nn.networks.subnet_file import load_finetuned
from elastic_nn.networks.supernet_file import load_supernet
from elastic_nn.quantizers import FLOAT, LSQ

train, quant_aware, report = (script(name) for name in ("train", "quant_aware", "test"))

SPACE = replace(OQA_MBV2_GLYPHS, name="small-oqa", dataset="digits", n_classes=10, resolutions=(24, 32))
RECIPE = ["--recipe", "tiny-sandwich"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, few_digits):
    root = tmp_path_factory.mktemp("oqa")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("APQ_CACHE", str(root / "cache"))
        for name, space in (("four", SPACE), ("three", at_bits(SPACE, 3))):
            write_json(root / f"{name}.json", space_to_dict(space))
        train(["--space", "four.json", *RECIPE, "--quantizer", "float"])
        train(["--space", "four.json", *RECIPE])
        train(["--space", "three.json", *RECIPE])
    return root


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


def test_every_supernet_says_what_it_is(here):
    four, real, three = (
        load_supernet(here / "models" / name / "supernet.pt")[0]
        for name in ("small-oqa", "small-oqa-float", "small-oqa-3bit")
    )
    assert [net.scheme for net in (four, real, three)] == [LSQ, FLOAT, LSQ]
    assert {part.bits for part in quantizers(three)} == {3}
    assert all(part.step.item() != 0 for part in quantizers(three))
    records = read_json(here / "models/small-oqa-3bit/training.json")
    assert records["started_from"]["file"] == "models/small-oqa/supernet.pt"  # by default, one of a bit more
    begun = read_json(here / "models/small-oqa/training.json")["started_from"]["file"]
    assert begun == "models/small-oqa-float/supernet.pt"  # by default the float one, as published
    assert [record["phase"] for record in records["phases"]] == ["largest", "sandwich"]
    assert [epoch["epoch"] for epoch in records["phases"][0]["epochs"]] == [0, 1]


def test_quantization_aware_training_from_a_float_file(here):
    float_file = "models/small-oqa-float/supernet.pt"
    train(["--space", "three.json", *RECIPE, "--start_from", float_file, "--out", "qat"])
    net, _ = load_supernet(here / "qat/supernet.pt")
    assert (net.scheme, net.space.fixed_bits) == (LSQ, 3)


def test_a_subnet_is_finetuned_and_reported_with_its_own_quantizers(here, capsys):
    subnet = smallest_subnet(SPACE)
    experiment = write_found(here / "exps/one", SPACE, subnet, "models/small-oqa")
    asked = ["--exp_name", "one", "--supernet", "models/small-oqa/supernet.pt", "--recipe", "tiny"]
    with pytest.raises(UserError, match="trained with lsq quantizers, which its subnets keep"):
        quant_aware([*asked, "--quantizer", "linear"])
    quant_aware(asked)
    net, _, found, _ = load_finetuned(experiment)
    assert (net.scheme, found) == (LSQ, subnet)
    capsys.readouterr()
    report(["--exp_dir", "exps/one"])
    assert f"{N_TEST} test images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--space", "four.json", "--start_from", "models/small-oqa-3bit"], "4 bits cannot inherit from fewer"),
        (["--space", "four.json", "--start_from", "models/small-oqa", "--quantizer", "float"], "cannot start from"),
        (["--space", "digits", "--start_from", "models/small-oqa"], "has other architectures"),
        (["--space", "digits", "--quantizer", "lsq"], "space digits has several"),
        (["--space", "four.json", "--start_from", "absent"], "absent"),
        (
            ["--space", "three.json", "--recipe", "oqa-glyphs-3bit", "--start_from", "scratch"],
            "give a supernet to start from",
        ),
        (["--space", "two.json"], "starts from one of a bit more, and there is none in models/small-oqa-3"),
        (
            ["--space", "other.json"],
            "starts from one of the same space in full .* none in models/other-float",
        ),
        (["--model", "mobilenet_v1_small", "--start_from", "models/small-oqa"], "--start_from belongs to --space"),
        (["--space", "four.json"], "exists"),
    ],
)
def test_mistakes_get_one_clear_line(here, flags, match):
    write_json(here / "two.json", space_to_dict(replace(at_bits(SPACE, 2), name="small-oqa-3-2bit")))
    write_json(here / "other.json", space_to_dict(replace(SPACE, name="other")))
    out = [] if match == "exists" else ["--out", "x"]
    with pytest.raises(UserError, match=match):
        train([*RECIPE, *flags, *out])
    assert not (here / "x").exists() or not list((here / "x").iterdir())


def test_weights_that_never_started_are_refused(here):
    data = torch.load(here / "models/small-oqa/supernet.pt", weights_only=True)
    data["state_dict"] = {k: 0 * v if k.endswith(".step") else v for k, v in data["state_dict"].items()}
    torch.save(data, here / "fresh.pt")
    with pytest.raises(UserError, match="never trained"):
        train(["--space", "three.json", *RECIPE, "--start_from", "fresh.pt", "--out", "y"])
