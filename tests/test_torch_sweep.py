"""`sweep` and activation patching of a torch model: each variant what `forward` gives, each figure what JAX gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import forward, plan, sweep
from oculi_jax.causal import CausalTracer, activation_patching
from oculi_jax.causal.noise import Noise
from oculi_jax.intervention import ActivationPatch, AttentionKnockout, Edit, HeadAblation, KScaler, PerLayer, Steer
from oculi_jax.metrics import kl_divergence, log_probability, logit_difference, rank
from oculi_jax.models.llama import Llama, LlamaAttentionAdapter

from .margins import assert_clear
from .test_parity_torch import make
from .tolerances import ROUTES

pytestmark = pytest.mark.torch

TOKENS = np.random.default_rng(1).integers(0, 61, (3, 13))
MASK = np.array([[True] * 13, [False] * 3 + [True] * 10, [True] * 9 + [False] * 4])
RNG = np.random.default_rng(2)
RUN = RNG.normal(size=(3, 4, 13, 6)).astype(np.float32)
FAMILIES: dict[str, Any] = {
    "heads": [HeadAblation(np.arange(3)[:, None], np.arange(4)[None])],
    "heads beside a patch of a whole run": [
        ActivationPatch("z", np.arange(3)[:, None], PerLayer(RUN), head=np.arange(4)[None]),
        Steer(0, RNG.normal(size=24), 0.3),
    ],
    "positions": [ActivationPatch("resid_pre", np.arange(3)[:, None], PerLayer(RNG.normal(size=(3, 13, 24))), positions=np.arange(9)[None])],
    "neurons": [ActivationPatch("act", np.arange(3)[:, None], PerLayer(RNG.normal(size=(3, 13, 40))), positions=-1, index=np.arange(5))],
    "late positions": [Steer(1, RNG.normal(size=24), np.linspace(0, 2, 4), positions=[-1, -2])],
    "values": [Steer(2, RNG.normal(size=(5, 24)), np.ones(5), "mlp_out")],
    "edges": [AttentionKnockout(np.array([0, 2]), 1, -1, [0, 1]), KScaler(1, 0, np.array([0.5, 2.0]))],
    "embeddings": [Steer(None, RNG.normal(size=24), np.arange(3.0), "embed", positions=2)],
    "final norm": [Edit("final_norm", "scale", None, True, 2.0), HeadAblation(2, np.arange(4))],
}  # fmt: skip
METRICS = {
    "difference": logit_difference(3, 5),
    "a pair for each prompt": logit_difference(np.array([3, 4, 5]), 7),
    "probability": log_probability(3, position=-2),
    "rank": rank(24),
    "of one's own": lambda out: jnp.max(out.logits[5]),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Llama]:
    directory = tmp_path_factory.mktemp("pair")
    hf = make(directory, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=6)
    return hf, Llama.from_pretrained(directory)


def test_a_patch_of_one_neuron_is_a_hook_on_hugging_faces_module(pair: tuple[Any, Llama]) -> None:
    import torch

    value, tokens = RNG.normal(size=(13, 40)).astype(np.float32), TOKENS[0]

    def hook(_: Any, given: Any) -> Any:
        act = given[0].clone()
        act[0, 4, 17] = float(value[4, 17])
        return (act,)

    handle = pair[0].model.layers[1].mlp.down_proj.register_forward_pre_hook(hook)
    with torch.no_grad():
        wanted = pair[0](torch.tensor(tokens)[None]).logits[0].numpy()
    handle.remove()
    for model in pair:
        found = forward(model, tokens, ActivationPatch("act", 1, value, positions=4, index=17)).logits
        np.testing.assert_allclose(found, wanted, atol=ROUTES, rtol=ROUTES)
    assert np.abs(np.asarray(forward(pair[0], tokens).logits) - wanted).max() > 100 * ROUTES


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sweep_is_what_it_is_in_jax(pair: tuple[Any, Llama], name: str) -> None:
    """With a mask. Without one are the single rows below, and the sets whose activations are patched."""
    ours = sweep(pair[0], TOKENS, FAMILIES[name], METRICS["difference"], mask=MASK)
    want = sweep(pair[1], TOKENS, FAMILIES[name], METRICS["difference"], mask=MASK, reuse=False)
    assert ours.shape == want.shape and isinstance(ours, jax.Array)
    assert np.abs(np.asarray(ours) - np.asarray(want)).max() <= ROUTES


@pytest.mark.numerical
def test_every_kind_of_metric(pair: tuple[Any, Llama]) -> None:
    """Against NumPy's of the logits that JAX gives."""
    family = FAMILIES["heads"]
    logits = np.asarray(sweep(pair[1], TOKENS, family, lambda out: out.logits, mask=MASK), np.float64)
    last, row = [np.flatnonzero(real)[-1] for real in MASK], np.arange(3)
    after = logits[row, :, :, last]  # [B, L, H, V]
    before = logits[row, :, :, np.array(last) - 1]
    # In every variant no logit is near that of the token whose rank is read.
    assert_clear(np.delete(after, 24, -1), after[..., 24:25])
    want = {
        "difference": after[..., 3] - after[..., 5],
        "a pair for each prompt": after[row, :, :, np.array([3, 4, 5])] - after[..., 7],
        "probability": before[..., 3] - np.log(np.exp(before).sum(-1)),
        "rank": (after > after[..., 24:25]).sum(-1),
        "of one's own": logits[..., 5, :].max(-1),
    }
    assert set(want) == set(METRICS)
    for name, metric in METRICS.items():
        ours = sweep(pair[0], TOKENS, family, metric, mask=MASK)
        assert ours.shape == (3, 3, 4) and ours.dtype == (np.int32 if name == "rank" else np.float32), name
        assert np.abs(np.asarray(ours) - want[name]).max() <= ROUTES, name


