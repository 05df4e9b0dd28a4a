"""The report of a search result, as text and as JSON, for every method."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from apq.cli import listing, table
from apq.experiment import Experiment
from apq.files import Record
from apq.policy import Policy
from apq.search_result import SearchResult, SubnetChoice
from apq.subnet import shown_spec, spec_of
from lut.cost_model import CostModel
from lut.costs import PRICED, by_scope, cost_rows, network_costs


@dataclass(frozen=True, kw_only=True)
class Heading:
    """The method's own parts of a report.

    Attributes:
        title, rows: the title and a table above the choice.
        choice: a line before the choice.
        measured: how the accuracy was measured.
        cautions: lines after a predicted accuracy, which say how far it can be relied on.
        facts: further keys of the JSON object.
    """

    title: str = ""
    rows: Sequence[tuple[str, ...]] = ()
    choice: str = ""
    measured: str = ""
    cautions: Sequence[str] = ()
    facts: Record = field(default_factory=dict)


def report_result(
    experiment: Experiment,
    result: SearchResult,
    cost_model: CostModel,
    heading: Heading = Heading(),
    *,
    as_json: bool = False,
) -> None:
    """Print a result with its costs by a cost model."""
    shown = result_as_json if as_json else result_as_text
    print(shown(experiment, result, cost_model, heading))


def result_as_json(experiment: Experiment, result: SearchResult, cost_model: CostModel, heading: Heading) -> str:
    """The result as a JSON object. All results with a subnet have the same keys, and so have all with a policy."""
    facts: Record = {"exp_dir": str(experiment.path), "type": result.quantity, "unit": result.unit, "cost": result.cost}
    if isinstance(result.choice, SubnetChoice):
        space, subnet = result.choice.space, result.choice.subnet
        facts |= {"space": space.name, "constraint": result.limit, "scope": result.scope}
        tops = {"predicted_accuracy": result.predicted_top1, "top1": result.measured_top1}
        facts |= {name: top1 for name, top1 in tops.items() if top1 is not None}
        costs = {scope: asdict(cost) for scope, cost in network_costs(space, subnet, cost_model).items()}
        facts |= {"costs": costs, "subnet": spec_of(space, subnet)}
    else:
        choice = result.choice
        facts |= {"budget": result.limit, "ratio": choice.ratio, "of_what": choice.of_what}
        facts |= {"original_top1": choice.original_top1, "policy": choice.policy.strategy}
    return json.dumps({**facts, "priced_by": str(cost_model), **heading.facts})


def result_as_text(experiment: Experiment, result: SearchResult, cost_model: CostModel, heading: Heading) -> str:
    """The result as text: title, table of the method, choice, accuracy and costs."""
    of_kind = _subnet_lines if isinstance(result.choice, SubnetChoice) else _policy_lines
    title, lines = of_kind(result, cost_model, heading)
    parts = [f"{experiment.path}: {heading.title or title}"]
    parts += [table(heading.rows)] if heading.rows else []
    parts += [heading.choice] if heading.choice else []
    return "\n".join([*parts, *lines])


def _subnet_lines(result: SearchResult, cost_model: CostModel, heading: Heading) -> tuple[str, list[str]]:
    space, subnet = result.found_subnet.space, result.found_subnet.subnet
    budget = "" if result.limit is None else f" for {result.quantity} <= {result.limit:g} {result.unit}"
    tops = (
        (result.predicted_top1, "predicted top-1 {:.2%}"),
        (result.measured_top1, f"top-1 {{:.2%}}{heading.measured and ' ' + heading.measured}"),
    )
    accuracy = [how.format(top1) for top1, how in tops if top1 is not None]
    cost = f"{result.quantity} {result.cost:g} {result.unit} ({result.scope} scope)"
    return f"best subnet of space {space.name}{budget}", [
        listing(shown_spec(space, spec_of(space, subnet))),
        "; ".join([*accuracy, cost]),
        *heading.cautions,
        table(cost_rows(by_scope(network_costs(space, subnet, cost_model)))),
        f"latency and energy: {cost_model}",
    ]


def bit_rows(policy: Policy) -> list[tuple[str, ...]]:
    """Rows of a printed table: the bits of every layer of a policy."""
    titles = ("layer", "weight bits", "activation bits")[: 1 + len(policy.bits[0])]
    rows: Sequence[tuple[str, ...]] = [
        (name, *("image" if b < 0 else str(b) for b in row))
        for name, row in zip(policy.names, policy.bits, strict=True)
    ]
    return [titles, *rows]


def _policy_lines(result: SearchResult, cost_model: CostModel, heading: Heading) -> tuple[str, list[str]]:
    choice = result.found_policy
    n_layers, n_priced = len(choice.policy.names), choice.n_priced
    covered = "" if n_priced in (None, n_layers) else f" (of the {n_priced} layers in the table)"
    cost = f"{result.quantity} {result.cost:g} {result.unit}, {choice.ratio:.4f} of {choice.of_what}{covered}"
    lines = [table(bit_rows(choice.policy)), cost, *([heading.measured] if heading.measured else [])]
    priced = [f"{result.quantity}: {cost_model}"] if result.quantity in PRICED else []
    return f"{choice.policy.quantizer} policy of {choice.model}", [*lines, *priced]
