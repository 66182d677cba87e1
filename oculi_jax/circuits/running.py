"""`run_circuit`: a model of which only a circuit is the clean run's, and all else what takes its place."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from ..arrays import as_array, listing, on_device
from ..backends.jax.compiled import compiled
from ..backends.jax.layers import run_layers
from ..backends.jax.layout import Layout, lay_out
from ..backends.jax.programs import passed
from ..backends.jax.taps import Taps
from ..intervention import Blend, PerLayer
from ..models.decoder.attention import einsum
from ..models.decoder.model import Block
from ..models.decoder.parts import head_writes
from ..output import Output
from ..traced import mapped
from .ablation import Ablated, ablated, ablation_of
from .graph import Graph
from .pairs import Pairs
from .readers import grown, spans_of

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..models.decoder.config import DecoderConfig
    from ..models.decoder.model import Decoder


def run_circuit(
    model: Decoder,
    clean: ArrayLike,
    corrupted: ArrayLike,
    *,
    edges: ArrayLike | None = None,
    nodes: ArrayLike | None = None,
    neurons: ArrayLike | None = None,
    ablation: str | Mapping[str, ArrayLike] = "corrupted",
    mask: ArrayLike | None = None,
    corrupted_mask: ArrayLike | None = None,
) -> Output:
    """Runs clean prompts where each reader gets of each writer `mask · its write + (1 − mask) · what takes its place`.

    What a writer writes is what it makes of its own inputs in this very run, as in MIB's evaluation (Mueller et al. 2025,
    arXiv:2504.13151). A mask of ones gives the clean run, one of zeros the other. Masks are float data: other ones run the same
    program, map and have gradients; under an outer `jit`, `vmap` or `grad` it inlines. Of `edges`, `nodes` and `neurons` one is
    given. Nodes and neurons are mixed where they write: `z`, `mlp_out` and `embed`, or `act`.

    In a family that normalises what attention adds, a head's write is its part of that: each run's own scale times what the head
    gives. An output bias is shared equally among heads.

    Args:
        model: a model of any family.
        clean, corrupted: ids `[T]`, or `[B, T]` for several pairs: of one shape, aligned token by token.
        edges: `[N_src, N_dst]`, in the order of `Graph.of(model.config)`, or of a grouped one.
        nodes: `[N_src]`. neurons: `[L, F]`.
        ablation: what takes the place of a write: `"corrupted"`, that of the corrupted run; `"mean"`, the writer's mean over the
            real tokens of the corrupted prompts, or `"mean-positional"`, at each position; `"zero"`; or values, site → array
            as `mean_activations` gives them, or with an axis `T` before the last.
        mask, corrupted_mask: bool, shaped as `clean`, True at real tokens; the second is the first where it is not given.

    Returns:
        An `Output`: logits `[T, V]`, or `[B, T, V]`.

    Raises:
        ValueError, TypeError: something that can be seen to be wrong, before anything runs.

    Examples:
        >>> graph = Graph.of(model.config)
        >>> for share in (1.0, 0.0):
        ...     print(says(circuits.run_circuit(model, ids, other, edges=np.full(graph.edges.shape, share))))
        Rome
        Paris
    """
    pairs = Pairs.of(model, clean, corrupted, None, mask, corrupted_mask)
    kind, share, grouped = share_of(model.config, edges, nodes, neurons)
    other = ablation_of(model, pairs, kind, ablation)
    real = pairs.mask
    logits = _run(
        model, pairs.clean, pairs.corrupted, real, pairs.corrupted_mask, share, other, kind=kind, grouped=grouped
    )
    applied = jnp.zeros((len(pairs.clean), 0), jnp.int32)
    out = Output(logits, {}, applied, None if real is None else jnp.asarray(real))
    return jax.tree.map(lambda x: x[0], out) if pairs.single else out


def share_of(
    config: DecoderConfig, edges: ArrayLike | None, nodes: ArrayLike | None, neurons: ArrayLike | None
) -> tuple[str, Array, bool]:
    """Which kind of mask was given, the mask in float32, and whether its edges are of a grouped graph."""
    given = {"edges": edges, "nodes": nodes, "neurons": neurons}
    kinds = [name for name, value in given.items() if value is not None]
    if len(kinds) != 1:
        raise ValueError(f"Give edges, nodes or neurons, one of them; given are {', '.join(kinds) or 'none'}.")
    (kind,) = kinds
    array = as_array(given[kind])
    if array.dtype == object or not (array.dtype == bool or jnp.issubdtype(array.dtype, jnp.number)):
        raise TypeError(
            f"{kind} is a {type(given[kind]).__name__}, and a mask is needed: circuit.{kind}, or shares from 0 to 1."
        )
    plain, grouped = Graph.of(config), Graph.of(config, grouped=True)
    c = config.sizes
    shapes = {
        "edges": (plain.edges.shape, grouped.edges.shape), "nodes": ((len(plain.writers),),), "neurons": ((c["L"], c["F"]),),
    }[kind]  # fmt: skip
    if array.shape not in shapes:
        raise ValueError(
            f"{kind} has shape {listing(array.shape)}, and {' or '.join(map(listing, dict.fromkeys(shapes)))} is needed for "
            "this model."
        )
    if not on_device(array):
        array = array.astype(np.float32)  # here, where it is no program of its own
        if not np.isfinite(array).all():
            raise ValueError(f"{kind} holds a number that is not finite.")
    is_grouped = kind == "edges" and array.shape != plain.edges.shape
    return kind, jnp.asarray(array, jnp.float32), is_grouped


@compiled("kind", "grouped", alone=True)
def _run(
    model: Decoder,
    clean: Any,
    corrupted: Any,
    mask: Any,
    corrupted_mask: Any,
    share: Float[Array, "..."],
    other: Ablated | None,
    *,
    kind: str,
    grouped: bool,
) -> Float[Array, "B T V"]:
    """Logits of each prompt."""

    def one(tokens: Any, spoilt: Any, real: Array | None, also: Array | None) -> Array:
        own = ablated(model, kind, (tokens, real), (spoilt, also), other, None)
        return model.logits(masked(model, (tokens, real), share, own, kind, grouped))

    given = [None if x is None else jnp.asarray(x) for x in (clean, corrupted, mask, corrupted_mask)]
    return mapped(one, len(clean), tuple(None if x is None else 0 for x in given))(*given)


def masked(
    model: Decoder,
    prompt: tuple[Array, Array | None],
    share: Float[Array, "..."],
    other: Mapping[str, Array],
    kind: str,
    grouped: bool,
    *,
    remat: bool = False,
) -> Float[Array, "T E"]:
    """The stream after the final norm of one prompt, of which what `share` says is kept.

    Args:
        prompt: its tokens and its mask.
        share: float32, of edges `[N, M]`, nodes `[N]`, or neurons `[L, F]`.
        other: site → what takes the place of what is not kept, with all layers and tokens.
        remat: run each layer again in the backward pass instead of keeping its intermediates.
    """
    layout = lay_out(model.config, *prompt)
    if kind == "edges":
        return _of_edges(model, layout, share, other, grouped, remat)
    edits: tuple[Any, ...]
    if kind == "neurons":
        edits = (Blend("act", share, PerLayer(other["act"])),)
    else:
        layers = share[1:].reshape(model.config.num_hidden_layers, -1)
        edits = (
            Blend("embed", share[:1].reshape(1, 1), other["embed"]),
            Blend("z", layers[:, :-1], PerLayer(other["z"])),
            Blend("mlp_out", layers[:, -1:], PerLayer(other["mlp_out"])),
        )
    done = passed(model, Taps.of(edits, model.config, layout), (), to_end=True, remat=remat)
    assert done.normalised is not None
    return done.normalised


def _of_edges(
    model: Decoder, layout: Layout, share: Float[Array, "N M"], other: Mapping[str, Array], grouped: bool, remat: bool
) -> Float[Array, "T E"]:
    """What `masked` finds of edges: layers carry what each writer wrote less what takes its place, and the sum of the latter."""
    config, dtype = model.config, model.dtype
    graph = Graph.of(config, grouped)
    outside = Taps(layout, [], 0, frozenset()).at(None)
    embed, base = (
        model.embed_tokens(layout.tokens, outside),
        other["embed"].astype(np.promote_types(dtype, np.float32)),
    )
    less = (embed.astype(base.dtype) - base).astype(dtype)[None]
    inner = jnp.moveaxis(share[:, :-1].reshape(len(share), graph.n_layers, -1), 1, 0)
    given = {"share": inner, **{name: value for name, value in other.items() if name != "embed"}}
    given["first"] = 1 + jnp.arange(graph.n_layers) * (graph.n_heads + 1)
    step, taps = partial(_step, graph=graph), Taps(layout, [], 0, frozenset())
    for begin, end in spans_of(graph.n_layers):
        n = 1 + end * (graph.n_heads + 1)  # writers up to there; of those behind nobody reads
        some = jax.tree.map(lambda x, begin=begin, end=end: x[begin:end], given)
        some["share"] = some["share"][:, :n]
        less = jnp.pad(less, [(0, n - len(less)), (0, 0), (0, 0)])
        stream: Any = less, base
        less, base = run_layers(model, stream, taps, start=begin, stop=end, step=step, given=some, remat=remat).resid
    return model.normalise(_mixed(base, less, share[:, -1:])[0].astype(dtype), outside)


def _mixed(base: Float[Array, "T E"], less: Float[Array, "N T E"], share: Float[Array, "N R"]) -> Float[Array, "R T E"]:
    """What readers read."""
    flat = less.reshape(len(less), -1)
    found = einsum("rn,nx->rx", share.T.astype(less.dtype), flat).astype(base.dtype)
    return base[None] + found.reshape(-1, *base.shape)


def _step(
    block: Block, carry: tuple[Array, Array], own: Any, *around: Any, graph: Graph
) -> tuple[Float[Array, "N T E"], Float[Array, "T E"]]:
    """A layer of which every reader reads its own mixture of what was written before it."""
    (less, base), (rotation, sight, config, tap, remember) = carry, around
    block = grown(block, config, not graph.grouped)
    dtype, n, first = less.dtype, graph.n_heads, own["first"]

    def put(less: Array, base: Array, live: Array, place: Array, instead: Array) -> tuple[Array, Array]:
        wide = instead.astype(base.dtype)
        new = (live.astype(base.dtype) - wide).astype(dtype)
        return jax.lax.dynamic_update_slice_in_dim(less, new, place, 0), base + jnp.sum(wide, axis=0)

    x = _mixed(base, less, own["share"][:, :-1]).astype(dtype)
    if (norm := block.attn_norm) is not None:
        x = norm(x, norm.scale(x, config.rms_norm_eps), config.norm)
    inputs = x[:n], x[n : n + graph.n_shared], x[n + graph.n_shared :]
    z = block.attn.heads(inputs, rotation, sight, config, tap, remember)
    instead = head_writes(block, own["z"], config, own.get("attn_post_scale"))
    less, base = put(less, base, head_writes(block, z, config), first, instead)
    x = _mixed(base, less, own["share"][:, -1:])[0].astype(dtype)
    live = block.mlp_adds(x, config, tap)[None]
    return put(less, base, live, first + n, own["mlp_out"][None])
