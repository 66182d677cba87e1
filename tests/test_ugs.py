"""Uniform gradient sampling: its masks beside sums over all of them, and a circuit that was planted in a model."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import forward, mean_activations
from oculi_jax.circuits import Graph, faithfulness, run_circuit
from oculi_jax.metrics import kl_divergence
from oculi_jax.models.llama import Llama
from oculi_jax.training import SampledEdges, ugs
from oculi_jax.training.gradient_sampling import sampled
from oculi_jax.training.objective import last_logits

from .tiny import tiny_llama

KEY = jax.random.key(0)
N, T, E = 64, 4, 24
IDS = np.random.default_rng(0).integers(0, 61, (N, T)).astype(np.int32)
IDS[:, -1] = 7  # all end alike
THIRDS = np.arange(E).reshape(3, 8)
PLANTED = ("input->a0.h1<v>", "a0.h1->m1", "m1->logits")


def test_a_mask_is_its_probability_on_average_and_as_often_in_part_as_its_window_says() -> None:
    p = np.array([0.02, 0.3, 0.5, 0.9], np.float32)
    masks = np.asarray(jax.vmap(lambda key: sampled(jnp.asarray(p), key))(jax.random.split(KEY, 40_000)))
    window = p * (1 - p)
    np.testing.assert_allclose(masks.mean(axis=0), p, atol=0.01)
    inside = (masks > 0) & (masks < 1)
    np.testing.assert_allclose(inside.mean(axis=0), window, atol=0.01)
    np.testing.assert_allclose((masks == 1).mean(axis=0), p - window / 2, atol=0.01)
    for column, there in zip(masks.T, inside.T, strict=True):  # uniform between
        np.testing.assert_allclose(np.quantile(column[there], [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.06)
    ends = np.asarray(sampled(jnp.array([0.0, 1.0]), KEY))
    np.testing.assert_array_equal(ends, [0, 1])


def test_its_gradient_is_that_of_masks_that_are_one_or_zero() -> None:
    """Of f(α, β), by sums over the ends of each and quadrature over the other's window; the log odds' own slope is p (1 − p)."""
    odds = np.array([0.4, -0.8])
    p = 1 / (1 + np.exp(-odds))

    def f(a: Any, b: Any) -> Any:
        return (a - 0.3) ** 3 * (2 - b) + a * b * b - 0.7 * b

    def mean(values: Any, q: float) -> float:
        """Over the mixture of one mask."""
        w = q * (1 - q)
        places = (np.arange(2000) + 0.5) / 2000
        return (q - w / 2) * values(1.0) + (1 - q - w / 2) * values(0.0) + w * values(places).mean()

    wanted = np.array([
        mean(lambda b: f(1.0, b) - f(0.0, b), p[1]) * p[0] * (1 - p[0]),
        mean(lambda a: f(a, 1.0) - f(a, 0.0), p[0]) * p[1] * (1 - p[1]),
    ])  # fmt: skip

    def one(key: Any) -> Any:
        return jax.grad(lambda x: f(*sampled(jax.nn.sigmoid(x), key)))(jnp.asarray(odds, jnp.float32))

    slopes = np.asarray(jax.vmap(one)(jax.random.split(KEY, 200_000)))
    error = slopes.std(axis=0) / np.sqrt(len(slopes))
    assert (np.abs(slopes.mean(axis=0) - wanted) <= 4 * error).all() and (error < 0.02 * np.abs(wanted)).all()


@cache
def planted() -> Llama:
    """Two layers; embeddings in a third of the stream, of one length; head 1 of layer 0 writes their mean into the second third,
    the MLP of layer 1 reads it there and writes into the last, which alone is unembedded. The MLP of layer 0 writes there too,
    and reads only its own token: at the last one, always the same. Nothing else writes.
    """
    model: Any = tiny_llama(num_hidden_layers=2)
    rng, thirds = np.random.default_rng(1), THIRDS

    def put(part: Any, weight: Any) -> None:
        part.weight = type(part.weight)(jnp.asarray(weight, jnp.float32))

    embed = np.zeros((61, E))
    embed[:, thirds[0]] = rng.normal(size=(61, 8))
    embed /= np.linalg.norm(embed, axis=1, keepdims=True)
    model.embed = type(model.embed)(jnp.asarray(embed, jnp.float32))
    attn, mlp = model.layers.attn, model.layers.mlp
    o, down, v = (np.zeros(part.weight[...].shape) for part in (attn.o, mlp.down, attn.v))
    v[0, 0, :, :8] = np.eye(6, 8)  # what heads 0 and 1 share
    o[0][thirds[1][:6], 1] = np.eye(6)
    for part in (attn.q, attn.k):
        put(part, np.zeros(part.weight[...].shape))
    gate, up = (np.zeros(part.weight[...].shape) for part in (mlp.gate, mlp.up))
    gate[1][:, thirds[1]], up[1][:, thirds[1]] = rng.normal(size=(2, 40, 8))
    gate[0][:, thirds[0]], up[0][:, thirds[0]] = 0.3 * rng.normal(size=(2, 40, 8))
    down[:, thirds[2]] = rng.normal(size=(2, 8, 40))
    for part, weight in ((attn.v, v), (attn.o, o), (mlp.gate, gate), (mlp.up, up), (mlp.down, down)):
        put(part, weight)
    for norm in (model.layers.attn_norm, model.layers.mlp_norm, model.norm):
        put(norm, np.ones(norm.weight[...].shape))
    unembed = np.zeros((61, E))
    unembed[:, thirds[2]] = rng.normal(size=(61, 8))
    model.unembed = type(model.unembed)(jnp.asarray(unembed, jnp.float32))
    return model


@cache
def found() -> SampledEdges:
    settings: Any = dict(steps=300, batch_size=16, penalty=0.02, learning_rate=0.1, constants_rate=0.1, seeds=2)
    return ugs(planted(), IDS, key=KEY, progress=False, **settings)


def test_a_planted_circuit_is_found() -> None:
    got = found()
    graph = Graph.of(planted().config)
    order = np.argsort(-np.asarray(got.scores.values)[graph.edges])
    assert {graph.names[i] for i in order[:3]} == set(PLANTED)
    names = got.circuit().names
    assert set(PLANTED) <= set(names) and len(names) <= 8 and "m0->logits" not in names
    assert got.losses.shape == (300,) and len(got.held_out) == N // 4


def test_its_loss_is_the_circuits_and_below_its_controls() -> None:
    """Beside an ordinary run of the circuit. The constant of the MLP that is cut off comes near what it writes at the last token."""
    got, model = found(), planted()
    ids = IDS[got.held_out]
    assert got.constants is not None
    metric = kl_divergence(last_logits(model, ids, None))
    options: Any = dict(edges=got.circuit().edges.astype(np.float32), ablation=got.constants)
    out: Any = run_circuit(model, ids, ids, **options)
    logits = np.asarray(out.logits[:, -1], np.float64)
    whole = np.asarray(metric.baseline, np.float64)
    p, q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (whole, logits))
    np.testing.assert_allclose(got.loss, (np.exp(p) * (p - q)).sum(axis=1), rtol=1e-3, atol=1e-6)
    controls = {name: values.mean() for name, values in got.controls.items()}
    assert list(controls) == ["shuffled answers", "random edges", "no edges", "mean constants", "whole"]
    assert abs(controls["whole"]) < 1e-6
    assert got.loss.mean() < 0.25 * min(controls["random edges"], controls["no edges"])
    assert got.loss.mean() < 0.25 * controls["mean constants"]
    assert got.loss.mean() < 0.25 * controls["shuffled answers"]
    there = np.asarray(forward(model, ids[0], capture="mlp_out")["mlp_out"][0][:, THIRDS[2]])
    mean = mean_activations(model, IDS, "mlp_out")
    far = [np.linalg.norm(np.asarray(x["mlp_out"])[0, THIRDS[2]] - there[-1]) for x in (got.constants, mean)]
    assert far[0] < 0.5 * far[1]
    assert "random edges" in repr(got) and "held-out prompts" in repr(got) and "; 2 seeds " in repr(got)
    first, second = got.by_seed  # the second has found as good a circuit by other masks
    assert first == pytest.approx(got.loss.mean(), rel=1e-6) and first != second
    assert second < 0.25 * min(controls["random edges"], controls["no edges"], controls["mean constants"])
    curve = faithfulness(model, got.scores, ids, ids, metric, ablation=got.constants, sizes=(0.05, 1.0))
    np.testing.assert_allclose(curve.empty, got.controls["no edges"], rtol=1e-4, atol=1e-6)


def test_the_first_seed_is_the_only_one_of_a_fit_that_has_one() -> None:
    settings: Any = dict(steps=5, batch_size=8, learning_rate=0.1, key=KEY, progress=False)
    one, two = (ugs(planted(), IDS, seeds=seeds, controls=seeds > 1, **settings) for seeds in (1, 2))
    np.testing.assert_allclose(two.scores.values, one.scores.values, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(two.losses, one.losses, rtol=1e-4)
    assert one.by_seed.shape == (1,) and "seeds" not in repr(one)


def test_corrupted_prompts_take_the_place_of_constants() -> None:
    """Padding on the left of some."""
    mask = np.arange(T)[None] >= (np.arange(N) % 2)[:, None]
    other = np.roll(IDS, 2, axis=0)
    got = ugs(planted(), IDS, other, mask=mask, steps=3, batch_size=4, controls=False, key=KEY, progress=False)
    assert got.constants is None and list(got.controls) == ["random edges", "no edges", "whole"]
    rows, model = got.held_out, planted()
    edges = np.zeros(got.scores.graph.edges.shape, np.float32)
    out: Any = run_circuit(model, IDS[rows], other[rows], edges=edges, mask=mask[rows])
    wanted = [
        kl_divergence(np.asarray(base)).of(row[None])
        for base, row in zip(last_logits(model, IDS[rows], mask[rows]), out.logits[:, -1], strict=True)
    ]
    np.testing.assert_allclose(got.controls["no edges"], wanted, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_is_told() -> None:
    model = planted()
    for corrupted, options, message in (
        (None, {"penalty": -1.0}, "penalty is -1.0, and must be 0 or more"),
        (None, {"penalty": "x"}, "penalty is 'x', and must be 0 or more"),
        (None, {"learning_rate": 0}, "learning_rate is 0, and must be a finite number above 0"),
        (None, {"constants_rate": np.inf}, "constants_rate is inf"),
        (None, {"steps": 0}, "steps is 0"),
        (None, {"seeds": 0}, "seeds is 0"),
        (IDS + 60, {}, r"corrupted\[0\] is \d+, and this model's vocabulary"),
        (IDS[:, :2], {}, r"clean has shape \[64, 4\], and corrupted \[64, 2\]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ugs(model, IDS, corrupted, **{"steps": 1, **options}, key=KEY, progress=False)
