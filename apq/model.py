"""ModelSpec: a network other than a supernet, by name, and its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from apq.errors import UserError
from apq.files import Record
from apq.limits import MOST_CLASSES, MOST_PIXELS
from apq.operands import check_whole
from apq.space import SearchSpace, space_from_dict, space_to_dict
from apq.subnet import Subnet, spec_of, subnet_from_spec

SUBNET = "subnet"  # the name of a float subnet of a space
PLAIN_FIELDS = ("name", "dataset", "in_channels", "n_classes", "resolution")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A network by name: its data set, input channels, number of classes and resolution in pixels.

    A float subnet has the name "subnet", a space and a subnet. The other fields must agree with these. UserError where
    they do not, or where a field is out of range.
    """

    name: str
    dataset: str
    in_channels: int
    n_classes: int
    resolution: int
    space: SearchSpace | None = None
    subnet: Subnet | None = None

    def __post_init__(self) -> None:
        for what in ("name", "dataset"):
            if not isinstance(value := getattr(self, what), str) or not value:
                raise UserError(f"a model's {what} must be a non-empty string, not {value!r}")
        check_whole(f"model {self.name}", in_channels=self.in_channels)
        check_whole(f"model {self.name}", highest=MOST_CLASSES, n_classes=self.n_classes)
        check_whole(f"model {self.name}", highest=MOST_PIXELS, resolution=self.resolution)
        if {self.name == SUBNET, self.space is not None, self.subnet is not None} not in ({True}, {False}):
            raise UserError(
                f"model {self.name}: a space and a subnet belong to the name {SUBNET!r}: give all three or none"
            )
        if self.space is not None:
            own = (self.dataset, self.in_channels, self.n_classes, self.resolution)
            theirs = (self.space.dataset, self.space.in_channels, self.space.n_classes, self.subnet.resolution)
            if own != theirs:
                raise UserError(f"model {self.name} is for {own}, but its space {self.space.name} is for {theirs}")

    @property
    def resolutions(self) -> tuple[int]:
        """The resolution in a tuple, the form in which spaces have theirs."""
        return (self.resolution,)


def subnet_model(space: SearchSpace, subnet: Subnet) -> ModelSpec:
    """The spec of a float subnet."""
    return ModelSpec(
        name=SUBNET,
        dataset=space.dataset,
        in_channels=space.in_channels,
        n_classes=space.n_classes,
        resolution=subnet.resolution,
        space=space,
        subnet=subnet,
    )


def model_to_dict(spec: ModelSpec) -> Record:
    """The spec as plain JSON data. A subnet's has "space", "arch" and "policy" too."""
    plain = {what: getattr(spec, what) for what in PLAIN_FIELDS}
    if spec.space is None:
        return plain
    return {**plain, "space": space_to_dict(spec.space), **spec_of(spec.space, spec.subnet)}


def is_model(data: Any) -> bool:
    """Whether this has the keys of a spec as plain data, whatever their values are."""
    return isinstance(data, Mapping) and data.keys() >= set(PLAIN_FIELDS)


def model_from_dict(data: Mapping[str, Any]) -> ModelSpec:
    """Inverse of `model_to_dict`; UserError where keys are missing, unknown or out of range."""
    if not isinstance(data, Mapping):
        raise UserError(f"not a model: an object is needed, not a {type(data).__name__}")
    of_subnet = ("space", "arch", "policy") if data.get("name") == SUBNET else ()
    expected = {*PLAIN_FIELDS, *of_subnet}
    if missing := expected - set(data):
        raise UserError(f"not a model: it lacks {', '.join(sorted(missing))}")
    if unknown := set(data) - expected:
        raise UserError(f"not a model: it has unknown {', '.join(sorted(map(str, unknown)))}")
    plain = {what: data[what] for what in PLAIN_FIELDS}
    if not of_subnet:
        return ModelSpec(**plain)
    if not all(isinstance(data[what], Mapping) for what in of_subnet):
        raise UserError(f"not a model: {', '.join(of_subnet)} must be objects")
    space = space_from_dict(data["space"])
    return ModelSpec(**plain, space=space, subnet=subnet_from_spec(space, {**data["arch"], **data["policy"]}))
