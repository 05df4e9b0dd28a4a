"""The result of a search by any method: a typed, versioned record in the folder of an experiment.

`config.json` holds settings and figures, `history.jsonl` one record a step, `front.json` the points of a front,
`made_by.json` the provenance, `lat` the cost. `arch` or `policy.json` holds the choice and is written last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from apq.bounds import is_number
from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import Record, read_json, read_jsonl, write_json, write_jsonl
from apq.layers import ConvLayer
from apq.policy import Policy, policy_from_dict, policy_to_dict
from apq.presets import APQ_IMAGENET
from apq.provenance import Provenance, provenance_from_dict, this_run
from apq.space import SearchSpace, space_from_dict, space_to_dict
from apq.subnet import Subnet, architecture_of, policy_of

FORMAT = 2  # of config.json; files of format 1 have no "format"
PUBLISHED = "published"  # the method of an experiment that has an `arch` file alone
TAKEN = (
    "format",
    "files",
    "mode",
    "space",
    "acc_predictor_dir",
    "constraint",
    "scope",
    "type",
    "unit",
)  # by other facts
PRICED_BY = ("accelerator", "table", "cost_model", "measured")  # keys of a cost model's record


@dataclass(frozen=True, kw_only=True)
class SubnetChoice:
    """A subnet of the searched space. `models` is the folder of its supernet and predictors."""

    space: SearchSpace
    subnet: Subnet
    models: Path

    def config(self, result: SearchResult) -> Record:
        """The keys of `config.json` that results with a subnet have."""
        origin = {"space": space_to_dict(self.space), "acc_predictor_dir": str(self.models)}
        return {**origin, "constraint": result.limit, "scope": result.scope}

    def write(self, experiment: Experiment) -> None:
        """Write `arch`."""
        write_json(experiment.arch, [architecture_of(self.space, self.subnet), policy_of(self.space, self.subnet)])

    @classmethod
    def read(cls, experiment: Experiment, config: _Fields) -> Record:
        """The fields of a SearchResult that `config` and `write` have written, taken out of `config`."""
        models = Path(config.take("acc_predictor_dir", str))
        try:
            space = space_from_dict(config.take("space", dict))
        except _FieldError:
            raise
        except UserError as error:
            raise UserError(f"{experiment.config}: {error}") from error
        return {
            "choice": cls(space=space, subnet=experiment.load_subnet(space), models=models),
            "quantity": config.take("type", str, "latency"),
            "unit": config.take("unit", str, "ms"),
            "limit": config.take("constraint", (int, float, type(None)), None),
            "scope": config.take("scope", str, "full"),
            "cost": _cost_of(experiment),
        }


@dataclass(frozen=True, kw_only=True)
class PolicyChoice:
    """The bits of each layer of a given network.

    Attributes:
        policy, layers: the bits, and the layers as they run.
        model: name or folder of the network.
        recipe: name of its training recipe.
        image_bits: bits that the first layer's input is priced at.
        ratio, of_what: the cost as a fraction of a reference cost, and the name of that reference.
        n_priced: number of layers that the cost model covers.
        original_top1: top-1 (0 to 1) of the float network, if it was measured.
    """

    policy: Policy
    layers: list[ConvLayer]
    model: str
    recipe: str
    image_bits: int
    ratio: float
    of_what: str
    n_priced: int | None = None
    original_top1: float | None = None

    def config(self, result: SearchResult) -> Record:
        """The keys of `config.json` that results with a policy have."""
        plain = {key: value for key, value in vars(self).items() if key not in ("policy", "layers")}
        return {**plain, "budget": result.limit, "cost": result.cost}

    def write(self, experiment: Experiment) -> None:
        """Write `policy.json`."""
        write_json(experiment.policy, policy_to_dict(self.policy, self.layers))

    @classmethod
    def read(cls, experiment: Experiment, config: _Fields) -> Record:
        """The fields of a SearchResult that `config` and `write` have written, taken out of `config`."""
        policy, layers = read_policy(experiment)
        choice = cls(
            policy=policy,
            layers=layers,
            model=config.take("model", str),
            recipe=config.take("recipe", str),
            image_bits=config.take("image_bits", int),
            ratio=config.take("ratio", (int, float)),
            of_what=config.take("of_what", str),
            n_priced=config.take("n_priced", (int, type(None)), None),
            original_top1=config.take("original_top1", (int, float, type(None)), None),
        )
        return {
            "choice": choice,
            "quantity": config.take("type", str),
            "unit": config.take("unit", str, ""),
            "limit": config.take("budget", (int, float, type(None)), None),
            "cost": config.take("cost", (int, float), 0.0),
        }


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The choice of a search, its cost and accuracy, and how it was searched.

    Attributes:
        method: name of the method, as in `--mode`.
        cost, quantity, unit, scope: the cost of the choice, in `unit`, over the layers of a scope.
        limit: the budget, in `unit`; None where none was given.
        predicted_top1, measured_top1: top-1, 0 to 1.
        cost_model: record of the cost model.
        settings: the method's own settings, as plain data.
        history: one record a step.
        front: the points of a front, as plain data.
        path: the folder that the result was read from.
    """

    method: str
    choice: SubnetChoice | PolicyChoice
    cost: float
    quantity: str
    unit: str
    limit: float | None = None
    scope: str = "full"
    predicted_top1: float | None = None
    measured_top1: float | None = None
    cost_model: Record = field(default_factory=dict)
    settings: Record = field(default_factory=dict)
    history: Sequence[Record] = ()
    front: Sequence[Record] | None = None
    made_by: Provenance | None = field(default=None, compare=False)
    path: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if taken := set(self.settings) & {*TAKEN, *PRICED_BY}:
            raise UserError(f"settings cannot be called {', '.join(sorted(taken))}: config.json has keys of that name")

    @property
    def found_subnet(self) -> SubnetChoice:
        """The chosen subnet; UserError if the choice is the policy of one network."""
        if isinstance(self.choice, PolicyChoice):
            raise UserError(f"{self._where} holds the policy of one network: no space was searched")
        return self.choice

    @property
    def found_policy(self) -> PolicyChoice:
        """The chosen policy; UserError if the choice is a subnet of a space."""
        if isinstance(self.choice, SubnetChoice):
            raise UserError(f"{self._where} holds a subnet of a space, not the policy of one network")
        return self.choice

    @property
    def _where(self) -> str:
        return "the experiment" if self.path is None else str(self.path)

    def config(self) -> Record:
        """The contents of `config.json`."""
        facts: Record = {"format": FORMAT, "mode": self.method, **self.choice.config(self)}
        facts |= {"type": self.quantity, "unit": self.unit, **self.settings, **self.cost_model}
        tops = {"predicted_accuracy": self.predicted_top1, "top1": self.measured_top1}
        return facts | {key: value for key, value in tops.items() if value is not None}

    def write(self, experiment: Experiment) -> None:
        """Write all files of the result. The choice comes last: where it exists, the result is complete."""
        write_json(experiment.config, self.config())
        write_jsonl(experiment.history, self.history)
        if self.front is not None:
            write_json(experiment.front, list(self.front))
        write_json(experiment.made_by, asdict(self.made_by or this_run()))
        write_json(experiment.lat, [self.cost])
        self.choice.write(experiment)


