"""Subnet: one network of a space, canonical and hashable; and its published form, the spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from apq.bounds import is_number
from apq.errors import UserError
from apq.files import Record
from apq.limits import LARGEST_LAYER
from apq.space import SHARED_SETTING, SearchSpace
from apq.stages import Slot, make_divisible

ARCHITECTURE_KEYS = ("wid", "ks", "e", "d")


@dataclass(frozen=True, kw_only=True)
class Subnet:
    """Kernels, expansions and bits of every slot, depths of the stages, bits of the shared operands.

    Build one with `subnet_from_spec` or `genes.subnets_of`. They check it against its space and make it canonical: idle
    slots hold the smallest kernel and expansion and the highest bits. Equal networks are then equal values. `bits` has
    one row for each operand kind, `shared_bits` one number for each shared operand, in the order of the space.
    """

    ks: tuple[int, ...]
    e: tuple[float, ...]
    d: tuple[int, ...]
    resolution: int
    bits: tuple[tuple[int, ...], ...]
    shared_bits: tuple[int, ...] = ()
    wid: None = None  # width multiplier of the published files, always null

    def running_slots(self, space: SearchSpace) -> list[Slot]:
        """The slots that run, in network order."""
        return [slot for slot in space.slots if slot.runs_at(self.d)]

    def mid_channels(self, slot: Slot) -> int:
        """Mid channels of the block in a slot."""
        return slot.channels_at(self.e[slot.index])


def architecture_of(space: SearchSpace, subnet: Subnet) -> Record:
    """The first object of a published `arch` file. It has the resolution where the space has several."""
    spec = {"wid": subnet.wid, "ks": list(subnet.ks), "e": list(subnet.e), "d": list(subnet.d)}
    return spec if len(space.resolutions) == 1 else {**spec, "resolution": subnet.resolution}


def policy_of(space: SearchSpace, subnet: Subnet) -> dict[str, list[int]]:
    """The second object of a published `arch` file: a list of bits for each operand kind and for shared operands."""
    policy = {kind.setting: list(row) for kind, row in zip(space.operands, subnet.bits, strict=True)}
    return {**policy, SHARED_SETTING: list(subnet.shared_bits)} if space.shared_operands else policy


def spec_of(space: SearchSpace, subnet: Subnet) -> dict[str, Record]:
    """Both objects of a published `arch` file, under the keys "arch" and "policy" of our own files."""
    return {"arch": architecture_of(space, subnet), "policy": policy_of(space, subnet)}


def shown_spec(space: SearchSpace, spec: Mapping[str, Mapping[str, Any]]) -> Record:
    """Both objects of `spec_of` in one, for people: the bits of shared layers have the layers' names."""
    shown = {**spec["arch"], **spec["policy"]}
    for name in dict.fromkeys(shared.layer for shared in space.shared_operands):
        w, a = space.bits_of_shared(name, tuple(spec["policy"][SHARED_SETTING]))
        shown[name] = f"W{w}A{a}"
    return {name: value for name, value in shown.items() if name != SHARED_SETTING}


