"""Composition from the weights, eigenvalues and singular values: against dense E×E matrices in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from oculi_jax.analysis.composition import CompositionAnalysis
from oculi_jax.models.decoder.parameters import parameter_table
from oculi_jax.models.llama import Llama, LlamaAttentionAdapter

from .test_composition import MODEL
from .tiny import tiny_config, tiny_llama
from .tolerances import GRADIENT, ROUNDING, ROUTES

Params = dict[str, np.ndarray]


def random_params(seed: int = 0, **changes: Any) -> Params:
    """The parameters of `tiny_llama`, to be changed."""
    rng = np.random.default_rng(seed)
    rows = parameter_table(tiny_config(**changes))
    return {row.name: (rng.normal(0.0, 0.3, row.shape) + ("norm" in row.name)).astype(np.float32) for row in rows}


def build(params: Params, **changes: Any) -> Llama:
    return Llama(tiny_config(**changes), jax.tree.map(jnp.asarray, params))


def circuits(
    q: Any, k: Any, v: Any, o: Any, norm: Any, n_heads: int, only: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Dense W_QK and W_OV `[H, E, E]` of one layer (of `only` these heads), from checkpoints' projections `[out, in]`, in float64."""
    q, k, v, o, norm = (np.asarray(x, np.float64) for x in (q, k, v, o, norm))
    size = q.shape[0] // n_heads
    group = q.shape[0] // k.shape[0]
    qk, ov = [], []
    for h in range(n_heads) if only is None else only:
        own, shared = slice(h * size, (h + 1) * size), slice(h // group * size, (h // group + 1) * size)
        qk.append(np.diag(norm) @ q[own].T @ k[shared] @ np.diag(norm))
        ov.append(o[:, own] @ v[shared] @ np.diag(norm))
    return np.array(qk), np.array(ov)


def dense(params: Params, n_heads: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Dense W_QK and W_OV `[L, H, E, E]` of a tiny model's parameters."""
    names = [f"layers.attn.{name}.weight" for name in "qkvo"]
    found = []
    for layer, norm in enumerate(params["layers.attn_norm.weight"]):
        q, k, v, o = (params[name][layer] for name in names)
        width = q.shape[-1]
        flat = (q.reshape(-1, width), k.reshape(-1, width), v.reshape(-1, width), o.reshape(width, -1))
        found.append(circuits(*flat, norm, n_heads))
    return np.array([x[0] for x in found]), np.array([x[1] for x in found])


def score(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a @ b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def all_pairs(params: Params, n_heads: int = 4) -> dict[str, np.ndarray]:
    qk, ov = dense(params, n_heads)
    n_layers = len(qk)
    want = {name: np.zeros((n_layers, n_heads, n_layers, n_heads)) for name in "qkv"}
    for i in range(n_layers):
        for j in range(i + 1, n_layers):
            for h in range(n_heads):
                for g in range(n_heads):
                    for name, reader in (("q", qk[j, g].T), ("k", qk[j, g]), ("v", ov[j, g])):
                        want[name][i, h, j, g] = score(reader, ov[i, h])
    return want


def assert_composition(model: Llama, want: dict[str, np.ndarray], tolerance: float = ROUTES) -> None:
    found = CompositionAnalysis.weight_composition(model).values
    assert set(found) == set(want) == set("qkv")
    for name in want:
        assert found[name].dtype == jnp.float32
        np.testing.assert_allclose(found[name], want[name], rtol=tolerance, atol=0, err_msg=name)


@pytest.mark.parametrize("changes", [
    {}, {"attention_bias": True}, {"num_key_value_heads": 1}, {"num_key_value_heads": 4},
    {"head_dim": 30}, {"num_hidden_layers": 1},
], ids=str)  # fmt: skip
def test_weight_composition_is_that_of_the_dense_matrices(changes: dict[str, Any]) -> None:
    """Norms folded, biases without a part in it; `head_dim` 30 exceeds the width, so circuits have not the rank D."""
    params = random_params(**changes)
    assert_composition(build(params, **changes), all_pairs(params))


def test_weight_composition_of_bfloat16_is_computed_in_float32() -> None:
    params = {name: value.astype(ml_dtypes.bfloat16) for name, value in random_params().items()}
    wide = {name: value.astype(np.float32) for name, value in params.items()}
    assert_composition(build(params), all_pairs(wide))


def test_weight_composition_of_degenerate_heads() -> None:
    """A head of lower rank is like any other; one that writes nothing, or compares nothing, scores 0 and not NaN."""
    params = random_params(num_key_value_heads=4)
    params["layers.attn.v.weight"][0, 1, 2:] = params["layers.attn.v.weight"][0, 1, :1]
    params["layers.attn.k.weight"][2, 0, 3:] = 0.0
    want = all_pairs(params)
    assert_composition(build(params, num_key_value_heads=4), want)
    params["layers.attn.o.weight"][0, :, 3] = 0.0
    params["layers.attn.q.weight"][2, 2] = 0.0
    for name in "qkv":
        want[name][0, 3] = 0.0
        want[name][:, :, 2, 2] = want[name][:, :, 2, 2] if name == "v" else 0.0
    assert_composition(build(params, num_key_value_heads=4), want)


def test_weight_composition_does_not_see_sizes() -> None:
    params = random_params()
    want = all_pairs(params)
    params["layers.attn.o.weight"][0] *= 100.0
    params["layers.attn.k.weight"][2] *= 1e-3
    params["layers.attn.v.weight"][1] *= -7.0
    assert_composition(build(params), want)


def test_orthogonal_heads_do_not_compose() -> None:
    """What is written to one half of the stream, and read from the other."""
    params = random_params()
    for name in "qkv":
        params[f"layers.attn.{name}.weight"][1:, ..., :12] = 0.0
    params["layers.attn.o.weight"][0, 12:] = 0.0
    for name, values in CompositionAnalysis.weight_composition(build(params)).values.items():
        assert not np.asarray(values)[0].any(), name
        assert np.asarray(values)[1, :, 2].min() > 0.01


def test_weight_composition_under_jit_vmap_and_grad() -> None:
    want = CompositionAnalysis.weight_composition(MODEL)
    found = jax.jit(CompositionAnalysis.weight_composition)(MODEL)
    models = jax.tree.map(lambda *x: jnp.stack(x), tiny_llama(1), MODEL)
    mapped = jax.vmap(CompositionAnalysis.weight_composition)(models)
    for name in "qkv":
        np.testing.assert_allclose(found.values[name], want.values[name], atol=ROUNDING)
        np.testing.assert_allclose(mapped.values[name][1], want.values[name], atol=ROUNDING)

    def squares(model: Llama) -> Any:
        values = CompositionAnalysis.weight_composition(model).values
        return values["q"] ** 2 + values["k"] ** 2 + values["v"] ** 2

    def total(model: Llama) -> Any:
        return jnp.sum(squares(model))

    gradient, rng = jax.grad(total)(MODEL), np.random.default_rng(0)
    step = jax.tree.map(lambda x: jnp.asarray(rng.normal(0.0, 1e-3, x.shape), x.dtype), MODEL)
    up, down = (squares(jax.tree.map(lambda x, d, sign=sign: x + sign * d, MODEL, step)) for sign in (1.0, -1.0))
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, step)), start=jnp.float32(0))
    # The totals, 6.0, are a thousandth apart: summed in float32, a last digit of theirs is a tenth of what is tolerated.
    difference = (np.asarray(up, np.float64) - np.asarray(down)).sum()
    np.testing.assert_allclose(difference / 2, slope, rtol=GRADIENT)


