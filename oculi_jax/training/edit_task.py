"""What rank-one edits are to do to prompts, how they are learnt, and whether they do it."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from ..arrays import AnyArray
from ..backends.jax.compiled import compiled
from ..capture import CaptureSpec
from ..intervention import RankOne
from ..run import forward
from .fitting import Fit, fit
from .running import AT_ONCE, likeliest, logits_from

if TYPE_CHECKING:
    from ..models.decoder.model import Decoder
    from ..sweeps.running import Progress


@dataclass(frozen=True)
class Seen:
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
    def of(cls, model: Decoder, tokens: AnyArray, mask: AnyArray, site: str, layer: int) -> Seen:
        resid, values, log_p = _run(model, tokens, mask, site, layer)
        scale = float(jnp.sqrt(jnp.mean(values[np.asarray(mask)].astype(jnp.float32) ** 2)))
        return cls(model, site, layer, tokens, mask, resid, values, log_p, scale)

    @property
    def said(self) -> Int[np.ndarray, " B"]:
        """The likeliest token after each."""
        return np.asarray(self.log_p.argmax(axis=-1))

    @property
    def edit(self) -> _Edit:
        return _Edit(self.site, self.layer)

    def examples(self, rows: Int[AnyArray, "..."]) -> dict[str, Array]:
        """Some of the prompts, or one, as `logits_from` takes them."""
        every = {"tokens": self.tokens, "mask": self.mask, "resid": self.resid}
        return {name: jnp.asarray(x)[rows] for name, x in every.items()}


@compiled("site", "layer")
def _run(model: Decoder, tokens: AnyArray, mask: AnyArray, site: str, layer: int) -> tuple[Array, Array, Array]:
    def one(prompt: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        spec = CaptureSpec(tuple(dict.fromkeys(("resid_pre", site))), [layer])
        out = forward(model, prompt[0], capture=spec, mask=prompt[1], logits="last")
        assert out.logits is not None
        return out["resid_pre"][0], out[site][0], jax.nn.log_softmax(out.logits)

    return jax.lax.map(one, (tokens, mask), batch_size=min(len(tokens), AT_ONCE))


@dataclass(frozen=True)
class _Edit:
    """The edit that parameters are."""

    site: str
    layer: int

    def __call__(self, own: dict[str, Array], _: object) -> RankOne:
        return RankOne(self.site, self.layer, own["read"], own["write"], own["bias"])


@dataclass(frozen=True)
class Task:
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

    def seeded(self, seeds: int) -> Task:
        """As many of each edit, which differ in the order of prompts: all edits once, and once more."""
        return replace(self, **{name: np.tile(getattr(self, name), (seeds, 1)) for name in ("answers", "changes")})

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
        self, seen: Seen, *, file: str | os.PathLike[str] | None, progress: Progress | bool | None
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
                jax.nn.log_softmax(logits_from(seen.model, seen.edit(own, None), seen.layer, seen.examples(row)))
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

    def start(self, seen: Seen) -> dict[str, np.ndarray]:
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

    def hits(self, seen: Seen, own: dict[str, Array]) -> Float[np.ndarray, "R M"]:
        """1 where a held-out prompt says what it is to say, else 0."""
        said = likeliest(seen.model, own, seen.examples(self.held), seen.edit, seen.layer)
        want = np.where(self.changes, self.answers, seen.said)[:, self.held]
        return (np.asarray(said) == want).astype(np.float32)

    def read(self, seen: Seen, own: dict[str, Array]) -> Float[np.ndarray, "R B"]:
        """The most that is read at a token of each prompt."""
        each = [_read(seen.values, jnp.asarray(seen.mask), *x) for x in zip(own["read"], own["bias"], strict=True)]
        return np.stack([np.asarray(x.max(axis=-1)) for x in each])

    def most(self, seen: Seen, own: dict[str, Array]) -> Float[np.ndarray, "R"]:
        """Its mean over the prompts to change that the edits were fitted on."""
        read, chosen = self.read(seen, own)[:, self.rest], self.changes[:, self.rest]
        return ((read * chosen).sum(axis=1) / chosen.sum(axis=1)).astype(np.float32)


def _read(
    values: Float[Array, "... T n"], mask: Bool[Array, "... T"], read: Float[Array, " n"], bias: Float[Array, ""]
) -> Float[Array, "... T"]:
    """What a `RankOne` reads at each token, 0 at padding."""
    found = jnp.einsum("...n,n->...", values.astype(read.dtype), read, precision="highest") + bias
    return jnp.where(mask, jnp.maximum(found, 0), 0)
