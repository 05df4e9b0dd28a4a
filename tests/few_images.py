"""The digits in so small a number that a training takes a second: for tests of what is done, not of how well."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

from dataset.splits import ImageSpec, Splits
from dataset.table import DATASETS

N_TRAIN, N_VAL, N_TEST = 128, 100, 50
DIGITS = DATASETS["digits"]


@functools.cache
def few_digits(spec: ImageSpec) -> Splits:
    """Some of all splits, evenly spaced. They say that they are the digits, as the shipped networks expect."""
    whole = DIGITS.load(spec)
    parts = {"train": N_TRAIN, "calibration": N_TRAIN, "val": N_VAL, "test": N_TEST}
    return replace(whole, **{part: getattr(whole, part).thinned(n) for part, n in parts.items()})


FEW_DIGITS = replace(DIGITS, load=few_digits)
IN_OTHER_PROCESSES = {"APQ_PLUGINS": "few_images_plugin", "PYTHONPATH": str(Path(__file__).parent)}
