"""Derivatives that the rules of a run change: of a site, a product, the softmax, the gate. No value differs by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from ...arrays import wide
from ...pytrees import pytree


@pytree
class Derivatives:
    """How one layer is differentiated; without any, as it is. Each is a number, or `[n]` of the site's n heads.

    Attributes:
        stop: site → which fraction of its gradient is stopped.
        products: the site that a product makes → which fraction of the gradient is stopped at each of its two factors.
        secant: which fraction of the activation's derivative at the gate is the secant's, act(g) / g.
        temperature: of the softmax's own derivative.
    """

    stop: Mapping[str, Array] = field(default_factory=dict)
    products: Mapping[str, Array] = field(default_factory=dict)
    secant: Array | None = None
    temperature: Array | None = None

    def at(self, site: str, value: Array) -> Array:
        """The value of a site."""
        return stopped(value, _of_heads(self.stop[site], value)) if site in self.stop else value

    def product(self, site: str, value: Array) -> Array:
        """What a product made, before anybody edits it: a fraction less of it is a fraction less of either factor."""
        return stopped(value, _of_heads(self.products[site], value)) if site in self.products else value

    def softmax(
        self, softmax: Callable[[Array, Array], Array], scores: Float[Array, "H T S"], allowed: Bool[Array, "#H T S"]
    ) -> Float[Array, "H T S"]:
        if self.temperature is None:
            return softmax(scores, allowed)
        return _tempered(softmax, scores, allowed, _of_heads(self.temperature, scores))

    def activation(self, act: Callable[..., Array], gate: Float[Array, "T F"], learned: Mapping[str, Array]) -> Array:
        if self.secant is None:
            return act(gate, **learned)
        return _of_secant(act, gate, dict(learned), self.secant)


def _of_heads(x: Array, value: Array) -> Array:
    """A number, or one for each head, against a value `[n, …]`."""
    return x.reshape(*x.shape, *(1,) * (value.ndim - x.ndim)) if x.ndim else x


def _less(tangent: Array, fraction: Array) -> Array:
    kept = jnp.broadcast_to(1 - fraction, tangent.shape)
    left = tangent.astype(wide(tangent.dtype)) * kept.astype(wide(tangent.dtype))
    return jnp.where(kept == 0, 0, left).astype(tangent.dtype)  # not 0 · ∞


@jax.custom_jvp
def stopped(x: Array, fraction: Array) -> Array:
    """x, of whose derivative a fraction is stopped."""
    return x


@stopped.defjvp
def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return primals[0], _less(tangents[0], primals[1])


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _tempered(softmax: Callable[..., Array], scores: Array, allowed: Array, temperature: Array) -> Array:
    """The softmax, whose derivative is that at scores divided by the temperature: ṗ = p_T ∘ (ṡ − ⟨p_T, ṡ⟩)."""
    return softmax(scores, allowed)


@_tempered.defjvp
def _(softmax: Callable[..., Array], primals: Any, tangents: Any) -> tuple[Array, Array]:
    scores, allowed, temperature = primals
    soft = softmax(scores / temperature.astype(scores.dtype), allowed)
    change = soft * tangents[0]
    return softmax(scores, allowed), change - soft * jnp.sum(change, axis=-1, keepdims=True)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _of_secant(act: Callable[..., Array], gate: Array, learned: dict[str, Array], fraction: Array) -> Array:
    """act(gate), of whose derivative by the gate a fraction is the secant's: act(g) / g, and at 0 its limit, act's derivative."""
    return act(gate, **learned)


@_of_secant.defjvp
def _(act: Callable[..., Array], primals: Any, tangents: Any) -> tuple[Array, Array]:
    gate, learned, fraction = primals
    value, by_gate = jax.jvp(lambda g: act(g, **learned), primals[:1], tangents[:1])
    _, by_learned = jax.jvp(lambda x: act(gate, **x), (learned,), (tangents[1],))
    g = gate.astype(wide(gate.dtype))
    parameters = {name: x.astype(g.dtype) for name, x in learned.items()}
    small = jnp.abs(g) < 8 * jnp.finfo(g.dtype).tiny  # where act(g) may have no digits left
    _, slope = jax.jvp(lambda g: act(g, **parameters), (jnp.zeros_like(g),), (jnp.ones_like(g),))
    ratio = jnp.where(small, slope, act(g, **parameters) / jnp.where(small, 1, g))
    along = (ratio * tangents[0].astype(g.dtype)).astype(value.dtype)
    rest = jnp.zeros_like(value) if not learned else by_learned
    return value, _less(by_gate, fraction) + _less(along, 1 - fraction) + rest
