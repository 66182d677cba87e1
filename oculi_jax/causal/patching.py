"""`activation_patching`: one run's activations put into another, everywhere that they could go, in one sweep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float

from ..arrays import listing
from ..pytrees import pytree, static
from ..sweeps.planning import SweepPlan, after_runs, plans
from ..sweeps.sweeping import Progress, cost_of, plan_prompts, sweep_prompts
from .noise import Noise
from .setting import reading_of, set_up

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..intervention.protocol import Interventions
    from ..metrics import MetricLike
    from ..models.decoder.model import Decoder

# Two metrics that differ by less than this share of the larger are one to rounding: float32's own, of two programs.
SAME = 1e-5


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
    model: Decoder,
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
        model: a model of any family, or a Hugging Face one.
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
    model: Decoder,
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
    setting = set_up(
        model, clean, corrupted, metric, sites, by, direction, mask, mesh, background=background, positions=positions
    )
    config, target = setting.model.config, setting.target
    readings = tuple(reading_of(site, config.num_hidden_layers) for site in setting.sites)
    of_clean = setting.plain.observe(setting.model, readings if setting.denoising else ())
    of_spoilt = setting.spoilt.observe(setting.model, () if setting.denoising else readings)
    _, captured = of_clean if setting.denoising else of_spoilt
    samples, single = setting.samples, setting.single
    at_clean, at_spoilt = _tidied(of_clean[0], None, single), _tidied(of_spoilt[0], samples, single)
    results = []
    for number, site in enumerate(setting.sites):
        found = sweep_prompts(
            setting.model, target.tokens, target.mask, setting.patched(site, captured[site.name]), target.metric,
            batch_size=batch_size, progress=_part(progress, number, len(setting.sites)), mesh=mesh,
        )  # fmt: skip
        found = _tidied(found, samples, single)
        results.append(PatchingResult(found, at_clean, at_spoilt, site.name, setting.by, direction))
    return results


@plans(activation_patching)
def _plan_of_patching(
    model: Decoder,
    clean: ArrayLike,
    corrupted: ArrayLike | Noise | Interventions,
    metric: MetricLike,
    site: str,
    by: str | Sequence[str],
    direction: str,
    mask: ArrayLike | None,
    batch_size: int | Literal["auto"],
    progress: object,
    mesh: Mesh | None,
) -> SweepPlan:
    setting = set_up(model, clean, corrupted, metric, (site,), by, direction, mask, mesh, run=False)
    model, target, (where,) = setting.model, setting.target, setting.sites
    n_source, n_tokens = setting.source.tokens.shape
    reading = reading_of(where, model.config.num_hidden_layers)
    shape = reading.shape(model.config, n_tokens)
    # Zeros for what would be captured, with axes of one where they do.
    nothing = np.zeros((n_source, *shape[: int(where.layered)], *(1,) * len(where.axes)), np.float32)
    n_values = n_source if n_source in (1, len(target.tokens)) else n_source + len(target.tokens)
    itemsize = model.dtype.itemsize if where.dtype == "model" else np.dtype(where.dtype).itemsize
    kept = n_values * math.prod(shape) * itemsize
    swept = plan_prompts(
        model, target.tokens, target.mask, setting.patched(where, nothing), target.metric,
        batch_size=batch_size, mesh=mesh, held=kept,
    )  # fmt: skip
    n_bare = len(setting.plain.tokens) + len(setting.spoilt.tokens) - n_source
    return after_runs(swept, cost_of(model, n_tokens, n_source, target.metric), n_bare, n_source, kept)


def _part(progress: Any, number: int, of: int) -> Any:
    """The progress of one of several sweeps of a size, as a part of the whole."""
    return (lambda done, n: progress(number * n + done, of * n)) if callable(progress) else progress


@partial(jax.jit, static_argnums=(1, 2), inline=True)
def _tidied(x: Array, samples: int | None, single: bool) -> Array:
    """Means over samples where there are any, and no axis of prompts for a single one."""
    if samples is not None:
        x = jnp.mean(x.reshape(-1, samples, *x.shape[1:]).astype(jnp.float32), axis=1)
    return x[0] if single else x
