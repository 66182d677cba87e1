"""The tuned lens: one affine map a layer, fitted so that the logit lens after it says what the model will say.

Belrose et al. (2023), "Eliciting Latent Predictions from Transformers with the Tuned Lens", arXiv:2303.08112.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from ..arrays import check_host, integer, listing, number, random_key
from ..backends import check_model
from ..pytrees import pytree
from ..utils.files import read_tensors, write_aside, write_tensors
from .controls import orders, untrained
from .fitting import fit
from .lenses import FittedLens, by_prompt, check_rows, divergence, divergences, rows_of, streams
from .resuming import path_of
from .splitting import apart

if TYPE_CHECKING:
    import optax
    from numpy.typing import ArrayLike

    from ..models.decoder.config import DecoderConfig
    from ..models.decoder.model import Decoder
    from ..sweeps.running import Progress

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

    kind: ClassVar[str] = "tuned"
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
        rows = rows_of(resid, layers, *self.bias.shape)
        return jax.vmap(_translated)(self.weight[rows], self.bias[rows], resid)

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
    tokens: ArrayLike,
    *,
    steps: int,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    held_out: float = 0.25,
    seeds: int = 1,
    key: Array,
    mask: ArrayLike | None = None,
    controls: bool = True,
    file: str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = None,
) -> FittedLens:
    """Fits a tuned lens: each layer's mean KL(model's distribution ‖ lens's), with Adam.

    Every real token weighs alike: a prompt's loss is the sum over its real tokens over the mean number that a prompt has, so that
    its mean over prompts is the mean over tokens. The learning rate falls linearly to 0. Layers do not influence each other; the
    model is left as it is. Beside the model's own activations, one layer's logits `[B, T, V]` are held at a time. Host function.

    Args:
        model: a model of any family.
        tokens: ids `[B, T]`.
        steps: how many.
        batch_size: prompts a step; at most as many as are fitted on.
        learning_rate: of the first step.
        held_out: the share of prompts, drawn by the key, that are kept for judging.
        seeds: how many fits, as one program, each with an order of prompts of its own; what the first found is returned.
        key: a JAX random key: of what is held out, of the order of prompts, of the untrained model.
        mask: bool `[B, T]`, True at real tokens.
        controls: whether to fit a lens to the streams of an untrained model as well, by which it is to say what this one says, for
            somewhat more than as much time again. What it can say, the translators say by themselves.
        file: as in `fit`; that of the control has `-untrained` in its name.
        progress: as in `fit`.

    Returns:
        A `FittedLens`, whose `lens` is float32, and whose `losses` are in nats.

    Raises:
        ValueError, TypeError: ids, a mask or a number that cannot be.

    Examples:
        >>> rows = np.array([ids, other, ids[::-1], other[::-1]])
        >>> found = train_tuned_lens(model, rows, steps=20, batch_size=3, key=jax.random.key(0), progress=False)
        >>> found.lens, bool(found.losses[-1] < found.losses[0])
        (TunedLens(weight [4, 192, 192], bias [4, 192]), True)
    """
    config = check_model(model)
    learning_rate = number(learning_rate, "learning_rate")
    if config.num_hidden_layers == 1:
        raise ValueError("This model has one layer, after which it speaks for itself: there is nothing to translate.")
    steps, batch_size, seeds = (
        integer(steps, "steps", 1),
        integer(batch_size, "batch_size", 1),
        integer(seeds, "seeds", 1),
    )
    check_host((model, tokens))
    path = path_of(file)
    ids, real = (np.asarray(x) for x in check_rows(config, tokens, mask))
    split, order, other = jax.random.split(random_key(key), 3)
    held, rest = apart(jax.random.permutation(split, len(ids)), held_out)
    data, n_real = (
        {"tokens": jnp.asarray(ids[rest]), "mask": jnp.asarray(real[rest])},
        float(real[rest].sum() / len(rest)),
    )

    def fitted(
        reads: Decoder | None, file: Path | None, seeds: int
    ) -> tuple[list[TunedLens], list[np.ndarray], np.ndarray]:
        """Of each seed the lens, how far it is from the model, and the losses."""
        loss, identity = _loss_of(model, reads, n_real), TunedLens.identity(config)

        def of_seed(parameters: dict[str, Any], rows: Array) -> Array:
            return loss(parameters["lens"], jax.tree.map(lambda x: x[rows[parameters["seed"]]], data))

        # The last layer has nothing to learn.
        begin = jax.tree.map(lambda x: np.zeros((seeds, x.shape[0] - 1, *x.shape[1:]), x.dtype), identity)
        start = {"lens": begin, "seed": np.arange(seeds, dtype=np.int32)}
        found = fit(
            of_seed, start, orders(len(rest), seeds, order), steps=steps, batch_size=min(batch_size, len(rest)), key=order, many=1,
            optimiser=_adam(learning_rate, steps), file=file, progress=progress,
        )  # fmt: skip
        own = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 1), *((0, 0),) * (x.ndim - 2))), found.parameters["lens"])
        lenses = [jax.tree.map(lambda x, seed=seed: x[seed], own) for seed in range(seeds)]
        return (
            lenses,
            [np.asarray(divergences(lens, model, reads, ids[held], real[held])) for lens in lenses],
            found.losses,
        )

    lenses, kl, losses = fitted(None, path, seeds)
    beside = {"logit lens": np.asarray(divergences(None, model, None, ids[held], real[held]))}
    if controls:
        own = None if path is None else path.with_stem(f"{path.stem}-untrained")
        beside["untrained weights"] = fitted(untrained(model, other), own, 1)[1][0]
    by_seed = np.array([by_prompt(x).mean() for x in kl])
    return FittedLens(lenses[0], kl[0], by_seed, beside, losses[:, 0] / (config.num_hidden_layers - 1), held)


def _adam(learning_rate: float, steps: int) -> optax.GradientTransformation:
    import optax

    return optax.adam(optax.linear_schedule(learning_rate, 0.0, steps))


def _loss_of(model: Decoder, reads: Decoder | None, n_real: float) -> Callable[[TunedLens, dict[str, Array]], Array]:
    """The loss of one prompt: the sum over layers and real tokens of KL(model ‖ lens), over `n_real`.

    `reads` is whose streams the lens reads, where it is not the model itself.
    """

    def loss(lens: TunedLens, example: dict[str, Array]) -> Array:
        resid, log_p = streams(model, reads, example["tokens"], example["mask"], lens.bias.shape[0])
        moved = jax.vmap(_translated)(lens.weight, lens.bias, resid)

        def one(rows: Array) -> tuple[Array, Array]:
            # The slope is taken beside the value: both of one layer, whose logits then are let go of.
            return jax.value_and_grad(divergence)(rows, model, log_p, example["mask"])

        values, slopes = jax.lax.map(one, jax.lax.stop_gradient(moved))
        found = jnp.sum(values) + jnp.sum(slopes * (moved - jax.lax.stop_gradient(moved)), dtype=values.dtype)
        return found / n_real

    return loss


def _translated(
    weight: Float[Array, "E E"], bias: Float[Array, " E"], rows: Float[Array, "T E"]
) -> Float[Array, "T E"]:
    """h + W h + b, in float32."""
    wide = rows.astype(jnp.float32)
    moved = jnp.einsum("nj,ij->ni", wide, weight.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return (wide + moved + bias.astype(jnp.float32)[None, :]).astype(rows.dtype)
