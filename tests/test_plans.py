"""`plan(function, …)`: what it says is what the call then runs, counted by hand; and it runs and holds nothing itself."""

from __future__ import annotations

import tracemalloc
from typing import Any

import jax
import numpy as np
import pytest

from oculi_jax import Plan, SweepPlan, buckets, forward, plan, sweep
from oculi_jax.backends import jax as backend
from oculi_jax.causal import Noise, activation_patching, attribution, attribution_patching
from oculi_jax.circuits import passes, path_patching
from oculi_jax.intervention import HeadAblation
from oculi_jax.metrics import kl_divergence, logit_difference
from oculi_jax.sweeps import planning, sweeping

from .tiny import prompt, tiny_llama

MODEL = tiny_llama()
METRIC = logit_difference(3, 41)
L, T, E, H, K, D, F, V = 3, 8, 24, 4, 2, 6, 40, 61
CLEAN = prompt(T)
CORRUPTED = np.where(np.isin(np.arange(T), (3, 5)), (CLEAN + 7) % V, CLEAN)
NOISE = Noise(2, samples=3, key=jax.random.key(0))
# Of one layer on all tokens: its weights, and scores and values of attention.
LAYER = 2 * T * (2 * E * D * (H + K) + 3 * E * F + 2 * H * D * T)


