"""Attribution patching: equal to exact patching where the model is linear, to finite differences, and to torch's autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from oculi_jax import CaptureSpec, forward
from oculi_jax.causal import attribution, verify
from oculi_jax.causal.attributed import AttributionResult
from oculi_jax.causal.attribution import attribution_patching
from oculi_jax.causal.verification import Verification
from oculi_jax.intervention import ActivationPatch, Edit
from oculi_jax.metrics import log_probability, logit_difference, rank
from oculi_jax.models.llama import Llama

from .compilations import compilations
from .margins import assert_clear, assert_leads
from .tiny import SITES, prompt, tiny_llama
from .tolerances import GRADIENT, ROUNDING, ROUTES

T = 9
EVERY = tuple(name for name in SITES if name != "allowed")
METRIC = logit_difference(3, 17)
MODEL = tiny_llama()
LAYERS, HEADS = 3, 4
near = partial(np.testing.assert_allclose, atol=ROUTES, rtol=ROUTES)


def pair(length: int = T, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two prompts that differ at their third token and the one after it."""
    clean = prompt(length, seed)
    corrupted = clean.copy()
    corrupted[2:4] = (clean[2:4] + np.array([7, 30], np.int32)) % 61
    return clean, corrupted


CLEAN, CORRUPTED = pair()


@pytest.fixture(scope="module")
def every() -> AttributionResult:
    """All sites at once, of one pair."""
    return attribution_patching(MODEL, CLEAN, CORRUPTED, METRIC, EVERY)


def score(out: Any) -> jax.Array:
    return out.logits[-1, 3] - out.logits[-1, 17]


def place(entry: dict[str, Any]) -> tuple[int, ...]:
    names = ("layer", "head", "position", "key", "neuron", "dimension")
    return tuple(entry[name] for name in names if name in entry)


def effects(
    model: Llama,
    clean: Any,
    corrupted: Any,
    metric: Callable[..., Any],
    entries: list[dict[str, Any]],
    mask: Any = None,
) -> np.ndarray:
    """Patched − corrupted of single patches of `z`, one `forward` each."""
    source = np.asarray(forward(model, clean, capture="z", logits="none", mask=mask).activations["z"])
    without = float(metric(forward(model, corrupted, mask=mask)))
    found = []
    for entry in entries:
        here = np.arange(len(corrupted)) == entry["position"]
        patch = ActivationPatch("z", entry["layer"], source[entry["layer"], entry["head"]], entry["head"], here)
        found.append(float(metric(forward(model, corrupted, patch, mask=mask))) - without)
    return np.array(found)


def test_the_shapes_are_the_sites_axes_less_the_last(every):
    captured = forward(MODEL, CLEAN, capture=EVERY).activations
    assert {site: x.shape for site, x in every.values.items()} == {s: captured[s].shape[:-1] for s in EVERY}
    assert all(x.dtype == jnp.float32 and np.isfinite(x).all() for x in every.values.values())
    near(every.clean, score(forward(MODEL, CLEAN)))
    near(every.corrupted, score(forward(MODEL, CORRUPTED)))


def test_at_a_linear_site_it_is_exact_patching():
    """Logits are linear in the final norm's output, here read at several tokens."""

    def metric(out: Any) -> jax.Array:
        return out.logits[1, 5] - 2.0 * out.logits[3, 9] + 0.5 * out.logits[-1, 2]

    found = attribution_patching(MODEL, CLEAN, CORRUPTED, metric, "model.norm")  # another tool's name
    source = forward(MODEL, CLEAN, capture="final_norm").activations["final_norm"]
    for t in range(T):
        patched = forward(MODEL, CORRUPTED, ActivationPatch("final_norm", None, source, positions=t))
        near(found.values["final_norm"][t], metric(patched) - found.corrupted)
    assert np.flatnonzero(np.asarray(found.values["final_norm"])).tolist() == [3, 8]  # token 1 is before the difference
    near(found.values["final_norm"].sum(), found.clean - found.corrupted)


def test_what_is_linear_within_the_model_attributes_alike(every):
    """Where one site is a linear function of another, what it is given is what that one is given."""
    v = {site: np.asarray(x) for site, x in every.values.items()}
    near(v["q"], v["q_pre_rope"])
    near(v["k"], v["k_pre_rope"])
    near(v["z"].sum(1), v["attn_out"])
    near(v["act"], v["mlp_out"])
    near(v["embed"], v["resid_pre"][0])
    near(v["resid_post"][:-1], v["resid_pre"][1:])
    assert np.abs(v["z"]).max() > 0.1 and np.abs(v["q"]).max() > 0.01


