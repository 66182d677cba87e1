"""A rank-one edit that is learnt: some prompts get another answer, all others keep theirs.

The form and its two ends, to detect and to steer, are those of ReFT-r1 (Wu et al. 2025, "AxBench", arXiv:2501.17148) and of LoReFT
(Wu et al. 2024, "ReFT", arXiv:2404.03592); that neighbours are to stay is Meng et al.'s (2022, "Locating and Editing Factual
Associations in GPT", arXiv:2202.05262).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from ..arrays import AnyArray, as_array, integer, listing, random_key
from ..backends import check_model
from ..backends.jax.compiled import compiled
from ..capture import CaptureSpec
from ..intervals import Interval
from ..intervention import RankOne
from ..prompts import check_prompts
from ..pytrees import pytree
from ..run import forward
from .controls import beside, ranged, untrained
from .detection import auroc
from .directions import check_site
from .fitting import Fit, fit

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..models.decoder.model import Decoder
    from ..sweeps.running import Progress

_AT_ONCE = 16  # prompts


@pytree
class RankOneEdit:
    """A `RankOne` that was learnt, or several, and what held-out prompts say under it, beside its controls.

    Where several edits were learnt, arrays lead with them.

    Attributes:
        edit: the intervention; of several edits a family, for `sweep` or `generate`.
        hits: `[…, M]`, of each held-out prompt, 1 where the likeliest token under the edit is its answer, else 0.
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
            parts.append(f"{what} {beside(_by_prompt(self.hits, chosen), others, 'held-out prompts')}")
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
    ids, real, one = check_prompts(config, tokens, mask)
    wanted = np.asarray(as_array(answers))
    if one or wanted.shape[-1:] != (len(ids),) or wanted.ndim > 2 or wanted.dtype.kind not in "iu":
        raise ValueError(
            f"tokens has shape {listing(np.shape(tokens))}, and answers is {wanted.dtype} {listing(wanted.shape)}: ids [B, T], and "
            "[B], or [R, B] of R edits, are needed."
        )
    if ((wanted < 0) | (wanted >= config.vocab_size)).any():
        raise ValueError(f"answers holds what is no token id of this model: they are 0 to {config.vocab_size - 1}.")
    seen = _Seen.of(model, ids, np.ones(np.shape(ids), bool) if real is None else real, site, layer)
    changes = np.atleast_2d(wanted) != seen.said
    chosen, order, drawn, other = jax.random.split(random_key(key), 4)
    held = _held_out(held_out, changes, chosen)
    task = _Task(np.atleast_2d(wanted), changes, held, order, steps, batch_size, learning_rate, penalty)
    found, own = task.learn(seen, file=file, progress=progress)
    hits = {"": task.hits(seen, own)}
    if controls:
        hits["random direction"] = task.hits(seen, {**own, "write": _turned(own["write"], drawn)})
        hits["steering"] = task.hits(seen, {**own, "read": 0 * own["read"], "bias": jnp.asarray(task.most(seen, own))})
        blank = _Seen.of(untrained(model, other), seen.tokens, seen.mask, site, layer)
        hits["untrained model"] = task.hits(blank, task.learn(blank, file=None, progress=progress)[1])
    return _result(wanted.shape[:-1], seen, task, found, own, hits)


def _result(
    axes: tuple[int, ...], seen: _Seen, task: _Task, found: Fit, own: dict[str, Array], hits: dict[str, np.ndarray]
) -> RankOneEdit:
    read = task.read(seen, own)[:, task.held]
    areas = [auroc(x[y], x[~y]) for x, y in zip(read, task.changes[:, task.held], strict=True)]
    detection = jax.tree.map(lambda *x: np.stack(x).reshape(axes), *areas)

    def shaped(x: Any) -> Any:
        return x.reshape(*axes, *x.shape[1:])

    layers = np.full(axes, seen.layer) if axes else seen.layer
    edit = RankOne(seen.site, layers, *(shaped(own[name]) for name in ("read", "write", "bias")))
    hits = {name: shaped(x) for name, x in hits.items()}
    changes = shaped(task.changes[:, task.held])
    losses = found.losses.reshape(-1, *axes)
    return RankOneEdit(edit, hits.pop(""), changes, hits, detection, losses, task.held)


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


