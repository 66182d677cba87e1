"""Distributed alignment search: a subspace that was planted in a model is found, and its controls are at chance."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import subspace_angles

from oculi_jax import forward, sweep
from oculi_jax.intervention import PerPrompt, Subspace
from oculi_jax.metrics import rank
from oculi_jax.models.llama import Llama
from oculi_jax.training import DAS, DBM, BoundlessDAS, align, disentanglement, interchange_accuracy

from .tiny import tiny_llama

N, T, E, LAYER, CLASSES = 1000, 7, 24, 1, 8
RNG = np.random.default_rng(0)
PLANE = np.linalg.qr(RNG.normal(size=(E, 2)))[0].astype(np.float32)


def planted() -> Llama:
    """A random model whose answer, one of eight tokens, is read from a plane that the layers from `LAYER` on do not write.

    What they read and write besides runs on: their attention and MLPs add to the rest of the stream.
    """
    model = tiny_llama()
    rest = (np.eye(E) - PLANE @ PLANE.T).astype(np.float32)
    for part in (model.layers.attn.o, model.layers.mlp.down):
        weight = np.array(part.weight[...])
        weight[LAYER:] = np.einsum("ef,lf...->le...", rest, weight[LAYER:])
        part.weight = type(part.weight)(jnp.asarray(weight))
    turns = 2 * np.pi * np.arange(CLASSES) / CLASSES
    unembed = np.zeros((61, E), np.float32)
    unembed[:CLASSES] = (
        40 * np.stack([np.cos(turns), np.sin(turns)], axis=1) @ PLANE.T / np.asarray(model.norm.weight[...])
    )
    model.unembed = type(model.unembed)(jnp.asarray(unembed))
    return model


IDS = RNG.integers(0, 61, (2 * N, T)).astype(np.int32)
BASE, SOURCE = IDS[:N], IDS[N:]
SETTINGS: dict[str, Any] = dict(layers=LAYER, batch_size=32, learning_rate=0.03, key=jax.random.key(1), progress=False)


@cache
def made() -> tuple[Llama, Any, np.ndarray]:
    """The model, its runs of all prompts, and what each source says by its own."""
    model = planted()
    runs = jax.jit(jax.vmap(lambda ids: forward(model, ids, capture="resid_pre")))(IDS)
    return model, runs, np.asarray(runs.logits[N:, -1].argmax(axis=-1), np.int32)


def angle(basis: Any) -> float:
    """The largest principal angle to the plane, in degrees."""
    return float(np.degrees(subspace_angles(np.asarray(basis), PLANE).max()))


def test_the_plane_says_it_and_a_plane_across_it_does_not() -> None:
    """Of the construction: by hand, with NumPy, from the runs' own streams."""
    model, runs, labels = made()
    streams = np.asarray(runs["resid_pre"][:, LAYER, -1])
    at = streams[N:] @ PLANE
    turned = np.arctan2(at[:, 1], at[:, 0]) * CLASSES / (2 * np.pi)
    np.testing.assert_array_equal(np.round(turned).astype(int) % CLASSES, labels)
    assert len(np.unique(labels)) == CLASSES and np.bincount(labels).max() < 0.45 * N
    there: Any = Subspace("resid_pre", LAYER, PLANE, 0.0, -1)
    np.testing.assert_array_equal(interchange_accuracy(model, there, BASE, SOURCE, labels), np.ones(N))
    across: Any = Subspace("resid_pre", LAYER, np.linalg.svd(PLANE.T)[2][2:4].T, 0.0, -1)
    said = np.asarray(runs.logits[:N, -1].argmax(axis=-1))
    np.testing.assert_array_equal(interchange_accuracy(model, across, BASE, SOURCE, labels), said == labels)


