"""The work of `search.py --mode coarse_to_fine`: measure, choose, record, print."""

from __future__ import annotations

import argparse
import functools
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from apq.checkpoint import digest
from apq.device import resolve_device
from apq.errors import UserError
from apq.experiment import Experiment, get_experiment
from apq.files import Record, write_json
from apq.genes import genes_of, largest_subnet, subnets_of
from apq.layers import COUNTED_BITS
from apq.model_folder import DEFAULT_MODELS, ModelFolder
from apq.search_result import SearchResult, SubnetChoice
from apq.space import SearchSpace, space_to_dict
from apq.subnet import spec_of
from dataset import check_classes, image_folder, load_splits, names_of_outputs, recorded_folder
from dataset.imagenet import report_unreadable
from elastic_nn.networks.subnet_file import save_subnet
from elastic_nn.networks.supernet_file import load_quantized_supernet
from elastic_nn.training.distributed import check_agreement, processes, wait
from elastic_nn.training.recipes import get_recipe
from elastic_nn.training.session import Execution
from lut.cost_model import CostModel, cost_model_from_flags
from lut.costs import check_priced
from lut.population import PopulationCost
from methods.coarse_to_fine.evaluated import MODE, UNFINISHED, begun, can_continue, open_store, write_evaluated
from methods.coarse_to_fine.finder import STAGES, CoarseToFineConfig, Measured, coarse_to_fine
from methods.search.budget import Budget, check_reachable
from methods.search.evaluated import Evaluated
from methods.search.measurement import Measurement, measure
from report.plots import plot_front
from report.search_report import Heading, report_result

FRONT_PICTURE = "front.png"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Chooses the most accurate measured subnet whose cost is at most `limit` (None: of any cost).

    UserError if no subnet of the space is within the limit.
    """

    cost: PopulationCost
    limit: float | None

    def __post_init__(self) -> None:
        if self.limit is not None:
            budget = Budget(cost=self.cost.predict, limit=self.limit, unit=self.cost.unit)
            check_reachable(self.cost.space, budget, self.cost.cheapest_genes())

    def __str__(self) -> str:
        return "" if self.limit is None else f" for {self.cost.quantity} <= {self.limit:g} {self.cost.unit}"

    def pick(self, found: Measured) -> tuple[int, float]:
        """Index and cost of the chosen subnet. Of equally accurate ones it is the cheapest. UserError if none fits."""
        costs = self.cost.predict(found.genes)
        fits = np.flatnonzero(costs <= (np.inf if self.limit is None else self.limit))
        if not len(fits):
            raise UserError(
                f"the budget of {self.limit:g} {self.cost.unit} is below the cheapest measured subnet, "
                f"which needs {costs.min():.6g} {self.cost.unit}; all measurements are kept: give another --constraint"
            )
        best = fits[np.lexsort((costs[fits], -found.top1[fits]))[0]]
        return int(best), float(costs[best])


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a search works with. `models` is the folder of the supernet, `data` that of the images (None: no folder)."""

    models: Path
    measurement: Measurement
    config: CoarseToFineConfig
    choice: Choice
    cost_model: CostModel
    data: Path | None

    @property
    def space(self) -> SearchSpace:
        return self.choice.cost.space

    @property
    def settings(self) -> Record:
        """The method's own settings, as plain data."""
        return {MODE: asdict(self.config), "recalibration_images": self.measurement.recalibration_images}

    @functools.cached_property
    def asked(self) -> Record:
        """All that the measurements depend on, as plain data."""
        origin = {"supernet": digest(self.measurement.supernet.state_dict()), "images": self.measurement.splits.source}
        return {"space": space_to_dict(self.space), **self.settings, **origin}


