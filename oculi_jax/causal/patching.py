"""`activation_patching`: one run's activations put into another, everywhere that they could go, in one sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from ..arrays import listing
from ..backends import find_model, programs_of
from ..capture import Reading
from ..intervention import ActivationPatch, PerLayer, PerPrompt
from ..intervention.frame import Frame
from ..intervention.protocol import are_interventions, as_list
from ..intervention.rows import Rows
from ..metrics import Metric, check_metric
from ..prompts import check_prompts
from ..pytrees import pytree, static
from ..sites import Site, find_site, site_of
from ..sweeps.sweeping import Progress, sweep_prompts
from .noise import Noise, positions_of

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..intervention.protocol import Interventions
    from ..metrics import MetricLike
    from ..models.llama.config import LlamaConfig
    from ..models.llama.model import Llama

# Two metrics that differ by less than this share of the larger are one to rounding: float32's own, of two programs.
SAME = 1e-5

GRIDS = (("layer",), ("layer", "position"), ("layer", "head"), ("layer", "head", "position"), ("position",))


@pytree
class PatchingResult:
    """What `activation_patching` found. Of several prompts, every array leads with `B`.

    Attributes:
        patched: `[*by]`, the metric of the patched runs.
        clean, corrupted: `[]`, the metric of the two runs themselves.
        site: which activation; static, as are the two below.
        by: what the axes of `patched` are.
        direction: `"denoising"` or `"noising"`.

    Examples:
        >>> found = activation_patching(model, ids, other, metric, by=("layer", "position"))
        >>> found, found.recovery.shape
        (PatchingResult(resid_pre by layer, position, denoising: patched [4, 6]), (4, 6))
    """

    patched: Float[Array, "..."]
    clean: Float[Array, "..."]
    corrupted: Float[Array, "..."]
    site: str = static()
    by: tuple[str, ...] = static()
    direction: str = static()

    @property
    def recovery(self) -> Float[Array, "..."]:
        """`(patched − corrupted) / (clean − corrupted)`, shaped as `patched`: 1 as the clean run, 0 as the corrupted one.

        In both directions: what matters is near 1 in denoising and near 0 in noising. NaN where the two runs have the same
        metric to rounding (1e-5 of the larger), since there is nothing to recover. Of several prompts, each by itself: for a
        set in which some pairs hardly differ, put the means of the three metrics into the formula instead.
        """
        return recovery(self.patched, self.clean, self.corrupted)

    def __repr__(self) -> str:
        shape = listing(getattr(self.patched, "shape", ()))
        return f"PatchingResult({self.site} by {', '.join(self.by)}, {self.direction}: patched {shape})"


def recovery(patched: Array, clean: Array, corrupted: Array) -> Float[Array, "..."]:
    """See `PatchingResult.recovery`; `clean` and `corrupted` have the leading axes of `patched`."""
    with jax.debug_nans(False):  # its NaN is an answer
        return _recovery(patched, clean, corrupted)


@partial(jax.jit, inline=True)
def _recovery(patched: Array, clean: Array, corrupted: Array) -> Float[Array, "..."]:
    patched, clean, corrupted = (x.astype(jnp.float32) for x in (patched, clean, corrupted))
    clean, corrupted = (x.reshape(*x.shape, *(1,) * (patched.ndim - x.ndim)) for x in (clean, corrupted))
    gap = clean - corrupted
    same = jnp.abs(gap) <= SAME * jnp.maximum(jnp.abs(clean), jnp.abs(corrupted))
    return jnp.where(same, jnp.nan, (patched - corrupted) / jnp.where(same, 1.0, gap))


def activation_patching(
    model: Llama,
    clean: ArrayLike,
    corrupted: ArrayLike | Noise | Interventions,
    metric: Callable[..., Any],
    site: str = "resid_pre",
    by: str | Sequence[str] = ("layer", "position"),
    *,
    direction: Literal["denoising", "noising"] = "denoising",
    mask: ArrayLike | None = None,
    batch_size: int | Literal["auto"] = "auto",
    progress: Progress | bool | None = None,
    mesh: Mesh | None = None,
) -> PatchingResult:
    """Puts one run's activation into another run, place by place, and measures what that does to the output.

    Two runs differ in what is under study alone: who gives the drink, say, or what the subject is. *Denoising*, the default,
    puts clean values into the corrupted run: a place that brings the clean answer back carries enough of what the clean
    prompt says (it is sufficient there). *Noising* puts corrupted values into the clean run: a place that breaks the answer
    was needed. The two are not each other's mirror: of two places that each do the whole work, either one denoises, and
    noising neither does anything (Heimersheim and Nanda 2024, arXiv:2404.15255). Metrics and corruptions are compared by Zhang
    and Nanda (2024), arXiv:2309.16042; the method is Vig et al.'s (2020), arXiv:2004.12265, and Meng et al.'s (2022),
    arXiv:2202.05262. (These restore ten layers of `mlp_out` or `attn_out` at a time; here a place is one layer.)

    The source's activations are captured once and shared by all places. Works under `jit`, `vmap` and `grad`, as `sweep` does.

    Args:
        model: a `Llama`.
        clean: ids `[T]`, or `[B, T]` for several pairs of prompts.
        corrupted: ids of the same shape, aligned with `clean` token by token. Or a `Noise`, an intervention or a list of
            them: then the corrupted run is the clean prompt under these; a patch comes after them.
        metric: one of `oculi_jax.metrics`, or any function of an `Output` to a scalar; higher is cleaner or not, as you like.
        site: a name of the site table, or the guide's.
        by: the axes: `("layer",)`, `("layer", "position")`, `("layer", "head")` or `("layer", "head", "position")`; for a site
            outside the layers `("position",)`. An axis left out is patched whole. A head counts the site's own (`K` for k and
            v); a position is a place in the token array, a query's for scores and patterns.
        direction: `"denoising"` or `"noising"`.
        mask: bool, shaped as `clean`, True at real tokens, for both runs. Padding is never patched.
        batch_size, progress, mesh: as in `sweep`.

    Returns:
        A `PatchingResult`, whose `patched` is `[*by]`, or `[B, *by]`.

    Raises:
        ValueError, TypeError: something that can be seen to be wrong.

    Examples:
        >>> found = activation_patching(model, ids, other, metric, by=("layer", "position"))
        >>> [f"{x:.2f}" for x in found.recovery[:, 4]]  # what Italy for France brings back, layer by layer
        ['1.00', '1.00', '0.94', '0.31']
    """
    return patch_sites(
        model, clean, corrupted, metric, (site,), by, direction=direction, mask=mask,
        batch_size=batch_size, progress=progress, mesh=mesh,
    )[0]  # fmt: skip


def patch_sites(
    model: Llama,
    clean: ArrayLike,
    corrupted: ArrayLike | Noise | Interventions,
    metric: MetricLike,
    sites: Sequence[str],
    by: str | Sequence[str],
    *,
    direction: str = "denoising",
    mask: ArrayLike | None = None,
    batch_size: int | Literal["auto"] = "auto",
    progress: Progress | bool | None = None,
    mesh: Mesh | None = None,
    background: tuple[Any, ...] = (),
    positions: ArrayLike | None = None,
) -> list[PatchingResult]:
    """`activation_patching` at several sites, whose two runs are the same.

    Args:
        background: interventions that both runs are under.
        positions: which tokens are patched, where `by` has no positions; None for all.
    """
    model = find_model(model)
    config = model.config
    if direction not in ("denoising", "noising"):
        raise ValueError(f"direction is {direction!r}, and must be 'denoising' (clean into corrupted) or 'noising'.")
    by = (by,) if isinstance(by, str) else tuple(by)
    where = [check_grid(name, by, config) for name in sites]
    clean, mask, single = check_prompts(config, clean, mask)
    n_prompts, n_tokens = clean.shape
    metric, _ = check_metric(metric, config.vocab_size, clean, mask)
    model = _over(mesh, model)
    plain = _Runs(clean, mask, background, metric)
    if isinstance(corrupted, Noise):
        samples = int(corrupted.samples)
        rows = plain.repeated(samples)
        noise = corrupted.intervention(model, mask, n_prompts, n_tokens)
        spoilt = replace(rows, interventions=(*background, noise))
    else:
        samples, rows = None, plain
        spoilt = _spoilt(model, plain, corrupted, background, single)

    readings = tuple(_reading(site, config.num_hidden_layers) for site in where)
    of_clean = plain.observe(model, readings if direction == "denoising" else ())
    of_spoilt = spoilt.observe(model, readings if direction == "noising" else ())
    target, (_, captured) = (spoilt, of_clean) if direction == "denoising" else (rows, of_spoilt)
    at_clean, at_spoilt = _tidied(of_clean[0], None, single), _tidied(of_spoilt[0], samples, single)

    differs = _differs(plain, spoilt) if not isinstance(corrupted, Noise) and not background else None
    places = positions_of(positions, n_prompts, "positions", samples or 1)
    if "position" in by:
        places = np.eye(n_tokens, dtype=bool)
        places = places if differs is None else np.stack([np.diag(row) for row in differs])
    results = []
    for number, site in enumerate(where):
        value = captured[site.name]
        if len(value) > 1:  # a clean prompt's values serve all samples of its noise
            value = jnp.repeat(value, len(target.tokens) // len(value), axis=0)
        patch = _patch(site, by, value, places, {**config.sizes, "T": n_tokens})
        found = sweep_prompts(
            model, target.tokens, target.mask, (*target.interventions, patch), target.metric,
            batch_size=batch_size, progress=_part(progress, number, len(where)), mesh=mesh,
        )  # fmt: skip
        results.append(PatchingResult(_tidied(found, samples, single), at_clean, at_spoilt, site.name, by, direction))
    return results


def _over(mesh: Mesh | None, model: Any) -> Any:
    """The model on every device of a mesh, where it lies on one alone."""
    if mesh is not None and not isinstance(mesh, Mesh):
        raise TypeError(
            f"mesh is a {type(mesh).__name__}, and a jax.sharding.Mesh of devices is needed: jax.make_mesh(…)."
        )
    if mesh is None or not programs_of(model).traceable:
        return model
    table = model.embed[...]
    if isinstance(table, Tracer) or isinstance(table.sharding, NamedSharding):
        return model
    return jax.device_put(model, NamedSharding(mesh, PartitionSpec()))


def check_grid(name: str, by: tuple[str, ...], config: LlamaConfig) -> Site:
    """The site of that name; ValueError where it cannot be patched by these axes, or the model has none of that name."""
    site, layer = find_site(name)
    site_of(site.name, config.sites)
    if layer is not None:
        raise ValueError(f"The site {name!r} names layer {layer}, and every layer is patched: give {site.name!r}.")
    if site.name == "allowed":
        raise ValueError(
            "Both runs have the same 'allowed', so patching it shows nothing. AttentionKnockout forbids edges."
        )
    if "neuron" in by:
        raise ValueError("Patching by 'neuron' is not supported; sweep Edits at 'act' with masks of single neurons.")
    if by not in GRIDS:
        raise ValueError(f"by is {by!r}, and must be one of {', '.join(map(str, GRIDS))}.")
    if not site.layered and by != ("position",):
        raise ValueError(f"The site {site.name!r} occurs once, outside the layers: patch it by ('position',).")
    if site.layered and by == ("position",):
        raise ValueError(f"The site {site.name!r} is in every layer: patch it by ('layer', 'position').")
    if "head" in by and site.head_axis is None:
        have = ", ".join(name for name, row in config.sites.items() if row.head_axis is not None)
        raise ValueError(f"The site {site.name!r} has no heads: it is {site.shape}. Those with heads are {have}.")
    return site


@dataclass(frozen=True)
class _Runs:
    """Runs side by side, one a row.

    Attributes:
        tokens: `[N, T]`.
        mask: `[N, T]` or None.
        interventions: of all rows; what rows have of their own is in each a `PerPrompt`.
        metric: whose targets, where it has them for each row, lead with `N`.
    """

    tokens: Any
    mask: Any
    interventions: tuple[Any, ...]
    metric: Any

    def repeated(self, n: int) -> _Runs:
        """Each row n times."""

        def repeat(x: Any) -> Any:
            return (jnp if isinstance(x, jax.Array) else np).repeat(x, n, axis=0)

        def leaf(x: Any, axis: int | None) -> Any:
            return x if axis is None else repeat(x)

        leaves, tree = jax.tree.flatten(self.metric)
        axes = jax.tree.leaves(_metric_axes(self.metric), is_leaf=lambda x: x is None)
        metric = jax.tree.unflatten(tree, list(map(leaf, leaves, axes)))
        mask = None if self.mask is None else repeat(self.mask)
        return _Runs(repeat(self.tokens), mask, self.interventions, metric)

    def observe(self, model: Llama, readings: tuple[Reading, ...]) -> tuple[Array, dict[str, Array]]:
        """The metric `[N]`, and site → what it captures, leading with the rows."""
        masks = [None] * len(self.tokens) if self.mask is None else self.mask
        frames = [Frame(model.config, model.dtype, self.tokens.shape[1], row) for row in masks]
        rows, axes = Rows.of(self.interventions, frames)
        if axes:
            raise ValueError(
                f"The interventions of the corrupted run have axes {listing(axes)}, and it is one run: use scalars."
            )
        leads = tuple(axis == 0 for axis in jax.tree.leaves(_metric_axes(self.metric), is_leaf=lambda x: x is None))
        seen = programs_of(model).run_variants(
            model, self.tokens, self.mask, rows, metric=self.metric, metric_by_prompt=leads, readings=readings
        )
        values, found = jax.tree.map(lambda x: x.reshape(len(x), *x.shape[2:]), (seen.value, dict(seen.activations)))
        return check_number(values), found


def _spoilt(model: Llama, plain: _Runs, corrupted: Any, background: tuple[Any, ...], single: bool) -> _Runs:
    """The corrupted runs that interventions or other tokens make."""
    if are_interventions(corrupted):
        return replace(plain, interventions=(*background, *as_list(corrupted)))
    tokens, _, alone = check_prompts(
        model.config, corrupted, None if plain.mask is None else np.ones(np.shape(corrupted), bool)
    )
    if tokens.shape != plain.tokens.shape or alone != single:
        shapes = [listing(x.shape[int(one) :]) for x, one in ((plain.tokens, single), (tokens, alone))]
        raise ValueError(
            f"clean has shape {shapes[0]} and corrupted {shapes[1]}: the two must be aligned token by token. Choose words of "
            "as many tokens."
        )
    return replace(plain, tokens=tokens)


def _differs(plain: _Runs, spoilt: _Runs) -> np.ndarray | None:
    """bool `[N, T]`: where two runs of other tokens, and of nothing else, may differ: from the first other token on.

    Before it a patch puts in what is there, so that nothing need run. None where that cannot be told.
    """
    if len(spoilt.interventions) > len(plain.interventions) or isinstance(plain.mask, jax.Array):
        return None
    if isinstance(plain.tokens, jax.Array) or isinstance(spoilt.tokens, jax.Array):
        return None
    other = (plain.tokens != spoilt.tokens) & (True if plain.mask is None else plain.mask)
    return np.cumsum(other, axis=1) > 0 if other.any(axis=1).all() else None


def _reading(site: Site, n_layers: int) -> Reading:
    return Reading(site, tuple(range(n_layers)) if site.layered else (), None, None)


def _metric_axes(metric: Any) -> Any:
    return metric.per_prompt() if isinstance(metric, Metric) else jax.tree.map(lambda _: None, metric)


def check_number(values: object) -> Array:
    """A metric's values `[N]`, one number for each row; ValueError for anything else."""
    if not isinstance(values, jax.Array) or values.ndim != 1:
        got = ", ".join(listing(x.shape[1:]) for x in jax.tree.leaves(values)) or "nothing"
        raise ValueError(f"Patching needs a metric that returns one number, an array of shape []; this returns {got}.")
    return values


