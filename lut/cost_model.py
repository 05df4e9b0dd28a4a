"""Cost models: their base class, the table of their kinds, and the flags that name one.

A kind from outside is a dataclass that derives from `CostModel`, with a row in `COST_MODELS`:

    @dataclass(frozen=True)
    class Roofline(CostModel):
        macs_per_ms: float = 1e9
        mj_per_mac: float = 1e-9

        def price(self, layers):
            macs = np.array([layer.macs for layer in layers], dtype=np.float64)
            return np.stack([macs / self.macs_per_ms, macs * self.mj_per_mac], axis=1)

    COST_MODELS["roofline"] = Roofline

Then `--config FILE` builds it from the JSON object {"kind": "roofline", "macs_per_ms": 2e9}.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import Record, read_json
from apq.layers import ConvLayer
from apq.search_result import read_result
from lut.accelerator import accelerator_from_dict

UNITS = {"latency": "ms", "energy": "mJ", "bitops": "BitOps", "size": "bytes", "flops": "MACs"}
COLUMN = {"latency": 0, "energy": 1}  # of `CostModel.price`
COUNTED = {"bitops": "bitops", "size": "size_bytes", "flops": "macs"}  # attributes of a layer


class CostModel(ABC):
    """Base class of cost models: the latency and energy of layers, at batch 1 unless a model says otherwise.

    A subclass implements `price`. The other methods are right for a dataclass of plain data that covers all layers.
    `of_all_runs` says whether the cost of a layer that runs several times is that of all its runs, not of one.
    """

    of_all_runs: ClassVar[bool] = False

    @abstractmethod
    def price(self, layers: Sequence[ConvLayer]) -> np.ndarray:
        """(layers, 2) float64 milliseconds and millijoules. UserError names the first layer that is not covered.

        A quantity that the model does not know at all is NaN.
        """

    def covers(self, layers: Sequence[ConvLayer]) -> np.ndarray:
        """(layers,) bool: which layers have a cost. All, unless the costs come from a table.

        Layers that an accelerator cannot run are covered: the error of `price` says why it cannot.
        """
        return np.ones(len(layers), dtype=bool)

    def price_rows(self, rows: np.ndarray) -> np.ndarray | None:
        """(n, 2) float64 prices of layers as whole numbers `(n, 9)`, the columns `lut.layer_rows.COLUMNS`.

        They are not finite for a layer that has no price. None where the model has no way to price many at once, or
        prices depend on more than these numbers: then `price` is asked.
        """
        return None

    def counts(self, quantity: str) -> bool:
        """Whether a quantity is counted, alike for all models, and not priced by this one."""
        return quantity in COUNTED

    def known_prices(self, layers: Sequence[ConvLayer]) -> np.ndarray:
        """(layers, 2) float64 milliseconds and millijoules, NaN for layers that are not covered."""
        covered = self.covers(layers)
        prices = np.full((len(layers), 2), np.nan)
        prices[covered] = self.price([layer for layer, known in zip(layers, covered, strict=True) if known])
        return prices

    def costs_of(self, quantity: str, layers: Sequence[ConvLayer]) -> np.ndarray:
        """(layers,) float64 costs of a quantity, one of UNITS, in `unit_of(quantity)`. NaN where a cost is not known.

        Latency and energy are those of `price`. The other quantities are counted, alike for all models.
        """
        if self.counts(quantity):
            return counted(quantity, layers)
        return self.known_prices(layers)[:, COLUMN[quantity]]

    def costs_of_rows(self, quantity: str, rows: np.ndarray) -> np.ndarray | None:
        """(n,) float64 latencies or energies by `price_rows`, or None."""
        prices = self.price_rows(rows)
        return None if prices is None else prices[:, COLUMN[quantity]]

    def unit_of(self, quantity: str) -> str:
        """The unit of `costs_of(quantity, layers)`, in words for messages and reports."""
        return UNITS[quantity]

    def record(self) -> Record:
        """Plain data for an experiment's config.json, from which `cost_model_from_record` builds the same model."""
        return {"accelerator": None, "table": None, "cost_model": {"kind": self._kind, **asdict(self)}}

    def digest(self) -> str:
        """A hash of all that the costs depend on."""
        return digest_of(self.record())

    def __str__(self) -> str:
        fields = [f"{name} {value}" for name, value in asdict(self).items()]
        return " with ".join([self._kind, *([", ".join(fields)] if fields else [])])

    @property
    def _kind(self) -> str:
        kinds = [kind for kind, make in COST_MODELS.items() if make is type(self)]
        if not kinds:
            raise UserError(f"cost model {type(self).__name__} has no row in COST_MODELS")
        return kinds[0]


