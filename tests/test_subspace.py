"""`Subspace`: beside NumPy's projection, finite differences and torch; and everywhere that an intervention goes."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import forward, generate, sweep
from oculi_jax.intervention import ActivationPatch, Edit, PerLayer, PerPrompt, Subspace
from oculi_jax.metrics import logit_difference

from .tiny import prompt, tiny_llama
from .tolerances import GRADIENT, LOGITS, ROUNDING

MODEL, IDS, T, E = tiny_llama(), prompt(), 11, 24
RNG = np.random.default_rng(0)
BASIS = RNG.normal(size=(E, 3)).astype(np.float32)
METRIC = logit_difference(3, 7)


@cache
def other() -> np.ndarray:
    """Another run's stream, `[L, T, E]`."""
    return np.asarray(forward(MODEL, prompt(seed=1), capture="resid_pre")["resid_pre"])


def projected(h: np.ndarray, source: np.ndarray | float, basis: np.ndarray) -> np.ndarray:
    """By the normal equations, without a QR."""
    basis = basis.astype(np.float64)
    return h + (source - h) @ (basis @ np.linalg.solve(basis.T @ basis, basis.T))


def test_it_moves_a_subspace_and_nothing_else() -> None:
    clean = forward(MODEL, IDS, capture=("resid_pre", "z"))
    cases = (
        (Subspace("resid_pre", 1, BASIS, other()[1]), None, other()[1]),
        (
            Subspace("resid_pre", 1, 7 * BASIS @ np.triu(np.ones((3, 3))), PerLayer(other())),
            None,
            other()[1],
        ),  # the same span
        (
            Subspace("resid_pre", 1, PerLayer(np.stack([BASIS[::-1], BASIS, BASIS])), other()[1], [2, -1]),
            [2, -1],
            other()[1],
        ),
        (Subspace("resid_pre", 1, BASIS, other()[1, 4:5], positions=3), [3], other()[1, 4:5]),
        (Subspace("resid_pre", 1, BASIS, 0.0), None, 0.0),
    )
    for item, places, source in cases:
        want = np.array(clean["resid_pre"][1])
        moved = projected(want, source, BASIS)
        want[places] = moved[places] if places else moved
        np.testing.assert_allclose(
            forward(MODEL, IDS, item, capture="resid_pre")["resid_pre"][1], want, ROUNDING, ROUNDING
        )
    heads = forward(MODEL, IDS, Subspace("z", 2, BASIS[:6, :2], 1.0), capture="z")["z"][2]
    np.testing.assert_allclose(heads, projected(np.asarray(clean["z"][2]), 1.0, BASIS[:6, :2]), ROUNDING, ROUNDING)


def test_of_all_dimensions_it_is_a_patch_and_of_its_own_run_nothing() -> None:
    whole = forward(MODEL, IDS, Subspace("resid_pre", 1, np.eye(E), PerLayer(other()))).logits
    np.testing.assert_allclose(
        whole, forward(MODEL, IDS, ActivationPatch("resid_pre", 1, PerLayer(other()))).logits, atol=LOGITS
    )
    own = forward(MODEL, IDS, capture="resid_pre")
    same = forward(MODEL, IDS, Subspace("resid_pre", 1, BASIS, PerLayer(own["resid_pre"]))).logits
    np.testing.assert_allclose(same, own.logits, atol=LOGITS)


def test_its_gradient_is_a_finite_difference() -> None:
    @jax.jit
    def value(basis: Any, source: Any) -> Any:
        return METRIC(forward(MODEL, IDS, Subspace("resid_mid", 1, basis, source)))

    turns = RNG.normal(size=(E, 3)).astype(np.float32), RNG.normal(size=(T, E)).astype(np.float32)
    slopes, step = jax.grad(value, (0, 1))(BASIS, other()[1]), 1e-2
    for number, turn in enumerate(turns):
        ends = []
        for sign in (1, -1):
            given = [BASIS, other()[1]]
            given[number] = given[number] + sign * step * turn
            ends.append(float(value(*given)))
        moved = (ends[0] - ends[1]) / (2 * step)
        assert abs(float(jnp.vdot(slopes[number], turn)) - moved) <= GRADIENT * abs(moved) + 1e-3
    # Along what only turns the basis within its span, nothing changes.
    assert abs(float(jnp.vdot(slopes[0], BASIS @ RNG.normal(size=(3, 3)).astype(np.float32)))) <= 1e-3


def test_it_maps_over_layers_bases_and_sources() -> None:
    layers, bases = np.arange(3), RNG.normal(size=(3, E, 3)).astype(np.float32)
    family = Subspace("resid_pre", layers, bases, other())
    found = sweep(MODEL, IDS, family, METRIC, batch_size=2)
    mapped = jax.vmap(lambda one: METRIC(forward(MODEL, IDS, one)))(Subspace("resid_pre", layers, bases, other()))
    for number in range(3):
        alone = METRIC(forward(MODEL, IDS, Subspace("resid_pre", number, bases[number], other()[number])))
        np.testing.assert_allclose([found[number], mapped[number]], float(alone), atol=LOGITS)


