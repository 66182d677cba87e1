"""Decoding: the cache against repeated full passes, interventions at every token, variants, stops."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import forward, generate, padded
from oculi_jax.intervention import (
    Ablation,
    ActivationPatch,
    AttentionKnockout,
    Blend,
    DirectionAblation,
    Edit,
    HeadAblation,
    InterventionContext,
    KScaler,
    PerLayer,
    PerPrompt,
    QScaler,
    SpectraScaler,
    Steer,
)
from oculi_jax.models.llama import LlamaAttentionAdapter

from .margins import assert_leads
from .prompts import FRANCE
from .test_forward_laws import near
from .tiny import prompt, tiny_llama
from .tolerances import MARGIN, ROUTES

T, N, L, H, E, D, V = 7, 10, 3, 4, 24, 6, 61
MODEL = tiny_llama(1)
IDS = prompt(T, seed=5)
RNG = np.random.default_rng(0)
VECTOR, PATCH, MEAN = RNG.normal(size=E) * 3, RNG.normal(size=(T, E)), RNG.normal(size=(L, H, 1, D))
KEEP = (RNG.random((L, H)) > 0.4).astype(np.float32)


def slow(interventions: Any, model: Any = MODEL, ids: Any = IDS, n: int = N, margin: float = MARGIN) -> list[int]:
    """Greedy decoding by running the whole text anew for every token, padded to `T + N` slots; `interventions` are for that.

    Every token leads the next by more than two roundings differ, so that whoever decodes greedily must write the same.
    """
    tokens = np.zeros(max(len(ids) + n, T + N), np.int32)
    tokens[: len(ids)] = ids
    for length in range(len(ids), len(ids) + n):
        mask = np.arange(len(tokens)) < length
        logits = forward(model, tokens, interventions, logits="last", mask=mask).logits
        assert_leads(logits, margin=margin)
        tokens[length] = int(logits.argmax())
    return list(map(int, tokens[len(ids) : len(ids) + n]))


def assert_drawn(new: Any, key: Any, temperature: float, ids: Any = IDS) -> None:
    """`new` is what a pass over the whole text draws, and would be if its logits had come out a margin lower."""
    logits = np.array(forward(MODEL, [*map(int, ids), *map(int, new)]).logits[len(ids) - 1 : -1], np.float64)
    logits[np.arange(len(new)), np.asarray(new)] -= MARGIN
    for step, row in enumerate(logits / temperature):
        assert jax.random.categorical(jax.random.fold_in(key, step), jnp.float32(row)) == new[step], step


def at(*positions: int) -> np.ndarray:
    return np.isin(np.arange(T + N), positions)


def negate(x: Any, value: Any) -> Any:
    return -x * value


def outside(x: Any, basis: Any) -> Any:
    return x - (x.astype(jnp.float32) @ basis.T) @ basis


FIRST = np.arange(T + N) < T
LONGER = np.pad(PATCH, ((0, N), (0, 0)), constant_values=1.0)
BASES = [np.linalg.qr(RNG.normal(size=(E, n)))[0].T.astype(np.float32) for n in (T, T + N)]
PAIR = (VECTOR.astype(np.float32), np.float32(2.0))
NORM = RNG.normal(size=(1, E)).astype(np.float32)
STACK = np.stack([PATCH] * L).astype(np.float32)


def moved(x: Any, value: Any) -> Any:
    return x + (value[1] * value[0])[None]


def each(on: Any, make: Callable[[Any], Any]) -> Any:
    """What is made of a number, or of each variant's own."""
    return jax.vmap(make)(on) if on.ndim else make(on)


def layers(on: Any, *chosen: int) -> Any:
    """The table `[…, L]` of an intervention's layers where it is on, and of none where it is off."""
    return each(on, lambda one: (one > 0) & np.isin(np.arange(L), chosen))


