"""`Decoder`: the network itself, as an immutable pytree of parameters whose pieces call `tap(site, value)` at each site.

The model knows one sequence `[T]` and nothing of edits or captures: whoever runs it decides what `tap` returns.
Layers are one `Block` whose leaves lead with `L`; `backends/jax/layers.py` runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from ... import cells
from ...arrays import wide
from .activations import ACTIVATIONS
from .attention import Sight, attend, einsum, said
from .config import DecoderConfig
from .rope import rotate

if TYPE_CHECKING:
    import os

    from numpy.typing import ArrayLike

    from ...arrays import AnyArray
    from ...intervention.protocol import Interventions
    from .derivatives import Derivatives


@runtime_checkable
class Tap(Protocol):
    """Who runs the model, seen from inside: called with each site's value, it returns what the pass goes on with; and its
    rules are how what lies between sites is differentiated.
    """

    @property
    def rules(self) -> Derivatives: ...

    def __call__(self, site: str, value: Array, /) -> Array: ...

    def touches(self, *sites: str) -> bool:
        """Whether anybody reads or edits one of these, known before anything runs: what nobody does need not exist."""
        ...


# Keys and values of the tokens that run → those of all that may be looked at: where a cache, or another run's, is put in.
Remember = Callable[[Array, Array], tuple[Array, Array]]


class Linear(nnx.Module):
    """A weight, output axes before input axes as in a checkpoint, and perhaps a bias over the output axes.

    Input axes that the equation gives one letter are one: to sum over two, XLA may turn the weight, and so copy it. A backward
    pass makes them one again, since it would keep what it is of every layer.
    """

    def __init__(self, weight: Array, bias: Array | None = None):
        self.weight = nnx.Param(weight)
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, equation: str, x: Array) -> Array:
        weight, n_axes = self.weight[...], len(equation.partition("->")[0].partition(",")[2])

        def product(x: Array, weight: Array) -> Array:
            return einsum(equation, x, weight.reshape(*weight.shape[: n_axes - 1], -1))

        y = (product if weight.ndim == n_axes else jax.checkpoint(product, prevent_cse=False))(x, weight)
        if self.bias is None:
            return y
        bias = self.bias[...]
        # Heads come out as [H, T, D]: the token axis of a head bias is the one before last.
        return y + (bias[:, None, :] if bias.ndim == 2 else bias[None, :])


class RMSNorm(nnx.Module):
    """Root mean square normalisation, Zhang and Sennrich (2019), arXiv:1910.07467, its statistics in float32.

    Its weight is over the last axis, or over the heads too, `[H, D]`, of values `[H, T, D]`.
    """

    def __init__(self, weight: Array):
        self.weight = nnx.Param(weight)

    def scale(self, x: Float[Array, "... E"], eps: float) -> Float[Array, "..."]:
        """1 / √(mean(x²) + eps), float32 or wider; where the weight is over heads too, the same for all of them."""
        x_wide = x.astype(wide(x.dtype))
        axes = (0, -1) if self.weight.ndim == 2 else -1
        found = jax.lax.rsqrt(jnp.mean(x_wide * x_wide, axis=axes, keepdims=True) + eps)[..., 0]
        return jnp.broadcast_to(found, x.shape[:-1])

    def gain(self, kind: str) -> Array:
        """What a normalised value is multiplied by: the weight, or 1 + weight; in float32 where it is `"wide"`."""
        weight = self.weight[...]
        if kind == "narrow":
            return weight
        weight = weight.astype(wide(weight.dtype))
        return 1 + weight if kind == "offset" else weight

    def __call__(self, x: Float[Array, "... E"], scale: Float[Array, "..."], kind: str) -> Float[Array, "... E"]:
        gain, normal = self.gain(kind), x.astype(wide(x.dtype)) * scale[..., None]
        gain = jnp.expand_dims(gain, tuple(range(x.ndim - 1)) if gain.ndim == 1 else 1)
        return gain * normal.astype(x.dtype) if kind == "narrow" else (gain * normal).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention. Weights: q `[H, D, E]`, k and v `[K, D, E]`, o `[E, H, D]`; norms of queries and keys or none."""

    def __init__(self, q: Linear, k: Linear, v: Linear, o: Linear, q_norm: RMSNorm | None, k_norm: RMSNorm | None):
        self.q, self.k, self.v, self.o = q, k, v, o
        self.q_norm, self.k_norm = q_norm, k_norm

    def __call__(
        self,
        x: Float[Array, "T E"],
        rotation: tuple[Array, Array],
        sight: Sight,
        config: DecoderConfig,
        tap: Tap,
        remember: Remember,
    ) -> Float[Array, "T E"]:
        """What the output projection makes of all heads."""
        z = self.heads((x, x, x), rotation, sight, config, tap, remember)
        return self.o("tz,ez->te", jnp.swapaxes(z, 0, 1).reshape(x.shape[0], -1))

    def heads(
        self,
        inputs: tuple[Array, Array, Array],
        rotation: tuple[Array, Array],
        sight: Sight,
        config: DecoderConfig,
        tap: Tap,
        remember: Remember,
    ) -> Float[Array, "H T D"]:
        """`z` of each head, from what queries, keys and values read: `[T, E]`, or `[H, T, E]` and `[K, T, E]`, of each its own."""
        q = self.turned("q", _projected(self.q, inputs[0]), self.q_norm, rotation, config, tap)
        k, v = remember(*self.keys(*inputs[1:], rotation, config, tap))
        return tap("z", attend(q, k, v, sight, tap, config.attention_scale, config.score_cap))

    def keys(
        self, x: Array, y: Array, rotation: tuple[Array, Array], config: DecoderConfig, tap: Tap
    ) -> tuple[Float[Array, "K T D"], Float[Array, "K T D"]]:
        """Keys of what they read, and values."""
        k = self.turned("k", _projected(self.k, x), self.k_norm, rotation, config, tap)
        return k, tap("v", _projected(self.v, y))

    @staticmethod
    def turned(
        name: str,
        x: Float[Array, "H T D"],
        norm: RMSNorm | None,
        rotation: tuple[Array, Array],
        config: DecoderConfig,
        tap: Tap,
    ) -> Float[Array, "H T D"]:
        """Queries or keys as attention uses them: normalised where the family does that, and turned."""
        if norm is not None:
            x = tap(f"{name}_proj", x)
            x = norm(x, tap(f"{name}_scale", norm.scale(x, config.rms_norm_eps)), config.norm)
        return tap(name, rotate(tap(f"{name}_pre_rope", x), rotation))


