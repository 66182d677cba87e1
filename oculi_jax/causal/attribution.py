"""`attribution_patching`: what every activation patch would do to a metric, to first order, from one reverse pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Bool, Float, Int

from ..arrays import AnyArray, integer, listing
from ..backends import check_model
from ..backends.jax.compiled import compiled
from ..backends.jax.programs import measure, run
from ..capture import Reading, readings_of
from ..intervention.each import PerLayer
from ..intervention.edit import Edit
from ..metrics import check_metric, of_prompt
from ..prompts import check_prompts
from ..pytrees import pytree
from ..sites import SITES, Site, find_site
from .verification import entries_of, number_of

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..metrics import MetricLike
    from ..models.llama.model import Llama

# How much of a backward pass is kept at once: prompts beyond it run in turn, one prompt beyond it recomputes its layers.
_KEPT_BYTES = 1 << 30


def attribution_patching(
    model: Llama,
    clean: ArrayLike,
    corrupted: ArrayLike,
    metric: MetricLike,
    sites: str | Sequence[str] = ("z",),
    *,
    mask: ArrayLike | None = None,
) -> AttributionResult:
    """Estimates what patching each clean activation into the corrupted run would do to the metric, all at once.

    `Σ (clean − corrupted) · ∂ metric / ∂ site`, the gradient on the corrupted run, summed over the site's last axis: the
    first-order term of `activation_patching`'s `patched − corrupted` (Nanda 2023, neelnanda.io/attribution-patching; Syed,
    Rager and Conmy 2023, arXiv:2310.10348). Two forward passes side by side and one backward pass, whatever the number of
    sites; no parameter's gradient is computed. The gradient is with respect to zeros that are added to every site.

    The metric is not linear in the sites. The estimate is poor for large changes (a whole residual stream early on), for
    queries and keys where attention is saturated, so that the softmax has no gradient, and where direct and indirect effects
    cancel (Kramár et al. 2024, arXiv:2403.00745). `verify` measures how poor.

    Args:
        model: a `Llama`.
        clean, corrupted: ids `[T]`, or `[B, T]` for several pairs of prompts: of one shape, aligned token by token.
        metric: one of `oculi_jax.metrics`, or any function of an `Output` (with all logits `[T, V]`, no activations) to a
            floating-point scalar. A metric's ids are data; a function is a part of the program.
        sites: names of the site table, all but `allowed`, or what the guide or TransformerLens calls them; static.
        mask: bool, shaped as `clean`, True at real tokens, of both prompts of a pair. Padding is 0 in the result.

    Returns:
        An `AttributionResult`: `.values["z"]` `[L, H, T]`, `[B, L, H, T]` for several pairs.

    Raises:
        ValueError, TypeError: something that can be seen to be wrong, before anything runs; a metric without a gradient.

    Examples:
        >>> attribution_patching(model, ids, other, metric, "z").values["z"].shape
        (4, 6, 6)
    """
    config = check_model(model)
    clean, real, single = check_prompts(config, clean, mask)
    corrupted, _, other = check_prompts(config, corrupted, None)
    if (single, clean.shape) != (other, corrupted.shape):
        shapes = (listing(x.shape[alone:]) for x, alone in ((clean, single), (corrupted, other)))
        raise ValueError(
            "clean has shape {}, and corrupted {}: a patch goes from each token to the one in its place, so they must have one "
            "shape. Choose prompts of as many tokens.".format(*shapes)
        )
    readings = _readings(sites, config)
    metric, _ = check_metric(metric, config.vocab_size, clean, real)
    at_once, remat = _schedule(model, *clean.shape)
    found = AttributionResult(
        *_attribute(
            model, clean, corrupted, real, metric=metric, readings=readings, single=single, at_once=at_once, remat=remat
        )
    )
    return found


@pytree
class AttributionResult:
    """What `attribution_patching` returns. An entry is what one patch would replace: all of the site's last axis.

    A pytree of its three arrays. `verify` measures how poor the estimates are.

    Attributes:
        values: site → float32, the site's axes less the last, after `L` for a site of the layers: `[L, H, T]` for `z`,
            `[L, T]` for `resid_pre`, `[T]` for `embed`, `[L]` for `attn_scale` (all tokens' scales together). `[B, …]` for
            several pairs. The axis `T` is that of the token array; `T` of `pattern` and `scores` is the query.
        clean, corrupted: the metric of the two runs, float32 `[]` or `[B]`.

    Examples:
        >>> attribution_patching(model, ids, other, metric, "z").top(1)
        [{'site': 'z', 'layer': 2, 'head': 0, 'position': 5, 'value': 2.3480148315429688}]
    """

    values: Mapping[str, Float[Array, "..."]]
    clean: Float[Array, "..."]
    corrupted: Float[Array, "..."]

    def top(self, n: int = 10, site: str | None = None, prompt: int | None = None) -> list[dict[str, Any]]:
        """The n entries of largest |value|, largest first. Host function.

        Args:
            n: how many.
            site: one of the sites; None for all of them together.
            prompt: which pair, of several.

        Returns:
            Dicts of `"site"`, then `"layer"`, `"head"`, `"position"` as far as the site has them, and `"value"`.

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


def _readings(sites: Any, config: Any) -> tuple[Reading, ...]:
    sites = (sites,) if isinstance(sites, str) else sites
    if not isinstance(sites, list | tuple) or not all(isinstance(name, str) for name in sites):
        raise TypeError(f"sites is {sites!r}, and a site name or a tuple of those is needed.")
    if not sites:
        raise ValueError("sites is empty; name at least one, such as 'z'.")
    found = [find_site(name) for name in sites]
    for name, (site, layer) in zip(sites, found, strict=True):
        if layer is not None:
            raise ValueError(
                f"The site {name!r} names layer {layer}, and every layer is attributed: give {site.name!r}."
            )
        if site.dtype == "bool":
            raise ValueError(
                f"{site.name!r} is a table of yes and no, and has no gradient; 'scores' and 'pattern' have."
            )
    return readings_of(tuple(site.name for site, _ in found), config, 1)


@compiled("readings", "single", "at_once", "remat")
def _attribute(
    model: Llama,
    clean: Int[AnyArray, "B T"],
    corrupted: Int[AnyArray, "B T"],
    mask: Bool[AnyArray, "B T"] | None,
    metric: Any,
    readings: tuple[Reading, ...],
    single: bool,
    at_once: int,
    remat: bool,
) -> tuple[dict[str, Array], Float[Array, "*B"], Float[Array, "*B"]]:
    """The values of each site and the metric of both runs, each leading with the pairs of prompts unless there is a single one.

    Args:
        at_once: how many pairs run side by side.
        remat: whether layers are run again in the backward pass.
    """
    config = model.config
    n_prompts, n_tokens = clean.shape
    wanted = readings
    if not any(reading.site.name == "final_norm" for reading in readings):
        wanted = (*readings, Reading(SITES["final_norm"], (), None, None))

    def one(number: Int[Array, ""]) -> tuple[dict[str, Array], Array, Array]:
        pair = jnp.stack([clean[number], corrupted[number]])
        real = None if mask is None else mask[number]
        own = of_prompt(metric, number)
        zeros = {reading.site.name: jnp.zeros(reading.shape(config, n_tokens)) for reading in readings}

        def measured(added: dict[str, Array], tokens: Array) -> tuple[Array, dict[str, Array]]:
            edits = tuple(
                Edit(name, "add", None, True, PerLayer(value) if SITES[name].layered else value)
                for name, value in added.items()
            )
            found = run(model, tokens, real, edits, wanted, remat=remat).activations
            value = measure(model, found["final_norm"], real, own)
            _check_scalar(value)
            return value, {name: found[name].astype(jnp.float32) for name in zeros}

        # Side by side, so that each weight is read once for both; what the pull-back keeps of the clean run is dropped.
        values, pull, sites = jax.vmap(lambda tokens: jax.vjp(lambda z: measured(z, tokens), zeros, has_aux=True))(pair)
        (gradient,) = jax.tree.map(lambda x: x[1], pull)(jnp.ones((), values.dtype))
        # Up to the first token that differs the two runs are one, to the bit: not so in rows side by side.
        differs = jnp.cumsum((pair[0] != pair[1]) & (True if real is None else real)) > 0

        def attributed(site: Site) -> Array:
            shape = (-1, *(1,) * (len(site.axes) - 1 - site.axes.index("T")))
            both, slope = sites[site.name], gradient[site.name]
            # Where there is no gradient there is no effect, whatever stands there: not so for ∞ · 0.
            counts = jnp.broadcast_to(differs.reshape(shape), slope.shape) & (slope != 0)
            found = jnp.sum(jnp.where(counts, (both[0] - both[1]) * slope, 0.0), axis=-1)
            return jnp.where(jnp.isnan(values[1]), jnp.nan, found)  # of a metric that has no value here

        return {r.site.name: attributed(r.site) for r in readings}, *values.astype(jnp.float32)

    numbers = jnp.arange(n_prompts)
    found = jax.vmap(one)(numbers) if n_prompts == at_once else jax.lax.map(one, numbers, batch_size=at_once)
    return jax.tree.map(lambda x: x[0], found) if single else found


def _schedule(model: Llama, n_prompts: int, n_tokens: int) -> tuple[int, bool]:
    """How many pairs run at once, and whether each layer is run again in the backward pass rather than kept."""
    sizes = model.config.sizes
    per_token = 12 * sizes["E"] + 6 * sizes["F"] + 6 * sizes["H"] * n_tokens
    kept = 2 * sizes["L"] * n_tokens * per_token * model.dtype.itemsize
    return min(n_prompts, max(1, _KEPT_BYTES // kept)), kept > _KEPT_BYTES


def _check_scalar(value: Any) -> None:
    leaves = jax.tree.leaves(value)
    if len(leaves) == 1 and leaves[0] is value and value.shape == () and jnp.issubdtype(value.dtype, jnp.floating):
        return
    what = ", ".join(f"{x.dtype} {listing(x.shape)}" for x in map(jnp.asarray, leaves))
    raise TypeError(
        f"The metric gives {what or 'nothing'}, and attribution needs one floating-point number, which has a gradient."
    )
