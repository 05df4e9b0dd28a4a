"""The work of `export.py`: write the network of an experiment in the forms that are asked, and check the files."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from apq import __version__
from apq.checkpoint import digest
from apq.cli import table
from apq.errors import UserError
from apq.exits import FAULT
from apq.experiment import Experiment
from apq.files import atomic_open, check_new
from apq.layers import ConvLayer, layers_of
from apq.lock import identity
from apq.manifest import EXPORTED
from apq.policy import priced_layers
from dataset import names_of_outputs
from dataset.splits import ImageSpec, Splits, make_loader
from dataset.table import Scale, get_dataset, scale_of_folders
from elastic_nn.networks.policy_file import load_finetuned_policy
from elastic_nn.networks.subnet_file import load_finetuned
from elastic_nn.training.experiment_network import check_no_supernet, load_images, load_subnet_and_images
from export import runners
from export.checking import Check, Comparison, compare
from export.formats import Form, check_libraries, data_of
from export.graph import Graph, folded
from export.image_codes import RoundedImages, image_codes, with_image_codes
from export.measuring import CLASSES, IMAGES, images_for
from export.onnx_file import needs_int2
from export.packed import payload_bytes
from export.run import run_as_trained
from export.trace import trace

CPU, PROBES = torch.device("cpu"), 32  # noise images
ONNXRUNTIME = {"onnxruntime": True, "onnxruntime, not optimized": False}
QONNX_BATCH = 16  # images at a time: its executor is slow, and keeps every value
MOST_PIXELS = 1 << 20  # of a batch, where the codes of all layers are kept


@dataclass(frozen=True, kw_only=True)
class Product:
    """The network of an experiment, with its images and what a file tells about it."""

    net: nn.Module
    splits: Splits | None
    spec: ImageSpec
    side: int
    layers: list[ConvLayer]
    scale: Scale | None
    facts: dict[str, Any]


def export_experiment(args: argparse.Namespace) -> None:
    """Write and check the files that the flags of `export.py` ask for."""
    experiment = Experiment(args.exp_dir)
    for form in args.format:
        check_libraries(form, checked=args.check != 0)
    if args.out:
        check_new(args.out, args.overwrite)
    seen = identity(experiment.path)
    product = experiment.whole(lambda: load_product(args, experiment))
    started = time.perf_counter()
    graph = frozen_graph(product)
    seconds = time.perf_counter() - started
    if args.image_bits:
        product, graph = with_rounded_images(product, graph, args.image_bits)
    files = {form: args.out or experiment.path / EXPORTED[form] for form in args.format}
    results, data = {}, {}
    for form in files:  # all, before anything is written: a form may be unable to hold the network
        started = time.perf_counter()
        form_ = Form(name=form, packed_weights=args.weights == "packed", metadata=metadata_of(product, args))
        data[form] = data_of(graph, form_), seconds + time.perf_counter() - started
    for form, file in files.items():
        content, written = data[form]
        with nullcontext(file) if args.out else experiment.adding(file.name, seen) as place:
            write(place, content)
        check = None if args.check == 0 else check_file(args, product, graph, form, file)
        results[form] = {**facts_of(product, graph, file, len(content), check), "seconds": written}
        if not args.json:
            print("\n".join(lines_of(form, results[form], check)))
    if args.json:
        print(json.dumps(results))
    if failed := [form for form, result in results.items() if result.get("failed")]:
        print(f"export.py: {', '.join(failed)} failed the check", file=sys.stderr)
        sys.exit(FAULT)


def load_product(args: argparse.Namespace, experiment: Experiment) -> Product:
    """The network of the experiment. UserError where there is none that can be exported.

    Images are loaded to check files, and to calibrate a subnet without a checkpoint.
    """
    if experiment.policy.exists():
        check_no_supernet(experiment, args.supernet)
        net, spec, policy, layers, images = load_finetuned_policy(experiment)
        splits = load_images(experiment, spec, images, args.data) if args.check else None
        side, layers = spec.resolution, priced_layers(layers, policy)
        facts = {"model": spec.name, "quantizers": policy.quantizer, "bits": policy.strategy}
    else:
        if args.check or not experiment.best_checkpoint.exists():
            finetuned, splits = load_subnet_and_images(experiment, args.supernet, args.data, CPU)
        else:
            check_no_supernet(experiment, args.supernet)
            finetuned, splits = load_finetuned(experiment), None
        net, spec, subnet, images = finetuned
        side, layers = subnet.resolution, layers_of(spec, subnet)
        facts = {"space": spec.name, "quantizers": net.scheme.name}
        facts["bits"] = [[layer.w_bits, layer.a_bits] for layer in layers]
    names = names_of_outputs(images)  # only those of folders have names
    facts[CLASSES] = list(names or map(str, range(spec.n_classes)))
    facts[IMAGES] = asdict(images_for(spec, side))
    facts["weights"] = digest(net.state_dict())
    of_folder = names or args.data or get_dataset(spec.dataset).folder is not None
    scale = scale_of_folders(spec.name) if of_folder else get_dataset(spec.dataset).scale
    net = net.eval().requires_grad_(False)
    return Product(net=net, splits=splits, spec=spec, side=side, layers=layers, scale=scale, facts=facts)


@torch.no_grad()
def frozen_graph(product: Product) -> Graph:
    """The network as constants. UserError unless they compute its logits to the bit, on a batch of noise."""
    shape = product.spec.in_channels, product.side, product.side
    images = torch.randn(PROBES, *shape, generator=torch.Generator().manual_seed(0))
    graph = trace(product.net, tuple(images.shape[1:]))
    if not torch.equal(run_as_trained(graph, images), product.net(images)):
        raise UserError("the network as constants does not compute what the network computes: it cannot be exported")
    return graph


def with_rounded_images(product: Product, graph: Graph, bits: int) -> tuple[Product, Graph]:
    """The network and its graph with images as codes of `bits` bits."""
    if product.scale is None:
        raise UserError("how the images are scaled is not known: they cannot be rounded to codes")
    codes = image_codes(product.scale, bits)
    return replace(product, net=RoundedImages(product.net, codes)), with_image_codes(graph, codes)


def batches_of(product: Product, n: int | None, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of `n` (None: all) test images, evenly spaced, and their labels."""
    images = product.splits.test if n is None else product.splits.test.thinned(n)
    return iter(make_loader(images, batch_size, sides=(product.side,)))


