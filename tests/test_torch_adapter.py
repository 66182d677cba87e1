"""The adapter over a Hugging Face module: captures, generation, contexts, and the module's own `generate` inside them."""

from __future__ import annotations

import copy
import io
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import CaptureConfig, LogitConfig, forward, generate, padded
from oculi_jax.analysis import EntropyAnalysis
from oculi_jax.decoding.sampling import sampler
from oculi_jax.intervention import (
    Ablation,
    ActivationPatch,
    AttentionKnockout,
    Blend,
    DirectionAblation,
    HeadAblation,
    InterventionContext,
    SpectraScaler,
    Steer,
)
from oculi_jax.models.llama import Llama, LlamaAttentionAdapter

from .margins import assert_apart, assert_clear, assert_leads
from .test_parity_torch import ROPES, make
from .tolerances import LOGITS, ROUTES

pytestmark = pytest.mark.torch

RNG = np.random.default_rng(5)
IDS = RNG.integers(0, 61, 9)
ROWS = [IDS.tolist(), RNG.integers(0, 61, 5).tolist()]
STRONG = [HeadAblation(0, 1), SpectraScaler(1, 2, 6.0), Steer(1, RNG.normal(size=24), 2.0, positions=[2, 8, 11])]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Llama]:
    directory = tmp_path_factory.mktemp("pair")
    hf = make(directory, head_dim=6, eos_token_id=None, pad_token_id=0, bos_token_id=None)
    return hf, Llama.from_pretrained(directory)


def logits_of(model: Llama, captured: Any, n_prompt: int) -> np.ndarray:
    """From `final_norm` of a finished text, the logits `[…, N, V]` that each of its new tokens was chosen by."""
    normalised = np.asarray(captured["final_norm"], np.float64)[..., n_prompt - 1 : -1, :]
    return normalised @ np.asarray(model.lm_head.weight, np.float64).T


def greedy_run(model: Llama, ids: Any, n_new: int, interventions: Any = (), **options: Any) -> tuple[Any, Any]:
    """JAX's greedy text, in which the likeliest token of every step is in no doubt, and what all tests read of such runs."""
    found, captured = generate(model, ids, n_new, interventions, capture=("z", "resid_post", "final_norm"), **options)
    assert_leads(logits_of(model, captured, len(ids)))
    return found, captured


def greedy(model: Llama, ids: Any, n_new: int, interventions: Any = (), **options: Any) -> np.ndarray:
    """JAX's greedy text alone."""
    return np.asarray(greedy_run(model, ids, n_new, interventions, **options)[0])


def chance_is_clear(
    model: Llama, text: Any, n_prompt: int, keys: Any, temperature: float = 1.3, **options: Any
) -> None:
    """The logits of JAX's drawn text leave no doubt which tokens the filters keep, nor which of those each key draws."""
    filters = sampler(temperature, options.get("top_k"), options.get("top_p"), options.get("min_p"), 61)
    _, captured = text
    for row, key in zip(logits_of(model, captured, n_prompt).reshape(len(keys), -1, 61), keys, strict=True):
        for step, logits in enumerate(row):
            warm = (logits - logits.max()) / temperature
            kept = np.isfinite(filters.filter(jnp.asarray(logits, jnp.float32)))
            # An edge is a rank among the logits, a sum of probabilities, or a logit: nothing lies near it.
            if kept.sum() < 61:
                assert_apart([warm[kept].min(), warm[~kept].max()])
            if "top_p" in options:
                chances = -np.sort(-np.exp(warm) / np.exp(warm).sum())
                assert_clear(np.cumsum(chances) - chances, options["top_p"])
            if "min_p" in options:
                assert_clear(warm, np.log(options["min_p"]))
            gumbel = np.asarray(jax.random.gumbel(jax.random.fold_in(key, step), (61,)))
            assert_leads((warm + gumbel)[kept])


def same(ours: Any, want: Any, tolerance: float = ROUTES) -> None:
    """Two captures are equal in structure, shapes and dtypes, and near in value where tokens are real."""
    mine, theirs = jax.tree_util.tree_leaves_with_path(ours), jax.tree_util.tree_leaves_with_path(want)
    assert jax.tree.structure(ours) == jax.tree.structure(want)
    for (path, x), (_, y) in zip(mine, theirs, strict=True):
        assert isinstance(x, jax.Array) and x.shape == y.shape and x.dtype == y.dtype, path
        assert np.abs(np.asarray(x, np.float32) - np.asarray(y, np.float32)).max() <= tolerance, path


