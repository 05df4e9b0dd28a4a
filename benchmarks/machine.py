"""The machine and the versions that a benchmark ran on."""

from __future__ import annotations

import platform

import numpy
import torch

from apq.machine import n_cores, processor


def describe() -> dict[str, str | int]:
    """Processor, cores and versions."""
    return {
        "cpu": processor(),
        "cores": n_cores(),
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "torch": torch.__version__,
    }
