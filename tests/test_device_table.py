"""Layers timed on this machine: every network has a price, a killed measurement continues."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, script
from example_spaces import ALL

import lut.device_table as device_table
import methods.evolution.task as evolution
import methods.nsga2.front_search as nsga2
from apq.errors import UserError
from apq.files import append_jsonl, read_json, write_json
from apq.genes import largest_subnet, sample, subnets_of
from apq.layers import layers_of
from apq.presets import DIGITS, QFA_MBV3_GLYPHS
from benchmarks import device as benchmark
from lut import table
from lut.__main__ import main
from lut.costs import cost_of
from lut.device_table import Device, Effort, device_named, device_of, measure, median_ms, priced_layers
from lut.population import PopulationCost
from lut.runtimes import FLOATS, INTEGERS, RUNTIMES, Runtime

search, report = script("search"), script("test")
TINY = Effort(passes=1, warm_up=0, fewest=1, most=1)


pytestmark = pytest.mark.usefixtures("torch_threads")


def test_the_time_of_a_run_is_the_median_of_those_after_the_warm_up():
    calls = []
    assert median_ms(lambda: calls.append(1), Effort(warm_up=2, fewest=3, most=9, seconds=0)) >= 0
    assert len(calls) == 2 + 3
    median_ms(lambda: calls.append(1), Effort(warm_up=0, fewest=1, most=4, seconds=1e3))
    assert len(calls) == 2 + 3 + 4


# Tables. A clock stands for times: a layer takes its MACs in ns, after a call of 5 us. Noise comes in one pass.


@pytest.fixture
def clock(monkeypatch):
    """The layers that the runtime "clock" has prepared. Its times are known."""
    prepared = []

    def prepare(layers, threads):
        prepared.append(list(layers))
        return lambda: len(prepared)

    def known_ms(run, effort):
        noise = 100.0 if 120 < len(prepared) < 200 else 0.0  # in the second pass of digits
        return 0.005 + sum(layer.macs for layer in prepared[-1]) * 1e-6 + noise

    monkeypatch.setitem(RUNTIMES, "clock", Runtime(library="numpy", bits=(INTEGERS, FLOATS), prepare=prepare))
    monkeypatch.setattr(device_table, "median_ms", known_ms)
    return prepared


CLOCK = Device(runtime="clock", bits=INTEGERS)


@pytest.mark.parametrize("space", ALL.values(), ids=ALL)
def test_every_network_of_a_space_has_a_price(space):
    priced = table.PublishedTable(Path("t.json"), dict.fromkeys(priced_layers(space), (1.0, np.nan)))
    for subnet in subnets_of(space, sample(space, 20, np.random.default_rng(0))):
        for scope in ("full", "published"):
            assert priced.covers(layers_of(space, subnet, scope)).all()
    PopulationCost(space, "latency", priced)


def test_a_shape_is_timed_once_a_pass(clock, tmp_path):
    facts = measure(DIGITS, CLOCK, tmp_path / "table.json", effort=Effort(passes=2))
    passes = clock[: len(clock) // 2], clock[len(clock) // 2 :]
    assert passes[0] != passes[1]  # another order
    for timed in passes:
        shapes = {tuple(layers) for layers in timed}
        assert len(timed) == len(shapes) == facts["shapes"] + 1


def test_rows_are_medians_without_the_time_of_a_call(clock, tmp_path):
    facts = measure(DIGITS, CLOCK, tmp_path / "table.json", effort=Effort(passes=3))
    assert facts["call_ms"] == pytest.approx(0.005)
    priced = table.load(tmp_path / "table.json")
    layers = layers_of(DIGITS, largest_subnet(DIGITS))
    assert priced.price(layers)[:, 0] == pytest.approx([layer.macs * 1e-6 for layer in layers], abs=1e-6)
    assert np.isnan(priced.price(layers)[:, 1]).all()
    few = [replace(layer, w_bits=4, a_bits=6) for layer in layers if layer.name.startswith("blocks.2")]
    assert priced.price(few)[:, 0] == pytest.approx([layer.macs * 1e-6 for layer in few], abs=1e-6)  # W4 = W8
    assert str(priced).endswith(f"table.json (clock {np.__version__} at 8x8 bits with 1 thread(s))")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.json"]


def test_a_call_that_noise_met_takes_no_longer_than_the_fastest_layer(clock, tmp_path, monkeypatch):
    known_ms = device_table.median_ms
    monkeypatch.setattr(device_table, "median_ms", lambda *run: 50.0 if not clock[-1] else known_ms(*run))
    facts = measure(DIGITS, CLOCK, tmp_path / "table.json", effort=TINY)
    priced = layers_of(DIGITS, largest_subnet(DIGITS))
    macs = [layer.macs for layer in priced]
    fewest = min(layer.macs for layer in priced_layers(DIGITS).values())
    assert facts["call_ms"] == pytest.approx(0.005 + fewest * 1e-6)
    of_table = table.load(tmp_path / "table.json").price(priced)[:, 0]
    assert of_table == pytest.approx([(of - fewest) * 1e-6 for of in macs], abs=1e-6)


def test_full_precision_is_timed_in_floating_point(clock, tmp_path):
    def timed(device):
        clock.clear()
        measure(QFA_MBV3_GLYPHS, device, tmp_path / f"{device.bits}.json", effort=TINY)
        return {(layers[0].w_bits, layers[0].a_bits) for layers in clock if layers}

    assert timed(CLOCK) == {(8, 8), (32, 32)}  # first convolution and squeeze-and-excitation
    assert timed(replace(CLOCK, bits=FLOATS)) == {(32, 32)}


def kill_after(n, clock, monkeypatch):
    prepare = RUNTIMES["clock"].prepare

    def killed(layers, threads):
        if len(clock) == n:
            raise KeyboardInterrupt
        return prepare(layers, threads)

    monkeypatch.setitem(RUNTIMES, "clock", replace(RUNTIMES["clock"], prepare=killed))
    return prepare


def test_a_killed_measurement_times_only_the_rest(clock, tmp_path, monkeypatch):
    out, effort = tmp_path / "table.json", Effort(passes=2)
    measure(DIGITS, CLOCK, tmp_path / "whole.json", effort=effort)
    whole = [*clock]
    clock.clear()
    prepare = kill_after(150, clock, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        measure(DIGITS, CLOCK, out, effort=effort)
    assert not out.exists()
    with (tmp_path / "table.json.part.jsonl").open("a") as file:
        file.write('{"pass": 1, "sh')  # a torn line
    monkeypatch.setitem(RUNTIMES, "clock", replace(RUNTIMES["clock"], prepare=prepare))
    measure(DIGITS, CLOCK, out, effort=effort)
    assert clock == whole
    assert read_json(out) == read_json(tmp_path / "whole.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.json", "whole.json"]


def test_unfinished_work_of_another_measurement_is_refused_or_replaced(clock, tmp_path, monkeypatch):
    out = tmp_path / "table.json"
    prepare = kill_after(30, clock, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        measure(DIGITS, CLOCK, out, effort=TINY)
    monkeypatch.setitem(RUNTIMES, "clock", replace(RUNTIMES["clock"], prepare=prepare))
    with pytest.raises(UserError, match="belongs to another measurement: threads was 1, is 2; give --overwrite"):
        measure(DIGITS, replace(CLOCK, threads=2), out, effort=TINY)
    for wrong in ({"pass": [], "shape": "call", "ms": 1}, {"pass": 0, "shape": "call", "ms": -1}, {"pass": 0}, 3):
        append_jsonl(tmp_path / "table.json.part.jsonl", wrong)
        with pytest.raises(UserError, match=r"line \d+ is damaged: it is no time of a layer; give --overwrite"):
            measure(DIGITS, CLOCK, out, effort=TINY)
    clock.clear()
    facts = measure(DIGITS, replace(CLOCK, threads=2), out, overwrite=True, effort=TINY)
    assert len(clock) == facts["shapes"] + 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.json"]


# The command, and searches by its tables


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A table of the digits space, really measured, by the command, with as few runs as there can be."""
    out = tmp_path_factory.mktemp("measured") / "cpu.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_table, "Effort", lambda: TINY)
        main(["--measure", "onnxruntime", "--space", "digits", "--out", str(out), "--json"])
    return out


