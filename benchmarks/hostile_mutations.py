"""Damage to files: to their bytes, to the values that they hold, to what stands at their path."""

from __future__ import annotations

import copy
import io
import json
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

HUGE = 10**400
NUMBERS = (
    0,
    -1,
    1,
    2,
    1.5,
    -0.0,
    1e308,
    -1e308,
    1e-320,
    float("nan"),
    float("inf"),
    2**31,
    2**63,
    2**64,
    -(2**63),
    10**30,
    HUGE,
)
TEXTS = (
    "",
    ".",
    "..",
    "../../up",
    "/",
    "a/b",
    "\0",
    "\n",
    "\udce9",
    "x" * 300,
    "é" * 200,
    "nan",
    "1",
    "__class__",
    "{}",
)
OTHERS = (None, True, False, [], {}, [[]], [None], {"": 0}, [1, [2, [3]]], {"a": {"b": []}})
SMALL_DEPTH, DEPTH = 50, 100_000
KINDS = ("empty", "folder", "pipe", "loop", "dangling", "absent", "device")


def damaged(whole: bytes, suffix: str, rng: random.Random) -> tuple[str, bytes]:
    """A damaged copy of a file's contents, with the name of what was done. `suffix` is that of the file."""
    of_bytes = (flip, flip, cut, splice, scramble, repeat, text_in_bytes)
    by_value: dict[str, tuple[Callable[[bytes, random.Random], bytes], ...]] = {
        ".json": (json_value, json_value, json_value, json_depth, json_twice),
        "": (json_value, json_value, json_depth),
        ".jsonl": (json_lines, json_lines, json_lines),
        ".csv": (csv_cell, csv_cell, csv_cell),
        ".npz": (arrays, arrays, deflated),
        ".pt": (checkpoint, checkpoint, checkpoint, deflated),
        ".tar": (checkpoint, checkpoint, checkpoint, deflated),
    }
    how = rng.choice((*of_bytes, *by_value.get(suffix, ()) * 2))
    return how.__name__, how(whole, rng)


def place(path: Path, kind: str) -> None:
    """Put something else at the path of a file."""
    path.unlink()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "device":
        path.symlink_to("/dev/zero")


def remove(path: Path) -> None:
    """Remove whatever is at a path."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


# Bytes


def flip(whole: bytes, rng: random.Random) -> bytes:
    """Flip 1 to 8 bits."""
    changed = bytearray(whole)
    for _ in range(rng.choice((1, 1, 1, 8)) if whole else 0):
        changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(whole: bytes, rng: random.Random) -> bytes:
    """Cut off the end."""
    return whole[: rng.randrange(len(whole) + 1)]


def splice(whole: bytes, rng: random.Random) -> bytes:
    """Put one part over another."""
    a, b, n = rng.randrange(len(whole) + 1), rng.randrange(len(whole) + 1), rng.randrange(1, 200)
    return whole[:a] + whole[b : b + n] + whole[a + n :]


def scramble(whole: bytes, rng: random.Random) -> bytes:
    """Random bytes in the middle."""
    a, n = rng.randrange(len(whole) + 1), rng.randrange(1, 64)
    return whole[:a] + rng.randbytes(n) + whole[a + n :]


def repeat(whole: bytes, rng: random.Random) -> bytes:
    """Insert a part again."""
    a, n = rng.randrange(len(whole) + 1), rng.randrange(1, 200)
    return whole[: a + n] + whole[a:]


def text_in_bytes(whole: bytes, rng: random.Random) -> bytes:
    """Replace the digits of a number, or a short text, by another one."""
    a = rng.randrange(len(whole) + 1)
    word = rng.choice(
        (b"9" * 30, b"-1", b"1e999", b"NaN", b"null", b"\xff\xfe", b"\x00", b'"', b"[" * 2000, b"PK\x05\x06")
    )
    return whole[:a] + word + whole[a + rng.randrange(4) :]


# Values


def json_value(whole: bytes, rng: random.Random) -> bytes:
    """Change a value somewhere in the tree: its type, its size, its presence, its key."""
    return _dumped(_changed(json.loads(whole), rng, _plain_value))


def json_depth(whole: bytes, rng: random.Random) -> bytes:
    """Nest deeply: the whole, or one value."""
    depth = rng.choice((SMALL_DEPTH, DEPTH))
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    inner = whole.decode() if rng.random() < 0.5 else "1"
    return (opening * depth + inner + closing * depth).encode()


def json_twice(whole: bytes, rng: random.Random) -> bytes:
    """Write a text twice after each other."""
    return whole + rng.choice((b"", b"\n", b",")) + whole


def json_lines(whole: bytes, rng: random.Random) -> bytes:
    """Change a value in one line, or the lines themselves."""
    lines = whole.splitlines(keepends=True)
    i = rng.randrange(len(lines))
    how = rng.random()
    if how < 0.7:
        lines[i] = _dumped(_changed(json.loads(lines[i]), rng, _plain_value)) + b"\n"
    elif how < 0.8:
        lines[i] = b"[" * DEPTH + b"\n"
    elif how < 0.9:
        lines.insert(i, rng.choice((b"\n", b"null\n", b"1\n", b"[]\n", lines[-1])))
    else:
        rng.shuffle(lines)
    return b"".join(lines)


def csv_cell(whole: bytes, rng: random.Random) -> bytes:
    """Change a cell, or the number of cells in a line."""
    rows = [line.split(b",") for line in whole.splitlines()]
    row = rng.choice(rows)
    word = str(rng.choice((*NUMBERS, *TEXTS, "1" * 5000))).encode(errors="surrogateescape")
    if rng.random() < 0.7:
        row[rng.randrange(len(row))] = word
    else:
        row.insert(rng.randrange(4), word)
    return b"\n".join(b",".join(row) for row in rows)


def arrays(whole: bytes, rng: random.Random) -> bytes:
    """Change an array of an .npz file: its type, shape, values, or its name."""
    with np.load(io.BytesIO(whole)) as data:
        held = dict(data)
    name = rng.choice(sorted(held))
    array = held.pop(name)
    new = rng.choice((_other_array, _other_array, lambda a, r: np.negative(a), lambda a, r: a[:0]))(array, rng)
    held[rng.choice((name, name, name, "other", "../up", ""))] = new
    out = io.BytesIO()
    np.savez(out, **held)
    return out.getvalue()


def checkpoint(whole: bytes, rng: random.Random) -> bytes:
    """Change a value of a torch file: a tensor's type, shape or values, any other value, a key."""
    data = torch.load(io.BytesIO(whole), weights_only=True)
    out = io.BytesIO()
    torch.save(_changed(data, rng, _torch_value), out)
    return out.getvalue()