def read_result(experiment: Experiment) -> SearchResult:
    """Read the result of a finished search, or a published experiment, which has an `arch` file alone.

    UserError where there was no search, where it is not finished, or where a file lacks a key or is damaged.
    """
    return experiment.whole(lambda: _read(experiment))


def _read(experiment: Experiment) -> SearchResult:
    if not experiment.path.is_dir():
        raise UserError(f"no experiment at {experiment.path}; run search.py {_flag_of(experiment)} first")
    if experiment.arch.exists() and not experiment.config.exists():
        return _published(experiment)
    if not experiment.config.exists():
        raise UserError(_no_result(experiment))
    try:
        return _result_of(experiment, _Fields(read_json(experiment.config)))
    except _FieldError as error:
        raise UserError(f"{experiment.config} is not the record of a search: {error}") from error


def _no_result(experiment: Experiment) -> str:
    """The message for a folder without a finished search."""
    if experiment.unfinished() or any(experiment.path.glob("*.jsonl")):  # a state, or measured subnets
        return f"the search of {experiment.path} is not finished: continue it with the same command (search.py)"
    return f"{experiment.path} has no result of a search: run search.py {_flag_of(experiment)} first"


def _flag_of(experiment: Experiment) -> str:
    """The flag that names this very folder."""
    here = experiment.path.parent == Path("exps")
    return f"--exp_name {experiment.path.name}" if here else f"--exp_dir {experiment.path}"