@dataclass(frozen=True)
class _Seen:
    """Prompts as a model has them at a layer.

    Attributes:
        tokens, mask: `[B, T]`.
        resid: `[B, T, E]`, the stream that enters the layer.
        values: `[B, T, n]` of the site there.
        log_p: `[B, V]`, after the last token.
        scale: the root mean square of the values.
    """

    model: Decoder
    site: str
    layer: int
    tokens: Int[AnyArray, "B T"]
    mask: Bool[AnyArray, "B T"]
    resid: Float[Array, "B T E"]
    values: Float[Array, "B T n"]
    log_p: Float[Array, "B V"]
    scale: float

    @classmethod
    def of(cls, model: Decoder, tokens: AnyArray, mask: AnyArray, site: str, layer: int) -> _Seen:
        resid, values, log_p = _run(model, tokens, mask, site, layer)
        scale = float(jnp.sqrt(jnp.mean(values[np.asarray(mask)].astype(jnp.float32) ** 2)))
        return cls(model, site, layer, tokens, mask, resid, values, log_p, scale)

    @property
    def said(self) -> Int[np.ndarray, " B"]:
        """The likeliest token after each."""
        return np.asarray(self.log_p.argmax(axis=-1))

    def rows(self, rows: Any) -> Any:
        """Some of the prompts, as `_edited` takes them."""
        return jax.tree.map(lambda x: jnp.asarray(x)[rows], (self.tokens, self.mask, self.resid))


