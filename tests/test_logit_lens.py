"""The logit lens read layer by layer: against its definition in NumPy, Hugging Face's hidden states, and its own laws."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import LogitCapture, LogitConfig, forward, load, save
from oculi_jax.analysis.logit_lens import LogitLensAnalysis
from oculi_jax.models.llama import LlamaAttentionAdapter

from .margins import assert_apart, assert_clear, assert_leads
from .prompts import FRANCE
from .test_forward_laws import near
from .tiny import prompt, tiny_llama
from .token_texts import token_text
from .tolerances import ROUNDING, ROUTES

T, V, TOKEN = 11, 61, 34
MODEL = tiny_llama()
ADAPTER = LlamaAttentionAdapter(MODEL)
LENS = LogitLensAnalysis()


class Names:
    """A tokenizer whose token 34 is the text "<34>"."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [int(part) for part in text.strip(" <>").split("><")]

    def decode(self, ids: list[int]) -> str:
        return "".join(f"<{i}>" for i in ids)


def chances(resid: np.ndarray, norm: np.ndarray, unembed: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    """The lens by its definition, in float64: softmax of the unembedding of the normed stream. `[..., E]` → `[..., V]`."""
    resid, norm, unembed = (np.asarray(x, np.float64) for x in (resid, norm, unembed))
    logits = resid / np.sqrt((resid**2).mean(-1, keepdims=True) + eps) * norm @ unembed.T
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


WANT = chances(
    forward(MODEL, prompt(), capture="resid_post").activations["resid_post"],
    MODEL.norm.weight[...],
    MODEL.lm_head.weight,
)  # [L, T, V]


def divergence(p: np.ndarray) -> np.ndarray:
    """KL(last row ‖ row) of `[L, V]`, term by term."""
    return np.array([sum(a * np.log(a / b) for a, b in zip(p[-1], row, strict=True)) for row in p])


def rank(p: np.ndarray, token: int) -> list[int]:
    return [sum(other > row[token] for other in row) for row in p]


def assert_no_other_order(p: np.ndarray, token: int, k: int) -> None:
    """Rounding changes neither the `k` likeliest of the probabilities `[L, V]` nor the token's rank."""
    logits = np.log(p)
    assert_leads(logits, k)
    assert_clear(np.delete(logits, token, 1), logits[:, [token]])


def assert_is(capture: Any, position: int, p: np.ndarray) -> None:
    """All that the analysis says at a position is what the probabilities `[L, V]` say; the last row is the deepest."""
    near(LENS.token_probability_trajectory(capture, TOKEN, position), p[:, TOKEN])
    near(LENS.entropy_by_layer(capture, position), -(p * np.log(p)).sum(-1))
    near(LENS.prediction_convergence(capture, position), divergence(p))
    assert_no_other_order(p, TOKEN, 5)
    np.testing.assert_array_equal(LENS.token_rank(capture, TOKEN, position), rank(p, TOKEN))
    for k in (1, 2, 5):
        rows = LogitLensAnalysis(Names()).layer_predictions(capture, position, top_k=k)
        best = np.argsort(-p, axis=-1)[:, :k]
        assert [row["layer"] for row in rows] == list(capture.captured_layers)
        assert [[text for text, _ in row["predictions"]] for row in rows] == [[f"<{i}>" for i in row] for row in best]
        near([[chance for _, chance in row["predictions"]] for row in rows], np.take_along_axis(p, best, -1))


@pytest.mark.parametrize("position", [-1, 0, 4, -T])
@pytest.mark.parametrize(
    "config",
    [LogitConfig(), LogitConfig(top_k=2), LogitConfig(top_k=1, dtype="bfloat16"), LogitConfig(dtype="bfloat16")],
    ids=["all", "top 2", "top 1 in bfloat16", "all in bfloat16"],
)
def test_what_is_said_is_the_definition_whatever_was_kept(config: LogitConfig, position: int) -> None:
    capture = ADAPTER.capture_logits(prompt(), config)
    assert_is(capture, position, WANT[:, position])


def test_layers_are_true_numbers_in_any_order() -> None:
    capture = ADAPTER.capture_logits(prompt(), LogitConfig(layers=[2, 0], top_k=3))
    p = WANT[[2, 0], -1]
    near(LENS.token_probability_trajectory(capture, TOKEN), p[:, TOKEN])
    near(LENS.prediction_convergence(capture), divergence(p[::-1])[::-1])  # from the deepest, wherever it stands
    assert [row["layer"] for row in LogitLensAnalysis(Names()).prediction_trajectory(capture)] == [2, 0]


@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_nothing(left: bool) -> None:
    pad = np.zeros(4, np.int32)
    ids = np.concatenate([pad, prompt()] if left else [prompt(), pad])
    mask = np.concatenate([pad, np.ones(T)] if left else [np.ones(T), pad])
    for config in (LogitConfig(), LogitConfig(top_k=2), LogitConfig(positions=(-1, 4, 0, -T))):
        capture = ADAPTER.capture_logits(ids, config, attention_mask=mask)
        for position in (-1, 4, 0, -T):
            assert_is(capture, position, WANT[:, position])
    with pytest.raises(ValueError, match=f"position is -12, but the prompt has {T} tokens"):
        LENS.convergence_layer(ADAPTER.capture_logits(ids, attention_mask=mask), -12)


def test_positions_that_were_chosen_are_found_by_either_name() -> None:
    capture = ADAPTER.capture_logits(prompt(), LogitConfig(top_k=2, positions=[-2, 4]))
    for position in (-2, T - 2, 4, 4 - T):
        assert_is(capture, position, WANT[:, position])
    for position in (-1, 5, 30, -40):
        with pytest.raises(
            ValueError, match=f"token_position is {position}, and only the positions -2, 4 were captured"
        ):
            LENS.entropy_by_layer(capture, position)
    near(jax.jit(lambda c: LENS.entropy_by_layer(c, 4))(capture), LENS.entropy_by_layer(capture, 4))
    with pytest.raises(ValueError, match="Inside a trace the prompt's length is unknown"):
        jax.jit(lambda c: LENS.entropy_by_layer(c, 9))(capture)


ARRAYS: dict[str, Callable] = {
    "trajectory": lambda c: LENS.token_probability_trajectory(c, TOKEN),
    "rank": lambda c: LENS.token_rank(c, TOKEN),
    "entropy": LENS.entropy_by_layer,
    "KL": LENS.prediction_convergence,
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_fit_for_jit_and_vmap(name: str) -> None:
    f = ARRAYS[name]
    rows = [prompt(7, seed=1).tolist(), prompt(10, seed=2).tolist()]
    batch = ADAPTER.capture_logits(rows, LogitConfig(top_k=3))
    # The unembedding is the model's and has no batch axis.
    axes = dataclasses.replace(jax.tree.map(lambda _: 0, batch), unembedding=None)
    got = jax.vmap(f, in_axes=(axes,))(batch)
    for i, row in enumerate(rows):
        one = ADAPTER.capture_logits(row, LogitConfig(top_k=3))
        near(got[i], f(one))
        near(jax.jit(f)(one), f(one), ROUNDING)


EQUALS = 1e-5  # tokens of one program's logits have ranks of their own where these are not equal


def test_a_token_may_be_traced() -> None:
    capture = ADAPTER.capture_logits(prompt(), LogitConfig(top_k=1))
    near(jax.vmap(lambda t: LENS.token_probability_trajectory(capture, t))(jnp.arange(V)).T, WANT[:, -1])
    assert_apart(np.log(WANT[:, -1]), EQUALS)
    ranks = jax.jit(jax.vmap(lambda t: LENS.token_rank(capture, t)))(jnp.arange(V)).T
    np.testing.assert_array_equal(np.sort(ranks, -1), np.tile(np.arange(V), (3, 1)))
    for beyond in (V, -1):  # never a neighbour's
        assert np.isnan(LENS.token_probability_trajectory(capture, jnp.int32(beyond))).all()
        assert (LENS.token_rank(capture, jnp.int32(beyond)) == -1).all()


def test_a_capture_of_a_file_tells_what_it_kept_and_never_zero(tmp_path: Path) -> None:
    path = tmp_path / "lens.safetensors"

    def reopened(**config: Any) -> Any:
        save(ADAPTER.capture_logits(prompt(), LogitConfig(**config)), path)
        return load(path)

    assert_leads(np.log(WANT[:, -1]), 3)  # of the likeliest, no two runs have another order
    for lost in (reopened(top_k=3), reopened(top_k=3, tokens=[5, 9])):
        with pytest.raises(ValueError, match=rf"LogitConfig\(tokens=\[{TOKEN}\]\)"):
            LENS.token_probability_trajectory(lost, TOKEN)
        for f in (LENS.entropy_by_layer, LENS.prediction_convergence, ARRAYS["rank"]):
            with pytest.raises(ValueError, match="of the 3 likeliest tokens alone"):
                f(lost)
        assert LENS.convergence_layer(lost) == LENS.convergence_layer(ADAPTER.capture_logits(prompt()))
        named = LogitLensAnalysis(Names())
        kept = named.layer_predictions(ADAPTER.capture_logits(prompt()), top_k=3)
        for one, other in zip(named.layer_predictions(lost, top_k=3), kept, strict=True):
            assert [text for text, _ in one["predictions"]] == [text for text, _ in other["predictions"]]
            near([p for _, p in one["predictions"]], [p for _, p in other["predictions"]], ROUNDING)
        with pytest.raises(ValueError, match="of the 3 likeliest tokens alone"):
            named.layer_predictions(lost, top_k=4)
        assert_is(dataclasses.replace(lost, unembedding=MODEL.lm_head.weight), -1, WANT[:, -1])
    near(LENS.token_probability_trajectory(reopened(top_k=1, tokens=[5, TOKEN]), TOKEN), WANT[:, -1, TOKEN])
    assert_is(reopened(), -1, WANT[:, -1])
    # Where only the device sees which tokens were kept, another is NaN.
    kept = reopened(top_k=1, tokens=[5, TOKEN])
    got = jax.vmap(lambda t: LENS.token_probability_trajectory(kept, t))(jnp.array([TOKEN, 6, 5]))
    near(got[0], WANT[:, -1, TOKEN])
    near(got[2], WANT[:, -1, 5])
    assert np.isnan(got[1]).all()


def of_logits(logits: list, layers: tuple[int, ...]) -> LogitCapture:
    """A capture of one token, from logits `[L, V]`."""
    array = jnp.array(logits, jnp.float32)[:, None, :]
    return LogitCapture(
        logits=array, log_normalizer=jax.nn.logsumexp(array, axis=-1),
        tokens=jnp.zeros(1, jnp.int32), mask=jnp.ones(1, bool), captured_layers=layers,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("best", "layers", "want"),
    [
        ([1, 0, 1, 1, 1], (0, 2, 4, 6, 8), 4),
        ([1, 1, 1, 0, 1], (8, 6, 4, 2, 0), 4),
        ([1, 1, 1], (3, 5, 9), 3),
        ([1, 1, 0], (3, 5, 9), 9),
        ([2], (7,), 7),
    ],
)
def test_convergence_layer(best: list[int], layers: tuple[int, ...], want: int) -> None:
    assert LENS.convergence_layer(of_logits(np.eye(3)[best].tolist(), layers)) == want


def test_closed_forms() -> None:
    capture = of_logits([[0, 0, 0, 0], [200, 0, 0, 0], [3, 3, 1, 2]], (0, 1, 2))
    near(LENS.entropy_by_layer(capture)[:2], [np.log(4), 0], ROUNDING)
    for token, ranks in enumerate([[0, 0, 0], [0, 1, 0], [0, 1, 3], [0, 1, 2]]):
        np.testing.assert_array_equal(LENS.token_rank(capture, token), ranks)  # equals do not count
    kl = np.asarray(LENS.prediction_convergence(capture))
    near(kl[0], np.log(4) - LENS.entropy_by_layer(capture)[2], ROUNDING)  # KL from uniform: log V − entropy
    assert kl[2] == 0 and (kl >= 0).all()

    def total(logits):
        c = dataclasses.replace(capture, logits=logits)
        return LENS.entropy_by_layer(c).sum() + LENS.prediction_convergence(c).sum()

    assert np.isfinite(jax.grad(total)(capture.logits)).all()


def test_divergence_is_zero_at_the_last_layer_and_nowhere_negative() -> None:
    capture = ADAPTER.capture_logits(prompt(), LogitConfig(top_k=1))
    kl = np.stack([LENS.prediction_convergence(capture, position) for position in range(T)])
    assert (kl[:, -1] == 0).all() and (kl[:, :-1] > ROUTES).all()


def test_texts() -> None:
    named = LogitLensAnalysis(Names())
    capture = ADAPTER.capture_logits(prompt(), LogitConfig(top_k=4))
    assert_leads(np.log(WANT[:, -1]))
    best = WANT[:, -1].argmax(-1)
    for layer, row in enumerate(named.prediction_trajectory(capture)):
        assert set(row) == {"layer", "text", "token", "probability"}
        assert (row["layer"], row["text"], row["token"]) == (layer, f"<{best[layer]}>", best[layer])
        near(row["probability"], WANT[layer, -1].max())
    near(named.token_probability_trajectory(capture, "<34>"), WANT[:, -1, 34])


MISTAKES: list[tuple[Callable, type[Exception], str]] = [
    (lambda c: LENS.layer_predictions(c), TypeError, "A tokenizer is needed"),
    (lambda c: LENS.layer_predictions(c, top_k=0), ValueError, "top_k is 0, and must be 1 to 61"),
    (lambda c: LENS.layer_predictions(c, top_k=62), ValueError, "top_k is 62"),
    (lambda c: LENS.token_rank(c, 61), ValueError, "token is 61, and ids are 0 to 60"),
    (lambda c: LENS.token_rank(c, -1), ValueError, "token is -1, and ids are 0 to 60"),
    (lambda c: LENS.token_rank(c, [1, 2]), TypeError, "jax.vmap over them"),
    (lambda c: LENS.token_rank(c, 1.0), TypeError, "one id, an integer, is needed"),
    (lambda c: LogitLensAnalysis(Names()).token_rank(c, "<1><2>"), ValueError, "is not one token but 2"),
    (lambda c: LENS.entropy_by_layer(c, 11), ValueError, "the prompt has 11 tokens"),
    (lambda c: LENS.entropy_by_layer(c, 1.5), TypeError, "an integer is needed"),
    (lambda c: LENS.entropy_by_layer(ADAPTER.capture(prompt())), TypeError, "takes a LogitCapture, and was given an AttentionCapture"),
    (lambda c: LENS.entropy_by_layer(ADAPTER.capture_full(prompt())), TypeError, "Give its .logits."),
    (lambda c: LENS.entropy_by_layer(ADAPTER.capture_logits([[1, 2], [3, 4]])), ValueError, "is a batch"),
    (lambda c: LENS.entropy_by_layer(dataclasses.replace(c, unembedding=c.unembedding[0])), ValueError, "has no batch axis"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), MISTAKES, ids=[message for _, _, message in MISTAKES])
def test_mistakes_are_told_in_a_sentence(call: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.replace(".", r"\.")):
        call(ADAPTER.capture_logits(prompt(), LogitConfig(top_k=3)))


@pytest.mark.torch
@pytest.mark.parametrize(("text", "position"), [(FRANCE, -1), ("The capital of Peru is", 4)], ids=["-1", "4"])
def test_the_lens_of_hugging_faces_hidden_states(
    trained: LlamaAttentionAdapter, hf_trained, text: str, position: int
) -> None:
    import torch

    with torch.no_grad():
        hidden = hf_trained(torch.tensor([trained.tokenizer.encode(text)]), output_hidden_states=True).hidden_states
        # The last of them has been through the final norm already.
        normed = torch.stack([*(hf_trained.model.norm(h[0, position]) for h in hidden[1:-1]), hidden[-1][0, position]])
        p = torch.softmax(hf_trained.lm_head(normed).double(), dim=-1).numpy()
    lens = LogitLensAnalysis(trained.tokenizer)
    capture = trained.capture_logits(text, LogitConfig(top_k=10))
    paris = trained.to_single_token("Paris")
    trajectory = lens.token_probability_trajectory(capture, paris, position)
    near(trajectory, p[:, paris])
    assert_no_other_order(p, paris, 12)
    assert_clear(p[-1, paris], 0.9)
    assert (trajectory[-1] > 0.9) == (position == -1)
    for top_k in (3, 12):  # fewer and more than were kept
        best = np.argsort(-p, axis=-1, kind="stable")[:, :top_k]
        rows = lens.layer_predictions(capture, position, top_k=top_k)
        texts = [[token_text(trained.tokenizer, i) for i in row] for row in best]
        assert [[name for name, _ in row["predictions"]] for row in rows] == texts
        near([[chance for _, chance in row["predictions"]] for row in rows], np.take_along_axis(p, best, -1))
    near(lens.prediction_convergence(capture, position), (p[-1] * np.log(p[-1] / p)).sum(-1))
    near(lens.entropy_by_layer(capture, position), -(p * np.log(p)).sum(-1))
    np.testing.assert_array_equal(lens.token_rank(capture, paris, position), (p > p[:, [paris]]).sum(-1))
    first = p.argmax(-1)
    want = next(layer for layer in range(4) if (first[layer:] == first[-1]).all())
    assert lens.convergence_layer(capture, position) == want
