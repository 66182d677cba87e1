"""Values of any library as the host sees them: NumPy where it can, and what a JAX array or tracer tells of itself."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

# What is left of an `ArrayLike` once it is looked at: of NumPy on the host, of JAX on a device or in a trace.
AnyArray: TypeAlias = np.ndarray | Array
Tree = TypeVar("Tree")


# Short names of dtypes that people write, as the command lines of others take them.
SHORT = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "fp32": "float32",
    "f32": "float32",
}


def full_name(dtype: object) -> Any:
    """`"bfloat16"` for `"bf16"` and its like; whatever else was given, as it is."""
    return SHORT.get(dtype, dtype) if isinstance(dtype, str) else dtype


def wide(dtype: object) -> np.dtype:
    """What is computed in where rounding adds up: float32, or float64 for values of that."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def on_device(value: object) -> bool:
    """Whether a value is a JAX array or tracer, which is checked by shape and dtype alone."""
    return isinstance(value, jax.Array)


def as_array(value: object) -> Any:
    """A NumPy array of what the host can see; a JAX array of anything that holds one, lists of tracers too."""
    if on_device(value):
        return value
    if hasattr(value, "detach"):  # a torch tensor, perhaps on a device and with a gradient
        tensor: Any = value
        tensor = tensor.detach().cpu()
        return np.asarray(tensor.float() if "bfloat16" in str(tensor.dtype) else tensor)  # which NumPy has not
    return jnp.asarray(value) if any(map(on_device, jax.tree.leaves(value))) else np.asarray(value)


def on_every_host(values: Tree) -> Tree:
    """Values as they are, but arrays of which each of several processes has a part alone: these whole on every device."""

    def whole(leaf: Any) -> Any:
        here = isinstance(leaf, Tracer) or not on_device(leaf) or leaf.is_fully_addressable or leaf.is_fully_replicated
        return leaf if here else jax.device_put(leaf, NamedSharding(leaf.sharding.mesh, PartitionSpec()))

    return values if jax.process_count() == 1 else jax.tree.map(whole, values)


def integer(value: object, what: str, low: int | None = None, high: int | None = None, note: str = "") -> int:
    """An int of anything that is an integer, from `low` to `high` where these are given; `note` ends a message.

    Raises:
        TypeError: it is no integer (a bool, a float, an array of several), or is traced.
        ValueError: it is out of range.
    """
    if isinstance(value, bool | np.bool_ | Tracer):
        raise TypeError(f"{what} is {value!r}, and an integer is needed{note}.")
    try:
        found = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{what} is {value!r}, and an integer is needed{note}.") from None
    if (low is not None and found < low) or (high is not None and found > high):
        allowed = f"at least {low}" if high is None else f"at most {high}" if low is None else f"{low} to {high}"
        raise ValueError(f"{what} is {found}, and must be {allowed}{note}.")
    return found


def number(value: object, what: str, *, low: float = 0.0, high: float = np.inf, note: str = "") -> float:
    """A float of a number that is above `low` and below `high`; `note` ends a message.

    Raises:
        TypeError: it is no number (a bool, a text, an array), or is traced.
        ValueError: it is out of range, or NaN.
    """
    if isinstance(value, bool | np.bool_ | Tracer) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{what} is {value!r}, and a number is needed{note}.")
    if not low < value < high:
        allowed = f" above {low:g}" if low > -np.inf else ""
        allowed += f" and below {high:g}" if high < np.inf else ""
        raise ValueError(f"{what} is {value!r}, and must be a finite number{allowed}{note}.")
    return float(value)


def share(value: object, what: str, of: str) -> float:
    """A float between 0 and 1, neither of them; ValueError for anything else."""
    if (
        isinstance(value, bool | np.bool_)
        or not isinstance(value, int | float | np.integer | np.floating)
        or not 0 < value < 1
    ):
        raise ValueError(f"{what} is {value!r}, and must be a share of the {of} between 0 and 1.")
    return float(value)


def one_of(value: object, what: str, allowed: Sequence[str]) -> str:
    """One of some names; ValueError, with the nearest one, for anything else."""
    if isinstance(value, str) and value in allowed:
        return value
    near = difflib.get_close_matches(value, allowed, 1) if isinstance(value, str) else []
    hint = f" Did you mean {near[0]!r}?" if near else ""
    names = [repr(name) for name in allowed]
    which = " or ".join(names) if len(names) < 3 else f"one of {', '.join(names)}"
    raise ValueError(f"{what} is {value!r}, and must be {which}.{hint}")


def check_host(values: object) -> None:
    """TypeError inside a trace, or of what is of one: nothing can be fitted there."""
    if under_trace(values):
        raise TypeError("A fit runs on the host and was called inside a trace (jit, vmap, grad).")


def integers(values: object, what: str) -> tuple[int, ...]:
    """A tuple of ints from one, or from any sequence of them (ranges and NumPy arrays too); TypeError for anything else."""
    try:
        listed = [values] if isinstance(values, int | np.integer) else list(values)  # type: ignore[call-overload]
        return tuple(integer(value, what) for value in listed)
    except TypeError:
        raise TypeError(f"{what} is {values!r}, and a sequence of integers is needed.") from None


def random_key(key: object) -> Array:
    """A typed random key from one of either kind; TypeError or ValueError for anything else."""
    if not isinstance(key, Array):
        raise TypeError(f"key is {key!r}, and a JAX random key is needed: jax.random.key(seed).")
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        typed = key
    elif key.dtype == np.uint32 and key.shape == jax.eval_shape(jax.random.PRNGKey, 0).shape:
        typed = jax.random.wrap_key_data(key)
    else:
        raise TypeError(f"key is an array of {key.dtype}, and a JAX random key is needed: jax.random.key(seed).")
    if typed.shape:
        raise ValueError(f"key holds {list(typed.shape)} keys, and one is needed.")
    return typed


def listing(shape: Sequence[object]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def under_trace(values: object = ()) -> bool:
    """Whether this runs inside a trace (`jit`, `vmap`, `grad`), where nothing can be read; or one of the values is of one."""
    # What is put on a device inside jit is a tracer, even if none of the values is.
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((values, jax.device_put(np.int32(0)))))
