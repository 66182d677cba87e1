"""`forward(start=)`: a run that begins at a layer, beside whole runs, finite differences and the compiler's own count."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import CaptureSpec, forward, rules
from oculi_jax.intervention import Ablation, Blend, Edit, Freeze, HeadAblation, Steer
from oculi_jax.metrics import logit_difference

from .tiny import SITES, prompt, tiny_llama
from .tolerances import GRADIENT, LOGITS, ROW

MODEL, IDS, T = tiny_llama(), prompt(), 11
CONFIG = MODEL.config
AFTER = tuple(name for name, site in SITES.items() if site.layered)
OUTSIDE = ("final_scale", "final_norm")
EVERY = (*AFTER, *OUTSIDE)
PADDED, REAL = np.concatenate([IDS, [0, 0]]).astype(np.int32), np.arange(T + 2) < T


def of_tail(layer: int) -> tuple[Any, ...]:
    return CaptureSpec(AFTER, layers=range(layer, 3)), CaptureSpec(OUTSIDE)


EDITS = [
    HeadAblation(2, 1),
    Steer([1, 2], np.ones(24), 0.3, positions=[2, -1]),
    Edit("final_norm", "scale", None, value=1.5),
]


@pytest.mark.parametrize("edits", [[], EDITS], ids=["plain", "edited"])
@pytest.mark.parametrize("tokens, mask", [(IDS, None), (PADDED, REAL)], ids=["whole", "padded"])
def test_a_tail_is_what_a_whole_run_ends_in(edits: Any, tokens: Any, mask: Any) -> None:
    whole = forward(MODEL, tokens, edits, capture=EVERY, mask=mask)
    resid = forward(MODEL, tokens, capture="resid_pre", mask=mask)["resid_pre"][1]  # before the first edit
    tail = forward(MODEL, tokens, edits, capture=of_tail(1), mask=mask, start=(1, resid))
    np.testing.assert_allclose(tail.logits, whole.logits, atol=LOGITS)
    assert tail.applied.tolist() == whole.applied.tolist() == [1, 2, 1][: len(edits)]
    for name, found in tail.activations.items():
        want = np.nan_to_num(np.asarray(whole[name] if name in OUTSIDE else whole[name][1:], np.float64), neginf=-5)
        found = np.nan_to_num(np.asarray(found, np.float64), neginf=-5)
        assert np.abs(found - want).max() <= ROW * max(np.abs(want).max(), 1), name


def test_its_last_logits_alone_and_none_are_those_of_all() -> None:
    resid = forward(MODEL, IDS, capture="resid_pre")["resid_pre"]
    every = forward(MODEL, IDS, start=(2, resid[2])).logits
    np.testing.assert_allclose(forward(MODEL, IDS, start=(2, resid[2]), logits="last").logits, every[-1], atol=LOGITS)
    out = forward(MODEL, IDS, start=(1, resid[1]), logits="none", capture=CaptureSpec("z", layers=[1]))
    assert out.logits is None and out["z"].shape[0] == 1


def test_the_ids_are_not_looked_at_and_resid_maps() -> None:
    """Three streams in one program are three runs; other ids give the same."""
    streams = np.random.default_rng(0).normal(size=(3, T, 24)).astype(np.float32)
    many = jax.vmap(lambda resid: forward(MODEL, IDS, start=(1, resid)).logits)(streams)
    for found, resid in zip(many, streams, strict=True):
        np.testing.assert_allclose(found, forward(MODEL, prompt(seed=4), start=(1, resid)).logits, atol=LOGITS)


def test_its_gradient_is_a_finite_difference_and_the_whole_runs() -> None:
    resid = forward(MODEL, IDS, capture="resid_pre")["resid_pre"][1]
    metric, direction = logit_difference(3, 7), np.random.default_rng(1).normal(size=(T, 24)).astype(np.float32)

    @jax.jit
    def value(resid: Any) -> Any:
        return metric(forward(MODEL, IDS, start=(1, resid)))

    def pushed(by: Any) -> Any:  # of the whole run, by an edit of the same stream
        return metric(forward(MODEL, IDS, Edit("resid_pre", "add", 1, value=by)))

    slope = jax.grad(value)(resid)
    np.testing.assert_allclose(slope, jax.grad(pushed)(jnp.zeros((T, 24))), rtol=1e-3, atol=1e-5)
    step = 1e-2
    moved = (value(resid + step * direction) - value(resid - step * direction)) / (2 * step)
    assert abs(float(jnp.vdot(slope, direction)) - moved) <= GRADIENT * abs(float(moved)) + 1e-4


def test_rules_change_its_gradient_as_they_change_the_whole_runs() -> None:
    resid = forward(MODEL, IDS, capture="resid_pre")["resid_pre"][1]
    own, metric = rules.relp(CONFIG), logit_difference(3, 7)
    tail = jax.grad(lambda x: metric(forward(MODEL, IDS, start=(1, x), rules=own)))(resid)
    whole = jax.grad(lambda x: metric(forward(MODEL, IDS, Edit("resid_pre", "add", 1, value=x), rules=own)))
    plain = jax.grad(lambda x: metric(forward(MODEL, IDS, start=(1, x))))(resid)
    np.testing.assert_allclose(tail, whole(jnp.zeros((T, 24))), rtol=1e-3, atol=1e-5)
    assert np.abs(tail - plain).max() > 1e-2


def test_earlier_layers_do_not_run() -> None:
    """Weights of layers before the start may be anything; and the compiler sees a loop over the tail alone."""
    resid = np.asarray(forward(MODEL, IDS, capture="resid_pre")["resid_pre"][2])
    broken = jax.tree.map(lambda x: x.at[:2].set(jnp.nan) if x.shape[:1] == (3,) else x, MODEL.layers)
    other = tiny_llama()
    other.layers = broken
    other.embed = type(other.embed)(jnp.full_like(other.embed[...], jnp.nan))
    found = forward(other, IDS, start=(2, resid)).logits
    np.testing.assert_array_equal(found, forward(MODEL, IDS, start=(2, resid)).logits)
    text = str(jax.make_jaxpr(lambda resid: forward(MODEL, IDS, start=(2, resid)).logits)(resid))
    assert "length=1" in text and "length=3" not in text


def test_a_layer_that_the_device_alone_knows_acts_nowhere_below() -> None:
    resid = np.ones((T, 24), np.float32)
    applied = jax.jit(lambda layer: forward(MODEL, IDS, HeadAblation(layer, 1), start=(1, resid)).applied)
    assert [int(applied(jnp.int32(layer))[0]) for layer in range(3)] == [0, 1, 1]


def test_what_cannot_be_is_told() -> None:
    resid = np.zeros((T, 24), np.float32)
    stack = np.zeros((3, T, 24), np.float32)
    for options, error, message in (
        ({"start": 1}, TypeError, r"start is a int, and a pair is needed: \(layer, resid\)"),
        ({"start": (3, resid)}, ValueError, r"start\[0\] is 3, and must be 0 to 2"),
        ({"start": (-1, resid)}, ValueError, r"start\[0\] is -1"),
        ({"start": (1.0, resid)}, TypeError, "an integer is needed: the layer"),
        ({"start": (1, stack)}, ValueError, r"\[T, E\] = \[11, 24\], is needed. Give the row of the layer, resid\[1\]"),
        ({"start": (1, resid[:3])}, ValueError, r"an array \[3, 24\]"),
        ({"start": (1, resid.astype(int))}, TypeError, "array of int64, and a residual stream of floats"),
        ({"start": (1, np.full_like(resid, np.nan))}, ValueError, r"start\[1\] holds NaN"),
        ({"capture": "z"}, ValueError, r"'z' is captured at layer 0, .*CaptureSpec\('z', layers=range\(1, 3\)\)"),
        ({"capture": "embed"}, ValueError, "'embed' is captured, and the run starts at layer 1"),
        ({"interventions": Ablation("embed", None)}, ValueError, "Ablation acts at 'embed'"),
        ({"interventions": HeadAblation(0, 1)}, ValueError, "HeadAblation acts at layer 0, .* among layers 1 to 2"),
        ({"interventions": HeadAblation([0, 2], 1)}, ValueError, "acts at layer 0"),
        ({"interventions": [Steer(2, np.ones(24)), Ablation("z", 0)]}, ValueError, r"Ablation \(number 1\) acts at layer 0"),
        ({"interventions": Blend("z", np.ones((3, 4)))}, ValueError, "Blend acts at layer 0"),
        ({"interventions": Edit("z", "scale", None, value=1.0)}, ValueError, "Edit acts at every layer"),
        ({"interventions": Freeze(forward(MODEL, IDS, capture="pattern"), "pattern")}, ValueError, "Freeze acts at every"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            forward(MODEL, IDS, **{"start": (1, resid), **options})


@pytest.mark.torch
def test_a_torch_model_refuses_it(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    MODEL.save_pretrained(tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"start= begins a run at a layer.*oculi_jax.from_pretrained"):
        forward(hf, IDS, start=(1, np.zeros((T, 24), np.float32)))


def test_a_backward_pass_keeps_no_weights() -> None:
    """A loop over some of the layers indexes their weights, and would keep them all, layer by layer, for the way back."""
    wide = tiny_llama(intermediate_size=4000)

    def value(model: Any, resid: Any) -> Any:
        return forward(model, IDS[:2], start=(1, resid), logits="last").logits[3]

    compiled = jax.jit(jax.grad(value, 1)).lower(wide, jnp.zeros((2, 24))).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    weights = sum(x[1:].nbytes for x in jax.tree.leaves(wide.layers))
    assert memory.temp_size_in_bytes < weights
