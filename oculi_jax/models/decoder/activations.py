"""The MLP's activation functions, by the names of Hugging Face's `hidden_act`.

Each is the formula of `transformers.activations` (constants included) as a function of the gate projection, plus, for
the two that are learned, their parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


def _gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


def _gelu_fast(x: Array) -> Array:
    return 0.5 * x * (1.0 + jnp.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def _laplace(x: Array) -> Array:
    return 0.5 * (1.0 + jax.lax.erf((x - 0.707107) / (0.282095 * 2.0**0.5)))


def _prelu(x: Array, weight: Array) -> Array:
    return jnp.where(x > 0, x, weight * x)


def _xielu(x: Array, alpha_p: Array, alpha_n: Array, beta: Array, eps: Array) -> Array:
    """Huang and Schlag (2024), arXiv:2411.13010."""
    positive = jax.nn.softplus(alpha_p) * x * x + beta * x
    negative = (jnp.expm1(jnp.minimum(x, eps)) - x) * (beta + jax.nn.softplus(alpha_n)) + beta * x
    return jnp.where(x > 0, positive, negative)


ACTIVATIONS: dict[str, Callable[..., Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_10": lambda x: jnp.clip(_gelu(x), -10.0, 10.0),
    "gelu_fast": _gelu_fast,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_accurate": _gelu_tanh,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "hardswish": jax.nn.hard_swish,
    "laplace": _laplace,
    "linear": lambda x: x,
    "mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    "prelu": _prelu,
    "xielu": _xielu,
}

# Learned activations: the names and shapes of their parameters under `mlp.act_fn` in a checkpoint.
ACTIVATION_PARAMETERS: dict[str, dict[str, tuple[int, ...]]] = {
    "prelu": {"weight": (1,)},
    "xielu": {"alpha_p": (1,), "alpha_n": (1,), "beta": (), "eps": ()},
}