class MLP(nnx.Module):
    """Gated MLP, Shazeer (2020), arXiv:2002.05202. Weights: gate and up `[F, E]`, down `[E, F]`.

    `act_params` are the parameters of a learned activation, empty for all the usual ones.
    """

    def __init__(self, gate: Linear, up: Linear, down: Linear, act_params: Mapping[str, Array]):
        self.gate, self.up, self.down = gate, up, down
        self.act_params = nnx.data({name: nnx.Param(value) for name, value in act_params.items()})

    def __call__(self, x: Float[Array, "T E"], hidden_act: str, tap: Tap) -> Float[Array, "T E"]:
        gate = tap("gate", self.gate("te,fe->tf", x))
        up = tap("up", self.up("te,fe->tf", x))
        learned = {name: param[...].reshape(()) for name, param in self.act_params.items()}
        gate_act = tap.rules.activation(ACTIVATIONS[hidden_act], gate, learned).astype(gate.dtype)
        act = tap.rules.product("act", tap("gate_act", gate_act) * up)
        return self.down("tf,ef->te", tap("act", act))


class Block(nnx.Module):
    """One layer; with leaves that lead with `L`, all of them. A norm that the family has not is None."""

    def __init__(
        self,
        attn_norm: RMSNorm | None,
        attn: Attention,
        attn_post_norm: RMSNorm | None,
        mlp_norm: RMSNorm | None,
        mlp: MLP,
        mlp_post_norm: RMSNorm | None,
    ):
        self.attn_norm, self.attn, self.attn_post_norm = attn_norm, attn, attn_post_norm
        self.mlp_norm, self.mlp, self.mlp_post_norm = mlp_norm, mlp, mlp_post_norm

    def __call__(
        self,
        resid: Float[Array, "T E"],
        rotation: tuple[Array, Array],
        sight: Sight,
        config: DecoderConfig,
        tap: Tap,
        remember: Remember,
    ) -> Float[Array, "T E"]:
        resid = tap("resid_pre", resid)
        x = _read("attn", resid, self.attn_norm, config, tap)
        with jax.named_scope("attention"):
            out = self.attn(x, rotation, sight, config, tap, remember)
        resid = tap("resid_mid", resid + _added("attn", out, self.attn_post_norm, config, tap))
        return tap("resid_post", resid + self.mlp_adds(resid, config, tap))

    def mlp_adds(self, resid: Float[Array, "T E"], config: DecoderConfig, tap: Tap) -> Float[Array, "T E"]:
        """What the MLP adds to the stream, of the stream that it reads."""
        x = _read("mlp", resid, self.mlp_norm, config, tap)
        with jax.named_scope("mlp"):
            out = self.mlp(x, config.hidden_act, tap)
        return _added("mlp", out, self.mlp_post_norm, config, tap)

    def keys(
        self, resid: Float[Array, "T E"], rotation: tuple[Array, Array], config: DecoderConfig, tap: Tap
    ) -> tuple[Float[Array, "K T D"], Float[Array, "K T D"]]:
        """Keys and values alone."""
        x = _read("attn", tap("resid_pre", resid), self.attn_norm, config, tap)
        return self.attn.keys(x, x, rotation, config, tap)