def ragged() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three pairs of two lengths, and their mask."""
    mask = np.arange(23) < np.array([23, 9, 22])[:, None]
    clean = np.where(mask, np.stack([prompt(23, seed) for seed in range(3)]), 0)
    return clean, np.where(mask & (np.arange(23) == 2), (clean + 7) % V, clean), mask


SET = ragged()
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "patterns in calls of two, noising": (
        (CLEAN, CORRUPTED), {"site": "pattern", "by": ("layer", "head"), "direction": "noising", "batch_size": 2}),
    "a site outside the layers": ((CLEAN, CORRUPTED), {"site": "embed", "by": "position"}),
    "a set by position": (SET[:2], {"mask": SET[2]}),
    "noise on a set": ((SET[0], NOISE), {"mask": SET[2], "site": "v", "by": ("layer", "head")}),
    "an intervention": ((CLEAN, HeadAblation(1, 2)), {"site": "mlp_out"}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_jobs_are_cut_as_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "FLOPS_OF_A_PROGRAM", {"cpu": 1e5})


def same(a: Any, b: Any) -> bool:
    """Whether two parts or calls say the same in every field."""
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, planning.Part | planning.Call):
        return all(same(value, vars(b)[name]) for name, value in vars(a).items())
    return np.array_equal(a, b)


@pytest.mark.parametrize("name", CALLS)
def test_patching_runs_the_calls_that_its_plan_has(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (clean, corrupted), options = CALLS[name]

    def execute(prepared: Any, planned: SweepPlan, progress: Any) -> Any:
        ran.append(planned)
        return own(prepared, planned, progress)

    def run_variants(*given: Any, **named: Any) -> Any:
        whole.extend([len(given[1])] * (not ran))
        return real(*given, **named)

    own, ran, real, whole = sweeping.execute, [], backend.run_variants, []
    monkeypatch.setattr(sweeping, "execute", execute)
    monkeypatch.setattr(backend, "run_variants", run_variants)
    planned = plan(activation_patching, MODEL, clean, corrupted, METRIC, **options)
    assert not ran and not whole and isinstance(planned, SweepPlan)
    found = activation_patching(MODEL, clean, corrupted, METRIC, **options)
    (swept,) = ran
    assert same(planned.parts, swept.parts) and planned.axes == swept.axes == found.patched.shape[clean.ndim - 1 :]
    # What runs before the sweep, whole, and what it costs by hand; the last layer of all tokens where values are captured.
    assert planned.n_runs == swept.n_runs + sum(whole) and len(whole) == 2
    n = clean.shape[-1]
    layer = n * LAYER / T + 2 * n * 2 * H * D * (n - T)
    run, short = L * layer + 2 * 2 * E, layer - (layer / n + 2 * n * 2 * E * D * K)
    captured = whole[int(options.get("direction") == "noising")]
    assert planned.flops - swept.flops == pytest.approx(sum(whole) * run - (sum(whole) - captured) * short)
    assert planned.naive_flops - swept.naive_flops == pytest.approx(sum(whole) * run)
    assert planned.layer_evaluations == pytest.approx(swept.layer_evaluations + L * sum(whole))
    assert planned.bytes >= swept.bytes and planned.reading > swept.reading
    assert planned.naive_layer_evaluations == L * planned.n_runs and f"after {sum(whole)} whole runs" in repr(planned)


@pytest.mark.quick
def test_a_plan_holds_nothing_of_what_would_be_captured() -> None:
    """Patterns of 2,000 tokens are 3 × 4 × 2,000 × 2,000 numbers, 192 MB."""
    ids = prompt(2000)
    noise = Noise(2, key=jax.random.key(0))
    plan(activation_patching, MODEL, CLEAN, NOISE, METRIC, "pattern", ("layer", "head"))
    for corrupted in (np.roll(ids, 1), noise):
        tracemalloc.start()
        planned = plan(activation_patching, MODEL, ids, corrupted, METRIC, "pattern", ("layer", "head"), batch_size=1)
        assert tracemalloc.get_traced_memory()[1] < 20e6
        tracemalloc.stop()
        assert planned.bytes > 192e6


@pytest.mark.parametrize("receivers", ["logits", ("a1.h2<k>", "a2.g0<v>", "m1")])
def test_path_patching_runs_what_its_plan_has(receivers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(prepared: Any, planned: SweepPlan, progress: Any) -> Any:
        ran.append(planned)
        before, found = len(whole), own(prepared, planned, progress)
        del whole[before:]  # of the sweep's own
        return found

    def run_variants(*given: Any, **named: Any) -> Any:
        whole.append(len(given[1]) * named.get("size", 1))
        return real(*given, **named)

    own, ran, real, whole = sweeping.execute, [], backend.run_variants, []
    monkeypatch.setattr(sweeping, "execute", execute)
    monkeypatch.setattr(backend, "run_variants", run_variants)
    monkeypatch.setattr(passes, "MOST_ROWS", {"cpu": 1})  # as few at once as may be
    clean, corrupted, mask = SET
    planned = plan(path_patching, MODEL, clean, corrupted, METRIC, None, receivers, mask=mask)
    assert not ran and not whole and isinstance(planned, SweepPlan)
    path_patching(MODEL, clean, corrupted, METRIC, None, receivers, mask=mask)
    assert same(planned.parts, tuple(part for swept in ran for part in swept.parts))
    assert planned.axes == ((16,) if receivers == "logits" else (11,))  # what writes before layer 2
    assert planned.n_runs == sum(swept.n_runs for swept in ran) + sum(whole)
    assert len(ran) == (1 if receivers == "logits" else 2) and len(whole) == (2 if receivers == "logits" else 4)
    assert planned.flops > sum(swept.flops for swept in ran) and planned.bytes >= max(swept.bytes for swept in ran)


@pytest.mark.parametrize("given", ["one", "padded"])
def test_attribution_runs_what_its_plan_has(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clean, corrupted, mask = (CLEAN, CORRUPTED, None) if given == "one" else SET
    ran: list[tuple[Any, Any]] = []
    own, schedule = attribution.attribute, attribution._schedule

    def attribute(model: Any, clean: Any, *given: Any, **named: Any) -> Any:
        ran.append((clean.shape, named))
        return own(model, clean, *given, **named)

    monkeypatch.setattr(attribution, "attribute", attribute)
    monkeypatch.setattr(attribution, "_schedule", lambda model, n, width: (min(2, n), schedule(model, n, width)[1]))
    planned = plan(attribution_patching, MODEL, clean, corrupted, METRIC, ("z", "mlp_out"), mask=mask)
    assert not ran and type(planned) is Plan
    attribution_patching(MODEL, clean, corrupted, METRIC, ("z", "mlp_out"), mask=mask)
    assert [shape for shape, _ in ran] == [(call.slots, call.n_rows) for call in planned.calls]
    assert [part.n_tokens for part in planned.parts] == {"one": [8], "padded": [24, 10]}[given]
    assert planned.n_runs == 2 * planned.n_prompts == (2 if given == "one" else 6)
    flops = reading = 0.0
    for (n_rows, n), named in ran:
        weights, attention = 2 * n * (2 * E * D * (H + K) + 3 * E * F), 2 * n * 2 * H * D * n
        # Forward twice; backward each weight once, and both factors of scores and of values.
        flops += n_rows * (L * (2 * (weights + attention) + weights + 2 * attention) + 3 * 2 * 2 * E)
        reading += -(-n_rows // named["at_once"]) * 2 * L * 40 * weights / n
    assert (planned.flops, planned.reading) == (pytest.approx(flops), pytest.approx(reading))
    assert "backward pass of one" in repr(planned) and planned.seconds < 60
    assert ("lengths of 10, 24" in repr(planned)) == (given == "padded")


def test_attribution_says_when_layers_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    once = plan(attribution_patching, MODEL, CLEAN, CORRUPTED, METRIC)
    monkeypatch.setattr(attribution, "_KEPT_BYTES", 1)
    again = plan(attribution_patching, MODEL, CLEAN, CORRUPTED, METRIC)
    assert again.flops == once.flops + L * LAYER and again.reading == 1.5 * once.reading and again.bytes < once.bytes
    assert "run again" in repr(again) and "run again" in again._repr_html_() and "run again" not in repr(once)


@pytest.mark.parametrize(
    ("sites", "remat"), [(("resid_pre", "mlp_out", "act"), False), (("pattern",), False), (("z",), True)]
)
def test_attribution_holds_about_what_its_plan_says(
    sites: tuple[str, ...], remat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the compiler's own account."""
    monkeypatch.setattr(attribution, "_KEPT_BYTES", 1 if remat else 1 << 30)
    model = tiny_llama(hidden_size=96, intermediate_size=256, num_hidden_layers=6)
    given = np.stack([prompt(40, seed) for seed in range(4)]), np.stack([prompt(40, seed) for seed in range(4, 8)])
    pairs = attribution._Pairs.of(model, *given, METRIC, sites, None)
    ((_, _, at_once, run_again),) = pairs.batches(model)
    assert run_again == remat
    program = attribution.attribute.lower(
        model,
        *given,
        None,
        None,
        METRIC,
        pairs.readings,
        pairs.rules,
        how=pairs.how,
        single=False,
        at_once=at_once,
        remat=remat,
    )
    held = program.compile().memory_analysis().temp_size_in_bytes
    assert 0.8 * held <= plan(attribution_patching, model, *given, METRIC, sites).bytes <= 3 * held


