"""Every tolerance of the suite, with its reason. They tighten, never loosen."""

from __future__ import annotations

import json
import os

import numpy as np

from oculi_jax.sites import SITES

ROW = 3e-5  # contract, section 7: a row's largest error over its largest value, float32 on the CPU
LOGITS = 2e-4  # contract, section 7: absolute
ROUNDING = 1e-5  # one operation more or less, in float32, on values up to some tens
ROUTES = 1e-4  # two routes to one number that sum in different orders (a sweep's row, a sharded run)
MARGIN = 1e-3  # how far apart what is ranked must be: two routes err by LOGITS each, and as much again
GRADIENT = 4e-3  # relative, of a central difference in float32: rounding over the step, and its curvature


# What is added to make a point of the residual stream: the sites, and how many layers earlier they stand.
ADDENDS = {
    "resid_pre": (("resid_mid", 1), ("mlp_out", 1)),
    "resid_mid": (("resid_pre", 0), ("attn_out", 0)),
    "resid_post": (("resid_mid", 0), ("mlp_out", 0)),
}


def real_tokens(site: str, values: np.ndarray, real: np.ndarray) -> np.ndarray:
    """A capture of all layers at real tokens alone, in float64."""
    values, row = np.asarray(values, np.float64), SITES[site]
    for axis, letter in enumerate((("L",) if row.layered else ()) + row.axes):
        if letter in "TS":
            values = np.compress(real, values, axis)
    return values


def over(site: str) -> tuple[int, ...]:
    """The axes of what is judged as one: a row, the last axis; of scores the whole head."""
    return (-2, -1) if site == "scores" else (-1,)


def row_size(site: str, values: dict[str, np.ndarray], real: np.ndarray) -> np.ndarray:
    """What a row's error is measured by: its largest value, or that of a row that was added to make it.

    A row of the residual stream may be the small difference of large ones. The rounding of each is that of its own size,
    which is all that float32 promises.

    Args:
        site: its name.
        values: captures of all layers, of that site and of what it is the sum of.
        real: bool `[T]`.
    """

    def largest(name: str) -> np.ndarray:
        return np.asarray(np.abs(real_tokens(name, values[name], real)).max(over(name)))

    size = largest(site)
    for name, earlier in ADDENDS.get(site, ()):
        size[earlier:] = np.maximum(size[earlier:], largest(name)[: len(size) - earlier])
    return size


def row_error(site: str, ours: np.ndarray, theirs: dict[str, np.ndarray], real: np.ndarray) -> float:
    """The contract's measure: over rows at real tokens, max error over the `row_size`.

    Args:
        site: its name.
        ours: the capture of all layers.
        theirs: the other side's, with what `row_size` needs.
        real: bool `[T]`.
    """
    mine, wanted = (real_tokens(site, values, real) for values in (ours, theirs[site]))
    assert mine.shape == wanted.shape, (site, mine.shape, wanted.shape)
    size = row_size(site, theirs, real)
    return float((np.abs(mine - wanted).max(over(site)) / np.where(size == 0, 1, size)).max())


def parity(ours: dict[str, np.ndarray], logits: np.ndarray, theirs: dict[str, np.ndarray], real: np.ndarray) -> dict:
    """Site → error, and `logits` → absolute error at real tokens."""
    errors = {site: row_error(site, value, theirs, real) for site, value in ours.items()}
    errors["logits"] = float(np.abs(np.asarray(logits)[real] - theirs["logits"][real]).max())
    return errors


def record(errors: dict[str, float]) -> None:
    """Writes site → error into the file that `.ci/everywhere` names, which reads the largest from it."""
    if file := os.environ.get("OCULI_TEST_ERRORS"):
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(errors) + "\n")


def beyond(errors: dict[str, float]) -> dict[str, float]:
    """Those that are not within the contract's bounds."""
    return {site: error for site, error in errors.items() if not error <= (LOGITS if site == "logits" else ROW)}


def assert_parity(errors: dict[str, float]) -> None:
    """That every site and the logits are within the contract's bounds."""
    record(errors)
    assert not beyond(errors), beyond(errors)
