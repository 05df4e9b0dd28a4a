"""HAQ's accelerators against its published table, and a slow simulation of every step."""

from __future__ import annotations

import csv
import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import script
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from apq.errors import UserError
from apq.genes import largest_subnet, sample, subnets_of
from apq.layers import ConvLayer, layers_of
from apq.policy import policy_from_strategy
from apq.presets import DIGITS, GLYPHS, QFA_MBV3_GLYPHS
from lut.__main__ import main
from lut.bit_costs import linear_costs
from lut.bit_serial import NAMED, BitSerial
from lut.bitfusion import BitFusion
from lut.cost_model import cost_model_from_flags, cost_model_from_record
from lut.costs import cost_of, layer_quantity
from lut.named import network_named
from lut.population import PopulationCost
from lut.table import build

CLOUD, EDGE = NAMED["bit-serial-cloud"], NAMED["bit-serial-edge"]
SMALL = BitSerial(batch=1, rows=2, columns=2, word_bits=4, port_bits=4, buffer_words=8, clock_mhz=1)


@pytest.fixture(scope="module")
def mobilenet():
    return network_named("mobilenet_v2").layers["full"]


# Published values


def test_published_table(golden, mobilenet):
    """All 1,728 cells, to the cycle. The table's classifier is that of 1,000 classes, whatever its name says."""
    with golden("haq_latency_table.csv").open() as file:
        rows = [[float(cell) for cell in row] for row in list(csv.reader(file))[1:]]
    layers = [replace(mobilenet[int(i)], w_bits=int(w), a_bits=int(a)) for i, w, a, _ in rows]
    assert len(rows) == 27 * 64
    assert CLOUD.cycles(layers).tolist() == [cell for *_, cell in rows]
    np.testing.assert_allclose(CLOUD.price(layers)[:, 0], CLOUD.cycles(layers) / 200e3, rtol=1e-15)  # ms at 200 MHz


def test_published_policies(golden, mobilenet):
    """Every layer of five published and random policies, those that the table leaves out too."""
    cycles = BitSerial(clock_mhz=0.001)  # a cycle is a millisecond
    costs = linear_costs(mobilenet, "latency", cycles)
    for case in golden("haq.json")["linear_policies"]:
        policy = policy_from_strategy("linear", mobilenet, case["strategy"])
        assert costs.per_layer(policy.matrix(7)).tolist() == case["per_layer_cost"]  # HAQ reads 7 bits of the image
        assert costs.reference == case["org_cost_8bit"]
        assert costs.ratio(policy.matrix(7)) == pytest.approx(case["ratio"], rel=1e-12)


@pytest.mark.parametrize(("image_bits", "ratio"), [(7, 0.59138), (8, 0.59646)])
def test_published_ratio(golden, mobilenet, image_bits, ratio):
    """Of HAQ's list: about 0.6 on its own accelerator, as it was searched for, but not on BitFusion."""
    case = golden("haq.json")["linear_policies"][0]
    bits = policy_from_strategy("linear", mobilenet, case["strategy"]).matrix(image_bits)
    assert linear_costs(mobilenet, "latency", CLOUD).ratio(bits) == pytest.approx(ratio, abs=5e-6)
    assert linear_costs(mobilenet, "latency", BitFusion()).ratio(bits) == pytest.approx(0.826, abs=1e-3)


# One step after another