@compiled("site", "layer")
def _run(model: Decoder, tokens: AnyArray, mask: AnyArray, site: str, layer: int) -> tuple[Array, Array, Array]:
    def one(prompt: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        spec = CaptureSpec(tuple(dict.fromkeys(("resid_pre", site))), [layer])
        out = forward(model, prompt[0], capture=spec, mask=prompt[1], logits="last")
        assert out.logits is not None
        return out["resid_pre"][0], out[site][0], jax.nn.log_softmax(out.logits)

    return jax.lax.map(one, (tokens, mask), batch_size=min(len(tokens), _AT_ONCE))


def _edited(model: Decoder, own: dict[str, Array], prompt: Any, site: str, layer: int) -> Float[Array, " V"]:
    """The last logits of a prompt under an edit, from its layer on."""
    tokens, mask, resid = prompt
    edit: Any = RankOne(site, layer, own["read"], own["write"], own["bias"])
    logits = forward(model, tokens, edit, mask=mask, logits="last", start=(layer, resid)).logits
    assert logits is not None
    return logits


@compiled("site", "layer")
def _likeliest(model: Decoder, own: dict[str, Array], prompts: Any, site: str, layer: int) -> Int[Array, "R M"]:
    def of(own: dict[str, Array]) -> Array:
        def one(prompt: Any) -> Array:
            return jnp.argmax(_edited(model, own, prompt, site, layer))

        return jax.lax.map(one, prompts, batch_size=min(len(prompts[0]), _AT_ONCE))

    return jax.lax.map(of, own)


@dataclass(frozen=True)
class _Task:
    """What R edits are to do to B prompts, and how they are learnt."""

    answers: Int[np.ndarray, "R B"]
    changes: Bool[np.ndarray, "R B"]
    held: Int[np.ndarray, "M"]
    key: Array
    steps: int
    batch_size: int
    learning_rate: float
    penalty: float

    @property
    def rest(self) -> Int[np.ndarray, "N"]:
        return np.setdiff1d(np.arange(self.changes.shape[1]), self.held)

    def pairs(self) -> dict[str, Int[np.ndarray, "N R"]]:
        """Pairs of a prompt to change and one to keep, of each edit; every one occurs as often as any other, or once more."""
        parts: list[list[np.ndarray]] = [[], []]
        for number, own in enumerate(self.changes[:, self.rest]):
            mixed = np.random.default_rng([*np.asarray(jax.random.key_data(self.key)).tolist(), number])
            for part, rows in zip(parts, (self.rest[own], self.rest[~own]), strict=True):
                part.append(mixed.permutation(rows))
        n = max(len(rows) for part in parts for rows in part)
        change, keep = (np.stack([np.resize(rows, n) for rows in part], axis=1) for part in parts)
        return {"change": change, "keep": keep}

    def learn(
        self, seen: _Seen, *, file: str | os.PathLike[str] | None, progress: Progress | bool | None
    ) -> tuple[Fit, dict[str, Array]]:
        """The fit, and the edits `[R, …]` in the site's own units."""
        import optax

        n, scale = seen.values.shape[-1], seen.scale
        units = {"read": 1 / (scale * n**0.5), "write": scale, "bias": 1.0}
        answers = jnp.asarray(self.answers, jnp.int32)

        def loss(parameters: Any, example: Any) -> Array:
            own, number = {name: parameters[name] * unit for name, unit in units.items()}, parameters["number"]
            change, keep = example["change"][number], example["keep"][number]
            new, old = (
                jax.nn.log_softmax(_edited(seen.model, own, seen.rows(row), seen.site, seen.layer))
                for row in (change, keep)
            )
            before = seen.log_p[keep]
            moved = jnp.sum(jnp.exp(before) * (before - old))
            read = _read(seen.values[keep], jnp.asarray(seen.mask)[keep], own["read"], own["bias"])
            return -new[answers[number, change]] + moved + self.penalty * jnp.sum(read)

        found = fit(
            loss, self.start(seen), self.pairs(), steps=self.steps, batch_size=min(self.batch_size, len(self.pairs()["keep"])),
            optimiser=optax.adam(self.learning_rate), key=self.key, many=1, file=file, progress=progress,
        )  # fmt: skip
        return found, {name: found.parameters[name] * unit for name, unit in units.items()}

    def start(self, seen: _Seen) -> dict[str, np.ndarray]:
        """Reads what prompts to change have more of on average than those to keep, and writes nothing."""
        values, mask = np.asarray(seen.values, np.float32), np.asarray(seen.mask)[..., None]
        mean = (values * mask).sum(axis=1) / mask.sum(axis=1)
        own = self.changes[:, self.rest].astype(np.float32)
        means = [np.einsum("rb,be->re", x / x.sum(axis=1, keepdims=True), mean[self.rest]) for x in (own, 1 - own)]
        read = means[0] - means[1]
        read *= read.shape[1] ** 0.5 / np.maximum(np.linalg.norm(read, axis=1, keepdims=True), 1e-30)
        n = len(read)
        zeros = {"write": np.zeros_like(read), "bias": np.zeros(n, np.float32)}
        return {"read": read, **zeros, "number": np.arange(n, dtype=np.int32)}

    def hits(self, seen: _Seen, own: dict[str, Array]) -> Float[np.ndarray, "R M"]:
        """1 where a held-out prompt says what it is to say, else 0."""
        said = _likeliest(seen.model, own, seen.rows(self.held), seen.site, seen.layer)
        want = np.where(self.changes, self.answers, seen.said)[:, self.held]
        return (np.asarray(said) == want).astype(np.float32)

    def read(self, seen: _Seen, own: dict[str, Array]) -> Float[np.ndarray, "R B"]:
        """The most that is read at a token of each prompt."""
        each = [_read(seen.values, jnp.asarray(seen.mask), *x) for x in zip(own["read"], own["bias"], strict=True)]
        return np.stack([np.asarray(x.max(axis=-1)) for x in each])

    def most(self, seen: _Seen, own: dict[str, Array]) -> Float[np.ndarray, "R"]:
        """Its mean over the prompts to change that the edits were fitted on."""
        read, chosen = self.read(seen, own)[:, self.rest], self.changes[:, self.rest]
        return ((read * chosen).sum(axis=1) / chosen.sum(axis=1)).astype(np.float32)


def _read(
    values: Float[Array, "... T n"], mask: Bool[Array, "... T"], read: Float[Array, " n"], bias: Float[Array, ""]
) -> Float[Array, "... T"]:
    """What a `RankOne` reads at each token, 0 at padding."""
    found = jnp.einsum("...n,n->...", values.astype(read.dtype), read, precision="highest") + bias
    return jnp.where(mask, jnp.maximum(found, 0), 0)