@pytest.mark.parametrize("context", [(), STRONG[:2]])
def test_captures_are_those_of_jax(pair: tuple[Any, Llama], context: Any) -> None:
    ours, want = (LlamaAttentionAdapter(model) for model in pair)
    configs = {
        "capture": [None, CaptureConfig(layers=[1], qk_stage="pre_rope", dtype="float16")],
        "capture_residual": [None],
        "capture_mlp": [None],
        "capture_logits": [
            None,
            LogitConfig(layers=[1, 0], top_k=3, positions=[-1, 5]),
            LogitConfig(top_k=2, tokens=[5, 7]),
        ],
    }
    with InterventionContext(ours, context), InterventionContext(want, context):
        logits = np.asarray(want.capture_logits(IDS).logits)  # which ids are the likeliest is in no doubt below
        for top_k, of_interest in ((3, logits[:, [-1, 5]]), (2, logits), (3, logits[0, 1])):
            assert_leads(of_interest, top_k)
        for method, several in configs.items():
            for config in several:
                tolerance = 0.01 if config is not None and config.dtype == "float16" else ROUTES
                found = [getattr(adapter, method)(IDS, config) for adapter in (ours, want)]
                same(*found, tolerance)
                assert bool(found[0].mask.all())
        logits = LogitConfig(layers=[0], top_k=3, positions=[1])
        same(
            *(
                adapter.capture_full(IDS[None], logits=logits, attention=CaptureConfig(layers=[1]))
                for adapter in (ours, want)
            )
        )


def test_a_batch_is_captured_in_one_pass(pair: tuple[Any, Llama]) -> None:
    import torch

    ours, want = (LlamaAttentionAdapter(model).capture_full(ROWS) for model in pair)
    for part in ("attention", "residual", "mlp", "logits"):
        mine, theirs = getattr(ours, part), getattr(want, part)
        for row in range(2):
            alone = getattr(LlamaAttentionAdapter(pair[0]).capture_full(ROWS[row]), part)
            for name, value in vars(alone).items():
                if isinstance(value, jax.Array) and name not in (
                    "tokens",
                    "mask",
                    "unembedding",
                    "top_k_indices",
                    "final_weight",
                ):
                    n = len(ROWS[row])
                    sizes = [slice(n) if size == n else slice(None) for size in value.shape]
                    got, want_ = np.asarray(getattr(mine[row], name)), np.asarray(getattr(theirs[row], name))
                    assert got.shape == want_.shape
                    assert np.abs(got[tuple(sizes)] - want_[tuple(sizes)]).max() <= ROUTES, name
    assert not np.asarray(ours.attention.patterns)[1, :, :, 5:].any()
    ids = torch.tensor(ROWS[0])[None]
    assert LlamaAttentionAdapter(pair[0]).capture(ids).queries.shape == (2, 4, 9, 6)
    entropy = EntropyAnalysis.token_entropy(LlamaAttentionAdapter(pair[0]).capture(ids))
    assert (
        np.abs(np.asarray(entropy - EntropyAnalysis.token_entropy(LlamaAttentionAdapter(pair[1]).capture(IDS)))).max()
        <= ROUTES
    )


CASES: dict[str, Any] = {
    "none": (),
    "several": STRONG,
    "patterns": [Blend("z", RNG.random((2, 4))), AttentionKnockout(1, 0, [10, 11], [0, 9])],
    "a run": [ActivationPatch("resid_post", 0, RNG.normal(size=(9, 24)), positions=[1, 3, 10])],
    "scores of a run": [ActivationPatch("scores", 1, RNG.normal(size=(9, 9)), head=1)],
    "direction": [DirectionAblation("mlp_out", 1, RNG.normal(size=24))],
    "outside": [Steer(None, RNG.normal(size=24), 1.0, "embed", positions=[0, 10])],
}