def test_it_goes_to_prompts_of_a_set_and_from_the_token_that_it_changes_on() -> None:
    """Sweeps cut its source to the tokens that run, and never its basis, which here is as long as the text."""
    tokens = np.stack([prompt(E, seed) for seed in range(3)])
    source = RNG.normal(size=(3, E, E)).astype(np.float32)
    square = np.linalg.qr(RNG.normal(size=(E, E)))[0][:, : E - 1].astype(np.float32)
    item = Subspace("resid_pre", np.array([1, 2]), square, PerPrompt(source), positions=[20, 22])
    found = sweep(MODEL, tokens, item, METRIC)
    for b in range(3):
        for n, layer in enumerate((1, 2)):
            alone = METRIC(
                forward(MODEL, tokens[b], Subspace("resid_pre", layer, square, source[b], positions=[20, 22]))
            )
            np.testing.assert_allclose(found[b, n], float(alone), atol=LOGITS)


def test_it_is_generated_with() -> None:
    """Its source covers the prompt, and leaves what is generated alone."""
    item = Subspace("resid_pre", 1, BASIS, 5 * other()[1])
    found, ids = generate(MODEL, IDS, 4, item), IDS
    for token in found:
        longer = np.concatenate([5 * other()[1], np.zeros((len(ids) - T, E), np.float32)])
        out = forward(MODEL, ids, Subspace("resid_pre", 1, BASIS, longer, positions=list(range(T))))
        assert int(out.logits[-1].argmax()) == int(token)
        ids = np.append(ids, np.int32(token))


@pytest.mark.parametrize(
    "item, message",
    [
        (Subspace("resid_pre", 1, np.ones(E), 0.0), r"basis has shape \[24\], and \[E, r\] = \[24, r\] is needed"),
        (Subspace("resid_pre", 1, np.ones((3, E)), 0.0), r"basis has shape \[3, 24\]"),
        (Subspace("z", 1, BASIS, 0.0), r"\[D, r\] = \[6, r\] is needed, .*the last axis of 'z'"),
        (Subspace("resid_pre", 1, np.zeros((E, 0)), 0.0), "with r from 1 to 24"),
        (Subspace("resid_pre", 1, np.ones((E, 2)), 0.0), "spans 1 dimension with 2 columns"),
        (Subspace("resid_pre", 1, np.full((E, 2), np.nan), 0.0), "basis holds NaN"),
        (Subspace("resid_pre", 1, RNG.normal(size=(4, E, 2)), 0.0), r"axes \[4\].*sweep"),
        (Subspace("resid_pre", 1, PerLayer(BASIS), 0.0), r"PerLayer of shape \[24, 3\], and \[L, E, r\] with L = 3"),
        (Subspace("pattern", 1, np.ones((T, 1)), 0.0), "its last axis is tokens"),
        (Subspace("attn_scale", 1, np.ones((T, 1)), 0.0), "its last axis is tokens"),
        (Subspace("resid_pre", 1, BASIS, np.ones((3, E))), r"\[T, E\] = \[11, 24\]"),
    ],
)
def test_what_cannot_be_is_told(item: Subspace, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forward(MODEL, IDS, item)


@pytest.mark.torch
def test_torch_does_the_same(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    MODEL.save_pretrained(tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path)
    items = [
        Subspace("resid_pre", 1, BASIS, other()[1]), Subspace("z", 2, BASIS[:6, :2], PerLayer(np.ones((3, 4, 1, 6), np.float32))),
        Subspace("final_norm", None, BASIS, 1.0, positions=-1), Edit("act", "scale", 0, value=2.0),
    ]  # fmt: skip
    for mask in (None, np.arange(T) < 8):
        ours, theirs = (forward(model, IDS, items, capture=("resid_post", "z"), mask=mask) for model in (MODEL, hf))
        real = np.ones(T, bool) if mask is None else mask
        np.testing.assert_allclose(theirs.logits[real], ours.logits[real], atol=LOGITS)
        np.testing.assert_allclose(theirs["z"][:, :, real], ours["z"][:, :, real], 1e-4, 1e-4)
        assert theirs.applied.tolist() == ours.applied.tolist()
    family = Subspace("z", np.array([0, 1, 2]), RNG.normal(size=(3, 6, 2)).astype(np.float32), 1.0)
    np.testing.assert_allclose(sweep(hf, IDS, family, METRIC), sweep(MODEL, IDS, family, METRIC), atol=LOGITS)
