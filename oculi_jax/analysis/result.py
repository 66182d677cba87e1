"""`Result`: what attribution and composition return, fit for `jit` and `vmap`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

import numpy as np
from jax import Array
from jax.core import Tracer

from ..pytrees import pytree, static


@pytree
class Result:
    """Values, and how far they are from adding up.

    Attributes:
        values: an array, or name → array; each method says its shape.
        method: the name of the method.
        completeness_error: the sum of all parts minus what they should sum to (a logit); None where nothing is claimed.
        layers: true layer numbers of the leading axis of `values`; empty where it has none.
        details: name → array, or on the host anything: the parts beside `values`, as each method says.

    Examples:
        >>> AttributionMethods.attention_rollout(capture.attention)
        Result(attention_rollout: values [4, 6, 6])
    """

    values: Any
    method: str = static()
    completeness_error: Array | None = None
    layers: tuple[int, ...] = static(default=())
    details: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        def shape(x: Any) -> str:
            return f"[{', '.join(map(str, np.shape(x)))}]"

        named = isinstance(self.values, Mapping)
        values = ", ".join(f"{k} {shape(v)}" for k, v in self.values.items()) if named else shape(self.values)
        parts = [f"values {values}"]
        if self.completeness_error is not None:
            error = self.completeness_error
            one = np.shape(error) == () and not isinstance(error, Tracer)
            parts.append(f"completeness_error {f'{float(error):.1e}' if one else shape(error)}")
        parts += [f"details {', '.join(self.details)}"] if self.details else []
        return f"Result({self.method}: {'; '.join(parts)})"

    @property
    def metadata(self) -> dict[str, Any]:
        """`details`, and `layers` where there are any.

        Examples:
            >>> AttributionMethods.attention_rollout(capture.attention).metadata
            {'layers': [0, 1, 2, 3]}
        """
        return {**({"layers": list(self.layers)} if self.layers else {}), **self.details}
