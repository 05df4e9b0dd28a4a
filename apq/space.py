"""SearchSpace: the choices that define a network, as plain data.

A network is a first convolution, an inverted-residual block without expansion, stages of elastic inverted-residual
blocks, a last 1x1 convolution, pooling, in some spaces another 1x1 convolution, and a classifier. A *slot* is a place
for an elastic block. A stage of depth d runs its first d slots.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cached_property
from typing import Any

import numpy as np

from apq.bounds import is_number
from apq.errors import UserError
from apq.files import Record
from apq.limits import (
    MOST_BITS,
    MOST_CLASSES,
    MOST_EXPANSION,
    MOST_KERNEL,
    MOST_PIXELS,
    MOST_SLOTS,
    MOST_STRIDE,
    MOST_TABLE,
    MOST_WEIGHTS,
)
from apq.names import plain_name
from apq.operands import BLOCK_LAYERS, Forbidden, OperandBits, SharedOperand, check_ascending, check_whole
from apq.stages import Slot, Stage, check_activation, make_divisible

SCOPES = ("published", "full")
LATER_FIELDS = (  # fields that files of older versions do not have
    "squeeze",
    "activation",
    "fixed_bits",
    "end_bits",
    "pooled_width",
    "first_block_activation",
    "end_activation",
    "shared_operands",
    "classifier_bits",
    "norm_eps",
    "first_shortcut",
)
FILE_NAMES = {"shared_operands": "fixed_operands"}  # fields whose key in files differs
SHARED_SETTING = "fixed_bits_setting"  # key of the shared operands' bits in a published policy
FULL_PRECISION = 32  # bits of an operand that is not quantized (float32)


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """All networks that may be chosen, by ascending choices for each slot, stage and operand kind.

    UserError where a field is out of range.

    Attributes:
        ratios: expansion choices. With a `channel_step` (APQ's channel pruning) they are the ends of a range of mid
            channels with that step.
        operands: operand kinds of the elastic blocks, each with its choices of bits. With one kind for each layer and
            operand, every convolution has bits of its own, as in QFA.
        forbidden: pairs of kernel size and bits that no block may combine.
        budget_scope: the default scope of budgets.
        mix_activation_bits: bits of the last 1x1 convolution's input in the network, sign included. Costs count
            `fixed_bits` for it.
        fixed_bits: bits of the first block and of the 1x1 layers after the slots, except for `shared_operands`. In a
            space of one bit-width, as OQA's, it is that bit-width (see `bit_widths.at_bits`).
        end_bits: bits of the first convolution and the classifier; FULL_PRECISION means no quantizers.
        classifier_bits: bits of the classifier where they are not `end_bits` (None: they are).
        pooled_width: width of the 1x1 layer between pooling and classifier; None where there is none.
        end_activation: activation of the first convolution and the last 1x1 layers.
        shared_operands: operands of shared layers whose bits are chosen.
        norm_eps: what BatchNorm adds to variances.
        first_shortcut: whether the first block has an identity shortcut, as in MobileNetV3. Its widths must be equal.
        recipe: name of the training recipe. It is not part of the space's identity: equality ignores it and files do
            not record it.
    """

    name: str
    dataset: str
    in_channels: int
    n_classes: int
    resolutions: tuple[int, ...]
    stem_width: int
    stem_stride: int
    first_block_width: int
    stages: tuple[Stage, ...]
    head_width: int
    kernel_sizes: tuple[int, ...]
    ratios: tuple[float, ...]
    channel_step: int | None
    operands: tuple[OperandBits, ...]
    forbidden: tuple[Forbidden, ...] = ()
    budget_scope: str = "full"
    mix_activation_bits: int = 8
    fixed_bits: int = 8
    end_bits: int = 8
    pooled_width: int | None = None
    first_block_activation: str = "relu6"
    end_activation: str = "relu6"
    shared_operands: tuple[SharedOperand, ...] = ()
    classifier_bits: int | None = None
    norm_eps: float = 1e-3
    first_shortcut: bool = False
    recipe: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_operands()
        self._check_totals()

    def _check_sizes(self) -> None:
        plain_name(self.name, "a space's name")
        plain_name(self.dataset, "a space's dataset")
        owner = f"space {self.name}"
        bits = ("mix_activation_bits", "fixed_bits", "end_bits", "bits_of_classifier")
        choices = {what: getattr(self, what) for what in ("resolutions", "kernel_sizes", "ratios")}
        check_ascending(owner, **choices)
        check_whole(owner, highest=MOST_CLASSES, n_classes=self.n_classes)
        check_whole(owner, highest=MOST_PIXELS, resolutions=self.resolutions)
        check_whole(owner, highest=MOST_STRIDE, stem_stride=self.stem_stride)
        check_whole(owner, highest=MOST_KERNEL, kernel_sizes=self.kernel_sizes)
        check_whole(owner, highest=MOST_BITS, **{what: getattr(self, what) for what in bits})
        check_whole(
            owner,
            in_channels=self.in_channels,
            stem_width=self.stem_width,
            first_block_width=self.first_block_width,
            head_width=self.head_width,
            channel_step=1 if self.channel_step is None else self.channel_step,
            pooled_width=1 if self.pooled_width is None else self.pooled_width,
        )
        for activation in (self.first_block_activation, self.end_activation):
            check_activation(owner, activation)
        if not is_number(self.norm_eps, 0, 1) or self.norm_eps == 0:
            raise UserError(f"{owner}: norm_eps must be above 0 and at most 1, not {self.norm_eps!r}")
        if not isinstance(self.first_shortcut, bool):
            raise UserError(f"{owner}: first_shortcut must be true or false, not {self.first_shortcut!r}")
        if self.first_shortcut and self.stem_width != self.first_block_width:
            raise UserError(
                f"{owner}: the first block has a shortcut, but {self.stem_width} channels before it and "
                f"{self.first_block_width} after it"
            )
        if any(k % 2 == 0 for k in self.kernel_sizes):
            raise UserError(f"{owner}: kernel sizes {self.kernel_sizes} must be odd")
        if not isinstance(self.recipe, (str, type(None))):
            raise UserError(f"{owner}: recipe must be the name of a recipe, not {self.recipe!r}")
        if not all(is_number(ratio, 0, MOST_EXPANSION) for ratio in self.ratios) or self.ratios[0] == 0:
            raise UserError(f"{owner}: ratios {self.ratios} must be positive, and at most {MOST_EXPANSION}")
        if self.budget_scope not in SCOPES:
            raise UserError(f"{owner}: budget_scope {self.budget_scope!r}; known: {SCOPES}")
        if not self.stages:
            raise UserError(f"{owner} has no stages")

    def _check_totals(self) -> None:
        """UserError where there are too many slots, weights or combinations of choices, before any of them is made."""
        if (n_slots := sum(stage.depths[-1] for stage in self.stages)) > MOST_SLOTS:
            raise UserError(f"space {self.name} has {n_slots} slots; at most {MOST_SLOTS} are supported")
        before = itertools.chain([self.first_block_width], (stage.width for stage in self.stages))
        weights, choices = self.head_width * (self.n_classes + self.stages[-1].width), 0
        for stage, in_channels in zip(self.stages, before, strict=False):
            for times, inputs in ((1, in_channels), (stage.depths[-1] - 1, stage.width)):
                widest, span = inputs * self.ratios[-1], inputs * (self.ratios[-1] - self.ratios[0])
                outside = inputs + stage.width + self.kernel_sizes[-1] ** 2 + (widest / 2 if stage.squeeze else 0)
                weights += times * widest * outside
                choices += times * (len(self.ratios) if self.channel_step is None else 2 + span // self.channel_step)
        if weights > MOST_WEIGHTS:
            raise UserError(f"space {self.name} has {weights:.3g} weights; at most {MOST_WEIGHTS:.3g} are supported")
        combinations = choices * len(self.kernel_sizes) * math.prod(len(kind.choices) for kind in self.operands)
        if combinations > MOST_TABLE:
            raise UserError(
                f"space {self.name} has {combinations:.3g} combinations of choices in its slots; at most "
                f"{MOST_TABLE:.3g} are supported"
            )

    def _check_operands(self) -> None:
        if len({kind.name for kind in self.operands}) < len(self.operands):
            raise UserError(f"space {self.name}: operand kinds must have distinct names")
        for layer, operand in itertools.product(BLOCK_LAYERS, "wa"):
            owners = [kind.name for kind in self.operands if layer in kind.layers and kind.operand == operand]
            if len(owners) != 1:
                raise UserError(f"space {self.name}: {operand}-bits of {layer} are set by {owners}, not by one kind")
        if unknown := {rule.operand for rule in self.forbidden} - {kind.name for kind in self.operands}:
            raise UserError(f"space {self.name}: rules name unknown operand kinds {sorted(unknown)}")
        chosen = [(shared.layer, shared.operand) for shared in self.shared_operands]
        if len(set(chosen)) != len(chosen):
            raise UserError(f"space {self.name}: shared operands {chosen} must be distinct")
        if self.pooled_width is None and any(layer == "pooled_mix_layer" for layer, _ in chosen):
            raise UserError(f"space {self.name} has no pooled_mix_layer whose bits could be chosen")

    def __hash__(self) -> int:
        return hash(self.name)  # spaces are keys of many caches; hashing every field would slow a search

    @property
    def bits_of_classifier(self) -> int:
        """Bits of the classifier."""
        return self.end_bits if self.classifier_bits is None else self.classifier_bits

    def kind_of(self, layer: str, operand: str) -> int:
        """Index of the operand kind that sets the weight ("w") or activation ("a") bits of a layer of a block."""
        return next(i for i, k in enumerate(self.operands) if layer in k.layers and k.operand == operand)

    def bits_of_shared(self, layer: str, chosen: tuple[int, ...]) -> tuple[int, int]:
        """Weight and activation bits of one of `SHARED_LAYERS` in a subnet whose `shared_bits` are `chosen`."""
        bits_of = {(shared.layer, shared.operand): b for shared, b in zip(self.shared_operands, chosen, strict=True)}
        return bits_of.get((layer, "w"), self.fixed_bits), bits_of.get((layer, "a"), self.fixed_bits)

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """Every slot, in network order."""
        slots, in_channels = [], self.first_block_width
        for stage_index, stage in enumerate(self.stages):
            for position in range(stage.depths[-1]):
                stride = stage.stride if position == 0 else 1
                mid = self._mid_channels(in_channels)
                slots.append(Slot(len(slots), stage_index, position, in_channels, stage.width, stride, mid))
                in_channels = stage.width
        return tuple(slots)

    def _mid_channels(self, in_channels: int) -> tuple[int, ...]:
        if self.channel_step is None:
            return tuple(int(m) for m in make_divisible([round(in_channels * ratio) for ratio in self.ratios]))
        low, high = round(self.ratios[0] * in_channels), round(self.ratios[-1] * in_channels)
        return tuple(range(low, high + 1, self.channel_step))

    @cached_property
    def stage_of_slot(self) -> np.ndarray:
        """(slots,) index of each slot's stage."""
        return np.array([slot.stage for slot in self.slots])

    @cached_property
    def _position_of_slot(self) -> np.ndarray:
        """(slots,) position of each slot in its stage, from 0."""
        return np.array([slot.position for slot in self.slots], dtype=np.int16)

    def runs(self, depths: np.ndarray) -> np.ndarray:
        """Which slots run in networks of these depths: (..., stages) ints -> (..., slots) bool."""
        return self._position_of_slot < depths.take(self.stage_of_slot, axis=-1)

    def input_sides(self, resolution: int) -> tuple[int, ...]:
        """Side in pixels of the input of every slot, then of the last 1x1 convolution."""
        sides, side = [], math.ceil(resolution / self.stem_stride)
        for slot in self.slots:
            sides.append(side)
            side = math.ceil(side / slot.stride)
        return (*sides, side)

    def size(self) -> int:
        """Exact number of legal subnets. Choices of idle slots do not count."""
        rules = {(rule.kernel_size, rule.operand, rule.bits) for rule in self.forbidden}
        legal = sum(  # a rule is about one operand kind, so that the kinds can be counted apart
            math.prod(sum((kernel, kind.name, b) not in rules for b in kind.choices) for kind in self.operands)
            for kernel in self.kernel_sizes
        )
        total = len(self.resolutions) * math.prod(len(shared.choices) for shared in self.shared_operands)
        for stage_index, stage in enumerate(self.stages):
            options = [len(slot.mid_channels) * legal for slot in self.slots if slot.stage == stage_index]
            total *= sum(math.prod(options[:depth]) for depth in stage.depths)
        return total

    def broken_rule(self, kernel_size: int, bits: tuple[int, ...]) -> Forbidden | None:
        """The first rule that a block breaks by its kernel and `bits`, one for each operand kind; None if none."""
        chosen = {kind.name: b for kind, b in zip(self.operands, bits, strict=True)}
        broken = (
            rule for rule in self.forbidden if (rule.kernel_size, rule.bits) == (kernel_size, chosen[rule.operand])
        )
        return next(broken, None)


def space_to_dict(space: SearchSpace) -> Record:
    """The space as plain JSON data, the form in which checkpoints and predictors record it.

    `LATER_FIELDS` at their defaults are left out, so that older files of the same space have equal data.
    """
    return _listed(space)


def space_from_dict(data: Mapping[str, Any]) -> SearchSpace:
    """Inverse of `space_to_dict`; UserError where keys are missing, unknown or out of range."""
    try:
        given = dict(data)
        if unknown := set(given) - {FILE_NAMES.get(f.name, f.name) for f in fields(SearchSpace)}:
            raise UserError(f"not a search space: it has unknown {', '.join(sorted(map(str, unknown)))}")
        if missing := _required(SearchSpace) - set(given):
            raise UserError(f"not a search space: it lacks {', '.join(sorted(missing))}")
        given["stages"] = _parts(Stage, "stages", given["stages"], "depths")
        given["operands"] = _parts(OperandBits, "operands", given["operands"], "layers", "choices")
        shared = FILE_NAMES["shared_operands"]
        given["shared_operands"] = _parts(SharedOperand, shared, given.pop(shared, ()), "choices")
        given["forbidden"] = _parts(Forbidden, "forbidden", given.get("forbidden", ()))
        for what in ("resolutions", "kernel_sizes", "ratios"):
            given[what] = tuple(given[what])
        return SearchSpace(**given)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        missing = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"not a search space: {missing}") from error


