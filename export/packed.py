"""Packed files: the codes of weights as streams of bits, with a multiplier and a bias a channel, in safetensors.

Streams are little-endian: the first code has the lowest bits of the first byte. Codes are in two's complement, labels
of centroids are not. What is no stream is a float32 tensor. The JSON header under "apq" describes the graph, so that
`read_packed` gives it back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apq.errors import UserError
from apq.extras import extra
from apq.space import FULL_PRECISION
from elastic_nn.quantizers import Rounding
from export.frozen import Codes, FrozenLayer, Weights
from export.graph import Graph, Node
from export.operations import OPERATIONS

HEADER = "apq"
VERSIONS = (1, 2)  # 2 has paddings that are not the same all around, which readers of 1 would overlook
USUAL = {  # is left out
    **{"stride": (1, 1), "padding": (0, 0), "padding_end": None, "dilation": (1, 1)},
    **{"groups": 1, "linear": False},
}


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers as a stream of `bits` bits each, uint8. UserError for one that does not fit.

    >>> pack(np.array([1, -1, 3]), 4).tolist()
    [241, 3]
    """
    flat = codes.ravel().astype(np.int64)
    if flat.size and not (-(2 ** (bits - 1)) <= flat.min() and flat.max() < 2**bits):
        raise UserError(f"codes from {flat.min()} to {flat.max()} do not fit {bits} bits")
    stream = (flat[:, None] >> np.arange(bits)) & 1
    return np.packbits(stream.astype(np.uint8).ravel(), bitorder="little")


def unpack(stream: np.ndarray, bits: int, n: int, *, signed: bool) -> np.ndarray:
    """The `n` whole numbers of a stream, int64. Inverse of `pack`.

    >>> unpack(np.array([241, 3], dtype=np.uint8), 4, 3, signed=True).tolist()
    [1, -1, 3]
    """
    places = np.unpackbits(stream, count=n * bits, bitorder="little").reshape(n, bits).astype(np.int64)
    codes = (places << np.arange(bits)).sum(axis=1)
    return np.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes) if signed else codes


def packed_data(graph: Graph, metadata: Mapping[str, str]) -> bytes:
    """The bytes of the packed file of a folded graph."""
    version = VERSIONS[any(layer.padding_end is not None for layer in graph.layers.values())]
    tensors, header = tensors_of(graph), {"version": version, "image": graph.image_shape, "nodes": []}
    header["nodes"] = [_described(node) for node in graph.nodes]
    save = extra("safetensors.numpy", "export").save
    return save(tensors, metadata={HEADER: json.dumps(header, separators=(",", ":")), **metadata})


def payload_bytes(graph: Graph) -> int:
    """Bytes of all tensors of the packed file of a folded graph, without its header."""
    return sum(tensor.nbytes for tensor in tensors_of(graph).values())


def tensors_of(graph: Graph) -> dict[str, np.ndarray]:
    """The tensors of a packed file by name, in running order. One multiplier for a whole layer is no tensor."""
    found = {}
    for node in graph.nodes:
        if node.layer is not None:
            found |= {f"{node.name}.{part}": tensor for part, tensor in _tensors_of(node.layer).items()}
        found |= {f"{node.name}.{key}": value.numpy() for key, value in node.settings.items() if _is_tensor(value)}
    return found


def _tensors_of(layer: FrozenLayer) -> dict[str, np.ndarray]:
    weights = layer.weights
    if weights.bits == FULL_PRECISION:
        found = {"weight": weights.codes.numpy()}
    elif weights.signed and int(weights.codes.max()) >= 2 ** (weights.bits - 1):
        raise UserError(f"codes up to {int(weights.codes.max())} do not fit {weights.bits} bits with a sign")
    else:
        found = {"codes": pack(weights.codes.numpy(), weights.bits)}
    if weights.centroids is not None:
        found["centroids"] = weights.centroids.numpy()
    if layer.multiplier.ndim:  # one for all channels is in the header
        found["multiplier"] = layer.multiplier.numpy()
    if layer.bias is not None:
        found["bias"] = layer.bias.numpy()
    return found


