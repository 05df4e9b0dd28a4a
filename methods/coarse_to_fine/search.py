"""The work of `search.py --mode coarse_to_fine`: measure, choose, record, print."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from apq.checkpoint import digest
from apq.cli import listing, table
from apq.device import resolve_device
from apq.errors import UserError
from apq.experiment import Experiment, get_experiment
from apq.files import write_json
from apq.genes import genes_of, largest_subnet, subnets_of
from apq.layers import COUNTED_BITS
from apq.model_folder import ModelFolder
from apq.space import SearchSpace, space_to_dict
from apq.subnet import Subnet, shown_spec, spec_of
from dataset import check_classes, load_splits
from dataset.imagenet import tell_unreadable
from elastic_nn.networks.subnet_file import save_subnet
from elastic_nn.networks.supernet_file import load_quantized_supernet
from elastic_nn.training.distributed import check_agreement, processes, wait
from elastic_nn.training.recipes import get_recipe
from lut.cost_model import CostModel, cost_model_from_flags
from lut.costs import by_scope, cost_rows, network_costs
from lut.population import PopulationCost
from methods.coarse_to_fine.evaluated import EvaluatedStore, record_of, write_records
from methods.coarse_to_fine.finder import STAGES, CoarseToFineConfig, Measured, coarse_to_fine
from methods.coarse_to_fine.measurement import Measurement, measure, open_store
from methods.search.budget import Budget, check_reachable
from report.plots import plot_front


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The choice among measured subnets: the most accurate one whose cost is at most `limit`, if there is a limit."""

    cost: PopulationCost
    limit: float | None

    def __post_init__(self) -> None:
        if self.limit is not None:
            budget = Budget(cost=self.cost.predict, limit=self.limit, unit=self.cost.unit)
            check_reachable(self.cost.space, budget, self.cost.cheapest_genes())

    def __str__(self) -> str:
        return "" if self.limit is None else f" for {self.cost.quantity} <= {self.limit:g} {self.cost.unit}"

    def pick(self, found: Measured) -> tuple[int, float]:
        """Index and cost of the chosen subnet, the cheapest of equally accurate ones. UserError where none fits."""
        costs = self.cost.predict(found.genes)
        fits = np.flatnonzero(costs <= (np.inf if self.limit is None else self.limit))
        if not len(fits):
            raise UserError(
                f"the budget of {self.limit:g} {self.cost.unit} is below the cheapest measured subnet, "
                f"which needs {costs.min():.6g} {self.cost.unit}; they are kept: give another --constraint"
            )
        best = fits[np.lexsort((costs[fits], -found.top1[fits]))[0]]
        return int(best), float(costs[best])


def search(args: argparse.Namespace) -> None:
    """Measure what is missing, on all processes; choose, record and print, on one.

    A finished search is chosen from again, without measuring, by the same command with another --constraint or --type.
    """
    experiment, device = get_experiment(args.exp_name, args.exp_dir), resolve_device(args.device)
    folder = ModelFolder(args.acc_predictor_dir)
    supernet, origin = load_quantized_supernet(folder.supernet)
    space = supernet.space
    recipe, splits = get_recipe(args.recipe or origin.recipe, space), load_splits(space, args.data)
    check_classes(splits, origin.images, folder.supernet)
    cost_model, scope = cost_model_from_flags(args.config, args.table), args.scope or space.budget_scope
    flops, config = PopulationCost(space, "flops"), search_config(args, space)
    choice = Choice(
        cost=PopulationCost(space, args.type, cost_model, scope),
        limit=args.constraint,
    )
    asked = {
        "space": space_to_dict(space),
        "coarse_to_fine": asdict(config),
        "recalibration_images": recipe.recalibration_images,
        "supernet": digest(supernet.state_dict()),
        "images": splits.source,
    }
    measurement = Measurement(
        supernet=supernet.to(device),
        splits=splits,
        recalibration_images=recipe.recalibration_images,
        device=device,
    )
    with processes(device) as execution:
        check_agreement(asked, execution)
        store = EvaluatedStore(experiment.path, execution.rank, lenient=args.overwrite)
        continued = open_store(experiment, store, asked, overwrite=args.overwrite)
        wait(execution)  # nobody writes before all have looked

        def evaluate_stage(stage: str, genes: np.ndarray) -> np.ndarray:
            if stage == STAGES[0] and not continued and execution.main:
                store.start(asked)
            wait(execution)
            return measure(measurement, store, stage, genes, flops.predict(genes), execution)

        found = coarse_to_fine(space, config, flops.predict, evaluate_stage)
        if not execution.main:
            return
    tell_unreadable(splits)
    best, cost = choice.pick(found)
    settings = {
        "mode": "coarse_to_fine",
        "space": asked["space"],
        "acc_predictor_dir": str(args.acc_predictor_dir),
        "constraint": args.constraint,
        "type": choice.cost.quantity,
        "unit": choice.cost.unit,
        "scope": scope,
        "coarse_to_fine": asdict(config),
        "recalibration_images": recipe.recalibration_images,
        "top1": float(found.top1[best]),
        **cost_model.record(),
    }
    record(experiment, measurement, found, asked, settings, best, cost)
    report(args.json, experiment, space, found, settings, (best, cost), choice, cost_model)


