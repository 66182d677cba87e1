"""Interventions: each against the definition of what it does, the laws they share, and compilations."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import CaptureSpec, forward
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
from oculi_jax.models.llama import Llama

from .compilations import compilations
from .test_forward_laws import near
from .tiny import SITES, prompt, tiny_llama
from .tolerances import ROUNDING

ALL = tuple(SITES)
LAYERED = tuple(name for name, site in SITES.items() if site.layered)
T, L, H, K, D, E = 11, 3, 4, 2, 6, 24


@pytest.fixture(scope="module")
def model() -> Llama:
    return tiny_llama()


@pytest.fixture(scope="module")
def clean(model: Llama) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in forward(model, prompt(), capture=ALL).activations.items()}


def run(model: Llama, *interventions, capture=ALL, **kwargs):
    return forward(model, prompt(), interventions, capture=capture, **kwargs)


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


OFF = {
    "Edit": Edit("resid_mid", "scale", 1, value=1.0),
    "Edit unmatched": Edit("q", "set", 1, mask=np.zeros((H, 1, 1), bool), value=5.0),
    "Edit apply": Edit("act", "apply", 1, value={"a": 0.0}, fn=lambda x, v: x + v["a"]),
    "QScaler": QScaler(1, 2, 1.0),
    "KScaler": KScaler(1, 1, 1.0),
    "SpectraScaler": SpectraScaler(1, 2, 1.0),
    "Blend": Blend("z", np.ones((L, H))),
    "Steer": Steer(1, np.ones(E), scale=0.0),
    "AttentionKnockout of the future": AttentionKnockout(1, 2, query=3, key=5),
}


NEVER = 99  # a layer that does not exist: in a trace, an intervention that acts nowhere


def only(number: int, count: int, *layers: int) -> np.ndarray:
    """For each of so many interventions its layers: all of one number's, of the others none."""
    here = (np.arange(count) == number)[:, None]
    return np.where(here, layers, NEVER).astype(np.int32)


def test_an_intervention_that_is_off_changes_no_bit_on_one_program_path(model: Llama) -> None:
    """The same program with the index traced to a layer that does not exist is the run without it."""
    out, plain = run(model, *OFF.values()), run(model)
    assert out.applied.tolist() == [0] * len(OFF)
    near(out.logits, plain.logits, ROUNDING)
    for name in ALL:
        near(out.activations[name], plain.activations[name], ROUNDING)
    layered = {name: off for name, off in OFF.items() if hasattr(off, "layer")}
    assert set(OFF) - set(layered) == {"Blend"}

    @jax.jit
    def program(layers):
        given = [dataclasses.replace(off, layer=layer[0]) for off, layer in zip(layered.values(), layers, strict=True)]
        return run(model, *given, capture=())

    never = program(only(-1, len(layered), 1))
    assert never.applied.tolist() == [0] * len(layered)
    for i, name in enumerate(layered):
        np.testing.assert_array_equal(never.logits, program(only(i, len(layered), 1)).logits, err_msg=name)


def test_setting_a_site_to_its_own_capture_changes_nothing(model: Llama, clean: dict) -> None:
    """In every form that a value has, each at a layer of its own where the site has layers."""
    base = run(model, capture=())
    sites = [name for name in SITES if name != "allowed"]

    @jax.jit
    def program(on, layers):
        patches = []
        for site, yes, (one, whole) in zip(sites, on, layers, strict=True):
            row = clean[site]
            everywhere = jnp.broadcast_to(yes, row.shape)  # the dense form holds every layer
            patches.append(Edit(site, "set", None, mask=everywhere, value=row))
            if SITES[site].layered:
                patches.append(ActivationPatch(site, one, row[1]))
                patches.append(ActivationPatch(site, whole, PerLayer(row)))  # a run's capture: the layer's row is taken
            else:
                patches.append(ActivationPatch(site, None, row))
        return run(model, *patches)

    for i, site in enumerate(sites):
        out = program(np.arange(len(sites)) == i, only(i, len(sites), 1, 2))
        near(out.logits, base.logits, ROUNDING)
        for name in (site, "resid_post"):
            np.testing.assert_allclose(out.activations[name], clean[name], ROUNDING, ROUNDING, err_msg=site)


