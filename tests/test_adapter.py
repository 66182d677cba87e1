"""The guide's object API: its shapes, what each field is, batches, padding, buckets, costs and files."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open

from oculi_jax import (
    CaptureConfig,
    CaptureSpec,
    LogitConfig,
    MLPConfig,
    ResidualConfig,
    capture_bytes,
    forward,
    lens,
    load,
    save,
)
from oculi_jax.models.llama import LlamaAttentionAdapter
from oculi_jax.prompts import bucket

from .compilations import compilations
from .margins import assert_leads
from .test_forward_laws import near
from .tiny import prompt, tiny_llama
from .tolerances import ROUNDING

T, L, H, K, D, E, F, V = 11, 3, 4, 2, 6, 24, 40, 61
MODEL = tiny_llama()
ADAPTER = LlamaAttentionAdapter(MODEL)
SITES = ("q", "k", "v", "pattern", "z", "resid_pre", "resid_mid", "resid_post", "gate", "up", "act", "mlp_out", "q_pre_rope",
         "k_pre_rope", "embed", "final_scale")  # fmt: skip
WANT = forward(MODEL, prompt(), capture=SITES).activations


class Letters:
    """A tokenizer of one token a letter, as far as the library asks for one."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(letter) % 50 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i % 26) for i in ids)


@pytest.mark.quick
def test_attention_capture() -> None:
    c = ADAPTER.capture(prompt())
    assert c.queries.shape == c.z.shape == (L, H, T, D) and c.patterns.shape == (L, H, T, T)
    assert c.keys.shape == c.values.shape == (L, K, T, D)
    for field, site in {"queries": "q", "keys": "k", "values": "v", "patterns": "pattern", "z": "z"}.items():
        near(getattr(c, field), WANT[site], ROUNDING)
    assert (c.n_layers, c.n_heads, c.n_kv_heads, c.n_tokens, c.head_dim) == (L, H, K, T, D)
    assert c.captured_layers == (0, 1, 2) and c.qk_stage == "post_rope"
    np.testing.assert_array_equal(c.tokens, prompt())
    assert c.mask.all() and c.mask.shape == (T,)


def test_what_was_not_asked_for_is_none_and_layers_are_true_numbers() -> None:
    c = ADAPTER.capture(prompt(), CaptureConfig(layers=np.array([2, 0]), capture_values=False, qk_stage="pre_rope"))
    assert c.values is None and c.captured_layers == (2, 0) and c.n_layers == 2
    near(c.queries, np.asarray(WANT["q_pre_rope"])[[2, 0]], ROUNDING)
    near(c.keys, np.asarray(WANT["k_pre_rope"])[[2, 0]], ROUNDING)
    r = ADAPTER.capture_residual(prompt(), ResidualConfig(layers=range(1), capture_post_mlp=False))
    assert r.post_mlp is None and r.pre_attn.shape == (1, T, E)
    m = ADAPTER.capture_mlp(prompt(), MLPConfig(layers=[1], capture_gate=False, capture_up=False, dtype="bfloat16"))
    assert m.gate is None and m.up is None and m.post_activation.dtype == jnp.bfloat16


@pytest.mark.quick
def test_residual_and_mlp_captures() -> None:
    r, m = ADAPTER.capture_residual(prompt()), ADAPTER.capture_mlp(prompt())
    for got, site in ((r.pre_attn, "resid_pre"), (r.post_attn, "resid_mid"), (r.pre_mlp, "resid_mid"), (r.post_mlp, "resid_post"),
                      (r.embedding, "embed"), (r.final_scale, "final_scale"), (m.gate, "gate"), (m.up, "up"),
                      (m.post_activation, "act"), (m.output, "mlp_out")):  # fmt: skip
        near(got, WANT[site], ROUNDING)
    near(r.final_weight, MODEL.norm.weight[...], 0)
    near(r.post_attn + m.output, r.post_mlp, ROUNDING)