def _projected(weight: Linear, x: Float[Array, "T E"] | Float[Array, "H T E"]) -> Float[Array, "H T D"]:
    """Queries, keys or values of all heads, from one input or from each head's own."""
    return weight("te,hde->htd" if x.ndim == 2 else "hte,hde->htd", x)


def _read(name: str, resid: Float[Array, "T E"], norm: RMSNorm | None, config: DecoderConfig, tap: Tap) -> Array:
    """What a sublayer reads of the stream."""
    if norm is not None:
        resid = norm(resid, tap(f"{name}_scale", norm.scale(resid, config.rms_norm_eps)), config.norm)
    return tap(f"{name}_in", resid)


def _added(name: str, out: Float[Array, "T E"], norm: RMSNorm | None, config: DecoderConfig, tap: Tap) -> Array:
    """What a sublayer adds to the stream."""
    if norm is not None:
        out = tap(f"{name}_proj", out)
        out = norm(out, tap(f"{name}_post_scale", norm.scale(out, config.rms_norm_eps)), config.norm)
    if config.residual_scale != 1:
        out = (out.astype(wide(out.dtype)) * config.residual_scale).astype(out.dtype)
    return tap(f"{name}_out", out)


class Unembedding:
    """What `model.lm_head` is: `.weight` `[V, E]`, the embedding itself where the config ties them."""

    def __init__(self, weight: Array):
        self.weight = weight


