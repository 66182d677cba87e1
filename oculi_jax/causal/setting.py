"""What patching is given: two runs, checked, and the family of patches that go from one into the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from ..arrays import AnyArray, listing, on_device
from ..backends import find_model, programs_of
from ..capture import Reading
from ..intervention import ActivationPatch, PerLayer, PerPrompt
from ..intervention.frame import Frame
from ..intervention.protocol import are_interventions, as_list
from ..intervention.rows import Rows
from ..metrics import Metric, check_metric
from ..prompts import check_prompts
from ..sites import Site, find_site, site_of
from .noise import Noise, positions_of

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..intervention.protocol import Interventions
    from ..metrics import MetricLike
    from ..models.decoder.config import DecoderConfig
    from ..models.decoder.model import Decoder

GRIDS = (("layer",), ("layer", "position"), ("layer", "head"), ("layer", "head", "position"), ("position",))


@dataclass(frozen=True)
class Setting:
    """What patching is given, checked and canonical.

    Attributes:
        model: where it runs.
        sites: what is patched.
        by: the axes.
        denoising: whether clean values go into the corrupted runs.
        plain, spoilt: the clean and the corrupted runs.
        target: those that are patched, the clean ones as often as there are samples of noise.
        places: which tokens are patched, as `_patch` takes them.
        samples: how many draws of noise; None where there is none.
        single: whether there is one prompt, so that results have no axis of prompts.
    """

    model: Decoder
    sites: tuple[Site, ...]
    by: tuple[str, ...]
    denoising: bool
    plain: Runs
    spoilt: Runs
    target: Runs
    places: Any
    samples: int | None
    single: bool

    @property
    def source(self) -> Runs:
        """The runs whose values are put into the others."""
        return self.plain if self.denoising else self.spoilt

    def patched(self, site: Site, value: Float[AnyArray, "N ..."]) -> tuple[Any, ...]:
        """What the target runs are under where values of each source run are put in, place by place."""
        n_rows, n_tokens = self.target.tokens.shape
        if 1 < len(value) < n_rows:  # a clean prompt's values serve all samples of its noise
            value = (jnp if on_device(value) else np).repeat(value, n_rows // len(value), axis=0)
        sizes = {**self.model.config.sizes, "T": n_tokens}
        return (*self.target.interventions, _patch(site, self.by, value, self.places, sizes))


def set_up(
    model: Decoder,
    clean: ArrayLike,
    corrupted: ArrayLike | Noise | Interventions,
    metric: MetricLike,
    sites: Sequence[str],
    by: str | Sequence[str],
    direction: str,
    mask: ArrayLike | None,
    mesh: Mesh | None,
    background: tuple[Any, ...] = (),
    positions: ArrayLike | None = None,
    run: bool = True,
) -> Setting:
    """See `patch_sites`; without `run` no noise is drawn, and the model stays where it is."""
    model = find_model(model)
    config = model.config
    if direction not in ("denoising", "noising"):
        raise ValueError(f"direction is {direction!r}, and must be 'denoising' (clean into corrupted) or 'noising'.")
    by = (by,) if isinstance(by, str) else tuple(by)
    where = tuple(check_grid(name, by, config) for name in sites)
    clean, mask, single = check_prompts(config, clean, mask, ("clean", "mask"))
    n_prompts, n_tokens = clean.shape
    metric, _ = check_metric(metric, config.vocab_size, clean, mask)
    model = _over(mesh, model) if run else model
    plain = rows = Runs(clean, mask, background, metric)
    if isinstance(corrupted, Noise):
        samples = int(corrupted.samples)
        noise = corrupted.intervention(model, mask, n_prompts, n_tokens, drawn=run)
        rows = plain.repeated(samples)
        spoilt = replace(rows, interventions=(*background, noise))
    else:
        samples, spoilt = None, _spoilt(model, plain, corrupted, background, single)
    differs = _differs(plain, spoilt) if not isinstance(corrupted, Noise) and not background else None
    places = positions_of(positions, n_prompts, "positions", samples or 1)
    if "position" in by:
        places = np.eye(n_tokens, dtype=bool)
        places = places if differs is None else np.stack([np.diag(row) for row in differs])
    denoising = direction == "denoising"
    target = spoilt if denoising else rows
    return Setting(model, where, by, denoising, plain, spoilt, target, places, samples, single)


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


def check_grid(name: str, by: tuple[str, ...], config: DecoderConfig) -> Site:
    """The site of that name; ValueError where it cannot be patched by these axes, or the model has none of that name."""
    site, layer = find_site(name, config.sites)
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
class Runs:
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

    def repeated(self, n: int) -> Runs:
        """Each row n times."""

        def repeat(x: Any) -> Any:
            return (jnp if isinstance(x, jax.Array) else np).repeat(x, n, axis=0)

        def leaf(x: Any, axis: int | None) -> Any:
            return x if axis is None else repeat(x)

        leaves, tree = jax.tree.flatten(self.metric)
        axes = jax.tree.leaves(_metric_axes(self.metric), is_leaf=lambda x: x is None)
        metric = jax.tree.unflatten(tree, list(map(leaf, leaves, axes)))
        mask = None if self.mask is None else repeat(self.mask)
        return Runs(repeat(self.tokens), mask, self.interventions, metric)

    def observe(self, model: Decoder, readings: tuple[Reading, ...]) -> tuple[Array, dict[str, Array]]:
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


def _spoilt(model: Decoder, plain: Runs, corrupted: Any, background: tuple[Any, ...], single: bool) -> Runs:
    """The corrupted runs that interventions or other tokens make."""
    if are_interventions(corrupted):
        return replace(plain, interventions=(*background, *as_list(corrupted)))
    tokens, _, alone = check_prompts(
        model.config,
        corrupted,
        None if plain.mask is None else np.ones(np.shape(corrupted), bool),
        ("corrupted", "mask"),
    )
    if tokens.shape != plain.tokens.shape or alone != single:
        shapes = [listing(x.shape[int(one) :]) for x, one in ((plain.tokens, single), (tokens, alone))]
        raise ValueError(
            f"clean has shape {shapes[0]} and corrupted {shapes[1]}: the two must be aligned token by token. Choose words of "
            "as many tokens."
        )
    return replace(plain, tokens=tokens)


def _differs(plain: Runs, spoilt: Runs) -> np.ndarray | None:
    """bool `[N, T]`: where two runs of other tokens, and of nothing else, may differ: from the first other token on.

    Before it a patch puts in what is there, so that nothing need run. None where that cannot be told.
    """
    if len(spoilt.interventions) > len(plain.interventions) or isinstance(plain.mask, jax.Array):
        return None
    if isinstance(plain.tokens, jax.Array) or isinstance(spoilt.tokens, jax.Array):
        return None
    other = (plain.tokens != spoilt.tokens) & (True if plain.mask is None else plain.mask)
    return np.cumsum(other, axis=1) > 0 if other.any(axis=1).all() else None


def reading_of(site: Site, n_layers: int) -> Reading:
    """What captures a site in all layers."""
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
    site: Site, by: tuple[str, ...], value: Float[AnyArray, "N ..."], positions: Any, sizes: Mapping[str, int]
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