def test_accuracy_is_what_ordinary_sweeps_of_the_subspace_say() -> None:
    """Left padding, other lengths, another token of the source: beside whole runs with the interventions as users write them."""
    model, runs, labels = made()
    basis = RNG.normal(size=(E, 3)).astype(np.float32)
    padded = np.concatenate([np.zeros((12, 2), np.int32), BASE[:12]], axis=1)
    mask, few = np.arange(T + 2)[None] >= np.full((12, 1), 2), labels[:12]
    source = np.asarray(runs["resid_pre"][N : N + 12, LAYER, 3])[:, None]
    family: Any = Subspace("resid_pre", LAYER, basis, PerPrompt(source), positions=-2)
    want = np.asarray(sweep(model, padded, family, rank(few), mask=mask)) == 0
    there: Any = Subspace("resid_pre", LAYER, basis, 0.0, -2)
    found = interchange_accuracy(model, there, padded, SOURCE[:12], few, source_position=3, mask=mask)
    np.testing.assert_array_equal(found, want)


def test_a_planted_plane_is_found_and_controls_are_at_chance() -> None:
    model, runs, labels = made()
    found = align(model, BASE, SOURCE, labels, DAS(rank=2), steps=600, **SETTINGS)[LAYER, -1]
    assert angle(found.subspace.basis) <= 5
    assert found.accuracy.mean() >= 0.95 and len(found.accuracy) == N // 4
    chance = np.bincount(labels).max() / N + 0.1
    assert set(found.controls) == {"random basis", "shuffled labels", "untrained model"}
    assert all(hits.mean() <= chance for hits in found.controls.values()), {
        k: x.mean() for k, x in found.controls.items()
    }
    assert angle(np.linalg.qr(RNG.normal(size=(E, 2)))[0]) > 45  # what a random plane has
    basis = np.asarray(found.subspace.basis)
    np.testing.assert_allclose(basis.T @ basis, np.eye(2), atol=1e-5)
    again = interchange_accuracy(model, found.subspace, BASE, SOURCE, labels)
    np.testing.assert_array_equal(again[found.held_out], found.accuracy)
    assert "held-out pairs; random basis" in repr(found) and "shuffled labels" in repr(found)
    moved = forward(model, BASE[0], found.subspace.of(runs["resid_pre"][N, LAYER]))
    assert int(moved.logits[-1].argmax()) == labels[0]


def test_the_boundless_form_finds_the_rank_too() -> None:
    model, _, labels = made()
    found = align(model, BASE, SOURCE, labels, BoundlessDAS(penalty=10.0), steps=600, controls=False, **SETTINGS)[
        LAYER, -1
    ]
    basis = np.asarray(found.subspace.basis)
    assert 2 <= basis.shape[1] <= 4 and found.controls == {}
    assert np.degrees(subspace_angles(basis, PLANE).max()) <= 10  # the plane lies within it
    assert found.accuracy.mean() >= 0.9


def test_a_mask_finds_the_directions_of_the_plane_among_others() -> None:
    """Of 24 orthonormal directions, of which two span the plane, those two alone."""
    model, _, labels = made()
    rest = np.linalg.svd(PLANE.T)[2][2:].T.astype(np.float32)
    every = np.concatenate([rest[:, :10], PLANE, rest[:, 10:]], axis=1)
    method = DBM(every, penalty=0.02)
    found = align(model, BASE, SOURCE, labels, method, steps=200, **{**SETTINGS, "learning_rate": 0.2})[LAYER, -1]
    np.testing.assert_array_equal(np.asarray(found.subspace.basis), every[:, 10:12])
    chance = np.bincount(labels).max() / N + 0.1
    assert found.accuracy.mean() >= 0.98
    assert all(hits.mean() <= chance for hits in found.controls.values()), found


def test_directions_are_axes_or_principal_ones() -> None:
    values = RNG.normal(size=(200, 5)) @ np.diag([5.0, 3.0, 2.0, 1.0, 0.5]) @ np.linalg.qr(RNG.normal(size=(5, 5)))[0]
    _, axes = DBM().start(values, jax.random.key(0))
    np.testing.assert_array_equal(axes, np.eye(5))
    _, principal = DBM("pca").start(values, jax.random.key(0))
    want = np.linalg.eigh(np.cov(values.T))[1][:, ::-1]
    np.testing.assert_allclose(np.abs(np.sum(want * principal, axis=0)), 1, atol=1e-5)
    for basis, message in (("sae", "basis is 'sae'"), (np.ones((5, 2)), "not orthonormal"), (np.eye(4), "n = 5")):
        with pytest.raises(ValueError, match=message):
            DBM(basis).start(values, jax.random.key(0))


