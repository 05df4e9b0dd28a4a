"""The cost of a subnet, under the published name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apq.genes import genes_of
from apq.presets import APQ_IMAGENET
from apq.space import SearchSpace
from apq.subnet import Subnet, subnet_from_spec
from lut.accelerator import Accelerator
from lut.bitfusion import BitFusion
from lut.population import PopulationCost
from lut.table import PublishedTable


class LatencyPredictor(PopulationCost):
    """`PopulationCost` under the published name: `type` is the quantity, and the scope is `published` by default.

    A `table` replaces the accelerator as the source of latency and energy.
    """

    def __init__(
        self,
        type: str = "latency",  # noqa: A002 - the published name
        scope: str = "published",
        space: SearchSpace = APQ_IMAGENET,
        accelerator: Accelerator | None = None,
        table: PublishedTable | None = None,
    ) -> None:
        super().__init__(space, type, BitFusion(accelerator or Accelerator()) if table is None else table, scope)

    @property
    def type(self) -> str:
        """The quantity, under its published name."""
        return self.quantity

    def predict_lat(self, spec: Mapping[str, Any] | Subnet) -> float:
        """Cost of one published spec, in `unit`. Despite its published name it is the cost of `type`."""
        subnet = spec if isinstance(spec, Subnet) else subnet_from_spec(self.space, spec)
        return float(self.predict(genes_of(self.space, [subnet]))[0])
