"""Time the search on apq-imagenet with a predictor of random weights: scoring alone, and 500 generations of 100.

Other programs on the same cores distort the times, because torch's threads wait for each other, so each figure is the
best of several repeats. Seconds of different machines do not compare: compare ratios of runs on one machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from apq.cli import table
from apq.genes import sample
from apq.presets import APQ_IMAGENET
from benchmarks.machine import describe
from lut.bitfusion import BitFusion
from lut.population import PopulationCost
from methods.evolution.evolution_finder import EVOLUTIONS, EvolutionFinder
from utils.accuracy_predictor import AccuracyPredictor

N_CANDIDATES = 16_384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--constraint", type=float, default=12.8, help="latency budget in ms, published scope")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each part; the fastest counts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()

    space = APQ_IMAGENET
    torch.manual_seed(0)
    predictor, cost = AccuracyPredictor(space).fast(), PopulationCost(space, "latency", BitFusion(), "published")
    genes = sample(space, N_CANDIDATES, np.random.default_rng(0))
    finder = EvolutionFinder(
        space, predictor, cost.predict, args.constraint, EVOLUTIONS["published"], cost.cheapest_genes(), cost.unit
    )
    cost_us, predictor_us, both_us = (
        1e6 * fastest(args.repeats, part, genes) / len(genes)
        for part in (cost.predict, predictor, lambda rows: (cost.predict(rows), predictor(rows)))
    )
    search_seconds = fastest(args.repeats, finder.run)
    found = finder.run()
    result = {
        "candidates_per_second": 1e6 / both_us,
        "search_seconds": search_seconds,
        "cost_us_per_candidate": cost_us,
        "encoding_and_predictor_us_per_candidate": predictor_us,
        "constraint_ms": args.constraint,
        "found_ms": found.cost,
        "scored": found.history[-1]["evaluated"],
        "threads": torch.get_num_threads(),
        "machine": describe(),
    }
    if args.json:
        print(json.dumps(result))
        return
    rows = {**result.pop("machine"), **result}
    print(table((key, f"{value:,.3f}" if isinstance(value, float) else str(value)) for key, value in rows.items()))


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