@pytest.mark.numerical
@pytest.mark.parametrize("name", CASES)
def test_generation_is_that_of_jax(pair: tuple[Any, Llama], name: str) -> None:
    for mask in (None, np.arange(9) >= 2):
        want, theirs = greedy_run(pair[1], IDS, 8, CASES[name], mask=mask)
        ours, mine = generate(pair[0], IDS, 8, CASES[name], capture=("z", "resid_post"), mask=mask)
        assert ours.tolist() == want.tolist() and ours.dtype == want.dtype
        real = np.arange(17) >= (0 if mask is None else 2)
        for site in ("z", "resid_post"):
            error = np.abs(np.asarray(mine[site]) - np.asarray(theirs[site]))
            assert np.compress(real, error, axis=-2).max() <= ROUTES, site


def test_cached_decoding_is_running_anew_for_every_token(pair: tuple[Any, Llama]) -> None:
    text = IDS.tolist()
    for _ in range(8):
        logits = forward(pair[0], text, STRONG[:2]).logits[-1]
        assert_leads(logits)
        text.append(int(np.argmax(logits)))
    assert generate(pair[0], IDS, 8, STRONG[:2]).tolist() == text[9:]


def test_chance_is_the_keys_alone(pair: tuple[Any, Llama]) -> None:
    key = jax.random.key(4)
    for options in ({"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1, "top_k": 20}):  # and with none of them below
        ours = generate(pair[0], IDS, 8, temperature=1.3, key=key, **options)
        want = generate(pair[1], IDS, 8, temperature=1.3, key=key, capture="final_norm", **options)
        chance_is_clear(pair[1], want, 9, [key], **options)
        assert ours.tolist() == want[0].tolist()
    options = dict(temperature=1.0, key=key)
    want = LlamaAttentionAdapter(pair[1]).generate(ROWS, 5, capture="final_norm", **options)
    chance_is_clear(pair[1], want, 9, jax.random.split(key, 2), temperature=1.0)
    assert np.array_equal(LlamaAttentionAdapter(pair[0]).generate(ROWS, 5, **options), want[0])


def test_variants_stops_and_batches(pair: tuple[Any, Llama]) -> None:
    family = SpectraScaler(1, np.arange(4), np.array([1.0, 5.0, 0.1, 3.0]))
    assert np.array_equal(generate(pair[0], IDS, 6, family), greedy(pair[1], IDS, 6, family))
    plain = greedy(pair[1], IDS, 8)
    cut = plain.tolist().index(plain[2]) + 1
    stopped = generate(pair[0], IDS, 8, stop_tokens=int(plain[2]))
    assert stopped.tolist() == [*plain[:cut].tolist(), *[0] * (8 - cut)]
    want, theirs = LlamaAttentionAdapter(pair[1]).generate(ROWS, 5, STRONG[:1], capture=("final_norm", "resid_post"))
    assert_leads(logits_of(pair[1], theirs, 9))
    ours, mine = LlamaAttentionAdapter(pair[0]).generate(ROWS, 5, STRONG[:1], capture="resid_post")
    assert np.array_equal(ours, want)
    assert np.array_equal(LlamaAttentionAdapter(pair[0]).generate(ROWS, 5, STRONG[:1]), want)
    assert mine["resid_post"].shape == theirs["resid_post"].shape
    assert np.abs(np.asarray(mine["resid_post"] - theirs["resid_post"])[0]).max() <= ROUTES


def test_prompts_under_strengths_are_hugging_faces_rows(pair: tuple[Any, Llama]) -> None:
    """Its batch is padded on the left, each prompt once for each strength, and a hook adds to every row what is the row's."""
    import torch

    strengths, vector = np.array([0.0, 1.0, 2.0], np.float32), RNG.normal(size=24).astype(np.float32)
    tokens, mask = padded(ROWS)
    left, real = (
        np.stack([np.roll(row, n) for row, n in zip(x, 9 - mask.sum(1), strict=True)]) for x in (tokens, mask)
    )
    ids, allowed = (torch.tensor(np.repeat(x, 3, axis=0).astype(np.int64)) for x in (left, real))
    added = torch.tensor(np.tile(strengths, 2)[:, None, None] * vector)
    hook = pair[0].model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + added, *args[1:]))
    try:
        want = pair[0].generate(ids, attention_mask=allowed, max_new_tokens=6, do_sample=False, output_logits=True,
                                return_dict_in_generate=True)  # fmt: skip
    finally:
        hook.remove()
    assert_leads(torch.stack(want.logits).numpy())
    new = want.sequences[:, 9:].numpy().reshape(2, 3, 6)
    assert len(np.unique(new.reshape(6, 6), axis=0)) > 2
    for model in pair:
        for given in (dict(tokens=tokens, mask=mask), dict(tokens=left, mask=real)):
            found = generate(model, max_new_tokens=6, interventions=Steer(1, vector, strengths), **given)
            assert np.array_equal(found, new)
        whole = LlamaAttentionAdapter(model).generate(ROWS, 6, Steer(1, vector, strengths))
        assert np.array_equal(whole, want.sequences.numpy().reshape(2, 3, 15))