def test_an_edit_at_a_layer_leaves_everything_before_it_alone(model: Llama) -> None:
    """Bit for bit, within one program: a layer that does not exist is the run without the edit."""

    @jax.jit
    def edited(layers):
        edits = []
        for site, (layer,) in zip(LAYERED, layers, strict=True):
            if site == "allowed":
                edits.append(AttentionKnockout(layer, 2, query=-1, key=2))
            else:
                mask = np.eye(T, dtype=bool)[None] if site in ("scores", "pattern") else True
                edits.append(Edit(site, "scale", layer, mask=mask, value=1.7))
        return run(model, *edits)

    names, n = list(SITES), len(LAYERED)
    clean = edited(only(-1, n, 1))
    assert clean.applied.tolist() == [0] * n
    for i, site in enumerate(LAYERED):
        out = edited(only(i, n, 1))
        assert out.applied.tolist() == np.eye(n, dtype=int)[i].tolist(), site
        changed = np.asarray(out.activations[site][1], float) - np.asarray(clean.activations[site][1], float)
        assert np.abs(changed).max() > 1e-3, site
        for name in LAYERED:
            before = 2 if names.index(name) < names.index(site) else 1
            found, want = out.activations[name][:before], clean.activations[name][:before]
            np.testing.assert_array_equal(found, want, err_msg=f"{name} before {site}")
        assert np.abs(np.asarray(out.logits) - np.asarray(clean.logits)).max() > 1e-4, site


@pytest.mark.quick
def test_edit_ops_masks_and_positions(model: Llama, clean: dict) -> None:
    ops = {"set": lambda x: 0 * x + 0.5, "add": lambda x: x + 0.5, "scale": lambda x: x * 0.5}
    masks = np.zeros((len(ops), H, T, 1), bool)
    expected = clean["z"][1].copy()
    for head, want in enumerate(ops.values(), 1):
        masks[head - 1, head, 4 + head] = True
        expected[head, 4 + head] = want(expected[head, 4 + head])
    got = run(model, *(Edit("z", op, 1, mask, 0.5) for op, mask in zip(ops, masks, strict=True)))
    near(got.activations["z"][1], expected, ROUNDING)


@pytest.mark.quick
def test_edits_apply_in_the_order_given(model: Llama, clean: dict) -> None:
    early = (np.arange(T) < 5)[:, None]
    first, last = (Edit("resid_mid", "add", 1, mask, 1.0) for mask in (early, ~early))
    out = run(model, first, Edit("resid_mid", "scale", 1, value=3.0), last)
    x = clean["resid_mid"][1]
    near(out.activations["resid_mid"][1], np.where(early, (x + 1) * 3, x * 3 + 1), ROUNDING)
    assert out.applied.tolist() == [1, 1, 1]


def test_head_ablation_is_zeroing_its_rows_of_the_output_projection(model: Llama) -> None:
    for layer, head in ((0, 0), (2, 3)):
        weights = np.asarray(model.layers.attn.o.weight[...]).copy()
        weights[layer, :, head] = 0
        other = jax.tree.map(lambda x: x, model)
        other.layers.attn.o.weight = type(model.layers.attn.o.weight)(jnp.asarray(weights))
        near(run(model, HeadAblation(layer, head)).logits, run(other).logits)
    mean, rows = np.arange(D) / D, np.arange(L * H * D).reshape(L, H, D) / 100
    given = [HeadAblation(0, 1, mean), HeadAblation(1, 2, PerLayer(rows)), HeadAblation(2, 0, PerLayer(rows[:, 3]))]
    z = run(model, *given).activations["z"]
    for got, want in ((z[0, 1], mean), (z[1, 2], rows[1, 2]), (z[2, 0], rows[2, 3])):
        near(got, np.broadcast_to(want, (T, D)), ROUNDING)