# What generate is given; and what a pass over all T + N tokens is given, where that has to be written otherwise.
# `on` is 1 or 0 in float32, a number or one for each variant: data, so that one program serves them all.
CASES: dict[str, tuple[Callable[[Any], Any], ...]] = {
    "head": (lambda on: HeadAblation(layers(on, 1), 2),),
    "head mask": (lambda on: Blend("z", each(on, lambda one: 1 - one * (1 - KEEP)), PerLayer(MEAN)),),
    "queries": (lambda on: QScaler(layers(on, 0), 3, 4.0),),
    "keys": (lambda on: KScaler(layers(on, 1), 1, -3.0),),
    "spectra": (lambda on: SpectraScaler(layers(on, 2), 0, 5.0),),
    "steer": (lambda on: Steer(layers(on, 1), VECTOR, 2.0),),
    "steer in the new tokens": (lambda on: Steer(layers(on, 1), VECTOR, 2.0, positions=[8, 9, 12]),
                                lambda on: Steer(layers(on, 1), VECTOR, 2.0, positions=at(8, 9, 12))),
    "direction": (lambda on: DirectionAblation("resid_post", layers(on, 0), VECTOR),),
    "knock-out": (lambda on: AttentionKnockout(layers(on, 0), 1, [5, 6, 8, 11], [0, 1]),
                  lambda on: AttentionKnockout(layers(on, 0), 1, at(5, 6, 8, 11), [0, 1])),
    "neuron": (lambda on: Ablation("act", layers(on, 2), 5),),
    "apply": (lambda on: Edit("z", "apply", layers(on, 1), True, 2.0, negate),),
    "pair": (lambda on: Edit("resid_mid", "apply", layers(on, 1), True, PAIR, moved),),
    "norm": (lambda on: Edit("final_norm", "scale", None, value=each(on, lambda one: 1 + one * (NORM - 1))),),
    "subspace": (lambda on: Edit("resid_mid", "apply", layers(on, 1), True, BASES[0], outside),),
    "subspace as long as the text": (lambda on: Edit("resid_mid", "apply", layers(on, 1), True, BASES[1], outside),),
    "patch": (lambda on: ActivationPatch("resid_mid", layers(on, 1), PATCH),
              lambda on: ActivationPatch("resid_mid", layers(on, 1), LONGER, positions=FIRST)),
    "a run in some layers": (lambda on: ActivationPatch("resid_pre", layers(on, 1, 2), PerLayer(STACK)),
                             lambda on: ActivationPatch("resid_pre", layers(on, 1, 2), PerLayer(np.stack([LONGER] * L)), positions=FIRST)),
    "dense": (lambda on: Edit("mlp_out", "add", None, value=each(on, lambda one: one * STACK)),
              lambda on: Edit("mlp_out", "add", None, np.stack([FIRST] * L)[:, :, None], on * np.pad(STACK, ((0, 0), (0, N), (0, 0))))),
    "mask": (lambda on: Edit("attn_out", "scale", layers(on, 0), FIRST[:T, None], 3.0),
             lambda on: Edit("attn_out", "scale", layers(on, 0), FIRST[:, None], 3.0)),
}  # fmt: skip
# Those that hold no array along the prompt, and so are of prompts of any length.
ANYWHERE = tuple(CASES)[: tuple(CASES).index("patch")]


def written(names: Sequence[str], tokens: Any, mask: Any = None) -> np.ndarray:
    """What is generated under the cases as one family: variant n has the n-th alone, and the last has none.

    In a trace, where a table of layers may be empty.
    """

    def variants(on: Any) -> Any:
        return generate(MODEL, tokens, N, [CASES[name][0](on[:, i]) for i, name in enumerate(names)], mask=mask)

    return np.asarray(jax.jit(variants)(np.eye(len(names) + 1, dtype=np.float32)))


