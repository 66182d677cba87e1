"""Generation through the adapter and the model: shapes as Hugging Face has them, text, captures, contexts."""

from __future__ import annotations

import threading
from typing import Any

import jax
import numpy as np
import pytest

from oculi_jax import forward, generate
from oculi_jax.intervention import (
    ActivationPatch,
    HeadAblation,
    InterventionContext,
    SpectraScaler,
    Steer,
)
from oculi_jax.models.llama import LlamaAttentionAdapter

from .test_adapter import Letters
from .test_forward_laws import near
from .test_generate import IDS, MODEL, PLAIN, VECTOR, E, N, T, assert_drawn, slow
from .tiny import prompt, tiny_llama
from .tolerances import ROUNDING, ROUTES


def test_ids_come_back_as_hugging_face_gives_them() -> None:
    adapter = LlamaAttentionAdapter(MODEL)
    whole = [*map(int, IDS), *PLAIN]
    np.testing.assert_array_equal(MODEL.generate(IDS, N), whole)
    np.testing.assert_array_equal(MODEL.generate(IDS[None], max_new_tokens=N), [whole])
    np.testing.assert_array_equal(adapter.generate(IDS.tolist(), N), whole)
    short = prompt(4, seed=8)
    rows = adapter.generate([IDS.tolist(), short.tolist()], N)
    np.testing.assert_array_equal(rows[0], whole)
    np.testing.assert_array_equal(rows[1], [0, 0, 0, *short, *slow((), ids=short)])
    padded, mask = np.stack([IDS, np.pad(short, (3, 0))]), np.array([[1] * 7, [0] * 3 + [1] * 4])
    np.testing.assert_array_equal(adapter.generate(padded, N, attention_mask=mask), rows)
    np.testing.assert_array_equal(MODEL.generate(padded, N, attention_mask=mask), rows)
    np.testing.assert_array_equal(
        MODEL.generate(IDS, N, SpectraScaler(2, 0, np.array([1.0, 5.0])))[1], [*IDS, *slow(SpectraScaler(2, 0, 5.0))]
    )


def test_prompts_and_variants_lead_in_this_order() -> None:
    adapter, family = LlamaAttentionAdapter(MODEL, _Letters()), Steer(1, VECTOR, np.array([0.0, 3.0]))
    texts = ["hello", "you"]
    rows, found = adapter.generate(texts, 6, family, capture="embed")
    ids = [adapter.tokenizer.encode(text) for text in texts]
    want = [[slow(Steer(1, VECTOR, scale), ids=row, n=6) for scale in family.scale] for row in ids]
    assert want[0][0] != want[0][1]
    assert rows == [
        [text + adapter.tokenizer.decode(new) for new in each] for text, each in zip(texts, want, strict=True)
    ]
    width, shift = len(ids[0]), len(ids[0]) - len(ids[1])
    assert found["embed"].shape == (2, 2, width + 6, E)
    whole = adapter.generate(ids, 6, family)
    padded = np.stack([ids[0], np.pad(ids[1], (shift, 0), constant_values=9)])
    mask = np.arange(width) >= np.array([[0], [shift]])
    again = MODEL.generate(padded, 6, family, attention_mask=mask)
    np.testing.assert_array_equal(again[:, 1, :width], padded)
    np.testing.assert_array_equal(whole[:, 1, :width], np.where(mask, padded, 0))
    for new in (whole[:, :, width:], again[:, :, width:], generate(MODEL, padded, 6, family, mask=mask)):
        np.testing.assert_array_equal(new, want)
    np.testing.assert_array_equal(MODEL.generate(np.array(ids[:1]), 6, family), whole[:1])
    np.testing.assert_array_equal(MODEL.generate(ids[0], 6, family), whole[0])
    assert adapter.generate(texts[:1], 6, family) == rows[:1]