@pytest.mark.parametrize("positions", [None, [-1, 2]])
def test_logit_capture_is_the_lens(positions: list[int] | None) -> None:
    logits = np.asarray(lens(MODEL, WANT["resid_post"]))
    logits = logits if positions is None else logits[:, [T - 1, 2]]
    chances = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    full = ADAPTER.capture_logits(prompt(), LogitConfig(positions=positions))
    assert full.top_k_logits is None
    near(full.logits, logits)
    near(full.log_normalizer, np.log(np.exp(logits).sum(-1)))
    some = ADAPTER.capture_logits(prompt(), LogitConfig(layers=[2, 0], top_k=4, positions=positions, tokens=[5, 60]))
    assert some.logits is None and some.captured_layers == (2, 0)
    near(some.top_k_logits, np.sort(logits[[2, 0]], -1)[..., ::-1][..., :4])
    assert_leads(logits[[2, 0]], 4)
    np.testing.assert_array_equal(some.top_k_indices, np.argsort(-logits[[2, 0]], -1)[..., :4])
    near(some.probabilities, chances[[2, 0]][..., [5, 60]])
    near(some.normalized @ some.unembedding.T, logits[[2, 0]])


def test_top_k_never_holds_the_whole_vocabulary() -> None:
    from oculi_jax.backends.jax import lens

    model = tiny_llama(vocab_size=4096, num_hidden_layers=8)
    keep = ("normalized", "log_normalizer", "top_k_logits", "top_k_indices")
    lowered = lens.lower(model, np.zeros((8, 16, 24), np.float32), keep, top_k=3)
    memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 8 * 16 * 4096 * 4 / 2


@pytest.mark.quick
def test_full_capture_is_the_four_captures_of_one_pass() -> None:
    full = ADAPTER.capture_full(
        prompt(), residual=ResidualConfig(layers=[1]), logits=LogitConfig(layers=[0, 2], top_k=2, positions=[-1])
    )
    near(full.attention.queries, WANT["q"], ROUNDING)
    near(full.residual.post_mlp, np.asarray(WANT["resid_post"])[[1]], ROUNDING)
    near(full.mlp.gate, WANT["gate"], ROUNDING)
    near(
        full.logits.top_k_logits,
        np.sort(np.asarray(lens(MODEL, WANT["resid_post"][np.array([0, 2]), -1:])), -1)[..., ::-1][..., :2],
    )
    assert ADAPTER.capture_full(prompt()).logits.top_k_indices.shape == (L, T, 10)
    for part in dataclasses.fields(full):
        text = repr(getattr(full, part.name))
        assert "\n" not in text and text.startswith(type(getattr(full, part.name)).__name__)
    assert (
        repr(full)
        == "FullCapture(attention at 3 layers, residual at 1 layers, mlp at 3 layers, logits at 2 layers; 11 tokens)"
    )


def test_a_batch_is_its_prompts_one_by_one() -> None:
    rows = [prompt(7, seed=1).tolist(), prompt(10, seed=2).tolist()]
    batch = ADAPTER.capture_full(rows)
    assert batch.attention.patterns.shape == (2, L, H, 10, 10) and batch.attention.tokens.shape == (2, 10)
    for i, row in enumerate(rows):
        n = len(row)
        single = ADAPTER.capture_full(row)
        assert batch.attention.mask[i].tolist() == [True] * n + [False] * (10 - n)
        near(batch.attention.patterns[i, :, :, :n, :n], single.attention.patterns)
        near(batch.residual.post_mlp[i, :, :n], single.residual.post_mlp)
        near(batch.logits.top_k_logits[i, :, :n], single.logits.top_k_logits)
    padded = np.zeros((2, 10), np.int64)
    padded[0, 3:], padded[1] = rows[0], rows[1]
    left = ADAPTER.capture_residual(padded, attention_mask=[[0] * 3 + [1] * 7, [1] * 10])
    near(left.post_mlp[0, :, 3:], ADAPTER.capture_residual(rows[0]).post_mlp)


