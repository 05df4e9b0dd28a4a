"""The cost model against published figures and an independent slow oracle, and its invariants."""

from __future__ import annotations

import csv
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apq.cache import CHECKSUM, write_cache
from apq.errors import UserError
from apq.files import read_arrays
from apq.layers import ConvLayer, first_layers, last_layers, searchable_layers
from apq.presets import APQ_IMAGENET, DIGITS
from lut.accelerator import Accelerator
from lut.bitfusion import BitFusion

SMALL_CHIP = Accelerator(
    rows=8,
    columns=12,
    max_bits=8,
    min_bits=4,
    clock_mhz=200,
    dram_bits_per_cycle=50,
    weight_buffer_bytes=6000,
    activation_buffer_bytes=3000,
    output_buffer_bytes=2000,
    accumulator_bits=24,
)


def golden_table(golden):
    with golden("apq_lut.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ("in_channels", "out_channels", "input_size", "kernel_size", "stride", "groups", "w_bits", "a_bits")
    layers = [ConvLayer(*(int(row[name]) for name in names)) for row in rows]
    return layers, *(np.array([float(row[name]) for row in rows]) for name in ("latency_ms", "energy_mJ"))


def test_published_table(golden):
    layers, latency, energy = golden_table(golden)
    costs = BitFusion().cost(layers)
    np.testing.assert_allclose(costs.latency_ms, latency, rtol=2e-4)
    np.testing.assert_allclose(costs.energy_mj, energy, rtol=1e-2)
    assert np.median(np.abs(costs.energy_mj / energy - 1)) < 2e-3
    exact = np.rint(costs.latency_ms * 5e5) == np.rint(latency * 5e5)  # cycles at 500 MHz
    assert exact.mean() > 0.85


def test_published_head_and_tail(golden):
    entries = golden("apq_lut_head_tail.json")["entries"]
    layers = [part(APQ_IMAGENET, 224, "published")[0] for part in (first_layers, last_layers)]
    costs = BitFusion().cost(layers)
    for i, name in enumerate(("head", "tail")):
        assert costs.latency_ms[i] == pytest.approx(entries[name]["latency_ms"], rel=1e-3)
        assert costs.energy_mj[i] == pytest.approx(entries[name]["energy_mJ"], rel=1e-2)


def mobilenet_v2():
    """Every convolution of MobileNetV2 1.0 at 224 pixels, W8A8, and then its classifier."""
    layers, c, side = [ConvLayer(3, 32, 224, 3, 2, 1, 8, 8, image_input=True)], 32, 112
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for ratio, width, repeats, first_stride in stages:
        for i in range(repeats):
            stride, mid = first_stride if i == 0 else 1, c * ratio
            if ratio > 1:
                layers.append(ConvLayer(c, mid, side, 1, 1, 1, 8, 8))
            layers.append(ConvLayer(mid, mid, side, 3, stride, mid, 8, 8))
            side //= stride
            layers.append(ConvLayer(mid, width, side, 1, 1, 1, 8, 8))
            c = width
    return [*layers, ConvLayer(320, 1280, 7, 1, 1, 1, 8, 8), ConvLayer(1280, 1000, 1, 1, 1, 1, 8, 8)]


def test_mobilenet_v2_totals():
    layers = mobilenet_v2()
    assert len(layers) == 53
    latency, energy = BitFusion().cost(layers)
    assert [round(float(total), 2) for total in (latency.sum(), energy.sum())] == [9.10, 12.46]
    assert [round(float(total), 2) for total in (latency[:-1].sum(), energy[:-1].sum())] == [8.99, 12.28]


def oracle(chip, layer):
    """(ms, mJ) of a layer by plain loops over all tilings and all 24 loop orders; None if no tiling fits."""
    c_all, d_all, w, a = layer.in_channels, layer.out_channels, layer.w_bits, layer.a_bits
    fusion = (chip.max_bits // max(a, chip.min_bits)) * (chip.max_bits // max(w, chip.min_bits))
    times = 1
    if layer.groups > 1 and layer.groups == c_all == d_all:
        times, c_all, d_all = math.ceil(c_all / (8 * fusion)), 8 * fusion, 8 * fusion
    elif layer.groups > 1:
        times, c_all, d_all = layer.groups, c_all // layer.groups, d_all // layer.groups
    k, t, o_all, im2col = layer.kernel_size, layer.stride, math.ceil(layer.input_size / layer.stride), layer.image_input
    lanes, cols = chip.rows * fusion, chip.columns

    def sizes(first, full):
        return [*itertools.takewhile(lambda size: size < full, (first << i for i in range(30))), full]

    def stored(bits):
        return next(size for size in (2, 4, 8) if size >= bits)

    best = None
    for o, c, d in itertools.product(sizes(1, o_all), sizes(1, c_all), sizes(1 if im2col else cols, d_all)):
        n = {"OW": -(-o_all // o), "OH": -(-o_all // o), "IC": -(-c_all // c), "OC": -(-d_all // d)}
        tiles, c_padded, d_padded = math.prod(n.values()), -(-c // lanes) * lanes, -(-d // cols) * cols
        seen = o * o * k * k if im2col else (k + (o - 1) * t) ** 2
        weights_held = -(-k * k * c // lanes) * lanes * d_padded * stored(w)
        activations_held = seen * c_padded * stored(a)
        outputs, outputs_held = (o * o * channels * chip.accumulator_bits for channels in (d, d_padded))
        operands = [  # moved by, tile traffic, tile footprint, room
            ({"IC", "OC"}, k * k * c * d * w, weights_held, chip.weight_buffer_bytes),
            ({"OW", "OH", "IC"}, seen * c * a, activations_held, chip.activation_buffer_bytes),
            ({"OW", "OH", "OC"}, outputs, outputs_held, chip.output_buffer_bytes),
        ]
        operands.append(operands[-1])  # written into the buffer, and read back out of it
        if any(footprint > room * 8 / 2 for _, _, footprint, room in operands):
            continue
        cycles_a_value = -(-k * k * c // lanes) if im2col else k * k * -(-c // lanes)
        busy = tiles * (d_padded // cols) * o * o * cycles_a_value
        reads = tiles * d * o * o * k * k * c
        for order in itertools.permutations(n):
            moved, kept = [], []
            for movers, traffic, footprint, room in operands:
                resident, on_chip = traffic, True
                for loop in order:
                    if not on_chip:
                        traffic *= n[loop]
                    elif loop in movers:
                        traffic, footprint = traffic * n[loop], footprint * n[loop]
                        on_chip = footprint <= room * 8 / 2
                        resident = traffic if on_chip else resident
                moved.append(traffic)
                kept.append(resident)
            bandwidth = chip.dram_bits_per_cycle
            fill = math.ceil(sum(kept[:3]) / bandwidth) + math.ceil(kept[3] / bandwidth)
            cycles = busy + max(math.ceil(sum(moved) / bandwidth) - busy, fill)
            energy = 0.492 * busy + 0.4229 * cycles + (1.38e-5 * w + 5.7e-6 * a) * reads + 0.01512 * sum(moved)
            best = (cycles, energy) if best is None else min(best, (cycles, energy))
    return best and (times * best[0] / (chip.clock_mhz * 1e3), times * best[1] / 1e6)


@st.composite
def any_layer(draw):
    kind = draw(st.sampled_from(["pointwise", "dense", "depthwise", "grouped", "image", "linear"]))
    c, d = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    side, kernel, stride = draw(st.integers(1, 33)), draw(st.sampled_from([1, 2, 3, 5, 7])), draw(st.integers(1, 3))
    w, a = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    if kind == "pointwise":
        return ConvLayer(c, d, side, 1, 1, 1, w, a)
    if kind == "linear":
        return ConvLayer(10 * c, 10 * d, 1, 1, 1, 1, w, a)
    if kind == "depthwise":
        return ConvLayer(c, c, side, kernel, stride, c, w, a)
    if kind == "grouped":
        groups = draw(st.integers(2, 4))
        return ConvLayer(groups * c, groups * d, side, kernel, stride, groups, w, a)
    return ConvLayer(c % 4 + 1 if kind == "image" else c, d, side, kernel, stride, 1, w, a, image_input=kind == "image")


@pytest.mark.parametrize("chip", [Accelerator(), SMALL_CHIP], ids=["default", "small"])
@settings(max_examples=40)
@given(layers=st.lists(any_layer(), min_size=1, max_size=3))
def test_equals_slow_oracle(chip, layers):
    expected = [oracle(chip, layer) for layer in layers]
    if None in expected:
        with pytest.raises(UserError, match="no tiling"):
            BitFusion(chip).cost(layers)
    else:
        np.testing.assert_allclose(np.transpose(BitFusion(chip).cost(layers)), expected, rtol=1e-12)


def some_layers(n=150):
    layers = [*searchable_layers(APQ_IMAGENET)[::40], *searchable_layers(DIGITS)[::40]]
    return [*first_layers(APQ_IMAGENET, 224), *last_layers(APQ_IMAGENET, 224), *layers][:n]


def test_list_costs_what_its_layers_cost_alone():
    layers = some_layers(40)
    together = BitFusion().cost([*layers, *layers[::-1]])
    alone = [BitFusion().cost([layer]) for layer in layers]
    for i, quantity in enumerate(("latency_ms", "energy_mj")):
        expected = np.concatenate([costs[i] for costs in alone])
        np.testing.assert_array_equal(getattr(together, quantity), np.concatenate([expected, expected[::-1]]))


def test_chunks_do_not_matter(monkeypatch):
    whole = BitFusion().cost(some_layers())
    monkeypatch.setattr("lut.tilings.CHUNK_TILINGS", 100)
    np.testing.assert_array_equal(whole, BitFusion().cost(some_layers()))


def test_no_layers():
    latency, energy = BitFusion().cost([])
    assert latency.shape == energy.shape == (0,)


def test_names_and_norms_do_not_matter():
    layer = ConvLayer(24, 96, 14, 1, 1, 1, 8, 8)
    latency, energy = BitFusion().cost([layer, replace(layer, norm=False, name="other")])
    assert latency[0] == latency[1]
    assert energy[0] == energy[1]


def test_double_clock_halves_latency():
    chip, layers = Accelerator(), some_layers()
    slow, fast = (BitFusion(replace(chip, clock_mhz=f * chip.clock_mhz)).cost(layers) for f in (1, 2))
    np.testing.assert_allclose(fast.latency_ms, slow.latency_ms / 2)
    np.testing.assert_array_equal(fast.energy_mj, slow.energy_mj)


def test_more_bandwidth_is_never_slower():
    layers = some_layers()
    latency = [
        BitFusion(Accelerator(dram_bits_per_cycle=bits)).cost(layers).latency_ms for bits in (64, 192, 200, 1024)
    ]
    assert (np.diff(latency, axis=0) <= 0).all()


@pytest.mark.parametrize("bits", [(8, 7, 6, 5), (4, 3)])
def test_fewer_bits_of_one_storage_width_never_cost_more(bits):
    # Across storage widths they can: more channels side by side leave more of the array and of the buffers empty.
    layers = some_layers()
    for other, operand in itertools.product((8, 4), ("w_bits", "a_bits")):
        changes = [{"w_bits": other, "a_bits": other, operand: b} for b in bits]
        latency = [BitFusion().cost([replace(layer, **c) for layer in layers]).latency_ms for c in changes]
        assert (np.diff(latency, axis=0) <= 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w_bits": 9}, "at most 8 bits"),
        ({"a_bits": 0}, "at least 1"),
        ({"in_channels": -3}, "at least 1"),
        ({"groups": 5}, "groups do not divide"),
        ({"kernel_size": 3.5}, "whole numbers"),
        ({"input_size": 1 << 30}, "at most"),
        ({"kernel_size": 1000}, "no tiling"),
    ],
)
def test_impossible_layers_are_named(changes, message):
    good = ConvLayer(24, 96, 14, 3, 1, 1, 8, 8, name="good")
    with pytest.raises(UserError, match=message) as error:
        BitFusion().cost([good, replace(good, name="blocks.7.expand", **changes)])
    assert "blocks.7.expand" in str(error.value)


def test_prices_of_a_cache_that_another_process_has_changed_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("APQ_CACHE", str(tmp_path))
    layers, model = searchable_layers(DIGITS)[:5], BitFusion()
    first = model.price(layers)
    arrays = {name: array for name, array in read_arrays(model.cache_file).items() if name != CHECKSUM}
    for factor in (2, 3):
        write_cache(model.cache_file, {**arrays, "costs": factor * arrays["costs"]})
        assert (model.price(layers) == factor * first).all()
