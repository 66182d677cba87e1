"""Activation patching, noise and the tracer: against single runs, the laws of two runs, and Hugging Face's hooks."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from oculi_jax import Output, forward
from oculi_jax.causal import CausalTracer, Noise, PatchingResult, activation_patching
from oculi_jax.intervention import ActivationPatch, HeadAblation, InterventionContext, PerLayer, PerPrompt
from oculi_jax.metrics import logit_difference, rank
from oculi_jax.models.llama import Llama, LlamaAttentionAdapter

from .compilations import compilations
from .margins import assert_clear, assert_leads
from .prompts import IOI
from .tiny import prompt, tiny_llama
from .tolerances import ROUTES

T = 6
METRIC = logit_difference(3, 41)


@pytest.fixture(scope="module")
def model() -> Llama:
    return tiny_llama()


def pair(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two prompts that differ at tokens 1 and 3."""
    clean = prompt(T, seed)
    corrupted = clean.copy()
    corrupted[[1, 3]] = (clean[[1, 3]] + 7) % 61
    return clean, corrupted


CLEAN, CORRUPTED = pair()


def single(model: Llama, tokens: Any, *interventions: Any, mask: Any = None, metric: Any = METRIC) -> float:
    return float(metric(forward(model, tokens, interventions, mask=mask)))


def capture(model: Llama, site: str, tokens: Any, *interventions: Any) -> np.ndarray:
    return np.asarray(forward(model, tokens, interventions, capture=site, logits="none").activations[site])


def close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=ROUTES)


@pytest.fixture(scope="module")
def grid(model: Llama) -> PatchingResult:
    return activation_patching(model, CLEAN, CORRUPTED, METRIC, "z", ("layer", "head", "position"))


def test_each_entry_is_the_single_run_with_that_patch(model: Llama, grid: PatchingResult) -> None:
    value = capture(model, "z", CLEAN)
    wanted = [
        [
            [single(model, CORRUPTED, ActivationPatch("z", l, value[l, h], h, t)) for t in range(T)]
            for h in range(4)
        ]
        for l in range(3)  # noqa: E741
    ]  # fmt: skip
    close(grid.patched, wanted)
    close(grid.clean, single(model, CLEAN))
    close(grid.corrupted, single(model, CORRUPTED))
    assert np.ptp(wanted) > 100 * ROUTES and (grid.site, grid.by) == ("z", ("layer", "head", "position"))


@pytest.mark.quick
def test_noising_is_denoising_with_the_roles_swapped(model: Llama, grid: PatchingResult) -> None:
    swapped = activation_patching(
        model, CORRUPTED, CLEAN, METRIC, "z", ("layer", "head", "position"), direction="noising"
    )
    close(swapped.patched, grid.patched)
    close(swapped.clean, grid.corrupted)
    close(swapped.recovery, 1 - np.asarray(grid.recovery))


def test_the_stream_carries_the_difference_from_where_the_prompts_differ(model: Llama) -> None:
    places = activation_patching(model, CLEAN, CORRUPTED, METRIC)
    assert places.site == "resid_pre" and places.patched.shape == (3, T)
    close(places.patched[0, [0, 2, 4, 5]], np.full(4, places.corrupted))  # the embeddings there are the same
    close(places.patched[:, 0], np.full(3, places.corrupted))  # before the first difference
    assert np.abs(np.asarray(places.recovery)[1:, 1:]).max(1).min() > 0.01
    embed = activation_patching(model, CLEAN, CORRUPTED, METRIC, "embed", "position")
    close(embed.patched, places.patched[0])


@pytest.mark.numerical
def test_patching_a_run_with_itself_changes_nothing_and_has_no_recovery(model: Llama) -> None:
    found = activation_patching(model, CLEAN, CLEAN, METRIC, "z", ("layer", "head", "position"))
    close(found.patched, np.full((3, 4, T), found.clean))
    # The clean run's program keeps `z` and the other's does not: on some processors they may differ in the last bit.
    close(found.clean, found.corrupted)
    assert np.isnan(found.recovery).all()
    for end, nothing in ((1 + 1e-6, True), (1 + 1e-4, False)):
        assert np.isnan(replace(found, corrupted=found.clean * end).recovery).all() == nothing


