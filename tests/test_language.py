"""What an array means is written: sets, `PerLayer`, `PerPrompt`, and the axes of a sweep, on both backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import forward, generate, sweep
from oculi_jax.intervention import (
    Ablation,
    ActivationPatch,
    AttentionKnockout,
    Blend,
    DirectionAblation,
    Edit,
    Freeze,
    HeadAblation,
    KScaler,
    PerLayer,
    PerPrompt,
    QScaler,
    SpectraScaler,
    Steer,
)
from oculi_jax.metrics import logit_difference
from oculi_jax.models.decoder.parameters import parameter_table
from oculi_jax.models.llama import LlamaAttentionAdapter

from .compilations import compilations
from .tiny import prompt, tiny_llama
from .tolerances import LOGITS, ROUNDING

MODEL = tiny_llama()
L, H, K, T, D, E, F = 3, 4, 2, 11, 6, 24, 40
IDS = prompt(T)
RNG = np.random.default_rng(0)
METRIC = logit_difference(3, 5)
OTHER = {k: np.asarray(x) for k, x in forward(MODEL, prompt(T, 1), capture=("mlp_out", "z", "v", "pattern", "attn_scale", "embed")).activations.items()}  # fmt: skip


@pytest.fixture(scope="module")
def twin() -> Any:
    """The same model on torch."""
    import torch

    from oculi_jax.backends.torch import TorchDecoder

    leaves = {"embed": MODEL.embed, "norm.weight": MODEL.norm.weight, "unembed": MODEL.unembed}
    layers = MODEL.layers
    for part, names in (("attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
        leaves |= {f"layers.{part}.{name}.weight": getattr(getattr(layers, part), name).weight for name in names}
    leaves |= {f"layers.{name}.weight": getattr(layers, name).weight for name in ("attn_norm", "mlp_norm")}
    params = {row.name: np.array(leaves[row.name][...]) for row in parameter_table(MODEL.config)}
    return TorchDecoder.from_arrays(MODEL.config, params, torch.device("cpu"))


def near(a: Any, b: Any, tolerance: float = ROUNDING) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


VECTORS = RNG.normal(size=(L, E)).astype(np.float32)
# A field of rank 1 → the intervention with that array in it.
RANK_ONE: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "vector": (lambda x: Steer(1, x), VECTORS),
    "vector of scores": (lambda x: Steer(1, x, site="pattern"), RNG.normal(size=(L, L)).astype(np.float32)),
    "direction": (lambda x: DirectionAblation("resid_mid", 1, x), VECTORS),
    "replacement": (lambda x: HeadAblation(1, 2, x), VECTORS[:, :D]),
}


def test_an_array_for_each_layer_is_refused_by_name_where_the_prompt_is_as_long_as_the_model() -> None:
    """With T = L, `[L, E]` once broadcast along the tokens: it ran, and was wrong."""
    tokens = IDS[:L]
    for make, array in RANK_ONE.values():
        with pytest.raises(
            ValueError, match=r"makes it a sweep.*oculi_jax.sweep.*One entry for each layer is PerLayer\(x\)"
        ):
            forward(MODEL, tokens, make(array))

    def rows(layer: int) -> list[Any]:
        return [make(array[layer]) for make, array in RANK_ONE.values()]

    sites = ("resid_pre", "pattern", "resid_mid", "z")  # where each of them acts
    got = forward(MODEL, tokens, [make(PerLayer(array)) for make, array in RANK_ONE.values()], capture=sites)
    want = [forward(MODEL, tokens, rows(layer), capture=sites) for layer in range(L)]
    for site in sites:
        near(got[site], want[1][site])
    near(got.logits, want[1].logits)
    found = sweep(MODEL, tokens, [make(array) for make, array in RANK_ONE.values()], lambda out: out.logits)
    near(found, [out.logits for out in want], 1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("site", ["z", "v", "resid_pre", "pattern", "embed"])
def test_a_value_has_its_sites_rank(site: str) -> None:
    """Less axes than the site's are refused, whatever they would broadcast to."""
    layer = None if site == "embed" else 1
    with pytest.raises(ValueError, match="a number, or all of these axes"):
        forward(MODEL, IDS, ActivationPatch(site, layer, np.ones(E)))
    with pytest.raises(ValueError, match="a number, or all of these axes"):
        forward(MODEL, IDS, Edit(site, "set", layer, np.ones(T, bool)))


