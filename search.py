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

from apq.cli import Parser, add_common_flags, run, table
from apq.device import resolve_device
from apq.errors import UserError
from apq.experiment import Experiment
from apq.model_folder import ModelFolder
from apq.space import SCOPES, SearchSpace
from apq.subnet import architecture_of, policy_of
from dataset import load_splits
from dataset.pairs import NETINFO, PairStore
from elastic_nn.networks.supernet_file import load_quantized_supernet, load_supernet
from elastic_nn.training.pairs import gather_float, gather_quantized
from elastic_nn.training.recipes import get_recipe
from lut.accelerator import Accelerator, accelerator_from_json
from lut.table import load as load_table
from methods.evolution.evolution_finder import EvolutionConfig, EvolutionFinder, Found
from utils.costs import cost_rows, network_costs
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
    parser.add_argument("--config", type=Path, help="accelerator as a JSON file (default: the published BitFusion)")
    parser.add_argument("--table", type=Path, help="cost table of your own device, in the published JSON form")
    parser.add_argument(
        "--acc_predictor_dir", type=Path, default=Path("models/digits"), help="folder of predictors and supernet"
    )
    parser.add_argument("--exp_name", default="test", help="name of the experiment: its folder is exps/NAME")
    parser.add_argument("--exp_dir", type=Path, help="folder of the experiment (default: exps/EXP_NAME)")
    parser.add_argument("--overwrite", action="store_true", help="replace an experiment that exists")
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
    parser.add_argument("--recipe", help="training recipe: digits or tiny (default: the space's own)")
    add_common_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.prepare:
        prepare(args)
    else:
        search(args)


def search(args: argparse.Namespace) -> None:
    """Load predictor and costs, evolve, record, print."""
    if args.constraint is None:
        raise UserError("a search needs --constraint, a budget in " + ", ".join(UNITS.values()))
    experiment = Experiment(args.exp_dir or Path("exps") / args.exp_name)
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
    accelerator = accelerator_from_json(args.config) if args.config else None
    own_table = load_table(args.table) if args.table else None
    cost = LatencyPredictor(type=args.type, scope=scope, space=space, accelerator=accelerator, table=own_table)
    finder = EvolutionFinder(
        space, predictor.fast(), cost.predict, args.constraint, config, cost.cheapest_genes(), cost.unit
    )
    with tqdm(total=config.generations, desc="search", disable=None) as bar:
        found = finder.run(lambda record: bar.update(record["generation"] > 0))
    experiment.clear()
    settings = {
        "space": space.name,
        "acc_predictor_dir": str(args.acc_predictor_dir),
        "constraint": args.constraint,
        "type": args.type,
        "unit": cost.unit,
        "scope": scope,
        "evolution": asdict(config),
        "accelerator": asdict(accelerator or Accelerator()),
        "table": str(args.table) if args.table else None,
        "predicted_accuracy": found.accuracy,
    }
    experiment.save_found(space, found.subnet, found.cost, settings, found.history)
    plot_history(found.history, experiment.plot, constraint=args.constraint, quantity=args.type, unit=cost.unit)
    report(args, experiment, space, found, settings, accelerator)


def report(
    args: argparse.Namespace,
    experiment: Experiment,
    space: SearchSpace,
    found: Found,
    settings: dict[str, Any],
    accelerator: Accelerator | None,
) -> None:
    """Print the found subnet, its predicted accuracy and its costs."""
    costs = network_costs(space, found.subnet, accelerator)
    architecture, policy = architecture_of(space, found.subnet), policy_of(space, found.subnet)
    if args.json:
        shown = {key: settings[key] for key in ("space", "constraint", "type", "unit", "scope", "predicted_accuracy")}
        costs_json = {scope: asdict(cost) for scope, cost in costs.items()}
        subnet = {"arch": architecture, "policy": policy}
        print(json.dumps({**shown, "cost": found.cost, "costs": costs_json, "subnet": subnet}))
        return
    unit = settings["unit"]
    print(f"{experiment.path}: best subnet of space {space.name} for {args.type} <= {args.constraint:g} {unit}")
    for key, value in {**architecture, **policy}.items():
        print(f"  {key:18} {value}")
    print(f"predicted top-1 {found.accuracy:.2%}; {args.type} {found.cost:g} {unit} ({settings['scope']} scope)")
    print(table(cost_rows(costs)))


def prepare(args: argparse.Namespace) -> None:
    """Gather pairs from the supernet and train the predictor that they are for."""
    folder, device = ModelFolder(args.acc_predictor_dir), resolve_device(args.device)
    quantized = args.prepare == "acc_quant"
    supernet = (load_quantized_supernet if quantized else load_supernet)(folder.supernet).to(device)
    space = supernet.space
    recipe, splits = get_recipe(args.recipe, space), load_splits(space, args.data)
    n_pairs = recipe.pairs_quant if quantized else recipe.pairs_float
    if args.acc_train_sample is not None:
        n_pairs = args.acc_train_sample
    if n_pairs < FEWEST_PAIRS:
        raise UserError(f"--acc_train_sample {n_pairs}: a predictor needs at least {FEWEST_PAIRS} pairs")
    store = PairStore((args.netinfo or NETINFO / space.name) / args.prepare)
    made_by: dict[str, Any] = {"seed": args.seed, "recalibration_batches": recipe.recalibration_batches}
    if quantized:
        made_by["finetune"] = asdict(recipe.pair_finetune)
    gather = gather_quantized if quantized else gather_float
    gather(supernet, splits, recipe, store, store.open(space, made_by), n_pairs, args.seed, device)
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
    target = folder.acc_quant if quantized else folder.acc
    facts = {
        "data": {"pairs": str(store.path), "n_pairs": len(genes), "seed": args.seed},
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