@pytest.mark.numerical
def test_heads_of_keys_are_key_value_heads(model: Llama) -> None:
    found = activation_patching(model, CLEAN, CORRUPTED, rank(41), "v", ("layer", "head"))
    value = capture(model, "v", CLEAN)
    patches = [[ActivationPatch("v", l, value[l, k], k) for k in range(2)] for l in range(3)]  # noqa: E741
    wanted = [[single(model, CORRUPTED, patch, metric=rank(41)) for patch in row] for row in patches]
    for patch in (patch for row in patches for patch in row):
        logits = np.asarray(forward(model, CORRUPTED, patch).logits[-1])
        assert_clear(np.delete(logits, 41), logits[41])
    np.testing.assert_array_equal(found.patched, wanted)
    assert found.patched.dtype == np.int32 and found.recovery.dtype == np.float32


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_prompts_and_padding_changes_nothing(model: Llama, grid: PatchingResult, side: str) -> None:
    other = pair(5)
    places = slice(2, None) if side == "left" else slice(0, T)
    mask = np.zeros((2, T + 2), bool)
    mask[0, places] = mask[1] = True
    clean, corrupted = np.full((2, T + 2), 9, np.int32), np.full((2, T + 2), 11, np.int32)
    clean[0, places], corrupted[0, places] = CLEAN, CORRUPTED
    clean[1, 2:], corrupted[1, 2:] = other
    metric = logit_difference(np.array([3, 17]), 41)
    found = activation_patching(model, clean, corrupted, metric, "z", ("layer", "head", "position"), mask=mask)
    assert found.patched.shape == (2, 3, 4, T + 2) and found.clean.shape == (2,)
    close(found.patched[0, ..., places], grid.patched)
    close(found.recovery[0, ..., places], grid.recovery)
    padding = np.asarray(found.patched)[0][..., ~mask[0]]
    close(padding, np.full(padding.shape, found.corrupted[0]))
    value = capture(model, "z", clean[1])
    patch = ActivationPatch("z", 1, value[1, 2], 2, 3)
    close(found.patched[1, 1, 2, 3], single(model, corrupted[1], patch, metric=logit_difference(17, 41)))


def samples_of(noise: Noise, model: Llama, mask: Any = None, n_tokens: int = T) -> list[Any]:
    """The intervention of each sample of a noise on one prompt."""
    every = noise.intervention(model, None if mask is None else mask[None], 1, n_tokens)
    own = {name: value for name, value in vars(every).items() if isinstance(value, PerPrompt)}
    return [replace(every, **{name: value.of(n) for name, value in own.items()}) for n in range(noise.samples)]


def test_noise_is_the_mean_of_its_samples(model: Llama) -> None:
    noise = Noise([1, 3], samples=3, key=jax.random.key(4))
    by = ("layer", "position")
    denoised = activation_patching(model, CLEAN, noise, METRIC, "resid_post", by)
    noised = activation_patching(model, CLEAN, noise, METRIC, "resid_post", by, direction="noising")
    draws = samples_of(noise, model)
    value = capture(model, "resid_post", CLEAN)
    close(denoised.corrupted, np.mean([single(model, CLEAN, draw) for draw in draws]))
    close(noised.clean, single(model, CLEAN))
    for layer, position in ((0, 1), (1, 5), (2, 5), (0, 3)):
        into = [
            single(model, CLEAN, d, ActivationPatch("resid_post", layer, PerLayer(value), None, position))
            for d in draws
        ]
        out = [
            single(
                model,
                CLEAN,
                ActivationPatch("resid_post", layer, PerLayer(capture(model, "resid_post", CLEAN, d)), None, position),
            )
            for d in draws
        ]
        close(denoised.patched[layer, position], np.mean(into))
        close(noised.patched[layer, position], np.mean(out))
    # The noise stays where clean values go in: only at the last position has the stream nothing of it any more.
    close(denoised.patched[2, 5], denoised.clean)
    close(denoised.patched[2, :5], np.full(5, denoised.corrupted))


