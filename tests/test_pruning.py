"""Pruning by hard concrete gates: their distribution is the paper's, sizes are reached, and a circuit that is known is found."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_softmax, logit

from oculi_jax import forward
from oculi_jax.circuits import Circuit, run_circuit
from oculi_jax.training import Now, masks, prune
from oculi_jax.training.pruning import constraint, divergence, gate_loss, gates, opening

from . import planted
from .test_matryoshka import CLEAN, CORRUPTED, MASK, METRIC, MODEL, searched

RNG = np.random.default_rng(0)
SETTINGS: dict[str, Any] = dict(key=jax.random.key(0), progress=False)
N = 20000
FAR = 1.63 / np.sqrt(N)  # Kolmogorov's distance of so many draws, in 99 of 100


@pytest.mark.parametrize("log_alpha", [-3.0, 0.0, 1.5, 4.0])
def test_gates_are_hard_concrete(log_alpha: float) -> None:
    """Louizos et al. (2018), section 2.2 and appendix A, β = 2/3, γ = −0.1, ζ = 1.1: s = σ((log u − log(1 − u) + log α) / β), whose
    distribution is Q(s) = σ(β logit s − log α), stretched to (γ, ζ) and cut to [0, 1].
    """
    drawn = np.asarray(gates(jax.random.key(1), jnp.full(N, log_alpha)))

    def below(x: float) -> float:
        return expit(2 / 3 * logit((x + 0.1) / 1.2) - log_alpha)

    for x in (0.0, 0.1, 0.3, 0.5, 0.9, 0.999):
        assert abs((drawn <= x).mean() - below(x)) < FAR
    assert abs((drawn == 1).mean() - (1 - below(1.0))) < FAR
    u = RNG.uniform(size=N)  # by the paper's recipe, and its equation 12
    open_ = expit((np.log(u) - np.log(1 - u) + log_alpha) * 3 / 2) * 1.2 - 0.1 > 0
    assert abs(open_.mean() - float(opening(jnp.float32(log_alpha)))) < FAR
    assert float(opening(jnp.float32(log_alpha))) == pytest.approx(
        expit(log_alpha - 2 / 3 * np.log(0.1 / 1.1)), abs=1e-6
    )


def test_multipliers_ascend_and_gates_descend() -> None:
    """The Lagrangian of Bhaskar et al. (2024), equation 5: its gradient, of the multipliers with the other sign."""
    multipliers, shut, target = jnp.array([0.7, -0.2]), jnp.float32(0.3), jnp.float32(0.8)
    value, (of_multipliers, of_shut) = jax.value_and_grad(constraint, (0, 1))(multipliers, shut, target)
    assert float(value) == pytest.approx(0.7 * -0.5 - 0.2 * 0.25)
    np.testing.assert_allclose(of_multipliers, [0.5, -0.25], rtol=1e-6)
    assert float(of_shut) == pytest.approx(0.7 - 2 * 0.2 * -0.5)


def test_the_loss_is_the_divergence_from_the_whole_model() -> None:
    """Of the pair's own run, or of another one's, whose answer it is asked for: there all gates are open."""
    search, parameters = searched(MODEL, "nodes")
    share = RNG.uniform(size=16).astype(np.float32)
    pair, (other, number) = search.pair(parameters, jnp.int32(1)), search.rest
    rows = (CLEAN[number], CORRUPTED[number])

    def last(run: Any, number: int) -> Any:
        return log_softmax(np.asarray(run.logits[MASK[number].sum() - 1], np.float64))

    whole, asked = (last(forward(MODEL, CLEAN[i], mask=MASK[i]), i) for i in (number, other))
    q = last(run_circuit(MODEL, *rows, nodes=share, mask=MASK[number]), number)
    found = float(jax.jit(lambda share: divergence(pair, pair.kept(share), jnp.asarray(whole, jnp.float32)))(share))
    assert found == pytest.approx((np.exp(whole) * (whole - q)).sum(), rel=1e-4) and found > 0.1

    shuffled = {**parameters, "asked": jnp.array([1, 0]), "log_alpha": jnp.full(16, 30.0), "multipliers": jnp.zeros(2)}
    now = Now(jnp.int32(0), jax.random.key(0), jnp.float32(0))
    found = float(jax.jit(lambda given: gate_loss(search, "kl")(given, jnp.int32(1), now))(shuffled))
    assert found == pytest.approx((np.exp(asked) * (asked - whole)).sum(), rel=1e-4) and found > 0.1


@pytest.mark.parametrize("kind", ["nodes", "neurons", "edges"])
def test_what_corrupted_runs_write_is_kept_or_made_again_to_the_same_end(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, parameters = searched(MODEL, kind)
    monkeypatch.setattr(masks, "_MOST_BYTES", 0)
    again, _ = searched(MODEL, kind)
    assert kept.writes is not None and again.writes is None
    share = jnp.asarray(RNG.uniform(size=kept.units.shape), jnp.float32)
    one, other = (jax.jit(search.pair(parameters, jnp.int32(1)).kept)(share) for search in (kept, again))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_a_circuit_that_is_known_is_found_at_the_size_that_was_asked_for() -> None:
    """Of edges by the divergence, of nodes by the metric; what was never asked of the whole circuit is at chance."""
    clean, corrupted, metric = planted.pairs()
    given = (planted.MODEL, clean, corrupted, metric)
    found = prune(*given, sparsity=1 - 6 / 110, steps=400, **SETTINGS)
    assert set(planted.EDGES) <= set(found.circuit.names) and found.circuit.kind == "edges"
    assert abs(float(found.open) - 6 / 110) <= 0.03
    assert found.curve.faithfulness[0] == pytest.approx(1, abs=0.05)
    assert set(found.controls) == {"random scores", "shuffled answers"}
    assert all(curve.faithfulness[0] < 0.5 for curve in found.controls.values()), found
    assert (
        repr(found).startswith("Pruned(") and "faithfulness 1.00" in repr(found) and "shuffled answers" in repr(found)
    )
    nodes = prune(
        *given, kind="nodes", loss="metric", sparsity=1 - 3 / 11, steps=200, controls=False, seeds=2, **SETTINGS
    )
    np.testing.assert_array_equal(nodes.circuit.nodes, Circuit(planted.GRAPH, nodes=planted.NODES).nodes)
    assert abs(float(nodes.open) - 3 / 11) <= 0.03 and len(nodes.seeds) == 2 and nodes.losses.shape == (200, 2)


def test_what_cannot_be_is_told() -> None:
    for options, message in (
        ({"sparsity": 1.0}, "sparsity is 1.0, and must be between 0 and 1"),
        ({"sparsity": 0.5, "loss": "logits"}, "loss is 'logits', and must be 'kl' or 'metric'"),
        ({"sparsity": 0.5, "loss": "metrics"}, "Did you mean 'metric'"),
        ({"sparsity": 0.5, "kind": "heads"}, "kind is 'heads'"),
        ({"sparsity": 0.5, "kind": "node"}, "Did you mean 'nodes'"),
        ({"sparsity": 0.5, "held_out": "half"}, "held_out is 'half', and must be a share"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            prune(MODEL, CLEAN, CORRUPTED, METRIC, mask=MASK, **{**SETTINGS, **options})
    with pytest.raises(TypeError, match="steps is '10', and an integer is needed"):
        prune(MODEL, CLEAN, CORRUPTED, METRIC, mask=MASK, sparsity=0.5, **{**SETTINGS, "steps": "10"})