def subnet_from_spec(space: SearchSpace, spec: Mapping[str, Any]) -> Subnet:
    """Check a spec (architecture and policy keys in one mapping) against the space and make it canonical.

    Expansions between two choices are rounded to the nearest allowed mid channels. UserError names the wrong key.
    """
    _check_keys(space, spec)
    n_slots, resolution = len(space.slots), spec.get("resolution", space.resolutions[0])
    if resolution not in space.resolutions:
        raise UserError(f"resolution is {resolution!r}; space {space.name} has {space.resolutions}")

    depths = _depths(space, spec["d"])
    ks = _numbers("ks", spec["ks"], n_slots)
    ratios = _numbers("e", spec["e"], n_slots)
    bits = [_numbers(kind.setting, spec[kind.setting], n_slots) for kind in space.operands]
    shared_bits = _numbers(SHARED_SETTING, spec.get(SHARED_SETTING, []), len(space.shared_operands))
    for i, (chosen, shared) in enumerate(zip(shared_bits, space.shared_operands, strict=True)):
        _check_choice(f"{SHARED_SETTING}[{i}]", chosen, shared.choices)
    for slot in space.slots:
        i = slot.index
        if not slot.runs_at(depths):
            ks[i], ratios[i] = space.kernel_sizes[0], slot.ratios[0]
            for row, kind in zip(bits, space.operands, strict=True):
                row[i] = kind.choices[-1]
            continue
        _check_choice(f"ks[{i}]", ks[i], space.kernel_sizes)
        for row, kind in zip(bits, space.operands, strict=True):
            _check_choice(f"{kind.setting}[{i}]", row[i], kind.choices)
        ratios[i] = snap_ratio(space, slot, ratios[i])
        if rule := space.broken_rule(ks[i], tuple(row[i] for row in bits)):
            what = f"kernel {rule.kernel_size} with {rule.operand} bits {rule.bits}"
            raise UserError(f"slot {i}: {what} is not allowed: {rule.reason}")
    return Subnet(
        ks=tuple(map(int, ks)),
        e=tuple(ratios),
        d=depths,
        resolution=int(resolution),
        bits=tuple(tuple(map(int, row)) for row in bits),
        shared_bits=tuple(map(int, shared_bits)),
    )


def snap_ratio(space: SearchSpace, slot: Slot, ratio: float) -> float:
    """The slot's choice for an expansion: the ratio itself, or that of the rounded mid channels.

    UserError outside the slot's range.
    """
    channels = slot.channels_at(ratio) if ratio in slot.ratios else int(make_divisible(ratio * slot.in_channels))
    low, high = slot.mid_channels[0], slot.mid_channels[-1]
    if channels not in slot.mid_channels or not low <= ratio * slot.in_channels <= high:
        raise UserError(
            f"e[{slot.index}] is {ratio!r}; space {space.name} has {low} to {high} channels there, "
            f"ratios {low / slot.in_channels:g} to {high / slot.in_channels:g}"
        )
    return channels / slot.in_channels


def _check_keys(space: SearchSpace, spec: Mapping[str, Any]) -> None:
    keys = {*ARCHITECTURE_KEYS, "resolution", *(kind.setting for kind in space.operands)}
    keys |= {SHARED_SETTING} if space.shared_operands else set()
    optional = {"wid", "resolution"} if len(space.resolutions) == 1 else {"wid"}
    if missing := keys - optional - set(spec):
        raise UserError(f"spec for space {space.name} lacks {', '.join(sorted(missing))}")
    if unknown := set(spec) - keys:
        raise UserError(f"spec has keys that space {space.name} does not know: {', '.join(sorted(map(str, unknown)))}")
    if spec.get("wid") is not None:
        raise UserError(f"wid is {spec['wid']!r}; width multipliers are not searched, it must be null")


def _depths(space: SearchSpace, values: Any) -> tuple[int, ...]:
    deepest = max(stage.depths[-1] for stage in space.stages)
    depths = _numbers("d", values, len(space.stages))
    for i, stage in enumerate(space.stages):
        if len(stage.depths) == 1:  # published specs have a depth even where there is one choice
            _check_choice(f"d[{i}]", depths[i], tuple(range(1, deepest + 1)))
            depths[i] = stage.depths[0]
        _check_choice(f"d[{i}]", depths[i], stage.depths)
    return tuple(map(int, depths))


def _numbers(key: str, values: Any, length: int) -> list[Any]:
    if not isinstance(values, (list, tuple)) or len(values) != length:
        what = f"{len(values)} entries" if isinstance(values, (list, tuple)) else f"a {type(values).__name__}"
        raise UserError(f"{key} must be a list of {length} numbers, not {what}")
    if bad := [i for i, value in enumerate(values) if not is_number(value, -LARGEST_LAYER, LARGEST_LAYER)]:
        raise UserError(f"{key}[{bad[0]}] is not a number, or too large")
    return list(values)


def _check_choice(key: str, value: Any, choices: tuple[int, ...]) -> None:
    if value not in choices:
        raise UserError(f"{key} is {value!r}; allowed: {', '.join(map(str, choices))}")
