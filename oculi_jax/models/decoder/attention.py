"""Attention between its projections: step by step where somebody looks inside, or may; fused where nobody does.

`form` says which, `attend` does it. What is differentiated is the steps either way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from ...arrays import wide
from .derivatives import Derivatives

if TYPE_CHECKING:
    from jax.typing import DTypeLike

    from .config import DecoderConfig
    from .model import Tap

Form = Literal["explicit", "xla", "cudnn", "tpu"]

# Fewer queries than this are not worth another program; from so many on a kernel that keeps no scores is the faster one.
FEW, MANY = 32, 512


class Sight(NamedTuple):
    """Which keys each token may look at.

    Attributes:
        allowed: of each token and key.
        n_seen: how many keys, from the first on, any of them can be; known before anything runs, as is `causal`.
        causal: whether those are as many as tokens, and each real token may look at all real ones up to its own.
        padded: whether some may be padding.
    """

    allowed: Bool[Array, "T S"]
    n_seen: int
    causal: bool
    padded: bool


def form(
    platform: str,
    dtype: DTypeLike,
    n_queries: int,
    n_keys: int,
    head_dim: int,
    *,
    causal: bool = True,
    sharded: bool = False,
) -> Form:
    """How attention that nobody looks into is computed.

    Step by step (`"explicit"`) in float32 and wider, on what is neither CUDA nor a TPU, and of few queries, as decoding has. Else
    with a kernel that keeps no scores, cuDNN's or the TPU's, for whole prompts that are long; and in the form that XLA fuses
    best (`"xla"`) for what is shorter.

    Args:
        platform: as JAX names what it lowers for.
        dtype: of queries, keys and values.
        causal: whether each token may look at all up to its own but padding, which no window leaves.
        sharded: whether it runs on several devices at once, over which no kernel splits every kind of heads.
    """
    half = np.dtype(dtype).name in (("bfloat16",) if platform == "tpu" else ("bfloat16", "float16"))
    if not half or platform not in ("cuda", "tpu") or n_queries < FEW:
        return "explicit"
    if n_keys < MANY:
        return "xla"
    if n_queries != n_keys or not causal or sharded:
        return "explicit"
    if platform == "cuda" and head_dim % 8 == 0 and head_dim <= 256:
        return "cudnn"
    # The TPU's takes whole tiles.
    if platform == "tpu" and n_keys % 128 == 0 and (head_dim <= 128 or head_dim % 128 == 0):
        return "tpu"
    return "explicit"


def accelerator() -> str:
    """The platform whose kernels programs of this process may hold, as JAX names what it lowers for; `"cpu"` for none.

    Of GPUs it is CUDA's from compute capability 8 on; older ones know neither products in bfloat16 nor the kernel.
    """
    device: Any = jax.devices()[0]
    if device.platform != "gpu":
        return device.platform
    known = "cuda" in device.client.platform_version and float(device.compute_capability) >= 8
    return "cuda" if known else "cpu"


def attend(
    q: Float[Array, "H T D"],
    k: Float[Array, "K S D"],
    v: Float[Array, "K S D"],
    sight: Sight,
    tap: Tap,
    scale: float,
    cap: float | None = None,
) -> Float[Array, "H T D"]:
    """What each head takes of the values: `z`, before its own tap.

    Args:
        scale: what q · k is multiplied by.
        cap: of a soft cap on that, which no kernel knows; None for none.
    """
    n, mesh = sight.n_seen, jax.typeof(q).sharding.mesh
    n_parts = mesh.shape.get("model", 1)
    if len(q) % n_parts == 0 and len(k) % n_parts:
        # Heads whose groups lie on several devices find their own keys there.
        own = np.arange(len(q)) // (len(q) // len(k))
        k, v = (x.at[own].get(mode="promise_in_bounds") for x in (k, v))
    if cap is None and not tap.touches("scores", "allowed", "pattern"):
        platform, sharded = accelerator(), not mesh.empty and mesh.size > 1
        how = form(platform, q.dtype, q.shape[1], n, q.shape[2], causal=sight.causal, sharded=sharded)
        if how != "explicit":
            seen = q, k[:, :n], v[:, :n]
            if how != "cudnn" or _takes(_cudnn, *seen):
                plain = sight.causal and not sight.padded
                return fused(*seen, sight.allowed[:, :n], tap.rules, plain, scale, platform, how)
    return explicit(q, k, v, sight.allowed, tap, scale, cap)


def capped(x: Array, cap: float) -> Array:
    """`cap · tanh(x / cap)`: a soft cap."""
    return cap * jnp.tanh(x / cap)


def said(logits: Array, scale: float, cap: float | None) -> Array:
    """Logits multiplied and capped as a family does it."""
    logits = logits if scale == 1 else logits * scale
    return logits if cap is None else capped(logits, cap)


def _takes(kernel: Callable[..., Array], *operands: Array) -> bool:
    """Whether JAX traces a kernel here: it looks for cuDNN, its version, and what the card and the version can do."""
    try:
        jax.eval_shape(kernel, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands))
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    return True


def explicit(
    q: Float[Array, "H T D"],
    k: Float[Array, "K S D"],
    v: Float[Array, "K S D"],
    allowed: Bool[Array, "T S"],
    tap: Tap,
    scale: float,
    cap: float | None = None,
) -> Float[Array, "H T D"]:
    """Scores, pattern and what it takes of the values, each of which exists and is what its tap makes of it."""
    n_heads, n_tokens, head_dim = q.shape
    n_kv, n_keys = k.shape[:2]
    scores = tap("scores", tap.rules.product("scores", scores_of(q, k, scale, cap)))
    may = allowed[None]
    if tap.touches("allowed"):
        may = tap("allowed", jnp.broadcast_to(may, scores.shape))
    pattern = tap("pattern", tap.rules.softmax(masked_softmax, scores, may).astype(q.dtype))
    grouped = pattern.reshape(n_kv, n_heads // n_kv, n_tokens, n_keys)
    z = einsum("kgts,ksd->kgtd", grouped, v).reshape(n_heads, n_tokens, head_dim)
    return tap.rules.product("z", z)


def scores_of(
    q: Float[Array, "H T D"], k: Float[Array, "K S D"], scale: float, cap: float | None = None
) -> Float[Array, "H T S"]:
    """What the softmax gets, float32 or wider."""
    n_heads, n_tokens, head_dim = q.shape
    n_kv, n_keys = k.shape[:2]
    grouped = q.reshape(n_kv, n_heads // n_kv, n_tokens, head_dim)
    scores = einsum("kgtd,ksd->kgts", grouped, k, dtype=wide(q.dtype)) * scale
    scores = scores if cap is None else capped(scores, cap)
    return scores.reshape(n_heads, n_tokens, n_keys)


class _Nobody:
    """A tap that nobody holds, whatever rules there are."""

    def __init__(self, rules: Derivatives):
        self.rules = rules

    def __call__(self, site: str, value: Array, /) -> Array:
        return self.rules.at(site, value)

    def touches(self, *sites: str) -> bool:
        return False


def _unseen(q: Array, k: Array, v: Array, allowed: Array, rules: Derivatives, *, scale: float) -> Array:
    return explicit(q, k, v, allowed, _Nobody(rules), scale)


@partial(jax.custom_jvp, nondiff_argnums=(5, 6, 7, 8))
def fused(
    q: Float[Array, "H T D"],
    k: Float[Array, "K S D"],
    v: Float[Array, "K S D"],
    allowed: Bool[Array, "T S"],
    rules: Derivatives,
    plain: bool,
    scale: float,
    platform: str,
    how: Form,
) -> Float[Array, "H T D"]:
    """`explicit` in another form where the program is compiled for `platform`, and as it is elsewhere.

    `plain` says that it is causal without padding.

    What is differentiated is `explicit`, by the rules, so that there are forward derivatives, second ones and any under a `vmap`.
    """
    kernel = _xla if how == "xla" else partial(_in_order, _cudnn if how == "cudnn" else _tpu)
    kernel = partial(kernel, plain=plain, scale=scale)
    steps = partial(_unseen, rules=Derivatives(), scale=scale)  # of whose value alone it is asked
    return jax.lax.platform_dependent(q, k, v, allowed, default=steps, **{platform: kernel})


@fused.defjvp
def _derivative(
    plain: bool, scale: float, platform: str, how: Form, primals: Any, tangents: Any
) -> tuple[Array, Array]:
    q, k, v, allowed, rules = primals
    # Its value too: what is differentiated again is then the steps, of which JAX keeps no rule but their own.
    return jax.jvp(lambda q, k, v: _unseen(q, k, v, allowed, rules, scale=scale), (q, k, v), tangents[:3])


def _xla(q: Array, k: Array, v: Array, allowed: Array, *, plain: bool, scale: float) -> Array:
    if plain:
        return _library(q, k, v, implementation="xla", scale=scale, is_causal=True)
    real = jnp.any(allowed, axis=-1, keepdims=True)
    mask = (allowed | ~real)[None]  # padding looks at everything, lest a row sum to nothing
    return jnp.where(real[None], _library(q, k, v, implementation="xla", scale=scale, mask=mask), 0)


def _in_order(
    kernel: Callable[..., Array], q: Array, k: Array, v: Array, allowed: Array, *, plain: bool, scale: float
) -> Array:
    """A causal kernel, of padded prompts too: where real tokens come first, none of them looks at padding."""
    heads = [len(q), len(q) + len(k)]
    joined = jnp.concatenate([q, k, v])  # since `vmap` must map all that cuDNN is given, or nothing
    if plain:
        return kernel(*jnp.split(joined, heads), scale=scale)
    real = jnp.any(allowed, axis=-1)
    order = jnp.argsort(~real, stable=True)
    z = kernel(*jnp.split(joined[:, order], heads), scale=scale)
    return jnp.where(real[None, :, None], z[:, jnp.argsort(order)], 0)


def _cudnn(q: Array, k: Array, v: Array, scale: float = 1.0) -> Array:
    return _library(q, k, v, implementation="cudnn", scale=scale, is_causal=True)


def _library(q: Array, k: Array, v: Array, **options: Any) -> Array:
    """JAX's own, which takes `[T, H, D]`."""
    q, k, v = (jnp.swapaxes(x, 0, 1) for x in (q, k, v))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # whatever a user has set
        return jnp.swapaxes(jax.nn.dot_product_attention(q, k, v, **options), 0, 1)


