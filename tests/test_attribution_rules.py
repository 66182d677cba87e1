"""Attribution patching under rules, over steps, at either run, with AtP*'s softmax: against torch's autograd and brute force."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pytest

from oculi_jax import plan
from oculi_jax.causal import attribution_patching, verify
from oculi_jax.causal.attributed import AttributionResult
from oculi_jax.causal.saturation import by_keys, by_queries
from oculi_jax.metrics import logit_difference
from oculi_jax.models.llama import Llama
from oculi_jax.rules import Rules, gim, grad_drop, relp

from .test_attribution_patching import CLEAN, CORRUPTED, effects, near, pair
from .test_rules import AGAINST, ANSWER, drawn
from .tiny import tiny_llama

METRIC = logit_difference(ANSWER, AGAINST)
L, H, K, N = 3, 4, 2, len(CLEAN)


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def sharp() -> Llama:
    """In float64, with queries so large that many patterns are all but one key's."""
    with jax.enable_x64(True):
        model = tiny_llama(dtype=np.float64)
        model.layers.attn.q.weight[...] = 4 * model.layers.attn.q.weight[...]
        return model


def run(
    model: Llama, embed: Any, said: Mapping[str, Any] = {}
) -> tuple[float, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The metric of a run from embeddings, and site → values and gradients, `[L, …]`."""
    from .by_autograd import ByAutograd

    seen: dict[str, list[Any]] = {}

    def keep(name: str, layer: int | None, x: Any) -> Any:
        x = x if x.requires_grad else x.requires_grad_()
        x.retain_grad()
        seen.setdefault(name, []).append(x)
        return x

    logits = ByAutograd(model)(ByAutograd.tensor(embed), said, keep)
    value = logits[ANSWER] - logits[AGAINST]
    value.backward()
    zero = np.zeros_like
    values = {name: np.stack([x.detach().numpy() for x in xs]) for name, xs in seen.items()}
    slopes = {name: np.stack([zero(v) if x.grad is None else x.grad.numpy() for x, v in zip(xs, values[name], strict=True)]) for name, xs in seen.items()}  # fmt: skip
    return value.item(), values, slopes


def reference(
    model: Llama,
    tokens: Sequence[np.ndarray],
    said: Mapping[str, Any] = {},
    *,
    steps: int = 1,
    at: str = "corrupted",
    each: Sequence[str] = (),
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Site → Σ (clean − corrupted) · gradient over its last axis; and `q` and `k` by brute force under the gradient of the pattern.

    Sites in `each` have the products themselves.
    """
    clean, corrupted = (np.asarray(model.embed[...])[x] for x in tokens)
    (_, a, at_clean), (_, b, slope) = (run(model, x, said) for x in (clean, corrupted))
    if at == "clean":
        slope = at_clean
    for k in range(1, steps):
        more = run(model, corrupted + k / steps * (clean - corrupted), said)[2]
        slope = {name: slope[name] + more[name] for name in slope}
    slope = {name: x / steps for name, x in slope.items()}
    plain = {name: (a[name] - b[name]) * slope[name] for name in slope if name != "scores"}
    plain = {name: x if name in each else x.sum(-1) for name, x in plain.items()}
    base, other, sign = (b, a, 1) if at == "corrupted" else (a, b, -1)
    brute = brute_force(base["q"], base["k"], other["q"], other["k"], slope["pattern"], model.config.attention_scale)
    return plain, {name: sign * x for name, x in brute.items()}


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def brute_force(q: Any, k: Any, other_q: Any, other_k: Any, slope: Any, scale: float) -> dict[str, np.ndarray]:
    """One query, then one key, at a time is the other run's, and each softmax that sees it is computed anew."""
    n = q.shape[2]
    queries, keys = np.zeros((L, H, n)), np.zeros((L, K, n))
    for layer in range(L):
        for head in range(H):
            group = head // (H // K)
            for t in range(n):
                scores = scale * k[layer, group, : t + 1] @ q[layer, head, t]
                g = slope[layer, head, t, : t + 1]
                new = scale * k[layer, group, : t + 1] @ other_q[layer, head, t]
                queries[layer, head, t] = (softmax(new) - softmax(scores)) @ g
                for j in range(t + 1):
                    new = scores.copy()
                    new[j] = scale * other_k[layer, group, j] @ q[layer, head, t]
                    keys[layer, group, j] += (softmax(new) - softmax(scores)) @ g
    return {"q": queries, "k": keys}


def assert_same(ours: Any, theirs: Any, tolerance: float, what: str = "") -> None:
    theirs = np.asarray(theirs)
    size = np.abs(theirs).max()
    assert np.shape(ours) == theirs.shape and size > 1e-6, what
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * size, err_msg=what)