def _required(kind: type) -> set[str]:
    return {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}


def _parts(kind: type, what: str, rows: Any, *listed: str) -> tuple[Any, ...]:
    """Dataclasses of a kind from a list of objects, whose values `listed` are lists. UserError names a wrong key."""
    if not isinstance(rows, (list, tuple)) or not all(isinstance(row, Mapping) for row in rows):
        raise UserError(f"not a search space: {what} must be a list of objects")
    if len(rows) > MOST_SLOTS:
        raise UserError(f"not a search space: it has more than {MOST_SLOTS} {what}")
    for i, row in enumerate(rows):
        if unknown := set(row) - {f.name for f in fields(kind)}:
            raise UserError(f"not a search space: {what}[{i}] has unknown {', '.join(sorted(map(str, unknown)))}")
        if missing := _required(kind) - set(row):
            raise UserError(f"not a search space: {what}[{i}] lacks {', '.join(sorted(missing))}")
        if wrong := [key for key in listed if not isinstance(row[key], (list, tuple))]:
            raise UserError(f"not a search space: {what}[{i}]: {wrong[0]} must be a list, not {row[wrong[0]]!r}")
    return tuple(kind(**{**row, **{key: tuple(row[key]) for key in listed}}) for row in rows)


def _listed(value: Any) -> Any:
    if is_dataclass(value):
        items = {f: getattr(value, f.name) for f in fields(value) if f.compare}
        written = {f.name: item for f, item in items.items() if f.name not in LATER_FIELDS or item != f.default}
        return {FILE_NAMES.get(name, name): _listed(item) for name, item in written.items()}
    if isinstance(value, (list, tuple)):
        return [_listed(item) for item in value]
    return value
