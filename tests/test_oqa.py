"""OQA's spaces, and the complexity of their networks in the paper."""

from __future__ import annotations

import pytest

from apq.layers import layers_of
from apq.presets import get_space
from apq.space import FULL_PRECISION
from apq.subnet import subnet_from_spec


def published_layers(record):
    """The layers of a published record, through our own space and subnet."""
    space = get_space(f"oqa-mbv3-{record['bits']}bit")
    policy = {kind.setting: [record["bits"]] * len(space.slots) for kind in space.operands}
    architecture = {key: record[key] for key in ("ks", "e", "d")}
    return layers_of(space, subnet_from_spec(space, {**architecture, "resolution": record["image_size"], **policy}))


def test_published_complexity(golden):
    for record in golden("oqa_complexity.json")["records"]:
        layers, found = published_layers(record), record["recomputed"]
        assert round(sum(layer.macs for layer in layers) / 1e6, 3) == record["flops_M"]
        assert sum(layer.params for layer in layers) / 1e6 == pytest.approx(found["params_M_minus_step_sizes"])
        assert sum(layer.weighted_flops for layer in layers) / 1e6 == pytest.approx(found["quant_weighted_flops_M"])
        quantized = [layer for layer in layers if layer.w_bits != FULL_PRECISION]
        assert {(layer.w_bits, layer.a_bits) for layer in quantized} == {(record["bits"], record["bits"])}
        assert len(quantized) == found["n_lsq_convs"]
        other = sum(layer.params - layer.weights for layer in layers)
        steps = 2 * record["bits"] * len(quantized)
        bits = sum(layer.weights * layer.w_bits for layer in layers) + 32 * other + steps
        assert bits / 1e6 == pytest.approx(found["param_bits_M"])
