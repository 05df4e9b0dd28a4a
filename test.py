"""Accuracy and cost of a finetuned experiment, recomputed from its checkpoint and arch file.

Accuracy is measured on the test images. Latency and energy are priced as the search priced them, at batch 1, in both
cost scopes: "full" prices every layer; "published" leaves out the first inverted-residual block and the classifier.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from apq.cli import Parser, add_common_flags, at_least, run, table
from apq.device import resolve_device
from apq.experiment import Experiment
from apq.subnet import spec_of
from dataset import check_classes, load_splits
from dataset.imagenet import unreadable
from dataset.splits import make_loader
from elastic_nn.networks.subnet_file import load_finetuned
from elastic_nn.training.engine import evaluate
from lut.costs import add_cost_flags, cost_rows, cost_source, network_costs, recorded_cost_source


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--exp_dir", type=Path, default=Path("exps/test"), help="folder of the experiment")
    parser.add_argument("--data", type=Path, help="image folder (train/CLASS, val/CLASS); digits and glyphs need none")
    add_cost_flags(parser, "what the search used")
    parser.add_argument("--batch_size", type=at_least(1), default=256, help="images evaluated at a time")
    add_common_flags(parser, seed=False)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    experiment = Experiment(args.exp_dir)
    net, space, subnet, images = load_finetuned(experiment)
    given = args.config or args.table
    source = cost_source(args.config, args.table) if given else recorded_cost_source(experiment)
    device = resolve_device(args.device)
    splits = load_splits(space, args.data)
    check_classes(splits, images, experiment.best_checkpoint)
    test = make_loader(splits.test, args.batch_size, sides=(subnet.resolution,))
    accuracy, skipped = evaluate(net.to(device), test, device), unreadable(splits.test)
    costs = network_costs(space, subnet, source)
    if args.json:
        network = {"costs": {scope: asdict(cost) for scope, cost in costs.items()}, "subnet": spec_of(space, subnet)}
        print(
            json.dumps(
                {"space": space.name, **asdict(accuracy), "n_skipped": skipped, "priced_by": str(source), **network}
            )
        )
        return
    unread = f" ({skipped} more could not be read)" if skipped else ""
    print(f"{experiment.path}: space {space.name}, {accuracy.n_images} test images{unread}")
    print(table([("accuracy", "top-1", "top-5"), ("test", f"{accuracy.top1:.2%}", f"{accuracy.top5:.2%}")]))
    print(table(cost_rows(costs)))
    print(f"latency and energy: {source}")


if __name__ == "__main__":
    run(main)