def test_a_blend_is_many_ablations(model: Llama, clean: dict) -> None:
    keep = np.ones((L, H), bool)
    keep[0, 1] = keep[2, 3] = False
    ablated = run(model, HeadAblation(0, 1, np.zeros(D)), HeadAblation(2, 3, np.zeros(D)))
    near(run(model, Blend("z", keep)).logits, ablated.logits, ROUNDING)
    means = np.random.default_rng(0).normal(size=(L, H, 1, D)).astype(np.float32)
    both = run(model, HeadAblation(0, 1, means[0, 1, 0]), HeadAblation(2, 3, means[2, 3, 0]))
    near(run(model, Blend("z", keep, PerLayer(means))).logits, both.logits, ROUNDING)
    half = run(model, Blend("z", np.where(np.arange(L * H).reshape(L, H) == 1, 0.5, 1.0)))
    near(half.activations["z"][0, 1], clean["z"][0, 1] / 2, ROUNDING)


@pytest.mark.quick
def test_scalers_scale_scores_and_spectra_leaves_its_siblings_alone(model: Llama, clean: dict) -> None:
    """Heads 0 and 1 share keys, as do 2 and 3."""
    found = run(model, QScaler(1, 0, 1.5), SpectraScaler(1, 1, 2.0), KScaler(1, 1, -0.5)).activations
    factors = np.array([1.5, 2.0, -0.5, -0.5])[:, None, None]
    near(found["scores"][1], clean["scores"][1] * factors, ROUNDING)
    near(found["q"][1], clean["q"][1] * [[[1.5]], [[1.0]], [[1.0]], [[1.0]]], ROUNDING)
    near(found["k"][1], clean["k"][1] * [[[1.0]], [[-0.5]]], ROUNDING)
    near(found["v"][1], clean["v"][1], ROUNDING)
    causal = np.where(np.tril(np.ones((T, T), bool)), clean["scores"][1] * factors, -np.inf)
    near(found["pattern"][1], softmax(causal), ROUNDING)


@pytest.mark.quick
def test_knockout_forbids_an_edge_and_the_row_renormalises(model: Llama, clean: dict) -> None:
    out = run(model, AttentionKnockout(1, 2, query=-1, key=3)).activations
    near(out["scores"][1], clean["scores"][1], ROUNDING)
    want = clean["pattern"][1].copy()
    want[2, -1, 3] = 0
    want[2, -1] /= want[2, -1].sum()
    near(out["pattern"][1], want, ROUNDING)
    lone = run(model, AttentionKnockout(1, 2, query=0, key=0)).activations
    assert not np.asarray(lone["pattern"][1, 2, 0]).any() and np.isfinite(lone["resid_post"]).all()
    many = run(model, AttentionKnockout(0, 1, query=[5, 6], key=[1, -8])).activations["pattern"][0, 1]
    assert not np.asarray(many)[[5, 5, 6, 6], [1, 3, 1, 3]].any()


def test_patching_the_whole_last_residual_gives_the_other_runs_logits(model: Llama) -> None:
    other = forward(model, prompt(seed=5), capture="resid_post")
    out = run(model, ActivationPatch("resid_post", 2, PerLayer(other.activations["resid_post"])))
    near(out.logits, other.logits, ROUNDING)


@pytest.mark.quick
def test_patch_at_a_head_and_positions(model: Llama, clean: dict) -> None:
    value = np.random.default_rng(0).normal(size=(L, K, T, D)).astype(np.float32)
    for v, k in (((value[1], None), (PerLayer(value), None)), ((PerLayer(value), 1), (value[1, 1], 1))):
        patches = [ActivationPatch(site, 1, x, head=h, positions=[2, -1]) for site, (x, h) in (("v", v), ("k", k))]
        got = run(model, *patches).activations
        for site in ("v", "k"):
            want = clean[site][1].copy()
            for h in range(K) if v[1] is None else [v[1]]:
                want[h, [2, -1]] = value[1, h, [2, -1]]
            near(got[site][1], want, ROUNDING)
    neurons = np.random.default_rng(1).normal(size=(L, T, 40)).astype(np.float32)
    got = run(model, ActivationPatch("act", 1, PerLayer(neurons), positions=[2, -1], index=[3, 8])).activations
    want = clean["act"][1].copy()
    want[np.ix_([2, -1], [3, 8])] = neurons[1][np.ix_([2, -1], [3, 8])]
    near(got["act"][1], want, ROUNDING)
    bools = np.arange(T) == 4
    a, b = (run(model, ActivationPatch("resid_pre", 1, 0.0, positions=p)).logits for p in (bools, 4))
    np.testing.assert_array_equal(a, b)


