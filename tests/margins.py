"""Margins: that what is compared across two roundings cannot jump between them.

Ranks, orders, thresholds and greedy tokens are steps of what they read. Two right answers may differ there by a whole
step where their inputs lie within rounding of one another. So a test that compares two roundings of a step first says,
with one of these, that its inputs are further apart than that; on a processor where they are not, it fails by this
sentence and not by a puzzle.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .tolerances import MARGIN


def assert_leads(values: Any, k: int = 1, margin: float = MARGIN, axis: int = -1) -> None:
    """The `k` largest along the axis are in no doubt, nor is their order: each leads the next by more than the margin."""
    top = -np.sort(-np.moveaxis(np.asarray(values, np.float64), axis, -1), axis=-1)[..., : k + 1]
    gap = (top[..., :-1] - top[..., 1:]).min()
    assert gap > margin, (
        f"two of the {k + 1} largest are {gap:.1e} apart, which rounding may swap; the margin is {margin:.0e}"
    )


def assert_apart(values: Any, margin: float = MARGIN, axis: int = -1) -> None:
    """Every two entries along the axis differ by more than the margin, so that their ranks are in no doubt."""
    assert_leads(values, np.shape(values)[axis] - 1, margin, axis)


def assert_clear(values: Any, threshold: Any, margin: float = MARGIN) -> None:
    """No value lies within the margin of the threshold, so that on which side it falls is in no doubt."""
    gap = np.abs(np.asarray(values, np.float64) - threshold).min()
    assert gap > margin, (
        f"a value lies {gap:.1e} from a threshold, which rounding may cross; the margin is {margin:.0e}"
    )