def search(args: argparse.Namespace) -> None:
    """Measure the missing subnets in all processes; choose, record and print in the first.

    With another --constraint or --type the same command chooses again among the subnets of a finished search.
    """
    experiment = get_experiment(args.exp_name, args.exp_dir)
    task = load_task(args, experiment)
    with processes(task.measurement.device) as execution:
        found = measure_stages(experiment, task, execution, overwrite=args.overwrite)
        if not execution.main:
            return
    report_unreadable(task.measurement.splits)
    best, cost = task.choice.pick(found)
    result = result_of(task, found, best, cost)
    record(experiment, task, found, result)
    report_result(experiment, result, task.cost_model, heading_of(task, found, best), as_json=args.json)


def load_task(args: argparse.Namespace, experiment: Experiment) -> Task:
    """The supernet, images and costs that the flags name. What they leave out is as in the search that has begun."""
    device, began = resolve_device(args.device), {} if args.overwrite else begun(experiment)
    models = args.acc_predictor_dir
    if models == DEFAULT_MODELS and "models" in began:
        models = Path(began["models"])
    file = ModelFolder(models).supernet
    supernet, origin = load_quantized_supernet(file)
    space, cost_model = supernet.space, cost_model_from_flags(args.config, args.table)
    config, recipe = search_config(args, space, began), get_recipe(args.recipe or origin.recipe, space)
    check_priced(space, cost_model)
    cost = PopulationCost(space, args.type, cost_model, args.scope or space.budget_scope)
    choice = Choice(cost=cost, limit=args.constraint)
    data = image_folder(args.data, began.get("data"), origin.data)
    outputs = names_of_outputs(origin.images)
    splits = load_splits(space, data, recipe.color_jitter, outputs)  # last: drawing or listing images may take long
    check_classes(splits, origin.images, file)
    return Task(
        models=models,
        measurement=Measurement(
            supernet=supernet.to(device),
            splits=splits,
            recalibration_images=recipe.recalibration_images,
            device=device,
        ),
        config=config,
        choice=choice,
        data=data,
        cost_model=cost_model,
    )


def search_config(args: argparse.Namespace, space: SearchSpace, began: Record) -> CoarseToFineConfig:
    """The settings in the flags, else those of the search that has begun, else the defaults.

    The range of MACs defaults to that of the space.
    """
    flops, largest = PopulationCost(space, "flops"), genes_of(space, [largest_subnet(space)])
    usual = {"flops_min": flops.cheapest()[0], "flops_max": float(flops.predict(largest)[0])}
    names = [field.name for field in fields(CoarseToFineConfig)]
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if not args.seed and "seed" in began:  # 0 is the default of --seed
        del given["seed"]
    return CoarseToFineConfig(**{**usual, **{name: began[name] for name in names if name in began}, **given})


def measure_stages(experiment: Experiment, task: Task, execution: Execution, *, overwrite: bool) -> Measured:
    """Run both stages. Measurements are kept in the folder of the experiment; those that exist are not repeated."""
    check_agreement(task.asked, execution)
    if execution.main:
        experiment.check_own(guests=experiment.arch.exists() and not overwrite)
    opened = functools.partial(open_store, experiment, task.space, task.asked, rank=execution.rank, lenient=overwrite)
    store = opened()
    continued = can_continue(experiment, store, overwrite=overwrite)
    if not continued and experiment.arch.exists():  # a finished search, which stays until this one takes its place
        store = opened(stem=UNFINISHED)
        continued = can_continue(experiment, store, overwrite=overwrite)
    wait(execution)  # no process writes before all have read
    flops = PopulationCost(task.space, "flops")

    def evaluate_stage(stage: str, genes: np.ndarray) -> np.ndarray:
        if stage == STAGES[0] and not continued and execution.main:
            store.start()
        wait(execution)
        return measure(task.measurement, store, stage, genes, flops.predict(genes), execution)

    return coarse_to_fine(task.space, task.config, flops.predict, evaluate_stage)


