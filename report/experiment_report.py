"""The report of an experiment: accuracy and costs, recomputed from its checkpoint. The work of `test.py`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from apq.checkpoint import digest, load_checkpoint
from apq.cli import table
from apq.device import resolve_device
from apq.errors import UserError
from apq.experiment import Experiment
from apq.model_folder import ModelFolder
from apq.policy import priced_layers
from apq.space import SearchSpace
from apq.subnet import Subnet, spec_of
from dataset import check_classes, load_splits
from dataset.imagenet import unreadable
from dataset.splits import ImageSpec, Splits, make_loader
from elastic_nn.networks.mbconv_net import MBConvNet
from elastic_nn.networks.policy_file import load_finetuned_policy
from elastic_nn.networks.subnet_file import load_finetuned
from elastic_nn.training.engine import Accuracy, evaluate
from elastic_nn.training.found_subnet import FoundSubnet, load_found
from lut.bit_costs import kmeans_costs, measured_costs
from lut.cost_model import CostModel, cost_model_from_flags, recorded_cost_model
from lut.costs import by_scope, cost_of, cost_rows, network_costs
from lut.measured import load_measured
from report.plots import plot_policy


def report_experiment(args: argparse.Namespace) -> None:
    """Measure and print the network of the experiment that the flags of `test.py` name."""
    experiment = Experiment(args.exp_dir)
    if experiment.policy.exists():
        report_policy(args, experiment)
    else:
        report_subnet(args, experiment)


def report_subnet(args: argparse.Namespace, experiment: Experiment) -> None:
    """Measure a found subnet on the test images; print its accuracy and costs."""
    net, space, subnet, splits = load_network(args, experiment)
    finetuned, cost_model = experiment.best_checkpoint.exists(), cost_model_of(args, experiment)
    accuracy, skipped = measure(args, net, splits, subnet.resolution)
    costs = network_costs(space, subnet, cost_model)
    if args.json:
        network = {"costs": {scope: asdict(cost) for scope, cost in costs.items()}, "subnet": spec_of(space, subnet)}
        facts = {"space": space.name, **asdict(accuracy), "n_skipped": skipped, "priced_by": str(cost_model)}
        print(json.dumps({**facts, "from_supernet": not finetuned, **network}))
        return
    how = "" if finetuned else " as it is in its supernet, not finetuned"
    print_accuracy(f"{experiment.path}: space {space.name}{how}", accuracy, skipped)
    print(table(cost_rows(by_scope(costs))))
    print(f"latency and energy: {cost_model}")


def load_network(args: argparse.Namespace, experiment: Experiment) -> tuple[MBConvNet, SearchSpace, Subnet, Splits]:
    """The network of the checkpoint, or else of the supernet, calibrated; its space, subnet and images."""
    if experiment.best_checkpoint.exists():
        if args.supernet is not None:
            raise UserError(f"{experiment.best_checkpoint} has the network's weights: leave --supernet out")
        net, space, subnet, images = load_finetuned(experiment)
        return net, space, subnet, load_images(args, space, images, experiment)
    found = load_found(experiment, supernet=args.supernet, data=args.data, finetuned=False)
    if args.supernet is None:
        check_supernet(experiment, found)
    return found.network(resolve_device(args.device)), found.space, found.subnet, found.splits


def check_supernet(experiment: Experiment, found: FoundSubnet) -> None:
    """UserError if the predictor that the search used was trained for another supernet than the one beside it."""
    predictor = ModelFolder(Path(experiment.load_config()["acc_predictor_dir"])).acc_quant
    known = load_checkpoint(predictor).get("data", {}).get("supernet") if predictor.exists() else None
    if known is not None and known != digest(found.supernet.state_dict()):
        raise UserError(f"{found.file} is not the supernet that {predictor} was trained for: name that by --supernet")


def report_policy(args: argparse.Namespace, experiment: Experiment) -> None:
    """Measure a quantized network of given architecture on the test images; print accuracy and costs, draw its bits."""
    if args.supernet is not None:
        raise UserError(f"{experiment.path} has its own network: leave --supernet out")
    net, spec, policy, layers, images = load_finetuned_policy(experiment)
    config = experiment.load_config()
    accuracy, skipped = measure(args, net, load_images(args, spec, images, experiment), spec.resolution)
    sizes = kmeans_costs(layers)  # of the weights alone, whatever the quantizer
    weights = policy.matrix()[:, :1]
    facts = {"weight_bytes": sizes.total(weights), "size_ratio": sizes.ratio(weights)}
    plot_policy(policy, layers, experiment.bits_plot)
    bits, measured = policy.matrix(config["image_bits"]), None
    if config["measured"]:  # prices of a device of the user's own, beside those of the model
        measured = measured_costs(load_measured(Path(config["measured"]), policy.names, config["type"]))
        facts["measured_cost"] = measured.total(bits)
    costs, cost_model = {}, None
    if policy.quantizer == "linear":
        cost_model = cost_model_of(args, experiment)
        at_8_bits = [replace(layer, w_bits=8, a_bits=8) for layer in layers]
        costs = {
            "this policy": cost_of(priced_layers(layers, policy, config["image_bits"]), cost_model),
            "all 8 bits": cost_of(at_8_bits, cost_model),
        }
    if args.json:
        found = {"model": config["model"], "quantizer": policy.quantizer, "policy": policy.strategy}
        priced = {
            "costs": {name: asdict(cost) for name, cost in costs.items()},
            "priced_by": cost_model and str(cost_model),
        }
        print(json.dumps({**found, **asdict(accuracy), "n_skipped": skipped, **facts, **priced}))
        return
    print_accuracy(f"{experiment.path}: {policy.quantizer} policy of {config['model']}", accuracy, skipped)
    print(f"weights: {facts['weight_bytes'] / 1e3:.1f} kB, {facts['size_ratio']:.4f} of 32 bits each")
    if costs:
        print(table(cost_rows(costs)))
        print(f"latency and energy: {cost_model}")
    if measured is not None:
        print(
            f"{config['type']} by {config['measured']}: {measured.total(bits):g}, {measured.ratio(bits):.4f} of 8 bits"
        )
    if config["budget"] is not None:
        found = f"found {config['cost']:g}, {config['ratio']:.4f} of {config['of_what']}"
        print(f"budget of the search: {config['type']} <= {config['budget']:g} {config['unit']}; {found}")
    print(f"bits of each layer: {experiment.bits_plot}")


def cost_model_of(args: argparse.Namespace, experiment: Experiment) -> CostModel:
    """The cost cost_model that the flags name, or else that of the search."""
    given = args.config or args.table
    return cost_model_from_flags(args.config, args.table) if given else recorded_cost_model(experiment)


def load_images(
    args: argparse.Namespace, spec: ImageSpec, images: dict[str, Any] | None, experiment: Experiment
) -> Splits:
    """Load the images, whose classes must be those that the checkpoint was trained on."""
    splits = load_splits(spec, args.data)
    check_classes(splits, images, experiment.best_checkpoint)
    return splits


def measure(args: argparse.Namespace, net: nn.Module, splits: Splits, side: int) -> tuple[Accuracy, int]:
    """Accuracy on the test images, and the number of them that could not be read."""
    device = resolve_device(args.device)
    test = make_loader(splits.test, args.batch_size, sides=(side,))
    return evaluate(net.to(device), test, device), unreadable(splits.test)


def print_accuracy(title: str, accuracy: Accuracy, skipped: int) -> None:
    """The first lines of a report."""
    unread = f" ({skipped} more could not be read)" if skipped else ""
    print(f"{title}, {accuracy.n_images} test images{unread}")
    print(table([("accuracy", "top-1", "top-5"), ("test", f"{accuracy.top1:.2%}", f"{accuracy.top5:.2%}")]))