def deflated(whole: bytes, rng: random.Random) -> bytes:
    """Pack an archive again, compressed, with members lost or damaged."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        lost = rng.randrange(2 * len(old.namelist()))
        for i, name in enumerate(old.namelist()):
            if i != lost:
                content = old.read(name)
                content = flip(content, rng) if rng.random() < 0.1 else content
                new.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)  # without the present time
    packed = out.getvalue()
    return flip(packed, rng) if rng.random() < 0.5 else packed


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def _changed(tree: Any, rng: random.Random, draw: Callable[[Any, random.Random], Any]) -> Any:
    """The tree with one node changed."""
    tree = copy.deepcopy(tree)
    node = tree
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        if not keys:
            return draw(tree, rng)
        key = rng.choice(list(keys))
        deeper = isinstance(node[key], (dict, list)) and len(node[key])
        if deeper and rng.random() < 0.75:
            node = node[key]
            continue
        how = rng.random()
        if how < 0.75:
            node[key] = draw(node[key], rng)
        elif how < 0.85:
            del node[key]
        elif isinstance(node, dict):
            node[rng.choice((*TEXTS, str(key) + "x"))] = node.pop(key)
        else:
            node.insert(key, draw(node[key], rng))
        return tree


def _plain_value(old: Any, rng: random.Random) -> Any:
    if isinstance(old, (int, float)) and not isinstance(old, bool) and rng.random() < 0.6:
        with_old = (old + 1, -old, old * 1000, float(old) if abs(old) < 1e300 else 0, str(old))
        return rng.choice((*NUMBERS, *with_old))
    if isinstance(old, str) and rng.random() < 0.6:
        return rng.choice((*TEXTS, old + "x", old.upper()))
    if isinstance(old, list) and old and rng.random() < 0.5:
        return rng.choice((old * 1000, old[::-1], old[:-1], [*old, old[0]]))
    return rng.choice((*NUMBERS, *TEXTS, *OTHERS))


def _torch_value(old: Any, rng: random.Random) -> Any:
    if isinstance(old, torch.Tensor):
        return _other_tensor(old, rng)
    return _plain_value(old, rng) if rng.random() < 0.9 else torch.zeros(2)


def _other_tensor(old: torch.Tensor, rng: random.Random) -> Any:
    kinds = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64)
    changes: tuple[Callable[[], Any], ...] = (
        lambda: old.to(rng.choice(kinds)),
        lambda: old.flatten()[:0],
        lambda: old.flatten()[:1].expand(10**9),  # four bytes on disk that declare gigabytes
        lambda: old.unsqueeze(0),
        lambda: old.flatten(),
        lambda: torch.full_like(old, rng.choice((0, -1, 2))),
        lambda: old.float() * float("nan"),
        lambda: old.float() * 1e38 * 1e3,
        lambda: old.to_sparse() if old.ndim and old.is_floating_point() else old,
        lambda: torch.zeros((3,) * 8),
        lambda: rng.choice((*NUMBERS, *TEXTS, *OTHERS)),
    )
    return rng.choice(changes)()


def _other_array(old: np.ndarray, rng: random.Random) -> np.ndarray:
    kind = rng.choice(("float16", "float64", "int8", "int64", "uint64", "bool", "complex64", "U8", "S4", "M8[s]"))
    return rng.choice((old.flatten(), old[None], np.array(0), old, np.zeros((2, 0, 3)))).astype(kind)
