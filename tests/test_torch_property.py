"""Random configs, prompts, captures and interventions: both backends compute the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from oculi_jax import CaptureSpec, forward, generate
from oculi_jax.intervention import (
    Ablation,
    ActivationPatch,
    AttentionKnockout,
    Blend,
    DirectionAblation,
    Edit,
    HeadAblation,
    KScaler,
    PerLayer,
    QScaler,
    SpectraScaler,
    Steer,
)
from oculi_jax.models.decoder.activations import ACTIVATIONS
from oculi_jax.models.llama import Llama

from .test_parity_torch import ROPES, make
from .test_torch_adapter import greedy
from .tiny import SITES
from .tolerances import LOGITS, ROW, over, real_tokens, record, row_size

pytestmark = pytest.mark.torch


def config(rng: np.random.Generator) -> dict[str, Any]:
    kv_heads, groups = rng.integers(1, 4), rng.integers(1, 4)
    found = dict(
        vocab_size=61, hidden_size=int(kv_heads * groups * 2 * rng.integers(1, 4)), intermediate_size=int(rng.integers(3, 40)),
        num_hidden_layers=int(rng.integers(1, 5)), num_attention_heads=int(kv_heads * groups),
        num_key_value_heads=int(kv_heads), head_dim=6, rope_parameters=ROPES[rng.choice(list(ROPES))],
        hidden_act=str(rng.choice(list(ACTIVATIONS))), tie_word_embeddings=bool(rng.random() < 0.5),
        attention_bias=bool(rng.random() < 0.5), mlp_bias=bool(rng.random() < 0.5), eos_token_id=None,
    )  # fmt: skip
    return found


def value(rng: np.random.Generator, shape: list[int]) -> np.ndarray:
    """Of the rank of `shape`, some axes of one; or a number."""
    kept = [] if rng.random() < 0.1 else [1 if rng.random() < 0.4 else size for size in shape]
    return rng.normal(size=kept).astype(np.float32)


def intervention(rng: np.random.Generator, c: Any, n_tokens: int, n_real: int) -> Any:
    sizes = {**c.sizes, "T": n_tokens, "S": n_tokens}
    layer, head, kv_head = (int(rng.integers(sizes[letter])) for letter in "LHK")
    name = str(rng.choice([name for name in SITES if name != "allowed"]))
    site = SITES[name]
    at = layer if site.layered else None
    shape = [sizes[letter] for letter in site.axes]
    positions = [None, int(rng.integers(n_real)), rng.integers(0, n_real, 2).tolist()][rng.integers(3)]
    places = int(rng.integers(n_real)), rng.integers(0, n_real, 2).tolist()
    dense = (sizes["L"], *shape) if site.layered else tuple(shape)
    return [
        lambda: HeadAblation([layer], head, value(rng, [sizes["D"]])),
        lambda: Blend("z", rng.random((sizes["L"], sizes["H"]))),
        lambda: QScaler(layer, head, float(rng.normal())),
        lambda: KScaler(layer, kv_head, float(rng.normal())),
        lambda: SpectraScaler(layer, head, float(rng.random() * 3 + 0.1)),
        lambda: ActivationPatch(name, at, value(rng, shape), positions=positions),
        lambda: ActivationPatch("z", range(layer + 1), PerLayer(rng.normal(size=(sizes["L"], sizes["H"], n_tokens, 6))), head, positions),
        lambda: Steer(at, value(rng, shape[-1:]), float(rng.normal()), name, positions),
        lambda: DirectionAblation("resid_mid", layer, rng.normal(size=sizes["E"]), positions),
        lambda: AttentionKnockout(layer, head, *places),
        lambda: Ablation(name, at),
        lambda: Ablation("act", layer, int(rng.integers(sizes["F"]))),
        lambda: Edit(name, str(rng.choice(["set", "add", "scale"])), None, rng.random(dense) < 0.5, rng.normal(size=dense)),
    ][rng.integers(13)]()  # fmt: skip


def specs(rng: np.random.Generator, c: Any, n_real: int) -> tuple[CaptureSpec, ...]:
    chosen = []
    for name, site in SITES.items():
        layers = None
        if site.layered and rng.random() < 0.5:
            layers = rng.permutation(c.num_hidden_layers)[: rng.integers(1, c.num_hidden_layers + 1)].tolist()
        positions = rng.integers(-n_real, n_real, 2).tolist() if rng.random() < 0.3 else None
        if rng.random() < 0.7:
            chosen.append(CaptureSpec(name, layers, positions))
    return tuple(chosen)


@pytest.mark.numerical
@pytest.mark.parametrize("seed", range(12))
def test_both_backends_agree(tmp_path: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    hf = make(tmp_path, **config(rng))
    model = Llama.from_pretrained(tmp_path)
    n_tokens = int(rng.integers(1, 40))
    tokens, mask = rng.integers(0, 61, n_tokens), None
    if rng.random() < 0.5:
        mask = rng.random(n_tokens) < 0.8
        mask[rng.integers(n_tokens)] = True
    n_real = n_tokens if mask is None else int(mask.sum())
    several = [intervention(rng, model.config, n_tokens, n_real) for _ in range(rng.integers(0, 4))]
    capture = specs(rng, model.config, n_real)
    ours, want = (forward(m, tokens, several, capture=capture, mask=mask) for m in (hf, model))
    whole = forward(hf, tokens, several, capture=tuple(SITES), mask=mask).activations  # what rows are measured by

    assert ours.applied.tolist() == want.applied.tolist(), several
    assert set(ours.activations) == set(want.activations)
    real = np.ones(n_tokens, bool) if mask is None else mask
    for name, theirs in want.activations.items():
        mine = ours.activations[name]
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape, name
        spec = next(spec for spec in capture if spec.sites == name)
        size = row_size(name, whole, real)
        size = size if spec.layers is None else size[list(spec.layers)]
        if spec.positions is None:
            gap = np.abs(real_tokens(name, mine, real) - real_tokens(name, theirs, real))
        else:
            gap = np.abs(np.asarray(mine, np.float64) - np.asarray(theirs, np.float64))
            of_rows = name != "scores" and SITES[name].axes[-1] != "T"
            size = size[..., list(spec.positions)] if of_rows else size
            size = np.maximum(size, np.abs(np.asarray(theirs, np.float64)).max(over(name)))
        error = float((gap.max(over(name)) / np.where(size == 0, 1, size)).max())
        record({name: error})
        assert error <= ROW, (name, error, several)
    gap = np.abs(np.asarray(ours.logits) - np.asarray(want.logits))[real].max()
    assert gap <= max(LOGITS, ROW * np.abs(np.asarray(want.logits)).max()), several
    if mask is None:
        lasting = [item for item in several if not isinstance(item, Edit)]
        found = generate(hf, tokens, 4, lasting, allow_longer=True)
        assert found.tolist() == greedy(model, tokens, 4, lasting, allow_longer=True).tolist(), several
