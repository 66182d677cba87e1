"""Gradients through interventions: against central differences, finite whatever is masked, at every layer at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import forward
from oculi_jax.intervention import (
    Ablation,
    ActivationPatch,
    AttentionKnockout,
    Blend,
    DirectionAblation,
    Edit,
    HeadAblation,
    KScaler,
    QScaler,
    SpectraScaler,
    Steer,
)
from oculi_jax.models.llama import Llama

from .test_forward_laws import near
from .test_interventions import D, E, H, L, T, run
from .tiny import prompt, tiny_llama
from .tolerances import GRADIENT


@pytest.fixture(scope="module")
def model() -> Llama:
    return tiny_llama()


GRADIENTS = {
    "SpectraScaler": lambda a: SpectraScaler(1, 2, a),
    "QScaler": lambda a: QScaler(1, 2, a),
    "KScaler": lambda a: KScaler(1, 1, a),
    "Steer": lambda a: Steer(1, np.ones(E), a),
    "Edit": lambda a: Edit("act", "add", 1, value=a),
    "Blend": lambda a: Blend("z", jnp.ones((L, H)).at[1, 2].set(a)),
    "ActivationPatch": lambda a: ActivationPatch("z", 1, a, head=1),
    "DirectionAblation": lambda a: DirectionAblation("resid_mid", 1, jnp.ones(E).at[0].set(a)),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_finite_differences(model: Llama, name: str) -> None:
    make = GRADIENTS[name]

    @jax.jit
    def metric(a):
        logits = forward(model, prompt(), make(a)).logits[-1]
        return logits[3] - logits[7]

    a, step = jnp.float32(0.8), 1e-2
    slope = (metric(a + step) - metric(a - step)) / (2 * step)
    gradient = jax.grad(metric)(a)
    assert abs(slope) > 1e-2
    assert abs(gradient - slope) <= GRADIENT * abs(slope)


def test_gradients_stay_finite_with_knockouts_scaling_and_padding_together(model: Llama) -> None:
    mask = np.arange(T + 3) >= 3
    tokens = np.concatenate([np.zeros(3, np.int32), prompt()])

    def metric(model, alpha, direction):
        edits = (
            AttentionKnockout(0, 1, query=0, key=0), SpectraScaler(1, 2, alpha), KScaler(2, 0, alpha),
            DirectionAblation("resid_mid", 1, direction), HeadAblation(1, 1),
            Edit("act", "apply", 2, mask=np.arange(40)[None] < 4, value=alpha, fn=lambda x, v: jnp.sqrt(jnp.abs(x)) * v),
        )  # fmt: skip
        return forward(model, tokens, edits, mask=mask, logits="last").logits[3]

    for leaf in jax.tree.leaves(jax.grad(metric, argnums=(0, 1, 2))(model, jnp.float32(1.3), jnp.ones(E))):
        assert np.isfinite(leaf).all()


def test_the_branch_not_taken_cannot_poison_a_gradient(model: Llama) -> None:
    """log has an infinite slope at 0, where the neurons are at the layer at which the edit is off."""

    def size(x, v):  # of all neurons, which none that is nearly 0 makes steep where the edit is on
        return x + jnp.log(jnp.abs(x).sum(-1, keepdims=True))

    def metric(strength):
        edits = (Edit("act", "scale", 0, value=strength), Edit("act", "apply", 2, fn=size))
        return forward(model, prompt(), edits).logits[-1, 0]

    one = jax.grad(metric)(0.0)
    assert np.isfinite(one)
    near(jax.vmap(jax.grad(metric))(jnp.zeros(2)), [one, one])


def test_rows_that_a_mask_leaves_alone_cannot_poison_a_gradient(model: Llama) -> None:
    """z of padding is exactly zero, where a norm has no derivative."""
    mask = np.arange(T + 3) >= 3
    tokens = np.concatenate([np.zeros(3, np.int32), prompt()])

    def unit(x, v):
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True) * v

    def metric(v):
        return forward(model, tokens, Edit("z", "apply", 1, value=v, fn=unit), mask=mask, logits="last").logits[0]

    assert np.isfinite(metric(1.0)) and np.isfinite(jax.grad(metric)(1.0))


def test_dense_edits_give_the_gradient_at_every_layer_at_once(model: Llama) -> None:
    clean = jax.device_get(run(model).activations)

    def metric(delta):
        return forward(model, prompt(), Edit("z", "add", None, value=delta)).logits[-1, 3]

    dense = jax.grad(metric)(jnp.zeros((L, H, T, D)))
    single = jax.grad(lambda d: forward(model, prompt(), Edit("z", "add", 1, value=d)).logits[-1, 3])(
        jnp.zeros((H, T, D))
    )
    near(dense[1], single)
    # Attribution at a linear site is exact: past the last attention only the final norm, held fixed, and its scale.
    hold = (Edit("final_scale", "set", None, value=clean["final_scale"]), Ablation("mlp_out", 2))
    base = forward(model, prompt(), hold).logits[-1, 3]
    grad = jax.grad(lambda d: forward(model, prompt(), (*hold, Edit("z", "add", 2, value=d))).logits[-1, 3])(
        jnp.zeros((H, T, D))
    )
    exact = forward(model, prompt(), (*hold, HeadAblation(2, 1))).logits[-1, 3] - base
    near(-(clean["z"][2, 1] * grad[1]).sum(), exact)