@pytest.fixture(scope="module")
def moved() -> Callable[[dict[str, Any], float], float]:
    """The score with an entry moved by so much of clean − corrupted, by one program that adds to every site at once."""
    captured = [forward(MODEL, tokens, capture=EVERY).activations for tokens in (CLEAN, CORRUPTED)]
    change = {site: np.asarray(captured[0][site]) - np.asarray(captured[1][site]) for site in EVERY}

    def move(entry: dict[str, Any], size: float) -> float:
        added = {name: np.zeros_like(x) for name, x in change.items()}
        added[entry["site"]][place(entry)] = size * change[entry["site"]][place(entry)]
        edits = [Edit(name, "add", None, True, x) for name, x in added.items()]
        return float(score(forward(MODEL, CORRUPTED, edits)))

    return move


def test_each_entry_is_the_derivative_along_its_patch(every, moved):
    step = 0.006
    for site in EVERY:
        for entry in every.top(3, site):
            slope = (moved(entry, step) - moved(entry, -step)) / (2 * step)
            np.testing.assert_allclose(entry["value"], slope, rtol=GRADIENT, atol=ROUTES, err_msg=str(entry))


def test_it_is_zero_where_the_prompts_are_one():
    same = attribution_patching(MODEL, CLEAN, CLEAN, METRIC, EVERY)
    assert all((np.asarray(x) == 0).all() for x in same.values.values())
    near(same.clean, same.corrupted)
    with pytest.raises(ValueError, match="the two runs are the same"):
        verify(same, MODEL, CLEAN, CLEAN, METRIC)


# Rows of a batch, each with its own targets: unpadded, padded on the left, padded on the right.
MASK = np.stack([np.ones(T + 3, bool), np.arange(T + 3) >= 3, np.arange(T + 3) < T])
A, B = (3, 5, 7), (17, 1, 0)
PAIRS = [pair(int(row.sum()), seed) for seed, row in enumerate(MASK)]
ROWS = np.stack([np.full(MASK.shape, 60, np.int32), np.full(MASK.shape, 59, np.int32)])  # padding differs too
for _row, _pair in enumerate(PAIRS):
    ROWS[:, _row, MASK[_row]] = _pair


@pytest.fixture(scope="module")
def batch() -> AttributionResult:
    sites = ("embed", "attn_scale", "scores", "z", "resid_post", "final_scale")
    return attribution_patching(MODEL, ROWS[0], ROWS[1], logit_difference(A, B), sites, mask=MASK)


def test_prompts_side_by_side_are_single_ones_and_padding_changes_nothing(batch):
    for i, mask in enumerate(MASK):
        single = attribution_patching(MODEL, *PAIRS[i], logit_difference(A[i], B[i]), EVERY)
        near(batch.clean[i], single.clean)
        near(batch.corrupted[i], single.corrupted)
        for site, values in batch.values.items():
            value = np.asarray(values[i])
            letters = (*("L" * SITES[site].layered), *SITES[site].axes[:-1])
            if "T" in letters:
                axis = letters.index("T")
                assert (np.compress(~mask, value, axis) == 0).all(), site
                value = np.compress(mask, value, axis)
                assert (np.take(value, [0, 1], axis) == 0).all(), site  # before the first token that differs
            near(value, single.values[site], err_msg=f"{site} of prompt {i}")


def test_large_prompts_run_in_turn_and_recompute_their_layers(monkeypatch):
    pairs = [pair(seed=i) for i in range(4)]
    clean, corrupted = np.stack([c for c, _ in pairs]), np.stack([k for _, k in pairs])
    metric = logit_difference([3, 4, 5, 6], 17)
    singles = [attribution_patching(MODEL, *pairs[i], logit_difference(3 + i, 17)) for i in range(4)]
    assert attribution._schedule(MODEL, 4, T) == (4, False)
    monkeypatch.setattr(attribution, "_KEPT_BYTES", 400_000)
    assert attribution._schedule(MODEL, 4, T) == (2, False)
    in_turn = jax.device_get(attribution_patching(MODEL, clean, corrupted, metric))
    for i, single in enumerate(singles):
        jax.tree.map(near, jax.tree.map(lambda x, i=i: x[i], in_turn), single)
    monkeypatch.setattr(attribution, "_KEPT_BYTES", 1)
    assert attribution._schedule(MODEL, 4, T) == (1, True)
    chex.assert_trees_all_close(attribution_patching(MODEL, *pairs[0], METRIC), singles[0], rtol=ROUTES, atol=ROUTES)


