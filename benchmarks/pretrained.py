"""A real pretrained network through the toolkit: fidelity, quantization without training, export, speed.

No images of ImageNet can be had: accuracy is not measured. The images are crops of three photographs, whose classes are
the answers of the float network (`benchmarks.photographs`); "agree" is the share of the test crops that a network gives
the same class. Ranges are those of the training crops; nothing is trained.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

import search
from apq.cli import Parser, run
from apq.experiment import Experiment
from apq.model import ModelSpec
from apq.policy import Policy, layer_names, policy_from_strategy
from apq.search_result import read_policy
from benchmarks.export_faults import with_folded_norms
from benchmarks.machine import describe
from benchmarks.markdown import markdown
from benchmarks.photographs import CLASSES, write_folder
from dataset import load_splits
from dataset.class_names import read_class_names
from dataset.splits import Splits, make_loader
from elastic_nn.networks.model_file import load_model
from elastic_nn.networks.policy_file import save_policy_model
from elastic_nn.networks.pretrained import how_to_install, installed_weights
from elastic_nn.networks.quantize_model import quantize_model, set_policy
from elastic_nn.quantizers import scheme_named
from elastic_nn.training.batchnorm import recalibrate, recalibration_batches
from elastic_nn.training.calibration import calibrate_ranges, signed_inputs
from export.command import export_experiment
from export.formats import Form, data_of
from export.measuring import images_for, time_of
from export.trace import trace
from lut.bitfusion import BitFusion
from lut.costs import cost_of
from lut.named import network_named
from methods.search.bit_search import layers_of_model

CPU = torch.device("cpu")
FLOAT = "float"  # not quantized: what recalibration of norms alone does
QUANTIZED = ((FLOAT, 32), ("linear", 8), ("linear", 6), ("linear", 4), ("kmeans", 8), ("kmeans", 4))
PARTS = ("network", "quantized", "export", "searches")
CALIBRATION = 48  # crops on which ranges are chosen
FORMS = ("onnx", "onnx-integer", "packed")
LIBRARIES = ("torch", "onnx", "onnxruntime", "openvino", "efficientnet-lite-pytorch")
SEARCHES = {  # flags of search.py, beside those of the network and its images
    "sensitivity": ["--mode", "sensitivity", "--loss_images", "4", "--min_bit", "4", "--finetune_images", "16"],
    "ddpg": ["--mode", "ddpg", "--train_episode", "4", "--warmup", "2", "--hidden", "16", "--finetune_images", "16"],
}


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--model", default="efficientnet_lite0", help="network (default: efficientnet_lite0)")
    parser.add_argument("--weights", type=Path, help="file of its weights (default: those of its installed package)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured (default: all)")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    file = args.weights or installed_weights(args.model)
    if file is None:
        sys.exit(f"no weights of {args.model}{how_to_install(args.model)}, or give --weights")
    net, spec, _ = load_model(file, args.model)
    net.eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as place:
        images = Path(place, "images")
        train, val, classes = write_folder(images, net, spec)
        splits = load_splits(spec, images, outputs=read_class_names(images / CLASSES))
        found = {
            "machine": describe(),
            "versions": versions(),
            "images": {"training": train, "test": val, "classes": classes},
        }
        if "network" in args.parts:
            found["package"] = against_package(net, spec, file)
            found["costs"] = {bits: costs(args.model, bits) for bits in (8, 4)}
        if "quantized" in args.parts:
            found["quantized"] = [row for case in QUANTIZED for row in quantized(file, spec, splits, *case)]
        if "export" in args.parts:
            found["export"] = exported(file, args.model, images, Path(place))
            found["others_ms"] = others_ms(file, net, spec, splits, Path(place))
        if "searches" in args.parts:
            found["searches"] = {name: searched(file, args.model, images, name, Path(place)) for name in SEARCHES}
    print(json.dumps(found)) if args.json else show(args.model, found)


def versions() -> dict[str, str | None]:
    """The versions of the libraries, None of those that are not installed."""
    found: dict[str, str | None] = dict.fromkeys(LIBRARIES)
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def against_package(net: nn.Module, spec: ModelSpec, file: Path) -> float | None:
    """The largest difference of a logit from those of the published network on noise, by the largest logit."""
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        return None
    published = EfficientNet.from_name(spec.name.replace("_", "-"))
    published.load_state_dict(torch.load(file, weights_only=True))
    images = torch.randn(8, 3, spec.resolution, spec.resolution, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = published.eval()(images)
        return float((net(images) - expected).abs().max() / expected.abs().max())


@torch.inference_mode()
def logits(net: nn.Module, splits: Splits, side: int) -> Tensor:
    """(N, classes) on the test crops."""
    return torch.cat([net.eval()(images) for images, _ in make_loader(splits.test, 64, sides=(side,))])


def uniform(file: Path, spec: ModelSpec, splits: Splits, quantizer: str, bits: int) -> tuple[nn.Module, Policy, Any]:
    """The network with all layers at these bits, but the first and last of a linear quantizer at 8; its signs."""
    net, _, _ = load_model(file, spec.name)
    net.eval().requires_grad_(False)
    layers = layers_of_model(net, spec)
    inner = [bits] if quantizer == "kmeans" else [[bits, bits]] * (len(layers) - 2)
    strategy = inner * len(layers) if quantizer == "kmeans" else [[8, -1], *inner, [8, 8]]
    policy = policy_from_strategy(quantizer, layers, strategy)
    thinned = splits.calibration.thinned(CALIBRATION)
    images, _ = next(iter(make_loader(thinned, CALIBRATION, sides=(spec.resolution,))))
    signed = signed_inputs(net, policy.names, images)
    quantize_model(net, layer_names(layers), scheme_named(quantizer), signed, images.shape[1:])
    set_policy(net, policy)
    calibrate_ranges(net, images)
    return net, policy, signed


def quantized(file: Path, spec: ModelSpec, splits: Splits, quantizer: str, bits: int) -> Iterator[dict[str, Any]]:
    """Agreement with the float network, and cosine of logits: with the float norms, and with recalibrated ones."""
    before, _, _ = load_model(file, spec.name)
    expected = logits(before, splits, spec.resolution)
    net = before if quantizer == FLOAT else uniform(file, spec, splits, quantizer, bits)[0]
    for norms in ("float",) if quantizer == "kmeans" else ("float", "recalibrated"):
        if norms == "recalibrated":
            recalibrate(net, recalibration_batches(splits, (spec.resolution,), CPU), CPU)
        found = logits(net, splits, spec.resolution)
        same = (found.argmax(1) == expected.argmax(1)).float().mean().item()
        cosine = torch.cosine_similarity(found, expected).mean().item()
        yield {"quantizer": quantizer, "bits": bits, "norms": norms, "agree": same, "cosine": cosine}


def costs(name: str, bits: int) -> dict[str, float]:
    """BitFusion's latency and energy, MACs and bytes of the network with all layers at these bits."""
    cost = cost_of(network_named(name, (bits, bits)).layers["full"], BitFusion())
    return {"latency_ms": cost.latency_ms, "energy_mj": cost.energy_mj, "macs": cost.macs, "bytes": cost.size_bytes}