def test_draws_are_as_large_as_said_fall_on_their_tokens_and_depend_on_key_and_rank_alone() -> None:
    big = tiny_llama(hidden_size=240, vocab_size=101)
    sigma = np.std(np.asarray(big.embed[...], np.float64))
    clean = capture(big, "embed", CLEAN)

    def noises(noise: Noise, tokens: np.ndarray = CLEAN, mask: Any = None) -> np.ndarray:
        items = samples_of(noise, big, mask, len(tokens))
        return np.stack(
            [forward(big, tokens, d, capture="embed", logits="none", mask=mask).activations["embed"] for d in items]
        )

    noise = Noise([1, -2], scale=2.5, samples=5, key=jax.random.key(0))
    added = noises(noise) - clean
    assert not added[:, [0, 2, 3, 5]].any()
    drawn = added[:, [1, 4]]  # 2400 numbers: their deviation is known to 1.5 %
    assert abs(drawn.std() / (2.5 * sigma) - 1) < 0.06 and abs(drawn.mean()) < 0.1 * 2.5 * sigma
    assert np.abs(np.corrcoef(drawn.reshape(10, -1)) - np.eye(10)).max() < 0.4  # no draw twice
    np.testing.assert_array_equal(noises(noise) - clean, added)
    assert np.abs(noises(Noise([1, -2], scale=2.5, samples=5, key=jax.random.key(1))) - clean - added).max() > sigma
    padded, mask = np.concatenate([[9, 9], CLEAN]), np.arange(T + 2) >= 2
    close(noises(noise, padded, mask)[:, 2:], added + clean)


def test_noise_of_several_prompts_is_of_each_ones_own_tokens(model: Llama) -> None:
    clean = np.stack([CLEAN, pair(5)[0]])
    where = np.zeros((2, T), bool)
    where[0, 1] = where[1, 2:4] = True
    key = jax.random.key(2)
    metric = logit_difference(np.array([3, 17]), 41)
    found = activation_patching(model, clean, Noise(where, samples=3, key=key), metric, "resid_post")
    assert found.patched.shape == (2, 3, T) and found.corrupted.shape == (2,)
    for row, target in ((0, 3), (1, 17)):
        draws = samples_of(Noise(where[row], samples=3, key=key), model)
        patch = ActivationPatch("resid_post", 1, PerLayer(capture(model, "resid_post", clean[row])), None, 3)
        for values, items in ((found.corrupted, ()), (found.patched[:, 1, 3], (patch,))):
            each = [single(model, clean[row], draw, *items, metric=logit_difference(target, 41)) for draw in draws]
            close(values[row], np.mean(each))


def test_interventions_can_be_the_corruption(model: Llama) -> None:
    corruption = HeadAblation(1, 2)
    found = activation_patching(model, CLEAN, [corruption], METRIC, "z", ("layer", "head"))
    close(found.corrupted, single(model, CLEAN, corruption))
    close(found.recovery[1, 2], 1.0)  # the patch comes after the ablation
    close(found.recovery[0], np.zeros(4))  # what is before it is clean already
    value = capture(model, "z", CLEAN)
    close(found.patched[2, 3], single(model, CLEAN, corruption, ActivationPatch("z", 2, value[2, 3], 3)))


def test_the_whole_stream_carries_everything_and_other_tokens_and_targets_compile_nothing(model: Llama) -> None:
    def run(seed: int, a: int) -> None:
        clean, corrupted = pair(seed)
        found = activation_patching(model, clean, corrupted, logit_difference(a, 41), "residual.post_mlp", "layer")
        close(found.patched, np.full(3, found.clean))  # the whole stream is the whole run
        close(found.recovery, np.ones(3))
        assert found.site == "resid_post" and abs(found.clean - found.corrupted) > 100 * ROUTES

    with compilations() as compiled:
        run(0, 3)
        first = len(compiled)
        run(8, 22)
        assert first > 0 and len(compiled) == first


