"""The Jacobian lens: what a layer's stream does, to first order and on average, to the stream that the last layer leaves.

Gurnee et al. (2026), "Verbalizable Representations Form a Global Workspace in Language Models", Transformer Circuits Thread.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from ..arrays import AnyArray, check_host, integer, listing, random_key, wide
from ..backends import check_model
from ..backends.jax.compiled import compiled
from ..capture import CaptureSpec
from ..data.record import contents, describe
from ..intervention import Edit, PerLayer
from ..intervention.edit import site_shaped
from ..prompts import bucket
from ..pytrees import pytree
from ..run import forward
from ..sweeps.running import check_progress, told
from ..utils.files import write_aside
from ..utils.torch_files import read_torch, write_torch
from .controls import untrained
from .lenses import FittedLens, by_prompt, check_rows, divergences, rows_of
from .resuming import Saved, path_of
from .splitting import apart

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..models.decoder.config import DecoderConfig
    from ..models.decoder.model import Decoder
    from ..sweeps.running import Progress

_AT_ONCE = 4096  # tokens × output dimensions that a backward pass is of


@pytree
class JacobianLens:
    """A matrix for each layer: h ↦ J h, before the final norm and the unembedding.

    Attributes:
        matrix: `[L, E, E]`, output axis before input axis; of the last layer the identity.
        n_prompts: of how many prompts it is the mean.

    Examples:
        >>> JacobianLens.identity(model.config)
        JacobianLens(matrix [4, 192, 192], 0 prompts)
    """

    kind: ClassVar[str] = "jacobian"
    matrix: Float[Array, "L E E"]
    n_prompts: Int[AnyArray, ""]

    @classmethod
    def identity(cls, config: DecoderConfig) -> JacobianLens:
        """The lens that moves nothing, float32: the logit lens.

        Examples:
            >>> bool((JacobianLens.identity(model.config).matrix[0] == np.eye(192)).all())
            True
        """
        one = jnp.eye(config.hidden_size, dtype=jnp.float32)
        return cls(jnp.repeat(one[None], config.num_hidden_layers, axis=0), np.array(0, np.int32))

    def __repr__(self) -> str:
        return f"JacobianLens(matrix {listing(self.matrix.shape)}, {self.n_prompts} prompts)"

    def check(self, config: DecoderConfig) -> None:
        """Raises ValueError where this lens does not fit a model of this shape.

        Examples:
            >>> JacobianLens.identity(model.config).check(model.config)
        """
        need = (config.num_hidden_layers, config.hidden_size, config.hidden_size)
        if self.matrix.shape != need:
            raise ValueError(
                f"This Jacobian lens has matrices {listing(self.matrix.shape)}, and this model needs {listing(need)}: it was made "
                "for another model."
            )

    def translate(self, resid: Float[Array, "L T E"], layers: tuple[int, ...]) -> Float[Array, "L T E"]:
        """What the last layer's residual stream has of these layers', to first order.

        Args:
            resid: `[L, T, E]`, the residual stream after each of `layers`.
            layers: true layer numbers of the leading axis; static.

        Returns:
            `[L, T, E]` of the dtype of `resid`, computed in float32 or wider.

        Raises:
            ValueError: layers that the lens does not have, or another number of them than rows.

        Examples:
            >>> JacobianLens.identity(model.config).translate(capture.residual.post_mlp[2:], (2, 3)).shape
            (2, 6, 192)
        """
        matrix = self.matrix[rows_of(resid, layers, *self.matrix.shape[:2])]
        dtype = jnp.promote_types(wide(resid.dtype), self.matrix.dtype)
        return jnp.einsum(
            "lij,ltj->lti", matrix.astype(dtype), resid.astype(dtype), precision=jax.lax.Precision.HIGHEST
        ).astype(resid.dtype)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file that such lenses are published as, whole or not at all: TransformerLens and `jacobian-lens` read it.

        It is what `torch.save` makes of `{"J": {layer: [E, E]}, "n_prompts", "source_layers", "d_model"}`, in float32, of all
        layers but the last.

        Raises:
            OSError: it cannot be written. ValueError: the last layer's matrix is not the identity, which the format takes it for.

        Examples:
            >>> JacobianLens.identity(model.config).save("lens.pt")
        """
        matrix = np.asarray(self.matrix, np.float32)
        if (matrix[-1] != np.eye(matrix.shape[-1])).any():
            raise ValueError(
                "The last layer's matrix is not the identity, and the published format has no place for it."
            )
        layers = list(range(len(matrix) - 1))
        values = {"J": dict(enumerate(matrix[:-1])), "n_prompts": int(self.n_prompts), "source_layers": layers}
        with write_aside(path) as aside, aside.open("wb") as file:
            write_torch(file, {**values, "d_model": matrix.shape[-1]})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> JacobianLens:
        """Reads a lens as they are published, those of `neuronpedia/jacobian-lens` for instance. Nothing in the file is run.

        Raises:
            OSError: there is no such file. ValueError: it is no file of a lens that has every layer but the last.

        Examples:
            >>> JacobianLens.identity(model.config).save("lens.pt")
            >>> JacobianLens.load("lens.pt")
            JacobianLens(matrix [4, 192, 192], 0 prompts)
        """
        path = Path(path).expanduser()
        found = read_torch(path)
        found = found if isinstance(found, dict) else {}
        matrices, width, n_prompts = found.get("J"), found.get("d_model"), found.get("n_prompts", 0)
        if (
            not isinstance(matrices, dict)
            or not matrices
            or not isinstance(width, int)
            or not isinstance(n_prompts, int)
        ):
            raise ValueError(
                f"{str(path)!r} holds no Jacobian lens, which has 'J', 'n_prompts', 'source_layers' and 'd_model', but "
                f"{', '.join(map(repr, found)) or 'something else'}."
            )
        if isinstance(n_prompts, bool) or not 0 <= n_prompts < 2**31:
            raise ValueError(
                f"{str(path)!r} is the mean of {n_prompts!r} prompts, and a number from 0 to 2147483647 is needed."
            )
        if set(matrices) != set(range(len(matrices))):
            raise ValueError(
                f"{str(path)!r} holds matrices of the layers {sorted(matrices, key=str)}, and those of 0 to the last but one, "
                "each of them, are needed."
            )
        rows = [matrices[layer] for layer in range(len(matrices))]
        if any(getattr(x, "shape", None) != (width, width) or not jnp.issubdtype(x.dtype, jnp.floating) for x in rows):
            raise ValueError(
                f"{str(path)!r} holds matrices that are not [E, E] of floating-point numbers, E = {width}."
            )
        matrix = np.stack([*(x.astype(np.float32) for x in rows), np.eye(width, dtype=np.float32)])
        if not np.isfinite(matrix).all():
            raise ValueError(f"{str(path)!r} holds numbers that are not finite.")
        return cls(jnp.asarray(matrix), np.array(n_prompts, np.int32))


