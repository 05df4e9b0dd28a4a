"""The work of `train.py --space`: train the supernet of a space and write its files."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
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
from dataset import check_classes, load_splits, names_of_outputs, recorded_folder
from dataset.imagenet import image_folder_space, report_unreadable
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.networks.supernet_file import load_supernet, save_supernet
from elastic_nn.quantizers import BATCHQUANT, FLOAT, LSQ, QuantScheme, scheme_named
from elastic_nn.training.distributed import check_agreement, locked_by_first
from elastic_nn.training.inheritance import check_scheme
from elastic_nn.training.progressive_shrinking import SupernetPlan, supernet_record, train_supernet
from elastic_nn.training.recipe import with_batch_size
from elastic_nn.training.recipes import RECIPES, get_recipe, own_recipe
from elastic_nn.training.session import Execution, Session
from lut.cost_model import cost_model_from_flags
from lut.costs import why_not_priced

SCRATCH = Path("scratch")  # a start from random weights
FIRST_BITS = 4  # OQA's first quantized supernet; those of fewer bits start from one of a bit more


@dataclass(frozen=True, kw_only=True)
class SupernetRequest:
    """A supernet by the name of its space, and changes to the defaults (None: the default).

    `start_from` is the folder or file of a supernet, or `SCRATCH`.
    """

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
    recipe = get_recipe(request.recipe, space, in_float=not scheme.quantizes)
    if request.batch_size:
        recipe = with_batch_size(recipe, request.batch_size)
    folder = ModelFolder(request.out or default_folder(space, scheme))
    with locked_by_first(folder.locked(), execution) as finished:
        if finished:
            records = load_checkpoint(folder.supernet, ("records",))["records"]
            if execution.main:
                print(f"{folder.supernet} is finished: the run was killed after it was in place", file=sys.stderr)
                write_record(folder)
                folder.supernet_state.unlink(missing_ok=True)
        else:
            check_free(folder, overwrite=request.overwrite)
            start_from = start_of(request, space, scheme)
            start, origin, images = (None, {}, None) if start_from is None else load_start(start_from)
            plan = SupernetPlan(space=space, recipe=recipe, scheme=scheme, start=start)
            if execution.main and (problem := why_not_priced(space, cost_model_from_flags(None, None))):
                print(f"warning: {problem}; searches of this space will need --config or --table", file=sys.stderr)
            # Last, because drawing or listing images may take long.
            splits = load_splits(space, request.data, recipe.color_jitter, names_of_outputs(images))
            if start_from is not None:
                check_classes(splits, images, start_from)
            session = Session(splits=splits, device=device, seed=request.seed, execution=execution, progress=True)
            records = _train(request, plan, session, folder, origin)
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
    request: SupernetRequest, plan: SupernetPlan, session: Session, folder: ModelFolder, origin: Record
) -> list[Record]:
    """Train and write the files. Returns one record a phase."""
    splits, execution, space = session.splits, session.execution, plan.space
    record = supernet_record(plan, session)
    check_agreement(record, execution)
    resume = Resume(folder.supernet_state, record, "training", request.overwrite, writes=execution.main)
    if execution.main:
        print(f"space {space.name}, recipe {plan.recipe.name}, quantizers {plan.scheme.name}", file=sys.stderr)
    net, records = train_supernet(plan, session, resume, log_phase if execution.main else lambda record: None)
    if execution.main:
        report_unreadable(splits)
        facts = {"seed": request.seed, **origin, **recorded_folder(request.data)}
        with folder.locked() as lock:
            lock.publishing(folder.supernet)
            save_supernet(folder.supernet, net.cpu(), plan.recipe.name, splits.source, records=records, **facts)
        write_record(folder)
        resume.done()
    return records


def write_record(folder: ModelFolder) -> None:
    """Write `training.json`: what people want to read of `supernet.pt`, which holds all of it."""
    made = load_checkpoint(folder.supernet, ("space", "recipe", "records"))
    facts = {key: made[key] for key in ("seed", "started_from", "data") if key in made}
    record = {"space": made["space"]["name"], "recipe": made["recipe"], **facts, "phases": made["records"]}
    write_json(folder.training, record)


def usual_scheme(space: SearchSpace) -> QuantScheme:
    """The default scheme of supernets of a space."""
    if space.shared_operands:  # the bits of every convolution are chosen
        recipe = RECIPES.get(own_recipe(space) or "")
        return BATCHQUANT if recipe is None else scheme_named(recipe.supernet_quantizer)
    return FLOAT if bits_throughout(space) is None else LSQ


def default_folder(space: SearchSpace, scheme: QuantScheme) -> Path:
    """`models/SPACE`, or `models/SPACE-SCHEME` if the scheme is not the default of the space."""
    return Path("models") / (space.name if scheme == usual_scheme(space) else f"{space.name}-{scheme.name}")


def start_of(request: SupernetRequest, space: SearchSpace, scheme: QuantScheme) -> Path | None:
    """The supernet that the training starts from; None: from random weights.

    By default a quantized supernet starts from the float one of its space or, with learned steps of fewer than 4 bits,
    from that of a bit more. UserError where there is none.
    """
    check_scheme(space, scheme)
    if request.start_from == SCRATCH or (request.start_from is None and not scheme.quantizes):
        return None
    if request.start_from is not None:
        return request.start_from
    bits = bits_throughout(space)
    base = space.name.replace(suffix := f"-{bits}bit", "")
    inherits = scheme.learned_steps and bits is not None and bits < FIRST_BITS and suffix in space.name
    more = "" if bits is None or bits + 1 >= FIRST_BITS else f"-{bits + 1}bit"
    name = space.name.replace(suffix, more) if inherits else base
    folder = default_folder(replace(space, name=name), scheme if inherits else FLOAT)
    if not ModelFolder(folder).supernet.exists():
        what = "of a bit more" if inherits else "of the same space in full precision (--quantizer float)"
        raise UserError(
            f"a supernet with {scheme.name} quantizers starts from one {what}, and there is none in {folder}: train it "
            f"first, or give --start_from DIR, or --start_from {SCRATCH}"
        )
    return folder


def load_start(given: Path) -> tuple[DynamicProxylessNASNets, Record, Record | None]:
    """Load the supernet to start from, in a folder or a file.

    Also returns the record of it for the new files, and the identity of its images, if known.
    """
    file = ModelFolder(given).supernet if given.is_dir() else given
    start, origin = load_supernet(file)
    return start, {"started_from": {"file": str(file), "weights": digest(start.state_dict())}}, origin.images


def log_phase(record: Record) -> None:
    """Print one line to stderr after a phase."""
    print(f"phase {record['phase']}: loss {record['loss']:.3f}", file=sys.stderr)
