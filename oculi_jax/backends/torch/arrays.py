"""Between tensors and arrays, bfloat16 among them, which NumPy has not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

# Those that a model's weights may have.
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def from_numpy(array: ArrayLike) -> Tensor:
    """A tensor of the same numbers, bfloat16 among them; of its own memory."""
    array = np.array(array)
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(x: Tensor) -> np.ndarray:
    """An array of the same numbers; of the same memory where that is the host's."""
    x = x.detach().cpu().contiguous()
    return x.view(torch.int16).numpy().view(jnp.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


def to_jax(x: Tensor | np.ndarray) -> jax.Array:
    """A JAX array on the CPU, of a tensor or array that nothing else writes to."""
    return jax.device_put(to_numpy(x) if isinstance(x, Tensor) else x, jax.local_devices(backend="cpu")[0])