def test_places_and_seeds_of_one_program_are_those_of_single_ones() -> None:
    """At the last token the plane is there, at the one before it is not; MIB's score takes the better one."""
    model, _, labels = made()
    some: dict[str, Any] = {**SETTINGS, "steps": 60, "controls": False}
    found = align(
        model, BASE, SOURCE, labels, DAS(rank=2), **{**some, "layers": (LAYER, 2), "positions": (-1, -2), "seeds": 2}
    )
    alone = align(model, BASE, SOURCE, labels, DAS(rank=2), **some)
    a, b = (np.asarray(x[LAYER, -1].subspace.basis) for x in (found, alone))
    np.testing.assert_allclose(a, b, atol=1e-4)
    np.testing.assert_allclose(found[LAYER, -1].losses, alone[LAYER, -1].losses, atol=1e-4)
    assert found.accuracy.shape == (2, 2) and len(found[2, -2].by_seed) == 2
    assert found[2, -1].by_seed[0] == found.accuracy[1, 0] and "2 seeds" in repr(found[2, -1])
    before = [found[layer, -2] for layer in (LAYER, 2)]
    kept = np.asarray(made()[1].logits[:N, -1].argmax(axis=-1)) == labels
    assert all(abs(x.accuracy.mean() - kept[x.held_out].mean()) <= 0.02 for x in before)
    score = found.score()
    want = found.accuracy.max(axis=1)
    assert (float(score.mean.mean), float(score.best.mean)) == pytest.approx((want.mean(), want.max()))
    assert score.mean.low <= score.mean.mean <= score.mean.high and "2 layers × 2 positions" in repr(found)
    last, other = (f"position -1 {x[0]:.2f}, -2 {x[1]:.2f}" for x in found.accuracy)
    assert repr(found).endswith(f"\n  layer {LAYER}: {last}\n  layer 2: {other})") and "\n" not in repr(alone)


def test_disentanglement_is_the_mean_of_what_moved_and_what_stayed() -> None:
    """A whole stream moves everything; a plane across the planted one moves nothing."""
    model, runs, labels = made()
    said = np.asarray(runs.logits[:N, -1].argmax(axis=-1), np.int32)
    few = slice(0, 40)
    cause, kept = (BASE[few], SOURCE[few], labels[few]), (BASE[few], SOURCE[few], said[few])
    same = (said[few] == labels[few]).mean()
    whole: Any = Subspace("resid_pre", LAYER, np.eye(E, dtype=np.float32), 0.0, -1)
    across: Any = Subspace("resid_pre", LAYER, np.linalg.svd(PLANE.T)[2][2:4].T, 0.0, -1)
    for there, moved, stayed in ((whole, 1, same), (across, same, 1)):
        found = disentanglement(model, there, cause, {"own": kept, "again": kept})
        assert found.score == pytest.approx((moved + stayed) / 2)
        assert found.interval.low <= found.score <= found.interval.high
    with pytest.raises(ValueError, match="isolate is empty"):
        disentanglement(model, whole, cause, {})


def test_heads_are_a_site_like_another() -> None:
    model, _, labels = made()
    some = {**SETTINGS, "batch_size": 4, "steps": 2, "site": "z", "controls": False}
    found = align(model, BASE[:8], SOURCE[:8], labels[:8], DAS(rank=2), **some)[LAYER, -1]
    assert found.subspace.basis.shape == (6, 2) and found.losses.shape == (2,)


