"""Does the accuracy of a quantized network depend on the units of its activations? Small networks on digits.

A network with BatchNorm is written in other units: the inputs of its quantized layers are 100, 1,000 or 1,024 times
smaller, and their outputs are multiplied by as much. It is the same function, so quantized training should give the
same accuracy; for a power of two, to the last bit. Another network has ReLU and no norms: its activations exceed 6.
"Before" is calibrated, not trained. About two minutes on one core.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from tqdm import tqdm

from apq.cli import Parser, run
from apq.presets import DIGITS
from benchmarks.machine import describe
from benchmarks.markdown import markdown
from dataset import load_splits
from dataset.splits import make_loader
from elastic_nn.modules.quant_layers import quantized_layers
from elastic_nn.networks.named_models import use_elastic_norms
from elastic_nn.networks.quantize_model import quantize_model
from elastic_nn.quantizers import SCHEMES, QuantScheme
from elastic_nn.training.batchnorm import recalibrate
from elastic_nn.training.calibration import calibrate_ranges, signed_inputs
from elastic_nn.training.engine import EVALUATION_BATCH, evaluate
from elastic_nn.training.finetune import train_epochs
from elastic_nn.training.policies import calibration_images
from elastic_nn.training.recipe import TrainConfig
from elastic_nn.training.session import Session

CPU, SIDE, RECALIBRATION_IMAGES = torch.device("cpu"), DIGITS.resolutions[-1], 1024
FLOAT = TrainConfig(epochs=20, lr=0.05, label_smoothing=0.0)
UNITS = (1, 100, 1000, 1024)
WIDTHS, STRIDES = (1, 16, 32, 32, 64), (2, 2, 1, 2)


class Units(nn.Module):
    """A layer without bias in other units: its input is divided by `c` and its output multiplied by it."""

    def __init__(self, layer: nn.Module, c: float) -> None:
        super().__init__()
        self.layer, self.c = layer, c

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x / self.c) * self.c


def with_norms(c: float) -> nn.Sequential:
    """Convolutions with BatchNorm and ReLU. The activations that are quantized are `c` times smaller than usual."""
    layers: list[nn.Module] = []
    for i, stride in enumerate(STRIDES):
        conv = nn.Conv2d(WIDTHS[i], WIDTHS[i + 1], 3, stride, 1, bias=False)
        layers += [Units(conv, c if i else 1.0), nn.BatchNorm2d(WIDTHS[i + 1]), nn.ReLU()]
    net = nn.Sequential(*layers, *pool(), Units(nn.Linear(WIDTHS[-1], 10, bias=False), c))
    use_elastic_norms(net)
    return net


def without_norms() -> nn.Sequential:
    """Convolutions with ReLU alone."""
    layers: list[nn.Module] = []
    for i, stride in enumerate(STRIDES):
        conv = nn.Conv2d(WIDTHS[i], WIDTHS[i + 1], 3, stride, 1)
        nn.init.kaiming_normal_(conv.weight)
        layers += [conv, nn.ReLU()]
    return nn.Sequential(*layers, *pool(), nn.Linear(WIDTHS[-1], 10))


def pool() -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten()


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the finetunes")
    args = parser.parse_args(argv)
    print(describe(), file=sys.stderr)
    print(f"\n{units_table(args.seeds)}\n\n{caps_table(args.seeds)}")


def units_table(seeds: list[int]) -> str:
    """The network with norms in several units, at 4 bits."""
    torch.manual_seed(0)
    net, rows = trained(with_norms(1.0)), []
    cells = [(name, c) for name in ("linear", "linear-published", "lsq", "lsq-scale-free") for c in UNITS]
    for name, c in tqdm(cells, disable=None):
        config = TrainConfig(epochs=3, lr=0.05, label_smoothing=0.0)
        before, after = finetuned(lambda c=c: in_units(net, c), SCHEMES[name], 4, config, seeds)
        rows.append((name, f"1 / {c}", percent([before]), percent(after), ", ".join(f"{100 * a:.2f}" for a in after)))
    titles = ("quantizers", "activations", "before", "after, mean", "of each seed")
    return f"Float: {percent([top1(net)])}.\n\n{markdown(titles, rows)}"


def caps_table(seeds: list[int]) -> str:
    """The network without norms, whose clips are those of its activations or at most 6."""
    torch.manual_seed(0)
    net, rows = trained(without_norms()), []
    for bits in (8, 4):
        for name in ("linear", "linear-published"):
            config = TrainConfig(epochs=2, lr=0.02, label_smoothing=0.0)
            before, after = finetuned(lambda: copied(net, without_norms()), SCHEMES[name], bits, config, seeds)
            rows.append((name, bits, percent([before]), percent(after)))
    return f"Float: {percent([top1(net)])}.\n\n{markdown(('quantizers', 'bits', 'before', 'after, mean'), rows)}"


def session(seed: int) -> Session:
    """Digits on the CPU."""
    return Session(splits=load_splits(DIGITS), device=CPU, seed=seed)


def trained(net: nn.Sequential) -> nn.Sequential:
    """The float network, trained."""
    train_epochs(net, session(0), FLOAT, side=SIDE)
    return net


def in_units(net: nn.Sequential, c: float) -> nn.Sequential:
    """A copy of the network with norms in other units."""
    return copied(net, with_norms(c))


def copied(net: nn.Sequential, other: nn.Sequential) -> nn.Sequential:
    """The other network with the weights of this one."""
    other.load_state_dict(net.state_dict())
    return other


def finetuned(
    make: Callable[[], nn.Sequential], scheme: QuantScheme, bits: int, config: TrainConfig, seeds: list[int]
) -> tuple[float, list[float]]:
    """Test top-1 of a quantized network before any training, and after the finetune of each seed."""
    after: list[float] = []
    for seed in seeds:
        net = quantized(make(), scheme, bits)
        before = top1(net)
        train_epochs(net, session(seed), config, side=SIDE)
        after.append(top1(net))
    return before, after


def quantized(net: nn.Sequential, scheme: QuantScheme, bits: int) -> nn.Sequential:
    """The network calibrated at these bits; its first layer has 8."""
    splits = session(0).splits
    names = [name for name, module in net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    images = calibration_images(splits, SIDE, CPU)
    quantize_model(net, names, scheme, signed_inputs(net, names, images))
    for i, layer in enumerate(quantized_layers(net).values()):
        layer.set_bits(bits if i else 8, bits if i else 8)
    calibrate_ranges(net, images)
    recalibrate(net, make_loader(splits.calibration, 64, sides=(SIDE,)), CPU, RECALIBRATION_IMAGES)
    return net


def top1(net: nn.Module) -> float:
    """Accuracy on the 400 test digits."""
    return evaluate(net, make_loader(load_splits(DIGITS).test, EVALUATION_BATCH, sides=(SIDE,)), CPU).top1


def percent(accuracies: list[float]) -> str:
    """Their mean."""
    return f"{100 * sum(accuracies) / len(accuracies):.2f}%"


if __name__ == "__main__":
    run(main)