def test_a_user_can_jit_it_and_spread_it_over_devices(model: Llama, grid: PatchingResult) -> None:
    @jax.jit
    def jitted(tokens: Any, a: Any) -> PatchingResult:
        return activation_patching(
            model, tokens, CORRUPTED, logit_difference(a, 41), "z", ("layer", "head", "position")
        )

    found = jitted(CLEAN, 3)
    close(found.patched, grid.patched)
    close(found.recovery, grid.recovery)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = activation_patching(model, CLEAN, CORRUPTED, METRIC, "z", ("layer", "head", "position"), mesh=mesh)
    close(spread.patched, grid.patched)


def test_any_function_of_the_output_is_a_metric(model: Llama, grid: PatchingResult) -> None:
    def metric(out: Output) -> Any:
        assert out.logits is not None
        return out.logits[-1, 3] - out.logits[-1, 41]

    found = activation_patching(model, CLEAN, CORRUPTED, metric, "z", ("layer", "head", "position"))
    close(found.patched, grid.patched)


refused: Any = activation_patching
WRONG: dict[str, tuple[Callable[[Llama], Any], str]] = {
    "no heads": (lambda m: refused(m, CLEAN, CORRUPTED, METRIC, by=("layer", "head")), "has no heads"),
    "neuron": (lambda m: refused(m, CLEAN, CORRUPTED, METRIC, "act", ("layer", "neuron")), "not supported"),
    "axes": (lambda m: refused(m, CLEAN, CORRUPTED, METRIC, by=("position", "layer")), "must be one of"),
    "outside": (lambda m: refused(m, CLEAN, CORRUPTED, METRIC, "embed"), "outside the layers"),
    "inside": (lambda m: refused(m, CLEAN, CORRUPTED, METRIC, "z", "position"), "in every layer"),
    "one layer": (lambda m: refused(m, CLEAN, CORRUPTED, METRIC, "blocks.1.attn.hook_z"), "give 'z'"),
    "site": (lambda m: refused(m, CLEAN, CORRUPTED, METRIC, "resid_prae"), "did you mean 'resid_pre'"),
    "direction": (lambda m: refused(m, CLEAN, CORRUPTED, METRIC, direction="both"), "'denoising'"),
    "lengths": (lambda m: refused(m, CLEAN, CORRUPTED[:-1], METRIC), r"\[6\] and corrupted \[5\]"),
    "pairs": (lambda m: refused(m, CLEAN, CORRUPTED[None], METRIC), r"\[6\] and corrupted \[1, 6\]"),
    "target": (lambda m: refused(m, CLEAN, CORRUPTED, logit_difference(3, 61)), "ids 0 to 60"),
    "targets": (lambda m: refused(m, CLEAN, CORRUPTED, logit_difference([3, 4], 5)), "targets for 2 prompts"),
    "many numbers": (lambda m: refused(m, CLEAN, CORRUPTED, lambda o: o.logits[-1]), r"this returns \[61\]"),
    "metric": (lambda m: refused(m, CLEAN, CORRUPTED, 3), "metric is a int"),
    "a sweep": (
        lambda m: refused(m, CLEAN, HeadAblation.grid(m.config), METRIC), r"have axes \[3, 4\], and it is one run",
    ),
    "samples": (lambda m: refused(m, CLEAN, noise(samples=0), METRIC), "at least 1"),
    "scale": (lambda m: refused(m, CLEAN, noise(scale=0.0), METRIC), "above 0"),
    "key": (lambda m: refused(m, CLEAN, noise(key=3), METRIC), "JAX random key"),
    "no key": (lambda m: refused(m, CLEAN, noise(key=None), METRIC), "JAX random key"),
    "where": (lambda m: refused(m, CLEAN, noise(positions=[6]), METRIC), "positions are 0 to 5"),
    "whose": (lambda m: refused(m, CLEAN, noise(positions=np.ones((2, T), bool)), METRIC), "1 prompts"),
    "adapter": (CausalTracer, "takes an adapter"),
    "trace site": (lambda m: trace(m, CLEAN, CORRUPTED, sites=("mlp_out", "mlp.output")), "one twice"),
    "trace lengths": (lambda m: trace(m, CLEAN, CORRUPTED[:-1]), "has 6 tokens and the corrupted one 5"),
    "trace pairs": (lambda m: trace(m, CLEAN, np.stack([CLEAN, CLEAN])), "clean holds 1 prompts and corrupted 2"),
    "trace jit": (lambda m: jax.jit(lambda x: trace(m, x, CORRUPTED))(CLEAN), "use activation_patching"),
}  # fmt: skip


