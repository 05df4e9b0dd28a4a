"""The diagram of a subnet: a box for each block that runs, with its expansion, kernel size and bits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matplotlib.patches import FancyBboxPatch, Patch

from apq.operands import BLOCK_LAYERS
from apq.space import SearchSpace
from apq.subnet import Subnet
from report.plots import new_figure, write_figure

GAP = 0.6  # between stages, in boxes
TALLEST = 2.4


@dataclass(frozen=True, kw_only=True)
class Box:
    """One block: slot and stage (from 0), shape, and bits as text."""

    slot: int
    stage: int
    kernel: int
    expansion: float
    in_channels: int
    mid_channels: int
    out_channels: int
    stride: int
    bits: str

    @property
    def label(self) -> str:
        """Expansion, kernel size and bits, one line each."""
        return f"{self.expansion:g}x\n{self.kernel}x{self.kernel}\n{self.bits}"


def boxes_of(space: SearchSpace, subnet: Subnet) -> list[Box]:
    """The blocks that run, in order."""
    return [
        Box(
            slot=slot.index,
            stage=slot.stage,
            kernel=subnet.ks[slot.index],
            expansion=subnet.e[slot.index],
            in_channels=slot.in_channels,
            mid_channels=subnet.mid_channels(slot),
            out_channels=slot.out_channels,
            stride=slot.stride,
            bits=bits_in_words(space, subnet, slot.index),
        )
        for slot in subnet.running_slots(space)
    ]


def bits_in_words(space: SearchSpace, subnet: Subnet, slot: int) -> str:
    """The bits of a block as text: "W4A4" if all layers have the same, else one line a layer.

    Pointwise layers with the same bits share a line.
    """
    by_role = {
        role: "W{}A{}".format(*(subnet.bits[space.kind_of(role, operand)][slot] for operand in "wa"))
        for role in BLOCK_LAYERS
    }
    if len(set(by_role.values())) == 1:
        return by_role["expand"]
    if by_role["expand"] == by_role["project"]:
        return f"pw {by_role['expand']}\ndw {by_role['depthwise']}"
    return "\n".join(f"{role} {by_role[role]}" for role in BLOCK_LAYERS)


def draw_subnet(boxes: list[Box], resolution: int, path: Path, *, title: str = "") -> None:
    """Write a PNG of the blocks from left to right. Height shows expansion, colour kernel size, gaps stages."""
    figure = new_figure(max(4.0, 1.2 + 0.95 * (len(boxes) + GAP * boxes[-1].stage)), 3.4)
    axes = figure.subplots()
    widest, kernels = max(box.expansion for box in boxes), sorted({box.kernel for box in boxes})
    colour = {kernel: f"C{i}" for i, kernel in enumerate(kernels)}
    for i, box in enumerate(boxes):
        x, height = i + GAP * box.stage, TALLEST * (0.45 + 0.55 * box.expansion / widest)
        axes.add_patch(
            FancyBboxPatch(
                (x + 0.08, -height / 2),
                0.84,
                height,
                boxstyle="round,pad=0.02",
                facecolor=colour[box.kernel],
                alpha=0.4,
            )
        )
        axes.text(x + 0.5, 0, box.label, ha="center", va="center", fontsize=7)
        if i == 0 or boxes[i - 1].stage != box.stage:
            stride = f", stride {box.stride}" if box.stride > 1 else ""
            axes.text(x, -TALLEST / 2 - 0.2, f"{box.out_channels} ch.{stride}", va="top", fontsize=7)
    axes.set_xlim(-0.2, len(boxes) + GAP * boxes[-1].stage + 0.2)
    axes.set_ylim(-TALLEST / 2 - 0.6, TALLEST / 2 + 0.2)
    axes.set_axis_off()
    handles = [Patch(color=colour[kernel], alpha=0.4, label=f"{kernel}x{kernel}") for kernel in kernels]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=len(handles), frameon=False)
    axes.set_title(f"{title}, {resolution} pixels".lstrip(", "), fontsize=9)
    write_figure(figure, path)
