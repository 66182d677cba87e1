"""Path patching: what components tell others directly, and what that does to a metric. Two runs, with ordinary edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from ..arrays import listing
from ..pytrees import pytree, static
from ..sweeps.planning import SweepPlan, plans
from .passes import held_sites, plan_paths, run_paths
from .setting import Setting

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..metrics import MetricLike
    from ..models.decoder.model import Decoder


@pytree
class PathEffects:
    """What `path_patching` found. Of several pairs of prompts, every array leads with `B`.

    Attributes:
        patched: the metric of the patched runs: `[]`, or `[N_src]` where each sender was patched alone.
        clean, corrupted: `[]`, the metric of the two runs themselves.
        senders, receivers: their names; static, as is the direction.
        direction: `"noising"` or `"denoising"`.

    Examples:
        >>> found = circuits.path_patching(model, ids, other, metric)
        >>> found, found.senders[found.values.argmin()]
        (PathEffects(29 senders to logits, noising: patched [29]), 'm3')
    """

    patched: Float[Array, "..."]
    clean: Float[Array, "..."]
    corrupted: Float[Array, "..."]
    senders: tuple[str, ...] = static()
    receivers: tuple[str, ...] = static()
    direction: str = static()

    @property
    def values(self) -> Float[Array, "..."]:
        """What patching did: `patched − clean`; denoising, `patched − corrupted`. Float32, shaped as `patched`."""
        base = self.clean if self.direction == "noising" else self.corrupted
        patched, base = self.patched.astype(jnp.float32), base.astype(jnp.float32)
        return patched - base.reshape(*base.shape, *(1,) * (patched.ndim - base.ndim))

    @property
    def heads(self) -> Float[Array, "... L H"]:
        """`values` of the heads, `[L, H]`; ValueError where named senders were patched together.

        Examples:
            >>> circuits.path_patching(model, ids, other, metric).heads.shape
            (4, 6)
        """
        if self.patched.ndim == self.clean.ndim:
            raise ValueError(
                f"The senders {', '.join(self.senders)} were patched together, which is one effect: leave out senders for each "
                "head's own."
            )
        n_layers = sum(name.startswith("m") for name in self.senders)
        return self.values[..., 1:].reshape(*self.clean.shape, n_layers, -1)[..., :-1]

    def __repr__(self) -> str:
        n = len(self.senders)
        who = f"{n} senders" if n > 3 else ", ".join(self.senders)
        to = f"{len(self.receivers)} receivers" if len(self.receivers) > 3 else ", ".join(self.receivers)
        return f"PathEffects({who} to {to}, {self.direction}: patched {listing(getattr(self.patched, 'shape', ()))})"


def path_patching(
    model: Decoder,
    clean: ArrayLike,
    corrupted: ArrayLike,
    metric: MetricLike,
    senders: str | Sequence[str] | None = None,
    receivers: str | Sequence[str] = ("logits",),
    *,
    mlps: Literal["live", "frozen"] = "live",
    norms: Literal["live", "frozen"] = "live",
    direction: Literal["noising", "denoising"] = "noising",
    mask: ArrayLike | None = None,
    corrupted_mask: ArrayLike | None = None,
) -> PathEffects:
    """What becomes of the metric where some components get, by direct paths from others, what those say on another prompt.

    Wang et al. (2022), arXiv:2211.00593, in two runs on the base prompts. In the first, every head's output is held to what it
    is there, but for the senders', which are the source run's; what the receivers then read is kept. In the second, the
    receivers read that, and all else is live. So a path leads from a sender through the residual stream, and through MLPs where
    they are live, but through no head, into a receiver, and from there anywhere but into another receiver: each reads what the
    senders told it, and nothing of what receivers before it made of theirs.

    Args:
        model: a model of any family.
        clean: ids `[T]`, or `[B, T]` for several pairs of prompts.
        corrupted: ids of the same shape, aligned with `clean` token by token.
        metric: one of `oculi_jax.metrics`, or any function of an `Output` to a scalar.
        senders: names of what writes: `input`, heads `a{l}.h{h}`, MLPs `m{l}`; they are patched together. None patches every one
            alone.
        receivers: names of what reads: `a{l}.h{h}<q>`, `<k>`, `<v>`, where keys and values are this query head's alone;
            `a{l}.g{k}<k>`, `<v>` for all query heads that share key/value head k; `m{l}`; or `logits`, by itself.
        mlps: `"live"`: MLPs between work with what they get. `"frozen"`: they write what they do in the base run.
        norms: `"frozen"`: norms between have the base run's scales.
        direction: `"noising"`: the clean run is the base and the corrupted one the source; `"denoising"`: the other way.
        mask: bool, shaped as `clean`, True at real tokens.
        corrupted_mask: the same of `corrupted`; None for `mask`. A token that one prompt of a pair alone has is not patched.

    Returns:
        `PathEffects`, whose `.values` are a number, or `[N_src]`: 0 for senders from which no path leads to a receiver.

    Raises:
        ValueError, TypeError: something that can be seen to be wrong, before anything runs.

    Examples:
        >>> to_queries = circuits.path_patching(model, ids, other, metric, receivers=["a2.h1<k>", "a2.h1<v>"])
        >>> to_queries.heads.shape
        (4, 6)
    """
    setting = Setting.of(model, clean, corrupted, metric, senders, receivers, direction, mask, corrupted_mask)
    return _effects(setting, _held(setting, mlps, norms))


@plans(path_patching)
def _plan_of_paths(
    model: Decoder,
    clean: ArrayLike,
    corrupted: ArrayLike,
    metric: MetricLike,
    senders: str | Sequence[str] | None,
    receivers: str | Sequence[str],
    mlps: str,
    norms: str,
    direction: str,
    mask: ArrayLike | None,
    corrupted_mask: ArrayLike | None,
) -> SweepPlan:
    setting = Setting.of(model, clean, corrupted, metric, senders, receivers, direction, mask, corrupted_mask)
    return plan_paths(setting, _held(setting, mlps, norms))


def total_effect(
    model: Decoder,
    clean: ArrayLike,
    corrupted: ArrayLike,
    metric: MetricLike,
    senders: str | Sequence[str] | None = None,
    *,
    direction: Literal["noising", "denoising"] = "noising",
    mask: ArrayLike | None = None,
    corrupted_mask: ArrayLike | None = None,
) -> PathEffects:
    """What a head, an MLP or the embedding does to the metric by all paths: patched with all else live, each alone or those named.

    Exact effects of all nodes by one call, beside the estimates of `attribution_patching`; arguments are those of `path_patching`.

    Examples:
        >>> nodes = circuits.total_effect(model, ids, other, metric)
        >>> heads = causal.activation_patching(model, ids, other, metric, "z", ("layer", "head"), direction="noising")
        >>> np.allclose(nodes.heads, heads.patched - heads.clean, atol=1e-3)
        True
    """
    setting = Setting.of(model, clean, corrupted, metric, senders, "logits", direction, mask, corrupted_mask)
    return _effects(setting, ())


def direct_effect(
    model: Decoder,
    clean: ArrayLike,
    corrupted: ArrayLike,
    metric: MetricLike,
    senders: str | Sequence[str] | None = None,
    *,
    direction: Literal["noising", "denoising"] = "noising",
    mask: ArrayLike | None = None,
    corrupted_mask: ArrayLike | None = None,
) -> PathEffects:
    """What a head, an MLP or the embedding does to the metric by what it writes, which nothing else reads.

    `path_patching` to the logits past all heads, MLPs and norms, which are frozen; arguments are its. The effects of a metric
    that is linear in the logits add up: of all senders together it is the sum of what each does alone.

    Examples:
        >>> alone, head = (circuits.direct_effect(model, ids, other, metric, name) for name in (None, "a2.h5"))
        >>> np.allclose(alone.heads[2, 5], head.values, atol=1e-3)
        True
    """
    setting = Setting.of(model, clean, corrupted, metric, senders, "logits", direction, mask, corrupted_mask)
    return _effects(setting, _held(setting, "frozen", "frozen"))


def indirect_effect(
    model: Decoder,
    clean: ArrayLike,
    corrupted: ArrayLike,
    metric: MetricLike,
    senders: str | Sequence[str] | None = None,
    *,
    direction: Literal["noising", "denoising"] = "noising",
    mask: ArrayLike | None = None,
    corrupted_mask: ArrayLike | None = None,
) -> PathEffects:
    """What a head, an MLP or the embedding does to the metric by what others make of it: its total effect less the direct one.

    Arguments are those of `path_patching`; `.patched` is what the metric would be under the indirect effect alone.

    Examples:
        >>> kinds = circuits.total_effect, circuits.direct_effect, circuits.indirect_effect
        >>> [f"{kind(model, ids, other, metric, 'a2.h5').values:.2f}" for kind in kinds]
        ['-2.36', '-0.96', '-1.40']
    """
    setting = Setting.of(model, clean, corrupted, metric, senders, "logits", direction, mask, corrupted_mask)
    direct, total = _effects(setting, _held(setting, "frozen", "frozen")), _effects(setting, ())
    return replace(total, patched=total.patched - direct.values)


def _held(setting: Setting, mlps: str, norms: str) -> tuple[str, ...]:
    """The sites that are held to the base run; ValueError for words that say neither."""
    for name, way in (("mlps", mlps), ("norms", norms)):
        if way not in ("live", "frozen"):
            raise ValueError(f"{name} is {way!r}, and must be 'live' or 'frozen'.")
    return held_sites(setting.model.config, mlps == "frozen", norms == "frozen")


def _effects(setting: Setting, held: tuple[str, ...]) -> PathEffects:
    return PathEffects(*run_paths(setting, held), tuple(setting.senders), tuple(setting.receivers), setting.direction)