def noise(**changes: Any) -> Noise:
    return Noise(**{"positions": [1], "samples": 2, "key": jax.random.key(0), **changes})


def trace(model: Llama, clean: Any, corrupted: Any, **options: Any) -> Any:
    return CausalTracer(LlamaAttentionAdapter(model)).trace(clean, corrupted, METRIC, **options)


@pytest.mark.quick
@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused_in_a_sentence(model: Llama, name: str) -> None:
    call, sentence = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=sentence):
        call(model)


def test_the_tracer_is_patching_of_layers(model: Llama) -> None:
    tracer = CausalTracer(LlamaAttentionAdapter(model))
    heard: list[tuple[int, int]] = []
    found = tracer.trace(CLEAN, CORRUPTED, METRIC, progress=lambda *done: heard.append(done))
    assert found.sites == ("attn_out", "mlp_out") and heard[-1] == (6, 6) and heard == sorted(heard)
    values = {site: capture(model, site, CLEAN) for site in found.sites}
    wanted = np.array(
        [[single(model, CORRUPTED, ActivationPatch(s, l, PerLayer(values[s]))) for s in found.sites] for l in range(3)]  # noqa: E741
    )
    ends = single(model, CLEAN), single(model, CORRUPTED)
    recovered = (wanted - ends[1]) / (ends[0] - ends[1])
    close(found.patched, wanted)
    close(found.recovery_matrix(), recovered)
    assert_leads(recovered.ravel(), 2)
    top = found.top_results(2)
    assert [row["recovery"] for row in top] == pytest.approx(np.sort(recovered.ravel())[::-1][:2], abs=ROUTES)
    layer, site = np.unravel_index(recovered.argmax(), recovered.shape)
    assert top[0]["layer"] == layer and top[0]["site"] == found.sites[site]
    assert len(found.top_results(100)) == 6
    assert [row["patched"] for row in found.by_layer(1)] == pytest.approx(wanted[1], abs=ROUTES)
    assert [row["recovery"] for row in found.by_site("mlp.output")] == pytest.approx(recovered[:, 1], abs=ROUTES)
    lines = found.summary(k=3).splitlines()
    # Numbers, since rounding may move a last digit: three decimals are right to half of the third.
    digits = 0.0005 + ROUTES
    said = re.fullmatch(r".*; metric (-?\d+\.\d{3}) clean, (-?\d+\.\d{3}) corrupted", lines[0])
    assert len(lines) == 5 and said and [float(x) for x in said.groups()] == pytest.approx(ends, abs=digits)
    where, best = lines[2].split()[:2], lines[2].split()[2:]
    assert where == [str(layer), found.sites[site]] and all(re.fullmatch(r"-?\d+\.\d{3}", number) for number in best)
    of_best = wanted.max() if ends[0] > ends[1] else wanted.min()
    assert [float(x) for x in best] == pytest.approx([of_best, recovered.max()], abs=digits)
    for call in (lambda: found.by_layer(3), lambda: found.by_site("z"), lambda: found.top_results(0)):
        with pytest.raises(ValueError):
            call()


def test_the_tracer_patches_some_positions_under_what_surrounds_it(model: Llama) -> None:
    adapter = LlamaAttentionAdapter(model)
    around = HeadAblation(1, 1)
    with InterventionContext(adapter, [around]):
        found = CausalTracer(adapter).trace(CLEAN, CORRUPTED, METRIC, sites="residual_pre_attn", positions=[3, -1])
    value = capture(model, "resid_pre", CLEAN, around)
    wanted = [
        single(model, CORRUPTED, around, ActivationPatch("resid_pre", l, PerLayer(value), None, [3, 5]))
        for l in range(3)  # noqa: E741
    ]
    close(found.patched[:, 0], wanted)
    close(found.clean, single(model, CLEAN, around))
    assert found.sites == ("resid_pre",)