@pytest.mark.torch
def test_a_family_of_rules_is_each_of_them(x64: None, sharp: Llama) -> None:
    sites = ("resid_pre", "attn_scale", "q", "k", "v", "pattern", "z", "gate", "up", "act", "mlp_out")
    families = [drawn(seed) for seed in (0, 1)]
    rules = jax.tree.map(lambda *x: np.stack(x), *(one for one, _ in families))
    found = attribution_patching(sharp, CLEAN, CORRUPTED, METRIC, sites, rules=rules)
    assert found.n_rules == 2 and found.clean.shape == ()
    for i, (_, said) in enumerate(families):
        wanted, _ = reference(sharp, (CLEAN, CORRUPTED), said)
        for name, x in found.rule(i).values.items():
            assert_same(x, wanted[name], 1e-10, name)


@pytest.mark.torch
def test_each_unit_of_a_site_has_its_own_product(x64: None, sharp: Llama) -> None:
    """Neurons, dimensions of streams and of heads, keys of a query, scales of tokens; the other sites are sums as ever."""
    sites = ("embed", "resid_mid", "attn_scale", "v", "pattern", "z", "act", "mlp_out")
    each = ("act", "embed", "attn_scale", "v", "pattern", "resid_mid")
    found = attribution_patching(sharp, CLEAN, CORRUPTED, METRIC, sites, each=each, steps=2, rules=drawn(0)[0])
    wanted, _ = reference(sharp, (CLEAN, CORRUPTED), drawn(0)[1], steps=2, each=each)
    assert found.values["act"].shape == (L, N, 40) and found.values["pattern"].shape == (L, H, N, N)
    for name, x in found.values.items():
        assert_same(x, wanted[name][0] if name == "embed" else wanted[name], 1e-9, name)


@pytest.mark.torch
def test_steps_are_a_mean_on_the_way_and_the_softmax_of_queries_and_keys_is_whole(x64: None, sharp: Llama) -> None:
    sites = ("embed", "q_pre_rope", "q", "k", "v", "z", "mlp_out")
    found = attribution_patching(sharp, CLEAN, CORRUPTED, METRIC, sites, steps=3, correct="qk")
    wanted, brute = reference(sharp, (CLEAN, CORRUPTED), steps=3)
    assert np.abs(brute["k"] - wanted["k"]).max() > 0.1 * np.abs(brute["k"]).max()  # the gradient is another thing
    for name, x in {**wanted, **brute}.items():
        if name in sites:
            assert_same(found.values[name], x[0] if name == "embed" else x, 1e-9, name)


@pytest.mark.torch
def test_at_the_clean_run_it_is_that_runs_gradient(x64: None, sharp: Llama) -> None:
    sites = ("q", "k", "z", "mlp_out")
    found = attribution_patching(sharp, CLEAN, CORRUPTED, METRIC, sites, at="clean", correct="qk")
    wanted, brute = reference(sharp, (CLEAN, CORRUPTED), at="clean")
    for name, x in {**wanted, **brute}.items():
        if name in sites:
            assert_same(found.values[name], x, 1e-9, name)


