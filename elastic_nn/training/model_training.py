"""The work of `train.py --model`: train a network by name and write its file."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from apq.checkpoint import load_checkpoint
from apq.errors import UserError
from apq.files import Record, check_writable
from apq.model import ModelSpec, model_to_dict
from apq.model_folder import ModelFolder
from apq.presets import APQ_IMAGENET
from apq.resume import Resume
from dataset import load_splits, recorded_folder
from dataset.imagenet import image_folder_model, report_unreadable
from elastic_nn.networks.model_file import save_model
from elastic_nn.networks.named_models import build_model, named_model
from elastic_nn.training.distributed import check_agreement, locked_by_first
from elastic_nn.training.finetune import finetune
from elastic_nn.training.recipe import Recipe, TrainConfig, adjusted
from elastic_nn.training.recipes import get_recipe
from elastic_nn.training.session import Execution, Session


@dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """A network by name, its data set, and changes to the defaults (None: the default)."""

    name: str
    images: str | None = None
    data: Path | None = None
    recipe: str | None = None
    epochs: int | None = None
    lr: float | None = None
    batch_size: int | None = None
    out: Path | None = None
    overwrite: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """The file of a trained network, its best validation top-1 (0 to 1), its number of epochs."""

    file: Path
    top1: float
    epochs: int


def train_model(request: ModelRequest, device: torch.device, execution: Execution) -> TrainedModel:
    """Train the network and write its file. No other run can write its folder meanwhile.

    UserError names the process of one that does.
    """
    plan = model_plan(request)
    folder = ModelFolder(request.out or Path("models") / request.name)
    with locked_by_first(folder.locked(), execution) as finished:
        if finished:
            top1 = load_checkpoint(folder.model, ("val_top1",))["val_top1"]
            if execution.main:
                print(f"{folder.model} is finished: the run was killed after it was in place", file=sys.stderr)
                folder.model_state.unlink(missing_ok=True)
        else:
            top1 = _train(request, plan, folder, device, execution)
    return TrainedModel(file=folder.model, top1=top1, epochs=plan[2].epochs)


def _train(
    request: ModelRequest,
    plan: tuple[ModelSpec, Recipe, TrainConfig],
    folder: ModelFolder,
    device: torch.device,
    execution: Execution,
) -> float:
    """Train and write the file. Returns the best validation top-1."""
    spec, recipe, config = plan
    if folder.model.exists() and not request.overwrite:
        raise UserError(f"{folder.model} exists; choose another --out or give --overwrite")
    torch.manual_seed(request.seed)
    net = build_model(spec).to(device)
    splits = load_splits(spec, request.data, recipe.color_jitter)
    check_writable(folder.path)
    session = Session(splits=splits, device=device, seed=request.seed, execution=execution, progress=True)
    record = model_record(spec, config, session)
    check_agreement(record, execution)
    resume = Resume(folder.model_state, record, "training", request.overwrite, writes=execution.main)
    if execution.main:
        print(f"model {spec.name}, images {spec.dataset}, recipe {recipe.name}", file=sys.stderr)
    top1, weights = finetune(net, session, config, side=spec.resolution, resume=resume)
    if execution.main:
        report_unreadable(splits)
        facts = {"recipe": recipe.name, "train": asdict(config), "seed": request.seed, "val_top1": top1}
        facts |= recorded_folder(request.data)
        with folder.locked() as lock:
            lock.publishing(folder.model)
            save_model(folder.model, spec, weights, splits.source, **facts)
        resume.done()
    return top1


def model_record(spec: ModelSpec, config: TrainConfig, session: Session) -> Record:
    """All that the trained network depends on, as plain data."""
    return {
        "model": model_to_dict(spec),
        "train": asdict(config),
        "seed": session.seed,
        "images": session.splits.source,
        "execution": session.execution.record(),
    }


def model_plan(request: ModelRequest) -> tuple[ModelSpec, Recipe, TrainConfig]:
    """The spec of the network, the recipe, and the recipe's first phase with the requested changes."""
    if request.data and request.images not in (None, "imagenet"):
        raise UserError(f"--data has its own images: leave --images {request.images} out")
    preset = named_model(request.name, "imagenet" if request.data else request.images)
    spec = image_folder_model(preset, request.data) if request.data else preset
    # As with --space, a folder with the number of classes of ImageNet has ImageNet's recipe; others have none.
    own = APQ_IMAGENET.recipe if spec == preset and spec.dataset == APQ_IMAGENET.dataset else None
    recipe = get_recipe(request.recipe or own, spec)
    config = adjusted(recipe.phases[0].train, epochs=request.epochs, lr=request.lr, batch_size=request.batch_size)
    return spec, recipe, config
