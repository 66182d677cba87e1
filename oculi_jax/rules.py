"""Rules for the backward pass, as data: what is differentiated otherwise than it is computed. No value changes by them.

    forward(model, tokens, rules=relp(model.config))

Every number of them is data, so that `vmap` over rules is one program: strengths, layers, heads, temperatures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .arrays import AnyArray, as_array, listing, on_device
from .models.decoder.derivatives import Derivatives
from .pytrees import pytree
from .sites import SITES, Site, site_of
from .traced import entry

if TYPE_CHECKING:
    from .models.decoder.config import DecoderConfig

__all__ = ["Rules", "attn_lrp", "frozen", "gim", "grad_drop", "relp"]

# The site that a product makes → its two factors.
PRODUCTS = {"z": "patterns · values", "scores": "queries · keys", "act": "gate · up"}
# Whose value at 0 is not 0, so that act(g) / g has no limit there.
_NO_SECANT = ("sigmoid", "laplace")


@pytree
class Rules:
    """What is differentiated otherwise. Empty, it is nothing: each rule that is named acts, and numbers say how much.

    A number is the same everywhere. An array has one for each layer, `[L]`, and of a site with heads (of the softmax too) one for
    each of its own, `[L, H]` or `[L, K]`; axes of 1 broadcast. A site outside the layers has a number alone. An axis in front of
    these is a family of rules, one after another.

    Attributes:
        stop: site → the fraction of its gradient that is stopped, 0 to 1; after edits. 1 freezes it: a constant.
        products: `"z"` (patterns · values), `"scores"` (queries · keys) or `"act"` (gate · up) → the fraction that is stopped at
            each of the two factors, beside what is stopped at their own sites; ½ shares the gradient among them.
        secant: the fraction, 0 to 1, in which the derivative of the activation at the gate is act(g) / g, its secant through 0
            (sigmoid(g) for silu), in place of its own.
        temperature: above 0; the softmax is differentiated as if its scores were divided by it, p_T ∘ (ṡ − ⟨p_T, ṡ⟩).

    Examples:
        >>> rules = Rules(stop={"pattern": 1.0}, temperature=np.full((4, 6), 2.0))
        >>> slope = jax.grad(lambda r: metric(forward(model, ids, Steer(1, r, positions=2), rules=rules)))
        >>> slope(jnp.zeros(192)).shape
        (192,)
    """

    stop: Mapping[str, Any] = field(default_factory=dict)
    products: Mapping[str, Any] = field(default_factory=dict)
    secant: Any = None
    temperature: Any = None


def relp(config: DecoderConfig) -> Rules:
    """Relevance patching, Jafari et al. (2025), arXiv:2508.21258: norms' scales and patterns are constants, the gate has its
    secant, and gate · up is shared between them. Of a model without biases, Σ_t ⟨embed_t, gradient_t⟩ is then the logit itself.

    Examples:
        >>> causal.attribution_patching(model, ids, other, metric, "mlp_out", rules=relp(model.config)).values["mlp_out"].shape
        (4, 6)
    """
    return Rules({**_norms(config), "pattern": 1.0}, {"act": 0.5}, secant=1.0)


def gim(config: DecoderConfig) -> Rules:
    """Gradient interaction modifications, Edin et al. (2025), arXiv:2505.17630: norms' scales are constants, the softmax is
    differentiated at temperature 2, and each product's gradient is shared between its factors.

    Examples:
        >>> causal.attribution_patching(model, ids, other, metric, "z", rules=gim(model.config)).values["z"].shape
        (4, 6, 6)
    """
    return Rules(_norms(config), dict.fromkeys(PRODUCTS, 0.5), temperature=2.0)


def attn_lrp(config: DecoderConfig) -> Rules:
    """Layer-wise relevance propagation through attention, Achtibat et al. (2024), arXiv:2402.05602, as a gradient: each product is
    shared between its factors, norms' scales are constants, the gate has its secant, and the softmax its own derivative.

    Examples:
        >>> attn_lrp(model.config).temperature
        1.0
    """
    return replace(gim(config), secant=1.0, temperature=1.0)


def frozen(config: DecoderConfig) -> Rules:
    """Patterns and norms' scales are constants: what is left of attention is linear.

    Examples:
        >>> sorted(frozen(model.config).stop)
        ['attn_scale', 'final_scale', 'mlp_scale', 'pattern']
    """
    return Rules({**_norms(config), "pattern": 1.0})


def grad_drop(config: DecoderConfig) -> Rules:
    """A family of L rules, Kramár et al. (2024), arXiv:2403.00745: in each, what one layer's attention and MLP add is a constant,
    so that an indirect effect through it cannot cancel a direct one.

    Examples:
        >>> found = causal.attribution_patching(model, ids, other, metric, "z", rules=grad_drop(model.config))
        >>> found.values["z"].shape, found.grad_drop().values["z"].shape
        ((4, 4, 6, 6), (4, 6, 6))
    """
    one = np.eye(config.num_hidden_layers, dtype=np.float32)
    return Rules({"attn_out": one, "mlp_out": one})


def _norms(config: DecoderConfig) -> dict[str, float]:
    return {name: 1.0 for name in config.sites if name.endswith("_scale")}


def check_rules(rules: object, config: DecoderConfig, n_families: int = 0) -> Rules:
    """Rules whose every leaf is an array with all its axes: a number, `[L]` or `[L, n]`, behind those of so many families at most.

    Raises:
        TypeError, ValueError: one that cannot be, by value where the host can see it, else by shape.
    """
    if not isinstance(rules, Rules):
        raise TypeError(f"rules is a {type(rules).__name__}; give Rules, such as oculi_jax.rules.relp(model.config).")
    if wrong := [name for name in rules.products if name not in PRODUCTS]:
        allowed = ", ".join(f"{name!r} ({what})" for name, what in PRODUCTS.items())
        raise ValueError(f"Rules.products names {wrong[0]!r}; the products are {allowed}.")
    if rules.secant is not None and config.hidden_act in _NO_SECANT:
        raise ValueError(
            f"Rules.secant is given, and this model's activation is {config.hidden_act!r}, which is not 0 at 0: its secant through "
            "0 has no slope there. Leave it out."
        )
    sites = config.sites

    def made(value: object, site: Site, where: str, positive: bool = False) -> Any:
        array = as_array(value)
        _check_numbers(array, where, positive)
        return _with_axes(array, site, config, where, n_families)

    def optional(name: str, site: str, positive: bool = False) -> Any:
        value = getattr(rules, name)
        return None if value is None else made(value, sites[site], f"Rules.{name}", positive)

    if "allowed" in rules.stop:
        raise ValueError("Rules.stop names 'allowed', a table of yes and no, which has no gradient.")
    return Rules(
        {name: made(value, site_of(name, sites), f"Rules.stop[{name!r}]") for name, value in rules.stop.items()},
        {name: made(value, sites[name], f"Rules.products[{name!r}]") for name, value in rules.products.items()},
        optional("secant", "gate"),
        optional("temperature", "pattern", positive=True),
    )


def check_family(rules: object, config: DecoderConfig) -> tuple[Rules, int | None]:
    """As `check_rules`, of rules that may be a family: then all leaves lead with it; and its size, None for a single one.

    ValueError where leaves are of families of several sizes.
    """
    found = check_rules(rules, config, n_families=1)
    single = check_rules(jax.tree.map(lambda _: np.float32(1), found), config)
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(single), strict=True))
    sizes = sorted({x.shape[0] for x, one in pairs if x.ndim > one.ndim})
    if len(sizes) > 1:
        raise ValueError(
            f"Rules hold families of {' and '.join(map(str, sizes))} rules; all of one length, or single, are needed."
        )
    if not sizes:
        return found, None
    whole = [x if x.ndim > one.ndim else jnp.broadcast_to(x, (sizes[0], *x.shape)) for x, one in pairs]
    return jax.tree.unflatten(jax.tree.structure(found), whole), sizes[0]


def _check_numbers(array: Any, where: str, positive: bool) -> None:
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(f"{where} is of {array.dtype}, and numbers are needed.")
    if on_device(array):
        return
    fine = np.isfinite(array) & (array > 0) if positive else (array >= 0) & (array <= 1)
    if not fine.all():
        allowed = (
            "a temperature is above 0 (1 is the softmax's own)"
            if positive
            else "a fraction is 0 (none) to 1 (all of it)"
        )
        raise ValueError(f"{where} holds {array[~fine].ravel()[0]}, and {allowed}.")


def _with_axes(array: Any, site: Site, config: DecoderConfig, where: str, n_families: int) -> AnyArray:
    letters = ("L",) * site.layered + ((site.head_axis,) if site.head_axis else ())
    sizes = tuple(config.sizes[letter] for letter in letters)
    xp = jnp if on_device(array) else np
    array = array.astype(jax.dtypes.canonicalize_dtype(np.float64))
    if not array.ndim:
        return xp.broadcast_to(array, sizes)
    families = array.ndim - len(sizes)
    own = array.shape[max(families, 0) :]
    if families < 0 or families > n_families or any(n not in (1, size) for n, size in zip(own, sizes, strict=True)):
        allowed = f"{listing(letters)} = {listing(sizes)}" + (", behind the axis of a family," if n_families else "")
        hint = "" if families <= n_families else " A family of rules is mapped: jax.vmap(lambda rules: …)(rules)."
        raise ValueError(
            f"{where} has shape {listing(array.shape)}; it can be a number{f' or {allowed}' if letters else ''}.{hint}"
        )
    return xp.broadcast_to(array, (*array.shape[:families], *sizes))


def of_layer(rules: Rules, layer: Array | None) -> Derivatives:
    """How a layer is differentiated under rules that `check_rules` returned; what lies outside of all layers, for None."""
    if layer is None:
        return Derivatives({name: x for name, x in rules.stop.items() if not SITES[name].layered})
    stop = {name: x for name, x in rules.stop.items() if SITES[name].layered}
    of_layers = stop, dict(rules.products), rules.secant, rules.temperature
    return Derivatives(*jax.tree.map(lambda x: entry(x, layer), of_layers))
