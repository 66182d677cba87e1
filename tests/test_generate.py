"""Decoding: the cache against repeated full passes, interventions at every token, variants, stops."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import forward, generate
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
    """Greedy decoding by running the whole text anew for every token, padded to one length; `interventions` are for that.

    Every token leads the next by more than two roundings differ, so that whoever decodes greedily must write the same.
    """
    tokens = np.zeros(len(ids) + n, np.int32)
    tokens[: len(ids)] = ids
    for length in range(len(ids), len(ids) + n):
        mask = np.arange(len(tokens)) < length
        logits = forward(model, tokens, interventions, logits="last", mask=mask).logits
        assert_leads(logits, margin=margin)
        tokens[length] = int(logits.argmax())
    return list(map(int, tokens[len(ids) :]))


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
# What generate is given; and what a pass over all T + N tokens is given, where that has to be written otherwise.
CASES: dict[str, tuple[Any, ...]] = {
    "none": ((),),
    "head": (HeadAblation(1, 2),),
    "head mask": (Blend("z", KEEP, PerLayer(MEAN)),),
    "queries": (QScaler(0, 3, 4.0),),
    "keys": (KScaler(1, 1, -3.0),),
    "spectra": (SpectraScaler(2, 0, 5.0),),
    "steer": (Steer(1, VECTOR, 2.0),),
    "steer in the new tokens": (Steer(1, VECTOR, 2.0, positions=[8, 9, 12]), Steer(1, VECTOR, 2.0, positions=at(8, 9, 12))),
    "direction": (DirectionAblation("resid_post", 0, VECTOR),),
    "patch": (ActivationPatch("resid_mid", 1, PATCH), ActivationPatch("resid_mid", 1, LONGER, positions=FIRST)),
    "a run in some layers": (
        ActivationPatch("resid_pre", [1, 2], PerLayer(np.stack([PATCH] * L))),
        ActivationPatch("resid_pre", [1, 2], PerLayer(np.stack([LONGER] * L)), positions=FIRST),
    ),
    "dense": (Edit("mlp_out", "add", None, value=np.stack([PATCH] * L)),
              Edit("mlp_out", "add", None, np.stack([FIRST] * L)[:, :, None], np.stack([LONGER] * L))),
    "mask": (Edit("attn_out", "scale", 0, FIRST[:T, None], 3.0), Edit("attn_out", "scale", 0, FIRST[:, None], 3.0)),
    "knock-out": (AttentionKnockout(0, 1, [5, 6, 8, 11], [0, 1]), AttentionKnockout(0, 1, at(5, 6, 8, 11), [0, 1])),
    "neuron": (Ablation("act", 2, 5),),
    "apply": (Edit("z", "apply", 1, True, 2.0, negate),),
    "subspace": (Edit("resid_mid", "apply", 1, True, np.linalg.qr(RNG.normal(size=(E, T)))[0].T.astype(np.float32), outside),),
    "subspace as long as the text": (Edit("resid_mid", "apply", 1, True, np.linalg.qr(RNG.normal(size=(E, T + N)))[0].T.astype(np.float32), outside),),
    "pair": (Edit("resid_mid", "apply", 1, True, (VECTOR.astype(np.float32), np.float32(2.0)), lambda x, v: x + (v[1] * v[0])[None]),),
    "norm": (Edit("final_norm", "scale", None, value=RNG.normal(size=(1, E))),),
    "several": ([HeadAblation(0, 0), Steer(2, VECTOR)],),
}  # fmt: skip
PLAIN = slow(())


@pytest.mark.numerical
@pytest.mark.parametrize("name", CASES)
def test_decoding_with_the_cache_is_running_everything_anew(name: str) -> None:
    given, full = CASES[name][0], CASES[name][-1]
    want = slow(full)
    np.testing.assert_array_equal(generate(MODEL, IDS, N, given), want)
    assert name == "none" or want != PLAIN  # the intervention matters, so leaving it out would show


@pytest.mark.numerical
@pytest.mark.parametrize("rope", ["llama3", "dynamic", "longrope"])
def test_every_kind_of_attention_and_of_rotation(rope: str) -> None:
    """Past the original context too, where two types turn every key anew; and what comes never hangs on how much may come."""
    scaling = {"llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
               "dynamic": {"rope_type": "dynamic", "factor": 4.0},
               "longrope": {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 10, "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 4.0, 9.0]}}[rope]  # fmt: skip
    longest = 10 if rope == "dynamic" else 64
    for kv_heads in (1, 4):
        model = tiny_llama(
            3,
            num_key_value_heads=kv_heads,
            rope_scaling=scaling,
            attention_bias=True,
            mlp_bias=True,
            max_position_embeddings=longest,
        )
        want = slow((), model)
        np.testing.assert_array_equal(generate(model, IDS, N), want)
        np.testing.assert_array_equal(generate(model, IDS, 2), want[:2])
    steer = Steer(1, VECTOR, 2.0, positions=[3, 8])
    np.testing.assert_array_equal(
        generate(model, IDS, N, steer), slow(Steer(1, VECTOR, 2.0, positions=at(3, 8)), model)
    )


def test_an_array_along_a_prompt_of_one_token_leaves_the_new_ones_alone() -> None:
    one = IDS[:1]
    own = forward(MODEL, one, capture="resid_pre").activations["resid_pre"]  # [L, 1, E]
    np.testing.assert_array_equal(
        generate(MODEL, one, N, ActivationPatch("resid_pre", 1, PerLayer(own))), slow((), ids=one)
    )
    edit = Edit("attn_out", "scale", 0, np.array([[True]]), 9.0)
    np.testing.assert_array_equal(
        generate(MODEL, one, N, edit), slow(Edit("attn_out", "scale", 0, (np.arange(N + 1) < 1)[:, None], 9.0), ids=one)
    )


@pytest.mark.numerical
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_nothing(side: str) -> None:
    before, after = {"left": (3, 0), "right": (0, 4), "both": (2, 1)}[side]
    tokens, mask = np.pad(IDS, (before, after), constant_values=3), np.pad(np.ones(T, bool), (before, after))
    for name in ("none", "steer in the new tokens", "knock-out", "head mask"):
        given = CASES[name][0]
        np.testing.assert_array_equal(generate(MODEL, tokens, N, given, mask=mask), slow(CASES[name][-1]))


def test_variants_are_their_single_runs() -> None:
    alphas = np.array([0.2, 1.0, 4.0, 9.0], np.float32)
    together = generate(MODEL, IDS, N, SpectraScaler(2, 0, alphas))
    assert together.shape == (4, N)
    for row, alpha in zip(together, alphas, strict=True):
        single = generate(MODEL, IDS, N, SpectraScaler(2, 0, alpha))
        np.testing.assert_array_equal(single, slow(SpectraScaler(2, 0, alpha)))
        np.testing.assert_array_equal(row, single)
    assert len({tuple(map(int, row)) for row in together}) > 1
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(3, E)) * 4
    several = generate(MODEL, IDS, N, [Steer(np.array([0, 1, 2]), vectors, 2.0), HeadAblation(0, 1)])
    for layer, row in enumerate(several):
        given = [Steer(layer, vectors[layer], 2.0), HeadAblation(0, 1)]
        single = generate(MODEL, IDS, N, given)
        np.testing.assert_array_equal(single, slow(given))
        np.testing.assert_array_equal(row, single)
    pair = CASES["pair"][0]
    shared = generate(MODEL, IDS, N, [pair, SpectraScaler(2, 0, np.array([1.0, 5.0]))])
    np.testing.assert_array_equal(shared[0], slow(pair))
    dense = Edit(
        "mlp_out", "add", None, True, rng.normal(size=(L, 1, E))
    )  # leads with L, which is also how many variants there are
    rows = generate(MODEL, IDS, N, [dense, QScaler(0, 1, np.array([1.0, 2.0, 3.0]))])
    np.testing.assert_array_equal(rows[0], slow(dense))
    assert generate(MODEL, IDS, N, SpectraScaler(2, 0, np.ones(1))).shape == (1, N)
    sites = generate(MODEL, IDS, N, Steer(1, VECTOR, 3.0, positions=np.array([0, 6, 9])))
    single = generate(MODEL, IDS, N, Steer(1, VECTOR, 3.0, positions=9))
    np.testing.assert_array_equal(single, slow(Steer(1, VECTOR, 3.0, positions=at(9))))
    np.testing.assert_array_equal(sites[2], single)


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
    model = tiny_llama(1, eos_token_id=PLAIN[3], pad_token_id=60)
    cut = PLAIN.index(PLAIN[3]) + 1
    np.testing.assert_array_equal(generate(model, IDS, N), PLAIN[:cut] + [60] * (N - cut))
    np.testing.assert_array_equal(generate(model, IDS, N, stop_tokens=()), PLAIN)
    np.testing.assert_array_equal(generate(MODEL, IDS, N, stop_tokens=[PLAIN[0], 7]), [PLAIN[0]] + [0] * (N - 1))
    rows = generate(MODEL, IDS, N, SpectraScaler(2, 0, np.array([1.0, 5.0])), stop_tokens=PLAIN[3])
    other = slow(CASES["spectra"][0])
    assert PLAIN[3] not in other  # the one goes on while the other has stopped
    np.testing.assert_array_equal(rows[1], other)
    np.testing.assert_array_equal(rows[0], PLAIN[:cut] + [0] * (N - cut))


@pytest.mark.quick
def test_the_capture_is_of_the_intervened_run() -> None:
    given, full = CASES["patch"]
    ids, found = generate(MODEL, IDS, N, given, capture=("resid_post", "pattern"))
    text = [*map(int, IDS), *map(int, ids)]
    want = forward(MODEL, text, full, capture=("resid_post", "pattern")).activations
    for site in want:
        near(found[site], want[site], ROUTES)
    rows, found = generate(MODEL, IDS, N, QScaler(0, 3, np.array([1.0, 4.0])), capture="z")
    assert rows.shape == (2, N) and found["z"].shape == (2, L, H, T + N, D)


def test_ids_that_only_the_device_sees_and_that_are_none_give_none() -> None:
    for options in ({}, {"temperature": 1.0, "key": jax.random.key(0)}):
        np.testing.assert_array_equal(generate(MODEL, jnp.array([1, 99]), 3, **options), [-1, -1, -1])


# The margins are what these models' logits err by from float32's with the same weights, at most, rounded up.
@pytest.mark.parametrize(("dtype", "margin"), [("bfloat16", 0.15), ("float16", 0.02)])
def test_half_precision_models_keep_their_cache_in_it(dtype: str, margin: float) -> None:
    ids = prompt(T, seed=7)
    for name, seed in (("steer", 53), ("knock-out", 55)):  # every token of theirs leads by nearly twice as much
        model = tiny_llama(seed, dtype=jnp.dtype(dtype))
        want = slow(CASES[name][-1], model, ids, margin=margin)
        np.testing.assert_array_equal(generate(model, ids, N, CASES[name][0]), want)


def test_under_jit_and_vmap() -> None:
    alphas = jnp.array([1.0, 5.0])
    rows = jax.jit(jax.vmap(lambda a: generate(MODEL, IDS, N, SpectraScaler(2, 0, a))))(alphas)
    np.testing.assert_array_equal(rows, [PLAIN, slow(CASES["spectra"][0])])


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
    """Hugging Face decodes the plain run and three changed ones at once: a row each, which hooks change by themselves."""
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama.modeling_llama import repeat_kv

    vector = np.random.default_rng(0).normal(size=576).astype(np.float32)
    kinds = [(), HeadAblation(17, 3), SpectraScaler(15, 5, 4.0), Steer(12, vector, 1.5)]
    HEAD, SPECTRA, STEER = 1, 2, 3

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
    ids = torch.tensor([adapter.tokenizer.encode(FRANCE)] * len(kinds))
    try:
        with torch.no_grad():
            want = hf.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(ids),
                               output_logits=True, return_dict_in_generate=True)  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()
        hf.set_attn_implementation(before)
    assert_leads(torch.stack(want.logits).numpy())
    for interventions, row in zip(kinds, want.sequences.numpy(), strict=True):
        found = adapter.model.generate(ids[:1].tolist(), 64, interventions, stop_tokens=())
        np.testing.assert_array_equal(found[0], row)
    assert len({tuple(row) for row in want.sequences.tolist()}) == len(kinds)