@pytest.mark.parametrize("rope", ["dynamic", "longrope", "yarn"])
def test_generation_past_the_original_context(tmp_path: Path, rope: str) -> None:
    hf = make(tmp_path, head_dim=6, rope_parameters=ROPES[rope], eos_token_id=None)
    ids = np.random.default_rng(0).integers(0, 61, 13)
    ours, want = (
        run(m, ids, 24, HeadAblation(0, 1), allow_longer=True)
        for run, m in ((generate, hf), (greedy, Llama.from_pretrained(tmp_path)))
    )
    assert ours.tolist() == want.tolist()


@pytest.mark.parametrize("name", CASES)
def test_the_modules_own_generate_is_intervened_inside_a_context(pair: tuple[Any, Llama], name: str) -> None:
    import torch

    hf, model = pair
    adapter = LlamaAttentionAdapter(hf)
    options: dict[str, Any] = dict(max_new_tokens=8, do_sample=False)
    before = hf.generate(torch.tensor(IDS)[None], **options)
    with InterventionContext(adapter, CASES[name]):
        found = hf.generate(torch.tensor(IDS)[None], **options)
    assert found[0].tolist() == [*IDS.tolist(), *greedy(model, IDS, 8, CASES[name]).tolist()]
    assert torch.equal(hf.generate(torch.tensor(IDS)[None], **options), before)


def test_an_array_covers_the_prompt_however_often_room_is_made(pair: tuple[Any, Llama], monkeypatch: Any) -> None:
    import torch

    from oculi_jax.backends.torch import hugging_face

    monkeypatch.setattr(hugging_face, "_ROOM", 2)
    for name in ("a run", "scores of a run", "several"):
        with InterventionContext(LlamaAttentionAdapter(pair[0]), later := _without_late_positions(CASES[name])):
            found = pair[0].generate(torch.tensor(IDS)[None], max_new_tokens=8, do_sample=False)
        assert found[0, 9:].tolist() == greedy(pair[1], IDS, 8, later).tolist()


def _without_late_positions(interventions: Any) -> Any:
    """Room of two tokens has no place for the positions of later ones."""
    early = [2, 3]
    return [replace(x, positions=early) if getattr(x, "positions", None) is not None else x for x in interventions]


def test_batches_beams_and_scores_of_the_modules_own_generate(pair: tuple[Any, Llama]) -> None:
    import torch

    hf, model = pair
    adapter = LlamaAttentionAdapter(hf)
    width = len(ROWS[0])
    ids = torch.tensor([[0] * (width - len(row)) + row for row in ROWS])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ROWS])
    want, captured = LlamaAttentionAdapter(model).generate(ROWS, 5, STRONG[:2], capture="final_norm")
    assert_leads(logits_of(model, captured, width))
    with InterventionContext(adapter, STRONG[:1]), InterventionContext(adapter, STRONG[1:2]):
        found = hf.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=5,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        logits = hf(ids[:1]).logits.detach()
        beams = hf.generate(ids[:1], max_new_tokens=4, num_beams=3, do_sample=False)
        with pytest.raises(NotImplementedError, match="inputs_embeds"):
            hf(inputs_embeds=torch.zeros(1, 2, 24))
        with pytest.raises(NotImplementedError, match="labels"):
            hf(ids, labels=ids)
    assert np.array_equal(found.sequences.numpy(), want)
    assert np.abs(logits[0].numpy() - np.asarray(forward(model, ROWS[0], STRONG[:2]).logits)).max() <= LOGITS
    assert np.abs(found.scores[0][0].numpy() - logits[0, -1].numpy()).max() <= LOGITS
    # A beam's tokens are the same continuation that a full run scores: its best beam is at least as likely as the greedy text.
    assert _score(model, beams[0].tolist()) >= _score(model, [*ROWS[0], *want[0, 9:13].tolist()]) - LOGITS