def test_ids_and_targets_are_data():
    def ours(seed: int, a: Any, b: Any) -> AttributionResult:
        return attribution_patching(MODEL, *pair(seed=seed), logit_difference(a, b))

    first = ours(1, 3, jnp.asarray(17))
    with compilations() as compiled:
        other = ours(2, np.int64(8), jnp.asarray(9))
        assert not compiled
        attribution_patching(MODEL, CLEAN, CORRUPTED, METRIC, "v")  # another program: the listener hears
        assert compiled
    assert float(first.clean) != float(other.clean)


def test_any_function_of_an_output_is_a_metric():
    near(attribution_patching(MODEL, CLEAN, CORRUPTED, score).values["z"],
         attribution_patching(MODEL, CLEAN, CORRUPTED, METRIC).values["z"])  # fmt: skip


def test_it_is_a_pytree_and_inlines_under_jit_and_vmap(every):
    corrupted = np.stack([CORRUPTED, pair(seed=3)[1]])

    @jax.jit
    def program(corrupted: jax.Array) -> AttributionResult:
        return jax.vmap(lambda k: attribution_patching(MODEL, CLEAN, k, METRIC))(corrupted)

    found = program(corrupted)
    near(found.values["z"][0], every.values["z"])
    near(found.values["z"][1], attribution_patching(MODEL, CLEAN, corrupted[1], METRIC).values["z"])
    assert len(jax.tree.leaves(found)) == 3  # no model in it, that vmap would copy
    assert repr(found) == f"AttributionResult(z [2, {LAYERS}, {HEADS}, {T}], clean [2], corrupted [2])"
    verified = verify(found, MODEL, np.stack([CLEAN] * 2), corrupted, METRIC, prompt=1, top=2, sample=0, progress=False)
    assert [place(e) for e in verified.entries] == [place(e) for e in found.top(2, prompt=1)]


def test_half_precision_gives_float32():
    half = tiny_llama(dtype=jnp.bfloat16)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    found, wide = (attribution_patching(model, CLEAN, CORRUPTED, METRIC) for model in (half, exact))
    for site, value in found.values.items():
        assert value.dtype == jnp.float32
        assert np.corrcoef(np.ravel(value), np.ravel(wide.values[site]))[0, 1] > 0.99


def test_top_is_sorted_and_says_where(every):
    found = every.top(20)
    assert [abs(e["value"]) for e in found] == sorted((abs(e["value"]) for e in found), reverse=True)
    every_value = np.concatenate([np.ravel(x) for x in every.values.values()])
    np.testing.assert_array_equal([abs(e["value"]) for e in found], np.sort(np.abs(every_value))[::-1][:20])
    for site in ("z", "resid_pre", "embed", "k", "attn_scale", "final_scale"):
        for entry in every.top(4, site):
            assert entry["site"] == site
            assert float(every.values[site][place(entry)]) == entry["value"]
    assert list(every.top(1, "pattern")[0]) == ["site", "layer", "head", "position", "value"]
    assert list(every.top(1, "final_scale")[0]) == ["site", "value"]


def check_against_loops(found: Verification, exact: np.ndarray, rounding: float, n_top: int) -> None:
    """The numbers of a verification of `z`, worked out anew from exact effects that were found in a loop."""
    entries = found.entries
    near([e["exact"] for e in entries], exact)
    estimate = np.array([e["estimate"] for e in entries])
    # What only rounding sets apart is level: of each pair the larger is one place higher, or both are half a place.
    sides = estimate, np.array([e["exact"] for e in entries])
    ranks = [[sum((x > y + rounding) + (abs(x - y) <= rounding) / 2 for y in side) for x in side] for side in sides]
    np.testing.assert_allclose(found.rank_correlation, scipy.stats.pearsonr(*ranks).statistic, atol=ROUNDING)
    untied = scipy.stats.spearmanr(*sides).statistic  # some of these effects are tiny, and few places move it little
    np.testing.assert_allclose(found.rank_correlation, untied, atol=0.01)
    assert_clear([x for e, x in zip(entries, exact, strict=True) if abs(e["estimate"]) > rounding], 0, 2 * ROUTES)
    wrong = [
        e
        for e, x in zip(entries, exact, strict=True)
        if e["estimate"] * x < 0 and min(abs(e["estimate"]), abs(x)) > rounding
    ]
    assert found.sign_errors == wrong
    assert_leads(np.sort(np.abs(exact))[-n_top - 1 :][:2])
    bound = np.sort(np.abs(exact))[-n_top]
    assert {place(e) for e in found.missed} == {
        place(e) for e, x in zip(entries, exact, strict=True) if abs(x) >= bound and not e["top"]
    }


