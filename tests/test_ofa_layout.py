"""The MobileNetV3 supernet of once-for-all: keys, and golden outputs of the published code."""

from __future__ import annotations

import pytest
import torch
from published import filled
from released import check_evaluation, check_fills, check_keys, images, subnet_of

from apq.presets import OQA_MBV3
from elastic_nn.networks.supernet_file import load_supernet

BITS = {kind.setting: [4] * 20 for kind in OQA_MBV3.operands}  # which a float network ignores


@pytest.fixture(scope="module")
def released(golden, tmp_path_factory):
    """The golden data, the weights, and the supernet that is loaded from a file with them."""
    data = golden("ofa_mbv3.json")
    weights = filled(data["state_dict"], data["SEED"])
    # Released files have the older name of this module, and are wrapped.
    older = {
        key.replace(".conv.", ".mobile_inverted_conv.", 1) if key.startswith("blocks.") else key: value
        for key, value in weights.items()
    }
    file = tmp_path_factory.mktemp("ofa") / "ofa_mbv3_d234_e346_k357_w1.0"
    torch.save({"state_dict": {f"module.{key}": value for key, value in older.items()}}, file)
    return data, weights, load_supernet(file)[0].eval()


def test_keys_and_values(released):
    data, weights, net = released
    check_fills(weights, data["fill_check"])
    assert (net.space, net.scheme.quantizes) == (OQA_MBV3, False)
    written = net.published_state_dict()
    check_keys(written, data["state_dict"], data)
    assert all(torch.equal(written[key], value) for key, value in weights.items())
    assert {module.eps for module in net.modules() if hasattr(module, "eps")} == {data["bn_eps"]}


@pytest.mark.parametrize("name", ["mid", "smallest", "largest"])
def test_outputs(released, name):
    data, _, net = released
    golden = next(row for row in data["evaluations"] if row["subnet"]["name"] == name)
    net.double().activate(subnet_of(OQA_MBV3, golden["subnet"], **BITS))
    logits = check_evaluation(net, golden)
    with torch.no_grad():
        alone = net.get_active_subnet()(images(golden["subnet"]["resolution"]))
    torch.testing.assert_close(alone, logits, rtol=0, atol=1e-11 * logits.std().item())
