"""Top-1 of the same random architectures in several supernets: cut out, recalibrated, not trained.

The measurements are kept as pairs, in a folder for each group of architectures and each supernet, so that a killed run
continues, and further supernets or more architectures are added to what there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from apq.bit_widths import same_architectures
from apq.checkpoint import digest
from apq.errors import UserError
from apq.files import Record, check_writable
from apq.genes import subnets_of
from apq.model_folder import ModelFolder
from apq.space import SearchSpace
from dataset import check_classes, image_folder, load_splits, names_of_outputs
from dataset.imagenet import report_unreadable
from dataset.pairs import NETINFO, PairStore
from dataset.splits import Splits
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.networks.supernet_file import load_supernet
from elastic_nn.training.missing_pairs import gather_missing
from elastic_nn.training.pairs import subnet_top1
from elastic_nn.training.progress import Progress
from elastic_nn.training.recipes import get_recipe
from elastic_nn.training.session import Execution, Session
from lut.population import PopulationCost
from report.architectures import Architectures, Group, draw, in_space


@dataclass(frozen=True, kw_only=True)
class Supernets:
    """Supernets of the same architectures by name, and how they are measured.

    `recalibration_images` are those of the first one's recipe. Measurements are kept in `folder`.
    """

    nets: dict[str, DynamicProxylessNASNets]
    splits: Splits
    recalibration_images: int
    folder: Path

    @property
    def space(self) -> SearchSpace:
        """The space of the first one, in which architectures are drawn."""
        return next(iter(self.nets.values())).space

    @property
    def floats(self) -> list[str]:
        """The names of those in full precision."""
        return [name for name, net in self.nets.items() if not net.scheme.quantizes]


def load_supernets(
    folders: Sequence[Path], *, data: Path | None = None, recipe: str | None = None, netinfo: Path | None = None
) -> Supernets:
    """The supernets in folders of models. UserError where they, or the images, do not fit together.

    By default measurements are kept in dataset/NetInfo/SPACE, of the first one's space. The images come last, because
    drawing or listing them may take long.
    """
    names = [folder.resolve().name for folder in folders]
    if len(folders) < 2 or len(set(names)) < len(names):
        raise UserError("give the folders of two supernets or more, with distinct names, to --supernets")
    files = {name: ModelFolder(folder).supernet for name, folder in zip(names, folders, strict=True)}
    found = {name: load_supernet(file) for name, file in files.items()}
    nets = {name: net for name, (net, _) in found.items()}
    first, (net, origin) = next(iter(found.items()))
    for name, (other, _) in found.items():
        if not same_architectures(net.space, other.space):
            raise UserError(f"the supernets {first} and {name} have other architectures: they cannot be compared")
    folder = netinfo or NETINFO / net.space.name
    check_writable(folder)
    n_images = get_recipe(recipe or origin.recipe, net.space).recalibration_images
    images = image_folder(data, *(origin.data for _, origin in found.values()))
    splits = load_splits(net.space, images, outputs=names_of_outputs(origin.images))
    for name, (_, origin) in found.items():
        check_classes(splits, origin.images, files[name])
    return Supernets(nets=nets, splits=splits, recalibration_images=n_images, folder=folder)


def measure(
    supernets: Supernets, group: Group, n: int, *, seed: int, device: torch.device, execution: Execution
) -> Architectures:
    """Measure `n` random architectures of a group in every supernet, those that are not measured yet.

    Each process measures its part.
    """
    session = Session(splits=supernets.splits, device=device, seed=seed, execution=execution)
    genes = draw(supernets.space, group, n, seed)
    top1 = {name: _top1_in(supernets, name, group, genes, session) for name in supernets.nets}
    if execution.main:
        report_unreadable(supernets.splits)
    return Architectures(
        group=group.name,
        depths=np.array([subnet.d for subnet in subnets_of(supernets.space, genes)]),
        flops=PopulationCost(supernets.space, "flops").predict(genes),
        top1=top1,
    )


def _top1_in(supernets: Supernets, name: str, group: Group, genes: np.ndarray, session: Session) -> np.ndarray:
    """(n,) top-1 of architectures (n, genes) in one supernet, on the validation images."""
    net, execution, alone = supernets.nets[name], session.execution, session.alone()
    own = in_space(genes, supernets.space, net.space)
    subnets = subnets_of(net.space, own)
    store = PairStore(supernets.folder / group.name / name, execution.rank)
    made_by: Record = {
        "group": group.name,
        "seed": session.seed,
        "recalibration_images": supernets.recalibration_images,
        "supernet": digest(net.state_dict()),
        "images": supernets.splits.source,
    }

    def measure_own(indices: Sequence[int], done: int) -> None:
        net.to(session.device)
        # By resolution, because loaders with worker processes are kept for the latest few resolutions only.
        order = sorted(indices, key=lambda i: subnets[i].resolution)
        what, total = f"{group.name} in {name}", done + len(order)
        for i in Progress(order, what, total, done=done, unit="subnet", shown=execution.main):
            top1 = subnet_top1(net, subnets[i], alone, alone.splits.val, supernets.recalibration_images)
            store.append(net.space, i, subnets[i], top1)

    gather_missing(store, net.space, made_by, len(genes), execution, measure_own)
    measured, top1 = store.load(net.space, len(genes))
    if not np.array_equal(measured, own):
        raise UserError(f"{store.path} holds other architectures; remove it, or give another folder with --netinfo")
    return top1