@pytest.mark.numerical
def test_verification_is_what_loops_of_single_patches_find():
    """Of all entries where the prompts differ; the model is far from linear, so that there are wrong signs and missed ones."""
    found = attribution_patching(MODEL, CLEAN, CORRUPTED, log_probability(3))
    done: list[tuple[int, int]] = []
    verified = verify(
        found, MODEL, CLEAN, CORRUPTED, log_probability(3), top=8, sample=1000, progress=lambda *n: done.append(n)
    )
    n = LAYERS * HEADS * (T - 2)
    assert {place(e) for e in verified.entries} == set(np.ndindex(LAYERS, HEADS, T)) - set(np.ndindex(LAYERS, HEADS, 2))
    assert [e["top"] for e in verified.entries] == [True] * 8 + [False] * (n - 8)
    largest = [(place(e), e["estimate"]) for e in verified.entries[:8]]
    assert largest == [(place(e), e["value"]) for e in found.top(8)]
    exact = effects(MODEL, CLEAN, CORRUPTED, log_probability(3), verified.entries)
    rounding = 1e-5 * max(1.0, abs(float(found.clean)), abs(float(found.corrupted)))
    check_against_loops(verified, exact, rounding, 8)
    assert verified.sign_errors and verified.missed
    assert done[-1] == (n, n)
    assert repr(verified) == (
        f"Verification({n} entries, rank correlation {verified.rank_correlation:.3f}, {len(verified.sign_errors)} of wrong "
        f"sign, {len(verified.missed)} missed)"
    )