def test_the_tracer_takes_batches_and_judges_their_means(model: Llama) -> None:
    clean, corrupted = (
        [[*map(int, CLEAN[:4])], [*map(int, CLEAN)]],
        [[*map(int, CORRUPTED[:4])], [*map(int, CORRUPTED)]],
    )
    found = trace(model, clean, corrupted, sites=("mlp_out",))
    assert found.patched.shape == (2, 3, 1)
    value = capture(model, "mlp_out", CLEAN[:4])
    close(found.patched[0, 1, 0], single(model, CORRUPTED[:4], ActivationPatch("mlp_out", 1, PerLayer(value))))
    patched, ends = np.asarray(found.patched), (np.mean(found.clean), np.mean(found.corrupted))
    close(found.recovery_matrix(), (patched.mean(0) - ends[1]) / (ends[0] - ends[1]))


def test_the_tracer_takes_noise(model: Llama) -> None:
    found = trace(model, CLEAN, noise(), sites=("resid_post",))
    close(found.patched, np.full((3, 1), found.clean))
    close(found.corrupted, np.mean([single(model, CLEAN, draw) for draw in samples_of(noise(), model)]))


def test_results_are_pytrees_that_print_in_one_line(grid: PatchingResult) -> None:
    again = jax.tree.map(lambda x: x, grid)
    assert repr(again) == "PatchingResult(z by layer, head, position, denoising: patched [3, 4, 6])"


@pytest.mark.real
@pytest.mark.torch
def test_who_gives_the_drink_against_hooks_of_hugging_face(adapter: LlamaAttentionAdapter, hf: Any) -> None:
    import torch

    clean, corrupted = (adapter.tokenizer.encode(IOI.format(name)) for name in ("John", "Mary"))
    mary, john = adapter.to_single_token(" Mary"), adapter.to_single_token(" John")
    metric = logit_difference(mary, john)
    found = activation_patching(adapter.model, clean, corrupted, metric, "z", ("layer", "head"))
    layers = hf.model.layers

    def run(tokens: list[int], layer: int | None, hook: Any) -> float:
        handle = None if layer is None else layers[layer].self_attn.o_proj.register_forward_pre_hook(hook)
        with torch.no_grad():
            logits = hf(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        if handle is not None:
            handle.remove()
        return float(logits[mary] - logits[john])

    seen: dict[int, torch.Tensor] = {}
    chosen = ((23, 3), (29, 1), (24, 4), (29, 0), (0, 0), (5, 8), (12, 2), (17, 6), (20, 5), (22, 0), (26, 7), (28, 1))
    for layer in {layer for layer, _ in chosen}:
        run(clean, layer, lambda _, args, layer=layer: seen.update({layer: args[0].clone()}))

    def patch(layer: int, head: int) -> Any:
        def hook(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            z = args[0].clone()
            z[..., 64 * head : 64 * (head + 1)] = seen[layer][..., 64 * head : 64 * (head + 1)]
            return (z,)

        return hook

    theirs = [run(corrupted, layer, patch(layer, head)) for layer, head in chosen]
    ours = [float(found.patched[place]) for place in chosen]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
    assert float(found.corrupted) == pytest.approx(run(corrupted, None, None), abs=1e-3)
    recovered = np.asarray(found.recovery)
    assert abs(recovered[23, 3] - 0.58) < 0.01 and abs(recovered[29, 1] - 0.27) < 0.01
    assert recovered[24, 4] < -0.05 and recovered[29, 0] < -0.05
    assert_leads(recovered.ravel())
    assert np.unravel_index(recovered.argmax(), recovered.shape) == (23, 3)


def test_texts_of_other_lengths_are_refused(trained: LlamaAttentionAdapter) -> None:
    metric = logit_difference(trained.to_single_token("Mary"), trained.to_single_token("John"))
    with pytest.raises(ValueError, match="has 15 tokens and the corrupted one 17"):
        CausalTracer(trained).trace(IOI.format("John"), IOI.format("John and Anna"), metric)