def test_baseline_is_the_root_mean_square_of_unrelated_heads() -> None:
    """Whatever the matrices: here with spectra that fall steeply, each source turned at random by an orthogonal matrix."""
    changes = dict(num_hidden_layers=2, num_attention_heads=40, num_key_value_heads=40, hidden_size=48)
    params, rng = random_params(**changes), np.random.default_rng(1)
    steep = 0.6 ** np.arange(6, dtype=np.float32)
    for name in "qkv":
        params[f"layers.attn.{name}.weight"] *= steep[:, None]
    params["layers.attn.o.weight"][:, :5] *= 20.0  # a few directions that every head writes most to
    for head in range(40):
        turn, upper = np.linalg.qr(rng.normal(size=(48, 48)))
        turn *= np.sign(np.diag(upper))  # so that it is uniform
        params["layers.attn.o.weight"][0, :, head] = turn @ params["layers.attn.o.weight"][0, :, head]
    found = CompositionAnalysis.weight_composition(build(params, **changes))
    baseline = float(found.metadata["baseline"])
    assert baseline == pytest.approx(48**-0.5)
    for name in "qkv":
        scores = np.asarray(found.values[name])[0, :, 1].astype(np.float64)
        root_mean_square = np.sqrt((scores**2).mean())
        assert abs(root_mean_square / baseline - 1) < 0.04  # 1,600 scores that spread by half, from 40 turns
        assert 0.8 * baseline < scores.mean() < root_mean_square


def by_modulus(values: np.ndarray) -> np.ndarray:
    return values[np.argsort(-np.abs(values), kind="stable")]


def same_numbers(found: np.ndarray, want: np.ndarray) -> None:
    """Equal as sets of complex numbers: each has its partner, conjugates and ties in any order."""
    assert found.shape == want.shape
    distance = np.abs(found[:, None] - want[None, :])
    assert max(distance.min(0).max(), distance.min(1).max()) <= ROUTES * np.abs(want).max()