def exported(file: Path, name: str, images: Path, place: Path) -> dict[str, Any]:
    """What export.py says of the network at 8 bits in all forms, and the time of an image in onnxruntime."""
    net, spec, _ = load_model(file, name)
    splits = load_splits(spec, images, outputs=read_class_names(images / CLASSES))
    strategy = place / "bits.json"
    strategy.write_text(json.dumps([[8, -1], *[[8, 8]] * (len(layers_of_model(net, spec)) - 2), [8, 8]]))
    searched_flags = ["--mode", "ddpg", "--policy", str(strategy)]
    experiment = search_into(place / "eight", file, name, images, searched_flags)
    policy, layers = read_policy(experiment)
    made, own, signed = uniform(file, spec, splits, "linear", 8)
    assert own == policy
    experiment.best_checkpoint.parent.mkdir(exist_ok=True)
    save_policy_model(experiment.best_checkpoint, spec, policy, layers, signed, made.state_dict(), images=splits.source)
    flags = {"weights": "int8", "out": None, "overwrite": False, "check": "all", "image_bits": None, "supernet": None}
    flags |= {"data": images, "batch_size": 32, "json": True, "exp_dir": experiment.path, "format": list(FORMS)}
    found = printed(lambda: export_experiment(Namespace(**flags)))
    for form, end in (("onnx", "model.onnx"), ("onnx-integer", "model.integer.onnx")):
        found[form]["ms"] = time_of(experiment.path / end, images_for(spec, spec.resolution))
    return found


