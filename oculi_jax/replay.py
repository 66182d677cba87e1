"""The programs of a sweep: a base run that is kept, and variants that start from what they cannot have changed in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from .capture import Reading, at_positions
from .forward import Taps, laid_out, lower, run
from .intervention.edit import cut_rows
from .metrics import Metric
from .output import Output
from .pytrees import pytree, static
from .sites import SITES

if TYPE_CHECKING:
    from .models.llama.config import LlamaConfig
    from .models.llama.model import Llama


@pytree
class Base:
    """What a run leaves for others that agree with it up to some layer, or up to some token.

    Attributes:
        resid: the residual stream entering each layer, and, last, leaving the last one.
        keys, values: None where every variant runs all tokens.
    """

    resid: Float[Array, "L+1 T E"]
    keys: Float[Array, "L K T D"] | None
    values: Float[Array, "L K T D"] | None


@pytree
class Rows:
    """Interventions of prompts × variants.

    Attributes:
        leaves: of their tree; each has an axis of prompts, one of variants, both in this order, or neither.
        tree: the tree.
        by_prompt, by_variant: for each leaf, whether it has the axis.
    """

    leaves: list[Any]
    tree: Any = static()
    by_prompt: tuple[bool, ...] = static()
    by_variant: tuple[bool, ...] = static()

    def map(self, fn: Callable[..., Any], size: int, axis_name: str | None = None) -> Callable[..., Any]:
        """`fn(interventions, prompt)` over `size` variants and, outside them, over what a tuple `prompt` leads with.

        Returns:
            A function of `prompt` and its axes: for each entry 0 or None, or a tree of those.
        """

        def variants(leaves: list[Any], prompt: Any) -> Any:
            axes = [0 if lead else None for lead in self.by_variant]
            each = jax.vmap(
                lambda leaves: fn(jax.tree.unflatten(self.tree, leaves), prompt),
                in_axes=(axes,), axis_size=size, spmd_axis_name=axis_name,
            )  # fmt: skip
            return each(leaves)

        def prompts(prompt: Any, axes: Any) -> Any:
            return jax.vmap(variants, in_axes=([0 if lead else None for lead in self.by_prompt], axes))(
                self.leaves, prompt
            )

        return prompts


@partial(jax.jit, static_argnames=("keep_keys",))
def run_base(
    model: Llama, tokens: Int[Array, "C T"], mask: Bool[Array, "C T"] | None, shared: Rows, keep_keys: bool
) -> Base:
    """Runs each prompt under the interventions that all variants have.

    Returns:
        A `Base` whose arrays lead with the prompts.
    """
    layers = tuple(range(model.config.num_hidden_layers))
    sites = ("resid_post", "k", "v") if keep_keys else ("resid_post",)
    readings = (Reading(SITES["embed"], (), None, None), *(Reading(SITES[name], layers, None, None) for name in sites))

    def one(interventions: tuple[Any, ...], prompt: Any) -> Base:
        found = run(model, *prompt, interventions, readings).activations
        resid = jnp.concatenate([found["embed"][None], found["resid_post"]])
        return Base(resid, found.get("k"), found.get("v"))

    kept = shared.map(one, 1)((tokens, mask), (0, None if mask is None else 0))
    return jax.tree.map(lambda leaf: leaf[:, 0], kept)


@partial(jax.jit, static_argnames=("metric_by_prompt", "size", "n_rows", "mesh"), inline=True)
def run_group(
    model: Llama,
    tokens: Int[Array, "C T"],
    mask: Bool[Array, "C T"] | None,
    interventions: Rows,
    metric: Any,
    metric_by_prompt: tuple[bool, ...],
    base: Base | None = None,
    start: Int[Array, ""] | int = 0,
    *,
    size: int,
    n_rows: int,
    mesh: jax.sharding.Mesh | None = None,
) -> Any:
    """The metric of `size` variants on each of C prompts, run from layer `start` on, the last `n_rows` tokens alone.

    Args:
        metric_by_prompt: for each of the metric's leaves, whether it leads with the prompts.
        base: what comes before that, leading with the prompts; None where all tokens run through all layers.
        mesh: spreads the variants over its `data` axis.

    Returns:
        The metric's value, `[C, size, …]`.
    """
    config = model.config
    n_tokens = tokens.shape[1]
    sizes = {**config.sizes, "T": n_tokens, "S": n_tokens}
    first = n_tokens - n_rows

    def one(interventions: tuple[Any, ...], prompt: Any) -> Any:
        tokens, mask, metric, base = prompt
        edits = lower(interventions, sizes)
        cut = [(number, cut_rows(edit, first, n_rows, sizes)) for number, edit in edits] if first else edits
        tokens, rotation, allowed = laid_out(model, tokens, mask)
        rotation = jax.tree.map(lambda angle: angle[first:], rotation)
        mine = None if mask is None else mask[first:]

        def taps(layer: Array | None, edits: Any, real: Array | None) -> Taps:
            return Taps(edits, set(), len(interventions), real, layer, mask)

        outside = taps(None, edits, mask)
        resid = model.embed_tokens(tokens, outside) if base is None else base.resid[start, first:]

        def layer_step(layer: Array, resid: Array) -> Array:
            block = jax.tree.map(lambda leaf: leaf[layer], model.layers)

            def remember(k: Array, v: Array) -> tuple[Array, Array]:
                assert base is not None and base.keys is not None and base.values is not None
                past = base.keys[layer, :, :first], base.values[layer, :, :first]
                return jnp.concatenate([past[0], k], axis=1), jnp.concatenate([past[1], v], axis=1)

            resid = block(resid, rotation, allowed[first:], config, taps(layer, cut, mine), remember if first else None)
            return resid if mesh is None else jax.lax.with_sharding_constraint(resid, _whole(mesh))

        resid = jax.lax.fori_loop(start, config.num_hidden_layers, layer_step, resid)
        if first and base is not None:
            resid = jnp.concatenate([base.resid[-1, :first], resid])
        return measure(model, model.normalise(resid, outside), mask, metric)

    metric_axes = jax.tree.unflatten(jax.tree.structure(metric), [0 if lead else None for lead in metric_by_prompt])
    axes = (0, None if mask is None else 0, metric_axes, None if base is None else 0)
    return interventions.map(one, size, None if mesh is None else "data")((tokens, mask, metric, base), axes)


def _whole(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def measure(model: Llama, normalised: Float[Array, "T E"], mask: Bool[Array, "T"] | None, metric: Any) -> Any:
    """The metric, from the logits that it reads and no others."""
    if not isinstance(metric, Metric):
        return metric(Output(model.logits(normalised), {}, jnp.zeros(0, jnp.int32), mask))
    read = at_positions(normalised, 0, metric.positions, mask)
    return metric.of(model.logits(read) if metric.ids is None else model.logits_of(read, jnp.asarray(metric.ids)))


@partial(jax.jit, static_argnames=("size", "config"))
def run_reach(
    interventions: Rows, tokens: Int[Array, "C T"], mask: Bool[Array, "C T"] | None, size: int, config: LlamaConfig
) -> tuple[Int[Array, "N"], Int[Array, "N"]]:
    """The first layer (−1: the embedding) and the first token that each of `size` variants may change, on any prompt.

    For what changes nothing they are the number of layers and the number of tokens.
    """
    n_layers, n_tokens = config.num_hidden_layers, tokens.shape[1]
    sizes = {**config.sizes, "T": n_tokens, "S": n_tokens}

    def one(interventions: tuple[Any, ...], prompt: Any) -> tuple[Array, Array]:
        _, real = prompt
        first_layer, first_token = jnp.int32(n_layers), jnp.int32(n_tokens)
        for _, edit in lower(interventions, sizes):
            site, touched = SITES[edit.site], jnp.asarray(edit.mask)
            layer = -1 if site.name == "embed" else n_layers
            if site.layered:
                layer = 0 if edit.layer is None else edit.layer
                touched = touched.any(axis=0) if edit.layer is None and touched.ndim else touched
            touched = touched.reshape(*(1,) * (len(site.axes) - touched.ndim), *touched.shape)
            others = tuple(axis for axis, letter in enumerate(site.axes) if letter != "T")
            touched = jnp.broadcast_to(touched.any(axis=others), n_tokens)
            touched = touched if real is None else touched & real
            here = touched.any()
            first_layer = jnp.minimum(first_layer, jnp.where(here, jnp.int32(layer), n_layers))
            first_token = jnp.minimum(first_token, jnp.where(here, jnp.argmax(touched).astype(jnp.int32), n_tokens))
        return first_layer, first_token

    reached = interventions.map(one, size)((tokens, mask), (0, None if mask is None else 0))
    return jax.tree.map(lambda x: x.min(axis=0), reached)


def looks_ahead(interventions: Rows, tokens: Any, mask: Any, size: int, config: LlamaConfig) -> bool:
    """Whether a token's values may come to depend on later tokens, or an edit on how many tokens run.

    Then what precedes an edited token is not as it was: an edit may let a query see later keys, and a function that is not
    known to treat each token by itself may do anything.
    """
    n_tokens = tokens.shape[1]
    sizes = {**config.sizes, "T": n_tokens, "S": n_tokens}
    found: list[bool] = []

    def one(interventions: tuple[Any, ...], _: Any) -> int:
        for _, edit in lower(interventions, sizes):
            sees = (edit.site == "allowed" and edit.value is not False) or (
                edit.site == "pattern" and edit.op != "scale"
            )
            found.append(sees or (edit.op == "apply" and not hasattr(edit.fn, "site_shaped")))
        return 0

    jax.eval_shape(lambda: interventions.map(one, size)((tokens, mask), (0, None if mask is None else 0)))
    return any(found)