def test_positions_count_real_tokens_under_padding(model: Llama) -> None:
    n = 3
    padded, real = np.concatenate([np.zeros(n, np.int32), prompt()]), np.arange(T + n) >= n
    given = [Steer(1, np.full(E, size), positions=where) for size, where in ((1, 0), (2.0, [2, -1]), (4, -3))]
    given.append(AttentionKnockout(1, 2, query=-1, key=0))
    sites = ("resid_pre", "allowed")
    want = run(model, *given, capture=sites)
    traced = jax.jit(lambda mask: forward(model, padded, given, mask=mask, capture=sites))
    for out in (forward(model, padded, given, mask=real, capture=sites), traced(real)):
        near(out.logits[n:], want.logits)
        near(out.activations["resid_pre"][:, n:], want.activations["resid_pre"])
        np.testing.assert_array_equal(out.activations["allowed"][:, :, n:, n:], want.activations["allowed"])


@pytest.mark.quick
def test_steer_and_direction_ablation(model: Llama, clean: dict) -> None:
    d = np.random.default_rng(0).normal(size=E).astype(np.float32)
    given = [Steer(None, d, site="embed"), Steer(1, d, 2.5, positions=[3]), DirectionAblation("resid_mid", 2, 3.0 * d)]
    found = {name: np.asarray(x) for name, x in run(model, *given).activations.items()}
    near(found["embed"], clean["embed"] + d, ROUNDING)
    want = found["resid_post"][0].copy()
    want[3] += 2.5 * d
    near(found["resid_pre"][1], want, ROUNDING)
    unit, before = d / np.linalg.norm(d), found["resid_pre"][2] + found["attn_out"][2]
    near(found["resid_mid"][2], before - (before @ unit)[:, None] * unit, ROUNDING)


@pytest.mark.quick
def test_ablation_of_a_component_and_of_a_neuron(model: Llama, clean: dict) -> None:
    found = run(model, Ablation("mlp_out", 2), Ablation("act", 1, 7)).activations
    assert not np.asarray(found["mlp_out"][2]).any()
    act = np.asarray(found["act"][1])
    assert not act[:, 7].any()
    near(np.delete(act, 7, 1), np.delete(clean["act"][1], 7, 1), ROUNDING)


def test_frozen_patterns_and_scales_make_the_attention_path_linear(model: Llama, clean: dict) -> None:
    """With every pattern and norm scale held and MLPs off, logits are linear in the embedding: double in, double out."""
    hold = [Edit(site, "set", None, value=clean[site]) for site in ("pattern", "attn_scale", "final_scale")]
    hold.append(Edit("mlp_out", "set", None, value=0.0))
    once, twice = (run(model, *hold, Edit("embed", "scale", None, value=v)).logits for v in (1.0, 2.0))
    near(2 * np.asarray(once), twice)


def test_vmap_over_the_leaves_is_the_single_runs(model: Llama) -> None:
    layers, heads = (x.reshape(-1) for x in np.meshgrid(np.arange(L), np.arange(H), indexing="ij"))
    sweep = jax.vmap(lambda i: forward(model, prompt(), i))(HeadAblation(layers, heads, np.zeros(L * H, np.float32)))
    assert sweep.applied.tolist() == [[1]] * (L * H)
    for n in (0, 5, 11):
        near(sweep.logits[n], run(model, HeadAblation(int(layers[n]), int(heads[n]))).logits)

    def both(alpha, position):
        return [SpectraScaler(1, 2, alpha), Steer(1, np.ones(E), positions=position)]

    alphas, places = jnp.array([0.5, 2.0]), jnp.array([2, -1])
    rows = jax.vmap(lambda alpha, place: forward(model, prompt(), both(alpha, place)).logits)(alphas, places)
    for row, alpha, place in zip(rows, (0.5, 2.0), (2, 10), strict=True):
        near(row, run(model, *both(alpha, place)).logits)