def simulated(model, pixels, channels, depth, w, a):
    """Cycles of a product: a step a cycle, each after the words that it needs have arrived."""
    words = [min(model.word_bits, depth - at) for at in range(0, depth, model.word_bits)]
    loads = [-(-bits // model.port_bits) for bits in words]

    def tiles(size, block, bits):
        number = -(-size * len(words) * bits // (block * model.buffer_words))
        all_blocks = -(-size // block)
        tile = -(-all_blocks // number) * block
        return [range(at, min(at + tile, size)) for at in range(0, size, tile)]

    def blocks(tile, block):
        return [len(tile[at : at + block]) for at in range(0, len(tile), block)]

    def run(x_blocks, w_blocks, x_first):
        now, arrived, port = 0, {}, {"x": 0, "w": 0}
        outer, inner = (x_blocks, w_blocks) if x_first else (w_blocks, x_blocks)
        outer_bits, inner_bits = (a, w) if x_first else (w, a)
        loops = (range(len(outer)), range(len(inner)), range(len(words)), range(inner_bits), range(outer_bits))
        for o, i, word, inner_bit, outer_bit in itertools.product(*loops):
            now += 1
            for side, block, rows, bit in (
                ("x" if x_first else "w", o, outer[o], outer_bit),
                ("w" if x_first else "x", i, inner[i], inner_bit),
            ):
                if (key := (side, block, word, bit)) not in arrived:
                    port[side] += rows * loads[word]
                    arrived[key] = port[side]
                now = max(now, arrived[key])
        return now

    return min(
        sum(
            run(blocks(x, model.rows), blocks(y, model.columns), x_first)
            for x in tiles(pixels, model.rows, a)
            for y in tiles(channels, model.columns, w)
        )
        for x_first in (True, False)
    )


few = st.integers(1, 3)
arrays = st.builds(
    BitSerial,
    batch=st.integers(1, 5),
    rows=few,
    columns=few,
    word_bits=st.integers(3, 9),
    port_bits=st.integers(1, 9),
    buffer_words=st.integers(1, 30),
)


@given(arrays, st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), few, few)
@settings(max_examples=40)
def test_equals_a_simulation(model, side, c, d, w, a):
    image = ConvLayer(c, d, side, 1, 1, 1, w, a)
    connected = [simulated(model, model.batch, d, c, w, a)]
    expected = connected if side == 1 else [model.batch * simulated(model, side**2, d, c, w, a)]
    assert model.cycles([image]).tolist() == expected
    assume(c > 1)
    depthwise = ConvLayer(c, c, side, 3, 2, c, w, a)
    places, together = (-(-side // 2)) ** 2, min(model.batch, model.columns)
    images = [together] * (model.batch // together) + [model.batch % together] * (model.batch % together > 0)
    assert model.cycles([depthwise])[0] == c * sum(simulated(model, places, n, 9 * n, w, a) for n in images)
    grouped = ConvLayer(2 * c, 2 * d, 2, 3, 1, 2, w, a)
    assert model.cycles([grouped])[0] == 2 * model.batch * simulated(model, 4, d, 9 * c, w, a)


def test_a_convolution_by_hand():
    """Four pixels are two blocks of two, two channels are one block, and the depth of three is one word of a cycle.

    At one bit the second block of pixels has arrived after 4 cycles, and its step runs in that one. With 2 bits of
    activations 8 words arrive. With 2 bits of weights the second bit arrives after 4 cycles, in which the second of
    four steps runs. A port of one bit takes 3 cycles for a word.
    """
    layer = ConvLayer(3, 2, 2, 1, 1, 1, 1, 1)
    bits = [layer, replace(layer, a_bits=2), replace(layer, w_bits=2)]
    assert SMALL.cycles(bits).tolist() == [4, 8, 6]
    assert SMALL.price(bits)[:, 0].tolist() == [0.004, 0.008, 0.006]  # at 1 MHz
    assert replace(SMALL, port_bits=1).cycles([layer]).tolist() == [12]
    assert replace(SMALL, batch=3).cycles([layer]).tolist() == [12]
    assert replace(SMALL, batch=3).cycles([replace(layer, input_size=1)]).tolist() == [3]  # 3 images are 3 rows


# Properties


layers = st.builds(
    ConvLayer,
    *(st.integers(1, 300), st.integers(1, 300), st.integers(1, 60), st.sampled_from((1, 3, 5)), st.integers(1, 2)),
    *(st.just(1), st.integers(1, 7), st.integers(1, 7)),
)


@given(st.sampled_from(list(NAMED.values())), layers, st.booleans())
@settings(max_examples=50)
def test_bits_cost_time_in_proportion(model, layer, depthwise):
    """Cycles are at least those of the steps and of the words of each port, which are linear in the bits of their
    operand, and at most their sum; words are counted anew for each tile of the other operand."""
    if depthwise:
        layer = replace(layer, groups=layer.in_channels, out_channels=layer.in_channels)
    at_bits = [replace(layer, w_bits=w, a_bits=a) for w, a in itertools.product((1, layer.w_bits, 8), (1, 8))]
    cycles = model.cycles(at_bits).reshape(3, 2)
    assert (np.diff(cycles, axis=0) >= 0).all()
    assert (np.diff(cycles, axis=1) >= 0).all()
    blocks = np.ceil(layer.output_size**2 / model.rows) * np.ceil(layer.out_channels / layer.groups / model.columns)
    words = np.ceil(layer.in_channels / layer.groups * layer.kernel_size**2 / model.word_bits)
    if layer.output_size > 1 and not depthwise:
        steps = model.batch * blocks * words
        assert (cycles >= steps * np.outer((1, layer.w_bits, 8), (1, 8))).all()
        loaded = model.batch * layer.output_size**2 * words * np.array((1, 8))
        assert (cycles >= loaded).all()


def test_a_layer_that_computes_all_the_time_is_linear_in_bits():
    """Many channels and pixels: steps outlast loads, so cycles grow by the same for each bit of the activations."""
    layer, a_bits = ConvLayer(256, 512, 16, 1, 1, 1, 8, 8), np.arange(2, 7)
    for w in (6, 8):
        cycles = CLOUD.cycles([replace(layer, w_bits=w, a_bits=int(a)) for a in a_bits])
        steps = 16 * 16 * 32 * w * a_bits  # images x blocks of pixels x blocks of channels
        assert np.diff(cycles, 2).tolist() == [0, 0, 0]
        assert ((cycles >= steps) & (cycles <= 1.06 * steps)).all()


# In the product


def test_populations_of_spaces_cost_the_sum_of_their_layers():
    for space, model in itertools.product((DIGITS, QFA_MBV3_GLYPHS), NAMED.values()):
        genes = sample(space, 5, np.random.default_rng(0))
        direct = [model.price(layers_of(space, net))[:, 0].sum() for net in subnets_of(space, genes)]
        assert PopulationCost(space, "latency", model).predict(genes) == pytest.approx(direct, rel=1e-12)


def test_there_are_no_energies(mobilenet):
    assert np.isnan(CLOUD.price(mobilenet)[:, 1]).all()
    assert cost_of(mobilenet, CLOUD).energy_mj is None
    with pytest.raises(UserError, match=r"bit-serial-cloud \(16 images together; it has no energies\) has no energy"):
        layer_quantity(mobilenet, "energy", CLOUD)
    with pytest.raises(UserError, match="no energy"):
        linear_costs(mobilenet, "energy", CLOUD)
    with pytest.raises(UserError, match="no energy"):
        PopulationCost(DIGITS, "energy", EDGE)
    with pytest.raises(UserError, match="no cost table is written of bit-serial-edge"):
        build(DIGITS, EDGE)


def test_names_files_and_records(tmp_path):
    assert cost_model_from_flags(Path("bit-serial-edge"), None) == EDGE
    file = tmp_path / "array.json"
    file.write_text('{"kind": "bit-serial", "batch": 4, "clock_mhz": 100}')
    model = cost_model_from_flags(file, None)
    assert model == BitSerial(batch=4, clock_mhz=100)
    assert str(model).startswith("bit-serial with batch 4, rows 16, ")
    for each in (model, CLOUD, EDGE):
        assert cost_model_from_record(json.loads(json.dumps(each.record())), file) == each
    assert len({each.digest() for each in (model, CLOUD, EDGE)}) == 3
    with pytest.raises(UserError, match="cannot read nowhere: no such file; known by name: bit-serial-cloud, bit-ser"):
        cost_model_from_flags(Path("nowhere"), None)


@pytest.mark.parametrize(
    "fields", [{"rows": 0}, {"batch": 1.5}, {"port_bits": "64"}, {"clock_mhz": 0}, {"batch": True}, {"rows": 2**40}]
)
def test_bad_values_are_named(fields):
    with pytest.raises(UserError, match=f"bit-serial: {next(iter(fields))} must be a"):
        BitSerial(**fields)


def test_layers_that_it_cannot_run_are_named():
    with pytest.raises(UserError, match=r"cannot price layer a .*at most 8 bits"):
        CLOUD.price([ConvLayer(8, 8, 8, 1, 1, 1, 9, 8, name="a")])
    full, most = (ConvLayer(8, 8, 8, 1, 1, 1, bits, bits) for bits in (32, 8))
    assert CLOUD.cycles([full]) == CLOUD.cycles([most])
    assert CLOUD.price([]).shape == (0, 2)


def test_costs_of_a_network_from_the_command_line(capsys):
    main(["--model", "digits:largest", "--config", "bit-serial-edge", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["priced_by"] == str(EDGE)
    assert shown["costs"]["full"] == asdict(cost_of(layers_of(DIGITS, largest_subnet(DIGITS)), EDGE))
    main(["--model", "mobilenet_v2", "--config", "bit-serial-cloud"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["latency,", "ms", "198.1247"] for line in lines)  # 39,624,933 cycles
    assert any(line.split() == ["energy,", "mJ", "not", "known"] for line in lines)


@pytest.mark.parametrize("mode", ["evolution", "nsga2"])
def test_searches_run_on_it(tmp_path, capsys, mode):
    folder = str(tmp_path / "found")
    search = script("search")
    words = ["--acc_predictor_dir", "models/glyphs", "--exp_dir", folder, "--generations", "2", "--population", "20"]
    words += ["--mode", mode, "--config", "bit-serial-edge"]
    budget = 2 * PopulationCost(GLYPHS, "latency", EDGE, GLYPHS.budget_scope).cheapest()[0]
    search([*words, *(["--constraint", str(budget)] if mode == "evolution" else [])])
    assert "bit-serial-edge" in capsys.readouterr().out
    if mode == "evolution":
        with pytest.raises(UserError, match="no energy"):
            search([*words, "--constraint", "1", "--type", "energy", "--overwrite"])
