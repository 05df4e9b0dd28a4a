"""Which files of a folder an experiment wrote. It removes and replaces no others.

A finished experiment lists its files in `config.json`, under "files". Those of earlier versions have the names that
these versions wrote. States and journals of unfinished work are known by their names and contents.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apq.errors import UserError
from apq.files import read_json, write_json
from apq.leftovers import is_temporary
from apq.model_folder import MODEL_FILES

CONFIG, MADE_BY, ARCH, KEY = "config.json", "made_by.json", "arch", "files"
EXPORTED = {  # by form: what export.py writes
    "onnx": "model.onnx",
    "onnx-integer": "model.integer.onnx",
    "qonnx": "model.qonnx.onnx",
    "packed": "model.safetensors",
}
CHECKPOINTS = "checkpoint"  # the one folder inside an experiment
FINETUNED = ("acc", f"{CHECKPOINTS}/model_best.pth.tar")
FINETUNE_STATE = f"{CHECKPOINTS}/checkpoint.pth.tar"
PICTURES = ("bits.png", "depths.png", "shapes.png", "diagram.png")  # drawn later, by test.py and report.analyse
EVALUATED = ("evaluated.json", "evaluated.jsonl")
OF_FORMAT_1 = {
    *(ARCH, CONFIG, "policy.json", "model.pt", "lat", "history.jsonl", "history.png", "front.json", "front.png"),
    *(*EVALUATED, *FINETUNED, *PICTURES),
}
OF_NOBODY = re.compile(r"\.gitkeep|\.gitignore|\.DS_Store|Thumbs\.db|desktop\.ini|\._.+|\.nfs.+")  # systems' own files
STAGED = ".new"  # where earlier versions built a result, inside the folder
STATE = re.compile(r".+\.state\.pt")
METHODS = ("search", "front", "refine", "round", "agent", "sequential", "pruning", "finetune", "bits")
METHOD_STATES = {f"{name}.state.pt" for name in METHODS}
JOURNAL = re.compile(r"(?P<stem>evaluated(\.state)?|(measured|sensitivity)\.state)(-\d+)?\.jsonl?")
JOURNAL_KEYS = ("coarse_to_fine", "front", "sensitivity")  # what journals of methods say that they are of
RECORD_KEYS = {"acc_predictor_dir", "scope", "accelerator", "cost_model", "measured", "image_bits", "of_what"}
FEWEST_KEYS = 2  # of these, in the `config.json` of any version; others have no use for such names
STATE_KEYS = (b"format", b"asked", b"state")
ARCHIVE, PICKLE = b"PK", b"\x80"  # how files that torch writes begin, today and formerly


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The files in a folder by their paths from there: of a finished experiment, of unfinished work, of others.

    `leftover` are those that killed writes left. A folder of others is named alone, with a "/" at its end.
    """

    finished: frozenset[str]
    unfinished: frozenset[str]
    leftover: frozenset[str]
    foreign: frozenset[str]

    @property
    def in_the_way(self) -> frozenset[str]:
        """Files of others with names that this program gives: a reader would take them for its own."""
        return frozenset(path for path in self.foreign if _is_ours_by_name(path))

    @property
    def of_users(self) -> frozenset[str]:
        """Files of others, but for those that systems put into any folder."""
        return frozenset(path for path in self.foreign if not OF_NOBODY.fullmatch(Path(path).name))

    @property
    def own(self) -> list[str]:
        """All that this program wrote. The list of files comes last: until it is removed, it says what else may be."""
        return sorted(self.finished | self.unfinished | self.leftover, key=lambda path: (path == CONFIG, path))


def contents_of(folder: Path) -> Contents:
    """Look through the folder of an experiment. Symbolic links are not followed."""
    listed = listed_files(folder)
    folders = {CHECKPOINTS, *(parent.as_posix() for name in listed for parent in Path(name).parents)}
    found = set(_paths(folder, "", folders))
    finished = found & listed
    unfinished = {path for path in found - listed if _is_unfinished(folder, path, known=bool(listed))}
    leftover: set[str] = set()
    if f"{STAGED}/" in found and (listed or unfinished):  # what an earlier version was building
        inside = set(_paths(folder, f"{STAGED}/", {f"{STAGED}/{CHECKPOINTS}"}))
        leftover = {path for path in inside if path.removeprefix(f"{STAGED}/") in listed | OF_FORMAT_1}
        found = found - {f"{STAGED}/"} | inside
    own_name = {Path(name).name for name in listed | OF_FORMAT_1}
    leftover |= {p for p in found if is_temporary(folder / p, lambda name: name in own_name or is_state_name(name))}
    foreign = found - finished - unfinished - leftover
    parts = {"finished": finished, "unfinished": unfinished, "leftover": leftover, "foreign": foreign}
    return Contents(**{name: frozenset(paths) for name, paths in parts.items()})