def test_the_command_measures_a_table(measured):
    facts, priced = read_json(measured)["measured"], table.load(measured)
    version = importlib.metadata.version("onnxruntime")
    assert {key: facts[key] for key in ("runtime", "version", "bits", "threads", "batch")} == {
        "runtime": "onnxruntime",
        "version": version,
        "bits": "8x8",
        "threads": 1,
        "batch": 1,
    }
    assert facts["call_ms"] > 0
    for subnet in subnets_of(DIGITS, sample(DIGITS, 10, np.random.default_rng(1))):
        cost = cost_of(layers_of(DIGITS, subnet), priced)
        assert cost.latency_ms > 0
        assert cost.energy_mj is None
    assert device_of(priced) == device_named("onnxruntime")


def test_a_search_by_measured_latency_is_priced_by_it_to_the_end(measured, tmp_path, monkeypatch, capsys):
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    limit = cost_of(layers_of(DIGITS, largest_subnet(DIGITS)), table.load(measured)).latency_ms * 0.9
    flags = ["--table", str(measured), "--constraint", str(limit), "--generations", "5", "--population", "20"]
    search([*flags, "--exp_name", "own", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["cost"] <= limit
    assert "onnxruntime" in found["priced_by"]
    main(["--model", "exps/own"])
    shown = capsys.readouterr().out
    assert "energy, mJ" in shown
    assert shown.count("not known") == 2  # in both scopes


@pytest.mark.parametrize(
    "flags",
    [
        ["--constraint", "1", "--type", "energy"],
        ["--mode", "nsga2", "--objectives", "accuracy,latency,energy"],
        ["--mode", "ddpg", "--model", "mobilenet_v2_small", "--type", "energy"],
    ],
)
def test_energies_that_a_table_lacks_are_refused_before_any_work(flags, measured, tmp_path, monkeypatch):
    def work(*args, **options):
        raise AssertionError("work began")

    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evolution.EvolutionFinder, "run", work)
    monkeypatch.setattr(nsga2, "find_front", work)
    with pytest.raises(UserError, match=r"cpu\.json \(onnxruntime .*\) has no energy of .*layer") as error:
        search([*flags, "--table", str(measured), "--exp_name", "own"])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("exps/own/*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--measure", "abacus", "--out", "t.json"], "argument --measure: invalid choice: 'abacus'"),
        (["--measure", "onnxruntime", "--bits", "2x2", "--out", "t.json"], "32x32 or 4x4 bits, not 2x2; on a CPU"),
        (["--measure", "torch", "--bits", "8", "--out", "t.json"], "torch is timed at 32x32 bits, not 8x8"),
        (["--measure", "torch", "--threads", "0", "--out", "t.json"], "at least 1"),
        (["--measure", "torch"], "--space SPACE --out FILE"),
        (["--measure", "torch", "--out", "t.json", "--config", "bit-serial-edge"], "--config belongs to --model and"),
        (["--measure", "torch", "--out", "t.json", "--model", "resnet18"], "not allowed with"),
        (["--model", "resnet18", "--threads", "2"], "--threads belongs to --measure, not to --model"),
        (["--out", "t.json", "--threads", "2"], "--threads belongs to --measure, not to writing the table"),
    ],
)
def test_mistakes_are_one_line(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        main(flags)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("library", "group"), [("onnx", "export"), ("onnxruntime", "export"), ("openvino", "export-check")]
)
def test_a_missing_library_is_one_line(library, group, tmp_path):
    """In another process, because libraries stay imported."""
    runtime = "openvino" if library == "openvino" else "onnxruntime"
    code = (
        f"import sys; sys.modules[{library!r}] = None; import runpy; "
        f"sys.argv = ['lut', '--measure', {runtime!r}, '--out', {str(tmp_path / 't.json')!r}]; "
        "runpy.run_module('lut', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert f"this needs {library}: pip install -e '.[{group}]'" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_runtime_is_known_by_its_name():
    with pytest.raises(UserError, match="unknown runtime 'abacus'; known: onnxruntime, openvino, torch"):
        device_named("abacus")


# The benchmark


def test_the_benchmark_compares_sums_with_whole_networks(measured, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "Effort", lambda passes: replace(TINY, passes=passes))
    benchmark.main(["--tables", str(measured), "--n_subnets", "4", "--passes", "2", "--json"])
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert len(result["ms"]) == 4
    assert min(result["ms"]) > 0
    networks = [layers_of(DIGITS, net) for net in subnets_of(DIGITS, sample(DIGITS, 4, np.random.default_rng(0)))]
    priced, call = table.load(measured), read_json(measured)["measured"]["call_ms"]
    sums = [priced.price(layers)[:, 0].sum() + call for layers in networks]
    assert result["predicted"]["sum of layers"] == pytest.approx(sums)
    assert {*result["kendall"]} == {"sum of layers", "BitFusion", "MACs"}
    benchmark.main(["--tables", str(measured), "--n_subnets", "2", "--passes", "1"])
    assert "| tau, sum of layers |" in capsys.readouterr().out


def test_a_table_of_another_device_is_not_compared(measured, tmp_path):
    data = read_json(measured)
    for changed, message in (
        ({"machine": "abacus"}, "was measured on another device: machine was"),
        ({"bits": "8"}, "was not measured by python -m lut --measure"),
    ):
        write_json(tmp_path / "t.json", {**data, "measured": {**data["measured"], **changed}})
        with pytest.raises(UserError, match=message):
            device_of(table.load(tmp_path / "t.json"))
    del data["measured"]
    write_json(tmp_path / "t.json", data)
    with pytest.raises(UserError, match="was not measured by"):
        device_of(table.load(tmp_path / "t.json"))