def counted(quantity: str, layers: Sequence[ConvLayer]) -> np.ndarray:
    """(layers,) float64 BitOps, bytes or MACs, which no cost model changes."""
    return np.array([getattr(layer, COUNTED[quantity]) for layer in layers], dtype=np.float64)


def digest_of(data: Any) -> str:
    """A hash of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _bitfusion(**fields: Any) -> CostModel:
    from lut.bitfusion import BitFusion  # it imports this module

    return BitFusion(accelerator_from_dict(fields))


def _table(path: str) -> CostModel:
    from lut.table import load  # it imports this module

    return load(Path(path))


def _bit_serial(**fields: Any) -> CostModel:
    from lut.bit_serial import BitSerial  # it imports this module

    return BitSerial(**fields)


COST_MODELS: dict[str, Callable[..., CostModel]] = {"bitfusion": _bitfusion, "bit-serial": _bit_serial, "table": _table}
"""By kind: the function that makes a cost model from the other fields of a JSON object."""


def add_cost_flags(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --config and --table, which exclude each other. `default` describes the default for --help."""
    group, names = parser.add_mutually_exclusive_group(), ", ".join(named_cost_models())
    group.add_argument(
        "--config", type=Path, help=f"accelerator or cost model, as a JSON file, or {names} (default: {default})"
    )
    group.add_argument("--table", type=Path, help="cost table, for example of your own device, in the published form")


def named_cost_models() -> Mapping[str, CostModel]:
    """The cost models that --config takes by name."""
    from lut.bit_serial import NAMED  # it imports this module

    return NAMED


def cost_model_from_flags(config: Path | None, table: Path | None) -> CostModel:
    """The cost model that the flags of `add_cost_flags` name. Without them it is the published BitFusion.

    `config` is one of `named_cost_models`, or a file with a JSON object: the "kind" of a cost model and its fields, or
    fields of an accelerator.
    """
    if table is not None:
        return _table(str(table))
    if config is None:
        return _bitfusion()
    if named := named_cost_models().get(str(config)):
        return named
    if not config.exists():
        raise UserError(f"cannot read {config}: no such file; known by name: {', '.join(named_cost_models())}")
    return _from_dict(read_json(config), config)


def cost_model_from_record(record: Record, where: Path) -> CostModel:
    """The cost model that `CostModel.record` describes. Errors name the file `where` the record is.

    For a search that was priced by a measured table (`lut.measured`) it is the model of the reports.
    """
    if "cost_model" in record:
        return _from_dict(record["cost_model"], where)
    if record["table"] is None:
        return _from_dict(record["accelerator"], where)
    try:
        return _table(record["table"])
    except UserError as error:
        raise UserError(f"{error}; {where} names this table: give it with --table") from error


def recorded_cost_model(experiment: Experiment) -> CostModel:
    """The cost model that the search of an experiment used."""
    return cost_model_from_record(read_result(experiment).cost_model, experiment.config)


def _from_dict(data: Any, where: Path) -> CostModel:
    if not isinstance(data, dict):
        raise UserError(f"{where} must hold a JSON object: fields of an accelerator, or a cost model's kind and fields")
    fields = dict(data)
    kind = fields.pop("kind", "bitfusion")
    make = COST_MODELS.get(kind) if isinstance(kind, str) else None
    if make is None:
        known = ", ".join(COST_MODELS)
        raise UserError(f"{where}: unknown kind of cost model {kind!r}; known: {known}; APQ_PLUGINS may add others")
    try:
        inspect.signature(make).bind(**fields)
    except TypeError as error:
        raise UserError(f"{where}: cost model {kind}: {error}") from error
    try:
        return make(**fields)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (TypeError, ValueError) as error:  # a field that holds another type
        raise UserError(f"{where}: cost model {kind} cannot be made of {fields}: {error}") from error
