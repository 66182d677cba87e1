"""`attribute`: the program of attribution patching, two runs side by side and the pull-back of one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from ..arrays import AnyArray, listing, wide
from ..backends.jax.compiled import compiled
from ..backends.jax.mesh import mesh_of, settle, spread
from ..backends.jax.programs import measure, run
from ..buckets import Window
from ..capture import Reading, readings_of
from ..intervention.each import PerLayer
from ..intervention.edit import Edit
from ..metrics import of_prompt
from ..sites import SITES, Site
from ..traced import mapped
from .saturation import corrected

if TYPE_CHECKING:
    from ..metrics import MetricLike
    from ..models.decoder.model import Decoder
    from ..rules import Rules

RUNS = ("clean", "corrupted")


class How(NamedTuple):
    """What of a gradient is part of its program.

    Attributes:
        at: on which of the `RUNS`; where there are several steps, on the way from the corrupted one.
        steps: over how many points it is averaged.
        exact: whether what queries and keys do to the softmax is not its gradient.
        n_rules: how many rules there are, one after another; None for one, or none.
        rules_at_once: how many of these run side by side.
        each: the sites whose last axis is not summed.
    """

    at: str = "corrupted"
    steps: int = 1
    exact: bool = False
    n_rules: int | None = None
    rules_at_once: int = 1
    each: tuple[str, ...] = ()

    @property
    def in_turn(self) -> int:
        """How many times the runs are run, for rules one after another."""
        return -(-(self.n_rules or 1) // self.rules_at_once)


@compiled("readings", "how", "single", "at_once", "remat")
def attribute(
    model: Decoder,
    clean: Int[AnyArray, "B T"],
    corrupted: Int[AnyArray, "B T"],
    mask: Bool[AnyArray, "B T"] | None,
    window: Window | None,
    metric: MetricLike,
    readings: tuple[Reading, ...],
    rules: Rules | None = None,
    *,
    how: How,
    single: bool,
    at_once: int,
    remat: bool,
) -> tuple[dict[str, Array], Float[Array, "*B"], Float[Array, "*B"]]:
    """The values of each site and the metric of both runs, each leading with the pairs of prompts unless there is a single one.

    Values lead with the rules, where there are several.

    Args:
        at_once: how many pairs run side by side; over the `data` of the model's mesh, where that divides them.
        remat: whether layers are run again in the backward pass.
    """

    mesh, (n_copies, _) = mesh_of(model), spread(model)
    axis = "data" if n_copies > 1 and at_once % n_copies == 0 else None

    def one(number: Int[Array, ""]) -> tuple[dict[str, Array], Array, Array]:
        tokens = settle(jnp.stack([clean[number], corrupted[number]]), mesh)
        real = None if mask is None else mask[number]
        pair = _Pair(model, tokens, real, jax.tree.map(lambda x: x[number], window), of_prompt(metric, number), remat)

        def under(rules: Rules | None) -> tuple[dict[str, Array], Array]:
            return pair.attributed(readings, rules, how)

        if how.n_rules is None:
            found, values = under(rules)
        else:
            found, values = jax.lax.map(under, rules, batch_size=how.rules_at_once)
            values = values[0]  # which no rule changes
        return found, *values

    n, some = len(clean), mapped(one, at_once, axis_name=axis)
    numbers = np.minimum(np.arange(-(-n // at_once) * at_once, dtype=np.int32), n - 1).reshape(-1, at_once)
    if len(numbers) == 1:
        found, *values = some(numbers[0])
    else:
        found, *values = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(some, numbers))
    if numbers.size > n:
        found, values = jax.tree.map(lambda x: x[:n], (found, values))
    if single:
        found, values = jax.tree.map(lambda x: x[0], (found, values))
    elif how.n_rules is not None:
        found = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), found)
    clean_value, corrupted_value = values
    return found, clean_value, corrupted_value


class _Pair(NamedTuple):
    """A pair of prompts, and what they are judged by.

    Attributes:
        tokens: ids of the clean one and of the corrupted one.
        real: which of them are no padding; None for all.
        window: which columns they are.
    """

    model: Decoder
    tokens: Int[Array, "2 T"]
    real: Bool[Array, "T"] | None
    window: Window | None
    metric: Any
    remat: bool

    def attributed(
        self, readings: tuple[Reading, ...], rules: Rules | None, how: How
    ) -> tuple[dict[str, Array], Float[Array, "2"]]:
        """The values of each site, and the metric of both runs, in float32 or wider."""
        dtype, n_tokens, config = wide(self.model.dtype), self.tokens.shape[1], self.model.config
        wanted = {reading.site.name: reading for reading in readings}
        inside = ("q", "k", "allowed", "pattern") if how.exact else ()
        moved = {**wanted, **{r.site.name: r for r in readings_of(inside, config, 1) if r.site.name != "allowed"}}
        zeros = {name: jnp.zeros(reading.shape(config, n_tokens), dtype) for name, reading in moved.items()}
        read = {**moved, **{r.site.name: r for r in readings_of(("final_norm", *inside[2:3]), config, 1)}}

        def measured(zeros: dict[str, Array], tokens: Array, embed: Any = None) -> tuple[Array, dict[str, Array]]:
            return self.measured(zeros, tokens, embed, tuple(read.values()), rules)

        # Side by side, so that each weight is read once for both; what the pull-back keeps of the other run is dropped.
        values, pull, sites = jax.vmap(lambda x: jax.vjp(lambda z: measured(z, x), zeros, has_aux=True))(self.tokens)
        one = jnp.ones((), values.dtype)
        (slope,) = jax.tree.map(lambda x: x[RUNS.index(how.at)], pull)(one)
        if how.steps > 1:
            slope = self.on_the_way(
                slope, lambda embed: jax.grad(lambda z: measured(z, self.tokens[1], embed)[0])(zeros), how
            )
        # Up to the first token that differs the two runs are one, to the bit: not so in rows side by side.
        differs = jnp.cumsum((self.tokens[0] != self.tokens[1]) & (True if self.real is None else self.real)) > 0
        sites = {name: x if x.dtype == bool else x.astype(dtype) for name, x in sites.items()}
        found = {name: _along(reading.site, sites[name], slope[name], differs) for name, reading in wanted.items()}
        found = {name: x if name in how.each else jnp.sum(x, axis=-1) for name, x in found.items()}
        if how.exact:
            found |= corrected(config, sites, slope["pattern"], differs, RUNS.index(how.at), tuple(wanted))
        # Of a metric that has no value here there are none.
        return {name: jnp.where(jnp.isnan(values[1]), jnp.nan, x) for name, x in found.items()}, values.astype(dtype)

    def measured(
        self, added: dict[str, Array], tokens: Array, embed: Any, readings: tuple[Reading, ...], rules: Rules | None
    ) -> tuple[Array, dict[str, Array]]:
        """The metric of a run with something added to sites, and what was read."""
        edits = [] if embed is None else [Edit("embed", "set", None, True, embed)]
        for name, value in added.items():
            edits.append(Edit(name, "add", None, True, PerLayer(value) if SITES[name].layered else value))
        done = run(self.model, tokens, self.real, tuple(edits), readings, remat=self.remat, rules=rules)
        value = measure(self.model, done.activations["final_norm"], self.real, self.metric, self.window)
        _check_scalar(value)
        return value, dict(done.activations)

    def on_the_way(self, first: Any, slope_at: Callable[[Array], Any], how: How) -> Any:
        """The mean of gradients at embeddings from those of the corrupted run, whose gradient is there, towards the clean one's."""
        clean, corrupted = (self.model.embed_tokens(x, lambda _, value: value) for x in self.tokens)
        change = (clean - corrupted).astype(wide(clean.dtype))

        def add(total: Any, share: Array) -> tuple[Any, None]:
            embed = (corrupted.astype(change.dtype) + share * change).astype(corrupted.dtype)
            return jax.tree.map(jnp.add, total, slope_at(embed)), None

        shares = jnp.arange(1, how.steps, dtype=change.dtype) / how.steps
        return jax.tree.map(lambda x: x / how.steps, jax.lax.scan(add, first, shares)[0])


def _along(site: Site, both: Array, slope: Array, differs: Array) -> Array:
    """What the change from the corrupted run to the clean one does along a gradient."""
    shape = (-1, *(1,) * (len(site.axes) - 1 - site.axes.index("T")))
    # Where there is no gradient there is no effect, whatever stands there: not so for ∞ · 0.
    counts = jnp.broadcast_to(differs.reshape(shape), slope.shape) & (slope != 0)
    return jnp.where(counts, (both[0] - both[1]) * slope, 0.0)


def _check_scalar(value: Any) -> None:
    leaves = jax.tree.leaves(value)
    if len(leaves) == 1 and leaves[0] is value and value.shape == () and jnp.issubdtype(value.dtype, jnp.floating):
        return
    what = ", ".join(f"{x.dtype} {listing(x.shape)}" for x in map(jnp.asarray, leaves))
    raise TypeError(
        f"The metric gives {what or 'nothing'}, and attribution needs one floating-point number, which has a gradient."
    )