def test_text_and_arrays_of_any_kind() -> None:
    adapter = LlamaAttentionAdapter(MODEL, Letters())
    ids = Letters().encode("abcde")
    want = adapter.capture(ids).patterns
    for given in ("abcde", ["abcde"], np.array(ids), np.array([ids]), jnp.array([ids]), tuple(ids), [ids]):
        near(adapter.capture(given).patterns, want, 0)
    assert adapter.capture(["abcde", "xy"]).queries.shape == (2, L, H, 6, D)
    assert adapter.to_single_token("a") == 47
    with pytest.raises(ValueError, match="not one token but 2"):
        adapter.to_single_token("ab")
    assert len(adapter.str_tokens("abc")) == 4 and len(adapter.str_tokens([ids])) == 6
    assert adapter.first_difference("abc", "abd") == 3
    assert adapter.first_difference("abc", "abc") is None
    assert adapter.first_difference("abc", "abcd") == 4


@pytest.mark.torch
def test_torch_ids() -> None:
    import torch

    near(ADAPTER.capture(torch.tensor(prompt())[None]).patterns, ADAPTER.capture(prompt()).patterns, 0)


REFUSED = {
    "empty": ([], {}, ValueError, "empty"),
    "empty text": ("", {}, TypeError, "no tokenizer"),
    "text": ("abc", {}, TypeError, "no tokenizer"),
    "floats": (np.ones(3), {}, TypeError, "float64, and integers"),
    "beyond": ([1, 61], {}, ValueError, "Token 1 of prompt 0 is 61"),
    "three axes": (np.ones((1, 1, 2), int), {}, ValueError, r"\[1, 1, 2\], and ids \[T\] or \[B, T\]"),
    "mask shape": ([1, 2], dict(attention_mask=[1]), ValueError, r"attention_mask has shape \[1\]"),
    "mask values": ([1, 2], dict(attention_mask=[1, 2]), ValueError, "must be 1"),
    "mask zero": ([[1, 2]], dict(attention_mask=[[0, 0]]), ValueError, "0 everywhere in prompt 0"),
    "too long": ([1] * 65, {}, ValueError, "65 tokens, and this model was made for at most 64.*allow_longer"),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("name", REFUSED)
def test_prompts_that_are_refused(name: str) -> None:
    given, arguments, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        ADAPTER.capture(given, **arguments)


def test_longer_prompts_on_request_or_where_the_rotary_type_grows() -> None:
    assert ADAPTER.capture([1] * 65, allow_longer=True).n_tokens == 65
    growing = tiny_llama(rope_scaling={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=8)
    assert LlamaAttentionAdapter(growing).capture([1] * 9).n_tokens == 9


def test_configs_that_are_refused() -> None:
    for call, message in (
        (lambda: ADAPTER.capture(prompt(), CaptureConfig(layers=[3])), "3 layers"),
        (lambda: ADAPTER.capture(prompt(), CaptureConfig(qk_stage="rope")), "qk_stage is 'rope'"),
        (lambda: ADAPTER.capture_logits(prompt(), LogitConfig(top_k=0)), "top_k is 0"),
        (lambda: ADAPTER.capture_logits(prompt(), LogitConfig(tokens=[99])), r"tokens holds \[99\]"),
        (lambda: ADAPTER.capture_logits(prompt(), LogitConfig(positions=[20])), "positions"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="give one as from_pretrained"):
        LlamaAttentionAdapter(object())


def test_buckets_waste_at_most_a_quarter_and_near_lengths_share_a_program() -> None:
    for n in range(1, 5000):
        assert n <= bucket(n) <= 1.25 * n
    assert len({bucket(n) for n in range(65, 129)}) == 4
    ADAPTER.capture(prompt(18))
    ADAPTER.capture_logits(prompt(18), LogitConfig(top_k=2, tokens=[3]))
    with compilations() as compiled:
        for n in (20, 19, 17):
            ADAPTER.capture(prompt(n))
        ADAPTER.capture_logits(prompt(18, seed=3), LogitConfig(top_k=2, tokens=[7]))
        assert compiled == []
        ADAPTER.capture(prompt(21))
        assert len(compiled) == 1  # the next bucket


@pytest.mark.parametrize(
    "config",
    [CaptureConfig(), CaptureConfig(layers=[1], capture_patterns=False, dtype="bfloat16"), ResidualConfig(layers=[0, 2]),
     MLPConfig(capture_up=False), LogitConfig(), LogitConfig(top_k=3, tokens=[1, 2], positions=[-1])],
)  # fmt: skip
def test_capture_bytes_is_what_comes_back(config) -> None:
    call = {CaptureConfig: ADAPTER.capture, ResidualConfig: ADAPTER.capture_residual, MLPConfig: ADAPTER.capture_mlp,
            LogitConfig: ADAPTER.capture_logits}[type(config)]  # fmt: skip
    captured = call(prompt(), config)
    skip = {"tokens", "mask", "unembedding", "final_weight", "probability_tokens", "pre_mlp"}
    arrays = [
        getattr(captured, f.name) for f in dataclasses.fields(captured)
        if f.name not in skip and isinstance(getattr(captured, f.name), jax.Array)
    ]  # fmt: skip
    assert capture_bytes(MODEL.config, T, config) == sum(array.nbytes for array in arrays)


def test_capture_bytes_of_sites() -> None:
    spec = (CaptureSpec("pattern", layers=[0, 2]), "scores", "allowed", "final_scale")
    out = forward(MODEL, prompt(), capture=spec).activations
    assert capture_bytes(MODEL.config, T, spec) == sum(value.nbytes for value in out.values())


def test_configs_of_another_kind_are_refused() -> None:
    for call in (
        lambda: ADAPTER.capture(prompt(), MLPConfig()), lambda: ADAPTER.capture_logits(prompt(), ResidualConfig()),
        lambda: ADAPTER.capture(prompt(), {}), lambda: ADAPTER.capture_full(prompt(), logits=CaptureConfig()),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="config is a .*, and a .*Config is needed"):
            call()


def test_where_files_go(tmp_path: Path) -> None:
    pipe, link, private = tmp_path / "pipe", tmp_path / "link", tmp_path / "private"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="no regular file"):
        save(dict(WANT), pipe)
    private.write_bytes(b"")
    private.chmod(0o600)
    link.symlink_to(private)
    save(ADAPTER.capture([prompt(5), prompt(5)]), link, metadata={"model": "tiny"})
    assert (
        link.is_symlink() and load(private).queries.shape == (2, L, H, 5, D) and private.stat().st_mode & 0o777 == 0o600
    )
    with safe_open(private, "numpy") as file:
        assert json.loads(file.metadata()["axes"])["queries"] == "B L H T D"
    with pytest.raises(ValueError, match=r"\['kind'\], which are written anyway"):
        save(dict(WANT), link, metadata={"kind": "x"})


def test_captures_are_pytrees() -> None:
    c = ADAPTER.capture(prompt())
    doubled = jax.jit(lambda c: jax.tree.map(lambda x: x * 2, dataclasses.replace(c, mask=None, tokens=None)))(c)
    assert doubled.captured_layers == c.captured_layers
    near(doubled.queries, 2 * c.queries, ROUNDING)


@pytest.mark.parametrize("kind", ["attention", "residual", "mlp", "logits", "full", "bfloat16", "arrays"])
def test_files_reopen_as_they_were(tmp_path: Path, kind: str) -> None:
    full = ADAPTER.capture_full(
        prompt(),
        attention=CaptureConfig(layers=[2, 0], capture_keys=False),
        logits=LogitConfig(top_k=2, positions=[-1]),
    )
    capture = {
        "full": full,
        "bfloat16": ADAPTER.capture_mlp(prompt(), MLPConfig(dtype="bfloat16")),
        "arrays": dict(WANT),
    }.get(kind)
    capture = getattr(full, kind) if capture is None else capture
    path = tmp_path / "capture.safetensors"
    save(capture, path, metadata={"model": "tiny"})
    back = load(path)
    if kind == "arrays":
        assert back.keys() == capture.keys()
    else:
        assert type(back) is type(capture)
        capture = (
            dataclasses.replace(capture, logits=dataclasses.replace(capture.logits, unembedding=None))
            if kind == "full"
            else capture
        )
        capture = dataclasses.replace(capture, unembedding=None) if kind == "logits" else capture
    assert jax.tree.structure(back) == jax.tree.structure(capture)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(capture), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    assert [p.name for p in tmp_path.iterdir()] == ["capture.safetensors"]


def test_files_that_are_no_captures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.safetensors"
    save(WANT, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load(path)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load(tmp_path / "none")
    with pytest.raises(ValueError, match="no capture"):
        load(Path(__file__).parents[1] / "weights" / "tiny-mqa" / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        save(WANT, tmp_path / "no" / "c.safetensors")
    with pytest.raises(TypeError, match="takes a capture"):
        save(3, path)
    path.write_bytes(whole)

    def fail(tensors, file, metadata=None):
        Path(file).write_bytes(b"half")
        raise SafetensorError("disk full")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save(WANT, path)
    assert path.read_bytes() == whole and len(list(tmp_path.iterdir())) == 1


def test_an_analysis_maps_over_a_batch_and_a_row_is_its_prompt() -> None:
    from oculi_jax.analysis import AttributionMethods, EntropyAnalysis, LogitLensAnalysis

    rows = [prompt(9).tolist(), prompt(6, seed=1).tolist()]
    batch = ADAPTER.capture_full(rows)
    unembed = MODEL.lm_head.weight

    def trajectory(capture, token):
        return LogitLensAnalysis().token_probability_trajectory(capture, token)

    def direct(residual):
        return AttributionMethods.direct_logit_attribution(residual, unembed, 3).values

    mapped = (
        batch.attention.map(EntropyAnalysis.token_entropy),
        batch.residual.map(direct),
        batch.logits.map(trajectory, 3),
    )
    near(mapped[1], jax.vmap(direct)(batch.residual), ROUNDING)
    for i, row in enumerate(rows):
        one, alone = batch[i], ADAPTER.capture_full(row)
        near(mapped[0][i, ..., : len(row)], EntropyAnalysis.token_entropy(alone.attention), ROUNDING)
        near(mapped[1][i], direct(alone.residual), ROUNDING)
        near(mapped[2][i], trajectory(alone.logits, 3), ROUNDING)
        near(trajectory(one.logits, 3), mapped[2][i], ROUNDING)
        near(direct(one.residual), mapped[1][i], ROUNDING)
    with pytest.raises(TypeError, match="one prompt"):
        ADAPTER.capture(prompt())[0]
    with pytest.raises(IndexError, match="Row 2 of a batch of 2"):
        batch.attention[2]
    with pytest.raises(ValueError, match="call the analysis on it"):
        ADAPTER.capture(prompt()).map(EntropyAnalysis.token_entropy)


def test_a_batch_of_texts_is_what_sweeps_take(trained) -> None:
    tokens, mask = trained.batch(["The capital of France is", "Paris"])
    assert tokens.shape == mask.shape == (2, 6) and mask.sum(axis=1).tolist() == [6, 2]  # one is <s>
    assert tokens[0].tolist() == trained.tokenizer.encode("The capital of France is")
    assert trained.batch("Paris")[0].tolist() == [trained.tokenizer.encode("Paris")]