def _score(model: Llama, text: list[int]) -> float:
    logits = jax.nn.log_softmax(forward(model, text, STRONG[:2]).logits)
    return float(sum(logits[i - 1, text[i]] for i in range(len(ROWS[0]), len(text))))


def test_a_context_leaves_the_module_as_it_found_it(pair: tuple[Any, Llama]) -> None:
    import torch

    hf = pair[0]
    adapter, other = LlamaAttentionAdapter(hf), LlamaAttentionAdapter(hf)
    ids, before = torch.tensor(IDS)[None], set(vars(hf))
    plain = hf(ids).logits
    with pytest.raises(ZeroDivisionError), InterventionContext(adapter, STRONG), InterventionContext(other, STRONG[0]):
        raise ZeroDivisionError
    assert set(vars(hf)) == before and torch.equal(hf(ids).logits, plain)

    calls: list[int] = []
    own = hf.forward
    hf.forward = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)  # another library's
    wrapped = hf.forward
    try:
        one, two = InterventionContext(adapter, STRONG[0]), InterventionContext(adapter, STRONG[1])
        one.__enter__()
        two.__enter__()
        one.__exit__(None, None, None)  # not in the order of entering
        assert not torch.equal(hf(ids).logits, plain) and not calls
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(hf(ids).logits))
        thread.start()
        thread.join()
        assert torch.equal(found[0], plain) and calls == [1]  # elsewhere it is the module's own
        two.__exit__(None, None, None)
        assert hf.forward is wrapped
    finally:
        del hf.forward
    assert set(vars(hf)) == before


def test_rows_of_a_cache_may_be_repeated_and_selected(pair: tuple[Any, Llama]) -> None:
    import torch
    from transformers import DynamicCache

    hf, model = pair
    rows = [[0, 0, *ROWS[0][:4]], ROWS[0][:6]]
    ids, mask = torch.tensor(rows), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    for one in (HeadAblation(1, 2), Ablation("mlp_out", 0)):
        want = [
            np.asarray(forward(model, row, one, mask=m.numpy() == 1).logits) for row, m in zip(rows, mask, strict=True)
        ]
        with torch.no_grad(), InterventionContext(LlamaAttentionAdapter(hf), one):
            cache = DynamicCache(config=hf.config)
            hf(ids[1:, :3], past_key_values=cache)
            cache.batch_repeat_interleave(3)
            repeated = hf(ids[1:, 3:].repeat(3, 1), past_key_values=cache).logits.numpy()
            two = DynamicCache(config=hf.config)
            hf(
                ids[:, :3], cache=two, attention_mask=mask[:, :3]
            )  # both names are taken: that of transformers 5.24, and before it
            two.batch_select_indices(torch.tensor([1, 1, 0]))
            order = [1, 1, 0]
            selected = hf(ids[order, 3:], cache=two, attention_mask=mask[order]).logits.numpy()
        assert max(np.abs(got - want[1][3:]).max() for got in repeated) <= LOGITS
        assert max(np.abs(got - want[row][3:]).max() for got, row in zip(selected, order, strict=True)) <= LOGITS


def test_what_a_forward_inside_a_context_cannot_take_is_said(pair: tuple[Any, Llama], monkeypatch: Any) -> None:
    import torch

    hf, ids = pair[0], torch.tensor(IDS)[None]
    with InterventionContext(LlamaAttentionAdapter(hf), STRONG[0]):
        for mask in (torch.ones(1, 3), torch.ones(2, 9)):
            with pytest.raises(ValueError, match=r"attention_mask is \[\d, \d\], and \[1, 9\] is needed"):
                hf(ids, attention_mask=mask)
        for wrong in (ids[0], ids[:, :0]):
            with pytest.raises(ValueError, match=r"prompts \[B, T\] of one token or more"):
                hf(wrong)
        monkeypatch.setattr(hf.config, "output_hidden_states", True)
        with pytest.raises(NotImplementedError, match="no output_hidden_states, which its config asks for"):
            hf(ids)


