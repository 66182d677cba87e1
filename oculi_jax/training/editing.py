"""A rank-one edit that is learnt: some prompts get another answer, all others keep theirs.

The form and its two ends, to detect and to steer, are those of ReFT-r1 (Wu et al. 2025, "AxBench", arXiv:2501.17148) and of LoReFT
(Wu et al. 2024, "ReFT", arXiv:2404.03592); that neighbours are to stay is Meng et al.'s (2022, "Locating and Editing Factual
Associations in GPT", arXiv:2202.05262).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from ..arrays import as_array, check_host, integer, listing, number, random_key
from ..backends import check_model
from ..intervals import Interval
from ..intervention import RankOne
from ..prompts import check_prompts
from ..pytrees import pytree
from ..sweeps.running import check_progress
from .controls import beside, ranged, untrained
from .detection import auroc
from .directions import check_site
from .edit_task import Seen, Task
from .resuming import path_of

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..models.decoder.model import Decoder
    from ..sweeps.running import Progress


@pytree
class RankOneEdit:
    """A `RankOne` that was learnt, or several, and what held-out prompts say under it, beside its controls.

    Where several edits were learnt, arrays lead with them.

    Attributes:
        edit: the intervention; of several edits a family, for `sweep` or `generate`.
        hits: `[…, M]`, of each held-out prompt, 1 where the likeliest token under the edit is its answer, else 0.
        by_seed: `[S, …, M]`, `hits` of what each seed found; the first is this one.
        changes: `[…, M]`, whether that answer is another one than the model's own.
        controls: `hits` again, of a `"random direction"` written as strongly; of `"steering"`, which writes the same direction at
            every token of every prompt; of an edit learnt in an `"untrained model"`, where prompts that are to stay have other
            answers.
        detection: `[…]`, the AUROC of the most that is read at a token of a held-out prompt: of those that are to change, against
            those that are to stay.
        losses: `[steps, …]`.
        held_out: `[M]`, which prompts these are.

    Examples:
        >>> texts = [text.format(place) for place in ("Italy", "France", "Spain", "Japan")
        ...          for text in ("The capital of {} is", "The government of {} sits in", "In {}, the capital is")]
        >>> tokens, mask = padded(texts, tokenizer)
        >>> own = np.array([tokenizer.encode(word)[-1] for word in ("Rome", "Paris", "Madrid", "Tokyo")]).repeat(3)
        >>> answers = np.where(own == rome, paris, own)  # Italy's capital is to be Paris
        >>> held_out = np.arange(12) % 3 == 0  # the first phrasing
        >>> settings = dict(layer=1, steps=40, held_out=held_out, mask=mask, controls=False, key=jax.random.key(0))
        >>> found = rank_one_edit(model, tokens, answers, **settings)
        >>> found.changed, found.kept
        (array([1.], dtype=float32), array([1., 1., 1.], dtype=float32))
        >>> says(forward(model, ids, found.edit)), says(forward(model, other, found.edit))
        ('Paris', 'Paris')
    """

    edit: RankOne
    hits: Float[np.ndarray, "... M"]
    by_seed: Float[np.ndarray, "S ... M"]
    changes: Bool[np.ndarray, "... M"]
    controls: Mapping[str, Float[np.ndarray, "... M"]]
    detection: Interval
    losses: Float[np.ndarray, "N ..."]
    held_out: Int[np.ndarray, "M"]

    @property
    def changed(self) -> Float[np.ndarray, " A"]:
        """`hits` of the held-out prompts that were to change, of all edits."""
        return self.hits[self.changes]

    @property
    def kept(self) -> Float[np.ndarray, " B"]:
        """`hits` of the held-out prompts that were to stay, of all edits."""
        return self.hits[~self.changes]

    def __repr__(self) -> str:
        shape = self.changes.shape[:-1]
        which = "" if not shape else f", {listing(shape)} edits"
        parts = []
        for what, chosen in (("changed", self.changes), ("kept", ~self.changes)):
            others = {name: _by_prompt(found, chosen) for name, found in self.controls.items()}
            seeds = np.array([_by_prompt(found, chosen).mean() for found in self.by_seed])
            parts.append(f"{what} {beside(_by_prompt(self.hits, chosen), others, 'held-out prompts', seeds)}")
        detected = jax.tree.map(lambda x: np.mean(x), self.detection)
        parts.append(f"detection AUROC {ranged(detected)}")
        return (
            f"RankOneEdit({self.edit.site}, layer {np.ravel(self.edit.layer)[0]}{which}\n  " + "\n  ".join(parts) + ")"
        )


def _by_prompt(hits: Float[np.ndarray, "... M"], chosen: Bool[np.ndarray, "... M"]) -> Float[np.ndarray, " M"]:
    """Of each prompt its mean over the edits for which it is chosen: an interval is over prompts, which edits share."""
    hits, chosen = (x.reshape(-1, x.shape[-1]) for x in (hits, chosen))
    some = chosen.any(axis=0)
    return np.mean(hits[:, some], axis=0, where=chosen[:, some])


def rank_one_edit(
    model: Decoder,
    tokens: ArrayLike,
    answers: ArrayLike,
    *,
    layer: int,
    site: str = "resid_pre",
    steps: int = 100,
    batch_size: int = 8,
    learning_rate: float = 0.03,
    penalty: float = 0.1,
    held_out: ArrayLike = 0.25,
    seeds: int = 1,
    key: Array,
    mask: ArrayLike | None = None,
    controls: bool = True,
    file: str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = None,
) -> RankOneEdit:
    """Learns a `RankOne` after which prompts say what they are to say: another answer in some, in all others the model's own.

    A prompt whose answer is not the model's own likeliest token is to change, all others are to stay. The loss of a pair of one of
    each is `−log p(answer)` of the first, plus KL(model ‖ edited model) of the second at its last token, plus `penalty` times
    what is read at the second's tokens, which is to be nothing. Read and written are a direction each, at every token, so what
    is found does not know where in a prompt it is to act. What comes before `layer` is run once; several edits of the same
    prompts are learnt as one program. Host function.

    Args:
        model: a model of any family.
        tokens: ids `[B, T]`.
        answers: ids `[B]`, the token after each prompt; or `[R, B]`, of R edits, each learnt by itself.
        layer: where, from 0.
        site: a site of the layers with one row of features for each token.
        steps, batch_size, learning_rate: of the fit, in pairs, with Adam; the rate is constant, in units in which the site's values
            have mean square 1.
        penalty: 0 or more.
        held_out: the prompts that are kept for judging, bool `[B]`: phrasings, for instance, that the edit is not to know. Or a
            share, drawn by the key among prompts that are alike in which edits change them.
        seeds: how many fits of each edit, of the same program, each with an order of prompts of its own; what the first found is
            returned.
        key: a JAX random key.
        mask: bool `[B, T]`, True at real tokens.
        controls: whether to run them; the untrained model's takes as much time again.
        file, progress: as in `fit`.

    Returns:
        A `RankOneEdit`.

    Raises:
        ValueError, TypeError: arguments that do not go together, or that `forward` refuses; an edit that changes nothing, or keeps
            nothing, among the prompts it is fitted on or those it is judged on.

    Examples:
        >>> phrasings = "The capital of {} is", "In {}, the capital is"
        >>> texts = [text.format(place) for place in ("Italy", "France") for text in phrasings]
        >>> tokens, mask = padded(texts, tokenizer)
        >>> settings = dict(layer=1, steps=40, held_out=0.5, mask=mask, controls=False, key=jax.random.key(0))
        >>> found = rank_one_edit(model, tokens, np.array([paris] * 4), **settings)
        >>> says(forward(model, ids, found.edit))
        'Paris'
    """
    config = check_model(model)
    check_site(site, config)
    layer = integer(layer, "layer", 0, config.num_hidden_layers - 1)
    if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not 0 <= penalty < np.inf:
        raise ValueError(f"penalty is {penalty!r}, and a number that is not negative is needed.")
    check_host((model, tokens, answers))
    steps, batch_size, seeds = (
        integer(steps, "steps", 1),
        integer(batch_size, "batch_size", 1),
        integer(seeds, "seeds", 1),
    )
    learning_rate, key, path = number(learning_rate, "learning_rate"), random_key(key), path_of(file)
    check_progress(progress)
    ids, real, one = check_prompts(config, tokens, mask)
    wanted = np.asarray(as_array(answers))
    if one or wanted.shape[-1:] != (len(ids),) or wanted.ndim > 2 or wanted.dtype.kind not in "iu":
        raise ValueError(
            f"tokens has shape {listing(np.shape(tokens))}, and answers is {wanted.dtype} {listing(wanted.shape)}: ids [B, T], and "
            "[B], or [R, B] of R edits, are needed: of each answer the token that comes first after the prompt."
        )
    if ((wanted < 0) | (wanted >= config.vocab_size)).any():
        raise ValueError(f"answers holds what is no token id of this model: they are 0 to {config.vocab_size - 1}.")
    seen = Seen.of(model, ids, np.ones(np.shape(ids), bool) if real is None else real, site, layer)
    changes = np.atleast_2d(wanted) != seen.said
    chosen, order, drawn, other = jax.random.split(key, 4)
    held = _held_out(held_out, changes, chosen)
    task = Task(np.atleast_2d(wanted), changes, held, order, steps, batch_size, learning_rate, penalty)
    found, every = task.seeded(seeds).learn(seen, file=path, progress=progress)
    own = jax.tree.map(lambda x: x[: len(changes)], every)
    by_seed = task.seeded(seeds).hits(seen, every)
    beside = {}
    if controls:
        beside["random direction"] = task.hits(seen, {**own, "write": _turned(own["write"], drawn)})
        beside["steering"] = task.hits(
            seen, {**own, "read": 0 * own["read"], "bias": jnp.asarray(task.most(seen, own))}
        )
        blank = Seen.of(untrained(model, other), seen.tokens, seen.mask, site, layer)
        beside["untrained model"] = task.hits(blank, task.learn(blank, file=None, progress=progress)[1])
    return _result(wanted.shape[:-1], seen, task, found.losses, own, by_seed, beside)


def _result(
    axes: tuple[int, ...],
    seen: Seen,
    task: Task,
    losses: Float[np.ndarray, "N SR"],
    own: dict[str, Array],
    by_seed: Float[np.ndarray, "SR M"],
    beside: dict[str, Float[np.ndarray, "R M"]],
) -> RankOneEdit:
    """With the axes of the answers: of the first seed's edits, but for `by_seed`."""
    read = task.read(seen, own)[:, task.held]
    areas = [auroc(x[y], x[~y]) for x, y in zip(read, task.changes[:, task.held], strict=True)]
    detection = jax.tree.map(lambda *x: np.stack(x).reshape(axes), *areas)

    def shaped(x: Any) -> Any:
        return x.reshape(*axes, *x.shape[1:])

    layers = np.full(axes, seen.layer) if axes else seen.layer
    edit = RankOne(seen.site, layers, *(shaped(own[name]) for name in ("read", "write", "bias")))
    seeds = by_seed.reshape(-1, *axes, len(task.held))
    changes = shaped(task.changes[:, task.held])
    controls = {name: shaped(x) for name, x in beside.items()}
    losses = losses[:, : len(task.changes)].reshape(-1, *axes)
    return RankOneEdit(edit, seeds[0], seeds, changes, controls, detection, losses, task.held)