def _described(node: Node) -> dict[str, Any]:
    """A node as plain data, without its tensors."""
    settings = {key: value for key, value in node.settings.items() if not _is_tensor(value)}
    tensors = [key for key, value in node.settings.items() if _is_tensor(value)]
    facts = {"name": node.name, "op": node.op, "inputs": node.inputs, "shape": node.shape}
    facts |= {key: value for key, value in (("settings", settings), ("tensors", tensors)) if value}
    if (layer := node.layer) is None:
        return facts
    codes, weights = layer.inputs, layer.weights
    inputs = None
    if codes is not None:
        rounding = {key: value.item() for key, value in codes.rounding._asdict().items()}
        inputs = {"bits": codes.bits, "lowest": codes.lowest, "highest": codes.highest, **rounding}
    described = {
        "weights": {"bits": weights.bits, "shape": list(weights.codes.shape), "signed": weights.signed},
        "step": None if weights.step is None else weights.step.item(),
        "multiplier": None if layer.multiplier.ndim else layer.multiplier.item(),
        "inputs": inputs,
    }
    return {
        **facts,
        "layer": described | {key: value for key, value in _geometry(layer).items() if value != USUAL[key]},
    }


def _geometry(layer: FrozenLayer) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value := getattr(layer, key), tuple | list) else value for key in USUAL}


def read_packed(path: Path) -> Graph:
    """The folded graph of a packed file. UserError for any other file."""
    safe_open = extra("safetensors", "export").safe_open
    try:
        with safe_open(str(path), "numpy") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, KeyError, ValueError, extra("safetensors", "export").SafetensorError) as error:
        raise UserError(f"{path} is not a packed network: {error}") from error
    if not isinstance(header, dict) or header.get("version") not in VERSIONS:
        raise UserError(f"{path} is not a packed network of version {' or '.join(map(str, VERSIONS))}")
    try:
        nodes = tuple(_node(facts, tensors) for facts in header["nodes"])
        return Graph(image_shape=tuple(header["image"]), nodes=nodes)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _node(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Node:
    name, settings = facts["name"], dict(facts.get("settings", {}))
    if facts["op"] != "layer" and facts["op"] not in OPERATIONS:
        raise ValueError(f"unknown operation {facts['op']}")
    settings |= {key: torch.from_numpy(tensors[f"{name}.{key}"]) for key in facts.get("tensors", ())}
    node = Node(
        name=name, op=facts["op"], inputs=tuple(facts["inputs"]), shape=tuple(facts["shape"]), settings=settings
    )
    if facts["op"] != "layer":
        return node
    own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    return replace(node, layer=_layer(facts["layer"], own))


def _layer(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> FrozenLayer:
    shape, bits = facts["weights"]["shape"], facts["weights"]["bits"]
    if bits == FULL_PRECISION:
        codes = torch.from_numpy(tensors["weight"])
    else:
        found = unpack(tensors["codes"], bits, int(np.prod(shape)), signed=facts["weights"]["signed"])
        codes = torch.from_numpy(found.reshape(shape))
    centroids = torch.from_numpy(tensors["centroids"]) if "centroids" in tensors else None
    step = None if facts["step"] is None else torch.tensor([facts["step"]], dtype=torch.float32)
    inputs = None
    if facts["inputs"] is not None:
        given = dict(facts["inputs"])
        rounding = Rounding(*(torch.tensor([given.pop(key)], dtype=torch.float32) for key in Rounding._fields))
        inputs = Codes(rounding=rounding, **given)
    geometry = {key: tuple(value) if isinstance(value, list) else value for key, value in facts.items() if key in USUAL}
    one = facts["multiplier"]
    return FrozenLayer(
        weights=Weights(bits=bits, codes=codes, step=step, centroids=centroids),
        inputs=inputs,
        multiplier=torch.from_numpy(tensors["multiplier"]) if one is None else torch.tensor(one),
        bias=torch.from_numpy(tensors["bias"]) if "bias" in tensors else None,
        **geometry,
    )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
