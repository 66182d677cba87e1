"""Matryoshka attribution (arXiv:2609.25518): its theorem 1 on runs of a model, its gradients, and circuits that are known."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import forward, mean_activations
from oculi_jax.circuits import Circuit, Scores, faithfulness
from oculi_jax.intervention import Edit
from oculi_jax.metrics import logit_difference
from oculi_jax.training import matryoshka, soft_top_k
from oculi_jax.training.masks import LearnedScores, Search, Units
from oculi_jax.training.nested_masks import loss_of_size, size_drawn

from . import planted
from .test_edges import GRAPH, MODEL, near
from .test_edges import pair as pair_of
from .tiny import tiny_llama

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
# Pairs of two lengths, padded.
CLEAN, CORRUPTED = (
    np.stack([np.pad(rows[i], (0, 9 - len(rows[i]))) for rows in map(pair_of, (0, 1, 2), (9, 9, 6))]) for i in (0, 1)
)
MASK = np.arange(9) < np.array([9, 9, 6])[:, None]
METRIC = logit_difference(np.array([3, 4, 5]), np.array([17, 18, 19]))
SETTINGS: dict[str, Any] = dict(key=KEY, progress=False)


def searched(model: Any, kind: str, **options: Any) -> tuple[Search, dict[str, Any]]:
    """A search over those pairs, and the parameters of a fit in which they come in their order."""
    settings: dict[str, Any] = dict(held_out=0.3, seeds=1, controls=False, key=KEY) | options
    found = Search(
        model, (CLEAN, CORRUPTED, MASK, None), METRIC, Units.of(model.config, kind, None), "corrupted", **settings
    )
    return found, {"order": jnp.arange(2), "asked": jnp.arange(2)}


def mixture(x: Any, value: Any) -> Any:
    keep, other = value
    return keep * x + (1 - keep) * other


def by_hand(model: Any, number: int, keep: Any) -> Any:
    """The metric of a run with nodes mixed by edits, whose values are taken as they are: `Blend` would round `keep` to float32."""
    tokens, spoilt, mask = CLEAN[number], CORRUPTED[number], MASK[number]
    other = forward(model, spoilt, capture=("embed", "z", "mlp_out"), mask=mask)
    layers = keep[1:].reshape(3, 5)
    mixed = (
        Edit("embed", "apply", None, value=(keep[:1][None], other["embed"]), fn=mixture),
        Edit("z", "apply", None, value=(layers[:, :4, None, None], other["z"]), fn=mixture),
        Edit("mlp_out", "apply", None, value=(layers[:, 4:, None], other["mlp_out"]), fn=mixture),
    )
    return logit_difference(METRIC.a[number], METRIC.b[number])(forward(model, tokens, mixed, mask=mask))


def test_theorem_1_the_first_step_is_centred_integrated_gradients_along_masks() -> None:
    """At scores of zero the mask is k/n everywhere, so over k uniform on [0, n] the expected gradient of the scores is that of the
    mask along its diagonal, integrated with weight 6 t (1 − t), less its mean over units, over 6 temperatures. In float64, both
    sides by one rule of quadrature; the second runs the model with ordinary interventions.
    """
    temperature, n = 0.5, 16
    at, weights = np.polynomial.legendre.leggauss(24)
    shares, weights = (at + 1) / 2, weights / 2
    with jax.enable_x64(True):
        model = tiny_llama(dtype=np.float64)
        search, parameters = searched(model, "nodes")
        number = int(search.rest[1])

        def lost(scores: Any, k: Any) -> Any:
            return loss_of_size(search, search.pair(parameters, jnp.int32(1)), scores, k, temperature)

        def each(values: Any) -> np.ndarray:
            return np.asarray(jax.jit(lambda given: jax.lax.map(values, given))(jnp.asarray(shares)))

        expected = -weights @ each(lambda share: jax.grad(lost)(jnp.zeros(n), share * n))
        slopes = each(lambda share: jax.grad(lambda keep: by_hand(model, number, keep))(jnp.full(n, share)))
    path = (weights * 6 * shares * (1 - shares)) @ slopes
    np.testing.assert_allclose(expected, (path - path.mean()) / (6 * temperature), rtol=0, atol=1e-12)
    assert np.abs(expected).max() > 0.05


def test_a_step_is_that_gradient_of_the_size_it_drew() -> None:
    """Plain descent, from zero: what it adds is the gradient at one mask, of a size from 1 to n that its own key drew."""
    import optax

    found = matryoshka(
        MODEL,
        CLEAN,
        CORRUPTED,
        METRIC,
        mask=MASK,
        steps=1,
        optimiser=optax.sgd(1.0),
        held_out=0.3,
        controls=False,
        **SETTINGS,
    )
    assert float(found.values.sum()) == pytest.approx(0, abs=1e-6)
    rest, shares, gaps = searched(MODEL, "nodes")[0].rest.tolist(), np.linspace(1, 16, 1501) / 16, []
    slopes = jax.jit(
        lambda number: jax.lax.map(jax.grad(lambda keep: by_hand(MODEL, number, keep)), masks), static_argnums=0
    )
    masks = jnp.asarray(np.repeat(shares[:, None], 16, axis=1), jnp.float32)
    for number in rest:  # which of the two pairs came first is the key's
        slope = np.asarray(slopes(number))
        steps = (shares * (1 - shares) / 0.5)[:, None] * (slope - slope.mean(axis=1, keepdims=True))
        gaps.append(np.abs(steps - np.asarray(found.values)).max(axis=1).min())
    assert min(gaps) <= 0.01 * np.abs(found.values).max()


@pytest.mark.parametrize("sizes", ["uniform", "log"])
def test_sizes_are_drawn_as_is_said(sizes: str) -> None:
    """Kolmogorov's distance to the distribution; and the mask of each sums to it."""
    drawn = np.asarray(jax.vmap(lambda key: size_drawn(key, 40, sizes))(jax.random.split(KEY, 4000)))
    assert drawn.min() >= 1 and drawn.max() <= 40
    share = np.sort((drawn - 1) / 39 if sizes == "uniform" else np.log(drawn) / np.log(40))
    assert np.abs(share - (np.arange(4000) + 0.5) / 4000).max() < 1.63 / np.sqrt(4000)  # of 99 in 100 draws
    scores = RNG.normal(size=40).astype(np.float32)
    masks = jax.vmap(lambda k: soft_top_k(scores, k, 0.5))(drawn[:50])
    np.testing.assert_allclose(masks.sum(axis=1), drawn[:50], rtol=1e-6)


