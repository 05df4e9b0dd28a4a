"""The layout of QFA's supernets of mixed precision (apple/ml-batchquant 6c7262c, `QFAMobileNetV3`).

The norm is inside the module of the convolution, beside quantizers for each bit-width, in depthwise layers for each
kernel size and bit-width. Their first convolution has quantizers too, which are never used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from elastic_nn.networks.layout import MBV3_LAYERS, Layout, Place, with_pooled_convolution, with_pooled_layer

NORM = {"weight": "gamma", "bias": "beta"}
OPERANDS = {"weight_quant": "w_quantizer", "act_quant": "a_quantizer"}
COUNT, LOW, HIGH = (f"observer.{name}" for name in ("num_batches_tracked", "running_min", "running_max"))
OF_BATCH = ("observer.min_val", "observer.max_val")  # extremes of the last batch, empty in a new network
TENSORS = {
    "weight_quant": {"step": "scale"},
    "act_quant": {"scale": "scale", "offset": "offset", "low": LOW, "high": HIGH, "seen": COUNT},
}
BITS = (2, 3, 4, 8)
FIRST_KERNEL = "3"  # of the first block, which has one kernel size and is named by it nevertheless
FIRST_WEIGHT = "first_conv.conv.conv.weight"
QUANTIZER = re.compile(r"(?:of_kernel\.(?P<kernel>\d+)\.)?of_bits\.(?P<bits>\d+)\.(?P<tensor>\w+)")


def _part(place: Place) -> str | None:
    kind, _, rest = place.part.partition(".")
    if kind == "kernel_transforms":
        return f"conv.{rest}_matrix"
    if kind == "norm":
        return f"conv.{NORM.get(rest, rest)}"
    stem = "linear" if place.layer == "classifier" else "conv"
    if kind in ("weight", "bias"):
        return kind if ".squeeze." in place.layer else f"{stem}.{stem}.{kind}"
    found = QUANTIZER.fullmatch(rest)
    if found is None or (tensor := TENSORS[kind].get(found["tensor"])) is None:
        return None
    kernel = FIRST_KERNEL if place.layer == "blocks.0.depthwise" else found["kernel"]
    if (kernel is None) == (place.role == "depthwise"):  # cut out of a supernet: its kernel size is not in our key
        return None
    operand = OPERANDS[kind] if kernel is None else f"{OPERANDS[kind]}s.{kernel}"
    return f"{stem}.{operand}.quantizers.{found['bits']}.{tensor}"


def _written(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """Published code counts no batches: it writes 0 beside a range that it has found."""
    if key.endswith(COUNT):
        return {key: torch.zeros((), dtype=torch.int64)}
    if key.endswith(LOW):
        return {**{key.replace(LOW, edge): torch.empty(0) for edge in OF_BATCH}, key: tensor}
    written = with_pooled_convolution(key, tensor)
    if key == FIRST_WEIGHT:
        unused = [f"w_quantizer.quantizers.{bits}.scale" for bits in BITS]
        unused += [f"a_quantizer.quantizers.{bits}.{name}" for bits in BITS for name in TENSORS["act_quant"].values()]
        for name in unused:
            neutral = torch.ones(1) if name.startswith("w_") else torch.zeros(1)
            written |= _written(f"first_conv.conv.{name}", neutral)
    return written


def _restored(found: Mapping[str, Tensor], key: str) -> Tensor:
    """Our number of images behind a range, (1,): a range without a number counts as that of one image, so that it is
    used; without both nothing was seen."""
    if not key.endswith(COUNT):
        return with_pooled_layer(found, key)
    edges = torch.cat([found[key.replace(COUNT, edge)] for edge in (LOW, HIGH)])
    return found[key].clamp_min(int(edges.count_nonzero() > 0)).reshape(1)


QFA = Layout(
    name="qfa-mbv3",
    marks=("final_expand_layer.", ".w_quantizer."),
    block="mobile_inverted_conv",
    layers=MBV3_LAYERS,
    part=_part,
    order=("kernel_transforms", "norm", "weight", "bias", "weight_quant", "act_quant"),
    of_quantizers=(".w_quantizer", ".a_quantizer"),
    written=_written,
    restored=_restored,
)
