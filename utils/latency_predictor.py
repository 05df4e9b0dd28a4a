"""The cost of a subnet, under the published name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apq.errors import UserError
from apq.genes import genes_of
from apq.presets import APQ_IMAGENET
from apq.space import SearchSpace
from apq.subnet import Subnet, subnet_from_spec
from lut.accelerator import Accelerator
from lut.bitfusion import BitFusion
from lut.population import PopulationCost
from lut.table import PublishedTable


class LatencyPredictor(PopulationCost):
    """`PopulationCost` under the published name, with the published arguments in their order, and others by name.

    UserError for another platform or batch size than the published ones.

    Args:
        platform, batch: BitFusion and 1, the ones that were published.
        type: the quantity.
        scope: layers that count, by default as published.
        table: replaces the accelerator as the source of latency and energy.
    """

    def __init__(
        self,
        platform: str = "BitFusion",
        type: str = "latency",  # noqa: A002 - the published name
        batch: int = 1,
        *,
        scope: str = "published",
        space: SearchSpace = APQ_IMAGENET,
        accelerator: Accelerator | None = None,
        table: PublishedTable | None = None,
    ) -> None:
        if platform != "BitFusion" or batch != 1:
            raise UserError(
                f"LatencyPredictor(platform, type, batch) prices BitFusion at batch 1, not {platform!r} at {batch!r}: "
                "give type=, scope= and space= by name, and another device as accelerator= or table="
            )
        super().__init__(space, type, BitFusion(accelerator or Accelerator()) if table is None else table, scope)

    @property
    def type(self) -> str:
        """The quantity, under its published name."""
        return self.quantity

    def predict_lat(self, spec: Mapping[str, Any] | Subnet) -> float:
        """Cost of one published spec, in `unit`. Despite its published name it is the cost of `type`."""
        subnet = spec if isinstance(spec, Subnet) else subnet_from_spec(self.space, spec)
        return float(self.predict(genes_of(self.space, [subnet]))[0])
