"""Which prompts a fit is judged on: a share that it never sees, drawn."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from ..arrays import AnyArray, share


def apart(
    order: Int[AnyArray, "N"], held_out: float, what: str = "prompts"
) -> tuple[Int[np.ndarray, "M"], Int[np.ndarray, "R"]]:
    """The first of prompts in a drawn order, to judge on, and the others, to fit on: each ascending, and none of them empty.

    Args:
        held_out: the share of the first.
        what: they are, in messages.

    Raises:
        ValueError: no share, or one prompt alone.
    """
    part, n = share(held_out, "held_out", what), len(order)
    if n < 2:
        raise ValueError(f"There is 1 {what.removesuffix('s')}, and some are needed to fit on, and some to judge on.")
    count = min(max(1, round(part * n)), n - 1)
    held, rest = np.split(np.asarray(order), [count])
    return np.sort(held), np.sort(rest)
