"""OQA's MobileNetV3 supernets: keys of all bit-widths, and golden outputs of the published code at 4 and 2 bits."""

from __future__ import annotations

import math

import pytest
import torch
from published import filled
from released import check_evaluation, check_fills, check_keys, images, subnet_of

from apq.errors import UserError
from apq.presets import OQA_MBV3, get_space
from elastic_nn.modules.quant_layers import quantizers
from elastic_nn.networks.supernet_file import load_supernet


def steps(data, bits):
    """The smallest size of each step: by the golden rule it depends on the weights beside it, as they are stored."""
    shapes, factors, found = dict(data["state_dict"]), data["step_factors"], {}
    for key in shapes:
        if key.endswith(".sw"):
            fan_in = math.prod(shapes[f"{key.removesuffix('.sw')}.weight"][1:])
            found[key] = factors["weight"][bits] * math.sqrt(2 / fan_in)
        elif key.endswith(".sa"):
            found[key] = factors["activation"][bits]
    return found


@pytest.fixture(scope="module", params=["4", "2"])
def released(request, golden, tmp_path_factory):
    """The golden data of a bit-width, the weights, and the supernet that is loaded from a file with them."""
    data, bits = golden("oqa_mbv3.json"), request.param
    weights = filled(data["state_dict"], data["SEED"], gains=(1, 3), steps=steps(data, bits))
    file = tmp_path_factory.mktemp("oqa") / f"oqa_mbv3_d234_e346_k357_w1.0_b{bits}"  # the published name has the bits
    torch.save({"state_dict": weights}, file)
    net, _ = load_supernet(file)
    return data, bits, weights, net.eval()


def test_keys_and_values(released):
    data, bits, weights, net = released
    check_fills(weights, data["of_bits"][bits]["fill_check"])
    assert net.space == (OQA_MBV3 if bits == "4" else get_space("oqa-mbv3-2bit"))
    assert {quantizer.bits for quantizer in quantizers(net)} == {int(bits)}
    written = net.published_state_dict()
    check_keys(written, data["state_dict"], data)
    assert all(torch.equal(written[key], value) for key, value in weights.items())


@pytest.mark.parametrize("name", ["mid", "smallest", "largest"])
def test_outputs(released, name):
    data, bits, _, net = released
    golden = next(row for row in data["of_bits"][bits]["evaluations"] if row["subnet"]["name"] == name)
    policy = {kind.setting: [int(bits)] * 20 for kind in net.space.operands}
    net.double().activate(subnet_of(net.space, golden["subnet"], **policy))
    logits = check_evaluation(net, golden)
    if name != "largest":
        with torch.no_grad():
            alone = net.get_active_subnet()(images(golden["subnet"]["resolution"]))
        torch.testing.assert_close(alone, logits, rtol=0, atol=1e-11 * logits.std().item())


def test_the_bits_must_be_told(released, tmp_path):
    _, bits, weights, _ = released
    file = tmp_path / "supernet.pt"
    torch.save(weights, file)
    with pytest.raises(UserError, match=r"how many bits it has is not in it: .*--space oqa-mbv3-4bit"):
        load_supernet(file)
    space = get_space(f"oqa-mbv3-{bits}bit")
    assert load_supernet(file, space)[0].space == space
    with pytest.raises(UserError, match=r"one bit-width.*not of space qfa-mbv3"):
        load_supernet(file, get_space("qfa-mbv3"))