def test_what_cannot_be_is_told() -> None:
    """A token that one source prompt has not would be NaN there, of which token 0 is the likeliest."""
    model, _, labels = made()
    short = np.arange(T)[None] < np.where(np.arange(N) == 3, 5, T)[:, None]
    good: dict[str, Any] = dict(method=DAS(rank=2), steps=1, **SETTINGS)
    for given, options, message in (
        ((BASE, SOURCE[:3], labels), {}, r"source \[3, 7\] and labels \[1000\]: \[B, T\], \[B, S\] and \[B\] are needed"),
        ((BASE[0], SOURCE, labels), {}, r"\[B, T\], \[B, S\] and \[B\] are needed"),
        ((BASE, SOURCE + 60, labels), {}, r"source\[0\] is \d+, and this model's vocabulary"),
        ((BASE, SOURCE, labels), {"source_mask": np.ones(3, bool)}, r"source_mask has shape \[3\], and source \[1000, 7\]"),
        ((BASE, SOURCE, labels + 60), {}, "labels holds what is no token id of this model: they are 0 to 60"),
        ((BASE, SOURCE, labels), {"method": DAS(rank=25)}, "rank is 25, and must be 1 to 24"),
        ((BASE, SOURCE, labels), {"layers": 3}, "layers is 3, and must be 0 to 2"),
        ((BASE, SOURCE, labels), {"layers": ()}, "layers is empty"),
        ((BASE, SOURCE, labels), {"layers": [1, 1]}, "each once is enough"),
        ((BASE, SOURCE, labels), {"site": "pattern"}, "its last axis is tokens"),
        ((BASE, SOURCE, labels), {"site": "final_norm"}, "it lies outside the layers"),
        ((BASE, SOURCE, labels), {"site": "residual"}, "Unknown site 'residual'"),
        ((BASE, SOURCE, labels), {"positions": 7}, "positions is 7, and must be -7 to 6"),
        ((BASE, SOURCE, labels), {"positions": (0, 1), "source_positions": 1}, "one of these to each of those"),
        ((BASE, SOURCE, labels), {"source_positions": 5, "source_mask": short}, "source_positions is 5, and must be -5 to 4"),
        ((BASE, SOURCE, labels), {"positions": 5, "source_mask": short}, "positions .of the source prompts too, since source_positions is None. is 5, and must be -5 to 4"),
        ((BASE, SOURCE, labels), {"held_out": 2}, "held_out is 2, and must be a share"),
        ((BASE, SOURCE, labels), {"held_out": "0.5"}, "held_out is '0.5', and must be a share"),
        ((BASE, SOURCE, labels), {"learning_rate": np.nan}, "learning_rate is nan, and must be a finite number above 0"),
        ((BASE, SOURCE, labels), {"batch_size": 0}, "batch_size is 0"),
        ((BASE, SOURCE[:, :4], labels), {"positions": 5}, r"positions \(of the source prompts too.* is 5, and must be -4 to 3"),
        ((BASE, SOURCE, labels), {"source_positions": 4, "source_mask": np.arange(SOURCE.shape[1]) < np.full((len(SOURCE), 1), 3)},
         "source_positions is 4, and must be -3 to 2"),
        ((BASE, SOURCE, labels), {"method": DBM(np.full((24, 1), np.nan))}, "not orthonormal"),
        ((BASE[:1], SOURCE[:1], labels[:1]), {}, "There is 1 pair, and some"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            align(model, *given, **{**good, **options})
    with pytest.raises(ValueError, match="basis is 'neuron', and must be 'neurons' or 'pca'. Did you mean 'neurons'?"):
        DBM("neuron")
    for method in (lambda: DAS("2"), lambda: BoundlessDAS("1"), lambda: DBM(penalty="x")):
        with pytest.raises(TypeError, match="is needed"):
            method()
    for changes, said in (({"learning_rate": "0.1"}, "learning_rate is '0.1'"), ({"file": 3}, "file is 3")):
        with pytest.raises(TypeError, match=said):
            align(model, BASE, SOURCE, labels, **{**good, **changes})
    with pytest.raises(ValueError, match="subspace.basis holds what is no finite number"):
        nowhere: Subspace = Subspace("resid_pre", 1, np.full((24, 1), np.nan), 0.0, -1)
        interchange_accuracy(model, nowhere, BASE, SOURCE, labels)
    with pytest.raises(TypeError, match="called inside a trace"):
        jax.jit(lambda ids: align(model, ids, SOURCE, labels, **good).accuracy)(BASE)
    with pytest.raises(TypeError, match=r"one such as DAS\(rank=8\)"):
        align(model, BASE, SOURCE, labels, **{**good, "method": DAS})