def search_config(args: argparse.Namespace, space: SearchSpace) -> CoarseToFineConfig:
    """The settings that the flags give; the range of FLOPs defaults to the space's."""
    flops, largest = PopulationCost(space, "flops"), genes_of(space, [largest_subnet(space)])
    return CoarseToFineConfig(
        flops_min=flops.cheapest()[0] if args.flops_min is None else args.flops_min,
        flops_max=float(flops.predict(largest)[0]) if args.flops_max is None else args.flops_max,
        n_coarse=args.n_coarse,
        intervals=args.intervals,
        n_fine=args.n_fine,
        kernel_prob=args.kernel_prob,
        seed=args.seed,
    )


def record(
    experiment: Experiment,
    measurement: Measurement,
    found: Measured,
    asked: dict[str, Any],
    settings: dict[str, Any],
    best: int,
    cost: float,
) -> None:
    """Write the experiment: what was measured, the front, and the chosen subnet with its weights, untrained."""
    space = measurement.supernet.space
    subnets = subnets_of(space, found.genes)
    records = [
        record_of(space, *found.stage_of(i), subnet, float(found.flops[i]), float(found.top1[i]))
        for i, subnet in enumerate(subnets)
    ]
    net = measurement.network(subnets[best])
    state = {key: tensor.cpu() for key, tensor in net.state_dict().items()}
    with experiment.replaced() as new:
        write_json(EvaluatedStore(new.path).asked_file, asked)
        write_records(new.evaluated, records)
        write_json(new.front, front_records(space, found, subnets))
        plot_front(found.flops, found.top1, found.n_coarse, found.coarse_front(), found.front(), new.front_plot)
        facts = {"train": None, "seed": asked["coarse_to_fine"]["seed"], "val_top1": settings["top1"]}
        images = measurement.splits.source
        save_subnet(new.best_checkpoint, space, subnets[best], state, images=images, scheme=net.scheme, **facts)
        write_json(new.acc, [settings["top1"]])
        new.save_found(space, subnets[best], cost, settings, history_of(found))


def front_records(space: SearchSpace, found: Measured, subnets: list[Subnet]) -> list[dict[str, Any]]:
    """The front as plain data, by ascending FLOPs."""
    front = found.front()
    bitops = PopulationCost(space, "bitops").predict(found.genes[front])
    return [
        {
            "flops": int(found.flops[i]),
            "weighted_flops": float(b) / COUNTED_BITS**2,
            "bitops": int(b),
            "top1": float(found.top1[i]),
            **spec_of(space, subnets[i]),
        }
        for i, b in zip(front.tolist(), bitops.tolist(), strict=True)
    ]


def history_of(found: Measured) -> list[dict[str, Any]]:
    """One record a stage: subnets so far, the best of them, the size of their front."""
    ends = {"coarse": (found.n_coarse, found.coarse_front()), "fine": (len(found.genes), found.front())}
    return [
        {"stage": stage, "subnets": n, "best_accuracy": float(found.top1[:n].max()), "front": len(front)}
        for stage, (n, front) in ends.items()
    ]


def report(
    as_json: bool,
    experiment: Experiment,
    space: SearchSpace,
    found: Measured,
    settings: dict[str, Any],
    chosen: tuple[int, float],
    choice: Choice,
    cost_model: CostModel,
) -> None:
    """Print the front, the chosen subnet and its costs."""
    best, cost = chosen
    (subnet,) = subnets_of(space, found.genes[best : best + 1])
    costs, spec, front = network_costs(space, subnet, cost_model), spec_of(space, subnet), found.front()
    counts = dict(zip(STAGES, (found.n_coarse, len(found.genes) - found.n_coarse), strict=True))
    if as_json:
        shown = {key: settings[key] for key in ("constraint", "type", "unit", "scope", "top1")}
        network = {"costs": {scope: asdict(cost) for scope, cost in costs.items()}, "subnet": spec}
        facts = {"measured": counts, "front": len(front), "cost": cost, "priced_by": str(cost_model)}
        print(json.dumps({"exp_dir": str(experiment.path), "space": space.name, **shown, **facts, **network}))
        return
    print(f"{experiment.path}: {counts['coarse']} coarse and {counts['fine']} fine subnets of space {space.name}")
    rows = [
        (f"{found.flops[i] / 1e6:.3f}", f"{found.top1[i]:.2%}", found.stage_of(i)[0], "<-" if i == best else "")
        for i in front.tolist()
    ]
    print(table([("front: MACs, M", "top-1", "stage", ""), *rows]))
    print(f"best subnet{choice}:")
    print(listing(shown_spec(space, spec)))
    print(
        f"top-1 {settings['top1']:.2%} on images held out of training, without finetune; "
        f"{choice.cost.quantity} {cost:g} {choice.cost.unit} ({settings['scope']} scope)"
    )
    print(table(cost_rows(by_scope(costs))))
    print(f"latency and energy: {cost_model}")
