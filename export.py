"""Write the network of an experiment as files for other programs, and check them on test images.

  onnx           fake-quantized floats: QuantizeLinear, Clip, DequantizeLinear. For onnxruntime, OpenVINO, TensorRT
  onnx-integer   convolutions of whole numbers. Its codes are exactly those of the reference, in onnxruntime
  qonnx          Quant nodes, for FINN and its relatives
  packed         streams of bits and a JSON header, in safetensors

The network is that of the checkpoint. Without one, a subnet of a supernet that was trained quantized is exported as it
is there. The check compares every file with the network. It exits with 1 if a code differs, if fewer than 99.5 % of the
images get the same class, or if the logits of more than 1 % of the images move by over 0.001 (twice as many as those of
the network itself move in float64, if that is more; at most 5 %). In a large network, where float64 moves those of more
than half of the images, the logits may move twice as far as there on average, and twice as many images, and two, may
get another class.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from apq.cli import MOST_BATCH, Parser, at_least, run
from apq.errors import UserError
from apq.manifest import EXPORTED


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--exp_dir", type=Path, default=Path("exps/test"), help="folder of the experiment")
    parser.add_argument("--format", choices=tuple(EXPORTED), nargs="+", default=["onnx"], help="forms to write")
    parser.add_argument(
        "--weights",
        choices=("int8", "packed"),
        default="int8",
        help="integers of weights in the form onnx; packed: of 4 or 2 bits where they fit",
    )
    parser.add_argument("--out", type=Path, help="file to write, of one form (default: a file in the experiment)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --out")
    parser.add_argument(
        "--check", type=images, default=256, metavar="N|all", help="test images to check each file on; 0: no check"
    )
    parser.add_argument(
        "--image_bits",
        type=int,
        choices=(8,),
        help="round the image to this many bits, so that the first layer has whole numbers too (default: not rounded)",
    )
    parser.add_argument("--supernet", type=Path, help="file of the supernet, if there is no checkpoint")
    parser.add_argument("--data", type=Path, help="own images: train/CLASS, val/CLASS (default: of earlier steps)")
    parser.add_argument("--batch_size", type=at_least(1, MOST_BATCH), default=256, help="images checked at a time")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


def images(text: str) -> int | str:
    """The `type` of --check: a number of images, or all."""
    if text == "all":
        return text
    try:
        return at_least(0)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or all") from error


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.out and len(args.format) > 1:
        raise UserError("--out is the file of one form: give one --format, or leave --out out")
    if args.out and args.out.suffix != (suffix := Path(EXPORTED[args.format[0]]).suffix):
        raise UserError(f"--out {args.out}: the form {args.format[0]} is a file that ends with {suffix}")
    from export.command import export_experiment  # imports torch, which --help need not wait for

    export_experiment(args)


if __name__ == "__main__":
    run(main)
