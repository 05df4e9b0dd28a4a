"""No file takes more memory or time than it deserves, whatever it declares. What users really have is still read."""

from __future__ import annotations

import os
import socket
import struct
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bounded import refused
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from apq.bounds import check_file, is_number, is_whole
from apq.checkpoint import check_fit, load_checkpoint, save_checkpoint
from apq.errors import UserError
from apq.files import read_arrays, read_json, read_jsonl
from apq.policy import load_strategy
from apq.presets import DIGITS, get_space
from dataset.imagenet import image_folder_splits, unreadable
from lut.measured import load_measured
from lut.table import load as load_table
from utils.predictor_files import load_predictor

linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
READERS = {
    "read_json": ("f.json", read_json),
    "read_jsonl": ("f.jsonl", read_jsonl),
    "read_arrays": ("f.npz", read_arrays),
    "load_checkpoint": ("f.pt", load_checkpoint),
    "load_measured": ("f.csv", lambda path: load_measured(path, ["conv"], "latency")),
    "load_table": ("f.json", load_table),
    "load_strategy": ("f.json", load_strategy),
    "get_space": ("f.json", lambda path: get_space(str(path))),
    "load_predictor": ("f.pt", load_predictor),
    "check_file": ("f.png", check_file),
}
readers = pytest.mark.parametrize(("name", "read"), READERS.values(), ids=READERS)


@linux
@readers
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "socket"])
def test_what_is_no_file_is_not_read(tmp_path, name, read, kind):
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    if kind == "socket" and read is check_file:  # it leaves errors of the system to its caller
        with pytest.raises(OSError, match="No such device"):
            read(path)
        return
    message = refused(lambda: read(path))
    assert str(path) in message
    assert kind in message or kind == "socket"  # a socket cannot even be opened


@linux
@pytest.mark.parametrize("reader", ["read_json", "read_jsonl", "load_measured", "load_table", "get_space"])
@pytest.mark.parametrize("line", [True, False])
def test_text_without_end_is_not_read(tmp_path, reader, line):
    name, read = READERS[reader]
    with (tmp_path / name).open("wb") as file:
        file.write(b"[1]\n" if line else b"[")
        file.truncate(1 << 40)  # takes no space on the disk
    message = refused(lambda: read(tmp_path / name))
    assert "MB" in message


def bomb(shape, dtype="<f8", payload=b""):
    """A member of an .npz file that declares an array of this shape."""
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + payload


@linux
@pytest.mark.parametrize(
    "member", [bomb((10**12,)), bomb((-5, -2), payload=bytes(80)), bomb((2,), "|O", bytes(16)), bomb((10**5,) * 9), b""]
)
def test_arrays_have_the_size_that_they_declare(tmp_path, member):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("a.npy", member)
    assert "cannot read" in refused(lambda: read_arrays(tmp_path / "a.npz"))


@linux
@pytest.mark.parametrize("read", [read_arrays, load_checkpoint])
def test_compressed_bombs_are_not_read(tmp_path, read):
    with zipfile.ZipFile(tmp_path / "a", "w", zipfile.ZIP_DEFLATED) as file, file.open("a/data.pkl", "w") as member:
        for _ in range(64):
            member.write(bytes(1 << 20))
    assert (tmp_path / "a").stat().st_size < 1 << 17
    assert "compressed" in refused(lambda: read(tmp_path / "a"))


class Reduced:
    """An object whose pickle calls a function."""

    def __init__(self, function, *args):
        self.made_by = function, args

    def __reduce__(self):
        return self.made_by


def beyond(shape, stride):
    """A tensor of this shape on a storage of one number."""
    storage = torch.zeros(1).storage()
    return Reduced(torch._utils._rebuild_tensor_v2, storage, 0, shape, stride, False, OrderedDict())


def laughs(levels=40):
    values: list = [0]
    for _ in range(levels):
        values = [values, values]
    return values


def nested(levels=200):
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def itself():
    value: list = []
    value.append(value)
    return value


HOSTILE = {
    "expanded": lambda: torch.zeros(1).expand(10**5, 10**5),
    "overlapping": lambda: torch.zeros(10**4).as_strided((10**4, 10**3, 10**3), (0, 1, 1)),
    "beyond its storage": lambda: beyond((4 * 10**9,), (1,)),
    "strided beyond its storage": lambda: beyond((2, 2), (10**9, 1)),
    "no numbers, many rows": lambda: torch.zeros(10**9, 0),
    "sparse": lambda: torch.sparse_coo_tensor([[0], [0]], [1.0], (10**9, 10**9)),
    "made by its class": lambda: Reduced(torch.FloatTensor, 3 * 10**9),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
    "without numbers": lambda: torch.zeros(10**6, device="meta"),
    "repeated": laughs,
    "nested": nested,
    "itself": itself,
    "a storage": lambda: torch.zeros(3).untyped_storage(),
}