def test_eigenvalues_are_those_of_the_dense_matrices() -> None:
    params = random_params()
    model = build(params)
    for found, want in zip(
        (CompositionAnalysis.qk_eigenvalues(model), CompositionAnalysis.ov_eigenvalues(model)),
        dense(params),
        strict=True,
    ):
        assert found.shape == (3, 4, 6) and np.iscomplexobj(found)
        assert (np.diff(np.abs(found), axis=-1) <= ROUNDING).all()
        for layer in range(3):
            for head in range(4):
                same_numbers(found[layer, head], by_modulus(np.linalg.eigvals(want[layer, head]))[:6])


@pytest.mark.parametrize("tied", [False, True])
def test_copying_is_judged_on_the_whole_vocabulary(tied: bool) -> None:
    """Against the eigenvalues of the V×V matrix; the head whose V is the transpose of its O copies where embeddings are tied."""
    params = random_params(tie_word_embeddings=tied)
    params["norm.weight"][:] = np.where(tied, 1.0, params["norm.weight"])
    params["layers.attn_norm.weight"][0] = np.where(tied, 1.0, params["layers.attn_norm.weight"][0])
    params["layers.attn.v.weight"][0, 0] = params["layers.attn.o.weight"][0, :, 0].T
    params["layers.attn.o.weight"][1, :, 2] = 0.0
    found = CompositionAnalysis.ov_copying_scores(build(params, tie_word_embeddings=tied))
    embed = params["embed"].astype(np.float64)
    unembed = params.get("unembed", params["embed"]).astype(np.float64) @ np.diag(
        params["norm.weight"].astype(np.float64)
    )
    _, ov = dense(params)
    for layer in range(3):
        for head in range(4):
            values = np.linalg.eigvals(unembed @ ov[layer, head] @ embed.T)
            want = 0.0 if (layer, head) == (1, 2) else values.sum().real / np.abs(values).sum()
            assert abs(found[layer, head] - want) < ROUTES, (layer, head)
    assert found[1, 2] == 0 and (not tied or abs(found[0, 0] - 1) < ROUTES)


@pytest.mark.parametrize("circuit", ["qk", "ov"])
def test_singular_values_and_vectors_are_those_of_the_dense_matrices(circuit: str) -> None:
    params = random_params()
    svd: Any = getattr(CompositionAnalysis, f"{circuit}_svd")
    model, matrices = build(params), dense(params)[["qk", "ov"].index(circuit)]
    want = np.linalg.svd(matrices, compute_uv=False)[..., :6]
    np.testing.assert_allclose(svd(model), want, rtol=ROUTES, atol=ROUNDING)
    np.testing.assert_allclose(jax.jit(svd)(model), want, rtol=ROUTES, atol=ROUNDING)
    one = svd(model, 2, 3)
    assert one.U.shape == (24, 6) and one.S.shape == (6,) and one.Vh.shape == (6, 24)
    np.testing.assert_allclose((one.U * one.S[None]) @ one.Vh, matrices[2, 3], atol=ROUNDING)
    np.testing.assert_allclose(one.U.T @ one.U, np.eye(6), atol=ROUNDING)
    np.testing.assert_allclose(one.Vh @ one.Vh.T, np.eye(6), atol=ROUNDING)
    np.testing.assert_allclose(one.S, want[2, 3], rtol=ROUTES, atol=ROUNDING)


@pytest.mark.real
@pytest.mark.torch
def test_weight_composition_of_the_real_model(adapter: LlamaAttentionAdapter, hf) -> None:
    """Dense float64 matrices from Hugging Face's own modules, for pairs drawn at random."""
    found = CompositionAnalysis.weight_composition(adapter.model).values
    layers = hf.model.layers

    def matrices(layer: int, heads: list[int]) -> tuple[np.ndarray, np.ndarray]:
        attn = layers[layer].self_attn
        weights = [proj.weight.detach().numpy() for proj in (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj)]
        return circuits(*weights, layers[layer].input_layernorm.weight.detach().numpy(), 9, heads)

    rng = np.random.default_rng(0)
    for _ in range(4):
        i, j = sorted(rng.choice(30, 2, replace=False).tolist())
        sources, targets = rng.integers(0, 9, (2, 3)).tolist()
        _, written = matrices(i, sources)
        for h, g, b, qk, ov in zip(sources, targets, written, *matrices(j, targets), strict=True):
            for name, reader in (("q", qk.T), ("k", qk), ("v", ov)):
                assert abs(float(found[name][i, h, j, g]) / score(reader, b) - 1) < ROUTES, (name, i, h, j, g)
    for name in "qkv":
        scores = np.asarray(found[name])
        later = (np.arange(30)[:, None] < np.arange(30)[None, :])[:, None, :, None]
        assert scores.shape == (30, 9, 30, 9) and (np.broadcast_to(later, scores.shape) == (scores > 0)).all()
