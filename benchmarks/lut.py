"""Time the full cost table of apq-imagenet, without a cache and on one core.

--wide also builds a search's tables of a wide space: mid channels in steps of one, 25 resolutions. Latency is priced
without a cache, then with one, BitOps are counted.

Seconds of different machines do not compare: compare ratios of runs on one machine.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse  # noqa: E402 - the thread limits must be set before numpy is imported
import json  # noqa: E402

from apq.layers import searchable_layers  # noqa: E402
from apq.presets import APQ_IMAGENET  # noqa: E402
from benchmarks.machine import describe  # noqa: E402
from lut.bitfusion import BitFusion  # noqa: E402
from lut.population import PopulationCost  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--wide", action="store_true", help="build the tables of a wide space, too")
    parser.add_argument("--repeats", type=int, default=3, help="runs; the fastest counts")
    args = parser.parse_args()
    seconds = []
    for _ in range(args.repeats):
        started = time.perf_counter()
        layers = searchable_layers(APQ_IMAGENET)
        BitFusion().cost(layers)
        seconds.append(time.perf_counter() - started)
    result = {"table_seconds": min(seconds), "layers": len(layers), "threads": 1, "machine": describe()}
    if args.wide:
        result |= wide_seconds()
    if args.json:
        print(json.dumps(result))
        return
    for key, value in {**result.pop("machine"), **result}.items():
        print(f"{key:28} {value if not isinstance(value, float) else f'{value:.3f}'}")


def wide_seconds() -> dict[str, float]:
    """Seconds for the tables of a wide space, by quantity."""
    space = replace(APQ_IMAGENET, name="wide", channel_step=1, resolutions=tuple(range(128, 225, 4)))
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["APQ_CACHE"] = folder
        for name, quantity in (("latency", "latency"), ("cached_latency", "latency"), ("bitops", "bitops")):
            started = time.perf_counter()
            PopulationCost(space, quantity, BitFusion())
            seconds[f"wide_{name}_seconds"] = time.perf_counter() - started
    return seconds


if __name__ == "__main__":
    main()
