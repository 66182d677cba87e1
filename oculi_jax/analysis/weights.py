"""What the weights alone say of heads: composition of pairs, and the spectra of their QK and OV circuits.

Circuits are those of Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits", for column vectors:
W_QK = Qᵀ K scores a destination against a source, W_OV = O V moves what was read; both are E×E of rank D and are never
formed. The layer's first norm, where it has one, is folded into its Q, K and V (RMSNorm's gain w is linear: Q ← Q diag(w)),
and the norm of what attention adds, where the family has one, and its `residual_scale` into O. Left out, as is usual: the
norms' scales, which depend on the token; the rotary position; biases; what scores are multiplied and capped by. Where queries
and keys are normalised (`config.qk_norm`), scores are not x W_QK y for any one matrix, and there is no W_QK.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Complex, Float, Int

from ..arrays import integer, on_every_host
from .statistics import root

if TYPE_CHECKING:
    from ..models.decoder.config import DecoderConfig
    from ..models.decoder.model import Decoder

CIRCUITS = ("qk", "ov")


class Factors(NamedTuple):
    """The four projections of every query head, norms folded, each head under GQA with its own copy of keys and values.

    All are `[L, H, D, E]` in float32; `o` is transposed, so that its rows are the directions a head writes.
    """

    q: Float[Array, "L H D E"]
    k: Float[Array, "L H D E"]
    v: Float[Array, "L H D E"]
    o: Float[Array, "L H D E"]


class SVD(NamedTuple):
    """W = U diag(S) Vh, the signs of a pair of vectors being arbitrary.

    Attributes:
        U: `[E, D]`; of W_OV the directions written, of W_QK those in which destinations are compared.
        S: `[D]`, largest first.
        Vh: `[D, E]`; of W_OV the directions read, of W_QK those in which sources are compared.
    """

    U: Float[Array, "E D"]
    S: Float[Array, "D"]
    Vh: Float[Array, "D E"]


def config_of(model: Decoder) -> DecoderConfig:
    """The config of a model; TypeError for what is none."""
    if isinstance(model, type) or not hasattr(model, "config") or not hasattr(model, "layers"):
        what = repr(model) if isinstance(model, str) else f"a {type(model).__name__}"
        raise TypeError(f"The model is {what}; give one as from_pretrained(source) makes, such as adapter.model.")
    return model.config


def factors(model: Decoder) -> Factors:
    """The projections of a model's heads."""
    config, layers = config_of(model), model.layers
    attn = layers.attn
    kv_heads = np.array([config.kv_head(head) for head in range(config.num_attention_heads)])

    def folded(weight: Array, norm: Any) -> Array:
        wide = weight.astype(jnp.float32)
        return wide if norm is None else wide * norm.gain(config.norm).astype(jnp.float32)[:, None, None, :]

    def read(weight: Any) -> Array:
        return folded(weight[...], layers.attn_norm)

    return Factors(
        q=read(attn.q.weight),
        k=jnp.take(read(attn.k.weight), kv_heads, axis=1),
        v=jnp.take(read(attn.v.weight), kv_heads, axis=1),
        o=folded(attn.o.weight[...].transpose(0, 2, 3, 1), layers.attn_post_norm) * config.residual_scale,
    )


def check_qk(model: Decoder, what: str) -> None:
    """ValueError where the family normalises queries and keys, so that a head has no W_QK."""
    if config_of(model).qk_norm is not None:
        raise ValueError(
            f"{what} reads W_QK = Qᵀ K, and {model.config.family.title} normalises queries and keys before it compares them, so "
            "that no one matrix gives their scores. W_OV is one matrix here too: ov_svd, ov_eigenvalues, ov_copying_scores, and "
            'weight_composition(model).values["v"]; scores on a prompt are the sites "scores" and "pattern".'
        )


@jax.jit
def composition(weights: Factors) -> Float[Array, "3 L H L H"]:
    """Q-, K- and V-composition of every pair of heads, source first; 0 unless the source's layer is the lower one.

    With A of the target and B = W_OV of the source, the score is ‖A B‖_F / (‖A‖_F ‖B‖_F), where A is W_QKᵀ for Q,
    W_QK for K and W_OV for V. Since ‖Xᵀ Y‖_F = ‖R Y‖_F where RᵀR = X Xᵀ, each norm of an E×E product is one of a D×D
    product of a `[D, E]` reader and an `[E, D]` writer, for instance ‖Qᵀ K O V‖ = ‖(R_Q K) (O R_Vᵀ)‖.
    A head whose circuit is zero scores 0.
    """
    q, k, v, o = weights
    n_layers, n_heads = q.shape[:2]
    root_q, root_k, root_v, root_o = (_root_of_gram(x) for x in weights)
    readers = [_product(root_k, q), _product(root_q, k), _product(root_o, v)]
    reader, writer = _unit(jnp.stack(readers, axis=1)), _unit(_product(root_v, o))

    def pair(layers: Int[Array, "2"]) -> Float[Array, "3 H H"]:
        source, target = layers
        blocks = jnp.einsum(
            "gce,nhde->ngchd", writer[source], reader[target], precision=jax.lax.Precision.HIGHEST
        )  # fmt: skip
        return jnp.sum(blocks * blocks, axis=(2, 4))

    source, target = np.triu_indices(n_layers, 1)
    scores = jnp.zeros((3, n_layers, n_heads, n_layers, n_heads), jnp.float32)
    if not source.size:
        return scores
    squares = jax.lax.map(pair, jnp.stack([jnp.asarray(source), jnp.asarray(target)], axis=1))
    return scores.at[:, source, :, target, :].set(root(squares))


