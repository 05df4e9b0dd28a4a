"""Train a few steps in float64 and save the weights; run alone or under torchrun by test_distributed.py."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from apq.presets import DIGITS
from dataset import load_splits
from dataset.splits import Splits, TensorImages
from elastic_nn.networks import DynamicQuantizedProxylessNASNets
from elastic_nn.training.distributed import processes
from elastic_nn.training.engine import (
    Execution,
    TrainConfig,
)
from elastic_nn.training.finetune import finetune
from elastic_nn.training.progressive_shrinking import train_supernet
from elastic_nn.training.recipes import RECIPES

CPU = torch.device("cpu")


def few_digits() -> Splits:
    """A few real digits in float64, of which the last batch is odd."""
    full = load_splits(DIGITS)

    def cut(part: TensorImages, n: int) -> TensorImages:
        return TensorImages(part.images[:n].double(), part.labels[:n], part.augment)

    parts = cut(full.train, 75), cut(full.calibration, 64), cut(full.val, 51), cut(full.test, 51)
    return Splits(*parts, source={"dataset": "few digits"})


def main() -> None:
    out = Path(sys.argv[1])
    splits = few_digits()
    torch.set_default_dtype(torch.float64)  # differences that are not rounding would show
    with processes(CPU) as share:
        execution = Execution(share=share)
        recipe = RECIPES["tiny"]
        phases = (replace(p, train=replace(p.train, batch_size=32), subnets_per_step=2) for p in recipe.phases)
        recipe = replace(recipe, phases=tuple(phases))
        net, records = train_supernet(
            DIGITS, splits, recipe, seed=1, device=CPU, state_file=out / "state.pt", execution=execution
        )
        torch.manual_seed(0)
        quantized = DynamicQuantizedProxylessNASNets(space=DIGITS)
        config = TrainConfig(epochs=2, lr=0.01, batch_size=32)
        top1, weights = finetune(quantized, splits, config, seed=0, device=CPU, side=32, execution=execution, ema=0.9)
        if execution.main:
            torch.save(
                {"net": net.state_dict(), "records": records, "top1": top1, "finetuned": weights}, out / "all.pt"
            )


if __name__ == "__main__":
    main()
