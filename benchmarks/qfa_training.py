"""Which activation quantizer trains one supernet for all mixed-precision policies?

BatchQuant is compared with other estimates of the range, running ranges and learned steps. For each seed and quantizer
a supernet is trained from the same float supernet, by a shortened recipe of the space. Then two kinds of subnets are
measured without a finetune: the largest architecture with 30 fixed random policies, and 30 random subnets. Those near
chance (under 5 %) are counted. A supernet has diverged when its loss is no longer a finite number. BatchNorm and
BatchQuant are recalibrated for each subnet; the running ranges of `running-minmax` stay as training left them.

Supernets and records are kept in --out, so a killed run continues. Runs with other --seeds or --quantizers may share
the machine. Another space, other constants or another --start_from need another --out.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tqdm import tqdm

from apq.checkpoint import digest
from apq.cli import Parser, run
from apq.device import resolve_device
from apq.errors import UserError
from apq.files import read_json, write_json
from apq.genes import canonical, genes_of, largest_subnet, sample, subnets_of, view
from apq.model_folder import ModelFolder
from apq.presets import get_space
from apq.resume import Resume
from apq.space import SearchSpace
from apq.subnet import Subnet
from benchmarks.markdown import markdown
from dataset import load_splits
from dataset.splits import Splits
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.networks.supernet_file import load_supernet, save_supernet
from elastic_nn.quantizers import MIXED
from elastic_nn.training.engine import DivergedError
from elastic_nn.training.pairs import subnet_top1
from elastic_nn.training.progressive_shrinking import SupernetPlan, supernet_record, train_supernet
from elastic_nn.training.recipe import Recipe
from elastic_nn.training.recipes import get_recipe
from elastic_nn.training.session import Session
from report.plots import plot_losses

QUANTIZERS = tuple(MIXED)
EPOCHS, EPOCH_IMAGES = (2, 4), 6000  # short, because many supernets are trained
N_POLICIES, POLICY_SEED = 30, 0
NEAR_CHANCE = 0.05
VAL_IMAGES = 2000


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--space", default="qfa-mbv3-glyphs", help="a space whose bits are chosen")
    parser.add_argument("--start_from", type=Path, help="folder of its float supernet (default: models/SPACE-float)")
    parser.add_argument(
        "--quantizers", nargs="+", choices=tuple(MIXED), default=QUANTIZERS, help="quantizers to compare"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to run")
    parser.add_argument("--out", type=Path, default=Path("exps/qfa_training"), help="folder of supernets and records")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU when present")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    device, space = resolve_device(args.device), get_space(args.space)
    splits, recipe = load_splits(space), shortened(get_recipe(None, space))
    for seed, name in tqdm([(seed, name) for seed in args.seeds for name in args.quantizers], disable=None):
        folder = ModelFolder(args.out / str(seed) / name)
        if not folder.training.exists():
            train(folder, name, space, splits, recipe, seed, args, device)
        if not scores_file(folder).exists() and folder.supernet.exists():
            net, _ = load_supernet(folder.supernet)
            write_json(scores_file(folder), measure(net.to(device), splits, recipe, device))
    print_tables(args)


def shortened(recipe: Recipe) -> Recipe:
    """The recipe with fewer epochs of fewer images."""
    if len(recipe.phases) != len(EPOCHS):
        raise UserError(f"recipe {recipe.name} does not have QFA's two stages")
    phases = (
        replace(phase, train=replace(phase.train, epochs=n), epoch_images=EPOCH_IMAGES)
        for phase, n in zip(recipe.phases, EPOCHS, strict=True)
    )
    return replace(recipe, phases=tuple(phases))


def scores_file(folder: ModelFolder) -> Path:
    """The file of the policies' accuracies."""
    return folder.path / "policies.json"


def train(
    folder: ModelFolder,
    name: str,
    space: SearchSpace,
    splits: Splits,
    recipe: Recipe,
    seed: int,
    args: Namespace,
    device: torch.device,
) -> None:
    """Train one supernet; if it diverges, keep the records of its epochs until then."""
    source = ModelFolder(args.start_from or Path("models") / f"{space.name}-float").supernet
    start, _ = load_supernet(source)
    plan = SupernetPlan(space=space, recipe=recipe, scheme=MIXED[name], start=start)
    session = Session(splits=splits, device=device, seed=seed, progress=True)
    resume = Resume(folder.supernet_state, supernet_record(plan, session), "training")
    try:
        net, records = train_supernet(plan, session, resume)
    except DivergedError as error:
        state = resume.load() or {}
        records = [*state.get("records", []), {"diverged": str(error), "epochs": state.get("epochs", [])}]
        write_json(folder.training, {"seed": seed, "phases": records})
        return
    facts = {"seed": seed, "started_from": {"file": str(source), "weights": digest(start.state_dict())}}
    save_supernet(folder.supernet, net.cpu(), recipe.name, splits.source, records=records, **facts)
    write_json(folder.training, {"space": space.name, "recipe": recipe.name, **facts, "phases": records})
    resume.done()


