"""Search architecture, channel pruning and bit-widths together under one budget; or prepare what the search needs.

  search.py --constraint 0.05 --type latency --exp_name NAME     search; writes exps/NAME. Next: quant_aware.py
  search.py --prepare acc                                        gather float pairs, train the accuracy predictor
  search.py --prepare acc_quant --acc_train_sample N             gather N quantized pairs, transfer the predictor

Preparing appends to dataset/NetInfo/SPACE and continues where it was killed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
from dataset import load_splits
from dataset.pairs import NETINFO, PairStore
from elastic_nn.networks.supernet_file import load_quantized_supernet, load_supernet
from elastic_nn.training.pairs import gather_float, gather_quantized
from elastic_nn.training.recipes import get_recipe
from lut.costs import CostSource, add_cost_flags, cost_rows, cost_source, network_costs
from methods.evolution.evolution_finder import EvolutionConfig, EvolutionFinder, Found
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
    parser.add_argument("--data", type=Path, help="image folder with train/CLASS and val/CLASS; not needed for digits")
    parser.add_argument("--recipe", help="training recipe: digits or tiny (default: the supernet's)")
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
    with tqdm(total=config.generations, desc="search", disable=None) as bar:
        found = finder.run(lambda record: bar.update(record["generation"] > 0))
    experiment.clear()
    settings = {
        "space": space_to_dict(space),
        "acc_predictor_dir": str(args.acc_predictor_dir),
        "constraint": args.constraint,
        "type": args.type,
        "unit": cost.unit,
        "scope": scope,
        "evolution": asdict(config),
        **source.record(),
        "predicted_accuracy": found.accuracy,
    }
    experiment.save_found(space, found.subnet, found.cost, settings, found.history)
    plot_history(found.history, experiment.plot, constraint=args.constraint, quantity=args.type, unit=cost.unit)
    report(args, experiment, space, found, settings, source)


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
    """Gather pairs from the supernet and train the predictor that they are for."""
    folder, device = ModelFolder(args.acc_predictor_dir), resolve_device(args.device)
    quantized = args.prepare == "acc_quant"
    target = folder.acc_quant if quantized else folder.acc
    if target.exists() and not args.overwrite:
        raise UserError(f"{target} exists; give --overwrite to train it anew (pairs that are there are kept)")
    supernet, trained_by = (load_quantized_supernet if quantized else load_supernet)(folder.supernet)
    space = supernet.space
    recipe, splits = get_recipe(args.recipe or trained_by, space), load_splits(space, args.data)
    n_pairs = recipe.pairs_quant if quantized else recipe.pairs_float
    if args.acc_train_sample is not None:
        n_pairs = args.acc_train_sample
    if n_pairs < FEWEST_PAIRS:
        raise UserError(f"--acc_train_sample {n_pairs}: a predictor needs at least {FEWEST_PAIRS} pairs")
    store = PairStore((args.netinfo or NETINFO / space.name) / args.prepare)
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
    gather = gather_quantized if quantized else gather_float
    gather(supernet.to(device), splits, recipe, store, store.open(space, made_by), n_pairs, args.seed, device)
    genes, accuracies = store.load(space)
    genes, accuracies = genes[:n_pairs], accuracies[:n_pairs]
    config = PredictorConfig(seed=args.seed)
    predictor, scores = train_predictor(
        genes,
        accuracies,
        space,
        quantize=quantized,
        initial=load_predictor(folder.acc, space) if quantized else None,
        config=config,
        device=device,
    )
    facts = {
        "data": {"pairs": str(store.path), "n_pairs": len(genes), **made_by},
        "scores": asdict(scores),
        "predictor_training": asdict(config),
    }
    save_predictor(target, predictor, facts)
    if args.json:
        print(json.dumps({"predictor": str(target), **facts}))
        return
    print(f"{target}: trained on {scores.n_train} pairs of {store.path}, held out {scores.n_holdout}")
    print(f"held out: RMSE {scores.rmse:.4f}, Kendall tau {scores.kendall_tau:.3f}, Spearman {scores.spearman:.3f}")


if __name__ == "__main__":
    run(main)
