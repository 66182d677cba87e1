"""`AttributionResult`: what `attribution_patching` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Float

from ..arrays import integer, listing
from ..pytrees import pytree, static
from .entries import entries_of, number_of


@pytree
class AttributionResult:
    """What `attribution_patching` returns. An entry is what one patch would replace: all of the site's last axis, or one of it.

    A pytree of its arrays. `verify` measures how poor the estimates are.

    Attributes:
        values: site → float32, the site's axes less the last, after `L` for a site of the layers: `[L, H, T]` for `z`,
            `[L, T]` for `resid_pre`, `[T]` for `embed`, `[L]` for `attn_scale` (all tokens' scales together). `[B, …]` for
            several pairs. The axis `T` is that of the token array; `T` of `pattern` and `scores` is the query. With the last
            axis where `each` named the site: `[L, T, F]` for the neurons of `act`.
        clean, corrupted: the metric of the two runs, float32 `[]` or `[B]`.
        n_rules: how many rules `values` lead with; None for no axis of these. Static.
        signed: whether values have the sign of an effect, or are magnitudes. Static.

    Examples:
        >>> attribution_patching(model, ids, other, metric, "z").top(1)
        [{'site': 'z', 'layer': 2, 'head': 0, 'position': 5, 'value': 2.3480148315429688}]
    """

    values: Mapping[str, Float[Array, "..."]]
    clean: Float[Array, "..."]
    corrupted: Float[Array, "..."]
    n_rules: int | None = static(default=None)
    signed: bool = static(default=True)

    def rule(self, number: int) -> AttributionResult:
        """What one rule of a family gives.

        Raises:
            ValueError, TypeError: there is no such rule, or no family.

        Examples:
            >>> found = attribution_patching(model, ids, other, metric, "z", rules=rules.grad_drop(model.config))
            >>> found.rule(3).values["z"].shape
            (4, 6, 6)
        """
        if self.n_rules is None:
            raise ValueError("This result is of no family of rules, and has no axis of them.")
        number = integer(number, "number", 0, self.n_rules - 1, note=f": there are {self.n_rules} rules")
        return replace(self, values={name: x[number] for name, x in self.values.items()}, n_rules=None)

    def grad_drop(self) -> AttributionResult:
        """AtP*'s GradDrop, of a result under `oculi_jax.rules.grad_drop`: Σ_l |values_l| / (L − 1) of each pair, then their mean.

        Kramár et al. (2024), arXiv:2403.00745: a direct and an indirect effect that cancel do so in no rule that drops the indirect
        one. Values are magnitudes: `.signed` is False.

        Raises:
            ValueError: this result is of no family, or of one layer.

        Examples:
            >>> found = attribution_patching(model, ids, other, metric, "z", rules=rules.grad_drop(model.config))
            >>> found.grad_drop().values["z"].shape, found.grad_drop().signed
            ((4, 6, 6), False)
        """
        if self.n_rules is None or self.n_rules < 2:
            raise ValueError(
                "grad_drop is of a result under several rules, one for each layer: give attribution_patching "
                "rules=oculi_jax.rules.grad_drop(model.config)."
            )
        pairs = range(jnp.ndim(self.clean))  # their axis, where there are several
        values = {name: jnp.abs(x).sum(0) / (self.n_rules - 1) for name, x in self.values.items()}
        values, clean, corrupted = jax.tree.map(lambda x: x.mean(tuple(pairs)), (values, self.clean, self.corrupted))
        return AttributionResult(values, clean, corrupted, signed=False)

    def top(self, n: int = 10, site: str | None = None, prompt: int | None = None) -> list[dict[str, Any]]:
        """The n entries of largest |value|, largest first. Host function.

        Args:
            n: how many.
            site: one of the sites; None for all of them together.
            prompt: which pair, of several.

        Returns:
            Dicts of `"site"`, then `"layer"`, `"head"`, `"position"` as far as the site has them, of a site in `each` its
            `"neuron"`, `"dimension"` or `"key"`, and `"value"`.

        Raises:
            ValueError, TypeError: a site or a pair that there is not.
        """
        entries = entries_of(self, site, number_of(self, prompt))
        order = np.argsort(-np.abs(entries.values), kind="stable")[: integer(n, "n", 0)]
        return [{**entries.place(i), "value": float(entries.values[i])} for i in order]

    def __repr__(self) -> str:
        def short(x: Any) -> str:
            plain = getattr(x, "shape", None) == () and not isinstance(x, Tracer)
            return f"{float(x):.4g}" if plain else listing(getattr(x, "shape", ()))

        values = ", ".join(f"{site} {listing(getattr(x, 'shape', ()))}" for site, x in self.values.items())
        return f"AttributionResult({values}, clean {short(self.clean)}, corrupted {short(self.corrupted)})"
