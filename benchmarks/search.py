"""Time the search on apq-imagenet with a predictor of random weights: scoring alone, and whole searches by population.

Each search runs in a process of its own. Peak memory is that of the whole process; "searching" is what came on top of
imports, predictor and cost tables. Peaks of `search.py` itself stand beside those of imports alone: the published
search imports torch and torchvision.

Other programs on the same cores distort the times, because threads wait for each other, so each figure is the best of
several repeats. Seconds of different machines do not compare: compare ratios of runs on one machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from apq.cli import table
from apq.genes import sample
from apq.presets import APQ_IMAGENET
from benchmarks.machine import describe
from benchmarks.markdown import markdown
from lut.bitfusion import BitFusion
from lut.population import PopulationCost
from methods.evolution.evolution_finder import EvolutionConfig, EvolutionFinder
from utils.accuracy_predictor import AccuracyPredictor
from utils.fast_predictor import FastPredictor
from utils.predictor_training import member_width

ROOT = Path(__file__).resolve().parent.parent
N_CANDIDATES, HIDDEN = 16_384, 400
POPULATIONS = (100, 500, 1_000, 10_000, 100_000)
MEMORY = {
    "import torch": ["torch"],
    "import torch, torchvision": ["torch", "torchvision"],
    "search.py": ["search.py", "--constraint", "0.05", "--exp_name", "search"],
}

# Runs a script with its arguments, or imports modules, and then says the peak memory of the process.
PROBE = """
import importlib, runpy, sys
sys.argv = sys.argv[1:]
try:
    if sys.argv[0].endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        [importlib.import_module(name) for name in sys.argv]
finally:
    (peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(int(peak) / 1024, file=sys.stderr)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--constraint", type=float, default=12.8, help="latency budget in ms, published scope")
    parser.add_argument("--populations", type=int, nargs="+", default=POPULATIONS, help="candidates a generation")
    parser.add_argument("--candidates", type=int, default=50_000, help="of a search, but at least three generations")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each part; the fastest counts")
    parser.add_argument("--members", type=int, default=4, help="MLPs of the ensemble whose mean and spread are timed")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()

    cache = tempfile.TemporaryDirectory()  # a large cache of other spaces would add to the peaks
    os.environ["APQ_CACHE"] = cache.name
    with cache, ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as processes:
        searches = [
            processes.submit(
                search, population, max(3, args.candidates // population), args.constraint, args.repeats
            ).result()
            for population in args.populations
        ]
        scored = scoring(args.repeats, args.members)
    result = {
        **scored,
        "constraint_ms": args.constraint,
        "searches": searches,
        "peak_mib": {name: peak_mib(words) for name, words in MEMORY.items()},
        "threads": torch.get_num_threads(),
        "machine": describe(),
    }
    if args.json:
        print(json.dumps(result))
        return
    rows = {**result.pop("machine"), **result.pop("peak_mib"), **result}
    del rows["searches"]
    print(table((key, f"{value:,.3f}" if isinstance(value, float) else str(value)) for key, value in rows.items()))
    titles = ("population", "candidates", "candidates/s", "best top-1", "peak MiB", "searching, MiB")
    print(markdown(titles, [row_of(found) for found in searches]))


def parts(members: int = 1) -> tuple[FastPredictor, PopulationCost]:
    """The predictor of random weights, and the costs."""
    torch.manual_seed(0)
    predictor = AccuracyPredictor(APQ_IMAGENET, member_width(HIDDEN, members), members=members)
    return predictor.fast(), PopulationCost(APQ_IMAGENET, "latency", BitFusion(), "published")


def scoring(repeats: int, members: int) -> dict[str, float]:
    """Microseconds a candidate of costs and of predictions, and candidates a second of both."""
    (predictor, cost), several = parts(), parts(members)[0].mean_and_spread
    genes = sample(APQ_IMAGENET, N_CANDIDATES, np.random.default_rng(0))
    calls = (cost.predict, predictor, lambda rows: (cost.predict(rows), predictor(rows)), several)
    cost_us, predictor_us, both_us, several_us = (1e6 * fastest(repeats, call, genes) / len(genes) for call in calls)
    return {
        "scored_per_second": 1e6 / both_us,
        "cost_us_per_candidate": cost_us,
        "encoding_and_predictor_us_per_candidate": predictor_us,
        f"mean_and_spread_of_{members}_us_per_candidate": several_us,
        f"mean_and_spread_of_{members}_to_one": several_us / predictor_us,
    }


def search(population: int, generations: int, constraint: float, repeats: int) -> dict[str, float]:
    """Figures of whole searches with this population."""
    (predictor, cost), config = parts(), EvolutionConfig(population=population, generations=generations)
    args = (predictor, cost.predict, constraint, config, cost.cheapest_genes(), cost.unit)
    finder, before = EvolutionFinder(APQ_IMAGENET, *args), own_peak_mib()
    seconds, found = fastest(repeats, finder.run), finder.run()
    return {
        "population": population,
        "candidates": found.history[-1]["evaluated"],
        "seconds": seconds,
        "best_top1": found.accuracy,
        "peak_mib": own_peak_mib(),
        "searching_mib": own_peak_mib() - before,
    }


def row_of(found: dict[str, float]) -> Sequence[str]:
    """A row of the printed table."""
    rate = found["candidates"] / found["seconds"]
    counts = (f"{number:,.0f}" for number in (found["population"], found["candidates"], rate))
    return *counts, f"{found['best_top1']:.4f}", f"{found['peak_mib']:.0f}", f"{found['searching_mib']:.0f}"


def peak_mib(words: Sequence[str]) -> float:
    """Peak memory of Python with these arguments, in a new folder beside the models. Costs are not cached before."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "models").symlink_to(ROOT / "models")
        words = [str(ROOT / word) if (ROOT / word).is_file() else word for word in words]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "APQ_CACHE": folder}
        run = [sys.executable, "-c", PROBE, *words]
        return float(subprocess.run(run, cwd=folder, env=env, capture_output=True, check=True).stderr.split()[-1])


def own_peak_mib() -> float:
    """Peak memory of this process so far. `getrusage` would count the process that started it."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def fastest(repeats: int, call: Callable[..., object], *args: object) -> float:
    """Seconds of the fastest of `repeats` calls."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call(*args)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    main()