@pytest.mark.quick
def test_a_sweep_can_be_named_and_its_progress_is_no_matter() -> None:
    heads = HeadAblation.grid(MODEL.config)
    plain = plan(MODEL, CLEAN, heads, METRIC)
    for other in (
        plan(sweep, MODEL, CLEAN, heads, METRIC, progress=False),
        plan(model=MODEL, tokens=CLEAN, interventions=heads, metric=METRIC),
        plan(sweep, model=MODEL, tokens=CLEAN, interventions=heads, metric=METRIC),
    ):
        assert isinstance(other, SweepPlan) and same(plain.parts, other.parts) and other.flops == plain.flops
    assert plain.n_runs == L * H and "after" not in repr(plain)


@pytest.mark.quick
def test_what_cannot_be_planned_is_refused_in_a_sentence() -> None:
    with pytest.raises(TypeError, match=r"forward has no plan; what has one is .*activation_patching.*plan\(function"):
        plan(forward, MODEL, CLEAN)
    with pytest.raises(TypeError, match=r"plan of activation_patching: missing a required argument: 'metric'\."):
        plan(activation_patching, MODEL, CLEAN, CORRUPTED)  # pyright: ignore
    with pytest.raises(TypeError, match="plan of attribution_patching: got an unexpected keyword argument 'by'"):
        plan(attribution_patching, MODEL, CLEAN, CORRUPTED, METRIC, by="layer")  # pyright: ignore
    with pytest.raises(ValueError, match="by is .*, and must be one of"):
        plan(activation_patching, MODEL, CLEAN, CORRUPTED, METRIC, by="heads")
    with pytest.raises(ValueError, match=r"clean has shape \[8\] and corrupted \[7\]"):
        plan(activation_patching, MODEL, CLEAN, CORRUPTED[1:], METRIC)
    for function in (activation_patching, attribution_patching):
        with pytest.raises(TypeError, match="plan needs values, and was given traced arrays"):
            jax.jit(lambda x, call=function: plan(call, MODEL, x, CORRUPTED, METRIC).flops)(CLEAN)


@pytest.mark.torch
def test_a_plan_of_patching_on_torch_runs_nothing_either(hf_trained: Any, embedded: Any) -> None:
    model, tokenizer = embedded
    ids, other = (tokenizer.encode(f"The capital of {name} is") for name in ("Italy", "France"))
    metric = kl_divergence(np.zeros(model.config.vocab_size, np.float32))
    ours, theirs = (plan(activation_patching, one, ids, other, metric, batch_size=6) for one in (model, hf_trained))
    assert same(ours.parts, theirs.parts) and ours.flops == theirs.flops
    with pytest.raises(Exception, match="JAX pytree"):
        plan(attribution_patching, hf_trained, ids, other, metric)