@pytest.mark.torch
def test_gradients_of_edges_are_autograds_on_hugging_faces_modules(tmp_path: Path) -> None:
    import torch

    from .split import names_of, run_split, theirs

    hf, readers = theirs(MODEL, tmp_path), names_of(theirs(MODEL, tmp_path))[1]
    search, parameters = searched(MODEL, "edges")
    number = int(search.rest[0])
    scores = RNG.normal(size=GRAPH.n_edges).astype(np.float32)
    k = 0.4 * GRAPH.n_edges
    pair = search.pair(parameters, jnp.int32(0))
    value, slope = jax.jit(jax.value_and_grad(lambda s: loss_of_size(search, pair, s, jnp.float32(k), 0.5)))(scores)

    given = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    low, high = -20.0, 20.0
    for _ in range(80):  # τ, by bisection, then one step of Newton's, whose derivative is τ's
        middle = (low + high) / 2
        many = float(torch.sigmoid((given.detach() - middle) / 0.5).sum())
        low, high = (middle, high) if many > k else (low, middle)
    soft = torch.sigmoid((given.detach() - low) / 0.5)
    slack = torch.sigmoid((given - low) / 0.5).sum() - k
    tau = low + slack * 0.5 / (soft * (1 - soft)).sum()
    mask = torch.zeros(GRAPH.edges.size, dtype=torch.float64)
    mask[np.flatnonzero(GRAPH.edges)] = torch.sigmoid((given - tau) / 0.5)
    mask = mask.reshape(GRAPH.edges.shape)
    n = MASK[number].sum()
    with torch.no_grad():
        other = run_split(hf, CORRUPTED[number][:n])[0]

    def read(name: str, writes: Any) -> Any:
        share = mask[:, readers.index(name)]
        return sum(m * own + (1 - m) * that for m, own, that in zip(share, writes, other, strict=False))

    logits = run_split(hf, CLEAN[number][:n], read)[1][-1]
    lost = -(logits[METRIC.a[number]] - logits[METRIC.b[number]])
    lost.backward()
    assert given.grad is not None
    near(value, lost.detach().numpy())
    near(slope, given.grad.numpy())
    again = Search.__new__(Search)
    again.__dict__.update({**vars(search), "remat": True})
    pair = again.pair(parameters, jnp.int32(0))
    near(jax.jit(jax.grad(lambda s: loss_of_size(again, pair, s, jnp.float32(k), 0.5)))(scores), given.grad.numpy())


@cache
def of_nodes() -> LearnedScores:
    clean, corrupted, metric = planted.pairs()
    return matryoshka(planted.MODEL, clean, corrupted, metric, steps=100, seeds=2, **SETTINGS)


def test_a_circuit_that_is_known_is_found_and_controls_are_at_chance() -> None:
    """Of nodes; of edges; of those two heads' model, whose MLPs write nothing."""
    found = of_nodes()
    assert found.top(3).nodes.tolist() == Circuit(planted.GRAPH, nodes=planted.NODES).nodes.tolist()
    for each in found.each:
        assert set(np.argsort(-np.asarray(each))[:3].tolist()) == {planted.GRAPH.node(name) for name in planted.NODES}
    np.testing.assert_allclose(found.values, found.each.mean(axis=0), atol=1e-6)
    clean, corrupted, metric = planted.pairs()
    edges = matryoshka(planted.MODEL, clean, corrupted, metric, kind="edges", steps=150, controls=False, **SETTINGS)
    assert set(edges.top(3).names) == set(planted.EDGES)
    assert set(found.controls) == {"random scores", "shuffled answers"}
    # Two of eleven nodes are too few; five have all three: the best that a ranking can do.
    np.testing.assert_allclose(found.curve.faithfulness, [0] * 8 + [1, 1], atol=0.01)
    assert all(curve.cpr < 0.4 for curve in found.controls.values()), found
    assert "4 held-out pairs; random scores" in repr(found) and "2 seeds" in repr(found) and "nodes: CPR" in repr(found)