def others_ms(file: Path, net: nn.Module, spec: ModelSpec, splits: Splits, place: Path) -> dict[str, float]:
    """The time of an image in onnxruntime in ms, on one thread: of the float network, and at 8 bits with norms that are
    folded into convolutions, which export.py does not do, because it loses accuracy at fewer bits."""
    shape = spec.in_channels, spec.resolution, spec.resolution
    folded = with_folded_norms(trace(uniform(file, spec, splits, "linear", 8)[0].eval(), shape)).data({})
    written = {
        "float": data_of(trace(net, shape), Form(name="onnx", packed_weights=False, metadata={})),
        "8 bits, norms folded": folded,
    }
    found = {}
    for name, data in written.items():
        (place / "other.onnx").write_bytes(data)
        found[name] = time_of(place / "other.onnx", images_for(spec, spec.resolution))
    return found


def searched(file: Path, name: str, images: Path, method: str, place: Path) -> dict[str, Any]:
    """A short search for bits at 0.6 of the latency of 8 bits: its seconds and what it found."""
    started = time.perf_counter()
    shown: dict[str, Any] = {}
    flags = [*SEARCHES[method], "--preserve_ratio", "0.6", "--val_images", "32"]
    search_into(place / method, file, name, images, flags, shown.update)
    keys = ("cost", "budget", "episode", "float_loss", "predicted_increase", "measured_increase")
    return {"seconds": time.perf_counter() - started, **{key: shown[key] for key in keys if key in shown}}


def search_into(
    folder: Path,
    file: Path,
    name: str,
    images: Path,
    flags: list[str],
    take: Callable[[dict[str, Any]], object] = lambda shown: None,
) -> Experiment:
    """Run search.py into an experiment; `take` gets what it prints."""
    network = ["--model", name, "--weights", str(file), "--data", str(images), "--classes", str(images / CLASSES)]
    words = [*flags, *network, "--exp_dir", str(folder), "--device", "cpu", "--json"]
    take(printed(lambda: search.main(words)))
    return Experiment(folder)


def printed(call: Callable[[], object]) -> dict[str, Any]:
    """The JSON object that a command prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):  # export.py ends so after a failed check
        call()
    return json.loads(said.getvalue())


def show(name: str, found: dict[str, Any]) -> None:
    """Print the tables."""
    print(found["machine"], "\n", found["versions"], "\n", found["images"])
    print(f"{os.environ.get('OMP_NUM_THREADS', 'all')} thread(s) of torch")
    if "costs" in found:
        show_network(name, found["package"], found["costs"])
    if "quantized" in found:
        rows = [
            (row["quantizer"], row["bits"], row["norms"], f"{row['agree']:.1%}", f"{row['cosine']:.4f}")
            for row in found["quantized"]
        ]
        print(markdown(("quantizer", "bits", "norms", "agree", "cosine of logits"), rows))
    if "export" in found:
        show_export(found["export"], found["others_ms"])
    for method, result in found.get("searches", {}).items():
        print(method, result)


def show_network(name: str, package: float | None, costs: dict[int, dict[str, float]]) -> None:
    """Print how near the published network is, and what BitFusion says."""
    print(f"{name}: {'no package to compare with' if package is None else f'logits differ by {package:.1e}'}")
    rows = [
        (bits, *(f"{cost[key]:.2f}" for key in ("latency_ms", "energy_mj")), f"{cost['bytes'] / 1e6:.2f}")
        for bits, cost in costs.items()
    ]
    print(markdown(("bits", "BitFusion, ms", "mJ", "MB"), rows))


def show_export(found: dict[str, Any], others_ms: dict[str, float]) -> None:
    """Print the checks, sizes and times of the files."""
    rows = []
    for form, facts in found.items():
        ms = f"{facts['ms']:.1f}" if "ms" in facts else ""
        for check in facts["checks"]:
            n, codes = check["n_images"], check["codes"]
            shares = (f"{check[key] / n:.1%}" for key in ("agreed", "moved"))
            differ = f"{check['other_codes']} of {codes:,}" if codes else ""
            rows.append((form, check["name"], *shares, f"{check['largest']:.1e}", differ, f"{facts['bytes']:,}", ms))
        rows += [(form, f"failed: {why}", *[""] * 6) for why in facts["failed"]]
    print(markdown(("form", "check", "agree", "moved", "largest", "codes that differ", "bytes", "ms"), rows))
    print("other files in onnxruntime, one thread:", {name: f"{ms:.1f} ms" for name, ms in others_ms.items()})


if __name__ == "__main__":
    run(main)