def assert_greedy(names: Sequence[str], rows: Any) -> None:
    """What was `written` is, token by token, the likeliest after a pass over the whole text, by more than rounding."""

    @jax.jit
    @jax.vmap
    def logits(on: Any, text: Any) -> Any:
        return forward(MODEL, text, [CASES[name][-1](on[i]) for i, name in enumerate(names)]).logits

    texts = np.concatenate([np.broadcast_to(IDS, (len(rows), T)), rows], axis=1)
    found = np.asarray(logits(np.eye(len(rows), dtype=np.float32), texts))[:, T - 1 : -1]
    assert_leads(found)
    for name, row, want in zip((*names, "none"), rows, found.argmax(axis=-1), strict=True):
        np.testing.assert_array_equal(row, want, err_msg=name)


PLAIN = slow(())


@pytest.mark.numerical
def test_decoding_with_the_cache_is_running_everything_anew() -> None:
    rows = written(tuple(CASES), IDS)
    assert_greedy(tuple(CASES), rows)
    for name, row in zip(CASES, rows[:-1], strict=True):
        assert row.tolist() != PLAIN, name  # the intervention matters, so leaving it out would show
    np.testing.assert_array_equal(rows[-1], PLAIN)
    np.testing.assert_array_equal(generate(MODEL, IDS, N), PLAIN)


