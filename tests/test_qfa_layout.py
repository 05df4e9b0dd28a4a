"""QFA's MobileNetV3 supernet: keys, and golden outputs of the published code in mixed precision."""

from __future__ import annotations

import math

import pytest
import torch
from published import filled
from released import check_evaluation, check_fills, check_keys, check_logits, images, subnet_of

from apq.presets import QFA_MBV3
from apq.space import SHARED_SETTING
from elastic_nn.modules.quant_layers import quantized_layers
from elastic_nn.networks.supernet_file import load_supernet


def rows_of(data):
    """The [key, shape] rows, where golden rows with "A" or "W" stand for the keys of quantizers."""
    rows = []
    for key, shape in data["state_dict"]:
        rows += (
            [[key + end, own] for end, own in data["templates"][shape]] if isinstance(shape, str) else [[key, shape]]
        )
    return rows


def steps(data, rows):
    """The smallest size of each step of weights: by the golden rule it depends on the layer's stored weights."""
    shapes, found = dict(rows), {}
    for key in shapes:
        layer, quantizer, rest = key.partition(".w_quantizer")
        if quantizer:
            stem = "linear" if layer == "classifier.linear" else "conv"
            fan_in = math.prod(shapes[f"{layer}.{stem}.weight"][1:])
            found[key] = data["step_factors"][rest.split(".")[-2]] * math.sqrt(2 / fan_in)
    return found


def policy_of_gene(gene):
    """130 bits of a published gene as a policy: two unused, the first block, six for each block, the last layers."""
    blocks = {
        f"{layer}_{operand}": gene[6 + 2 * i + j : 126 : 6]
        for i, layer in enumerate(("expand", "depthwise", "project"))
        for j, operand in enumerate("wa")
    }
    named = {kind.setting: blocks[kind.name] for kind in QFA_MBV3.operands}
    shared = {("blocks.0.depthwise", "w"): 2, ("blocks.0.depthwise", "a"): 3}
    shared |= {("blocks.0.project", "w"): 4, ("blocks.0.project", "a"): 5}
    shared |= {("feature_mix_layer", "w"): 126, ("feature_mix_layer", "a"): 127}
    shared |= {("pooled_mix_layer", "w"): 128, ("pooled_mix_layer", "a"): 129}
    return {**named, SHARED_SETTING: [gene[shared[one.layer, one.operand]] for one in QFA_MBV3.shared_operands]}


@pytest.fixture(scope="module")
def released(golden, tmp_path_factory):
    """The golden data, the weights, and the supernet that is loaded from a file with them."""
    data = golden("qfa_mbv3.json")
    rows = rows_of(data)
    weights = filled(rows, data["SEED"], gains=(1, 3), steps=steps(data, rows))
    file = tmp_path_factory.mktemp("qfa") / "b234_ps.pth"
    # In files that ran, the extremes of the last batch are not empty.
    ran = {key: torch.tensor(3.0) if key.endswith(("min_val", "max_val")) else v for key, v in weights.items()}
    torch.save({"state_dict": ran}, file)
    net, _ = load_supernet(file)
    return data, rows, weights, net.eval(), {key: value.clone() for key, value in net.state_dict().items()}


def test_keys_and_values(released):
    data, rows, weights, net, _ = released
    check_fills(weights, data["fill_check"])
    assert net.space == QFA_MBV3
    written = net.published_state_dict()
    check_keys(written, rows, data)
    unused = "first_conv.conv.w_quantizer", "first_conv.conv.a_quantizer"
    differing = [key for key, value in weights.items() if not torch.equal(written[key], value)]
    assert all(key.startswith(unused) for key in differing)
    assert len(differing) == 4 + 4 * 4  # steps; scales, offsets and both edges: never used in a float layer


@pytest.mark.parametrize("index", range(4), ids=["mid", "mid-2", "smallest", "largest"])
def test_outputs(released, index):
    data, _, _, net, state = released
    golden = data["evaluations"][index]
    policy = policy_of_gene(data["policies"][golden["policy"]])
    net.double().activate(subnet_of(QFA_MBV3, golden["subnet"], **policy))
    net.load_state_dict(state)  # with the statistics, which belong to a subnet
    assert (net.classifier.weight_quant.bits, net.classifier.act_quant.bits) == tuple(golden["classifier_bits"])
    logits = check_evaluation(net, golden)
    if golden["subnet"]["name"] != "largest":
        with torch.no_grad():
            alone = net.get_active_subnet()(images(golden["subnet"]["resolution"]))
        torch.testing.assert_close(alone, logits, rtol=0, atol=1e-11 * logits.std().item())
    restarted = start_steps_anew(net)
    assert restarted == 4 * (2 + 20 * 5 + 3)  # the first block; expand, three kernels, project; the last three
    with torch.no_grad():
        check_logits(net(images(golden["subnet"]["resolution"])), golden["float64_weight_steps_reinitialised"])


def start_steps_anew(net):
    """Forget the steps of all weights and take them from whole filters, at each kernel size. Returns their number."""
    n = 0
    for layer in quantized_layers(net).values():
        if "weight_quant" not in layer.operands():
            continue
        layer.weight_quant.forget()
        active = getattr(layer, "active_kernel", None)
        depthwise, out = getattr(layer, "depthwise", False), getattr(layer, "active_out", None)
        for kernel in layer.kernel_sizes if depthwise else (active,):
            if depthwise:
                layer.set_kernel(kernel)
            if out is not None:
                layer.active_out = layer.weight.size(0)
            layer.weight_quant.calibrate(layer.active_weight(layer.weight.size(0 if depthwise else 1)))
        if depthwise:
            layer.set_kernel(active)
        if out is not None:
            layer.active_out = out
        n += sum(key.endswith("step") for key in layer.weight_quant.state_dict())
    return n