@linux
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_checkpoints_hold_what_they_declare(tmp_path, make, zipped):
    torch.save({"w": make()}, tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)
    assert str(tmp_path / "c.pt") in refused(lambda: load_checkpoint(tmp_path / "c.pt"))


CONTENTS = {
    "w": torch.arange(300.0).view(3, 100),
    "tied": torch.ones(5),
    "n": 7,
    "s": "x" * 40,
    "h": torch.ones(9).half(),
}


def equal(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) and value.dtype == other[key].dtype
        if isinstance(value, torch.Tensor)
        else value == other[key] and type(value) is type(other[key])
        for key, value in one.items()
    )


def test_a_flipped_bit_is_told_or_changes_nothing(tmp_path):
    """torch itself compares no checksums: it reads flipped weights without a word."""
    path = tmp_path / "c.pt"
    save_checkpoint(path, CONTENTS)
    whole, told = path.read_bytes(), 0
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        try:
            assert equal(load_checkpoint(path), CONTENTS)
        except UserError:
            told += 1
    assert told > len(whole) / 28  # of a seventh of the bytes; many others are padding


def test_what_users_have_is_read(tmp_path):
    path, view = tmp_path / "c.pt", torch.arange(1000.0)
    shared = {
        **CONTENTS,
        "again": CONTENTS["w"],
        "rows": view[10:20],
        "turned": CONTENTS["w"].T,
        "empty": torch.zeros(0),
    }
    shared |= {"positions": torch.arange(30).expand(1, -1), "same": torch.ones(1).expand(8), "scalar": torch.tensor(3)}
    for zipped in (True, False):
        torch.save(shared, path, _use_new_zipfile_serialization=zipped)
        assert equal(load_checkpoint(path), shared)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(shared, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert equal(load_checkpoint(path), shared)
    torch.save({"p": torch.nn.Parameter(torch.ones(2)), "o": OrderedDict(a=torch.Size([1])), "d": torch.float16}, path)
    assert load_checkpoint(path)["p"].requires_grad


@linux
def test_a_large_checkpoint_is_read(tmp_path):
    path = tmp_path / "c.pt"
    torch.save({"w": torch.ones(1 << 25)}, path)  # 128 MB
    assert load_checkpoint(path)["w"].sum() == 1 << 25


@linux
def test_shapes_are_compared_before_numbers_are_looked_at():
    expanded = torch.zeros(1).expand(10**6, 10**6)
    fit = {"w": torch.zeros(3)}
    assert "w (1000000, 1000000) for (3,)" in refused(lambda: check_fit({"w": expanded}, fit))
    assert "1 extra" in refused(lambda: check_fit({**fit, "x": expanded}, fit))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.uint8, torch.complex64])
def test_whole_numbers_are_no_weights(dtype):
    with pytest.raises(UserError, match="w"):
        check_fit({"w": torch.ones(3, dtype=dtype)}, {"w": torch.zeros(3)})
    with pytest.raises(UserError, match="of another type"):
        check_fit({"n": torch.ones(())}, {"n": torch.ones((), dtype=torch.int64)})
    for precision in (torch.float16, torch.bfloat16, torch.float64):
        check_fit({"w": torch.ones(3, dtype=precision)}, {"w": torch.zeros(3)})


@given(st.integers() | st.floats() | st.text() | st.booleans() | st.none())
def test_numbers_are_finite_and_in_range(value):
    fits = type(value) in (int, float) and value == value and -1 <= value <= 2
    assert is_number(value, -1, 2) == fits
    assert is_whole(value, -1, 2) == (fits and type(value) is int)
    assert not is_number(10**400)


def png(width, height):
    """A PNG file that declares a size and holds nothing."""
    parts = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(99))))
    chunks = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@linux
def test_images_of_any_size_and_pipes_are_skipped(tmp_path, capsys):
    for part in ("train", "val"):
        for kind in ("a", "b"):
            (tmp_path / part / kind).mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (40, 40), (9 * i, 0, 0)).save(tmp_path / part / kind / f"{i}.png")
    hostile = tmp_path / "val" / "a"
    (hostile / "bomb.png").write_bytes(png(2**31 - 1, 2**31 - 1))
    (hostile / "large.png").write_bytes(png(60_000, 60_000))
    os.mkfifo(hostile / "pipe.jpg")
    (hostile / "endless.jpg").symlink_to("/dev/zero")
    spec = replace(DIGITS, dataset="imagenet", in_channels=3, n_classes=2)

    def read():
        test = image_folder_splits(spec, tmp_path).test
        found = [test[i, 0, None] for i in range(len(test))]
        raise UserError(f"{sum(image is not None for image in found)} images, {unreadable(test)} skipped")

    assert refused(read) == "16 images, 4 skipped"