def test_a_row_is_the_single_run_however_it_is_grouped(pair: tuple[Any, Llama]) -> None:
    hf = pair[0]
    metric = logit_difference(3, 5)
    want = [[float(metric(forward(hf, TOKENS[0], HeadAblation(i, j)))) for j in range(4)] for i in range(3)]
    for options in ({}, {"reuse": False}, {"batch_size": 5}, {"batch_size": 1}):
        found = sweep(hf, TOKENS[0], HeadAblation.grid(hf.config), metric, **options)
        assert np.abs(np.asarray(found) - want).max() <= ROUTES
    assert plan(hf, TOKENS[0], HeadAblation.grid(hf.config), metric).reuse is not None


def test_a_set_shares_its_beginning_and_runs_in_its_own_columns(
    pair: tuple[Any, Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    everywhere = Steer(np.arange(3), RNG.normal(size=24), np.linspace(0, 2, 4)[:, None])
    for family, side in ((FAMILIES["heads"], "left"), ([everywhere], "right")):
        tokens, mask = np.full((4, 15), 60), np.zeros((4, 15), bool)
        for row, n in enumerate((15, 9, 14, 9)):
            where = slice(15 - n, None) if side == "left" else slice(n)
            mask[row, where], tokens[row, where] = True, np.append(TOKENS[0, :7], RNG.integers(0, 61, n - 7))
        want = sweep(pair[1], tokens, family, METRICS["difference"], mask=mask, reuse=False)
        monkeypatch.setattr("oculi_jax.buckets.FLOPS_OF_A_PROGRAM", {"cpu": 0.0})
        planned = plan(pair[0], tokens, family, METRICS["difference"], mask=mask, batch_size=2)
        assert {part.n_tokens for part in planned.parts} == {10, 16, 14} and any(c.shared for c in planned.calls)
        ours = sweep(pair[0], tokens, family, METRICS["difference"], mask=mask, batch_size=2)
        monkeypatch.undo()
        assert np.abs(np.asarray(ours) - np.asarray(want)).max() <= ROUTES


def test_what_precedes_the_first_edit_is_run_once(pair: tuple[Any, Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    from oculi_jax.backends.torch import layers as network

    ran: list[tuple[int, int, int]] = []
    block = network._block

    def counted(w: Any, resid: Any, layout: Any, tap: Any, *rest: Any) -> Any:
        ran.append((tap.layer, *resid.shape[:2]))
        return block(w, resid, layout, tap, *rest)

    monkeypatch.setattr(network, "_block", counted)
    last = FAMILIES["late positions"][0]
    family = Steer(2, last.vector, np.linspace(0, 2, 40), positions=-1)
    found = sweep(pair[0], TOKENS[0], family, logit_difference(3, 5))
    assert {entry[0] for entry in ran if entry[1] > 1} == {2}
    assert all(n_tokens < 13 for _, n_rows, n_tokens in ran if n_rows > 1)
    want = sweep(pair[1], TOKENS[0], family, logit_difference(3, 5), reuse=False)
    assert np.abs(np.asarray(found) - np.asarray(want)).max() <= ROUTES


def test_a_function_of_ones_own_is_called_row_by_row(pair: tuple[Any, Llama]) -> None:
    import torch

    def clipped(x: Any, value: Any) -> Any:
        return torch.clamp(x, -value, value)

    def jaxs(x: Any, value: Any) -> Any:
        return jnp.clip(x, -value, value)

    layers = np.array([0, 2, 1])
    ours, want = (
        sweep(
            model,
            TOKENS,
            Edit("resid_mid", "apply", layers, True, np.float32(0.5), fn),
            logit_difference(3, 5),
            mask=MASK,
        )
        for model, fn in zip(pair, (clipped, jaxs), strict=True)
    )
    assert np.abs(np.asarray(ours) - np.asarray(want)).max() <= ROUTES


@pytest.mark.numerical
@pytest.mark.parametrize(
    ("site", "by"), [("z", ("layer", "head")), ("resid_pre", ("layer", "position")), ("embed", "position")]
)
def test_activation_patching(pair: tuple[Any, Llama], site: str, by: Any) -> None:
    clean, corrupted = TOKENS[:2], TOKENS[:2].copy()
    corrupted[:, 4] = (corrupted[:, 4] + 1) % 61
    for direction in ("denoising", "noising") if site == "z" else ("denoising",):
        ours, want = (
            activation_patching(model, clean, corrupted, METRICS["difference"], site, by, direction=direction)
            for model in pair
        )
        for name in ("patched", "clean", "corrupted"):
            assert np.abs(np.asarray(getattr(ours, name)) - np.asarray(getattr(want, name))).max() <= ROUTES


def test_causal_tracing_with_noise(pair: tuple[Any, Llama]) -> None:
    noise = Noise([1, 2], samples=2, key=jax.random.key(0))
    ours, want = (
        CausalTracer(LlamaAttentionAdapter(model))
        .trace(TOKENS[0], noise, logit_difference(3, 5), sites=("mlp_out",))
        .patched
        for model in pair
    )
    assert np.abs(np.asarray(ours) - np.asarray(want)).max() <= ROUTES


def test_what_cannot_be_swept_is_said(pair: tuple[Any, Llama]) -> None:
    hf, metric = pair[0], logit_difference(3, 5)
    with pytest.raises(ValueError, match="A mesh is of JAX's devices"):
        sweep(hf, TOKENS[0], HeadAblation.grid(hf.config), metric, mesh=jax.make_mesh((1,), ("data",)))
    with pytest.raises(TypeError, match="no jit, vmap or grad"):
        jax.jit(lambda a: sweep(hf, TOKENS[0], KScaler(0, 0, a), metric))(np.ones(3, np.float32))
    with pytest.raises(TypeError, match="returns no array"):
        sweep(hf, TOKENS[0], HeadAblation.grid(hf.config), lambda out: None)
    assert kl_divergence(forward(hf, TOKENS[0]))(forward(hf, TOKENS[0])) == 0


@pytest.mark.real
def test_the_heads_of_smollm2(directory: Path, hf: Any, adapter: Any) -> None:
    ids = np.array(adapter.tokenizer.encode("When Mary and John went to the store, John gave a drink to"))
    metric = logit_difference(adapter.to_single_token(" Mary"), adapter.to_single_token(" John"))
    family = HeadAblation(np.arange(30), np.arange(30) % 9)  # every layer, and every head
    ours, want = (sweep(model, ids, family, metric) for model in (hf, adapter.model))
    assert (
        np.abs(np.asarray(ours) - np.asarray(want)).max() <= 2 * 2e-4
    )  # a difference of two logits, contract section 7