def test_nothing_of_padding_reaches_the_real_tokens(model: Llama) -> None:
    mask = np.arange(T + 3) >= 3
    want = forward(model, prompt()).logits
    for filler in (-1, 61):  # no token at all, as only the device can see
        tokens = jnp.concatenate([jnp.full(3, filler), jnp.asarray(prompt())])
        near(forward(model, tokens, mask=mask).logits[3:], want)
    poison = Edit("v", "apply", 1, fn=lambda x, v: jnp.where(jnp.arange(T + 3)[None, :, None] < 3, jnp.nan, x))
    out = forward(model, tokens, poison, mask=mask)
    near(out.logits[3:], want)
    assert out.applied.tolist() == [0]


def test_other_numbers_and_other_types_of_number_run_the_same_program(model: Llama) -> None:
    rng = np.random.default_rng(0)
    families = [
        lambda n, f: HeadAblation(n(L), n(H), f()),
        lambda n, f: SpectraScaler(n(L), n(H), abs(f()) + 1),
        lambda n, f: KScaler(n(L), n(K), f()),
        lambda n, f: Steer(
            n(L), np.full(E, float(f())), f(), positions=[None, n(T - 1), [0, n(T - 1)], [-1]][rng.integers(4)]
        ),
        lambda n, f: AttentionKnockout(n(L), n(H), n(T - 1), [n(T - 1)]),
        lambda n, f: ActivationPatch("v", n(L), np.ones((T - 1, D)) * f(), head=n(K), positions=[n(T - 1), -1]),
        lambda n, f: Ablation("act", n(L), n(40)),
    ]
    integers = [int, np.int32, np.int64, np.uint8, np.asarray]
    floats = [float, int, np.float32, np.float64, np.asarray]

    def integer(size):
        return integers[rng.integers(len(integers))](int(rng.integers(size)))

    def strength():
        return floats[rng.integers(len(floats))](rng.integers(1, 9))

    ids = prompt(T - 1)  # a length that no other test has, so that nothing is compiled yet
    for make in families:
        with compilations() as compiled:
            forward(model, ids, make(lambda size: 0, lambda: 1.0)).logits.block_until_ready()
            assert compiled
    with compilations() as compiled:
        for i in range(105):
            forward(model, ids, families[i % len(families)](integer, strength)).logits.block_until_ready()
        assert compiled == []


def test_a_traced_index_that_never_matches_shows_in_applied(model: Llama) -> None:
    out = jax.jit(lambda layer: forward(model, prompt(), (HeadAblation(layer, 1), HeadAblation(0, 1))))(jnp.int32(7))
    assert out.applied.tolist() == [0, 1]
    assert forward(
        model, prompt(), Steer(2, np.ones(E)), logits="none", capture=CaptureSpec("q", layers=[0])
    ).applied.tolist() == [0]


def test_bfloat16_models_take_the_same_interventions() -> None:
    model = tiny_llama(dtype=jnp.bfloat16)
    out = run(
        model,
        HeadAblation(1, 2, np.ones(D)),
        SpectraScaler(0, 1, 2.0),
        Steer(1, np.ones(E), 0.5),
        Blend("z", np.ones((L, H))),
    )
    assert out.activations["resid_pre"].dtype == out.activations["z"].dtype == jnp.bfloat16
    assert out.logits.dtype == out.activations["attn_scale"].dtype == jnp.float32
    assert out.applied.tolist() == [1, 1, 1, 0]