def test_the_sample_is_drawn_by_its_seed():
    found = attribution_patching(MODEL, CLEAN, CORRUPTED, METRIC)
    given = MODEL, CLEAN, CORRUPTED, METRIC
    draws = [verify(found, *given, top=2, sample=6, seed=seed, progress=False).entries for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert [place(e) for e in draws[0][:2]] == [place(e) for e in draws[2][:2]]
    assert all(len(draw) == 8 == len({place(e) for e in draw}) for draw in draws)


def test_sites_of_every_kind_verify(moved):
    """Together: each exact effect is what adding the whole of clean − corrupted gives."""
    kinds = ("attn_scale", "k", "scores", "final_scale")
    found = attribution_patching(MODEL, CLEAN, CORRUPTED, METRIC, kinds)
    verified = verify(found, MODEL, CLEAN, CORRUPTED, METRIC, top=10, sample=40, progress=False)
    assert {e["site"] for e in verified.entries} >= set(kinds) - {"final_scale"}
    for entry in verified.entries:
        near(entry["exact"], moved(entry, 1.0) - moved(entry, 0.0), err_msg=str(entry))
    alone = verify(found, MODEL, CLEAN, CORRUPTED, METRIC, top=5, sample=5, site="final_scale", progress=False).entries
    assert len(alone) == 1  # the metric is linear there
    near(alone[0]["exact"], alone[0]["estimate"])


UNITS = ("act", "resid_mid", "k", "pattern", "attn_scale")


def test_units_of_every_kind_verify(moved):
    """Single neurons, dimensions, keys and scales, beside a site of sums: what adding all of one unit's change gives."""
    found = attribution_patching(MODEL, CLEAN, CORRUPTED, METRIC, (*UNITS, "z"), each=UNITS)
    for site, name in zip(UNITS, ("neuron", "dimension", "dimension", "key", "position"), strict=True):
        checked = verify(found, MODEL, CLEAN, CORRUPTED, METRIC, top=3, sample=3, site=site, progress=False).entries
        assert list(found.top(1, site)[0])[-2] == name
        assert [place(e) for e in checked[:3]] == [place(e) for e in found.top(3, site)]
        for entry in checked:
            assert float(found.values[site][place(entry)]) == pytest.approx(entry["estimate"])
            near(entry["exact"], moved(entry, 1.0) - moved(entry, 0.0), err_msg=str(entry))


def test_units_of_a_padded_set_are_those_of_its_prompts():
    given = dict(sites=(*UNITS, "z"), each=UNITS)
    found = attribution_patching(MODEL, *ROWS, logit_difference(A, B), mask=MASK, **given)
    for i, mask in enumerate(MASK):
        single = attribution_patching(MODEL, *PAIRS[i], logit_difference(A[i], B[i]), **given)
        for site, values in found.values.items():
            value, letters = np.asarray(values[i]), ("L", *SITES[site].axes)
            for axis, letter in enumerate(letters[: value.ndim]):
                if letter in "TS":
                    assert not np.compress(~mask, value, axis).any(), site
                    value = np.compress(mask, value, axis)
            near(value, single.values[site], err_msg=f"{site} of prompt {i}")
    # A key's column is that of the token array, of a prompt that is padded on the left.
    checked = verify(found, MODEL, *ROWS, logit_difference(A, B), mask=MASK, top=4, sample=4, site="pattern", prompt=1, progress=False)  # fmt: skip
    source = forward(MODEL, ROWS[0, 1], capture="pattern", logits="none", mask=MASK[1])["pattern"]
    for entry in checked.entries:
        here = np.zeros((HEADS, T + 3, T + 3), bool)
        here[entry["head"], entry["position"], entry["key"]] = True
        patched = forward(
            MODEL, ROWS[1, 1], Edit("pattern", "set", entry["layer"], here, source[entry["layer"]]), mask=MASK[1]
        )
        near(entry["exact"], logit_difference(A[1], B[1])(patched) - found.corrupted[1], err_msg=str(entry))


def test_one_prompt_of_several_is_verified_under_its_own_mask_and_targets(batch):
    verified = verify(
        batch, MODEL, *ROWS, logit_difference(A, B), mask=MASK, top=3, sample=5, site="z", prompt=1, progress=False
    )
    assert [place(e) for e in verified.entries[:3]] == [place(e) for e in batch.top(3, "z", prompt=1)]
    exact = effects(MODEL, ROWS[0, 1], ROWS[1, 1], logit_difference(A[1], B[1]), verified.entries, MASK[1])
    near([e["exact"] for e in verified.entries], exact)
    assert all(e["position"] >= 5 for e in verified.entries)  # three of padding, two before the difference
    for wrong, error in ((None, TypeError), (3, ValueError), (True, TypeError)):
        with pytest.raises(error, match=f"prompt is {wrong}.*: this result is of 3 pairs of prompts"):
            batch.top(prompt=wrong)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(sites="allowed"), ValueError, "no gradient"),
        (dict(sites="zz"), ValueError, "Unknown site 'zz'"),
        (dict(sites="blocks.1.attn.hook_z"), ValueError, "names layer 1.*give 'z'"),
        (dict(sites=()), ValueError, "empty"),
        (dict(sites=("z", "z")), ValueError, "twice"),
        (dict(sites=CaptureSpec("z", layers=[0])), TypeError, "a site name or a tuple"),
        (dict(corrupted=prompt(T + 1)), ValueError, r"clean has shape \[9\], and corrupted \[10\].*as many tokens"),
        (dict(corrupted=CORRUPTED[None]), ValueError, r"corrupted \[1, 9\]"),
        (dict(mask=np.ones(T + 1, bool)), ValueError, r"mask has shape \[10\], and clean \[9\]"),
        (dict(corrupted="text"), TypeError, "corrupted is text, and ids"),
        (dict(metric=None), TypeError, "metric is a NoneType"),
        (dict(metric=rank(3)), TypeError, "gives int32 .*has a gradient"),
        (dict(metric=lambda out: out.logits), TypeError, r"gives float32 \[9, 61\]"),
        (dict(metric=lambda out: {"a": out.logits[0, 0]}), TypeError, "one floating-point number"),
        (dict(metric=logit_difference(3, 61)), ValueError, "61, and this"),
        (dict(metric=logit_difference(3, 17, T)), ValueError, r"positions \[9\]"),
        (dict(metric=logit_difference([3, 4], 17)), ValueError, "targets for 2 prompts"),
    ],
)
def test_what_cannot_be_is_refused(changes, error, words):
    given = dict(clean=CLEAN, corrupted=CORRUPTED, metric=METRIC) | changes
    with pytest.raises(error, match=words):
        attribution_patching(MODEL, **given)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda r: r.top(-1), "n is -1"),
        (lambda r: r.top(site="q_in"), "no values of 'q_in'"),
        (lambda r: r.top(prompt=0), "one pair of prompts"),
        (lambda r: verify(r, MODEL, CLEAN, CORRUPTED, METRIC, top=-2), "top is -2"),
        (lambda r: verify(r, MODEL, CLEAN, CORRUPTED, METRIC, top=0, sample=0), "nothing to verify"),
        (lambda r: verify(r, MODEL, ROWS[0], ROWS[1], METRIC, mask=MASK), "of 1 pair"),
        (lambda r: verify(r, MODEL, CLEAN, CORRUPTED[:-1], METRIC), "give its own"),
        (
            lambda r: verify(r, MODEL, CLEAN[:-1], CORRUPTED[:-1], METRIC),
            r"prompts \[8\] and \[8\] were given: give its own",
        ),
    ],
)
def test_questions_that_make_no_sense_are_refused(every, call, words):
    with pytest.raises(ValueError, match=words):
        call(every)
    with pytest.raises(TypeError, match=r"top is 2\.5, and an integer is needed"):
        verify(every, MODEL, CLEAN, CORRUPTED, METRIC, top=2.5)