def _result_of(experiment: Experiment, config: _Fields) -> SearchResult:
    version = config.take("format", int, 1)
    if version > FORMAT:
        raise UserError(f"{experiment.config} has format {version}, this program reads up to {FORMAT}")
    config.take("files", list, [])  # see `apq.manifest`
    kind = PolicyChoice if experiment.policy.exists() else SubnetChoice
    facts: Record = {
        "method": config.take("mode", str, "evolution"),
        "cost_model": _cost_model_of(config),
        "predicted_top1": config.take("predicted_accuracy", (int, float, type(None)), None),
        "measured_top1": config.take("top1", (int, float, type(None)), None),
        "history": _objects(experiment.history, read_jsonl(experiment.history)),
        "front": _front_of(experiment),
        "made_by": _provenance_of(experiment),
        **kind.read(experiment, config),
    }
    return SearchResult(**facts, settings=config.data, path=experiment.path)


def _cost_model_of(config: _Fields) -> Record:
    """Take the record of the cost model (`CostModel.record`) out of `config`, with its keys checked.

    A record with "cost_model" needs no "accelerator" and no "table".
    """
    record = {key: config.data.pop(key) for key in PRICED_BY if key in config.data}
    if "cost_model" not in record:
        keys = _Fields(record)
        keys.take("accelerator", dict)
        keys.take("table", (str, type(None)))
    return record


def read_policy(experiment: Experiment) -> tuple[Policy, list[ConvLayer]]:
    """The policy of an experiment and the layers of its network. UserError where the file is missing or damaged."""
    try:
        return policy_from_dict(read_json(experiment.policy))
    except UserError as error:
        raise UserError(f"{experiment.policy}: {error}") from error


def _published(experiment: Experiment) -> SearchResult:
    try:
        subnet = experiment.load_subnet(APQ_IMAGENET)
    except UserError as error:
        raise UserError(f"{experiment.path} has no {experiment.config.name}, and {error}") from error
    return SearchResult(
        method=PUBLISHED,
        choice=SubnetChoice(space=APQ_IMAGENET, subnet=subnet, models=Path("models")),
        cost=_cost_of(experiment),
        quantity="latency",
        unit="ms",
        scope="published",
        cost_model={"accelerator": {}, "table": None},  # an accelerator with all fields as published
        path=experiment.path,
    )


def _provenance_of(experiment: Experiment) -> Provenance | None:
    """Where the result comes from; None in experiments of format 1."""
    if not experiment.made_by.exists():
        return None
    try:
        return provenance_from_dict(read_json(experiment.made_by))
    except UserError as error:
        raise UserError(f"{experiment.made_by}: {error}") from error


def _front_of(experiment: Experiment) -> tuple[Record, ...] | None:
    """The points in `front.json`, None without that file."""
    if not experiment.front.exists():
        return None
    return _objects(experiment.front, read_json(experiment.front))


def _objects(path: Path, found: Any) -> tuple[Record, ...]:
    """The objects of a list that was read from a file; UserError for anything else."""
    if not (isinstance(found, list) and all(isinstance(item, dict) for item in found)):
        raise UserError(f"{path} must hold a list of objects")
    return tuple(found)


def _cost_of(experiment: Experiment) -> float:
    """The number in `lat`, NaN without that file."""
    if not experiment.lat.exists():
        return float("nan")
    found = read_json(experiment.lat)
    if not (isinstance(found, list) and len(found) == 1 and (found[0] != found[0] or is_number(found[0]))):
        raise UserError(f"{experiment.lat} must hold a list of one number")
    return float(found[0])


class _FieldError(UserError):
    """A key of a record is missing or has a value of another type."""


class _Fields:
    """Plain data from which fields are taken one by one, with their types checked."""

    def __init__(self, data: Any) -> None:
        if not isinstance(data, dict):
            raise _FieldError("it is not an object")
        self.data = dict(data)

    def take(self, key: str, kind: type | tuple[type, ...], *default: Any) -> Any:
        """Remove a key and return its value, or the default where the key is missing. UserError without a default."""
        if key not in self.data and default:
            return default[0]
        if key not in self.data:
            raise _FieldError(f"it lacks {key}")
        value = self.data.pop(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise _FieldError(f"{key} cannot be {value!r}")
        if isinstance(value, int) and not is_number(value):
            raise _FieldError(f"{key} has too many digits")
        return value