def policies(space: SearchSpace) -> dict[str, list[Subnet]]:
    """The fixed random subnets: the largest architecture with random policies, and random architectures with theirs."""
    genes = sample(space, N_POLICIES, np.random.default_rng(POLICY_SEED))
    rng = np.random.default_rng(POLICY_SEED + 1)  # apart from `genes`, whose idle slots have no random bits
    largest = np.repeat(genes_of(space, [largest_subnet(space)]), N_POLICIES, axis=0)
    parts = view(space, largest)
    for k, kind in enumerate(space.operands):
        parts.bits[:, k] = rng.integers(len(kind.choices), size=parts.bits[:, k].shape)
    for i, shared in enumerate(space.shared_operands):
        parts.shared_bits[:, i] = rng.integers(len(shared.choices), size=N_POLICIES)
    return {"largest": subnets_of(space, canonical(space, largest)), "random": subnets_of(space, genes)}


def measure(
    net: DynamicProxylessNASNets, splits: Splits, recipe: Recipe, device: torch.device
) -> dict[str, list[float]]:
    """Validation top-1 of each subnet, recalibrated."""
    images, session = splits.val.thinned(VAL_IMAGES), Session(splits=splits, device=device)

    def top1(subnet: Subnet) -> float:
        return subnet_top1(net, subnet, session, images, recipe.recalibration_images)

    return {name: [top1(subnet) for subnet in subnets] for name, subnets in policies(net.space).items()}


def print_tables(args: Namespace) -> None:
    """Print losses, accuracies and divergence of each supernet, then means over the seeds; plot the losses."""
    rows, lines, totals = [], {}, {name: [] for name in args.quantizers}
    for name in args.quantizers:
        for seed in args.seeds:
            folder = ModelFolder(args.out / str(seed) / name)
            phases = read_json(folder.training)["phases"]
            losses = [epoch["loss"] for phase in phases for epoch in phase.get("epochs", ()) if "loss" in epoch]
            lines[f"{name}, seed {seed}"] = (range(1, len(losses) + 1), losses)
            if "diverged" in phases[-1]:
                rows.append((name, seed, f"after epoch {len(losses)}", *[""] * 7))
                continue
            scores = {of: np.array(values) for of, values in read_json(scores_file(folder)).items()}
            totals[name].append((losses, scores))
            ends = [phases[-1][f"{size}_top1"] for size in ("largest", "smallest")]
            rows.append((name, seed, "no", *loss_columns(losses), *map(percent, ends), *columns(scores)))
    for name, found in totals.items():
        if found:
            losses, scores = zip(*found, strict=True)
            mean = {of: np.mean([s[of] for s in scores], axis=0) for of in scores[0]}
            diverged = f"{len(args.seeds) - len(found)} of {len(args.seeds)}"
            rows.append((name, "mean", diverged, *loss_columns(np.mean(losses, axis=0)), "", "", *columns(mean)))
    titles = ("quantizer", "seed", "diverged", "first loss", "last loss", "all at 4 bits", "smallest, 2 bits")
    of = [f"{n}, {what}" for n in ("largest", "random") for what in ("mean", "lowest to highest", "under 5 %")]
    print(markdown((*titles, *of), rows))
    plot_losses(lines, args.out / "losses.png", xlabel="epoch")


def loss_columns(losses: Any) -> tuple[str, str]:
    """Mean loss of the first and of the last epoch."""
    return f"{losses[0]:.3f}", f"{losses[-1]:.3f}"


def columns(scores: dict[str, np.ndarray]) -> list[str]:
    """Mean top-1, range, and number near chance, of the subnets of each kind."""
    found = []
    for values in scores.values():
        spread = f"{percent(values.min())} to {percent(values.max())}"
        found += [percent(values.mean()), spread, str(int((values < NEAR_CHANCE).sum()))]
    return found


def percent(share: float) -> str:
    """As a percentage."""
    return f"{100 * share:.2f}"


if __name__ == "__main__":
    run(main)