IOI = "When Mary and John went to the store, {} gave a drink to"


@pytest.mark.real
def test_on_the_real_model_it_finds_the_heads_that_patching_finds(adapter):
    clean, corrupted = (adapter.tokenizer.encode(IOI.format(name)) for name in ("John", "Mary"))
    metric = logit_difference(*(adapter.to_single_token(name) for name in (" Mary", " John")))
    found = attribution_patching(adapter.model, clean, corrupted, metric)
    heads = np.asarray(found.values["z"]).sum(-1) / float(found.clean - found.corrupted)
    # Exact z patching recovers about 0.58 at L23H3 and 0.27 at L29H1, and L24H4 and L29H0 work against it.
    assert_leads(np.sort(np.abs(heads), axis=None)[-5:-3])
    order = np.argsort(-np.abs(heads), axis=None)[:4]
    assert {divmod(int(i), 9) for i in order} == {(23, 3), (29, 1), (24, 4), (29, 0)}
    assert heads[23, 3] > 0.5 and heads[29, 1] > 0.2 and heads[24, 4] < 0 and heads[29, 0] < 0
    verified = verify(found, adapter.model, clean, corrupted, metric, top=4, sample=4, progress=False)
    exact = effects(adapter.model, clean, corrupted, metric, verified.entries)
    np.testing.assert_allclose([e["exact"] for e in verified.entries], exact, atol=1e-3)
    assert not verified.missed and not verified.sign_errors


@pytest.mark.numerical
@pytest.mark.torch
def test_gradients_are_those_of_torch(trained, hf_trained):
    """Every head at every token of the embedded model, d (logit difference) / dz by torch's autograd."""
    import torch

    clean, corrupted = (trained.tokenizer.encode(IOI.format(name)) for name in ("John", "Mary"))
    mary, john = (trained.to_single_token(name) for name in (" Mary", " John"))

    def run(tokens: Any) -> tuple[list[Any], Any]:
        seen: list[Any] = []

        def keep(_: Any, args: Any) -> Any:
            seen.append(args[0].detach().requires_grad_() if not seen else args[0])
            if seen[-1].requires_grad:
                seen[-1].retain_grad()
            return (seen[-1],)

        handles = [layer.self_attn.o_proj.register_forward_pre_hook(keep) for layer in hf_trained.model.layers]
        try:
            last = hf_trained(torch.tensor(tokens)[None], use_cache=False).logits[0, -1]
        finally:
            for handle in handles:
                handle.remove()
        return seen, last[mary] - last[john]

    with torch.no_grad():
        source, there = run(clean)
    here, difference = run(corrupted)
    difference.backward()
    hf_trained.zero_grad()
    theirs = np.stack([
        ((a - b) * b.grad).detach()[0].unflatten(-1, (6, -1)).sum(-1).T.numpy() for a, b in zip(source, here, strict=True)
    ])  # fmt: skip
    found = attribution_patching(trained.model, clean, corrupted, logit_difference(mary, john))
    assert found.values["z"].shape == theirs.shape == (4, 6, 15)
    np.testing.assert_allclose(found.values["z"], theirs, atol=2 * ROUTES, rtol=ROUTES)
    near([found.clean, found.corrupted], [there.item(), difference.item()], atol=2 * ROUTES)