@pytest.mark.torch
def test_atp_star_of_a_set(x64: None, sharp: Llama) -> None:
    """Its softmax and GradDrop together, of pairs of two lengths: |values| of each layer dropped, over L − 1, then the pairs' mean."""
    pairs = [pair(9, 0), pair(6, 1)]
    mask = np.array([[True] * 9, [False] * 3 + [True] * 6])
    tokens = np.zeros((2, 2, 9), np.int32)
    for b in (0, 1):
        tokens[:, b, mask[b]] = pairs[b]
    sites = ("q", "k", "z")
    found = attribution_patching(sharp, *tokens, METRIC, sites, mask=mask, rules=grad_drop(sharp.config), correct="qk")
    assert found.values["k"].shape == (L, 2, L, K, 9) and found.clean.shape == (2,)
    total = {name: np.zeros((L, K if name == "k" else H, 9)) for name in sites}
    for b in (0, 1):
        for layer in range(L):
            dropped = {"attn_out": np.eye(L)[layer], "mlp_out": np.eye(L)[layer]}
            wanted, brute = reference(sharp, pairs[b], dropped)
            for name, x in {**wanted, **brute}.items():
                if name in sites:
                    assert_same(found.values[name][layer, b][..., mask[b]], x, 1e-9, f"{name} without {layer}")
                    total[name][..., mask[b]] += np.abs(x) / (L - 1) / 2
    dropped = found.grad_drop()
    assert not dropped.signed and dropped.n_rules is None and dropped.clean.shape == ()
    for name in sites:
        assert_same(dropped.values[name], total[name], 1e-9, name)


def test_a_softmax_without_digits_left_has_its_effects() -> None:
    """In float32, of scores so far apart that a probability is 1 to its last bit, beside float64."""
    rng = np.random.default_rng(0)
    scores, other = (rng.normal(0, 60, (1, 7, 7)).astype(np.float32) for _ in range(2))
    scores[0, 6], other[0, 6] = np.linspace(-3, 3, 7), np.linspace(2, -2, 7)
    allowed, slope = np.tril(np.ones((1, 7, 7), bool)), rng.normal(size=(1, 7, 7)).astype(np.float32)
    keys, queries = np.zeros(7), np.zeros(7)
    for t in range(7):
        old, new, g = (x[0, t, : t + 1].astype(np.float64) for x in (scores, other, slope))
        queries[t] = (softmax(new) - softmax(old)) @ g
        for j in range(t + 1):
            keys[j] += (softmax(np.where(np.arange(t + 1) == j, new, old)) - softmax(old)) @ g
    np.testing.assert_allclose(by_queries(scores, other, allowed, slope)[0], queries, atol=1e-6)
    np.testing.assert_allclose(by_keys(scores, other, allowed, slope)[0], keys, atol=1e-6)


def magnitudes() -> AttributionResult:
    return attribution_patching(tiny_llama(), CLEAN, CORRUPTED, METRIC, "z", rules=grad_drop(tiny_llama().config))


def test_a_family_is_asked_for_one_rule_and_magnitudes_have_no_sign() -> None:
    model, found = tiny_llama(), magnitudes()
    with pytest.raises(ValueError, match=r"of 3 rules: take one of them, such as result.rule\(0\)"):
        found.top()
    with pytest.raises(ValueError, match="number is 3, and must be 0 to 2: there are 3 rules"):
        found.rule(3)
    for call, words in ((lambda r: r.rule(0), "no family"), (lambda r: r.grad_drop(), "one for each layer")):
        with pytest.raises(ValueError, match=words):
            call(found.rule(0))
    verified = verify(found.grad_drop(), model, CLEAN, CORRUPTED, METRIC, top=8, sample=8, progress=False)
    assert min(e["exact"] for e in verified.entries) < -1e-3 and not verified.sign_errors
    with pytest.raises(ValueError, match=r"means over pairs of prompts.*make them of one"):
        verify(found.grad_drop(), model, np.stack([CLEAN] * 2), np.stack([CORRUPTED] * 2), METRIC)


