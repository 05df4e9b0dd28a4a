"""Quantization-aware finetune of a search result: a subnet of a supernet, or the policy of a given network.

Calibrates the quantizers, recalibrates BatchNorm, trains, and keeps the weights of the epoch with the best validation
accuracy in checkpoint/model_best.pth.tar. A killed run continues with the same command. Next: test.py.
"""

from __future__ import annotations

import json
from pathlib import Path

from apq.cli import MOST_BATCH, MOST_LR, Parser, above_0, add_common_flags, add_execution_flags, at_least, run
from apq.experiment import get_experiment
from apq.policy import QUANTIZER_HELP, of_activations
from elastic_nn.training.recipes import RECIPES


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--exp_name", default="test", help="name of the experiment: its folder is exps/NAME")
    parser.add_argument("--exp_dir", type=Path, help="folder of the experiment (default: exps/EXP_NAME)")
    parser.add_argument("--supernet", type=Path, help="file of the supernet (default: the one beside the predictor)")
    parser.add_argument("--data", type=Path, help="own images: train/CLASS, val/CLASS (default: of earlier steps)")
    parser.add_argument("--recipe", help=f"training recipe: {', '.join(RECIPES)} (default: the supernet's)")
    parser.add_argument("--quantizer", choices=of_activations(), help=QUANTIZER_HELP)
    parser.add_argument("--epochs", type=at_least(1), help="epochs of training (default: the recipe's)")
    parser.add_argument(
        "--lr", type=above_0(MOST_LR), help="learning rate at the start of the cosine (default: the recipe's)"
    )
    parser.add_argument(
        "--batch_size",
        type=at_least(2, MOST_BATCH),
        help="images a step, of all processes together (default: the recipe's)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a finetune that is finished")
    parser.add_argument("--compile", action="store_true", help="use torch.compile, which is faster on a GPU")
    add_execution_flags(parser)
    add_common_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    experiment = get_experiment(args.exp_name, args.exp_dir)
    # Heavy imports come after parsing: --help and a mistyped flag answer at once.
    from apq.device import resolve_device
    from elastic_nn.training.distributed import processes
    from elastic_nn.training.experiment_finetune import FinetuneRequest, finetune_experiment
    from elastic_nn.training.session import Execution

    flags = ("supernet", "data", "recipe", "quantizer", "epochs", "lr", "batch_size", "overwrite", "seed")
    given = {name: getattr(args, name) for name in flags}
    request = FinetuneRequest(experiment=experiment, compiled=args.compile, **given)
    how = {name: getattr(args, name) for name in ("amp", "accumulate", "ema", "deterministic")}
    device, asked = resolve_device(args.device), Execution(**how)
    with processes(device, asked) as execution:
        top1, epochs = finetune_experiment(request, device, execution)
    if not execution.main:
        return
    if args.json:
        print(json.dumps({"exp_dir": str(experiment.path), "val_top1": top1, "epochs": epochs}))
    else:
        print(f"best validation top-1 {top1:.2%} in {epochs} epochs; weights in {experiment.best_checkpoint}")


if __name__ == "__main__":
    run(main)