class Decoder(nnx.Module):
    """A model of any family as a pytree: pass it to `forward`, map over it, differentiate it.

    Attributes:
        config: its `DecoderConfig`; static.
        embed: token embeddings `[V, E]`.
        layers: a `Block` whose leaves lead with `L`.
        norm: the final norm.
        unembed: `[V, E]`, or None where tied. Read `lm_head.weight`, which serves both.

    Examples:
        >>> model.n_params, model.dtype, model.device.platform, model.final_weight.shape
        (1795776, dtype('float32'), 'cpu', (192,))
    """

    backend = "jax"

    def __init__(self, config: DecoderConfig, params: Mapping[str, Array]):
        """Builds the model from its parameters, named and shaped as `parameters.parameter_table` says."""

        def linear(name: str) -> Linear:
            return Linear(params[f"{name}.weight"], params.get(f"{name}.bias"))

        def norm(name: str) -> RMSNorm | None:
            return RMSNorm(params[f"{name}.weight"]) if f"{name}.weight" in params else None

        act = "layers.mlp.act_fn."
        learned = {name.removeprefix(act): value for name, value in params.items() if name.startswith(act)}
        q, k, v, o = (linear(f"layers.attn.{name}") for name in "qkvo")
        gate, up, down = (linear(f"layers.mlp.{name}") for name in ("gate", "up", "down"))
        self.config = config
        self.embed = nnx.Param(params["embed"])
        self.layers = Block(
            norm("layers.attn_norm"),
            Attention(q, k, v, o, norm("layers.attn.q_norm"), norm("layers.attn.k_norm")),
            norm("layers.attn_post_norm"),
            norm("layers.mlp_norm"),
            MLP(gate, up, down, learned),
            norm("layers.mlp_post_norm"),
        )
        self.norm = RMSNorm(params["norm.weight"])
        self.unembed = nnx.Param(params["unembed"]) if "unembed" in params else None

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes `config.json` and `model.safetensors` in Hugging Face's layout; transformers loads the same bits.

        Files are written aside and renamed, so a half-written checkpoint never exists under its name. OSError where they cannot.

        Examples:
            >>> model.save_pretrained("copy")
        """
        from .checkpoint import save

        save(self, directory)

    def generate(
        self, input_ids: ArrayLike, max_new_tokens: int = 20, interventions: Interventions = (), **options: Any
    ) -> Any:
        """Continues prompts as Hugging Face's `generate` does: the prompt's ids and the new ones, greedily by default.

        It is under an `InterventionContext` of an adapter of this model. Inside `jit` use `oculi_jax.generate`; errors are its.

        Args:
            input_ids: ids `[T]` or `[B, T]`, of NumPy, JAX, torch or lists.
            max_new_tokens: how many at most; a row that stops early is filled with the pad id.
            interventions: active after those of the context.
            options: `temperature`, `top_k`, `top_p`, `min_p`, `stop_tokens`, `key`, as in `oculi_jax.generate`;
                `attention_mask`, 1 at real tokens; `allow_longer`.

        Returns:
            int32 `[B, T + max_new_tokens]`; `[B, N, …]` for `N` variants of the interventions; both without `B` for ids
            `[T]`.

        Examples:
            >>> tokenizer.decode(model.generate(ids, 2), skip_special_tokens=True)
            'The capital of Italy is Rome.'
        """
        from ...decoding.continuation import continue_ids
        from ...intervention.context import active_on

        return continue_ids(self, input_ids, max_new_tokens, active_on(self), interventions, **options)

    @property
    def lm_head(self) -> Unembedding:
        """`.weight` is the unembedding `[V, E]`, tied or not.

        Examples:
            >>> model.lm_head.weight.shape
            (576, 192)
        """
        return Unembedding(self.embed[...] if self.unembed is None else self.unembed[...])

    @property
    def final_weight(self) -> Array:
        """What the final norm multiplies by, `[E]`: its weight, or 1 + weight."""
        return self.norm.gain(self.config.norm)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the parameters and of the residual stream."""
        return np.dtype(self.embed[...].dtype)

    @property
    def device(self) -> Any:
        """The device that holds the model, or how its embedding is sharded where there are several."""
        devices = self.embed[...].devices()
        return next(iter(devices)) if len(devices) == 1 else self.embed[...].sharding

    @property
    def n_params(self) -> int:
        """Number of parameters, the embedding counted once where it is tied."""
        return self.config.n_params

    def embed_tokens(self, tokens: Int[Array, "T"], tap: Callable[[str, Array], Array]) -> Float[Array, "T E"]:
        # An id beyond the vocabulary that only the device could see gives NaN, never a neighbour's embedding.
        rows = self.embed[...].at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        scale = self.config.embed_scale
        return tap("embed", rows if scale == 1 else rows * jnp.asarray(scale, rows.dtype))

    def normalise(self, resid: Float[Array, "T E"], tap: Callable[[str, Array], Array]) -> Float[Array, "T E"]:
        """The final norm."""
        scale = tap("final_scale", self.norm.scale(resid, self.config.rms_norm_eps))
        return tap("final_norm", self.norm(resid, scale, self.config.norm))

    def logits(self, normalised: Float[Array, "... E"]) -> Float[Array, "... V"]:
        """The unembedding; float32 or wider, whatever the weights.

        Examples:
            >>> np.allclose(model.logits(run["final_norm"]), run.logits, atol=1e-3)
            True
        """
        logits = einsum("...e,ve->...v", normalised, self.lm_head.weight, dtype=wide(self.dtype))
        return said(logits, self.config.logit_scale, self.config.logit_cap)

    def logits_of(self, normalised: Float[Array, "... E"], tokens: Int[AnyArray, "N"]) -> Float[Array, "... N"]:
        """Logits of some tokens; NaN for an id beyond the vocabulary.

        Examples:
            >>> model.logits_of(run["final_norm"], np.array([rome, paris])).shape
            (6, 2)
        """
        rows = self.lm_head.weight.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        logits = einsum("...e,ne->...n", normalised, rows, dtype=wide(self.dtype))
        return said(logits, self.config.logit_scale, self.config.logit_cap)

    def _repr_html_(self) -> str:
        names = ("layers", "hidden size", "query heads", "key/value heads", "head size", "MLP width", "vocabulary")
        rows = zip(names, (self.config.sizes[letter] for letter in "LEHKDFV"), strict=True)
        return cells.table(f"{self.config.family.title}, {self.n_params / 1e6:.1f}M parameters, {self.dtype}", rows)

    def __repr__(self) -> str:
        c = self.config
        sizes = (
            f"L={c.num_hidden_layers}, H={c.num_attention_heads}, K={c.num_key_value_heads}, D={c.head_dim}, "
            f"E={c.hidden_size}, F={c.intermediate_size}, V={c.vocab_size}"
        )
        return f"{self.config.family.title}({self.n_params / 1e6:.1f}M parameters, {self.dtype}, {sizes})"

    __str__ = __repr__