def test_captures_of_a_ragged_batch_lie_along_its_ids_and_nothing_follows_a_stop() -> None:
    adapter, rows = LlamaAttentionAdapter(MODEL), [prompt(9).tolist(), prompt(4, seed=8).tolist()]
    ids, found = adapter.generate(rows, 5, capture=("embed", "resid_post"))
    for i, row in enumerate(rows):
        text = [*row, *ids[i, 9:].tolist()]
        want = forward(MODEL, text, capture=("embed", "resid_post")).activations
        assert ids[i, 9 - len(row) :].tolist() == text
        near(found["embed"][i, 9 - len(row) :], want["embed"], ROUNDING)
        near(found["resid_post"][i, :, 9 - len(row) :], want["resid_post"], ROUTES)
    model = tiny_llama(1, eos_token_id=PLAIN[2], pad_token_id=-1)  # old configs say −1 for no pad token
    ids, found = model.generate(IDS, N, capture="pattern")
    end = T + PLAIN.index(PLAIN[2]) + 1
    np.testing.assert_array_equal(ids[end:], PLAIN[2])
    near(found["pattern"][..., :end, :end], forward(model, ids[:end], capture="pattern").activations["pattern"], ROUTES)
    assert not np.asarray(found["pattern"])[..., end:, :].any()


def test_captures_of_an_adapters_run_show_no_padding() -> None:
    adapter, ids = LlamaAttentionAdapter(MODEL), prompt(9)  # 9 tokens are padded to 10 inside
    text, found = adapter.generate(ids, 4, HeadAblation(1, 2), capture=("resid_post", "pattern", "embed"))
    want = forward(MODEL, text, HeadAblation(1, 2), capture=("resid_post", "pattern", "embed")).activations
    for site in want:
        near(found[site], want[site], ROUTES)


def test_rows_of_a_batch_draw_apart_and_each_as_alone() -> None:
    adapter = LlamaAttentionAdapter(MODEL)
    options = {"temperature": 3.0, "stop_tokens": ()}
    rows = adapter.generate([IDS.tolist()] * 2, N, key=jax.random.key(1), **options)
    assert (rows[0] != rows[1]).any()
    for row, key in zip(rows, jax.random.split(jax.random.key(1)), strict=True):
        assert_drawn(row[T:], key, 3.0)
        np.testing.assert_array_equal(row[T:], generate(MODEL, IDS, N, key=key, **options))


def test_text_in_text_out() -> None:
    """Of as many tokens as the ids above, so that the programs are theirs."""
    adapter = LlamaAttentionAdapter(MODEL, _Letters())
    texts = [LONG, "you"]
    new = [slow((), ids=adapter.tokenizer.encode(text)) for text in texts]
    assert len(adapter.tokenizer.encode(LONG)) == T
    whole = [text + adapter.tokenizer.decode(ids) for text, ids in zip(texts, new, strict=True)]
    assert adapter.generate(LONG, N) == whole[0]
    assert adapter.generate(texts, N) == whole
    variants = adapter.generate(LONG, N, SpectraScaler(2, 0, np.array([1.0, 5.0])))
    assert variants[0] == whole[0] and len(variants) == 2
    assert adapter.generate(LONG, N, SpectraScaler(2, 0, np.ones(1))) == whole[:1]
    cut = new[0].index(new[0][2]) + 1
    assert adapter.generate(LONG, N, stop_tokens=new[0][2]) == LONG + adapter.tokenizer.decode(new[0][:cut])


LONG = "planet"


class _Letters(Letters):
    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return super().decode(ids)


