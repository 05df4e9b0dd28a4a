"""Accelerator descriptions, cost tables, their cache and their command line."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from apq.errors import UserError
from apq.layers import ConvLayer, first_layers, last_layers, searchable_layers
from apq.presets import APQ_IMAGENET, DIGITS
from apq.space import FULL_PRECISION
from lut import bitfusion, table
from lut.__main__ import main
from lut.accelerator import Accelerator
from lut.bit_serial import BitSerial
from lut.bitfusion import BitFusion
from lut.cost_model import cost_model_from_flags
from lut.layer_rows import values_of

LAYERS = [
    ConvLayer(24, 96, 14, 1, 1, 1, 8, 8),
    ConvLayer(96, 96, 14, 3, 2, 96, 4, 6),
    ConvLayer(96, 24, 7, 1, 1, 1, 6, 4),
]


def stacked(costs):
    return np.stack(costs, axis=1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("APQ_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def no_model(monkeypatch):
    """Make every computation of a cost an error, so that costs can only come from the cache."""

    def fail(self, layers):
        raise AssertionError(f"{len(layers)} layers were computed")

    return lambda: monkeypatch.setattr(BitFusion, "cost", fail)


# Accelerator


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "rows must be a positive number, not 0"),
        ({"columns": 16.5}, "columns must be a whole number, not 16.5"),
        ({"columns": 16.0}, "columns must be a whole number"),
        ({"clock_mhz": float("nan")}, "clock_mhz"),
        ({"clock_mhz": "fast"}, "clock_mhz must be a positive number, not 'fast'"),
        ({"dram_bits_per_cycle": 0}, "dram_bits_per_cycle"),
        ({"dram_nj_per_bit": -1}, "dram_nj_per_bit"),
        ({"weight_buffer_bytes": True}, "weight_buffer_bytes"),
        ({"min_bits": 16}, "max_bits 8"),
    ],
)
def test_accelerator_checks_itself(changes, message):
    with pytest.raises(UserError, match=message):
        Accelerator(**changes)


def test_accelerator_file(tmp_path):
    path = tmp_path / "chip.json"
    path.write_text('{"rows": 32, "clock_mhz": 250.5}')
    assert cost_model_from_flags(path, None) == BitFusion(Accelerator(rows=32, clock_mhz=250.5))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ("{", "cannot read"),
        ("[16, 32]", "JSON object"),
        ('{"rowz": 16}', "unknown fields rowz; known: rows"),
        ('{"rows": "many"}', "chip.json: accelerator: rows .* 'many'"),
    ],
)
def test_accelerator_file_errors(tmp_path, text, message):
    path = tmp_path / "chip.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        cost_model_from_flags(path, None)


# Cache


def test_price_equals_the_model_cold_and_cached(no_model):
    expected = stacked(BitFusion().cost(LAYERS))
    np.testing.assert_array_equal(BitFusion().price(LAYERS), expected)
    no_model()
    np.testing.assert_array_equal(BitFusion().price(LAYERS), expected)
    np.testing.assert_array_equal(BitFusion().price([LAYERS[2]] * 2), expected[[2, 2]])


@pytest.mark.parametrize("model", [BitFusion(), BitSerial()], ids=["bitfusion", "bit-serial"])
def test_rows_cost_what_their_layers_cost(model):
    rows = np.array([values_of(layer) for layer in [*LAYERS, LAYERS[0]]])
    expected = model.price([*LAYERS, LAYERS[0]])
    np.testing.assert_array_equal(model.price_rows(rows), expected)
    full = [replace(layer, w_bits=FULL_PRECISION) for layer in LAYERS]  # counts as the most bits
    np.testing.assert_array_equal(model.price_rows(np.array([values_of(layer) for layer in full])), model.price(full))
    rows[1, 6] = 9  # more than the accelerator has
    found = model.price_rows(rows)
    assert np.isinf(found[1, 0])
    np.testing.assert_array_equal(np.delete(found, 1, axis=0), np.delete(expected, 1, axis=0))


def test_rows_are_cached_with_the_layers(monkeypatch):
    rows = np.array([values_of(layer) for layer in LAYERS])
    expected = BitFusion().price_rows(rows)
    monkeypatch.setattr(bitfusion, "solve", None)  # whatever is computed now is an error
    np.testing.assert_array_equal(BitFusion().price_rows(rows[::-1]), expected[::-1])
    np.testing.assert_array_equal(BitFusion().price(LAYERS), expected)


def test_price_of_no_layers():
    assert BitFusion().price([]).shape == (0, 2)


def test_cache_grows_by_what_is_missing(monkeypatch):
    computed, cost = [], BitFusion.cost
    monkeypatch.setattr(BitFusion, "cost", lambda self, layers: computed.append(list(layers)) or cost(self, layers))
    BitFusion().price(LAYERS[:2])
    BitFusion().price([*LAYERS, *LAYERS])
    assert computed == [LAYERS[:2], LAYERS[2:]]


def test_each_configuration_and_model_version_has_its_own_cache(monkeypatch):
    slow = Accelerator(clock_mhz=250)
    BitFusion().price(LAYERS)
    np.testing.assert_array_equal(BitFusion(slow).price(LAYERS), stacked(BitFusion(slow).cost(LAYERS)))
    files = {BitFusion().cache_file, BitFusion(slow).cache_file}
    monkeypatch.setattr(bitfusion, "MODEL_VERSION", bitfusion.MODEL_VERSION + 1)
    assert len(files | {BitFusion().cache_file}) == 3


def test_image_input_has_its_own_price():
    layer = ConvLayer(3, 32, 32, 3, 2, 1, 8, 8)
    pair = [layer, replace(layer, image_input=True)]
    for _ in range(2):
        np.testing.assert_array_equal(BitFusion().price(pair), stacked(BitFusion().cost(pair)))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign", "other_array", "folder"])
def test_damaged_cache_is_rebuilt(damage, no_model):
    expected, file = BitFusion().price(LAYERS), BitFusion().cache_file
    good = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage == "other_array":
        with file.open("wb") as out:
            np.savez(out, layers=np.zeros((3, 9)), costs=np.full((3, 2), np.nan))
    else:
        flipped = bytes(255 - byte if i % 100 == 99 else byte for i, byte in enumerate(good))
        file.write_bytes({"truncated": good[:-40], "flipped": flipped, "empty": b"", "foreign": b"hello"}[damage])
    np.testing.assert_array_equal(BitFusion().price(LAYERS), expected)
    if damage != "folder":
        no_model()
        np.testing.assert_array_equal(BitFusion().price(LAYERS), expected)


def test_cache_that_cannot_be_written_is_no_loss(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("APQ_CACHE", str(tmp_path / "file"))
    np.testing.assert_array_equal(BitFusion().price(LAYERS), stacked(BitFusion().cost(LAYERS)))


# Tables


@pytest.fixture
def digits_table(tmp_path):
    """Path and data of the table of the digits space."""
    path, data = tmp_path / "digits.json", table.build(DIGITS, BitFusion())
    path.write_text(json.dumps(data))
    return path, data


def test_published_keys_and_values(golden):
    built = table.build(APQ_IMAGENET, BitFusion())
    assert len(built) == 6567 + 2
    with golden("apq_lut.csv").open() as file:
        for row in csv.DictReader(file):
            shape = [int(value) for value in list(row.values())[:7]]
            entry = built[f"({', '.join(map(str, shape))})-W{row['w_bits']}A{row['a_bits']}"]
            assert entry["latency"] == pytest.approx(float(row["latency_ms"]), rel=1e-3)
            assert entry["energy"] == pytest.approx(float(row["energy_mJ"]), rel=1e-2)
    for name, entry in golden("apq_lut_head_tail.json")["entries"].items():
        assert built[name]["latency"] == pytest.approx(entry["latency_ms"], rel=1e-3)


def test_lookup_returns_what_was_built(digits_table):
    path, _ = digits_table
    layers = [*first_layers(DIGITS, 32, "published"), *searchable_layers(DIGITS), *last_layers(DIGITS, 32, "published")]
    np.testing.assert_array_equal(table.load(path).price(layers), BitFusion().price(layers))


def test_lookup_of_a_measured_row(tmp_path):
    path = tmp_path / "phone.json"
    path.write_text('{"(24, 96, 14, 1, 1, 0, 1)-W8A8": {"latency": 2, "energy": 0.5}}')
    phone = table.load(path)
    assert phone.price([LAYERS[0]] * 2).tolist() == [[2, 0.5], [2, 0.5]]
    assert phone.covers([*LAYERS, replace(LAYERS[1], name="first_conv")]).tolist() == [True, False, False, False]


def test_missing_row_is_named(digits_table):
    layer = replace(LAYERS[1], name="blocks.3.depthwise")
    with pytest.raises(UserError, match=r"no row \(96, 96, 14, 3, 2, 1, 96\)-W4A6 for layer blocks.3.depthwise"):
        table.load(digits_table[0]).price([layer])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ('{"head": ', "cannot read"),
        ("[]", "holds a list"),
        ('{"(24, 96, 14)-W8A8": {"latency": 1, "energy": 1}}', "key .* is not head, tail or like"),
        ('{"head": 3}', "row head must hold latency in ms and energy in mJ"),
        ('{"head": {"energy": 1}}', "row head must hold"),
        ('{"head": {"latency": 1, "energy": null}}', "row head must hold"),
        ('{"head": {"latency": NaN, "energy": 1}}', "row head must hold"),
        ('{"head": {"latency": "1", "energy": 1}}', "row head must hold"),
        ('{"head": {"latency": -1, "energy": 1}}', "row head must hold"),
        ('{"measured": 3}', '"measured" must be an object of short texts and numbers'),
        ('{"measured": {"runtime": ["a"]}}', '"measured" must be'),
        ('{"measured": {"runtime": "a\\nb"}}', '"measured" must be'),
        ('{"measured": {"threads": NaN}}', '"measured" must be'),
    ],
)
def test_broken_tables(tmp_path, text, message):
    path = tmp_path / "table.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        table.load(path)


# Command line


def test_command_writes_the_imagenet_table(tmp_path, capsys):
    out = tmp_path / "deep" / "table.json"
    main(["--space", "apq-imagenet", "--out", str(out)])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "6567 layers" in printed
    assert str(out) in printed
    loaded = table.load(out)
    assert len(loaded.rows) == 6567 + 2
    assert {"head", "tail"} < set(loaded.rows)


def test_command_prints_json_and_takes_a_config(tmp_path, capsys):
    config, out = tmp_path / "chip.json", tmp_path / "table.json"
    config.write_text('{"clock_mhz": 250}')
    main(["--space", "digits", "--out", str(out), "--config", str(config), "--json"])
    result = json.loads(capsys.readouterr().out)
    # the fixed first block's depthwise and the classifier come on top; its project is some slot's layer too
    assert result["layers"] == len(searchable_layers(DIGITS)) + 2
    assert json.loads(out.read_text()) == table.build(DIGITS, BitFusion(Accelerator(clock_mhz=250)))


def test_command_ends_a_mistake_in_one_line(tmp_path):
    command = [sys.executable, "-m", "lut", "--space", "mars", "--out", str(tmp_path / "table.json")]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "unknown space 'mars'" in done.stderr
    assert not (tmp_path / "table.json").exists()


def test_help_says_units(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "latency in ms and energy in mJ" in " ".join(capsys.readouterr().out.split())


def test_benchmark_prints_json():
    command = [sys.executable, "benchmarks/lut.py", "--json", "--repeats", "1"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["layers"] == 6567
    assert result["table_seconds"] > 0
