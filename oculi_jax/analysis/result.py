"""`Result`: what attribution and composition return, fit for `jit` and `vmap`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
from jax import Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "completeness_error", "details"],
    meta_fields=["method", "layers"],
)
@dataclass(frozen=True, eq=False)
class Result:
    """Values, and how far they are from adding up.

    Attributes:
        values: an array, or name → array; each method says its shape.
        method: the name of the method.
        completeness_error: the sum of all parts minus what they should sum to (a logit); None where nothing is claimed.
        layers: true layer numbers of the leading axis of `values`; empty where it has none.
        details: name → array, or on the host anything: the parts beside `values`, as each method says.
    """

    values: Any
    method: str
    completeness_error: Array | None = None
    layers: tuple[int, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metadata(self) -> dict[str, Any]:
        """`details`, and `layers` where there are any."""
        return {**({"layers": list(self.layers)} if self.layers else {}), **self.details}
