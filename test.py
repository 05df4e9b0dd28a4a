"""Accuracy and costs of an experiment, recomputed from its checkpoint and arch file.

Accuracy is measured on the test images, which the processes of torchrun share. Without a checkpoint, a subnet of a
supernet that was trained quantized is measured as it is there: calibrated, not finetuned. An experiment that has an
`arch` file alone, as published, is priced without an accuracy. Costs are those of batch 1, by the cost model of the
search, in both scopes: "full" counts every layer, "published" leaves out the first inverted-residual block and the
classifier. For the policy of a given network, the costs at 8 bits are printed beside its own, and its bits are drawn. A
network that was searched with a table of measured costs is also priced by that table.

--onnx FILE measures a file of export.py instead, and times it, in onnxruntime.
"""

from __future__ import annotations

from pathlib import Path

from apq.cli import MOST_BATCH, Parser, add_common_flags, at_least, run
from apq.errors import UserError
from lut.cost_model import add_cost_flags

OF_EXPERIMENTS = ("exp_dir", "supernet", "config", "table")  # flags that say nothing about a file


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--exp_dir", type=Path, default=Path("exps/test"), help="folder of the experiment")
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="file of export.py to measure, in place of --exp_dir")
    parser.add_argument(
        "--supernet",
        type=Path,
        help="file of the supernet, if there is no checkpoint (default: the one beside the predictor)",
    )
    parser.add_argument("--data", type=Path, help="own images: train/CLASS, val/CLASS (default: of earlier steps)")
    add_cost_flags(parser, "what the search used")
    parser.add_argument("--batch_size", type=at_least(1, MOST_BATCH), default=256, help="images evaluated at a time")
    add_common_flags(parser, seed=False)
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    # These import torch, which --help need not wait for.
    if args.onnx is not None:
        if others := [name for name in OF_EXPERIMENTS if getattr(args, name) != parser.get_default(name)]:
            raise UserError(f"--onnx measures a file alone: leave --{others[0]} out")
        from export.measuring import report_file

        report_file(args.onnx, args)
        return
    from report.experiment_report import report_experiment

    report_experiment(args)


if __name__ == "__main__":
    run(main)