def svd(model: Decoder, circuit: str, layer: int | None = None, head: int | None = None) -> Any:
    """Singular values `[L, H, D]` of W_QK (`circuit="qk"`) or W_OV (`"ov"`) of every head, or the `SVD` of one head.

    Through the QR of both factors and the SVD of a D×D matrix.
    """
    left, right = _sides(model, circuit)
    if layer is None and head is None:
        return on_every_host(_singular_values(left, right))
    if layer is None or head is None:
        raise ValueError("Give layer and head, for one head, or neither, for the singular values of all.")
    layer, head = integer(layer, "layer", 0, left.shape[0] - 1), integer(head, "head", 0, left.shape[1] - 1)
    return on_every_host(_svd(left[layer, head], right[layer, head]))


@jax.jit
def _singular_values(left: Float[Array, "L H D E"], right: Float[Array, "L H D E"]) -> Float[Array, "L H D"]:
    r_left, r_right = (jnp.linalg.qr(x.swapaxes(-1, -2), mode="r") for x in (left, right))
    return jnp.linalg.svd(_product(r_left, r_right.swapaxes(-1, -2)), compute_uv=False)


@jax.jit
def _svd(left: Float[Array, "D E"], right: Float[Array, "D E"]) -> SVD:
    (u, r_left), (v, r_right) = (jnp.linalg.qr(x.T) for x in (left, right))
    inner_u, values, inner_vh = jnp.linalg.svd(_product(r_left, r_right.T), full_matrices=False)
    return SVD(_product(u, inner_u), values, _product(inner_vh, v.T))


def eigenvalues(model: Decoder, circuit: str) -> Complex[np.ndarray, "L H D"]:
    """The eigenvalues of W_QK or W_OV that are not zero by rank, largest modulus first. Host function, float64.

    Those of X Y are those of Y X: of a D×D matrix.
    """
    left, right = _sides(model, circuit)
    return _sorted_eigenvalues(_wide(right) @ _wide(left).swapaxes(-1, -2))


def copying_scores(model: Decoder) -> Float[np.ndarray, "L H"]:
    """Σ λ / Σ |λ| over the eigenvalues of W_U W_OV W_E. Host function: eigenvalues of general matrices.

    The V×V circuit has the eigenvalues of V (W_E W_U) O, D×D, whose inner E×E product is computed once; the final norm's
    weight is folded into W_U.
    """
    weights = factors(model)
    embed, unembed, final = (
        x.astype(jnp.float32) for x in (model.embed[...], model.lm_head.weight, model.final_weight)
    )
    inner = jnp.einsum("ve,vf->ef", embed, unembed, precision=jax.lax.Precision.HIGHEST) * final[None, :]
    values = _sorted_eigenvalues(_wide(_product(weights.v, inner)) @ _wide(weights.o).swapaxes(-1, -2))
    size = np.abs(values).sum(-1)
    return np.divide(values.sum(-1).real, size, out=np.zeros_like(size), where=size > 0).astype(np.float32)


def _sides(model: Decoder, circuit: str) -> tuple[Array, Array]:
    """X and Y with Xᵀ Y = the circuit."""
    if circuit not in CIRCUITS:
        raise ValueError(f"circuit is {circuit!r}, and must be 'qk' or 'ov'.")
    if circuit == "qk":
        check_qk(model, "This analysis")
    weights = factors(model)
    return (weights.q, weights.k) if circuit == "qk" else (weights.o, weights.v)


def _sorted_eigenvalues(matrices: Float[np.ndarray, "L H D D"]) -> Complex[np.ndarray, "L H D"]:
    values = np.linalg.eigvals(matrices).astype(np.complex128)
    return np.take_along_axis(values, np.argsort(-np.abs(values), axis=-1, kind="stable"), axis=-1)


def _wide(x: Array) -> np.ndarray:
    return np.asarray(on_every_host(x)).astype(np.float64)


def _root_of_gram(x: Float[Array, "... D E"]) -> Float[Array, "... D D"]:
    """R with RᵀR = x xᵀ, so that ‖xᵀ y‖_F = ‖R y‖_F for every y: Cholesky's with pivots, R's rows in their order.

    All matrices take one step at a time, in plain array operations. LAPACK's QR goes through them one by one with threads
    of its own, which takes a thousand times as long where other programs want the cores; its Cholesky has no pivots, and
    gives NaN for a head of less than full rank.
    """

    def step(gram: Array, _: None) -> tuple[Array, Array]:
        diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)
        at = jnp.argmax(diagonal, axis=-1, keepdims=True)
        pivot = jnp.take_along_axis(diagonal, at, axis=-1)
        row = jnp.take_along_axis(gram, at[..., None], axis=-2)[..., 0, :]
        row = jnp.where(pivot > 0.0, row / jnp.sqrt(jnp.where(pivot > 0.0, pivot, 1.0)), 0.0)
        return gram - row[..., :, None] * row[..., None, :], row

    _, rows = jax.lax.scan(step, _product(x, x.swapaxes(-1, -2)), None, length=x.shape[-2])
    return jnp.moveaxis(rows, 0, -2)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _unit(x: Float[Array, "... D E"]) -> Float[Array, "... D E"]:
    """Each matrix over its Frobenius norm; zero stays zero, without a NaN in the gradient."""
    size = root(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    return x / jnp.where(size == 0.0, 1.0, size)
