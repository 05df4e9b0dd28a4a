"""The work of `train.py --space`: train the supernet of a space and write its files."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from apq.bit_widths import bits_throughout
from apq.checkpoint import digest, load_checkpoint
from apq.errors import UserError
from apq.files import Record, check_writable, read_json, write_json
from apq.model_folder import ModelFolder
from apq.presets import get_space
from apq.resume import Resume
from apq.space import SearchSpace
from dataset import check_classes, load_splits
from dataset.imagenet import image_folder_space, report_unreadable
from dataset.splits import Splits
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.networks.supernet_file import load_supernet, save_supernet
from elastic_nn.quantizers import BATCHQUANT, FLOAT, LSQ, QuantScheme, scheme_named
from elastic_nn.training.distributed import check_agreement, locked_by_first
from elastic_nn.training.progressive_shrinking import SupernetPlan, supernet_record, train_supernet
from elastic_nn.training.recipe import with_batch_size
from elastic_nn.training.recipes import get_recipe
from elastic_nn.training.session import Execution, Session


@dataclass(frozen=True, kw_only=True)
class SupernetRequest:
    """A supernet by the name of its space, and changes to the defaults (None: the default)."""

    space: str
    data: Path | None = None
    recipe: str | None = None
    quantizer: str | None = None
    start_from: Path | None = None
    batch_size: int | None = None
    out: Path | None = None
    overwrite: bool = False
    seed: int = 0


def train_space(request: SupernetRequest, device: torch.device, execution: Execution) -> tuple[Path, list[Record]]:
    """Train the supernet, write its file and `training.json`. Returns the file and one record a phase.

    No other run can write their folder meanwhile; UserError names the process of one that does.
    """
    space = get_space(request.space)
    if request.data:
        space = image_folder_space(space, request.data)
    scheme = usual_scheme(space) if request.quantizer is None else scheme_named(request.quantizer)
    folder = ModelFolder(request.out or default_folder(space, scheme))
    with locked_by_first(folder.locked(), execution) as finished:
        if finished:
            records = load_checkpoint(folder.supernet, ("records",))["records"]
            if execution.main:
                print(f"{folder.supernet} is finished: the run was killed after it was in place", file=sys.stderr)
                folder.supernet_state.unlink(missing_ok=True)
        else:
            check_free(folder, overwrite=request.overwrite)
            records = _train(
                request,
                space,
                scheme,
                Session(
                    splits=load_splits(space, request.data),
                    device=device,
                    seed=request.seed,
                    execution=execution,
                    progress=True,
                ),
                folder,
            )
    return folder.supernet, records


def check_free(folder: ModelFolder, *, overwrite: bool) -> None:
    """UserError if the folder has a supernet that may not be replaced, a `training.json` of others, or is read-only."""
    if folder.supernet.exists() and not overwrite:
        raise UserError(f"{folder.supernet} exists; choose another --out or give --overwrite")
    if folder.training.exists():
        record = read_json(folder.training)
        if not (isinstance(record, dict) and {"space", "recipe", "phases"} <= record.keys()):
            raise UserError(f"{folder.training} exists, and no training wrote it: choose another --out")
    check_writable(folder.path)


def _train(
    request: SupernetRequest, space: SearchSpace, scheme: QuantScheme, session: Session, folder: ModelFolder
) -> list[Record]:
    """Train and write the files. Returns one record a phase."""
    splits, execution = session.splits, session.execution
    recipe = get_recipe(request.recipe, space, in_float=not scheme.quantizes)
    if request.batch_size:
        recipe = with_batch_size(recipe, request.batch_size)
    start, origin = (None, {}) if request.start_from is None else load_start(request.start_from, splits)
    plan = SupernetPlan(space=space, recipe=recipe, scheme=scheme, start=start)
    record = supernet_record(plan, session)
    check_agreement(record, execution)
    resume = Resume(folder.supernet_state, record, "training", request.overwrite, writes=execution.main)
    if execution.main:
        print(f"space {space.name}, recipe {recipe.name}, quantizers {scheme.name}", file=sys.stderr)
    net, records = train_supernet(plan, session, resume, log_phase if execution.main else lambda record: None)
    if execution.main:
        report_unreadable(splits)
        facts = {"seed": request.seed, **origin}
        write_json(folder.training, {"space": space.name, "recipe": recipe.name, **facts, "phases": records})
        with folder.locked() as lock:
            # The supernet comes last: where it exists, all is complete.
            lock.publishing(folder.supernet)
            save_supernet(folder.supernet, net.cpu(), recipe.name, splits.source, records=records, **facts)
        resume.done()
    return records


def usual_scheme(space: SearchSpace) -> QuantScheme:
    """The default scheme of supernets of a space."""
    if space.shared_operands:  # the bits of every convolution are chosen
        return BATCHQUANT
    return FLOAT if bits_throughout(space) is None else LSQ


def default_folder(space: SearchSpace, scheme: QuantScheme) -> Path:
    """`models/SPACE`, or `models/SPACE-SCHEME` if the scheme is not the default of the space."""
    return Path("models") / (space.name if scheme == usual_scheme(space) else f"{space.name}-{scheme.name}")


def load_start(given: Path, splits: Splits) -> tuple[DynamicProxylessNASNets, Record]:
    """Load the supernet to start from, in a folder or a file. Also returns the record of it for the new files."""
    file = ModelFolder(given).supernet if given.is_dir() else given
    start, origin = load_supernet(file)
    check_classes(splits, origin.images, file)
    return start, {"started_from": {"file": str(file), "weights": digest(start.state_dict())}}


def log_phase(record: Record) -> None:
    """Print one line to stderr after a phase."""
    print(f"phase {record['phase']}: loss {record['loss']:.3f}", file=sys.stderr)
