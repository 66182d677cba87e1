"""The tuned lens: one affine map a layer, fitted so that the logit lens after it says what the model will say.

Belrose et al. (2023), "Eliciting Latent Predictions from Transformers with the Tuned Lens", arXiv:2303.08112.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Bool, Float, Int

from ..arrays import AnyArray, as_array, integer, listing
from ..backends import check_model
from ..backends.jax.compiled import compiled
from ..capture import CaptureSpec
from ..prompts import check_tokens
from ..pytrees import pytree
from ..run import forward
from ..utils.files import read_tensors, write_aside, write_tensors
from ..utils.progress import progress

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..models.decoder.config import DecoderConfig
    from ..models.decoder.model import Decoder

FORMAT = "oculi_jax tuned lens 1"


@pytree
class TunedLens:
    """A translator for each layer: h ↦ h + W h + b, before the final norm and the unembedding.

    At the last layer `train_tuned_lens` leaves it the identity: there the lens is the model itself.

    Attributes:
        weight: `[L, E, E]`, output axis before input axis; the paper's matrix less the identity.
        bias: `[L, E]`.

    Examples:
        >>> TunedLens.identity(model.config)
        TunedLens(weight [4, 192, 192], bias [4, 192])
    """

    weight: Float[Array, "L E E"]
    bias: Float[Array, "L E"]

    @classmethod
    def identity(cls, config: DecoderConfig) -> TunedLens:
        """The lens that translates nothing, float32: the logit lens. TypeError for what is no config.

        Examples:
            >>> bool((TunedLens.identity(model.config).weight == 0).all())
            True
        """
        if not hasattr(config, "num_hidden_layers"):
            raise TypeError(
                f"TunedLens.identity takes a config, model.config, and was given a {type(config).__name__}."
            )
        n_layers, width = config.num_hidden_layers, config.hidden_size
        return cls(jnp.zeros((n_layers, width, width), jnp.float32), jnp.zeros((n_layers, width), jnp.float32))

    def __repr__(self) -> str:
        return f"TunedLens(weight {listing(self.weight.shape)}, bias {listing(self.bias.shape)})"

    def check(self, config: DecoderConfig) -> None:
        """Raises ValueError where this lens does not fit a model of this shape.

        Examples:
            >>> TunedLens.identity(model.config).check(model.config)
        """
        n_layers, width = config.num_hidden_layers, config.hidden_size
        have, need = (self.weight.shape, self.bias.shape), ((n_layers, width, width), (n_layers, width))
        if have != need:
            raise ValueError(
                f"This tuned lens has weight {listing(have[0])} and bias {listing(have[1])}, and this model needs "
                f"{listing(need[0])} and {listing(need[1])}: it was made for another model."
            )

    def translate(self, resid: Float[Array, "L T E"], layers: tuple[int, ...]) -> Float[Array, "L T E"]:
        """What the last layer's residual stream would be, judged from these layers'.

        Args:
            resid: `[L, T, E]`, the residual stream after each of `layers`.
            layers: true layer numbers of the leading axis; static.

        Returns:
            `[L, T, E]` of the dtype of `resid`, computed in float32.

        Raises:
            ValueError: layers that the lens does not have, or another number of them than rows.

        Examples:
            >>> TunedLens.identity(model.config).translate(capture.residual.post_mlp[2:], (2, 3)).shape
            (2, 6, 192)
        """
        n_layers, width = self.bias.shape
        layers = tuple(int(layer) for layer in layers)
        if wrong := [layer for layer in layers if not 0 <= layer < n_layers]:
            raise ValueError(f"layers holds {wrong}, and this tuned lens has layers 0 to {n_layers - 1}.")
        if resid.ndim != 3 or resid.shape[0] != len(layers) or resid.shape[2] != width:
            raise ValueError(
                f"resid has shape {listing(resid.shape)}, and [L, T, E] with L = {len(layers)} layers and E = {width} is "
                "needed."
            )
        weight, bias = self.weight, self.bias
        if layers != tuple(range(n_layers)):
            weight, bias = weight[np.array(layers)], bias[np.array(layers)]
        return jax.vmap(_translated)(weight, bias, resid)

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Writes a safetensors file, whole or not at all; `metadata` are texts to keep in it, such as the model's name.

        Raises:
            OSError: it cannot be written. ValueError: metadata named `format`.

        Examples:
            >>> TunedLens.identity(model.config).save("tuned.safetensors", {"model": "tiny-facts"})
        """
        if "format" in (metadata or {}):
            raise ValueError("metadata holds 'format', which is written anyway; use another name.")
        tensors = {"weight": np.asarray(self.weight, order="C"), "bias": np.asarray(self.bias, order="C")}
        with write_aside(path) as aside:
            write_tensors(aside, tensors, {**(metadata or {}), "format": FORMAT}, name=Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TunedLens:
        """Reopens what `save` wrote.

        Raises:
            OSError: there is no such file. ValueError: it is no whole file of a tuned lens.

        Examples:
            >>> TunedLens.identity(model.config).save("tuned.safetensors")
            >>> TunedLens.load("tuned.safetensors")
            TunedLens(weight [4, 192, 192], bias [4, 192])
        """
        path = Path(path).expanduser()
        arrays, header = read_tensors(path)
        if header.get("format") != FORMAT or set(arrays) != {"weight", "bias"}:
            raise ValueError(f"{path} is a safetensors file, but no tuned lens: it lacks what TunedLens.save writes.")
        weight, bias = arrays["weight"], arrays["bias"]
        if bias.ndim != 2 or weight.shape != (*bias.shape, bias.shape[1]):
            raise ValueError(
                f"{path} has weight {listing(weight.shape)} and bias {listing(bias.shape)}, and a tuned lens has "
                "[L, E, E] and [L, E]."
            )
        if not all(
            jnp.issubdtype(x.dtype, jnp.floating) and np.isfinite(x.astype(np.float32)).all() for x in (weight, bias)
        ):
            raise ValueError(f"{path} holds a lens that is not of finite floating-point numbers.")
        return cls(jnp.asarray(weight), jnp.asarray(bias))


def train_tuned_lens(
    model: Decoder,
    tokens: ArrayLike | Iterable[ArrayLike],
    *,
    n_steps: int,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    seed: int = 0,
    mask: ArrayLike | None = None,
) -> tuple[TunedLens, Float[np.ndarray, "N L"]]:
    """Fits a tuned lens: each layer's mean KL(model's distribution ‖ lens's), over all real positions, with Adam.

    The learning rate falls linearly to 0. Layers do not influence each other; the model is left as it is. Beside the
    model's own activations, only one layer's logits `[B, T, V]` are held at a time. One program is compiled for each shape
    of a batch. Host function.

    Args:
        model: a model of any family, or a Hugging Face one.
        tokens: ids `[N, T]` as one array, of which each step takes `batch_size` rows, all rows once before any twice; or
            any iterable of batches `[B, T]`, one a step.
        n_steps: how many steps; fewer are made where the batches run out.
        batch_size: rows a step, of an array; at most its number.
        learning_rate: of the first step.
        seed: of the order of the rows.
        mask: bool `[N, T]`, True at real tokens of an array.

    Returns:
        The lens, float32, and the losses `[number of steps, L]`: each layer's mean KL in nats on the batch of each step,
        before that step; 0 at the last layer.

    Raises:
        ValueError, TypeError: ids, a mask or a number that cannot be; no batch at all.

    Examples:
        >>> tuned, losses = train_tuned_lens(model, np.array([ids, other]), n_steps=10)
        >>> losses.shape, bool((losses[-1, :3] < losses[0, :3]).all())
        ((10, 4), True)
    """
    config = check_model(model)
    n_steps, batch_size = integer(n_steps, "n_steps", 1), integer(batch_size, "batch_size", 1)
    if isinstance(learning_rate, bool) or not isinstance(learning_rate, int | float | np.number):
        raise TypeError(f"learning_rate is {learning_rate!r}, and a number is needed.")
    if not 0 < learning_rate <= 1e3:
        raise ValueError(f"learning_rate is {learning_rate!r}, and must be above 0, and at most 1000.")
    seed = integer(seed, "seed", 0)
    if hasattr(tokens, "shape"):
        batches = _sampled(*_check_batch(tokens, mask, config), batch_size, seed)
    elif mask is not None:
        raise ValueError("mask goes with tokens [N, T] as one array; an iterable of batches must be without padding.")
    else:
        several: Any = tokens
        batches = (_check_batch(batch, None, config) for batch in several)

    # The last layer has nothing to learn; under Adam even the rounding of its zero gradient would move it.
    whole = TunedLens.identity(config)
    lens = TunedLens(whole.weight[:-1], whole.bias[:-1])
    state = optax.scale_by_adam().init(lens)  # type: ignore[arg-type]
    losses = []
    with progress("Fitting the tuned lens", n_steps) as advance:
        for step, (ids, real) in zip(range(n_steps), batches, strict=False):
            rate = np.float32(learning_rate * (1 - step / n_steps))
            lens, state, loss = _step(lens, state, model, ids, real, rate)
            losses.append(np.append(loss, np.float32(0)))
            advance(1)
    if not losses:
        raise ValueError("There is no batch: tokens is empty.")
    weight = jnp.concatenate([lens.weight, whole.weight[-1:]])
    return TunedLens(weight, jnp.concatenate([lens.bias, whole.bias[-1:]])), np.stack(losses)


def tuned_lens_kl(
    model: Decoder, lens: TunedLens, tokens: ArrayLike, mask: ArrayLike | None = None
) -> Float[Array, " L"]:
    """How far a tuned lens is from what the model says: each layer's mean KL(model ‖ lens) over real positions, in nats.

    Args:
        model: a model of any family, or a Hugging Face one.
        lens: a `TunedLens`; `TunedLens.identity(model.config)` measures the logit lens.
        tokens: ids `[B, T]`, better ones that it was not fitted on.
        mask: bool `[B, T]`, True at real tokens.

    Returns:
        `[L]`, differentiable with respect to `lens`.

    Raises:
        ValueError, TypeError: a lens of another model or none, ids or a mask that cannot be.

    Examples:
        >>> kl = tuned_lens_kl(model, TunedLens.identity(model.config), np.array([ids, other]))
        >>> [round(float(x), 1) for x in kl]
        [2.3, 1.5, 0.6, 0.0]
    """
    config = check_model(model)
    if not isinstance(lens, TunedLens):
        raise TypeError(f"lens is a {type(lens).__name__}, and a TunedLens is needed.")
    lens.check(config)
    return _mean_kl(lens, model, *_check_batch(tokens, mask, config))


@compiled()
def _mean_kl(
    lens: TunedLens, model: Decoder, tokens: Int[AnyArray, "B T"], mask: Bool[AnyArray, "B T"]
) -> Float[Array, " L"]:
    resid, log_p = _run(model, tokens, mask, model.config.num_hidden_layers)
    one = jax.checkpoint(lambda row: _layer_kl(row[:2], row[2], model, log_p, mask.reshape(-1)))
    return jax.lax.map(one, (lens.weight, lens.bias, resid))


@compiled(donate=("lens", "state"))
def _step(
    lens: TunedLens,
    state: Any,
    model: Decoder,
    tokens: Int[AnyArray, "B T"],
    mask: Bool[AnyArray, "B T"],
    rate: AnyArray | np.floating,
) -> tuple[TunedLens, Any, Float[Array, " L"]]:
    """One step on the layers that `lens` has; the learning rate is data."""
    resid, log_p = _run(model, tokens, mask, lens.bias.shape[0])

    def one(row: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        # A layer's loss knows its own translator alone, so its gradient is taken here and no other layer's is held.
        return jax.value_and_grad(_layer_kl)(row[:2], row[2], model, log_p, mask.reshape(-1))

    losses, gradient = jax.lax.map(one, (lens.weight, lens.bias, resid))
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the power of an int32 count
        updates, state = optax.scale_by_adam().update(TunedLens(*gradient), state)  # type: ignore[arg-type]
    return jax.tree.map(lambda x, u: x - rate * u, lens, updates), state, losses


def _run(
    model: Decoder, tokens: AnyArray, mask: AnyArray, n_layers: int
) -> tuple[Float[Array, "L N E"], Float[Array, "N V"]]:
    """Residual streams after the first layers and the model's log-probabilities, `N` = B · T."""

    def one(tokens: AnyArray, mask: AnyArray) -> tuple[Array, Array]:
        spec = (CaptureSpec("resid_post", range(n_layers)),) if n_layers else ()
        out = forward(model, tokens, capture=spec, logits="all", mask=mask)
        assert out.logits is not None
        none = jnp.zeros((0, tokens.shape[0], width), model.dtype)  # of a model with one layer
        return out.activations.get("resid_post", none), jax.nn.log_softmax(out.logits, axis=-1)

    width = model.config.hidden_size
    resid, log_p = jax.vmap(one, out_axes=(1, 0))(tokens, mask)
    return resid.reshape(n_layers, tokens.size, width), log_p.reshape(tokens.size, -1)


def _translated(
    weight: Float[Array, "E E"], bias: Float[Array, " E"], rows: Float[Array, "N E"]
) -> Float[Array, "N E"]:
    """h + W h + b, in float32."""
    wide = rows.astype(jnp.float32)
    moved = jnp.einsum("nj,ij->ni", wide, weight.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return (wide + moved + bias.astype(jnp.float32)[None, :]).astype(rows.dtype)


def _layer_kl(
    translator: tuple[Array, Array], rows: Array, model: Decoder, log_p: Array, real: AnyArray
) -> Float[Array, ""]:
    """One layer's mean KL(model ‖ lens) over real rows, in nats."""
    rows = model.normalise(_translated(*translator, rows), lambda _, value: value)
    log_q = jax.nn.log_softmax(model.logits(rows), axis=-1)
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return jnp.sum(jnp.where(real, kl, 0.0)) / jnp.sum(real, dtype=jnp.float32)


def _check_batch(tokens: Any, mask: Any, config: DecoderConfig) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask `[B, T]` on the host, int32 and bool."""
    ids = np.asarray(as_array(tokens))
    if ids.ndim != 2 or not ids.size:
        raise ValueError(
            f"tokens has shape {listing(ids.shape)}, and ids [N, T] as one array, or batches [B, T], are needed."
        )
    ids = np.asarray(check_tokens(ids.reshape(-1), config.vocab_size)).reshape(ids.shape)
    real = np.ones(ids.shape, bool) if mask is None else np.asarray(as_array(mask))
    if real.shape != ids.shape or real.dtype != bool:
        raise ValueError(
            f"mask has shape {listing(real.shape)} and dtype {real.dtype}, and bool {listing(ids.shape)} is needed."
        )
    if not real.any(axis=1).all():
        raise ValueError(f"mask is False everywhere in row {int(real.any(axis=1).argmin())}: there is no real token.")
    return ids, real


def _sampled(ids: np.ndarray, real: np.ndarray, batch_size: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of rows without end, all of one size, every row once before any twice."""
    rng = np.random.default_rng(seed)
    size = min(batch_size, len(ids))
    order = np.zeros(0, np.int64)
    while True:
        if len(order) < size:
            order = np.concatenate([order, rng.permutation(len(ids))])
        rows, order = order[:size], order[size:]
        yield ids[rows], real[rows]
