"""The layers of the toolkit's own networks, as data, are those that the built networks run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from apq.genes import largest_subnet
from apq.layers import layers_of
from apq.own_networks import OWN_NETWORKS, layers_of_own
from apq.presets import DIGITS
from elastic_nn.networks.named_models import OWN, build_model, named_model
from lut.__main__ import main
from lut.table import PublishedTable
from lut.traced import traced_layers


@pytest.mark.parametrize("name", OWN_NETWORKS)
def test_layers_are_those_that_run(name):
    spec = named_model(name)
    traced = traced_layers(build_model(spec), spec.resolution, w_bits=4, a_bits=6, in_channels=spec.in_channels)
    found = layers_of_own(name, (4, 6), spec.resolution, spec.in_channels, spec.n_classes)
    assert found == traced
    assert [layer.name for layer in found] == [layer.name for layer in traced]


def test_all_own_networks_are_listed():
    assert set(OWN_NETWORKS) == set(OWN)


def test_the_command_prices_the_shipped_network(capsys):
    spec = named_model("mobilenet_v2_small")
    parameters = sum(p.numel() for p in build_model(spec).parameters())
    main(["--model", "mobilenet_v2_small", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["resolution"] == 32
    assert found["costs"]["full"]["params"] == parameters


def test_rows_by_name_price_the_ends_of_a_built_network():
    """A supernet's first unit is `first_conv`, the convolution in it `first_conv.conv`. Rows by name are for 8 bits."""
    first, *_ = layers = layers_of(DIGITS, largest_subnet(DIGITS))
    (last,) = (layer for layer in layers if layer.name == "feature_mix_layer")
    table = PublishedTable(Path("own.json"), {"head": (2.0, 3.0), "tail": (5.0, 7.0)})
    built = [replace(layer, name=f"{layer.name}.conv") for layer in (first, last)]
    assert table.price([first, last]).tolist() == table.price(built).tolist() == [[2.0, 3.0], [5.0, 7.0]]
    assert table.covers([replace(layer, w_bits=4) for layer in built]).tolist() == [False, False]
    others = [replace(first, name=name) for name in ("features.1.conv.0.0", "classifier", "")]
    assert not table.covers(others).any()