@pytest.mark.numerical
@pytest.mark.parametrize("rope", ["llama3", "dynamic", "longrope"])
def test_every_kind_of_attention_and_of_rotation(rope: str) -> None:
    """Past the original context too, where two types turn every key anew; and what comes never hangs on how much may come."""
    scaling = {"llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
               "dynamic": {"rope_type": "dynamic", "factor": 4.0},
               "longrope": {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 10, "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 4.0, 9.0]}}[rope]  # fmt: skip
    longest = 10 if rope == "dynamic" else 64
    for kv_heads in {"llama3": (1, 4), "dynamic": (4,), "longrope": (1,)}[rope]:
        model = tiny_llama(
            3,
            num_key_value_heads=kv_heads,
            rope_scaling=scaling,
            attention_bias=True,
            mlp_bias=True,
            max_position_embeddings=longest,
        )
        for strength in (0.0, 2.0):
            want = slow(Steer(1, VECTOR, strength, positions=at(3, 8)), model)
            for n in (N,) if rope == "llama3" else (N, 2):
                found = generate(model, IDS, n, Steer(1, VECTOR, strength, positions=[3, 8]))
                np.testing.assert_array_equal(found, want[:n])


def test_an_array_along_a_prompt_of_one_token_leaves_the_new_ones_alone() -> None:
    one = IDS[:1]
    own = forward(MODEL, one, capture="resid_pre").activations["resid_pre"]  # [L, 1, E]
    given = [ActivationPatch("resid_pre", 1, PerLayer(own)), Edit("attn_out", "scale", 0, np.array([[True]]), 9.0)]
    held = ActivationPatch("resid_pre", 1, PerLayer(np.pad(own, ((0, 0), (0, T + N - 1), (0, 0)))), positions=at(0))
    want = slow([held, Edit("attn_out", "scale", 0, at(0)[:, None], 9.0)], ids=one)
    np.testing.assert_array_equal(generate(MODEL, one, N, given), want)


@pytest.mark.numerical
def test_padding_changes_nothing() -> None:
    sides = {"left": (4, 0), "right": (0, 4), "both": (3, 1)}
    tokens = np.stack([np.pad(IDS, side, constant_values=3) for side in sides.values()])
    mask = np.stack([np.pad(np.ones(T, bool), side) for side in sides.values()])
    rows = written(ANYWHERE, tokens, mask)
    assert_greedy(ANYWHERE, rows[0])
    for side, found in zip(sides, rows, strict=True):
        np.testing.assert_array_equal(found, rows[0], err_msg=side)
    np.testing.assert_array_equal(rows[0, -1], PLAIN)
    steer = Steer(1, VECTOR, 2.0, positions=[8, 9, 12])  # a single prompt, and no variants
    want = rows[0, ANYWHERE.index("steer in the new tokens")]
    for ids, real in zip(tokens, mask, strict=True):
        np.testing.assert_array_equal(generate(MODEL, ids, N, steer, mask=real), want)


def test_variants_are_their_single_runs() -> None:
    alphas = np.array([0.2, 1.0, 4.0, 9.0], np.float32)
    together = generate(MODEL, IDS, N, SpectraScaler(2, 0, alphas))
    assert together.shape == (4, N)
    for row, alpha in zip(together, alphas, strict=True):
        single = generate(MODEL, IDS, N, SpectraScaler(2, 0, alpha))
        np.testing.assert_array_equal(single, slow(SpectraScaler(2, 0, alpha)))
        np.testing.assert_array_equal(row, single)
    assert len({tuple(map(int, row)) for row in together}) > 1
    # Neither the pair of arrays nor what leads with L, which is also how many variants there are, is the variants'.
    rng = np.random.default_rng(1)
    vectors, places = rng.normal(size=(3, E)) * 4, (0, 6, 9)
    shared = [
        Edit("resid_mid", "apply", 1, True, PAIR, moved),
        Edit("mlp_out", "add", None, True, rng.normal(size=(L, 1, E))),
        HeadAblation(0, 1),
    ]
    several = generate(MODEL, IDS, N, [*shared, Steer(np.arange(3), vectors, 2.0, positions=np.array(places))])
    for layer, row in enumerate(several):
        steer = Steer(layer, vectors[layer], 2.0, positions=at(places[layer]))
        np.testing.assert_array_equal(row, slow([*shared, steer]))
    one = jax.eval_shape(lambda: generate(MODEL, IDS, N, SpectraScaler(2, 0, np.ones(1))))
    assert one.shape == (1, N)


@pytest.mark.numerical
def test_prompts_under_variants_are_their_single_runs() -> None:
    """On either side of the padding; each prompt has its own positions and vector, all share the strengths."""
    short, strengths = prompt(4, seed=8), np.array([1.0, 5.0], np.float32)
    vectors, positions = RNG.normal(size=(2, E)) * 3, [[3, 9], [1, 5]]
    family = [SpectraScaler(2, 0, strengths), Steer(1, PerPrompt(vectors), 2.0, positions=PerPrompt(positions))]
    tokens, mask = padded([IDS, short])
    left = np.stack([IDS, np.pad(short, (3, 0))]), np.stack([mask[0], mask[1, ::-1]])
    found, seen = generate(MODEL, tokens, N, family, mask=mask, capture="resid_post")
    assert found.shape == (2, 2, N) and seen["resid_post"].shape == (2, 2, L, T + N, E)
    np.testing.assert_array_equal(generate(MODEL, left[0], N, family, mask=left[1], capture="resid_post")[0], found)
    for i, ids in enumerate((IDS, short)):
        for j, alpha in enumerate(strengths):
            one = [SpectraScaler(2, 0, alpha), Steer(1, vectors[i], 2.0, positions=at(*positions[i]))]
            np.testing.assert_array_equal(found[i, j], slow(one, ids=ids))
            length = len(ids) + N
            text, real = np.pad([*ids, *found[i, j]], (0, T + N - length)), np.arange(T + N) < length
            want = forward(MODEL, text, one, mask=real, capture="resid_post")["resid_post"]
            near(seen["resid_post"][i, j][:, np.r_[: len(ids), T : T + N]], want[:, :length], ROUTES)
    np.testing.assert_array_equal(generate(MODEL, IDS[None], N), [PLAIN])
    assert len({tuple(map(int, row)) for row in found.reshape(4, N)}) == 4


def test_a_prompt_draws_as_its_number_says_whatever_the_others_are() -> None:
    options = {"temperature": 3.0, "stop_tokens": ()}
    tokens = np.stack([IDS, prompt(T, seed=6), IDS])
    found = generate(MODEL, tokens, N, SpectraScaler(2, 0, np.ones(2)), key=jax.random.key(1), **options)
    np.testing.assert_array_equal(found[:, 0], found[:, 1])  # variants that are the same draw alike
    assert (found[0] != found[2]).any()
    for ids, rows, key in zip(tokens, found, jax.random.split(jax.random.key(1), 3), strict=True):
        assert_drawn(rows[0], key, 3.0, ids)
    others = generate(MODEL, tokens[[0, 1, 1]], N, SpectraScaler(2, 0, np.ones(2)), key=jax.random.key(1), **options)
    np.testing.assert_array_equal(others[:2], found[:2])
    assert (others[2] != found[2]).any()


@pytest.mark.quick
def test_axes_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Steer.layer \[3\], Steer.vector \[3, \d+\]"):
        generate(MODEL, IDS, N, Steer(np.array([2, 1, 0]), np.stack([PATCH] * 3), np.ones(3)))
    with pytest.raises(ValueError, match=r"Steer.vector \[5\], Steer.scale \[4\]"):
        generate(MODEL, IDS, N, Steer(1, np.ones((5, E)), np.ones(4)))
    with pytest.raises(
        ValueError, match=r"do not broadcast together: SpectraScaler.layer \[2\], SpectraScaler.alpha \[3\]"
    ):
        generate(MODEL, IDS, N, SpectraScaler(np.array([0, 1]), 0, np.array([1.0, 2.0, 3.0])))
    for head in (np.array([0, 9]), jnp.array([0, 9])):
        with pytest.raises(ValueError, match=r"head is 9 at \[1\], but there are 4 query heads"):
            generate(MODEL, IDS, N, HeadAblation(0, head))
    with pytest.raises(ValueError, match=r"axes \[2, 2\]"):
        generate(MODEL, IDS, N, SpectraScaler(0, 0, np.ones((2, 2))))


def test_a_row_that_stops_is_filled_with_the_pad_id_and_the_others_go_on() -> None:
    unused = min(set(range(V)) - set(PLAIN))
    model = tiny_llama(1, eos_token_id=[PLAIN[3], unused], pad_token_id=60)
    cut = PLAIN.index(PLAIN[3]) + 1
    np.testing.assert_array_equal(generate(model, IDS, N), PLAIN[:cut] + [60] * (N - cut))
    np.testing.assert_array_equal(generate(model, IDS, N, stop_tokens=()), PLAIN)
    np.testing.assert_array_equal(generate(model, IDS, N, stop_tokens=[PLAIN[0], unused]), [PLAIN[0]] + [60] * (N - 1))
    rows = generate(MODEL, IDS, N, SpectraScaler(2, 0, np.array([1.0, 5.0])), stop_tokens=PLAIN[3])
    other = slow(SpectraScaler(2, 0, 5.0))
    assert PLAIN[3] not in other  # the one goes on while the other has stopped
    np.testing.assert_array_equal(rows[1], other)
    np.testing.assert_array_equal(rows[0], PLAIN[:cut] + [0] * (N - cut))


@pytest.mark.quick
def test_the_capture_is_of_the_intervened_run() -> None:
    given = ActivationPatch("resid_mid", 1, PATCH)
    full = ActivationPatch("resid_mid", 1, LONGER, positions=FIRST)
    ids, found = generate(MODEL, IDS, N, given, capture=("resid_post", "pattern"))
    text = [*map(int, IDS), *map(int, ids)]
    want = forward(MODEL, text, full, capture=("resid_post", "pattern")).activations
    for site in want:
        near(found[site], want[site], ROUTES)
    family = QScaler(0, 3, np.array([1.0, 4.0]))
    rows, found = jax.eval_shape(lambda: generate(MODEL, IDS, N, family, capture="z"))
    assert rows.shape == (2, N) and found["z"].shape == (2, L, H, T + N, D)


def test_ids_that_only_the_device_sees_and_that_are_none_give_none() -> None:
    for options in ({}, {"temperature": 1.0, "key": jax.random.key(0)}):
        np.testing.assert_array_equal(generate(MODEL, jnp.array([1, 99]), 3, **options), [-1, -1, -1])


def test_half_precision_models_keep_their_cache_in_it() -> None:
    """Every token leads by nearly twice what these models' logits err by from float32's with the same weights, at most."""
    ids, model, steer = prompt(T, seed=7), tiny_llama(53, dtype=jnp.bfloat16), Steer(1, VECTOR, 2.0)
    np.testing.assert_array_equal(generate(model, ids, N, steer), slow(steer, model, ids, margin=0.15))


def test_under_jit_and_vmap() -> None:
    alphas = jnp.array([1.0, 5.0])
    rows = jax.jit(jax.vmap(lambda a: generate(MODEL, IDS, N, SpectraScaler(2, 0, a))))(alphas)
    np.testing.assert_array_equal(rows, [PLAIN, slow(SpectraScaler(2, 0, 5.0))])


def test_other_numbers_are_no_other_program(caplog: pytest.LogCaptureFixture) -> None:
    adapter = LlamaAttentionAdapter(MODEL)

    def calls(number: int) -> None:
        key = jax.random.key(number)
        generate(
            MODEL,
            prompt(T, number),
            4,
            [SpectraScaler(number, number, 1.0 + number), Steer(number, VECTOR, number, positions=[number, 5])],
        )
        generate(MODEL, prompt(T, number), 4, temperature=0.5 + number, top_p=0.5 + number / 10, key=key)
        with InterventionContext(adapter, [HeadAblation(number, number)]):
            adapter.generate(prompt(13 + number % 2, number), 4)
            adapter.capture(prompt(13 + number % 2, number))

    calls(0)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        calls(1)
        calls(2)
    assert not [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]


def test_a_step_copies_no_cache_and_turns_no_weight() -> None:
    """In the optimised program every value as large as the caches, or as a layer's weights, is written in place or read."""
    model = tiny_llama(1, num_hidden_layers=5, num_key_value_heads=2)
    family = SpectraScaler(2, 0, np.ones(3))
    jax.config.update("jax_disable_most_optimizations", False)  # for this test
    text = jax.jit(lambda model, ids: generate(model, ids, 9, family)).lower(model, prompt(8)).compile().as_text()
    made = re.findall(r"= f32\[([\d,]+)\]\S* ([\w-]+)\(", text)
    made = [(sorted(n for n in map(int, shape.split(",")) if n > 1), kind) for shape, kind in made]
    shapes = {kind: [shape for shape, of in made if of == kind] for _, kind in made}
    cache, out = sorted([3, 5, 2, 17, D]), sorted([E, H, D])
    assert cache in shapes["dynamic-update-slice"]
    for kind in ("copy", "transpose", "select", "concatenate", "broadcast", "pad"):
        assert shapes.get(kind, []).count(cache) <= {"broadcast": 2, "pad": 2}.get(kind, 0), kind
    assert out not in shapes["copy"] and out not in shapes["transpose"]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(max_new_tokens=0), "at least 1"),
        (dict(max_new_tokens=2.5), "an integer is needed"),
        (dict(temperature=1.0), "give key=jax.random.key"),
        (dict(temperature=-1.0), "temperature is -1.0, and must be a finite number, 0"),
        (dict(temperature=1.0, key=3), "a JAX random key is needed"),
        (dict(temperature=1.0, key=jax.numpy.zeros(3)), "a JAX random key is needed"),
        (dict(top_p=0.5), "temperature is 0, which is greedy"),
        (dict(temperature=1.0, top_k=0), "top_k is 0"),
        (dict(temperature=1.0, top_p=1.5), "top_p is 1.5"),
        (dict(temperature=1.0, min_p=-0.1), "min_p is -0.1"),
        (dict(stop_tokens=[99]), "vocabulary has ids 0 to 60"),
        (dict(stop_tokens="</s>"), "a sequence of integers is needed"),
        (dict(interventions=Steer(0, VECTOR, positions=-1)), "positions count from the start"),
        (dict(interventions=Steer(0, VECTOR, positions=40)), "the prompt has 17 tokens"),
        (dict(interventions=HeadAblation(0, 9)), "there are 4 query heads"),
        (dict(mask=np.zeros(T, bool)), "no real token"),
        (dict(mask=np.ones(3, bool)), r"mask has shape \[3\], and tokens \[7\]"),
        (dict(mask=np.ones(T)), "bool is needed"),
        (dict(mask=np.ones((2, T), bool)), r"mask has shape \[2, 7\], and tokens \[7\]"),
        (dict(interventions=HeadAblation(0, PerPrompt([1, 2]))), "a PerPrompt of 2 entries, and there are 1 prompts"),
        (dict(max_new_tokens=58), "was made for at most 64"),
        (dict(stop_tokens=10**12), "vocabulary has ids 0 to 60"),
        (dict(capture="patern"), "did you mean 'pattern'"),
    ],
)
def test_what_cannot_be_generated_is_said(arguments: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        generate(MODEL, IDS, **{"max_new_tokens": N, **arguments})


# ---- a real model, against Hugging Face


@pytest.mark.numerical
@pytest.mark.real
@pytest.mark.torch
def test_greedy_ids_are_hugging_faces_over_64_tokens(adapter: LlamaAttentionAdapter, hf) -> None:
    """Hugging Face decodes the plain run and three changed ones at once: a row each, which hooks change by themselves.

    Ours are two programs: the plain run, and three variants whose strengths have an axis.
    """
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama.modeling_llama import repeat_kv

    vector = np.random.default_rng(0).normal(size=576).astype(np.float32)
    changed = [
        HeadAblation(17, 3),
        SpectraScaler(15, 5, np.array([1.0, 4.0, 1.0])),
        Steer(12, vector, np.array([0.0, 0.0, 1.5])),
    ]
    HEAD, SPECTRA, STEER = slice(1, None), 2, 3

    def ablate(module, args):
        z = args[0].clone()
        z[HEAD, :, 3 * 64 : 4 * 64] = 0
        return (z,)

    def steer(module, args):
        resid = args[0].clone()
        resid[STEER] += 1.5 * torch.tensor(vector)
        return (resid, *args[1:])

    def sharpen(module, query, key, value, attention_mask, scaling, **_):
        scores = torch.matmul(query, repeat_kv(key, 3).transpose(2, 3)) * scaling
        if module.layer_idx == 15:
            scores[SPECTRA, 5] = scores[SPECTRA, 5] * 4.0
        n = scores.shape[2]
        causal = torch.ones(n, scores.shape[3], dtype=torch.bool).tril(scores.shape[3] - n)
        pattern = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        return torch.matmul(pattern, repeat_kv(value, 3)).transpose(1, 2).contiguous(), pattern

    layers = hf.model.layers
    hooks = [layers[17].self_attn.o_proj.register_forward_pre_hook(ablate), layers[12].register_forward_pre_hook(steer)]
    before = hf.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register("sharpened", sharpen)
    hf.set_attn_implementation("sharpened")
    ids = torch.tensor([adapter.tokenizer.encode(FRANCE)] * 4)
    try:
        with torch.no_grad():
            want = hf.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(ids),
                               output_logits=True, return_dict_in_generate=True)  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()
        hf.set_attn_implementation(before)
    assert_leads(torch.stack(want.logits).numpy())
    plain, variants = (
        generate(adapter.model, ids[0].tolist(), 64, interventions, stop_tokens=()) for interventions in ((), changed)
    )
    np.testing.assert_array_equal([plain, *variants], want.sequences[:, ids.shape[1] :])
    assert len({tuple(row) for row in want.sequences.tolist()}) == 4
