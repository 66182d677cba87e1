"""Values of any library as the host sees them: NumPy where it can, and what a JAX array or tracer tells of itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def on_device(value: Any) -> bool:
    """Whether a value is a JAX array or tracer, which is checked by shape and dtype alone."""
    return isinstance(value, jax.Array)


def as_array(value: Any) -> Any:
    """A NumPy array of what the host can see; a JAX array of anything that holds one, lists of tracers too."""
    if on_device(value):
        return value
    if hasattr(value, "detach"):  # a torch tensor, perhaps on a device and with a gradient
        value = value.detach().cpu()
        return np.asarray(value.float() if "bfloat16" in str(value.dtype) else value)  # which NumPy has not
    return jnp.asarray(value) if any(map(on_device, jax.tree.leaves(value))) else np.asarray(value)


def listing(shape: Sequence[object]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def under_trace(values: Any = ()) -> bool:
    """Whether this runs inside a trace (`jit`, `vmap`, `grad`), where nothing can be read; or one of the values is of one."""
    # What is put on a device inside jit is a tracer, even if none of the values is.
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((values, jax.device_put(np.int32(0)))))