def test_ablation_of_any_site_and_of_its_last_index(model: Llama) -> None:
    sizes = {"E": E, "F": 40, "D": D, "T": T, "S": T}
    index = {site: sizes[SITES[site].axes[-1]] - 1 for site in LAYERED}

    @jax.jit
    def program(layers):
        both = [
            (Ablation(site, a, index[site]), Ablation(site, b)) for site, (a, b) in zip(LAYERED, layers, strict=True)
        ]
        return run(model, *(one for pair in both for one in pair), logits="none").activations

    for i, site in enumerate(LAYERED):
        one, whole = np.asarray(program(only(i, len(LAYERED), 1, 2))[site])[1:]
        assert not whole.any(), site
        assert not one[..., index[site]].any() and one[..., : index[site]].any(), site


AS_ARGUMENTS = {
    "HeadAblation": lambda: HeadAblation(1, 2, [0.5] * D),
    "Steer": lambda: Steer(1, [1.0] * E, 2.0, positions=[3, -1]),
    "AttentionKnockout": lambda: AttentionKnockout(1, 2, query=[5, -1], key=[0, 1]),
    "ActivationPatch": lambda: ActivationPatch("v", 1, np.ones((T, D)), head=1, positions=[3], index=2),
    "DirectionAblation": lambda: DirectionAblation("resid_mid", 1, np.ones(E), positions=4),
    "Blend": lambda: Blend("z", np.arange(L * H).reshape(L, H) % 2),
    "SpectraScaler": lambda: SpectraScaler(1, 2, 1.5),
    "Ablation": lambda: Ablation("act", 1, 7),
    "Edit": lambda: Edit("z", "add", None, mask=np.ones((L, H, 1, 1), bool), value=np.ones((L, 1, 1, D))),
}


def test_interventions_are_arguments_of_the_users_own_programs(model: Llama) -> None:
    items = [make() for make in AS_ARGUMENTS.values()]
    traced, plain = jax.jit(lambda given: run(model, *given))(items), run(model, *items)
    near(traced.logits, plain.logits)
    for name in ALL:
        near(traced.activations[name], plain.activations[name])
    assert traced.applied.tolist() == plain.applied.tolist() and plain.applied.all()


def test_other_positions_run_the_same_program_under_a_mask_on_the_device(model: Llama) -> None:
    mask = jnp.arange(T + 2) >= 2
    tokens = np.concatenate([[0, 0], prompt()])

    def logits(positions):
        return forward(model, tokens, Steer(1, np.ones(E), positions=positions), mask=mask).logits

    chosen = ([3], [3, 4], [1, 2, -3], -1, [1, 2, -4, 0])
    with compilations() as compiled:
        logits(3)
        assert compiled
        compiled.clear()
        found = [logits(positions) for positions in chosen]
        assert compiled == []
    for positions, got in zip(chosen, found, strict=True):
        near(got[2:], forward(model, prompt(), Steer(1, np.ones(E), positions=positions)).logits)


def test_a_score_of_minus_infinity_is_a_key_that_is_not_allowed(model: Llama) -> None:
    mask = (np.arange(H) == 2)[:, None, None] & (np.arange(T) == 5)[None, :, None]
    out = run(model, Edit("scores", "set", 1, mask, -np.inf))
    assert not np.asarray(out.activations["pattern"][1, 2, 5]).any() and np.isfinite(out.logits).all()


def test_an_edit_cannot_make_padding_visible(model: Llama) -> None:
    sites = ("allowed", "pattern", "scores")
    mask, padded = np.arange(T + 2) < T, np.concatenate([prompt(), [7, 9]])

    def edits(layers):
        return [
            Edit(site, "set", one[0], value=site == "allowed" or 0.1) for site, one in zip(sites, layers, strict=True)
        ]

    with_padding = jax.jit(lambda layers: forward(model, padded, edits(layers), mask=mask))
    alone = jax.jit(lambda layers: forward(model, prompt(), edits(layers)))
    for i, site in enumerate(sites):
        got, want = with_padding(only(i, 3, 0)), alone(only(i, 3, 0))
        assert got.applied.tolist() == want.applied.tolist() == np.eye(3, dtype=int)[i].tolist(), site
        near(got.logits[:T], want.logits)