def metadata_of(product: Product, args: argparse.Namespace) -> dict[str, str]:
    """What a file tells about the network, as text."""
    scale = None if product.scale is None else asdict(product.scale)
    facts = {**product.facts, "normalisation": scale, "image_bits": args.image_bits, "version": __version__}
    facts["command"] = shlex.join(["export.py", *sys.argv[1:]])
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}


def write(path: Path, data: bytes) -> None:
    """Write a file, all of it or nothing."""
    with atomic_open(path, "wb") as stream:
        stream.write(data)


def check_file(args: argparse.Namespace, product: Product, graph: Graph, form: str, file: Path) -> Check:
    """Compare a file with the network on test images, in every runtime of its form."""
    by_name, with_codes, skipped, batch_size = {}, {}, [], args.batch_size
    if form == "onnx":
        by_name = {name: runners.onnxruntime(file, optimized=optimized) for name, optimized in ONNXRUNTIME.items()}
        if args.weights == "packed" and needs_int2(graph):
            skipped = ["OpenVINO, which cannot read 2-bit integers"]
        elif find_spec("openvino") is None:
            skipped = ["OpenVINO, which is not installed: pip install -e '.[export-check]'"]
        else:
            by_name["OpenVINO, float32"] = runners.openvino(file)
    elif form == "onnx-integer":
        with_codes = {
            name: runners.onnxruntime_codes(file, optimized=optimized) for name, optimized in ONNXRUNTIME.items()
        }
    elif form == "qonnx":
        by_name, batch_size = {"QONNX's executor": runners.qonnx(file)}, QONNX_BATCH
    else:
        with_codes = {"read back": runners.packed_codes(file)}
    if with_codes:
        batch_size = min(batch_size, max(1, MOST_PIXELS // product.side**2))
    n = None if args.check == "all" else args.check
    batches = tqdm(batches_of(product, n, batch_size), desc=f"check {form}", disable=None, leave=False)
    return replace(compare(product.net, folded(graph), batches, by_name, with_codes), skipped=skipped)


def facts_of(product: Product, graph: Graph, file: Path, n_bytes: int, check: Check | None) -> dict[str, Any]:
    """The result of one form as plain data."""
    facts: dict[str, Any] = {
        "file": str(file),
        "bytes": n_bytes,
        "claimed_bytes": sum(layer.size_bytes for layer in product.layers),
        "published_bytes": sum(layer.published_size_bytes for layer in product.layers),
        "payload_bytes": payload_bytes(folded(graph)),
    }
    if check is None:
        return facts
    reasons = [f"{one.name}: {why}" for one in check.files if (why := one.fails(check.noise))]
    checks = [asdict(one) for one in (*check.files, check.noise)]
    return {**facts, "checks": checks, "failed": reasons, "not_tried": check.skipped}


def lines_of(form: str, facts: dict[str, Any], check: Check | None) -> list[str]:
    """The result of one form as lines of text."""
    claim, payload = facts["claimed_bytes"], facts["payload_bytes"]
    sizes = f"{facts['bytes']:,} bytes; claimed {claim:,}, in packed form {payload:,} without the header"
    lines = [f"{facts['file']} ({form}): {sizes}"]
    if check is None:
        return [*lines, "not checked"]
    rows = [("check", "images", "agree", "moved", "largest", "codes that differ", "top-1", "network's")]
    rows += [_row(one) for one in (*check.files, check.noise)]
    notes = [*(f"not tried: {one}" for one in check.skipped), *(f"failed: {reason}" for reason in facts["failed"])]
    return [*lines, table(rows), *notes]


def _row(one: Comparison) -> tuple[str, ...]:
    codes = f"{one.other_codes} of {one.codes:,}" if one.codes else ""
    shares = (f"{one.share(count):.2%}" for count in (one.agreed, one.moved))
    scores = (f"{one.share(count):.2%}" for count in (one.right, one.right_network))
    return (one.name, f"{one.n_images:,}", *shares, f"{one.largest:.1e}", codes, *scores)
