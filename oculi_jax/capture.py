"""`CaptureSpec`: which sites a run returns, and the readings that a program is compiled for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from .arrays import AnyArray, full_name, integers
from .sites import Site, site_of

if TYPE_CHECKING:
    from .models.decoder.config import DecoderConfig


@dataclass(frozen=True)
class CaptureSpec:
    """Which values of a run to return; static.

    Args:
        sites: a site name, or several.
        layers: which layers, in the order wanted; None for all.
        positions: which token positions (query positions of `[H, T, S]` sites), counting real tokens, negative ones from
            the last; None for all.
        dtype: what to store them as; None for what the pass used.

    Raises:
        ValueError, TypeError: when it is run, sites, layers, positions or a dtype that cannot be.

    Examples:
        >>> forward(model, ids, capture=CaptureSpec("pattern", layers=[1, 3], positions=[-1]))["pattern"].shape
        (2, 6, 1, 6)
    """

    sites: str | Sequence[str]
    layers: Sequence[int] | None = None
    positions: Sequence[int] | None = None
    dtype: DTypeLike | None = None


# What `capture` arguments take.
CaptureLike: TypeAlias = str | CaptureSpec | Sequence[str | CaptureSpec]


@dataclass(frozen=True)
class Reading:
    """One site that a program reads, hashable: `layers` are true layer numbers, empty for a site outside the layers."""

    site: Site
    layers: tuple[int, ...]
    positions: tuple[int, ...] | None
    dtype: str | None

    @property
    def token_axes(self) -> tuple[int, ...]:
        """The axes of the capture that are as long as the prompt."""
        lettered = enumerate(self.site.axes, start=int(self.site.layered))
        return tuple(i for i, letter in lettered if letter == "S" or (letter == "T" and self.positions is None))

    def shape(self, config: DecoderConfig, n_tokens: int, n_keys: int | None = None) -> tuple[int, ...]:
        """The shape of the capture of a run of `n_tokens` that look at `n_keys`; None for as many."""
        sizes = {**config.sizes, "T": n_tokens, "S": n_tokens if n_keys is None else n_keys}
        inner = [sizes[letter] for letter in self.site.axes]
        if self.positions is not None:
            inner[self.site.axes.index("T")] = len(self.positions)
        return (*((len(self.layers),) if self.site.layered else ()), *inner)


def at_positions(value: Array, axis: int, positions: tuple[int, ...], mask: AnyArray | None) -> Array:
    """Entries of a token axis at the given ranks among the real tokens, negative ones from the last.

    Args:
        value: any array with a token axis.
        axis: which one that is.
        positions: the ranks.
        mask: bool `[T]`, True at real tokens; None where all are.

    Returns:
        `value` with `len(positions)` entries on that axis; where there is no such token, NaN (False for bools, −1 for integers).
    """
    if mask is None:
        return jnp.take(value, np.array(positions) % value.shape[axis], axis=axis)
    return _at_ranks(value, axis, jnp.asarray(positions), mask)


@partial(jax.jit, static_argnums=1, inline=True)
def _at_ranks(value: Array, axis: int, wanted: Array, mask: AnyArray) -> Array:
    slots, found = _slots_of(wanted, mask)
    found = found.reshape(-1, *(1,) * (value.ndim - axis - 1))
    integers = jnp.issubdtype(value.dtype, jnp.integer)
    missing = False if value.dtype == bool else -1 if integers else jnp.nan
    taken = jnp.take(value, slots, axis=axis)
    return jnp.where(jnp.broadcast_to(jnp.expand_dims(found, tuple(range(axis))), taken.shape), taken, missing)


def slots_at(positions: tuple[int, ...], mask: AnyArray | None, n_tokens: int) -> tuple[Array, Array]:
    """Where the tokens of some ranks among the real ones lie, `[P]`, and whether there is such a token, bool `[P]`."""
    if mask is None:
        return jnp.asarray(np.array(positions) % n_tokens), jnp.ones(len(positions), bool)
    return _slots_of(jnp.asarray(positions), mask)


def _slots_of(wanted: Array, mask: AnyArray) -> tuple[Array, Array]:
    rank = jnp.cumsum(mask) - 1
    wanted = jnp.where(wanted < 0, wanted + rank[-1] + 1, wanted)
    match = (rank[None, :] == wanted[:, None]) & mask[None, :]
    return match.argmax(axis=1), match.any(axis=1)


def float_dtype(dtype: DTypeLike, what: str) -> str:
    """The name of a floating-point dtype given as a string or dtype."""
    try:
        name = jnp.dtype(full_name(dtype)).name
    except TypeError:
        raise ValueError(f"{what} is {dtype!r}, which is not a dtype.") from None
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"{what} is {name}; it can be a floating-point dtype: float32, bfloat16 or float16.")
    return name


def check_layers(layers: Sequence[int] | None, config: DecoderConfig, what: str = "layers") -> tuple[int, ...]:
    """The layers asked for as a tuple, all of them for None; ValueError for ones the model does not have."""
    n_layers = config.num_hidden_layers
    if layers is None:
        return tuple(range(n_layers))
    chosen = integers(layers, what)
    wrong = [layer for layer in chosen if not 0 <= layer < n_layers]
    if wrong:
        raise ValueError(f"{what} holds {wrong}, but this model has {n_layers} layers: 0 to {n_layers - 1}.")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"{what} names a layer twice: {list(chosen)}.")
    if not chosen:
        raise ValueError(f"{what} is empty; leave it out for all layers.")
    return chosen


def readings_of(capture: CaptureLike, config: DecoderConfig, n_real: int) -> tuple[Reading, ...]:
    """What `forward`'s `capture` argument asks for, checked and in canonical form.

    Args:
        capture: a site name, a `CaptureSpec`, or a list or tuple of those.
        config: the model's config.
        n_real: how many real tokens the prompt has, which positions are checked against.
    """
    if isinstance(capture, str | CaptureSpec):
        capture = (capture,)
    if not isinstance(capture, list | tuple):
        raise TypeError(f"capture is {capture!r}; give site names, a CaptureSpec, or a tuple of those.")
    readings: dict[str, Reading] = {}
    problems: list[str] = []
    for spec in capture:
        spec = CaptureSpec(spec) if isinstance(spec, str) else spec
        if not isinstance(spec, CaptureSpec):
            raise TypeError(f"capture holds {spec!r}; give site names, a CaptureSpec, or a tuple of those.")
        positions = None if spec.positions is None else integers(spec.positions, "CaptureSpec.positions")
        if positions is not None and not all(-n_real <= p < n_real for p in positions):
            problems.append(
                f"CaptureSpec.positions is {list(positions)}, but the prompt has {n_real} tokens: positions are 0 to "
                f"{n_real - 1}, or −1 to −{n_real} from the end."
            )
        if positions == ():
            problems.append("CaptureSpec.positions is empty; leave it out for all positions.")
        dtype = None
        try:
            dtype = None if spec.dtype is None else float_dtype(spec.dtype, "CaptureSpec.dtype")
        except ValueError as error:
            problems.append(str(error))
        try:
            layers = check_layers(spec.layers, config, "CaptureSpec.layers")
        except ValueError as error:
            layers = ()
            problems.append(str(error))
        for name in (spec.sites,) if isinstance(spec.sites, str) else tuple(spec.sites):
            try:
                site = site_of(name, config.sites)
            except ValueError as error:
                problems.append(str(error))
                continue
            if name in readings:
                problems.append(f"The site {name!r} is captured twice; name it once.")
            elif not site.layered and spec.layers is not None:
                problems.append(f"The site {name!r} occurs once, outside the layers; capture it without layers.")
            else:
                keep = None if name == "allowed" else dtype
                readings[name] = Reading(site, layers if site.layered else (), positions, keep)
    if problems:
        raise ValueError(" ".join(problems))
    return tuple(readings.values())
