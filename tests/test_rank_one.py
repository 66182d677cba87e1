"""`RankOne`: beside NumPy, finite differences and torch; and everywhere that an intervention goes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import forward, generate, sweep
from oculi_jax.intervention import Edit, PerLayer, PerPrompt, RankOne, Steer
from oculi_jax.metrics import logit_difference

from .tiny import prompt, tiny_llama
from .tolerances import GRADIENT, LOGITS, ROUNDING

MODEL, IDS, T, E = tiny_llama(), prompt(), 11, 24
RNG = np.random.default_rng(0)
READ, WRITE = RNG.normal(size=(2, E)).astype(np.float32)
METRIC = logit_difference(3, 7)


def written(h: np.ndarray, read: np.ndarray = READ, write: np.ndarray = WRITE, bias: float = 0.5) -> np.ndarray:
    return h + np.maximum(h.astype(np.float64) @ read + bias, 0)[..., None] * write


def test_it_writes_as_far_as_it_reads() -> None:
    clean = forward(MODEL, IDS, capture=("resid_pre", "z"))
    stream = np.asarray(clean["resid_pre"][1])
    read_at = stream @ READ + 0.5 > 0
    assert 2 < read_at.sum() < T - 2  # some tokens are read, and some are not
    rows = np.stack([READ[::-1], READ, WRITE]), np.stack([READ, WRITE, WRITE])
    for item, places in (
        (RankOne("resid_pre", 1, READ, WRITE, 0.5), list(range(T))),
        (RankOne("resid_pre", 1, READ, WRITE, 0.5, [2, -1]), [2, T - 1]),
        (RankOne("resid_pre", 1, *map(PerLayer, rows), 0.5), list(range(T))),
    ):
        want = stream.copy()
        want[places] = written(stream[places])
        found = np.asarray(forward(MODEL, IDS, item, capture="resid_pre")["resid_pre"][1])
        np.testing.assert_allclose(found, want, ROUNDING, ROUNDING)
        np.testing.assert_array_equal(found[~read_at], stream[~read_at])
    heads = forward(MODEL, IDS, RankOne("z", 2, READ[:6], WRITE[:6], 0.5), capture="z")["z"][2]
    want = written(np.asarray(clean["z"][2]), READ[:6], WRITE[:6])
    np.testing.assert_allclose(heads, want, ROUNDING, ROUNDING)


def test_of_nothing_read_it_steers() -> None:
    found = forward(MODEL, IDS, RankOne("resid_pre", 1, 0 * READ, WRITE, 2.0)).logits
    np.testing.assert_allclose(found, forward(MODEL, IDS, Steer(1, WRITE, 2.0)).logits, atol=LOGITS)
    none = forward(MODEL, IDS, RankOne("resid_pre", 1, 0 * READ, WRITE, -2.0))
    np.testing.assert_array_equal(none.logits, forward(MODEL, IDS).logits)
    assert none.applied.tolist() == [0]


def test_its_gradient_is_a_finite_difference() -> None:
    @jax.jit
    def value(read: Any, write: Any, bias: Any) -> Any:
        return METRIC(forward(MODEL, IDS, RankOne("resid_mid", 1, read, write, bias)))

    given, step = [READ, WRITE, np.float32(0.5)], 3e-3
    slopes = jax.grad(value, (0, 1, 2))(*given)
    for number in range(3):
        turn = np.asarray(RNG.normal(size=np.shape(given[number])), np.float32)
        ends = []
        for sign in (1, -1):
            moved = list(given)
            moved[number] = moved[number] + sign * step * turn
            ends.append(float(value(*moved)))
        difference = (ends[0] - ends[1]) / (2 * step)
        assert abs(float(jnp.vdot(slopes[number], turn)) - difference) <= GRADIENT * abs(difference) + 2e-3


def test_it_sweeps_maps_goes_to_prompts_and_is_generated_with() -> None:
    layers, reads = np.arange(3), RNG.normal(size=(3, E)).astype(np.float32)
    found = sweep(MODEL, IDS, RankOne("resid_pre", layers, reads, WRITE, 0.5), METRIC)
    mapped = jax.vmap(lambda one: METRIC(forward(MODEL, IDS, one)))(
        RankOne("resid_pre", layers, reads, np.stack([WRITE] * 3), np.full(3, 0.5))
    )
    for n in range(3):
        alone = float(METRIC(forward(MODEL, IDS, RankOne("resid_pre", n, reads[n], WRITE, 0.5))))
        np.testing.assert_allclose([found[n], mapped[n]], alone, atol=LOGITS)
    tokens = np.stack([IDS, prompt(seed=1)])
    item = RankOne("resid_pre", 1, PerPrompt(reads[:2]), WRITE, 0.5, PerPrompt([2, -1]))
    each = sweep(MODEL, tokens, item, METRIC)
    for b, position in enumerate((2, -1)):
        alone = METRIC(forward(MODEL, tokens[b], RankOne("resid_pre", 1, reads[b], WRITE, 0.5, position)))
        np.testing.assert_allclose(each[b], float(alone), atol=LOGITS)
    edit, ids = RankOne("resid_pre", 1, READ, WRITE, 0.5), IDS
    for token in generate(MODEL, IDS, 3, edit):
        assert int(forward(MODEL, ids, edit).logits[-1].argmax()) == int(token)
        ids = np.append(ids, np.int32(token))


@pytest.mark.parametrize(
    "item, message",
    [
        (RankOne("resid_pre", 1, READ[:3], WRITE), r"RankOne.read has shape \[3\]"),
        (RankOne("resid_pre", 1, READ, WRITE[:3]), r"RankOne.write has shape \[3\]"),
        (RankOne("resid_pre", 1, READ * np.nan, WRITE), "read holds NaN"),
        (RankOne("resid_pre", 1, READ, WRITE, np.inf), "bias is inf"),
        (RankOne("resid_pre", 1, np.ones((4, E)), WRITE), r"axes \[4\].*sweep"),
        (RankOne("allowed", 1, np.ones(T), np.ones(T)), "it has no directions"),
    ],
)
def test_what_cannot_be_is_told(item: RankOne, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forward(MODEL, IDS, item)


@pytest.mark.torch
def test_torch_does_the_same(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    MODEL.save_pretrained(tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path)
    items = [RankOne("resid_pre", 1, READ, WRITE, 0.5), RankOne("z", 2, READ[:6], WRITE[:6], 0.5, positions=-1),
             Edit("act", "scale", 0, value=2.0)]  # fmt: skip
    for mask in (None, np.arange(T) < 8):
        ours, theirs = (forward(model, IDS, items, capture="resid_post", mask=mask) for model in (MODEL, hf))
        real = np.ones(T, bool) if mask is None else mask
        np.testing.assert_allclose(theirs.logits[real], ours.logits[real], atol=LOGITS)
        assert theirs.applied.tolist() == ours.applied.tolist()