def listed_files(folder: Path) -> set[str]:
    """The files of the finished experiment in a folder; none where there is no experiment."""
    config, made_by = _json(folder / CONFIG), _json(folder / MADE_BY)
    if not (_is_record(config) or _is_provenance(made_by)):
        of_others = set() if config is None else {CONFIG}  # None: there is none, or it is damaged
        return OF_FORMAT_1 - of_others if _is_arch(_json(folder / ARCH)) else set()
    if isinstance(config, dict) and isinstance(files := config.get(KEY), list):
        return {CONFIG, *(str(name) for name in files)}
    files = made_by.get(KEY) if isinstance(made_by, dict) else None
    own = {str(name) for name in files} if isinstance(files, list) and files else OF_FORMAT_1
    return {CONFIG, MADE_BY, *own, *FINETUNED, *PICTURES}


def seal(folder: Path) -> None:
    """Write the list of files into the `config.json` of an experiment that has just been built."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()}
    _list(folder, {path for path in found if not is_state_name(Path(path).name)})


def add(folder: Path, name: str) -> None:
    """Add a file to the list of an experiment. One without `config.json` keeps no list."""
    _list(folder, listed_files(folder) | {name})


def _list(folder: Path, names: set[str]) -> None:
    if _is_record(config := _json(folder / CONFIG)):
        write_json(folder / CONFIG, {**config, KEY: sorted(names)})


def is_state_name(name: str) -> bool:
    """Whether unfinished work alone has files of this name, which has no folder."""
    return ".state." in name or name == Path(FINETUNE_STATE).name


def is_journal_of(name: str, stem: str) -> bool:
    """Whether a file has the name of a journal's with this stem."""
    return (found := JOURNAL.fullmatch(name)) is not None and found["stem"] == stem


def _is_ours_by_name(path: str) -> bool:
    name = Path(path).name
    return (
        path.rstrip("/") in {CHECKPOINTS, MADE_BY, *OF_FORMAT_1} or is_state_name(name) or bool(JOURNAL.fullmatch(path))
    )


def _paths(folder: Path, inner: str, folders: set[str]) -> Iterator[str]:
    """Paths of the files in a folder and in those of its folders that are named."""
    try:
        entries = sorted(os.scandir(folder / inner), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        path = inner + entry.name
        if not entry.is_dir(follow_symlinks=False):
            yield path
        elif path in folders:
            yield from _paths(folder, f"{path}/", folders)
        else:
            yield f"{path}/"


def _is_unfinished(folder: Path, path: str, *, known: bool) -> bool:
    """Whether a file is a state or a journal that this program wrote. `known`: the folder holds an experiment.

    Whose a damaged file was cannot be told. Its name tells, in an experiment or where it is that of a method's state.
    """
    file = folder / path
    if file.is_symlink() or not file.is_file():
        return False
    if path == FINETUNE_STATE or ("/" not in path and STATE.fullmatch(path) and path not in MODEL_FILES):
        own = _is_state(file)
        return known or path in METHOD_STATES if own is None else own
    if found := JOURNAL.fullmatch(path):
        asked = folder / f"{found['stem']}.json"
        if not asked.is_file():
            return False
        data = _json(asked)
        return not isinstance(data, (dict, list)) or any(key in data for key in JOURNAL_KEYS)
    return False


def _is_state(file: Path) -> bool | None:
    """Whether a file is a state of `apq.resume.Resume`; None if it is damaged."""
    try:
        with file.open("rb") as opened:
            begin = opened.read(2)
            if begin != ARCHIVE:
                return False if begin[:1] == PICKLE else None
            with zipfile.ZipFile(opened) as archive:
                (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
                data = archive.read(name)
    except Exception:  # a damaged archive raises anything
        return None
    return all(key in data for key in STATE_KEYS)


def _is_record(config: Any) -> bool:
    """Whether `config.json` is the record of a search of any version."""
    if not isinstance(config, dict):
        return False
    return len(RECORD_KEYS & config.keys()) >= FEWEST_KEYS


def _is_provenance(made_by: Any) -> bool:
    """Whether `made_by.json` is that of a search. It still tells so where `config.json` is damaged."""
    return isinstance(made_by, dict) and {"command", "date", "versions"} <= made_by.keys()


def _is_arch(data: Any) -> bool:
    return isinstance(data, list) and len(data) == 2 and all(isinstance(part, dict) for part in data)


def _json(file: Path) -> Any:
    """The JSON in a file; None where there is none."""
    try:
        return read_json(file) if file.is_file() else None
    except UserError:
        return None
