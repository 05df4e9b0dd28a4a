"""The work of `quant_aware.py`: finetune the result of a search."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from apq.checkpoint import digest, load_checkpoint
from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import Record, write_json
from apq.policy import policy_to_dict
from apq.resume import Resume
from apq.search_result import PolicyChoice, SearchResult, read_result
from apq.subnet import spec_of
from dataset import check_classes, image_folder, load_splits, names_of_outputs, recorded_folder
from dataset.imagenet import report_unreadable
from dataset.splits import Splits
from elastic_nn.networks.model_file import load_model
from elastic_nn.networks.policy_file import save_policy_model
from elastic_nn.networks.subnet_file import save_subnet
from elastic_nn.training.distributed import check_agreement, locked_by_first
from elastic_nn.training.finetune import finetune
from elastic_nn.training.found_subnet import load_found
from elastic_nn.training.policies import quantized_model
from elastic_nn.training.recipe import Recipe, TrainConfig, adjusted
from elastic_nn.training.recipes import get_recipe
from elastic_nn.training.session import Execution, Session


@dataclass(frozen=True, kw_only=True)
class FinetuneRequest:
    """An experiment to finetune, and changes to the defaults (None: the default)."""

    experiment: Experiment
    supernet: Path | None = None
    data: Path | None = None
    recipe: str | None = None
    quantizer: str | None = None
    epochs: int | None = None
    lr: float | None = None
    batch_size: int | None = None
    overwrite: bool = False
    compiled: bool = False
    seed: int = 0

    def config(self, recipe: Recipe) -> TrainConfig:
        """The recipe's finetune with the requested changes."""
        return adjusted(recipe.finetune, epochs=self.epochs, lr=self.lr, batch_size=self.batch_size)


@dataclass(frozen=True, kw_only=True)
class FinetunePlan:
    """A calibrated network and how it is finetuned.

    `data` is the folder of the images (None: no folder), `origin` what it was made from, as plain data. `per_process`
    is a fact of its quantizers (`QuantScheme`). `save(path, state=..., **facts)` writes weights with facts about them.
    """

    net: nn.Module
    side: int
    splits: Splits
    data: Path | None
    train: TrainConfig
    origin: Record
    save: Callable[..., None]
    per_process: bool = False


def finetune_experiment(request: FinetuneRequest, device: torch.device, execution: Execution) -> tuple[float, int]:
    """Finetune and write the best weights. Returns their validation top-1 (0 to 1) and the number of epochs.

    No other run can write the experiment meanwhile; UserError names the process of one that does.
    """
    experiment = request.experiment
    with locked_by_first(experiment.locked(), execution) as finished:
        if finished:
            print(f"{experiment.path} is finetuned: the run was killed after its result was in place", file=sys.stderr)
            made = load_checkpoint(experiment.best_checkpoint, ("val_top1", "train"))
            return made["val_top1"], made["train"]["epochs"]
        return _finetune(request, device, execution)


def _finetune(request: FinetuneRequest, device: torch.device, execution: Execution) -> tuple[float, int]:
    experiment = request.experiment
    if experiment.acc.exists() and not request.overwrite:
        raise UserError(f"{experiment.path} already has weights, from a finetune or from its search; give --overwrite")
    torch.manual_seed(request.seed)
    result = read_result(experiment)
    if execution.main:
        experiment.check_own(guests=True)
    of_policy = isinstance(result.choice, PolicyChoice)
    plan = policy_plan(request, result, device) if of_policy else subnet_plan(request, device)
    session = Session(splits=plan.splits, device=device, seed=request.seed, execution=execution, progress=True)
    record = finetune_record(plan, session, compiled=request.compiled)
    check_agreement(record, execution)
    resume = Resume(experiment.last_checkpoint, record, "finetune", request.overwrite, writes=execution.main)
    if request.compiled:
        plan.net.compile()
    top1, weights = finetune(plan.net, session, plan.train, side=plan.side, resume=resume)
    if execution.main:
        report_unreadable(plan.splits)
        facts = {"train": asdict(plan.train), "seed": request.seed, "val_top1": top1}
        facts |= recorded_folder(plan.data)
        with experiment.edited() as new:
            new.drop_exported()
            plan.save(new.best_checkpoint, state=weights, images=plan.splits.source, **facts)
            write_json(new.acc, [top1])
            new.last_checkpoint.unlink(missing_ok=True)  # the state goes when the result is in place
    return top1, plan.train.epochs


def finetune_record(plan: FinetunePlan, session: Session, *, compiled: bool) -> Record:
    """All that the finetuned network depends on, as plain data."""
    return {
        **plan.origin,
        "train": asdict(plan.train),
        "seed": session.seed,
        "images": plan.splits.source,
        "execution": session.execution.record(per_process=plan.per_process),
        "compile": compiled,
    }


def subnet_plan(request: FinetuneRequest, device: torch.device) -> FinetunePlan:
    """A found subnet, cut out of its supernet and calibrated."""
    experiment = request.experiment
    given = {name: getattr(request, name) for name in ("supernet", "data", "recipe", "quantizer")}
    found = load_found(experiment, **given)
    space, subnet, weights = found.space, found.subnet, digest(found.supernet.state_dict())
    return FinetunePlan(
        net=found.network(device),
        side=subnet.resolution,
        splits=found.splits,
        data=found.data,
        train=request.config(found.recipe),
        origin={
            "subnet": spec_of(space, subnet),
            "recalibration_images": found.recipe.recalibration_images,
            "supernet": weights,
            "quantizer": found.supernet.scheme.name,
        },
        save=partial(save_subnet, space=space, subnet=subnet, scheme=found.supernet.scheme),
        per_process=found.supernet.scheme.per_process,
    )


def policy_plan(request: FinetuneRequest, result: SearchResult, device: torch.device) -> FinetunePlan:
    """The float network of an experiment, quantized by its policy and calibrated."""
    experiment = request.experiment
    if request.supernet is not None:
        raise UserError(f"{experiment.path} has its own float network: leave --supernet out")
    if request.quantizer is not None:
        raise UserError(f"{experiment.path} has the quantizer of its policy: leave --quantizer out")
    choice = result.found_policy
    policy, layers = choice.policy, choice.layers
    net, spec, images = load_model(experiment.model)
    recipe = get_recipe(request.recipe or choice.recipe, spec)
    data = image_folder(request.data, result.settings.get("data"))
    train = request.config(recipe)
    splits = load_splits(spec, data, recipe.color_jitter, names_of_outputs(images))
    check_classes(splits, images, experiment.model)
    weights = digest(net.state_dict())
    pruned = bool(result.settings.get("search", {}).get("is_pruned"))
    images_of_norms = recipe.recalibration_images
    signed = quantized_model(net, policy, splits, spec.resolution, images_of_norms, device, pruned=pruned)
    return FinetunePlan(
        net=net,
        side=spec.resolution,
        splits=splits,
        data=data,
        train=train,
        origin={
            "policy": policy_to_dict(policy, layers),
            "recalibration_images": images_of_norms,
            "model": weights,
            "pruned": pruned,
        },
        save=partial(save_policy_model, spec=spec, policy=policy, layers=layers, signed=signed),
    )
