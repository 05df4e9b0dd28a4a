"""A cost table of this machine: the layers of a space, timed in a runtime.

Every distinct shape is timed in several passes over all shapes, each in another order, so that a moment of noise does
not meet one shape alone. What was timed is kept in a journal beside the table, from which a killed measurement goes on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from apq.bounds import is_number, is_whole
from apq.errors import UserError, one_line
from apq.files import Record, write_json
from apq.layers import ConvLayer, first_layers, last_layers
from apq.lock import locked
from apq.machine import n_cores, processor
from apq.resume import Journal, difference
from apq.space import SearchSpace
from lut.cost_model import digest_of
from lut.layer_chain import is_quantized
from lut.runtimes import FLOATS, Run, runtime_named
from lut.table import MEASURED, PublishedTable, layer_key, layers_of_table

CALL = "call"  # in the place of a shape: a network without layers
DIGITS = 6  # of milliseconds: clocks count nanoseconds
MOST_PASSES = 10**6
REMEDY = "give --overwrite to start anew"

Visit = tuple[int, str]  # pass, and name of a shape or CALL


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long a shape is timed in each pass: a run after the other, for `seconds`, but `fewest` to `most` of them."""

    passes: int = 5
    warm_up: int = 3  # runs before, not timed
    fewest: int = 5
    most: int = 500
    seconds: float = 0.02


@dataclass(frozen=True, kw_only=True)
class Device:
    """What layers are timed in: one of `RUNTIMES`, bits of weights and activations, threads."""

    runtime: str
    bits: tuple[int, int]
    threads: int = 1

    def as_run(self, layer: ConvLayer) -> ConvLayer:
        """The layer at the bits of the device. Layers in full precision stay so."""
        bits = self.bits if is_quantized(layer) else FLOATS
        return replace(layer, w_bits=bits[0], a_bits=bits[1])

    def facts(self) -> Record:
        """Plain data that names the device in a table."""
        library = {"runtime": self.runtime, "version": runtime_named(self.runtime).version}
        bits = f"{self.bits[0]}x{self.bits[1]}"
        return {**library, "bits": bits, "threads": self.threads, "machine": processor(), "cores": n_cores()}


def device_named(runtime: str, bits: tuple[int, int] | None = None, threads: int = 1) -> Device:
    """A device that can run a layer. UserError for an unknown runtime, a missing library, and bits that it lacks."""
    device = Device(runtime=runtime, bits=runtime_named(runtime).bits_for(bits), threads=threads)
    runtime_named(runtime).prepare([], threads)()
    return device


def priced_layers(space: SearchSpace) -> dict[str, ConvLayer]:
    """By key: all layers of all networks of a space, in scope `full`, at all their bits."""
    ends = [
        layer
        for resolution in space.resolutions
        for layer in (*first_layers(space, resolution), *last_layers(space, resolution))
    ]
    return layers_of_table(space) | {layer_key(layer): layer for layer in ends}


def measure(
    space: SearchSpace, device: Device, out: Path, *, overwrite: bool = False, effort: Effort | None = None
) -> Record:
    """Time the layers of a space, write the table to `out`, and return its facts.

    Rows have no energy. A row is the median of the passes' medians, without the time of a call, which a network takes
    once: "call_ms". A killed measurement continues. UserError where an unfinished one of something else is there,
    unless `overwrite` is set.
    """
    effort = effort or Effort()
    shapes = {key: device.as_run(replace(layer, name="")) for key, layer in priced_layers(space).items()}
    distinct = {layer_key(shape): shape for shape in shapes.values()}
    visits = _visits(distinct, effort)
    journal = Journal(out.with_name(f"{out.name}.part.json"), f"{out.name}.part", "measurement", REMEDY)
    asked = {"space": space.name, "layers": digest_of(list(shapes)), **device.facts(), "effort": asdict(effort)}
    with locked(out):
        try:
            done = _done(journal, {*visits}) if journal.holds(asked) else None
        except UserError:
            if not overwrite:
                raise
            done = None
        if done is None:
            journal.start(asked)
        done = _with_missing(visits, done or {}, distinct, device, effort, journal)
        times = {name: [done[number, name] for number in range(effort.passes)] for name in (CALL, *distinct)}
        costs, call = _costs(times)
        facts = {**device.facts(), "batch": 1, "shapes": len(distinct), "call_ms": call}
        facts["spread"] = round(statistics.median(map(_spread, times.values())), 3)
        rows = {key: {"latency": costs[layer_key(shape)]} for key, shape in shapes.items()}
        write_json(out, {MEASURED: facts, **rows})
        for file in (*journal.files(), journal.asked_file):
            file.unlink()
    return facts


