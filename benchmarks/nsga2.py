"""Time NSGA-II on a million candidates, and the parts of the search, with a predictor of random weights.

Each part is timed as it runs in the search. Both clock and processor seconds are printed: on a busy machine the clock
also counts the time of other programs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import moocore
import numpy as np
import pymoo
import torch

from apq.cli import Parser, run, table
from apq.presets import get_space
from benchmarks.machine import describe
from lut.bitfusion import BitFusion
from lut.costs import UNITS
from lut.population import PopulationCost
from methods.nsga2 import front_finder
from methods.nsga2.front_finder import Nsga2Config, Objective, find_front
from utils.accuracy_predictor import AccuracyPredictor


class Stopwatch:
    """Total clock and processor seconds of calls of functions that do not call each other."""

    def __init__(self) -> None:
        self.seconds: dict[str, np.ndarray] = {}  # name -> (clock, processor)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its calls are timed under a name."""
        self.seconds.setdefault(name, np.zeros(2))

        def call(*args: Any, **kwargs: Any) -> Any:
            started = now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += now() - started

        return call


def now() -> np.ndarray:
    """(2,) clock seconds, and processor seconds of all threads of this process."""
    return np.array([time.perf_counter(), time.process_time()])


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--space", default="apq-imagenet", help="space to search")
    parser.add_argument(
        "--costs", nargs="+", choices=tuple(UNITS), default=["latency"], help="objectives beside accuracy"
    )
    parser.add_argument("--hidden", type=int, default=400, help="width of the predictor's three layers")
    parser.add_argument("--population", type=int, default=500, help="candidates a generation")
    parser.add_argument("--generations", type=int, default=2000, help="generations to run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)

    space = get_space(args.space)
    torch.manual_seed(0)
    watch, predictor = Stopwatch(), AccuracyPredictor(space, args.hidden).fast()
    objectives = [Objective(name="accuracy", score=watch.timed("accuracy predictor", predictor), maximise=True)]
    for name in args.costs:
        cost = PopulationCost(space, name, BitFusion(), space.budget_scope)
        score = watch.timed("costs", cost.predict)
        objectives.append(Objective(name=name, score=score, unit=cost.unit, cheapest=cost.cheapest_genes()))
    config = Nsga2Config(population=args.population, generations=args.generations)
    sorting = watch.timed("sorting and crowding", front_finder.survivors)
    children = watch.timed("children: parents, crossover, mutation, duplicates", front_finder._children)
    with patch.object(front_finder, "survivors", sorting), patch.object(front_finder, "_children", children):
        started = now()
        front = find_front(space, objectives, config)
        total = now() - started
    parts = {**watch.seconds, "the rest": total - sum(watch.seconds.values())}
    n = front.history[-1]["evaluated"]
    outside = 1 - watch.seconds["sorting and crowding"] / total
    if args.json:
        facts = {"space": space.name, "candidates": n, "objectives": len(objectives), "front": len(front.genes)}
        seconds = {name: of.tolist() for name, of in {**parts, "all": total}.items()}
        print(json.dumps({**facts, "seconds": seconds, "outside_sorting": outside.tolist(), "machine": machine()}))
        return
    print(table([*machine().items(), ("space", space.name), ("front", str(len(front.genes)))]))
    print(f"{n:,} candidates, {len(objectives)} objectives, population {config.population}")
    rows = [
        (name, *(f"{s:.2f}" for s in of), f"{of[1] / total[1]:.1%}") for name, of in {**parts, "all": total}.items()
    ]
    print(table([("seconds", "clock", "processor", "share"), *rows]))
    print(f"outside sorting: {outside[1]:.1%} of the processor's time, {outside[0]:.1%} of the clock's")


def machine() -> dict[str, Any]:
    """Processor, cores, threads and versions."""
    versions = {"pymoo": pymoo.__version__, "moocore": moocore.__version__}
    return {**{k: str(v) for k, v in describe().items()}, "threads": str(torch.get_num_threads()), **versions}


if __name__ == "__main__":
    run(main)
