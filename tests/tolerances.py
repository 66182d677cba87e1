"""Every tolerance of the suite, with its reason. They tighten, never loosen."""

from __future__ import annotations

import numpy as np

from oculi_jax.sites import SITES

ROW = 3e-5  # contract, section 7: a row's largest error over its largest value, float32 on the CPU
LOGITS = 2e-4  # contract, section 7: absolute
ROUNDING = 1e-5  # one operation more or less, in float32, on values up to some tens
ROUTES = 1e-4  # two routes to one number that sum in different orders (a sweep's row, a sharded run)
MARGIN = 1e-3  # how far apart what is ranked must be: two routes err by LOGITS each, and as much again
GRADIENT = 4e-3  # relative, of a central difference in float32: rounding over the step, and its curvature


def row_error(site: str, ours: np.ndarray, theirs: np.ndarray, real: np.ndarray) -> float:
    """The contract's measure: over rows at real tokens, max error over the row's (for scores the head's) largest value.

    Args:
        site: its name.
        ours, theirs: captures of all layers.
        real: bool `[T]`.
    """
    row = SITES[site]
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (site, ours.shape, theirs.shape)
    for axis, letter in enumerate((("L",) if row.layered else ()) + row.axes):
        if letter in "TS":
            ours, theirs = np.compress(real, ours, axis), np.compress(real, theirs, axis)
    over = (-2, -1) if site == "scores" else (-1,)
    error = np.abs(ours - theirs).max(over)
    size = np.abs(theirs).max(over)
    return float((error / np.where(size == 0, 1, size)).max())


def parity(ours: dict[str, np.ndarray], logits: np.ndarray, theirs: dict[str, np.ndarray], real: np.ndarray) -> dict:
    """Site → error, and `logits` → absolute error at real tokens."""
    errors = {site: row_error(site, value, theirs[site], real) for site, value in ours.items()}
    errors["logits"] = float(np.abs(np.asarray(logits)[real] - theirs["logits"][real]).max())
    return errors


def assert_parity(errors: dict[str, float]) -> None:
    wrong = {site: error for site, error in errors.items() if not error <= (LOGITS if site == "logits" else ROW)}
    assert not wrong, wrong
