"""`Llama`: the network itself, as an immutable pytree of parameters whose pieces call `tap(site, value)` at each site.

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
from jaxtyping import Bool, Float, Int

from ... import cells
from .activations import ACTIVATIONS
from .config import LlamaConfig
from .rope import rotate

if TYPE_CHECKING:
    import os

    from jax.typing import DTypeLike
    from numpy.typing import ArrayLike

    from ...arrays import AnyArray
    from ...intervention.protocol import Interventions
    from ...utils.devices import DeviceLike


@runtime_checkable
class Tap(Protocol):
    """Who runs the model, seen from inside: called with each site's value, it returns what the pass goes on with."""

    def __call__(self, site: str, value: Array, /) -> Array: ...

    def touches(self, *sites: str) -> bool:
        """Whether anybody reads or edits one of these, known before anything runs: what nobody does need not exist."""
        ...


# Keys and values of the tokens that run → those of all that may be looked at: where a cache, or another run's, is put in.
Remember = Callable[[Array, Array], tuple[Array, Array]]


def einsum(equation: str, *operands: Array, dtype: DTypeLike | None = None) -> Array:
    """`jnp.einsum` at full float32 precision for float32 operands on every platform; `dtype` is the result's."""
    full = operands[0].dtype == jnp.float32
    return jnp.einsum(
        equation, *operands, precision=jax.lax.Precision.HIGHEST if full else None, preferred_element_type=dtype
    )


def expand_kv(x: Float[Array, "... K T D"], config: LlamaConfig) -> Float[Array, "... H T D"]:
    """Repeats keys or values so that entry `h` of the head axis is what query head `h` reads (`config.kv_head(h)`).

    Grouped-query attention is Ainslie et al. (2023), arXiv:2305.13245. ValueError for an array without those axes.

    Args:
        x: keys or values `[..., K, T, D]`, for instance a capture `[L, K, T, D]`.
        config: the model's config.

    Returns:
        The same values as `[..., H, T, D]`.

    Examples:
        >>> expand_kv(capture.attention.keys, model.config).shape  # [L, K, T, D] → [L, H, T, D]
        (4, 6, 6, 32)
    """
    x = jnp.asarray(x)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if x.ndim < 3 or x.shape[-3] != kv_heads:
        raise ValueError(
            f"expand_kv takes [..., K, T, D] with K = {kv_heads} key/value heads, and was given {x.shape}."
        )
    return jnp.repeat(x, heads // kv_heads, axis=-3)


class Linear(nnx.Module):
    """A weight, output axes before input axes as in a checkpoint, and perhaps a bias over the output axes."""

    def __init__(self, weight: Array, bias: Array | None = None):
        self.weight = nnx.Param(weight)
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, equation: str, x: Array) -> Array:
        y = einsum(equation, x, self.weight[...])
        if self.bias is None:
            return y
        bias = self.bias[...]
        # Heads come out as [H, T, D]: the token axis of a head bias is the one before last.
        return y + (bias[:, None, :] if bias.ndim == 2 else bias[None, :])


