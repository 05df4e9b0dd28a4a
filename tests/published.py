"""Published files for tests: the golden rules that fill their keys."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def filled(layout, seed, gains=(0.5, 1.5), steps=None):
    """{key: tensor} for a list of [key, shape]. Each tensor is drawn from its key and the seed.

    The gains of norms lie between `gains`. `steps` has the smallest size of each learned step by its key.
    """
    steps = steps or {}
    return {
        key: torch.from_numpy(np.asarray(_fill(key, tuple(shape), seed, gains, steps.get(key))))
        for key, shape in layout
    }


def _fill(key, shape, seed, gains, step):
    rng = np.random.default_rng(zlib.crc32(key.encode()) + seed)
    if step is not None:
        return (step * (1 + np.abs(rng.standard_normal(shape)))).astype(np.float32)
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if key.endswith("running_mean"):
        values = 0.1 * rng.standard_normal(shape)
    elif key.endswith("running_var"):
        values = rng.uniform(0.5, 1.5, shape)
    elif key.endswith("_matrix"):
        values = np.eye(shape[0]) + 0.05 * rng.standard_normal(shape)
    elif key.endswith("activation_range"):
        values = rng.uniform(2, 6, shape)
    elif key.endswith("weight_range"):
        values = np.full(shape, -1.0)
    elif key.endswith(".weight") and len(shape) >= 2:
        values = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    elif key.endswith("running_min"):
        values = -rng.uniform(0.1, 1.0, shape)
    elif key.endswith("running_max"):
        values = rng.uniform(0.5, 2.5, shape)
    elif key.endswith(".scale"):
        values = 0.5 * rng.standard_normal(shape)
    elif key.endswith(".offset"):
        values = 0.3 * rng.standard_normal(shape)
    elif key.endswith(("bn.weight", ".gamma")):
        values = rng.uniform(*gains, shape)
    elif key.endswith(("bn.bias", ".beta")):
        values = 0.1 * rng.standard_normal(shape)
    else:
        values = 0.01 * rng.standard_normal(shape)
    return values.astype(np.float32)
