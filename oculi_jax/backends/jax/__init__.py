"""The contract in JAX: `layout` says where tokens stand, `layers` runs them, the rest are short programs over these two."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ...utils.devices import memory, timed_products
from .decode import decode_rows
from .mesh import spread
from .programs import lens, run
from .variants import run_base, run_variants

if TYPE_CHECKING:
    from ...models.decoder.model import Decoder

__all__ = [
    "compiles_per_length",
    "decode_rows",
    "lens",
    "rate",
    "room",
    "run",
    "run_base",
    "run_variants",
    "spread",
    "traceable",
]

compiles_per_length = True
traceable = True


def room(model: Decoder) -> tuple[str, int]:
    """The platform that a model runs on, and how many bytes are free there; 4 GiB where its driver does not say.

    Where its devices belong to several processes it is the least of them, so that all come to the same plan.
    """
    device = _own_device(model)
    free = memory(device)[1]
    free = 4 << 30 if free is None else free
    if not model.embed[...].is_fully_addressable:
        from jax.experimental import multihost_utils

        free = int(multihost_utils.process_allgather(np.float32(free)).min())
    return device.platform, free


def _own_device(model: Decoder) -> Any:
    """One of a model's devices, of this process."""
    return next(iter(model.embed[...].sharding.addressable_devices))


def rate(model: Decoder) -> float:
    """What a matrix product of the model's dtype does on a device of its, in operations a second; measured once in a process."""
    return _rate(_own_device(model), model.dtype)


@lru_cache
def _rate(device: Any, dtype: np.dtype) -> float:
    size = 768 if device.platform == "cpu" else 4096
    x = jax.device_put(np.ones((size, size), dtype), device)
    product = jax.jit(partial(jax.numpy.matmul, precision="highest"))
    return timed_products(lambda: product(x, x).block_until_ready(), size)