SETS: dict[str, tuple[Callable[[], Any], Callable[[], Any], list[Any]]] = {
    "heads": (lambda: HeadAblation(1, [1, 2, 3]), lambda: HeadAblation(1, [0, 2]), [HeadAblation(1, h) for h in (1, 2, 3)]),
    "layers": (lambda: HeadAblation(range(1, 3), 1), lambda: HeadAblation([0], 1), [HeadAblation(x, 1) for x in (1, 2)]),
    "layers and heads": (lambda: HeadAblation((0, 2), [3, 0], 0.5), lambda: HeadAblation([1], [2], 0.5),
                         [HeadAblation(x, h, 0.5) for x in (0, 2) for h in (3, 0)]),
    "patches": (
        lambda: ActivationPatch("mlp_out", range(1, 3), PerLayer(OTHER["mlp_out"])),
        lambda: ActivationPatch("mlp_out", [2], PerLayer(OTHER["mlp_out"])),
        [ActivationPatch("mlp_out", x, OTHER["mlp_out"][x]) for x in (1, 2)],
    ),
    "patches of heads": (
        lambda: ActivationPatch("z", [0, 2], PerLayer(OTHER["z"]), [1, 2], [3, -1]),
        lambda: ActivationPatch("z", [1], PerLayer(OTHER["z"]), [0], [4]),
        [ActivationPatch("z", x, OTHER["z"][x, h], h, [3, -1]) for x in (0, 2) for h in (1, 2)],
    ),
    "keys": (lambda: KScaler([0, 1], (0, 1), 2.0), lambda: KScaler([2], [1], 2.0), [KScaler(x, k, 2.0) for x in (0, 1) for k in (0, 1)]),
    "queries": (lambda: QScaler(1, range(4), -1.0), lambda: QScaler(1, range(2), -1.0), [QScaler(1, h, -1.0) for h in range(4)]),
    "spectra": (lambda: SpectraScaler(1, range(4), PerLayer([1.0, 3.0, 2.0])), lambda: SpectraScaler(2, [0], PerLayer([1.0, 3.0, 2.0])),
                [SpectraScaler(1, h, 3.0) for h in range(4)]),
    "neurons": (lambda: Ablation("act", 1, [3, 17]), lambda: Ablation("act", 1, range(5)), [Ablation("act", 1, n) for n in (3, 17)]),
    "directions": (
        lambda: DirectionAblation("resid_mid", range(3), VECTORS[0]), lambda: DirectionAblation("resid_mid", [1], VECTORS[1]),
        [DirectionAblation("resid_mid", x, VECTORS[0]) for x in range(3)],
    ),
    "a direction for each layer": (
        lambda: Steer(range(3), PerLayer(VECTORS), 0.5), lambda: Steer([2], PerLayer(VECTORS), 0.5),
        [Steer(x, VECTORS[x], 0.5) for x in range(3)],
    ),
    "edges": (lambda: AttentionKnockout([1], [1, 2], range(5, 9), (0, 1)), lambda: AttentionKnockout([0], [1], [3], [0]),
              [AttentionKnockout(1, h, q, k) for h in (1, 2) for q in range(5, 9) for k in (0, 1)]),
    "edits": (lambda: Edit("mlp_out", "scale", [0, 2], True, 0.5), lambda: Edit("mlp_out", "scale", [1], True, 0.5),
              [Edit("mlp_out", "scale", x, True, 0.5) for x in (0, 2)]),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_the_list_of_single_ones_and_another_set_is_no_other_program(name: str) -> None:
    make, other, each = SETS[name]
    out, want = forward(MODEL, IDS, make(), capture="resid_post"), forward(MODEL, IDS, each)
    near(out.logits, want.logits, 1e-5)
    assert np.abs(np.asarray(out.logits) - np.asarray(forward(MODEL, IDS).logits)).max() > 1e-3
    with compilations() as compiled:
        forward(MODEL, IDS, other(), capture="resid_post")
    assert not compiled


@pytest.mark.torch
def test_sets_are_the_same_on_torch(twin: Any) -> None:
    for name, (make, *_) in SETS.items():
        got, want = (forward(model, IDS, make(), capture="resid_post") for model in (twin, MODEL))
        near(got.logits, want.logits, LOGITS)
        assert got.applied.tolist() == want.applied.tolist(), name


def test_in_a_trace_a_set_is_its_mask() -> None:
    found = jax.jit(lambda layers, heads: forward(MODEL, IDS, HeadAblation(layers, heads)).logits)(
        jnp.array([False, True, True]), jnp.array([True, False, False, True])
    )
    near(found, forward(MODEL, IDS, HeadAblation([1, 2], [0, 3])).logits)
    masks = np.eye(L, dtype=bool)[:, None] | np.eye(L, dtype=bool)[None]  # [L, L, L]: a family of sets
    swept = sweep(MODEL, IDS, HeadAblation(masks, 1), METRIC)
    near(swept[0, 2], METRIC(forward(MODEL, IDS, HeadAblation([0, 2], 1))), 1e-5)


# 12 prompts, ragged, padded on the right; the metric's targets are each prompt's own.
LENGTHS = [11, 7, 9, 10, 8, 11, 6, 9, 7, 10, 8, 11]
B = len(LENGTHS)
MASK = np.arange(T) < np.array(LENGTHS)[:, None]
TOKENS = np.where(MASK, np.stack([prompt(T, row) for row in range(B)]), 0)
TARGETS = RNG.integers(0, 61, (2, B))
PLACES = [[0, 2], [1], [-1], [3, 4], [0], [5], [2], [1, 0], [-2], [4], [3], [0, 1, 2]]


def per_prompt(rng: np.random.Generator) -> dict[str, Callable[[int | None], Any]]:
    """Kind of field → the intervention of one prompt, or, for None, of all of them with `PerPrompt`."""
    layers, heads = rng.integers(0, L, B), rng.integers(0, H, B)
    vectors, value = rng.normal(size=(B, E)).astype(np.float32), rng.normal(size=(B, L, H, T, D)).astype(np.float32)
    alphas, keep, other = rng.random(B) + 0.5, rng.random((B, L, H)), rng.normal(size=(B, H, T, D)).astype(np.float32)
    masks, queries = rng.random((B, T, 1)) < 0.5, [int(n) - 1 for n in LENGTHS]

    def of(x: Any) -> Callable[[int | None], Any]:
        return lambda b: PerPrompt(x) if b is None else x[b]

    def of_layers(x: Any) -> Callable[[int | None], Any]:
        return lambda b: PerPrompt(PerLayer(x)) if b is None else PerLayer(x[b])

    return {
        "indices": lambda b: HeadAblation(of(layers)(b), of(heads.tolist())(b)),
        "strength": lambda b: SpectraScaler(1, 2, of(alphas)(b)),
        "positions": lambda b: Steer(1, VECTORS[0], positions=of(PLACES)(b)),
        "vector": lambda b: Steer(1, of(vectors)(b), 2.0),
        "vectors on the device": lambda b: Steer(1, of(jnp.asarray(vectors))(b), 2.0),
        "value": lambda b: ActivationPatch("z", 1, of_layers(value)(b), of(heads)(b)),
        "values on the device": lambda b: ActivationPatch("z", [0, 2], of_layers(jnp.asarray(value))(b)),
        "table": lambda b: Blend("z", of(keep)(b), of(other)(b)),
        "mask": lambda b: Edit("mlp_out", "set", 1, of(masks)(b), 0.5),
        "edge": lambda b: AttentionKnockout(1, 2, of(queries)(b), 0),
        "neurons": lambda b: Ablation("act", 1, of([[n, n + 1] for n in range(B)])(b)),
    }


# On JAX several share a program, each at a site of its own; torch, which compiles none, says which one is wrong.
GROUPS = (
    "indices, positions, mask, edge",
    "strength, vector, value",
    "table, neurons",
    "vectors on the device, values on the device",
)
ALONE = [pytest.param("torch", name, marks=pytest.mark.torch) for name in per_prompt(RNG)]


def test_each_kind_of_field_is_in_one_group() -> None:
    assert sorted(", ".join(GROUPS).split(", ")) == sorted(per_prompt(RNG))


@pytest.mark.parametrize(("backend", "names"), [*(("jax", names) for names in GROUPS), *ALONE])
def test_each_prompt_has_its_own(names: str, backend: str, request: pytest.FixtureRequest) -> None:
    model = MODEL if backend == "jax" else request.getfixturevalue("twin")

    def given(seed: int, b: int | None) -> list[Any]:
        made = per_prompt(np.random.default_rng(seed))
        return [made[name](b) for name in names.split(", ")]

    metric = logit_difference(*TARGETS)
    found = sweep(model, TOKENS, [*given(1, None), HeadAblation(np.arange(L), 1)], metric, mask=MASK)
    assert found.shape == (B, L)
    for b in range(0, B, 3):
        for layer in (0, 2):
            single = forward(model, TOKENS[b], [*given(1, b), HeadAblation(layer, 1)], mask=MASK[b])
            near(found[b, layer], logit_difference(*TARGETS[:, b])(single), 1e-4)
    if backend == "jax" and "device" not in names:
        with compilations() as compiled:
            sweep(model, TOKENS, [*given(2, None), HeadAblation(np.arange(L), 1)], metric, mask=MASK)
        assert not compiled


@pytest.mark.quick
@pytest.mark.parametrize("backend", ["jax", pytest.param("torch", marks=pytest.mark.torch)])
def test_a_family_of_masks_is_one_program(backend: str, request: pytest.FixtureRequest) -> None:
    model = MODEL if backend == "jax" else request.getfixturevalue("twin")
    keep = (RNG.random((16, L, H)) < 0.5).astype(np.float32)
    found = sweep(model, TOKENS, Blend("z", keep, PerLayer(OTHER["z"].mean(axis=2, keepdims=True))), METRIC, mask=MASK)
    assert found.shape == (B, 16)
    for b, n in ((0, 0), (5, 9), (11, 15)):
        blend = Blend("z", keep[n], PerLayer(OTHER["z"].mean(axis=2, keepdims=True)))
        near(found[b, n], METRIC(forward(model, TOKENS[b], blend, mask=MASK[b])), 1e-4)


def test_generation_and_the_adapter_take_what_is_each_prompts_own() -> None:
    tokens, vectors = np.stack([prompt(T, row) for row in range(2)]), VECTORS[:2] * 3
    adapter = LlamaAttentionAdapter(MODEL)
    steer = Steer(1, PerPrompt(vectors))
    both = adapter.generate(tokens, 4, steer, stop_tokens=())
    for row in range(2):
        alone = generate(MODEL, tokens[row], 4, Steer(1, vectors[row]), stop_tokens=())
        np.testing.assert_array_equal(both[row, T:], alone)
    with pytest.raises(ValueError, match="a PerPrompt of 3 entries, and there are 2 prompts"):
        adapter.generate(tokens, 4, Steer(1, PerPrompt(VECTORS)), stop_tokens=())


BLENDS = {"z": (L, H), "v": (L, K), "act": (L, F), "mlp_out": (L, 1), "pattern": (L, H), "embed": (1, E)}


@pytest.mark.parametrize("site", BLENDS)
def test_a_blend_mixes_what_stands_there_with_another_value(site: str) -> None:
    keep = RNG.random(BLENDS[site]).astype(np.float32)
    before = forward(MODEL, IDS, capture=tuple(BLENDS))[site]
    own = forward(MODEL, IDS, Blend(site, keep, 2.0), capture=tuple(BLENDS))[site]
    before, own = (np.asarray(x) if site != "embed" else np.asarray(x)[None] for x in (before, own))
    table = keep[:, :, None, None] if site in ("z", "v", "pattern") else keep[:, None, :]
    near(own[0], (keep_of := table[0]) * before[0] + (1 - keep_of) * 2.0, 1e-5)


def test_frozen_sites_hold_what_another_run_had_there() -> None:
    sites = ("pattern", "attn_scale", "embed")
    run = forward(MODEL, prompt(T, 1), capture=sites)
    held = forward(MODEL, IDS, Freeze(run, sites), capture=sites)
    for site in sites:
        np.testing.assert_array_equal(held[site], run[site])
    some = forward(MODEL, IDS, Freeze(run.activations, "pattern", layers=[2]), capture="pattern")["pattern"]
    np.testing.assert_array_equal(some[2], run["pattern"][2])
    assert np.abs(np.asarray(some[0]) - np.asarray(run["pattern"][0])).max() > 1e-3
    # Of the same prompt, frozen patterns and scales change nothing, and make the rest linear in what is ablated.
    own = forward(MODEL, IDS, capture=("pattern", "attn_scale", "mlp_scale", "final_scale"))
    near(
        forward(MODEL, IDS, Freeze(own, ("pattern", "attn_scale", "mlp_scale", "final_scale"))).logits, own.logits, 1e-5
    )
    swept = sweep(MODEL, IDS, [Freeze(own, "pattern"), HeadAblation.grid(MODEL.config)], METRIC)
    near(swept[1, 2], METRIC(forward(MODEL, IDS, [Freeze(own, "pattern"), HeadAblation(1, 2)])), 1e-5)


FREEZES = {
    "layers left out": (lambda: Freeze({"pattern": OTHER["pattern"][:2]}, "pattern"), ValueError, r"\[2, 4, 11, 11\].*captured in all layers"),
    "not captured": (lambda: Freeze(OTHER, ("pattern", "q")), ValueError, "has no 'q'; it has"),
    "no run": (lambda: Freeze(OTHER["pattern"], "pattern"), TypeError, "the Output of a run, or its activations"),
    "no site": (lambda: Freeze(OTHER, ()), ValueError, "sites is empty"),
    "unknown site": (lambda: Freeze(OTHER, "patern"), ValueError, "did you mean 'pattern'"),
    "layers of the embedding": (lambda: Freeze(OTHER, ("embed", "z"), [1]), ValueError, "embed occurs once, outside the layers"),
    "a longer prompt": (lambda: Freeze({"z": np.ones((L, H, T + 1, D))}, "z"), ValueError, "of a prompt of this length"),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("name", FREEZES)
def test_what_cannot_be_frozen(name: str) -> None:
    make, kind, message = FREEZES[name]
    with pytest.raises(kind, match=message):
        forward(MODEL, IDS, make())
