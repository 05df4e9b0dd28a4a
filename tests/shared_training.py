"""Train a few steps in float64 and save the weights; run alone or under torchrun by test_distributed.py."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from apq.bit_widths import at_bits
from apq.presets import DIGITS
from apq.space import SearchSpace
from dataset import load_splits
from dataset.splits import Splits, TensorImages
from elastic_nn.networks import DynamicQuantizedProxylessNASNets
from elastic_nn.quantizers import BATCHQUANT, LSQ, QuantScheme
from elastic_nn.training.distributed import processes
from elastic_nn.training.engine import Training, seed_epoch, train_one_epoch
from elastic_nn.training.finetune import finetune
from elastic_nn.training.inheritance import first_supernet
from elastic_nn.training.progressive_shrinking import SupernetPlan, train_supernet
from elastic_nn.training.recipe import TrainConfig
from elastic_nn.training.recipes import RECIPES
from elastic_nn.training.sampling import draw_subnets
from elastic_nn.training.session import Session

CPU = torch.device("cpu")


def few_digits() -> Splits:
    """A few real digits in float64. A rest of three joins the batch before it, which has an odd number then."""
    full = load_splits(DIGITS)

    def cut(part: TensorImages, n: int) -> TensorImages:
        return TensorImages(part.images[:n].double(), part.labels[:n], part.augment)

    parts = cut(full.train, 67), cut(full.calibration, 64), cut(full.val, 51), cut(full.test, 51)
    return Splits(*parts, source={"dataset": "few digits"})


def main() -> None:
    out = Path(sys.argv[1])
    splits = few_digits()
    torch.set_default_dtype(torch.float64)  # differences that are not rounding would show
    with processes(CPU) as execution:
        session = Session(splits=splits, device=CPU, execution=execution)
        recipe = RECIPES["tiny"]
        phases = (
            replace(p, train=replace(p.train, batch_size=32, dropout=0.1), subnets_per_step=2) for p in recipe.phases
        )
        recipe = replace(recipe, phases=tuple(phases))
        net, records = train_supernet(SupernetPlan(space=DIGITS, recipe=recipe), replace(session, seed=1))
        torch.manual_seed(0)
        quantized = DynamicQuantizedProxylessNASNets(space=DIGITS)
        config = TrainConfig(epochs=2, lr=0.01, batch_size=32)
        averaging = replace(session, execution=replace(execution, ema=0.9))
        top1, weights = finetune(quantized, averaging, config, side=32)
        learned = sandwiched(at_bits(DIGITS, 4), LSQ, "tiny-sandwich", session)
        mixed = sandwiched(DIGITS, BATCHQUANT, "tiny-qfa", session)
        if execution.main:
            made = {"net": net.state_dict(), "finetuned": weights, "learned": learned.state_dict()}
            made["mixed"] = mixed.state_dict()
            torch.save({**made, "records": records, "top1": top1}, out / "all.pt")


def sandwiched(space: SearchSpace, scheme: QuantScheme, recipe: str, session: Session) -> torch.nn.Module:
    """A quantized supernet after two epochs of the sandwich rule.

    Its BatchNorm does not start with biases of 0: a channel whose weights are all rounded to 0 would then stand where
    ReLU bends, and the rounding of the last digit decide on its gradient.
    """
    torch.manual_seed(0)
    net = first_supernet(space, scheme, None, session.splits, 64, CPU)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.bias, 0.1, 0.5)
    phase = next(phase for phase in RECIPES[recipe].phases if phase.sandwich)
    training, rng = Training(net, phase.train, CPU, execution=session.execution), np.random.default_rng(0)
    batches = session.loader(session.splits.train, 32, shuffle=True, sides=DIGITS.resolutions)
    for epoch in range(2):
        seed_epoch(0, epoch)
        train_one_epoch(training, batches, epoch, partial(draw_subnets, net, phase, rng))
    return net


if __name__ == "__main__":
    main()