def test_whatever_an_estimate_is_made_by_it_is_judged_by_the_same_exact_effects() -> None:
    """A seed draws the same entries, and what patches of these do is one `forward` each."""
    given = (tiny_llama(), CLEAN, CORRUPTED, METRIC)
    found = {
        "relp": attribution_patching(*given, ("q", "z"), rules=relp(given[0].config)),
        "gim": attribution_patching(*given, ("q", "z"), rules=gim(given[0].config)),
        "on the way": attribution_patching(*given, ("q", "z"), steps=3, correct="qk"),
        "a rule of several": magnitudes().rule(1),
    }
    wanted: Any = None
    for way, result in found.items():
        entries = verify(result, *given, top=0, sample=12, site="z", progress=False).entries
        wanted = effects(*given, entries) if wanted is None else wanted
        near([e["exact"] for e in entries], wanted, err_msg=way)
        values = [result.values["z"][e["layer"], e["head"], e["position"]] for e in entries]
        np.testing.assert_array_equal([e["estimate"] for e in entries], values)
    # Queries whose effects a gradient misses, and the whole softmax does not.
    entries = verify(found["on the way"], *given, top=6, sample=6, site="q", progress=False).entries
    assert np.corrcoef([e["estimate"] for e in entries], [e["exact"] for e in entries])[0, 1] > 0.9


def test_its_plan_says_what_more_there_is_to_run() -> None:
    given = (tiny_llama(), CLEAN, CORRUPTED, METRIC, "z")
    once = plan(attribution_patching, *given)
    more = plan(attribution_patching, *given, steps=4, rules=grad_drop(tiny_llama().config))
    assert (once.n_runs, more.n_runs) == (2, 5) and more.flops > 4 * once.flops and more.bytes > once.bytes
    assert "and of 3 more on the way, under 3 rules" in repr(more)
    # What a run returns: a number for each neuron of 3 layers at 9 tokens, under each of 3 rules.
    wide, sums = (
        plan(attribution_patching, *given[:4], "act", each=each, rules=grad_drop(tiny_llama().config))
        for each in ("act", ())
    )
    assert wide.bytes - sums.bytes == 4 * 3 * 3 * 9 * 40


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (dict(steps=0), ValueError, "steps is 0, and must be at least 1"),
        (
            dict(at="middle"),
            ValueError,
            "at is 'middle', and the gradient is of the 'corrupted' run or of the 'clean' one",
        ),
        (dict(at="clean", steps=2), ValueError, "go from the corrupted run towards the clean one"),
        (dict(correct="v"), ValueError, "correct is 'v'; it can be 'qk'"),
        (dict(correct="qk"), ValueError, "sites names neither"),
        (dict(sites="q", each="q", correct="qk"), ValueError, "whole queries and keys: each can name neither"),
        (dict(each="act"), ValueError, "each names 'act', and sites z"),
        (dict(each="atc"), ValueError, "Unknown site 'atc'"),
        (dict(each=1), TypeError, "each is 1, and a site name or a tuple"),
        (dict(rules="relp"), TypeError, "rules is a str"),
        (dict(rules=Rules(stop={"z": np.ones((2, 3, 4)), "v": np.ones((4, 3, 2))})), ValueError, "families of 2 and 4"),
        (dict(rules=Rules(stop={"z": np.ones((2, 2, 3, 4))})), ValueError, "behind the axis of a family"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        attribution_patching(tiny_llama(), CLEAN, CORRUPTED, METRIC, **{"sites": "z", **given})


def test_rules_are_data_and_map() -> None:
    """One rule alone, and a family of it among others."""
    model = tiny_llama()
    alone = attribution_patching(model, CLEAN, CORRUPTED, METRIC, "z", rules=relp(model.config))
    halves = jax.tree.map(lambda x: np.array(x) * np.array([1.0, 0.5]).reshape(2, *(1,) * 0), relp(model.config))
    with pytest.raises(ValueError, match=r"has shape \[2\]"):  # two numbers are none for each of three layers
        attribution_patching(model, CLEAN, CORRUPTED, METRIC, "z", rules=halves)
    axes = {"final_scale": (2,), "attn_scale": (2, 1), "mlp_scale": (2, 1), "pattern": (2, 1, 1)}
    family = Rules({name: np.array([0.5, 1]).reshape(shape) for name, shape in axes.items()}, {"act": 0.5}, secant=1.0)
    found = attribution_patching(model, CLEAN, CORRUPTED, METRIC, "z", rules=family)
    np.testing.assert_allclose(found.rule(1).values["z"], alone.values["z"], atol=1e-5)
    assert np.abs(found.values["z"][0] - alone.values["z"]).max() > 1e-3
