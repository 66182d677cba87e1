"""`mean_activations`: means over real tokens, as NumPy takes them of single runs; both backends."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import buckets, forward, mean_activations, means, padded
from oculi_jax.backends import jax as backend

from .tiny import prompt, tiny_llama
from .tolerances import ROUNDING

MODEL = tiny_llama()
ROWS = [prompt(6), prompt(4, 1), prompt(9, 2)]
SITES = ("resid_post", "z", "act", "attn_scale", "embed", "final_norm")


def single(site: str) -> list[np.ndarray]:
    """A site of each prompt, run by itself."""
    return [np.asarray(forward(MODEL, row, capture=site, logits="none")[site]) for row in ROWS]


def token_axis(site: str) -> int:
    return MODEL.config.sites[site].axes.index("T") + int(MODEL.config.sites[site].layered)


@pytest.fixture(params=["right", "left"])
def batch(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    tokens, mask = padded(ROWS)
    if request.param == "left":
        shifts = (~mask).sum(axis=1)
        tokens, mask = (np.stack([np.roll(r, n) for r, n in zip(x, shifts, strict=True)]) for x in (tokens, mask))
    return tokens, mask


@pytest.mark.parametrize("at_once", [1 << 28, 40_000])  # all prompts in one call, and two calls of two
def test_it_is_the_mean_over_the_tokens_of_single_runs(
    batch: tuple[np.ndarray, np.ndarray], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(means, "_AT_ONCE", at_once)
    found = mean_activations(MODEL, batch[0], SITES, mask=batch[1])
    assert tuple(found) == SITES
    for site in SITES:
        want = np.concatenate([np.moveaxis(x, token_axis(site), 0) for x in single(site)]).mean(axis=0)
        np.testing.assert_allclose(found[site], want, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize(("worth", "lengths"), [(0.0, [10, 6, 4]), (2e10, [10, 4])])
def test_prompts_run_in_buckets_of_near_lengths(
    batch: tuple[np.ndarray, np.ndarray], worth: float, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_variants(model: Any, tokens: np.ndarray, *given: Any, **named: Any) -> Any:
        ran.append(tokens.shape[1])
        return real(model, tokens, *given, **named)

    ran: list[int] = []
    real = backend.run_variants
    monkeypatch.setattr(backend, "run_variants", run_variants)
    monkeypatch.setattr(buckets, "FLOPS_OF_A_PROGRAM", {"cpu": worth})
    found = mean_activations(MODEL, batch[0], "resid_post", mask=batch[1], by=("layer", "position"))["resid_post"]
    assert ran == lengths and found.shape[1] == 9
    runs = single("resid_post")
    for t in range(9):
        want = np.mean([x[:, t] for x in runs if x.shape[1] > t], axis=0)
        np.testing.assert_allclose(found[:, t], want, rtol=ROUNDING, atol=ROUNDING)


def test_by_position_it_is_of_the_prompts_that_reach_it(batch: tuple[np.ndarray, np.ndarray]) -> None:
    found = mean_activations(MODEL, batch[0], ("z", "pattern"), mask=batch[1], layers=[2, 0], by=("layer", "position"))
    for site in ("z", "pattern"):
        runs = [x[[2, 0]] for x in single(site)]
        assert found[site].shape[2] == 9
        for t in range(9):
            there = [x[:, :, t] for x in runs if x.shape[2] > t]
            width = max(x.shape[-1] for x in there) if site == "pattern" else there[0].shape[-1]
            want = sum(np.pad(x, ((0, 0), (0, 0), (0, width - x.shape[-1]))) for x in there) / len(there)
            np.testing.assert_allclose(np.asarray(found[site])[:, :, t, :width], want, rtol=ROUNDING, atol=ROUNDING)


def test_of_half_precision_it_is_summed_in_float32() -> None:
    half, row = tiny_llama(dtype=jnp.bfloat16), prompt(9, 2)
    found = mean_activations(half, row, "resid_post")["resid_post"]
    seen = forward(half, row, capture="resid_post", logits="none")["resid_post"]
    assert seen.dtype == jnp.bfloat16 and found.dtype == np.float32
    want = np.asarray(seen, np.float64).mean(axis=1)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)  # sums in bfloat16 are wrong by 1e-2


@pytest.mark.torch
def test_torch_gives_the_same(hf_trained: Any, embedded: Any) -> None:
    model, tokenizer = embedded
    tokens, mask = padded(["The capital of Italy is", "Rome is in"], tokenizer)
    ours, theirs = (mean_activations(m, tokens, ("z", "mlp_out"), mask=mask) for m in (model, hf_trained))
    for site, value in ours.items():
        np.testing.assert_allclose(theirs[site], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sites": "pattern"}, r"pattern has an axis of keys.*by=\('layer', 'position'\)"),
        ({"by": ("head",)}, r"by is \('head',\), and can be"),
        ({"sites": "resid"}, "resid"),
        ({"layers": [3]}, "0 to 2"),
        ({"mask": np.zeros((1, 6), bool)}, "no real token"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_activations(**{"model": MODEL, "tokens": prompt(6)[None], "sites": "z", **change})
