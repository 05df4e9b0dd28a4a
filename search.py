"""Search architecture, channel pruning and bit-widths together under one budget; or prepare what the search needs.

  search.py --constraint 0.05 --type latency --exp_name NAME     search; writes exps/NAME. Next: quant_aware.py
  search.py --prepare acc                                        gather float pairs, train the accuracy predictor
  search.py --prepare acc_quant --acc_train_sample N             gather N quantized pairs, transfer the predictor

What was killed continues with the same command. Preparing appends to dataset/NetInfo/SPACE; torchrun shares it among
processes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from apq.checkpoint import digest
from apq.cli import Parser, add_common_flags, run, table
from apq.device import resolve_device
from apq.errors import UserError
from apq.experiment import Experiment, get_experiment
from apq.files import check_writable
from apq.model_folder import ModelFolder
from apq.space import SCOPES, SearchSpace, space_to_dict
from apq.subnet import spec_of
from dataset import check_classes, load_splits
from dataset.imagenet import tell_unreadable
from dataset.pairs import NETINFO, PairStore
from elastic_nn.networks.supernet_file import load_quantized_supernet, load_supernet
from elastic_nn.training.distributed import check_agreement, processes, wait
from elastic_nn.training.pairs import gather_float, gather_quantized
from elastic_nn.training.recipes import RECIPES, get_recipe
from lut.costs import CostSource, add_cost_flags, cost_rows, cost_source, network_costs
from methods.evolution.evolution_finder import EvolutionConfig, EvolutionFinder, Found
from methods.evolution.search_state import load_state
from utils.latency_predictor import UNITS, LatencyPredictor
from utils.plots import plot_history
from utils.predictor_files import load_predictor, save_predictor
from utils.predictor_training import FEWEST_PAIRS, PredictorConfig, train_predictor


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--mode", choices=("evolution",), default="evolution", help="how to search")
    parser.add_argument("--constraint", type=float, help="budget, in the unit of --type")
    units = ", ".join(f"{name}: {unit}" for name, unit in UNITS.items())
    parser.add_argument("--type", choices=tuple(UNITS), default="latency", help=f"what the budget limits ({units})")
    parser.add_argument("--scope", choices=SCOPES, help="layers that a budget counts (default: the space's own)")
    add_cost_flags(parser, "the published BitFusion")
    parser.add_argument(
        "--acc_predictor_dir", type=Path, default=Path("models/digits"), help="folder of predictors and supernet"
    )
    parser.add_argument("--exp_name", default="test", help="name of the experiment: its folder is exps/NAME")
    parser.add_argument("--exp_dir", type=Path, help="folder of the experiment (default: exps/EXP_NAME)")
    parser.add_argument("--overwrite", action="store_true", help="replace what exists: experiment or predictor")
    evolution = EvolutionConfig()
    parser.add_argument("--population", type=int, default=evolution.population, help="candidates a generation")
    parser.add_argument("--generations", type=int, default=evolution.generations, help="generations to run")
    parser.add_argument("--parent_ratio", type=float, default=evolution.parent_ratio, help="share kept as parents")
    parser.add_argument("--mutation_prob", type=float, default=evolution.mutation_prob, help="chance of each gene")
    parser.add_argument("--mutation_ratio", type=float, default=evolution.mutation_ratio, help="mutants among children")
    parser.add_argument("--prepare", choices=("acc", "acc_quant"), help="gather pairs and train a predictor instead")
    parser.add_argument("--acc_train_sample", type=int, help="pairs to gather (default: the recipe's)")
    parser.add_argument("--netinfo", type=Path, help="folder of the pairs (default: dataset/NetInfo/SPACE)")
    parser.add_argument("--data", type=Path, help="image folder (train/CLASS, val/CLASS); digits and glyphs need none")
    parser.add_argument("--recipe", help=f"training recipe: {', '.join(RECIPES)} (default: the supernet's)")
    add_common_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.prepare:
        if args.constraint is not None:
            raise UserError("--prepare gathers pairs, it does not search: leave --constraint out")
        prepare(args)
    else:
        for flag in ("acc_train_sample", "netinfo", "data", "recipe"):
            if getattr(args, flag) is not None:
                raise UserError(f"--{flag} belongs to --prepare; a search does not use it")
        search(args)


def search(args: argparse.Namespace) -> None:
    """Load predictor and costs, evolve, record, print."""
    if args.constraint is None:
        raise UserError("a search needs --constraint, a budget in " + ", ".join(UNITS.values()))
    experiment = get_experiment(args.exp_name, args.exp_dir)
    experiment.check_free(args.overwrite)
    config = EvolutionConfig(
        population=args.population,
        generations=args.generations,
        parent_ratio=args.parent_ratio,
        mutation_prob=args.mutation_prob,
        mutation_ratio=args.mutation_ratio,
        seed=args.seed,
    )
    predictor = load_predictor(ModelFolder(args.acc_predictor_dir).acc_quant)
    if not predictor.quantize:
        raise UserError(f"{args.acc_predictor_dir}/acc_quant.pt is a float predictor: it does not see the bits")
    space = predictor.space
    scope = args.scope or space.budget_scope
    source = cost_source(args.config, args.table)
    cost = LatencyPredictor(args.type, scope, space, source.accelerator, source.table)
    finder = EvolutionFinder(
        space, predictor.fast(), cost.predict, args.constraint, config, cost.cheapest_genes(), cost.unit
    )
    settings = {
        "space": space_to_dict(space),
        "acc_predictor_dir": str(args.acc_predictor_dir),
        "constraint": args.constraint,
        "type": args.type,
        "unit": cost.unit,
        "scope": scope,
        "evolution": asdict(config),
        **source.record(),
    }
    asked = {
        **settings,
        "predictor": digest(predictor.state_dict()),
        "table_rows": source.table and hashlib.sha256(repr(source.table.rows).encode()).hexdigest(),
    }
    if args.overwrite and not _same_search(experiment, asked):
        experiment.search_state.unlink(missing_ok=True)
    with tqdm(total=config.generations, desc="search", disable=None) as bar:
        found = finder.run(
            lambda record: bar.update(record["generation"] - bar.n), state_file=experiment.search_state, asked=asked
        )
    settings["predicted_accuracy"] = found.accuracy
    with experiment.replaced() as new:
        new.save_found(space, found.subnet, found.cost, settings, found.history)
        plot_history(found.history, new.plot, constraint=args.constraint, quantity=args.type, unit=cost.unit)
    report(args, experiment, space, found, settings, source)


def _same_search(experiment: Experiment, asked: dict[str, Any]) -> bool:
    """Whether an unfinished search was asked for the same."""
    try:
        return load_state(experiment.search_state, asked) is not None
    except UserError:
        return False


def report(
    args: argparse.Namespace,
    experiment: Experiment,
    space: SearchSpace,
    found: Found,
    settings: dict[str, Any],
    source: CostSource,
) -> None:
    """Print the found subnet, its predicted accuracy and its costs."""
    costs, spec = network_costs(space, found.subnet, source), spec_of(space, found.subnet)
    if args.json:
        shown = {key: settings[key] for key in ("constraint", "type", "unit", "scope", "predicted_accuracy")}
        network = {"costs": {scope: asdict(cost) for scope, cost in costs.items()}, "subnet": spec}
        print(json.dumps({"space": space.name, **shown, "cost": found.cost, "priced_by": str(source), **network}))
        return
    unit = settings["unit"]
    print(f"{experiment.path}: best subnet of space {space.name} for {args.type} <= {args.constraint:g} {unit}")
    for key, value in {**spec["arch"], **spec["policy"]}.items():
        print(f"  {key:18} {value}")
    print(f"predicted top-1 {found.accuracy:.2%}; {args.type} {found.cost:g} {unit} ({settings['scope']} scope)")
    print(table(cost_rows(costs)))
    print(f"latency and energy: {source}")


def prepare(args: argparse.Namespace) -> None:
    """Gather pairs from the supernet, on all processes, and train the predictor that they are for, on one."""
    device = resolve_device(args.device)
    with processes(device) as share:
        gathered = gather(args, device, share)
    if share[0] == 0:
        fit(args, device, *gathered)


def gather(
    args: argparse.Namespace, device: torch.device, share: tuple[int, int]
) -> tuple[PairStore, int, dict[str, Any]]:
    """Measure the pairs that are missing, each process its part; returns their store, number and origin."""
    folder, quantized = ModelFolder(args.acc_predictor_dir), args.prepare == "acc_quant"
    target = folder.acc_quant if quantized else folder.acc
    if target.exists() and not args.overwrite:
        raise UserError(f"{target} exists; give --overwrite to train it anew (pairs that are there are kept)")
    supernet, facts = (load_quantized_supernet if quantized else load_supernet)(folder.supernet)
    space = supernet.space
    recipe, splits = get_recipe(args.recipe or facts.recipe, space), load_splits(space, args.data)
    check_classes(splits, facts.images, folder.supernet)
    n_pairs = recipe.pairs_quant if quantized else recipe.pairs_float
    if args.acc_train_sample is not None:
        n_pairs = args.acc_train_sample
    if n_pairs < FEWEST_PAIRS:
        raise UserError(f"--acc_train_sample {n_pairs}: a predictor needs at least {FEWEST_PAIRS} pairs")
    store = PairStore((args.netinfo or NETINFO / space.name) / args.prepare, share[0])
    check_writable(folder.path)
    check_writable(store.path)
    made_by: dict[str, Any] = {
        "seed": args.seed,
        "recalibration_images": recipe.recalibration_images,
        "supernet": digest(supernet.state_dict()),
        "images": splits.source,
    }
    if quantized:
        made_by["finetune"] = asdict(recipe.pair_finetune)
        if recipe.pair_epoch_images is not None:
            made_by["epoch_images"] = recipe.pair_epoch_images
    check_agreement({"space": space_to_dict(space), "pairs": n_pairs, **made_by}, share)
    missing = store.open(space, made_by, n_pairs)
    check_agreement({"pairs (their folder must be shared)": missing}, share)
    wait(share)  # nobody adds pairs before all have seen which are missing
    started = time.perf_counter()
    (gather_quantized if quantized else gather_float)(
        supernet.to(device), splits, recipe, store, missing[share[0] :: share[1]], args.seed, device
    )
    wait(share)
    if share[0] == 0:
        tell_unreadable(splits)
    if missing and share[0] == 0:
        a_minute = 60 * len(missing) / (time.perf_counter() - started)
        print(
            f"{len(missing)} pairs measured, {a_minute:.1f} subnets a minute on {share[1]} process(es)", file=sys.stderr
        )
    return store, n_pairs, made_by


def fit(
    args: argparse.Namespace, device: torch.device, store: PairStore, n_pairs: int, made_by: dict[str, Any]
) -> None:
    """Train the predictor of gathered pairs, save it, print its scores."""
    folder, quantized = ModelFolder(args.acc_predictor_dir), args.prepare == "acc_quant"
    target = folder.acc_quant if quantized else folder.acc
    space = load_supernet(folder.supernet)[0].space
    genes, accuracies = store.load(space, n_pairs)
    config = PredictorConfig(seed=args.seed)
    predictor, scores = train_predictor(
        genes,
        accuracies,
        space,
        quantize=quantized,
        initial=load_predictor(folder.acc, space) if quantized else None,
        config=config,
        device=device,
        state_file=folder.state_of(target),
    )
    facts = {
        "data": {"pairs": str(store.path), "n_pairs": len(genes), **made_by},
        "scores": asdict(scores),
        "predictor_training": asdict(config),
    }
    save_predictor(target, predictor, facts)
    folder.state_of(target).unlink(missing_ok=True)
    if args.json:
        print(json.dumps({"predictor": str(target), **facts}))
        return
    print(f"{target}: trained on {scores.n_train} pairs of {store.path}, held out {scores.n_holdout}")
    print(f"held out: RMSE {scores.rmse:.4f}, Kendall tau {scores.kendall_tau:.3f}, Spearman {scores.spearman:.3f}")


if __name__ == "__main__":
    run(main)