def fit_jacobian_lens(
    model: Decoder,
    tokens: ArrayLike,
    *,
    skip: int = 16,
    held_out: float = 0.25,
    key: Array,
    mask: ArrayLike | None = None,
    controls: bool = True,
    file: str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = None,
) -> FittedLens:
    """The Jacobian lens of a model: each layer's mean Jacobian of what the last layer leaves.

    J of a layer is the mean over prompts of `(1 / |V|) Σ_t Σ_{t' ≥ t} ∂ h_last,t' / ∂ h_t`, t and t' in V, the positions after the
    first `skip` and without the last. All layers of a prompt come of one backward pass for each of the E output dimensions, many of
    them side by side. The authors find some hundred prompts of 128 tokens enough. Derivatives are as exact as the model's dtype:
    take float32. Host function.

    Args:
        model: a model of any family.
        tokens: ids `[B, T]`. A prompt that has no such position is left out, with a warning.
        skip: how many leading positions are left out: their streams are like no others'.
        held_out: the share of prompts, drawn by the key, that are kept for judging.
        key: a JAX random key, of what is held out and of the untrained model: the lens is a mean, and has no chance in it.
        mask: bool `[B, T]`, True at real tokens.
        controls: whether to make a lens of an untrained model's Jacobians as well, and put it to this one's streams, for as much
            time again.
        file: as in `fit`: a file to go on from where there is one, and which is kept up to date.
        progress: a function of how many prompts are done and how many there are; None or True draws a bar, False nothing.

    Returns:
        A `FittedLens`, whose `lens` is float32 (float64 of a float64 model).

    Raises:
        ValueError, TypeError: ids, a mask or a number that cannot be; no prompt that is long enough.

    Examples:
        >>> rows = np.array([ids, other, ids[::-1], other[::-1]])
        >>> found = fit_jacobian_lens(model, rows, skip=1, key=jax.random.key(0), progress=False)
        >>> found.lens
        JacobianLens(matrix [4, 192, 192], 3 prompts)
    """
    config = check_model(model)
    skip = integer(skip, "skip", 0)
    check_progress(progress)
    check_host((model, tokens))
    ids, real = (np.asarray(x) for x in check_rows(config, tokens, mask))
    split, other = jax.random.split(random_key(key))
    held, rest = apart(jax.random.permutation(split, len(ids)), held_out)
    prompts = _long_enough([row[own] for row, own in zip(ids[rest], real[rest], strict=True)], skip)
    others = {"untrained weights": untrained(model, other)} if controls else {}
    saved = None
    if (path := path_of(file)) is not None:
        about = {
            "model": describe(model),
            "prompts": contents([prompts]),
            "skip": skip,
            "key": contents([jax.random.key_data(other)]),
        }
        saved = Saved.open(path, about)
    with told("Fitting the Jacobian lens", progress, (1 + len(others)) * len(prompts)) as advance:
        lens, *more = (
            JacobianLens(_mean(one, prompts, skip, name, saved, advance), np.array(len(prompts), np.int32))
            for name, one in {"lens": model, **others}.items()
        )
    beside = dict(zip(others, more, strict=True))
    kl, logit, *rest_kl = (
        np.asarray(divergences(one, model, None, ids[held], real[held])) for one in (lens, None, *beside.values())
    )
    known = {"logit lens": logit, **dict(zip(beside, rest_kl, strict=True))}
    return FittedLens(lens, kl, by_prompt(kl).mean(keepdims=True), known, None, held)