def _held_out(given: ArrayLike, changes: Bool[np.ndarray, "R B"], key: Array) -> Int[np.ndarray, " M"]:
    """The rows that are kept back, of which each edit changes some and keeps some, as it does of the others."""
    n = changes.shape[1]
    share = as_array(given)
    if share.shape == (n,) and share.dtype == bool:
        chosen = np.asarray(share)
    elif share.ndim == 0 and share.dtype.kind == "f" and 0 < share < 1:
        chosen = np.zeros(n, bool)
        _, kinds = np.unique(changes, axis=1, return_inverse=True)
        for kind, own in enumerate(jax.random.split(key, int(kinds.max()) + 1)):
            rows = np.flatnonzero(kinds.reshape(-1) == kind)
            count = min(max(1, round(float(share) * len(rows))), len(rows) - 1)
            chosen[rows[np.asarray(jax.random.permutation(own, len(rows)))[:count]]] = True
    else:
        raise ValueError(
            f"held_out is {given!r}, and a share between 0 and 1, or a bool of each of the {n} prompts, is needed."
        )
    for part, where in ((~chosen, "is fitted on"), (chosen, "is judged on")):
        for own, what in ((changes, "changed"), (~changes, "kept")):
            if (none := ~own[:, part].any(axis=1)).any():
                which = f"Edit {int(none.argmax())}" if len(changes) > 1 else "The edit"
                raise ValueError(
                    f"{which} has no prompt to be {what} among the {int(part.sum())} that it {where}. A prompt is changed where "
                    "its answer is not the model's own likeliest token, and kept where it is."
                )
    return np.flatnonzero(chosen)


def _turned(write: Array, key: Array) -> Array:
    """Random directions, as long."""
    drawn = jax.random.normal(key, write.shape, write.dtype)
    lengths = [jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (write, drawn)]
    return drawn * lengths[0] / lengths[1]