def test_a_context_is_there_for_its_block_and_adds_up() -> None:
    adapter, other = LlamaAttentionAdapter(MODEL), LlamaAttentionAdapter(MODEL)
    outer, inner = HeadAblation(0, 1), Steer(1, VECTOR)
    plain = adapter.capture(IDS).z

    def z(*interventions: Any) -> Any:
        return forward(MODEL, IDS, list(interventions), capture="z").activations["z"]

    with InterventionContext(adapter, [outer]):
        near(adapter.capture(IDS).z, z(outer), ROUNDING)
        with pytest.raises(RuntimeError), InterventionContext(adapter, inner):
            near(adapter.capture(IDS).z, z(outer, inner), ROUNDING)
            np.testing.assert_array_equal(adapter.generate(IDS, N)[T:], slow([outer, inner]))
            raise RuntimeError
        near(adapter.capture(IDS).z, z(outer), ROUNDING)
        np.testing.assert_array_equal(other.capture(IDS).z, plain)  # another adapter is not under it
        np.testing.assert_array_equal(generate(MODEL, IDS, N), PLAIN)  # nor are the pure functions
        np.testing.assert_array_equal(MODEL.generate(IDS, N)[T:], slow(outer))
        elsewhere: list[Any] = []
        thread = threading.Thread(target=lambda: elsewhere.append(adapter.capture(IDS).z))
        thread.start()
        thread.join()
        np.testing.assert_array_equal(elsewhere[0], plain)
        with pytest.raises(ValueError, match="not the one of the InterventionContext"):
            tiny_llama(2).generate(IDS, N)
        with pytest.raises(TypeError, match="inside a trace"):
            jax.jit(lambda ids: MODEL.generate(ids, N))(IDS)
        with pytest.raises(TypeError, match="inside a trace"):
            jax.jit(lambda: MODEL.generate(IDS, N))()
    np.testing.assert_array_equal(adapter.capture(IDS).z, plain)
    assert np.abs(np.asarray(plain) - np.asarray(z(outer))).max() > 0.1


def test_every_capture_is_under_the_context() -> None:
    adapter = LlamaAttentionAdapter(MODEL)
    patch = (
        np.random.default_rng(2).normal(size=(13, E)).astype(np.float32)
    )  # an array along a prompt that is padded inside
    ids, given = prompt(13), [ActivationPatch("resid_pre", 1, patch), Steer(2, VECTOR, positions=-1)]
    sites = {"attention": ("z", "z"), "residual": ("post_mlp", "resid_post"), "mlp": ("output", "mlp_out")}
    want = forward(MODEL, ids, given, capture=("z", "resid_post", "mlp_out"))
    with InterventionContext(adapter, given):
        full = adapter.capture_full(ids)
        rows = adapter.capture_residual([ids.tolist(), ids[:5].tolist()]).post_mlp
        alone = adapter.capture_logits(ids).logits
    for part, (field, site) in sites.items():
        near(getattr(getattr(full, part), field), want.activations[site], ROUTES)
    near(alone[-1], want.logits, ROUTES)
    near(rows[0], want.activations["resid_post"], ROUTES)
    short = [ActivationPatch("resid_pre", 1, patch[:5]), Steer(2, VECTOR, positions=-1)]
    near(rows[1, :, :5], forward(MODEL, ids[:5], short, capture="resid_post").activations["resid_post"], ROUTES)


def test_a_context_of_something_else_is_refused() -> None:
    adapter = LlamaAttentionAdapter(MODEL)
    with pytest.raises(TypeError, match="Pass the adapter"):
        InterventionContext(MODEL, [HeadAblation(0, 0)])
    with pytest.raises(TypeError, match=r"interventions\[1\] is the class HeadAblation"):
        InterventionContext(adapter, [HeadAblation(0, 0), HeadAblation])
    with pytest.raises(TypeError, match="a list of interventions"):
        InterventionContext(adapter, 3)

    def holding() -> Any:
        with InterventionContext(adapter, [HeadAblation(0, 0)]):
            yield

    held = holding()
    next(held)
    with InterventionContext(adapter, [HeadAblation(0, 1)]):
        held.close()  # closes the outer block first
        near(adapter.capture(IDS).z, forward(MODEL, IDS, HeadAblation(0, 1), capture="z").activations["z"], ROUNDING)
    with pytest.raises(ValueError, match="was not entered"):
        InterventionContext(adapter, [HeadAblation(0, 0)]).__exit__()
    with InterventionContext(adapter, HeadAblation(0, 7)), pytest.raises(ValueError, match="there are 4 query heads"):
        adapter.capture(IDS)
    with InterventionContext(adapter, SpectraScaler(0, 0, np.ones(3))), pytest.raises(ValueError, match=r"axes \[3\]"):
        adapter.capture(IDS)
    with pytest.raises(TypeError, match="no option do_sample; there are temperature, .* above 0"):
        adapter.generate(IDS, 2, do_sample=True)
    with pytest.raises(TypeError, match="inside a trace"):
        jax.jit(adapter.capture)(IDS)
    with pytest.raises(ValueError, match="60 are to be generated"):
        adapter.generate(IDS, 60)