def _patch(
    site: Site, by: tuple[str, ...], value: Float[Array, "N ..."], positions: Any, sizes: Mapping[str, int]
) -> ActivationPatch:
    """The family of patches whose axes are `by`.

    Args:
        value: of each prompt.
        positions: as the field takes them; bool `[T, T]`, or `[N, T, T]` for each prompt, where `by` has positions.
    """

    def along(name: str, x: Any, own: int = 0) -> Any:
        """`x` with the last axis before `own` of its own where `by` has `name`."""
        if name not in by:
            return None
        lead = [1 if other != name else x.shape[-1 - own] for other in by]
        return x.reshape(*x.shape[: -1 - own], *lead, *x.shape[x.ndim - own :])

    n_heads = 0 if site.head_axis is None else sizes[site.head_axis]
    if "position" in by:
        apart, positions = positions.ndim == 3, along("position", positions, 1)
        positions = PerPrompt(positions) if apart else positions
    given: Any = PerLayer(value) if site.layered else value
    given = PerPrompt(given) if len(value) > 1 else jax.tree.map(lambda x: x[0], given)
    return ActivationPatch(
        site.name, along("layer", np.arange(sizes["L"])), given, along("head", np.arange(n_heads)), positions
    )


def _part(progress: Any, number: int, of: int) -> Any:
    """The progress of one of several sweeps of a size, as a part of the whole."""
    return (lambda done, n: progress(number * n + done, of * n)) if callable(progress) else progress


@partial(jax.jit, static_argnums=(1, 2), inline=True)
def _tidied(x: Array, samples: int | None, single: bool) -> Array:
    """Means over samples where there are any, and no axis of prompts for a single one."""
    if samples is not None:
        x = jnp.mean(x.reshape(-1, samples, *x.shape[1:]).astype(jnp.float32), axis=1)
    return x[0] if single else x