def test_controls_of_nodes_keep_the_input_so_that_they_can_be_wrong() -> None:
    """A fit to shuffled answers ranks `input` low, and all circuits without it are empty: its curve would be 0 whatever it learnt."""
    clean, corrupted, metric = planted.pairs()
    prompts, units = (clean, corrupted, None, None), Units.of(planted.MODEL.config, "nodes", None)
    settings: dict[str, Any] = dict(held_out=0.25, seeds=1, controls=True, key=KEY)
    search = Search(planted.MODEL, prompts, metric, units, "corrupted", **settings)
    right = np.isin(planted.GRAPH.writers, planted.NODES).astype(np.float32)
    control = np.where(np.arange(units.n) == planted.GRAPH.node("input"), -1, right).astype(np.float32)
    found = search.judged(np.stack([right, control]))
    np.testing.assert_array_equal(found["controls"]["shuffled answers"].faithfulness, found["curve"].faithfulness)
    assert found["curve"].faithfulness[-2] == pytest.approx(1, abs=0.01) and control[0] == -1


def test_what_comes_with_it_is_what_held_out_pairs_say() -> None:
    """It is scores like others; and its curve is that of the pairs which it names, which it was not fitted to."""
    found = of_nodes()
    clean, corrupted, metric = planted.pairs()
    rows = found.held_out
    judged = (clean[rows], corrupted[rows], logit_difference(metric.a[rows], metric.b[rows]))
    for scores in (found, Scores(found.values, found.graph)):
        curve = faithfulness(planted.MODEL, scores, *judged)
        np.testing.assert_array_equal(curve.by_prompt, found.curve.by_prompt)
    assert found.losses.shape == (100, 2) and len(found.seeds) == 2 and len(rows) == 4
    assert found.losses[-20:].mean() < found.losses[:20].mean()


def test_neurons_and_other_ablations_are_scored_too() -> None:
    clean, corrupted, metric = CLEAN, CORRUPTED, METRIC
    found = matryoshka(
        MODEL,
        clean,
        corrupted,
        metric,
        kind="neurons",
        ablation="mean",
        mask=MASK,
        steps=2,
        sizes="log",
        controls=False,
        **SETTINGS,
    )
    assert found.kind == "neurons" and found.values.shape == (3, 40) and found.controls == {}
    # The means that take the place of what is left out are of the pairs that it was fitted to, for the others as well.
    held = found.held_out
    rest = np.setdiff1d(np.arange(len(CLEAN)), held)
    own, ends = logit_difference(np.asarray(METRIC.a)[held], np.asarray(METRIC.b)[held]), []
    for rows in (rest, held):
        means = mean_activations(MODEL, CORRUPTED[rows], "act", mask=MASK[rows])
        curve = faithfulness(MODEL, found, CLEAN[held], CORRUPTED[held], own, ablation=dict(means), mask=MASK[held])
        ends.append(curve.empty)
    np.testing.assert_allclose(found.curve.empty, ends[0], atol=1e-5)
    assert np.abs(ends[1] - ends[0]).max() > 1e-3


def test_what_cannot_be_is_told() -> None:
    good: dict[str, Any] = dict(steps=1, mask=MASK, **SETTINGS)
    for given, options, message in (
        ((CLEAN, CORRUPTED), {"kind": "heads"}, "kind is 'heads', and must be one of 'edges', 'nodes', 'neurons'"),
        ((CLEAN, CORRUPTED), {"sizes": "flat"}, "sizes is 'flat', and must be 'uniform' or 'log'"),
        ((CLEAN, CORRUPTED), {"temperature": 0}, "temperature is 0, and must be a finite number above 0"),
        ((CLEAN, CORRUPTED), {"kind": "edge"}, "Did you mean 'edges'"),
        ((CLEAN, CORRUPTED), {"held_out": 1}, "held_out is 1, and must be a share"),
        ((CLEAN[0], CORRUPTED[0]), {"mask": None}, "There is 1 pair, and some are needed"),
        ((CLEAN, CORRUPTED[:, :5]), {}, "they must have one shape"),
        ((CLEAN, CORRUPTED), {"graph": planted.GRAPH}, "graph is of a model with 2 layers of 4 heads"),
        ((CLEAN, CORRUPTED), {"ablation": "none"}, "ablation is 'none'"),
        ((CLEAN, CORRUPTED), {"seeds": 0}, "seeds"),
    ):  # fmt: skip
        measured = logit_difference(3, 17) if len(np.shape(given[0])) == 1 else METRIC
        with pytest.raises(ValueError, match=message):
            matryoshka(MODEL, *given, measured, **{**good, **options})