def result_of(task: Task, found: Measured, best: int, cost: float) -> SearchResult:
    """The result that chooses row `best`, whose cost is `cost`."""
    evaluated, priced = evaluated_of(task.space, found), task.choice.cost
    return SearchResult(
        method=MODE,
        choice=SubnetChoice(space=task.space, subnet=evaluated[best].subnet, models=task.models),
        cost=cost,
        quantity=priced.quantity,
        unit=priced.unit,
        limit=task.choice.limit,
        scope=priced.scope,
        measured_top1=evaluated[best].top1,
        cost_model=task.cost_model.record(),
        settings={**task.settings, **recorded_folder(task.data)},
        history=history_of(found),
        front=front_of(task.space, found, evaluated),
    )


def evaluated_of(space: SearchSpace, found: Measured) -> list[Evaluated]:
    """The measured subnets, row by row."""
    evaluated = []
    for i, subnet in enumerate(subnets_of(space, found.genes)):
        stage, index = found.stage_of(i)
        flops, top1 = int(found.flops[i]), float(found.top1[i])
        evaluated.append(Evaluated(stage=stage, index=index, subnet=subnet, flops=flops, top1=top1))
    return evaluated


def front_of(space: SearchSpace, found: Measured, evaluated: list[Evaluated]) -> list[Record]:
    """The points of the front as plain data, by ascending MACs."""
    front = found.front()
    bitops = PopulationCost(space, "bitops").predict(found.genes[front])
    return [
        {
            "flops": evaluated[i].flops,
            "weighted_flops": float(b) / COUNTED_BITS**2,
            "bitops": int(b),
            "top1": evaluated[i].top1,
            **spec_of(space, evaluated[i].subnet),
        }
        for i, b in zip(front.tolist(), bitops.tolist(), strict=True)
    ]


def history_of(found: Measured) -> list[Record]:
    """One record a stage: the number of subnets so far, the best accuracy, the size of the front."""
    ends = {"coarse": (found.n_coarse, found.coarse_front()), "fine": (len(found.genes), found.front())}
    return [
        {"stage": stage, "subnets": n, "best_accuracy": float(found.top1[:n].max()), "front": len(front)}
        for stage, (n, front) in ends.items()
    ]


def record(experiment: Experiment, task: Task, found: Measured, result: SearchResult) -> None:
    """Write the experiment: all measurements, the front, and the chosen subnet with its weights, untrained."""
    subnet, measurement = result.found_subnet.subnet, task.measurement
    net = measurement.network(subnet)
    state = {key: tensor.cpu() for key, tensor in net.state_dict().items()}
    facts = {"train": None, "seed": task.config.seed, "val_top1": result.measured_top1, **recorded_folder(task.data)}
    with experiment.replaced() as new:
        write_evaluated(new, task.space, task.asked, evaluated_of(task.space, found))
        picture = new.path / FRONT_PICTURE
        plot_front(found.flops, found.top1, found.n_coarse, found.coarse_front(), found.front(), picture)
        images = measurement.splits.source
        save_subnet(new.best_checkpoint, task.space, subnet, state, images=images, scheme=net.scheme, **facts)
        write_json(new.acc, [result.measured_top1])
        result.write(new)


def heading_of(task: Task, found: Measured, best: int) -> Heading:
    """The front as a table, with a mark at the chosen row, and the numbers of measured subnets."""
    counts, front = {"coarse": found.n_coarse, "fine": len(found.genes) - found.n_coarse}, found.front()
    rows = [
        (f"{found.flops[i] / 1e6:.3f}", f"{found.top1[i]:.2%}", found.stage_of(i)[0], "<-" if i == best else "")
        for i in front.tolist()
    ]
    return Heading(
        title=f"{counts['coarse']} coarse and {counts['fine']} fine subnets of space {task.space.name}",
        rows=[("front: MACs, M", "top-1", "stage", ""), *rows],
        choice=f"best subnet{task.choice}:",
        measured="on images held out of training, without finetune",
        facts={"measured": counts, "front": len(front)},
    )
