"""QFA's published form of a subnet, a gene of 176 numbers, and the FLOPs that its search counted.

QFA (Bai et al., NeurIPS 2021, arXiv 2105.08952). A published gene lists the kernel and expansion of every slot, the
depth of every stage and the resolution, then weight and activation bits: six numbers a block (expand, depthwise,
project) and two for each of the last 1x1 convolutions. The first block has no expand layer; its first two numbers are
unused.

  python -m utils.qfa exps/A           the subnet of an experiment as a published gene, and its FLOPs as published
  python -m utils.qfa genes.json       the same for a JSON list of published genes
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from apq.cli import Parser, run, table
from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import read_json
from apq.genes import canonical, cardinalities, genes_of, subnets_of, view
from apq.layers import COUNTED_BITS, SQUEEZE, layers_of
from apq.operands import BLOCK_LAYERS
from apq.presets import QFA_MBV3
from apq.search_result import read_result
from apq.space import SearchSpace
from apq.stages import make_divisible
from utils.encoding_layout import BLOCK_BITS, UNUSED, chooses_as_qfa

# Widths in the published count of FLOPs: 1.2 times those of MobileNetV3, not rounded to multiples of 8. The channels of
# the image and the classes are widened too.
COUNTED_WIDTHS = (19, 29, 48, 96, 134, 192)  # first convolution and first block, then the five stages
COUNTED_IMAGE = 4  # channels: round(3 x 1.2)
COUNTED_CLASSES = 1200


def published_of_genes(space: SearchSpace, genes: np.ndarray) -> np.ndarray:
    """(n, numbers) published genes of a gene matrix: 176 numbers a subnet of `qfa-mbv3`."""
    _check_layout(space)
    parts, bits = view(space, genes), np.array(space.operands[0].choices)
    d = [np.array(stage.depths)[gene] for stage, gene in zip(space.stages, parts.d.T, strict=True)]
    columns = [
        np.array(space.kernel_sizes)[parts.ks],
        np.array(space.ratios).astype(np.int64)[parts.e],
        np.stack(d, axis=1),
        np.array(space.resolutions)[parts.resolution][:, None],
        np.full((len(genes), UNUSED), bits[-1]),
        bits[parts.shared_bits[:, : BLOCK_BITS - UNUSED]],
        bits[parts.bits.transpose(0, 2, 1).reshape(len(genes), -1)],
        bits[parts.shared_bits[:, BLOCK_BITS - UNUSED :]],
    ]
    return np.concatenate(columns, axis=1)


def genes_of_published(space: SearchSpace, published: np.ndarray) -> np.ndarray:
    """(n, genes) canonical rows of published genes. UserError where a number is not a choice of the space."""
    _check_layout(space)
    slots, stages, of_first = len(space.slots), len(space.stages), BLOCK_BITS - UNUSED
    bits, wide = space.operands[0].choices, tuple(int(ratio) for ratio in space.ratios)
    lengths = [slots, slots, stages, 1, UNUSED, of_first, BLOCK_BITS * slots, len(space.shared_operands) - of_first]
    published = np.asarray(published)
    if published.ndim != 2 or published.shape[1] != sum(lengths):
        raise UserError(f"published genes of {space.name} have shape (n, {sum(lengths)}), not {published.shape}")
    ks, e, d, resolution, unused, first, of_slots, last = np.split(published, np.cumsum(lengths)[:-1], axis=1)
    genes = np.zeros((len(published), len(cardinalities(space))), dtype=np.int64)
    parts = view(space, genes)
    parts.ks[:] = _indices("kernel", ks, space.kernel_sizes)
    parts.e[:] = _indices("expansion", e, wide)
    for i, stage in enumerate(space.stages):
        parts.d[:, i] = _indices("depth", d[:, i], stage.depths)
    parts.resolution[:] = _indices("resolution", resolution[:, 0], space.resolutions)
    _indices("number of bits", unused, bits)
    parts.bits[:] = _indices("number of bits", of_slots, bits).reshape(-1, slots, BLOCK_BITS).transpose(0, 2, 1)
    parts.shared_bits[:] = _indices("number of bits", np.concatenate([first, last], axis=1), bits)
    return canonical(space, genes)


def published_flops(published: np.ndarray) -> np.ndarray:
    """(n,) float64 FLOPs, in 8-bit equivalents, that the published search counted for published genes `(n, 176)`.

    They are not the MACs of the network (sums over `layers_of`): widths are not rounded to multiples of 8, the image
    and the classes are widened too, BatchNorm adds two operations an output, and odd sides are halved downwards except
    in depthwise layers. A layer counts times w x a / 64, where bits above 8 count as 8.
    """
    space, roles = QFA_MBV3, len(BLOCK_LAYERS)
    slots, ends = len(space.slots), [len(space.slots), 2 * len(space.slots), 2 * len(space.slots) + len(space.stages)]
    ks, e, d, rest = np.split(np.asarray(published, dtype=np.int64), ends, axis=1)
    runs = space.runs(d)  # (n, slots)
    counted = np.minimum(rest[:, 1:], COUNTED_BITS).reshape(len(rest), -1, 2)
    share = counted.prod(axis=2) / COUNTED_BITS**2  # (n, layers): three of the first block, of every slot, two last
    of_slots = share[:, roles:-2].reshape(len(rest), slots, roles)
    stem, last = COUNTED_WIDTHS[0], COUNTED_WIDTHS[-1]
    side = rest[:, 0] // 2  # (n,)

    total = (COUNTED_IMAGE * 3**2 + 2) * stem * side**2.0  # first convolution, in full
    total += stem * (3**2 + 2) * side**2 * share[:, 1] + stem * (stem + 2) * side**2 * share[:, 2]
    for i, slot in enumerate(space.slots):
        stage = space.stages[slot.stage]
        c_in, c_out = COUNTED_WIDTHS[slot.stage + (slot.position > 0)], COUNTED_WIDTHS[slot.stage + 1]
        mid, larger, smaller = c_in * e[:, i], -(-side // slot.stride), side // slot.stride
        expand = mid * (c_in + 2) * side**2
        depthwise = mid * (ks[:, i] ** 2 + 2) * larger**2
        if stage.squeeze:
            inside = make_divisible(mid // SQUEEZE)
            depthwise = depthwise + 2 * mid * inside + mid + inside
        project = c_out * (mid + 2) * smaller**2
        lost = c_out * (mid + 2) * (larger**2 - smaller**2)  # in the published total of a block, but in no layer
        block = expand * of_slots[:, i, 0] + depthwise * of_slots[:, i, 1] + project * of_slots[:, i, 2] + lost
        total += np.where(runs[:, i], block, 0)
        side = smaller
    total += space.head_width * (last + 2) * side**2 * share[:, -2]
    total += (space.pooled_width * space.head_width + 2 * space.pooled_width) * share[:, -1]
    return total + space.pooled_width * COUNTED_CLASSES


def _indices(what: str, values: np.ndarray, choices: tuple[int, ...]) -> np.ndarray:
    indices = np.searchsorted(choices, values).clip(max=len(choices) - 1)
    if len(wrong := values[np.array(choices)[indices] != values]):
        raise UserError(f"published gene: {what} {wrong[0]} is not among {choices}")
    return indices


def _check_layout(space: SearchSpace) -> None:
    if not chooses_as_qfa(space):
        raise UserError(f"space {space.name} does not choose the bits of every convolution, as QFA does")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python -m utils.qfa")
    parser.add_argument("source", type=Path, help="folder of an experiment of qfa-mbv3, or a JSON list of genes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    genes = _genes_at(args.source)
    subnets = subnets_of(QFA_MBV3, genes)
    published = published_of_genes(QFA_MBV3, genes)
    macs = [sum(layer.macs for layer in layers_of(QFA_MBV3, subnet)) for subnet in subnets]
    counted = published_flops(published)
    if args.json:
        print(json.dumps({"genes": published.tolist(), "macs": macs, "published_flops": counted.tolist()}))
        return
    rows = [
        (f"{m / 1e6:.3f}", f"{c / 1e6:.3f}", f"{c * COUNTED_BITS**2 / 1e9:.3f}")
        for m, c in zip(macs, counted, strict=True)
    ]
    print(table([("MACs, M", "FLOPs as published, M", "BitOps as published, G"), *rows]))
    for gene in published.tolist():
        print(" ".join(map(str, gene)))


def _genes_at(source: Path) -> np.ndarray:
    if source.is_dir():
        found = read_result(Experiment(source)).found_subnet
        if found.space != QFA_MBV3:
            raise UserError(f"{source} is of space {found.space.name}, not of {QFA_MBV3.name}")
        return genes_of(found.space, [found.subnet])
    rows = read_json(source)
    if not (isinstance(rows, list) and all(isinstance(row, list) and _whole(row) for row in rows)):
        raise UserError(f"{source} must hold a list of lists of whole numbers")
    if len({len(row) for row in rows}) != 1:
        raise UserError(f"{source} must hold genes of one length")
    return genes_of_published(QFA_MBV3, np.array(rows))


def _whole(row: list[object]) -> bool:
    return all(isinstance(number, int) and not isinstance(number, bool) for number in row)


if __name__ == "__main__":
    run(main, "python -m utils.qfa", alone=True)