def test_a_copy_made_inside_a_context_is_a_module_of_its_own(pair: tuple[Any, Llama]) -> None:
    import torch

    hf, ids = pair[0], torch.tensor(IDS)[None]
    plain = hf(ids).logits
    with InterventionContext(LlamaAttentionAdapter(hf), STRONG[0]):
        twin, file = copy.deepcopy(hf), io.BytesIO()
        torch.save(hf, file)
        assert torch.equal(twin(ids).logits, plain) and not torch.equal(hf(ids).logits, plain)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(ids).logits, plain)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert twin(ids).logits.abs().max() == 0 and torch.equal(hf(ids).logits, plain)


def test_what_is_done_to_forward_inside_a_context_stays(pair: tuple[Any, Llama]) -> None:
    hf, before = pair[0], set(vars(pair[0]))
    adapter = LlamaAttentionAdapter(hf)

    def mine(*args: Any, **kwargs: Any) -> Any:
        return type(hf).forward(hf, *args, **kwargs)

    try:
        with InterventionContext(adapter, STRONG[0]):
            hf.forward = mine
        assert hf.forward is mine
    finally:
        del hf.forward
    for _ in range(2):
        with InterventionContext(adapter, STRONG[0]):
            del hf.forward
    assert set(vars(hf)) == before


def test_positions_from_the_end_are_refused_while_text_grows(pair: tuple[Any, Llama]) -> None:
    import torch

    with (
        InterventionContext(LlamaAttentionAdapter(pair[0]), Steer(0, np.ones(24), positions=-1)),
        pytest.raises(ValueError, match="in generation positions count from the start"),
    ):
        pair[0].generate(torch.tensor(IDS)[None], max_new_tokens=2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_checkpoint_is_loaded_for_torch_without_transformers(tmp_path: Path, dtype: str) -> None:
    import torch

    hf = make(
        tmp_path, dtype, attention_bias=True, mlp_bias=True, hidden_act="xielu", tie_word_embeddings=dtype == "float32"
    )
    model = Llama.from_pretrained(tmp_path, backend="torch", device="cpu")
    assert model.dtype == dtype and model.device == torch.device("cpu") and "TorchDecoder(" in repr(model)
    mine, theirs = (forward(m, IDS, HeadAblation(0, 1), capture="resid_post") for m in (model, hf))
    # Bit for bit: the same kernels on the same numbers, which may lie elsewhere in memory (at steps of 16 bytes).
    assert np.array_equal(mine.logits, theirs.logits)
    assert np.array_equal(np.asarray(mine.activations["resid_post"]), np.asarray(theirs.activations["resid_post"]))
    assert model.n_params == Llama.from_pretrained(tmp_path).n_params
    assert np.array_equal(np.asarray(model.lm_head.weight, np.float32), hf.lm_head.weight.detach().float().numpy())
    assert model.generate(IDS, 3).tolist() == LlamaAttentionAdapter(hf).generate(IDS, 3).tolist()
    with pytest.raises(ValueError, match="torch has .*cpu here"):
        Llama.from_pretrained(tmp_path, backend="torch", device="xpu")
    with pytest.raises(ValueError, match="none of torch's"):
        Llama.from_pretrained(tmp_path, backend="torch", device="apple")
    with pytest.raises(ValueError, match="'jax' or 'torch'"):
        Llama.from_pretrained(tmp_path, backend="mlx")


def test_the_unembedding_follows_the_weights(tmp_path: Path) -> None:
    hf = make(tmp_path)
    adapter = LlamaAttentionAdapter(hf)
    first, again = (adapter.capture_logits(IDS).unembedding for _ in range(2))
    assert first is again  # one copy serves all captures
    before = np.array(first)
    hf.lm_head.weight.data.mul_(2.0)
    assert np.array_equal(first, before)
    assert np.array_equal(adapter.capture_logits(IDS).unembedding, 2 * before)