def _long_enough(prompts: list[Int[np.ndarray, "N"]], skip: int) -> list[Int[np.ndarray, "N"]]:
    """The prompts that have a position in V; a warning where some have not, ValueError where none has."""
    found = [prompt for prompt in prompts if len(prompt) >= skip + 2]
    if short := len(prompts) - len(found):
        said = (
            f"{short} of {len(prompts)} prompts to fit on have fewer than {skip + 2} tokens, and so none after the first {skip} "
            "and before the last"
        )
        if not found:
            raise ValueError(f"{said}: give longer ones, or a smaller skip.")
        warnings.warn(f"{said}: they are left out.", stacklevel=3)
    return found


def _mean(
    model: Decoder,
    prompts: list[Int[np.ndarray, "N"]],
    skip: int,
    name: str,
    saved: Saved | None,
    advance: Callable[[int], None],
) -> Float[Array, "L E E"]:
    """The mean of the prompts' Jacobians; a file has their sum so far by this name."""
    width, dtype = model.config.hidden_size, wide(model.dtype)
    total, done = jnp.zeros((model.config.num_hidden_layers, width, width), dtype), 0
    if saved is not None and name in saved.held:
        total = jnp.asarray(saved.array(name, total.shape, total.dtype))
        done = int(saved.array(f"{name} done", (), np.int64))
        if not 0 < done <= len(prompts):
            raise saved.damaged(f"{name} done")
    advance(done)
    for number, prompt in enumerate(prompts[done:], done + 1):
        total = jax.block_until_ready(_added(total, model, *_placed(prompt, skip), _block(width, len(prompt))))
        if saved is not None:
            saved.keep({name: total, f"{name} done": np.array(number)}, always=number == len(prompts))
        advance(1)
    return total / len(prompts)


def _placed(
    prompt: Int[np.ndarray, "N"], skip: int
) -> tuple[Int[np.ndarray, "T"], Bool[np.ndarray, "T"], Bool[np.ndarray, "T"]]:
    """A prompt's ids, padded to a length that near ones share, which of them are real, and which are in V."""
    n, places = len(prompt), np.arange(bucket(len(prompt)))
    ids = np.zeros(len(places), np.int32)
    ids[:n] = prompt
    return ids, places < n, (places >= skip) & (places < n - 1)


def _block(width: int, n_tokens: int) -> int:
    """How many output dimensions a backward pass is of: a divisor of all of them."""
    most = max(1, _AT_ONCE // bucket(n_tokens))
    return max(size for size in range(1, min(width, most) + 1) if width % size == 0)


@site_shaped
def _plus(x: Array, value: Array) -> Array:
    """In float32 or wider, so that what comes back over tokens is summed there, of a model in half precision too."""
    return x + value


@compiled("block", donate=("total",))
def _added(
    total: Float[Array, "L E E"],
    model: Decoder,
    ids: Int[AnyArray, "T"],
    real: Bool[AnyArray, "T"],
    valid: Bool[AnyArray, "T"],
    block: int,
) -> Float[Array, "L E E"]:
    """The sum, with the Jacobians of another prompt."""
    n_layers, width = total.shape[:2]
    places = jnp.broadcast_to(valid[None, :, None], (n_layers, len(ids), 1))

    def last(added: Float[Array, "L 1 E"]) -> Float[Array, " E"]:
        """The sum over V of what the last layer leaves, with something added to each layer's stream at each position of V."""
        there = Edit("resid_post", "apply", None, places, PerLayer(added), _plus)
        spec = CaptureSpec("resid_post", [n_layers - 1])
        left = forward(model, ids, there, capture=spec, mask=real, logits="none")["resid_post"][0]
        return jnp.sum(jnp.where(valid[:, None], left, jnp.zeros((), left.dtype)), axis=0, dtype=total.dtype)

    # What is added to all of V alike has the sum over V of the derivatives at each; causality leaves t' ≥ t.
    _, back = jax.vjp(last, jnp.zeros((n_layers, 1, width), total.dtype))
    rows = jax.lax.map(lambda seed: back(seed)[0][:, 0], jnp.eye(width, dtype=total.dtype), batch_size=block)
    return total + jnp.swapaxes(rows, 0, 1) / jnp.sum(valid, dtype=total.dtype)
