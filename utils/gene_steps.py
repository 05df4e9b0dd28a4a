"""Subnets as steps up from the smallest choice: features in which neighbouring choices are close."""

from __future__ import annotations

import numpy as np

from apq.space import SearchSpace
from utils.converter import Converter


def steps_of(space: SearchSpace, genes: np.ndarray, *, policy: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(n, k) float64 features of a gene matrix, and (k,) which choice each belongs to.

    A choice of the j-th of m values has its first j + 1 of m features at one; that of an idle slot has none. So the
    squared distance of two values of a choice is how many steps they are apart. Without `policy` the bits are left out.
    """
    converter = Converter(space)
    one_hot, parts, groups = converter.encode(genes).astype(np.float64), [], []
    sections = zip(converter.offsets.tolist(), converter.choices.tolist(), strict=True)
    starts = [*((start, width, True) for start, width in sections), *((s, w, False) for _, s, w in converter.depths)]
    for group, (start, width, is_choice) in enumerate(starts):
        if policy or start < converter.half_dim:
            part = one_hot[:, start : start + width]
            parts.append(part[:, ::-1].cumsum(axis=1)[:, ::-1] if is_choice else part)  # depths are steps already
            groups += [group] * width
    return np.concatenate(parts, axis=1), np.array(groups)