def device_of(table: PublishedTable) -> Device:
    """The device that a table was measured on. UserError where it is not this one as it is now."""
    facts = table.measured
    try:
        w, a = map(int, str(facts["bits"]).split("x"))
        device = device_named(facts["runtime"], (w, a), facts["threads"])
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{table.path} was not measured by python -m lut --measure: {one_line(error)}") from error
    if differs := difference(dict(facts), {**facts, **device.facts()}):
        raise UserError(f"{table.path} was measured on another device: {differs}; measure it here with python -m lut")
    return device


def median_ms(run: Run, effort: Effort) -> float:
    """The median time of a run, in milliseconds."""
    for _ in range(effort.warm_up):
        run()
    times: list[int] = []
    until = time.perf_counter_ns() + round(effort.seconds * 1e9)
    while len(times) < effort.fewest or (len(times) < effort.most and time.perf_counter_ns() < until):
        started = time.perf_counter_ns()
        run()
        times.append(time.perf_counter_ns() - started)
    return statistics.median(times) / 1e6


def _visits(shapes: Mapping[str, ConvLayer], effort: Effort) -> list[tuple[int, str]]:
    """(pass, name) of all timings, in their order."""
    names, rng = [CALL, *shapes], np.random.default_rng(0)
    return [(number, names[i]) for number in range(effort.passes) for i in rng.permutation(len(names))]


def _done(journal: Journal, visits: Set[Visit]) -> dict[Visit, float]:
    """By pass and name: the milliseconds in a journal. UserError for what no measurement writes."""
    done = {}
    for where, _, record in journal.records():
        number, name, ms = (record.get(key) if isinstance(record, dict) else None for key in ("pass", "shape", "ms"))
        whole = is_whole(number, 0, MOST_PASSES) and isinstance(name, str)
        if not whole or (number, name) not in visits or not is_number(ms, 0):
            raise UserError(f"{where} is damaged: it is no time of a layer; {REMEDY}")
        done[number, name] = ms
    return done


def _with_missing(
    visits: Sequence[Visit],
    done: Mapping[Visit, float],
    shapes: Mapping[str, ConvLayer],
    device: Device,
    effort: Effort,
    journal: Journal,
) -> dict[Visit, float]:
    """`done` and what it lacks, which is timed now and appended to the journal."""
    prepare, times = runtime_named(device.runtime).prepare, dict(done)
    missing = [visit for visit in visits if visit not in done]
    bar = {"total": len(visits), "initial": len(done), "desc": device.runtime, "unit": "layer", "disable": None}
    for number, name in tqdm(missing, **bar):
        run = prepare([] if name == CALL else [shapes[name]], device.threads)
        times[number, name] = ms = median_ms(run, effort)
        journal.append({"pass": number, "shape": name, "ms": ms})
    return times


def _costs(times: Mapping[str, Sequence[float]]) -> tuple[dict[str, float], float]:
    """Milliseconds of each shape without a call, and of a call: medians over the passes.

    A call takes no longer than the fastest shape, which contains one: where noise met it, not all layers become free.
    """
    ms = {name: statistics.median(of) for name, of in times.items()}
    call = min(ms.values())
    return {name: round(of - call, DIGITS) for name, of in ms.items() if name != CALL}, round(call, DIGITS)


def _spread(times: Sequence[float]) -> float:
    """How much the passes differ: the distance of the quartiles, as a fraction of the median."""
    low, middle, high = np.percentile(times, [25, 50, 75])
    return float((high - low) / max(middle, 10.0**-DIGITS))