def _tpu(q: Array, k: Array, v: Array, scale: float = 1.0) -> Array:
    """What JAX brings for it, which knows no groups of heads."""
    from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention

    n_heads, n_tokens, _ = q.shape
    k, v = (jnp.repeat(x, n_heads // x.shape[0], axis=0) for x in (k, v))
    block = next(size for size in (512, 256, 128) if n_tokens % size == 0)
    sizes = BlockSizes(block_q=block, block_k_major=block, block_k=block, block_b=1)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return flash_attention(q[None], k[None], v[None], causal=True, sm_scale=scale, block_sizes=sizes)[0]


def masked_softmax(scores: Float[Array, "H T S"], allowed: Bool[Array, "#H T S"]) -> Float[Array, "H T S"]:
    """Softmax over the allowed keys; a row with none is zero. No value or gradient of it is ever NaN.

    A score of −∞ counts as not allowed.
    """
    allowed = allowed & (scores != -jnp.inf)
    scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(allowed, jnp.exp(scores - top), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total == 0.0, 1.0, total)


def einsum(equation: str, *operands: Array, dtype: DTypeLike | None = None) -> Array:
    """`jnp.einsum` at full float32 precision for float32 operands on every platform; `dtype` is the result's."""
    full = operands[0].dtype == jnp.float32
    return jnp.einsum(
        equation, *operands, precision=jax.lax.Precision.HIGHEST if full else None, preferred_element_type=dtype
    )


def expand_kv(x: Float[Array, "... K T D"], config: DecoderConfig) -> Float[Array, "... H T D"]:
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
