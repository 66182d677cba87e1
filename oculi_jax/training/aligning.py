"""`align`: the subspace of a site that holds what a causal model says it holds, at one place or at many."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from ..arrays import check_host, integer, number, random_key, share
from ..intervention import Subspace
from ..sweeps.running import check_progress, told
from .alignment import Alignment, Alignments
from .controls import untrained
from .interchanges import hits, prepare
from .resuming import beside_file, path_of
from .searching import Method, Search, check_method

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..models.decoder.model import Decoder
    from ..sweeps.running import Progress


def align(
    model: Decoder,
    base: ArrayLike,
    source: ArrayLike,
    labels: ArrayLike,
    method: Method[Any, Any],
    *,
    layers: int | Sequence[int],
    positions: int | Sequence[int] = -1,
    site: str = "resid_pre",
    source_positions: int | Sequence[int] | None = None,
    steps: int = 300,
    batch_size: int = 16,
    learning_rate: float = 1e-2,
    held_out: float = 0.25,
    seeds: int = 1,
    key: Array,
    mask: ArrayLike | None = None,
    source_mask: ArrayLike | None = None,
    controls: bool = True,
    file: str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = None,
) -> Alignments:
    """Finds the subspace that, taken from one prompt's run into another's, makes the model say what a causal model says it must.

    What the method has is fitted with Adam to the mean surprise `−log p(label)` at the last token, of `base` run with the `source`
    prompt's values in the subspace. What comes before a layer is run once, and kept: B × T × E numbers a layer. All fits of a
    layer, its positions × seeds and the control of shuffled labels, are one program; the control of an untrained model is another
    for as much time again. Host function.

    Args:
        model: a model of any family.
        base: ids `[B, T]`, what is run.
        source: ids `[B, S]`, what is taken from.
        labels: ids `[B]`, the token that the causal model gives for the base with the source's variable.
        method: `DAS(rank)`, `BoundlessDAS()` or `DBM()`.
        layers: one, or several.
        positions: of base prompts, one, or several: integers, from 0 or, negative, from the last real token.
        site: whose last axis holds features; of a site with heads, each head's.
        source_positions: of source prompts, one to each of `positions`; those for None.
        steps, batch_size, learning_rate: of each fit; the rate is constant.
        held_out: the share of pairs, drawn by the key, that are kept for judging.
        seeds: how many fits of each place, which begin elsewhere.
        key: a JAX random key: of where fits begin, of what is held out, of the order of pairs, of the controls.
        mask, source_mask: bool as the ids, True at real tokens.
        controls: whether to run them; without, nothing says what chance would give.
        file: as in `fit`; each layer has one of its own beside it, `NAME.LAYER.safetensors`, and one of the untrained model.
        progress: as in `fit`.

    Returns:
        An `Alignments`: `found[layer, position]` is the `Alignment` there.

    Raises:
        ValueError, TypeError: arguments that do not go together, or that `forward` refuses.

    Examples:
        >>> pairs = tokenizer(["The capital of Italy is", "The capital of France is"] * 4)["input_ids"]
        >>> settings = dict(layers=3, steps=60, batch_size=4, learning_rate=0.1, key=jax.random.key(0), progress=False)
        >>> found = align(model, pairs, pairs[1:] + pairs[:1], np.array([paris, rome] * 4), DAS(rank=1), **settings)
        >>> found.accuracy, list(found[3, -1].controls)
        (array([[1.]], dtype=float32), ['random basis', 'shuffled labels', 'untrained model'])
    """
    given = base, source, labels, layers, site, positions, source_positions, (mask, source_mask)
    check_host((model, base, source, labels))
    check_method(method)
    check_progress(progress)
    key, held_out, seeds = random_key(key), share(held_out, "held_out", "pairs"), integer(seeds, "seeds", 1)
    path = path_of(file)
    settings: dict[str, Any] = dict(
        steps=integer(steps, "steps", 1), batch_size=integer(batch_size, "batch_size", 1),
        learning_rate=number(learning_rate, "learning_rate"),
    )  # fmt: skip
    found = prepare(model, *given)
    search = Search.of(method, found[0], key, held_out, seeds, controls)
    plain = prepare(untrained(model, search.keys["untrained"]), *given) if controls else []
    every: list[Alignment] = []
    with told("Aligning", progress, steps * (len(found) + len(plain))) as advance:
        for i, pairs in enumerate(found):
            done = search.fitted(pairs, beside_file(path, f"{pairs.layer}"), advance, seeds=True, **settings)
            other = None
            if controls:
                name = beside_file(path, f"{pairs.layer}.untrained")
                other = plain[i], search.fitted(plain[i], name, advance, seeds=False, **settings)
            every += search.judged(pairs, done, other)
    return Alignments(tuple(pairs.layer for pairs in found), found[0].positions, tuple(every))


def interchange_accuracy(
    model: Decoder,
    subspace: Subspace,
    base: ArrayLike,
    source: ArrayLike,
    labels: ArrayLike,
    *,
    source_position: int | None = None,
    mask: ArrayLike | None = None,
    source_mask: ArrayLike | None = None,
) -> Float[np.ndarray, "B"]:
    """Of each pair 1 where, with the source's values in a subspace, the likeliest last token is the label, else 0.

    Its mean is the interchange intervention accuracy of Geiger et al. (2021, arXiv:2106.02997).

    Args:
        subspace: says where: one layer, one position. Its own source is not looked at.
        model, base, source, labels, source_position, mask, source_mask: as in `align`.

    Raises:
        ValueError, TypeError: as `align`.

    Examples:
        >>> whole = Subspace("resid_pre", 3, np.eye(192), 0.0, positions=-1)
        >>> interchange_accuracy(model, whole, [ids, other], [other, ids], [paris, rome])
        array([1., 1.], dtype=float32)
    """
    if not isinstance(subspace, Subspace):
        raise TypeError(f"subspace is a {type(subspace).__name__}, and a Subspace is needed.")
    layer, position = integer(subspace.layer, "subspace.layer"), integer(subspace.positions, "subspace.positions")
    given = (labels, layer, subspace.site, position, source_position, (mask, source_mask))
    (pairs,) = prepare(model, base, source, *given)
    basis = np.asarray(jnp.linalg.qr(jnp.asarray(subspace.basis))[0])
    if not np.isfinite(basis).all():
        raise ValueError("subspace.basis holds what is no finite number.")
    return hits(pairs, [basis], [0], np.arange(len(pairs.labels)))[0]
