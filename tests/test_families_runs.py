"""Every family generates, sweeps with reuse, pads, patches and shards as single runs and Hugging Face say."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.export
import numpy as np
import pytest

from oculi_jax import forward, generate, plan, sweep
from oculi_jax.causal import activation_patching
from oculi_jax.intervention import ActivationPatch, HeadAblation, PerLayer, Steer
from oculi_jax.metrics import logit_difference

from .margins import assert_leads
from .test_families import KINDS, make, of_torch
from .tolerances import ROUNDING, ROUTES

pytestmark = pytest.mark.torch

# One of each family, those whose window is shorter than the prompt where there is one.
FAMILIES = (
    "qwen2, windows, tied", "qwen3", "mistral", "smollm3, windows, biases", "granite", "gemma2", "gemma3", "olmo2", "olmo3, yarn",
    "phi3", "exaone4",
)  # fmt: skip
N = 11
# One of each kind of cache: no window, one in all layers or in some, layers that rotate otherwise or not at all.
CACHES = ("qwen3", "mistral", "gemma2", "gemma3", "smollm3, windows, biases", "exaone4")
# Prompts whose continuations are in no doubt.
SEEDS = {"qwen3": 3, "granite": 34, "gemma2": 39, "gemma3": 39}
METRIC = logit_difference(7, 9)


@cache
def pair(kind: str) -> tuple[Any, Any]:
    """Hugging Face's model, and the same weights as a pytree."""
    hf = make(kind)
    return hf, of_torch(hf).as_jax()


def prompt(n: int = N, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 61, n).astype(np.int32)


@pytest.mark.numerical
@pytest.mark.parametrize("kind", FAMILIES)
def test_greedy_ids_are_hugging_faces_past_the_window(kind: str) -> None:
    import torch

    hf, model = pair(kind)
    ids, n = prompt(seed=SEEDS.get(kind, 1)), 64 if kind in CACHES else 16
    with torch.no_grad():
        theirs = hf.generate(
            torch.tensor(ids)[None].long(), attention_mask=torch.ones(1, N), max_new_tokens=n, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )[0].numpy()  # fmt: skip
    whole = np.asarray(forward(model, theirs[:-1].astype(np.int32)).logits)[N - 1 :]
    assert_leads(whole)
    np.testing.assert_array_equal(generate(model, ids, n, stop_tokens=()), theirs[N:])
    np.testing.assert_array_equal(generate(hf, ids, n, stop_tokens=()), theirs[N:])


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_sweep_with_reuse_is_single_runs(kind: str) -> None:
    hf, model = pair(kind)
    ids, layers = prompt(), np.arange(model.config.num_hidden_layers)
    tokens, mask = np.zeros((2, N), np.int32), np.zeros((2, N), bool)
    tokens[0], mask[0], tokens[1, 4:], mask[1, 4:] = ids, True, prompt(N - 4, 5), True
    family = Steer(layers[:, None], np.ones(model.config.hidden_size, np.float32), 0.5, positions=np.array([-2, -5]))
    assert any(call.n_rows < N for call in plan(model, ids, family, METRIC, batch_size=2).calls)
    want = np.empty((2, len(layers), 2))
    for row, layer, i in np.ndindex(want.shape):
        single = Steer(layer, np.ones(model.config.hidden_size, np.float32), 0.5, positions=[-2, -5][i])
        want[row, layer, i] = METRIC(forward(model, tokens[row], single, mask=mask[row]))
    for runs in (model, hf):
        found = sweep(runs, tokens, family, METRIC, mask=mask, batch_size=2)
        np.testing.assert_allclose(found, want, rtol=ROUTES, atol=ROUTES)


@pytest.mark.parametrize("kind", ["mistral", "qwen3", "gemma3", "olmo3, yarn"])
def test_heads_and_patches_are_single_runs(kind: str) -> None:
    _, model = pair(kind)
    ids, other = prompt(), prompt()
    other[4] = 59
    heads = np.asarray(sweep(model, ids, HeadAblation.grid(model.config), METRIC))
    layer, head = (int(x) for x in np.unravel_index(np.abs(heads - METRIC(forward(model, ids))).argmax(), heads.shape))
    want = METRIC(forward(model, ids, HeadAblation(layer, head)))
    np.testing.assert_allclose(heads[layer, head], want, rtol=ROUTES, atol=ROUTES)
    site = "attn_proj" if model.config.post_norm else "q_scale" if model.config.qk_norm else "mlp_out"
    run = forward(model, ids, capture=site)[site]
    by = ("layer", "head", "position") if site == "q_scale" else ("layer", "position")
    found = activation_patching(model, ids, other, METRIC, site, by).patched
    whole = (slice(None),) * (len(by) - 2)
    for layer, position in ((0, 4), (2, 7)):
        patch = ActivationPatch(site, layer, PerLayer(run), positions=position, **({"head": 1} if whole else {}))
        want = METRIC(forward(model, other, patch))
        place = (layer, 1, position) if whole else (layer, position)
        np.testing.assert_allclose(found[place], want, rtol=ROUTES, atol=ROUTES)


@pytest.mark.parametrize("kind", ["gemma3", "phi3"])
def test_two_devices_are_one(kind: str, tmp_path: Any) -> None:
    from oculi_jax import from_pretrained

    hf, model = pair(kind)
    hf.save_pretrained(tmp_path)
    mesh = jax.make_mesh((1, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spread = from_pretrained(tmp_path, mesh=mesh)
    ids = prompt()
    want = forward(model, ids, capture=tuple(model.config.sites))
    found = forward(spread, ids, capture=tuple(model.config.sites))
    for site, value in want.activations.items():
        np.testing.assert_allclose(found.activations[site], value, rtol=ROUTES, atol=ROUTES, err_msg=site)
    np.testing.assert_allclose(found.logits, want.logits, rtol=ROUTES, atol=ROUTES)
    heads = HeadAblation.grid(model.config)
    swept = sweep(spread, ids, heads, METRIC, mesh=mesh)
    np.testing.assert_allclose(swept, sweep(model, ids, heads, METRIC), rtol=ROUTES, atol=ROUTES)


@pytest.mark.parametrize("kind", ["gemma3", "phi3"])
def test_every_site_exports_for_every_platform(kind: str) -> None:
    _, model = pair(kind)
    leaves, structure = jax.tree.flatten(model)
    sites = tuple(model.config.sites)

    def program(leaves: Any, ids: Any) -> Any:
        return forward(jax.tree.unflatten(structure, leaves), ids, capture=sites).activations

    exported = jax.export.export(jax.jit(program), platforms=("cpu", "cuda", "tpu"))(leaves, prompt())
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    found, want = exported.call(leaves, prompt()), forward(model, prompt(), capture=sites).activations
    for site, value in want.items():
        np.testing.assert_allclose(found[site], value, rtol=ROUNDING, atol=ROUNDING, err_msg=site)


def test_every_kind_that_runs_is_made() -> None:
    assert set(FAMILIES) <= set(KINDS)
