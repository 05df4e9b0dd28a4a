"""Is it better to search among quantized subnets than to search in floating point and quantize what was found?

It searches the supernets of benchmarks/oqa_training.py, which must run first. For each seed, the float supernet and
those of 4 and 2 bits that inherited are searched in the same way, coarse to fine, on part of the validation images. At
each budget of MACs these subnets are measured on the test images:

  joint         the best subnet of the quantized search, cut out of the quantized supernet, without a finetune
  NAS, cut      the best subnet of the float search, cut out of the quantized supernet, without a finetune
  NAS, trained  the best subnet of the float search with the float weights, quantized and finetuned, without a teacher

Every result is kept in --out, so a killed run continues. Runs with other --seeds may share the machine. Remove
--out/SEED.jsonl when a supernet or a setting has changed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from apq.bit_widths import at_bits
from apq.checkpoint import digest
from apq.cli import Parser, run
from apq.device import resolve_device
from apq.errors import UserError
from apq.files import append_jsonl, atomic_open, read_arrays, read_jsonl
from apq.genes import genes_of, largest_subnet, subnets_of
from apq.model_folder import ModelFolder
from apq.presets import get_space
from apq.space import SearchSpace
from benchmarks.markdown import markdown
from dataset import load_splits
from dataset.splits import Splits, make_loader
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.networks.supernet_file import build_supernet, load_supernet
from elastic_nn.quantizers import LSQ
from elastic_nn.training.engine import EVALUATION_BATCH, evaluate, seed_epoch
from elastic_nn.training.finetune import finetune, quantized_subnet
from elastic_nn.training.recipe import Recipe, TrainConfig
from elastic_nn.training.recipes import get_recipe
from elastic_nn.training.session import Session
from lut.population import PopulationCost
from methods.coarse_to_fine.finder import CoarseToFineConfig, Measured, coarse_to_fine
from methods.search.measurement import Measurement
from report.plots import plot_top1

METHODS = ("joint", "NAS, cut", "NAS, trained")
BITS = (4, 2)
N_COARSE, INTERVALS, N_FINE, SEARCH_IMAGES = 60, 5, 2, 1000
FINETUNE = TrainConfig(epochs=2, lr=0.05)


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--space", default="oqa-mbv2-glyphs", help="an OQA space")
    parser.add_argument("--supernets", type=Path, default=Path("exps/oqa_training"), help="folder of the supernets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to run")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.3, 0.6], help="budgets, millions of MACs")
    parser.add_argument("--out", type=Path, default=Path("exps/oqa_search"), help="folder of records and the plot")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU when present")
    return parser


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all measurements share."""

    space: SearchSpace
    splits: Splits
    recipe: Recipe
    supernets: Path
    out: Path
    device: torch.device

    def supernet(self, seed: int, bits: int | None) -> DynamicProxylessNASNets:
        """A trained supernet: the float one (None), or the one of these bits that inherited."""
        file = ModelFolder(self.supernets / str(seed) / ("float" if bits is None else f"inherited-{bits}")).supernet
        if not file.exists():
            raise UserError(f"no supernet at {file}: run benchmarks/oqa_training.py first")
        return load_supernet(file)[0].to(self.device)

    def search(self, seed: int, bits: int | None) -> Measured:
        """The subnets that a coarse-to-fine search measures, kept in a file."""
        supernet, flops = self.supernet(seed, bits), PopulationCost(self.space, "flops")
        file = self.out / f"{seed}-{'float' if bits is None else bits}-{digest(supernet.state_dict())[:8]}.npz"
        if file.exists():
            return Measured(**{k: v if v.ndim else int(v) for k, v in read_arrays(file).items()})
        few = replace(self.splits, val=self.splits.val.thinned(SEARCH_IMAGES))
        images = self.recipe.recalibration_images
        measurement = Measurement(supernet=supernet, splits=few, recalibration_images=images, device=self.device)
        config = CoarseToFineConfig(
            flops_min=flops.cheapest()[0],
            flops_max=float(flops.predict(genes_of(self.space, [largest_subnet(self.space)]))[0]),
            n_coarse=N_COARSE,
            intervals=INTERVALS,
            n_fine=N_FINE,
            seed=seed,
        )

        def evaluate_stage(stage: str, genes: np.ndarray) -> np.ndarray:
            subnets = subnets_of(supernet.space, genes)
            return np.array([measurement.top1(one) for one in tqdm(subnets, desc=stage, leave=False, disable=None)])

        found = coarse_to_fine(self.space, config, flops.predict, evaluate_stage)
        with atomic_open(file, "wb") as stream:
            np.savez(stream, genes=found.genes, flops=found.flops, top1=found.top1, n_coarse=found.n_coarse)
        return found

    def measure(self, seed: int, bits: int, method: str, budget: float) -> dict[str, Any]:
        """One cell of the table; the budget is in MACs."""
        found = self.search(seed, bits if method == "joint" else None)
        if budget < found.flops.min():
            raise UserError(
                f"the budget of {budget:g} MACs is below the smallest measured subnet: {found.flops.min():g}"
            )
        best = int(np.argmax(np.where(found.flops <= budget, found.top1, -1)))
        space = at_bits(self.space, bits)
        (subnet,) = subnets_of(space, found.genes[best : best + 1])
        if method == "NAS, trained":
            supernet = build_supernet(space, LSQ).to(self.device)
            supernet.load_float_weights(self.supernet(seed, None).state_dict())
        else:
            supernet = self.supernet(seed, bits)
        seed_epoch(seed, 0)
        net = quantized_subnet(supernet, subnet, self.splits, self.recipe.recalibration_images, self.device)
        if method == "NAS, trained":
            session = Session(splits=self.splits, device=self.device, seed=seed)
            _, weights = finetune(net, session, FINETUNE, side=subnet.resolution)
            net.load_state_dict(weights)
        facts = {"seed": seed, "bits": bits, "method": method, "budget": budget}
        top1 = self.test_top1(net, subnet.resolution)
        return {**facts, "macs": float(found.flops[best]), "searched": float(found.top1[best]), "test": top1}

    def test_top1(self, net: nn.Module, side: int) -> float:
        """Top-1 on all test images."""
        return evaluate(net, make_loader(self.splits.test, EVALUATION_BATCH, sides=(side,)), self.device).top1


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    space = get_space(args.space)
    bench = Bench(
        space=space,
        splits=load_splits(space),
        recipe=get_recipe(None, space),
        supernets=args.supernets,
        out=args.out,
        device=resolve_device(args.device),
    )
    budgets = [1e6 * budget for budget in args.budgets]
    keys = [(s, k, m, b) for s in args.seeds for k in BITS for m in METHODS for b in budgets]
    done = {}
    for key in tqdm(keys, disable=None):
        file = args.out / f"{key[0]}.jsonl"
        known = {(r["seed"], r["bits"], r["method"], r["budget"]): r for r in read_jsonl(file)}
        if key not in known:
            append_jsonl(file, bench.measure(*key))
        done[key] = known.get(key) or read_jsonl(file)[-1]
    print_table(args.seeds, budgets, done)
    means = {
        f"{method}, {bits} bits": (args.budgets, [mean_of(done, args.seeds, bits, method, b) for b in budgets])
        for bits in BITS
        for method in METHODS
    }
    plot_top1(means, args.out / "search.png", xlabel="budget, millions of MACs")


def mean_of(done: dict[Any, dict[str, Any]], seeds: list[int], bits: int, method: str, budget: float) -> float:
    """Mean test top-1 over seeds."""
    return float(np.mean([done[seed, bits, method, budget]["test"] for seed in seeds]))


def print_table(seeds: list[int], budgets: list[float], done: dict[Any, dict[str, Any]]) -> None:
    """Print test top-1 of each method, one row for each bit-width, budget and seed, and the means."""
    rows = []
    for bits in BITS:
        for budget in budgets:
            for seed in seeds:
                of = [done[seed, bits, method, budget] for method in METHODS]
                macs = f"{of[0]['macs'] / 1e6:.3f} / {of[1]['macs'] / 1e6:.3f}"
                rows.append((bits, budget / 1e6, seed, macs, *(f"{100 * r['test']:.2f}" for r in of)))
            means = (f"{100 * mean_of(done, seeds, bits, method, budget):.2f}" for method in METHODS)
            rows.append((bits, budget / 1e6, "mean", "", *means))
    print(markdown(("bits", "budget, M", "seed", "MACs joint / NAS, M", *METHODS), rows))


if __name__ == "__main__":
    run(main)