class RMSNorm(nnx.Module):
    """Root mean square normalisation, Zhang and Sennrich (2019), arXiv:1910.07467, its statistics in float32."""

    def __init__(self, weight: Array):
        self.weight = nnx.Param(weight)

    def scale(self, x: Float[Array, "T E"], eps: float) -> Float[Array, "T"]:
        """1 / √(mean(x²) + eps), float32."""
        wide = x.astype(jnp.float32)
        return jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1) + eps)

    def __call__(self, x: Float[Array, "T E"], scale: Float[Array, "T"]) -> Float[Array, "T E"]:
        return self.weight[...][None, :] * (x.astype(jnp.float32) * scale[:, None]).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention. Weights: q `[H, D, E]`, k and v `[K, D, E]`, o `[E, H, D]`."""

    def __init__(self, q: Linear, k: Linear, v: Linear, o: Linear):
        self.q, self.k, self.v, self.o = q, k, v, o

    def __call__(
        self,
        x: Float[Array, "T E"],
        rotation: tuple[Array, Array],
        allowed: Bool[Array, "T S"],
        tap: Tap,
        remember: Remember,
    ) -> Float[Array, "T E"]:
        q = tap("q", rotate(tap("q_pre_rope", self.q("te,hde->htd", x)), rotation))
        k = tap("k", rotate(tap("k_pre_rope", self.k("te,kde->ktd", x)), rotation))
        k, v = remember(k, tap("v", self.v("te,kde->ktd", x)))
        n_heads, n_tokens, head_dim = q.shape
        n_kv, n_keys = k.shape[:2]

        grouped = q.reshape(n_kv, n_heads // n_kv, n_tokens, head_dim)
        scores = einsum("kgtd,ksd->kgts", grouped, k, dtype=jnp.float32) * head_dim**-0.5
        scores = tap("scores", scores.reshape(n_heads, n_tokens, n_keys))
        may = allowed[None]
        if tap.touches("allowed"):
            may = tap("allowed", jnp.broadcast_to(may, scores.shape))
        pattern = tap("pattern", masked_softmax(scores, may).astype(x.dtype))
        grouped = pattern.reshape(n_kv, n_heads // n_kv, n_tokens, n_keys)
        z = tap("z", einsum("kgts,ksd->kgtd", grouped, v).reshape(n_heads, n_tokens, head_dim))
        return tap("attn_out", self.o("htd,ehd->te", z))


def masked_softmax(scores: Float[Array, "H T S"], allowed: Bool[Array, "#H T S"]) -> Float[Array, "H T S"]:
    """Softmax over the allowed keys; a row with none is zero. No value or gradient of it is ever NaN.

    A score of −∞ counts as not allowed.
    """
    allowed = allowed & (scores != -jnp.inf)
    scores = jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(allowed, jnp.exp(scores - top), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total == 0.0, 1.0, total)


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
        gate_act = tap("gate_act", ACTIVATIONS[hidden_act](gate, **learned).astype(gate.dtype))
        act = tap("act", gate_act * up)
        return tap("mlp_out", self.down("tf,ef->te", act))


class Block(nnx.Module):
    """One layer; with leaves that lead with `L`, all of them."""

    def __init__(self, attn_norm: RMSNorm, attn: Attention, mlp_norm: RMSNorm, mlp: MLP):
        self.attn_norm, self.attn, self.mlp_norm, self.mlp = attn_norm, attn, mlp_norm, mlp

    def __call__(
        self,
        resid: Float[Array, "T E"],
        rotation: tuple[Array, Array],
        allowed: Bool[Array, "T S"],
        config: LlamaConfig,
        tap: Tap,
        remember: Remember,
    ) -> Float[Array, "T E"]:
        resid = tap("resid_pre", resid)
        scale = tap("attn_scale", self.attn_norm.scale(resid, config.rms_norm_eps))
        with jax.named_scope("attention"):
            out = self.attn(tap("attn_in", self.attn_norm(resid, scale)), rotation, allowed, tap, remember)
        resid = tap("resid_mid", resid + out)
        scale = tap("mlp_scale", self.mlp_norm.scale(resid, config.rms_norm_eps))
        with jax.named_scope("mlp"):
            out = self.mlp(tap("mlp_in", self.mlp_norm(resid, scale)), config.hidden_act, tap)
        return tap("resid_post", resid + out)


class Unembedding:
    """What `model.lm_head` is: `.weight` `[V, E]`, the embedding itself where the config ties them."""

    def __init__(self, weight: Array):
        self.weight = weight


class Llama(nnx.Module):
    """A Llama (Touvron et al. 2023, arXiv:2302.13971) as a pytree: pass it to `forward`, map over it, differentiate it.

    Attributes:
        config: its `LlamaConfig`; static.
        embed: token embeddings `[V, E]`.
        layers: a `Block` whose leaves lead with `L`.
        norm: the final norm.
        unembed: `[V, E]`, or None where tied. Read `lm_head.weight`, which serves both.

    Examples:
        >>> model
        Llama(1.8M parameters, float32, L=4, H=6, K=2, D=32, E=192, F=512, V=576)
        >>> model.n_params, model.dtype, model.device.platform, model.final_weight.shape
        (1795776, dtype('float32'), 'cpu', (192,))
    """

    backend = "jax"

    def __init__(self, config: LlamaConfig, params: Mapping[str, Array]):
        """Builds the model from its parameters, named and shaped as `parameters.parameter_table` says."""

        def linear(name: str) -> Linear:
            return Linear(params[f"{name}.weight"], params.get(f"{name}.bias"))

        act = "layers.mlp.act_fn."
        self.config = config
        self.embed = nnx.Param(params["embed"])
        self.layers = Block(
            RMSNorm(params["layers.attn_norm.weight"]),
            Attention(*[linear(f"layers.attn.{name}") for name in "qkvo"]),
            RMSNorm(params["layers.mlp_norm.weight"]),
            MLP(
                linear("layers.mlp.gate"),
                linear("layers.mlp.up"),
                linear("layers.mlp.down"),
                {name.removeprefix(act): value for name, value in params.items() if name.startswith(act)},
            ),
        )
        self.norm = RMSNorm(params["norm.weight"])
        self.unembed = nnx.Param(params["unembed"]) if "unembed" in params else None

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        dtype: DTypeLike = "auto",
        device: DeviceLike | None = None,
        mesh: jax.sharding.Mesh | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        *,
        ignore_fields: tuple[str, ...] = (),
        backend: str = "jax",
    ) -> Any:
        """Loads a Llama from a directory or a Hugging Face Hub id. torch is not needed, but for the backend of that name.

        Args:
            source: a directory with `config.json` and safetensors files (one, or shards with an index), or a Hub id.
            dtype: `"auto"` (the config's, else that of the file), or float32, bfloat16 or float16 as a string or dtype.
            device: a `jax.Device` or a platform name (`"cpu"`, `"gpu"`, `"tpu"`); JAX's default where None. With torch, one of
                its devices (`"cpu"`, `"cuda"`, `"mps"`); for None the GPU where it has one, else the CPU.
            mesh: a mesh with axes `("data", "model")`, both Auto: parameters are sharded over `model`, and each device
                reads only its slice. Not together with `device`.
            revision: branch, tag or commit on the Hub.
            local_files_only: never look at the network.
            ignore_fields: config fields to load without, although this library does not implement them.
            backend: `"jax"`; or `"torch"`, for a `TorchLlama`, which every function takes as it takes a `Llama`.

        Raises:
            OSError: something is not there or cannot be read. ValueError: it is there and is not a Llama that can be
                loaded exactly; one message lists every missing, unexpected and mis-shaped tensor.

        Examples:
            >>> model.save_pretrained("copy")
            >>> Llama.from_pretrained("copy", dtype="bfloat16").dtype
            dtype(bfloat16)
        """
        from .checkpoint import load, placement

        options: dict[str, Any] = dict(
            revision=revision, local_files_only=local_files_only, ignore_fields=ignore_fields
        )
        if backend == "torch":
            from ...backends.torch import TorchLlama

            if mesh is not None:
                raise ValueError("A mesh is of JAX's devices: with backend='torch' give a device.")
            return TorchLlama.from_pretrained(source, dtype, device, **options)
        if backend != "jax":
            raise ValueError(f"backend is {backend!r}, and must be 'jax' or 'torch'.")
        return cls(*load(source, dtype=dtype, place=placement(device, mesh), **options))

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
            int32 `[1, T + max_new_tokens]`, `[B, …]` for several prompts or for variants of the interventions; without
            the leading axis for ids `[T]`.

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
        """The final norm's weight `[E]`."""
        return self.norm.weight[...]

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
        return tap("embed", rows)

    def normalise(self, resid: Float[Array, "T E"], tap: Callable[[str, Array], Array]) -> Float[Array, "T E"]:
        """The final norm."""
        scale = tap("final_scale", self.norm.scale(resid, self.config.rms_norm_eps))
        return tap("final_norm", self.norm(resid, scale))

    def logits(self, normalised: Float[Array, "... E"]) -> Float[Array, "... V"]:
        """The unembedding; float32 whatever the weights.

        Examples:
            >>> np.allclose(model.logits(run["final_norm"]), run.logits, atol=1e-3)
            True
        """
        return einsum("...e,ve->...v", normalised, self.lm_head.weight, dtype=jnp.float32)

    def logits_of(self, normalised: Float[Array, "... E"], tokens: Int[AnyArray, "N"]) -> Float[Array, "... N"]:
        """Logits of some tokens; NaN for an id beyond the vocabulary.

        Examples:
            >>> model.logits_of(run["final_norm"], np.array([rome, paris])).shape
            (6, 2)
        """
        rows = self.lm_head.weight.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return einsum("...e,ne->...n", normalised, rows, dtype=jnp.float32)

    def _repr_html_(self) -> str:
        names = ("layers", "hidden size", "query heads", "key/value heads", "head size", "MLP width", "vocabulary")
        rows = zip(names, (self.config.sizes[letter] for letter in "LEHKDFV"), strict=True)
        return cells.table(f"Llama, {self.n_params / 1e6:.1f}M parameters, {self.dtype}", rows)

    def __repr__(self) -> str:
        c = self.config
        sizes = (
            f"L={c.num_hidden_layers}, H={c.num_attention_heads}, K={c.num_key_value_heads}, D={c.head_dim}, "
            f"E={c.hidden_size}, F={c.intermediate_size}, V={c.vocab_size}"
        )
        return f"Llama({self.n_params / 1e6:.1f}M parameters, {self.dtype}, {sizes})"

    __str__ = __repr__
