"""The machine and the versions that a benchmark ran on."""

from __future__ import annotations

import platform

import numpy
import torch

from apq.machine import n_cores, processor


def describe() -> dict[str, str | int]:
    """Processor, cores, versions, and the GPU where there is one."""
    return {
        "cpu": processor(),
        "cores": n_cores(),
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "torch": torch.__version__,
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }
