"""The work of `test.py`: report the accuracy and costs of an experiment, recomputed from its checkpoint."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from apq.cli import table
from apq.device import resolve_device
from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import Record
from apq.layers import ConvLayer
from apq.policy import QUANTIZERS, Policy, priced_layers
from apq.search_result import PolicyChoice, SearchResult, SubnetChoice, read_result
from apq.space import SearchSpace
from apq.subnet import Subnet, spec_of
from dataset.imagenet import unreadable
from dataset.splits import Splits
from elastic_nn.networks.policy_file import PolicyModel, load_finetuned_policy
from elastic_nn.networks.subnet_file import FinetunedSubnet
from elastic_nn.training.distributed import processes, sum_over
from elastic_nn.training.engine import Accuracy, evaluate
from elastic_nn.training.experiment_network import check_no_supernet, load_images, load_subnet_and_images
from elastic_nn.training.session import Execution, Session
from lut.bit_costs import linear_costs, weight_costs
from lut.cost_model import CostModel, cost_model_from_flags, recorded_cost_model
from lut.costs import NetworkCost, by_scope, cost_of, cost_rows, network_costs
from lut.measured import load_measured
from report.plots import plot_policy

BITS_PICTURE = "bits.png"  # in the folder of an experiment with a policy


def report_experiment(args: argparse.Namespace) -> None:
    """Measure and print the network of the experiment that the flags of `test.py` name."""
    experiment = Experiment(args.exp_dir)
    with processes(resolve_device(args.device)) as execution:
        if experiment.policy.exists():
            report_policy(args, experiment, execution)
        elif args.supernet is None and experiment.arch.exists() and not has_weights(experiment):
            if execution.main:
                report_costs(args, experiment)
        else:
            report_subnet(args, experiment, execution)


def has_weights(experiment: Experiment) -> bool:
    """Whether there are weights to measure: a checkpoint, or the supernet that `config.json` names."""
    return experiment.best_checkpoint.exists() or experiment.config.exists()


def report_costs(args: argparse.Namespace, experiment: Experiment) -> None:
    """Print the costs of an experiment that has an `arch` file alone, as published: there are no weights to measure."""

    def read() -> tuple[SubnetChoice, CostModel]:
        return read_result(experiment).found_subnet, cost_model_of(args, experiment)

    found, cost_model = experiment.whole(read)
    if args.json:
        print(json.dumps({"top1": None, **facts_of(found.space, found.subnet, cost_model)}))
        return
    print(f"{experiment.path}: space {found.space.name}, an arch file alone, no weights to measure")
    print("\n".join(cost_lines(found.space, found.subnet, cost_model)))


def report_subnet(args: argparse.Namespace, experiment: Experiment, execution: Execution) -> None:
    """Measure a subnet on the test images; print its accuracy and costs."""

    def read() -> tuple[FinetunedSubnet, Splits, bool, CostModel]:
        found = load_subnet_and_images(experiment, args.supernet, args.data, resolve_device(args.device))
        return *found, experiment.best_checkpoint.exists(), cost_model_of(args, experiment)

    (net, space, subnet, _), splits, finetuned, cost_model = experiment.whole(read)
    accuracy, skipped = measure(args, net, splits, subnet.resolution, execution)
    if not execution.main:
        return
    if args.json:
        facts = {**asdict(accuracy), "n_skipped": skipped, "from_supernet": not finetuned}
        print(json.dumps({**facts, **facts_of(space, subnet, cost_model)}))
        return
    how = "" if finetuned else " as it is in its supernet, not finetuned"
    print_accuracy(f"{experiment.path}: space {space.name}{how}", accuracy, skipped)
    print("\n".join(cost_lines(space, subnet, cost_model)))


def facts_of(space: SearchSpace, subnet: Subnet, cost_model: CostModel) -> Record:
    """A subnet and its costs as plain data, for --json."""
    costs = {scope: asdict(cost) for scope, cost in network_costs(space, subnet, cost_model).items()}
    facts = {"space": space.name, "priced_by": str(cost_model)}
    return {**facts, "costs": costs, "subnet": spec_of(space, subnet)}


def cost_lines(space: SearchSpace, subnet: Subnet, cost_model: CostModel) -> list[str]:
    """The costs of a subnet as lines of text."""
    costs = network_costs(space, subnet, cost_model)
    return [table(cost_rows(by_scope(costs))), f"latency and energy: {cost_model}"]


def report_policy(args: argparse.Namespace, experiment: Experiment, execution: Execution) -> None:
    """Measure the network of a policy on the test images; print its accuracy and costs, draw its bits."""
    check_no_supernet(experiment, args.supernet)

    def read() -> tuple[SearchResult, PolicyModel, CostModel | None]:
        result, found = read_result(experiment), load_finetuned_policy(experiment)
        priced = QUANTIZERS[found.policy.quantizer].priced
        return result, found, cost_model_of(args, experiment) if priced else None

    result, (net, spec, policy, layers, images), cost_model = experiment.whole(read)
    splits = load_images(experiment, spec, images, args.data)
    accuracy, skipped = measure(args, net, splits, spec.resolution, execution)
    if not execution.main:
        return
    drawn = draw_bits(experiment, policy, layers)
    costs = costs_of_policy(result, cost_model)
    if args.json:
        facts = {"model": result.found_policy.model, "quantizer": policy.quantizer, "policy": policy.strategy}
        print(json.dumps({**facts, **asdict(accuracy), "n_skipped": skipped, **costs.facts()}))
        return
    print_accuracy(f"{experiment.path}: {policy.quantizer} policy of {result.found_policy.model}", accuracy, skipped)
    print("\n".join(costs.lines(result)))
    print(f"bits of each layer: {drawn}")


def draw_bits(experiment: Experiment, policy: Policy, layers: Sequence[ConvLayer]) -> str:
    """Draw the bits of each layer in the experiment. Returns the file, or why there is none."""
    try:
        with experiment.adding(BITS_PICTURE) as picture:
            plot_policy(policy, layers, picture)
    except UserError as error:  # a run works in the folder, or it is not ours to write
        return f"not drawn, {error}"
    return str(experiment.path / BITS_PICTURE)


@dataclass(frozen=True, kw_only=True)
class PolicyCosts:
    """The costs of a policy: bytes of weights, `costs` by a cost model, and a `measured` cost, if there is a table.

    `size_ratio` is relative to 32 bits a weight, `measured_ratio` to the network at 8 bits.
    """

    weight_bytes: float
    size_ratio: float
    costs: dict[str, NetworkCost]
    cost_model: CostModel | None
    measured: float | None
    measured_ratio: float | None

    def facts(self) -> Record:
        """The costs as plain data, for --json."""
        facts: Record = {"weight_bytes": self.weight_bytes, "size_ratio": self.size_ratio}
        if self.measured is not None:
            facts["measured_cost"] = self.measured
        costs = {name: asdict(cost) for name, cost in self.costs.items()}
        return {**facts, "costs": costs, "priced_by": str(self.cost_model) if self.cost_model else None}

    def lines(self, result: SearchResult) -> list[str]:
        """The costs as lines of text, with the budget of the search."""
        lines = [f"weights: {self.weight_bytes / 1e3:.1f} kB, {self.size_ratio:.4f} of 32 bits each"]
        if self.costs:
            lines += [table(cost_rows(self.costs)), f"latency and energy: {self.cost_model}"]
        if self.measured is not None:
            by = f"{result.quantity} by {result.cost_model['measured']}"
            lines.append(f"{by}: {self.measured:g}, {self.measured_ratio:.4f} of 8 bits")
        if result.limit is not None:
            choice = result.found_policy
            found = f"found {result.cost:g}, {choice.ratio:.4f} of {choice.of_what}"
            lines.append(f"budget of the search: {result.quantity} <= {result.limit:g} {result.unit}; {found}")
        return lines


def costs_of_policy(result: SearchResult, cost_model: CostModel | None) -> PolicyCosts:
    """The costs of a policy by a cost model, if one is given, and by the measured table of its search, if any."""
    choice = result.found_policy
    policy, bits = choice.policy, choice.policy.matrix(choice.image_bits)
    sizes, weights = weight_costs(choice.layers, result.settings.get("weights_left")), policy.matrix()[:, :1]
    measured = None
    if file := result.cost_model.get("measured"):
        own_table = load_measured(Path(file), policy.names, result.quantity)
        measured = linear_costs(choice.layers, result.quantity, own_table)
    return PolicyCosts(
        weight_bytes=sizes.total(weights),
        size_ratio=sizes.ratio(weights),
        costs={} if cost_model is None else beside_8_bits(choice, cost_model),
        cost_model=cost_model,
        measured=None if measured is None else measured.total(bits),
        measured_ratio=None if measured is None else measured.ratio(bits),
    )


def beside_8_bits(choice: PolicyChoice, cost_model: CostModel) -> dict[str, NetworkCost]:
    """The cost of a policy and of the same network at 8 bits throughout."""
    at_8_bits = [replace(layer, w_bits=8, a_bits=8) for layer in choice.layers]
    return {
        "this policy": cost_of(priced_layers(choice.layers, choice.policy, choice.image_bits), cost_model),
        "all 8 bits": cost_of(at_8_bits, cost_model),
    }


def cost_model_of(args: argparse.Namespace, experiment: Experiment) -> CostModel:
    """The cost model in the flags, or else that of the search."""
    given = args.config or args.table
    return cost_model_from_flags(args.config, args.table) if given else recorded_cost_model(experiment)


def measure(
    args: argparse.Namespace, net: nn.Module, splits: Splits, side: int, execution: Execution
) -> tuple[Accuracy, int]:
    """Accuracy on the test images, and the number of test images that could not be read. Processes share the images."""
    session = Session(splits=splits, device=resolve_device(args.device), execution=execution)
    test = session.loader(splits.test, args.batch_size, sides=(side,))
    accuracy = evaluate(net.to(session.device), test, session.device, execution=execution)
    skipped = torch.tensor(float(unreadable(splits.test)), device=session.device)
    return accuracy, int(sum_over(skipped, execution))


def print_accuracy(title: str, accuracy: Accuracy, skipped: int) -> None:
    """Print the first lines of a report."""
    unread = f" ({skipped} more could not be read)" if skipped else ""
    print(f"{title}, {accuracy.n_images} test images{unread}")
    print(table([("accuracy", "top-1", "top-5"), ("test", f"{accuracy.top1:.2%}", f"{accuracy.top5:.2%}")]))
