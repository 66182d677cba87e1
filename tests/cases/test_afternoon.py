"""An afternoon of research: what stopped people, misled them, or said nothing."""

from __future__ import annotations

import copy
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oculi_jax
from oculi_jax import (
    Blend,
    CaptureConfig,
    DirectionAblation,
    Edit,
    HeadAblation,
    Llama,
    PerLayer,
    forward,
    load,
    padded,
    save,
    sweep,
)
from oculi_jax.causal.patching import recovery
from oculi_jax.metrics import log_probability
from oculi_jax.models.llama import LlamaAttentionAdapter

from ..tiny import prompt, tiny_llama
from ..tolerances import ROUNDING

IDS = prompt(6)


@pytest.fixture(scope="module")
def model() -> Llama:
    return tiny_llama()


def test_the_names_of_a_first_script_are_at_the_top() -> None:
    for name in (
        "Llama",
        "HeadAblation",
        "forward",
        "sweep",
        "padded",
        "embedded_model",
        "load_tokenizer",
        "bootstrap",
    ):
        assert name in oculi_jax.__all__ and getattr(oculi_jax, name)


def test_captures_are_asked_by_name(model: Llama) -> None:
    out = forward(model, IDS, capture=("z", "resid_post"))
    assert out["z"] is out.activations["z"] and list(out.activations) == ["z", "resid_post"]
    for ask in (out, out.activations):
        with pytest.raises(KeyError, match=r"^'resid_pst' was not captured; .* Did you mean 'resid_post'\?$"):
            ask["resid_pst"]
    assert jax.tree.structure(jax.tree.map(lambda x: x, out)) == jax.tree.structure(out)
    assert jax.vmap(lambda t: forward(model, t, capture="z"))(np.stack([IDS, IDS]))["z"].shape == (2, 3, 4, 6, 6)


def test_what_prints_is_shapes(model: Llama) -> None:
    out = forward(model, IDS, capture=("z", "resid_post"))
    assert repr(out.activations) == "{z [3, 4, 6, 6], resid_post [3, 6, 24]}"
    assert repr(HeadAblation.grid(model.config)) == "HeadAblation(layer=int64[3, 1], head=int64[1, 4], replacement=0.0)"
    assert repr(HeadAblation(1, [0, 2])) == "HeadAblation(layer=1, head=[0, 2], replacement=0.0)"


def test_an_output_is_saved_and_opened(model: Llama, tmp_path: Path) -> None:
    out = forward(model, IDS, capture=("z", "embed"), mask=np.arange(6) > 0)
    save(out, tmp_path / "out")
    again = load(tmp_path / "out")
    assert type(again) is type(out)
    for name in ("logits", "applied", "mask"):
        np.testing.assert_array_equal(getattr(again, name), getattr(out, name))
    for name in ("z", "embed"):
        np.testing.assert_array_equal(again[name], out[name])
    with pytest.raises(TypeError, match=r'save\(\{"logits": array\}, path\)'):
        save(out.logits, tmp_path / "array")


def test_prompts_of_other_shapes_say_what_to_give(model: Llama) -> None:
    for call in (lambda t: forward(model, t), lambda t: sweep(model, t, HeadAblation(1, 2), log_probability(3))):
        with pytest.raises(ValueError, match=r"tokens, mask = oculi_jax.padded\(rows\)"):
            call([IDS.tolist(), IDS[:3].tolist()])
        with pytest.raises(TypeError, match=r'tokens\["input_ids"\]'):
            call({"input_ids": IDS, "attention_mask": IDS > 0})
    with pytest.raises(ValueError, match=r"give tokens\[0\]"):
        forward(model, IDS[None])


def test_padded_rows(embedded) -> None:
    tokens, mask = padded([[5, 6, 7], [8]])
    assert tokens.tolist() == [[5, 6, 7], [8, 0, 0]] and mask.tolist() == [[True] * 3, [True, False, False]]
    assert tokens.dtype == np.int32 and mask.dtype == bool
    _, tokenizer = embedded
    texts = ["The capital of France is", "Paris"]
    tokens, mask = padded(texts, tokenizer, length=9)
    for text, row, real in zip(texts, tokens, mask, strict=True):
        assert row[real].tolist() == tokenizer.encode(text)
        assert set(row[~real].tolist()) == {tokenizer.pad_token_id}
    for bad, said in (([], "rows is empty"), ([[1], []], "an empty prompt")):
        with pytest.raises(ValueError, match=said):
            padded(bad)
    with pytest.raises(ValueError, match="longest row has 3 tokens"):
        padded([[1, 2, 3]], length=2)
    with pytest.raises(TypeError, match="no tokenizer"):
        padded(["text"])


@pytest.mark.parametrize("fn", [lambda x: x * 0, lambda x, v, w: x])
def test_a_function_of_an_edit_takes_two(model: Llama, fn: Any) -> None:
    with pytest.raises(TypeError, match=r"called as fn\(x, value\)"):
        forward(model, IDS, Edit("mlp_out", "apply", 1, fn=fn))


def test_options_of_a_config_are_named(model: Llama) -> None:
    adapter = LlamaAttentionAdapter(model)
    for method in ("capture", "capture_residual", "capture_mlp", "capture_logits"):
        with pytest.raises(TypeError, match=rf"{method} takes that in its config: config=\w+\(layers=\[1\]\)"):
            getattr(adapter, method)(IDS, layers=[1])
    with pytest.raises(TypeError, match=r"no argument layer. Did you mean CaptureConfig\(layers=…\)\?"):
        adapter.capture(IDS, layer=[1])
    assert adapter.capture(IDS, CaptureConfig(layers=[1])).captured_layers == (1,)


def test_messages_of_a_chat_are_taken(embedded) -> None:
    model, tokenizer = embedded
    adapter, messages = (
        LlamaAttentionAdapter(model, copy.deepcopy(tokenizer)),
        [{"role": "user", "content": "The capital"}],
    )
    with pytest.raises(ValueError, match="no chat template"):
        adapter.generate(messages, 2)
    adapter.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} of {% endfor %}{% if add_generation_prompt %}France is{% endif %}"
    )
    want = adapter.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    np.testing.assert_array_equal(adapter.capture(messages).tokens, want)
    np.testing.assert_array_equal(
        adapter.capture([*messages, {"role": "assistant", "content": "Paris"}]).tokens,
        adapter.tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": "Paris"}], return_dict=False
        ),
    )
    said = adapter.tokenizer.decode(adapter.generate(list(want), 2)[len(want) :], skip_special_tokens=True)
    assert adapter.generate(messages, 2) == [*messages, {"role": "assistant", "content": said}]
    both = adapter.generate(messages, 2, HeadAblation(2, np.array([0, 1])))
    assert len(both) == 2 and all(chat[:1] == messages and chat[1]["role"] == "assistant" for chat in both)


def test_pads_without_a_mask_are_said(model: Llama) -> None:
    ids = np.array([[5, 6, 7], [8, 9, 0]])
    model = tiny_llama(pad_token_id=0)
    adapter = LlamaAttentionAdapter(model)
    with pytest.warns(UserWarning, match=r"Prompt 1 begins or ends with token 0, the pad id, .* no attention_mask"):
        adapter.capture(ids)
    with pytest.warns(UserWarning, match="no mask was given"):
        sweep(model, ids, HeadAblation(1, 2), lambda out: out.logits[-1, 3])
    adapter.capture(ids, attention_mask=ids != 0)
    adapter.capture(ids[:1])


def test_a_mean_says_which_shape_it_needs(model: Llama) -> None:
    with pytest.raises(ValueError, match=r"must end in \[H, T, D\] = \[4, 6, 6\].*PerLayer of \[3, 4, 1, 6\]"):
        forward(model, IDS, Blend("z", np.ones((3, 4)), np.ones((3, 4, 6))))
    forward(model, IDS, Blend("z", np.ones((3, 4)), PerLayer(np.ones((3, 4, 1, 6)))))


@pytest.mark.parametrize(
    "metric",
    [
        lambda out: float(out.logits[-1, 3]),
        lambda out: out.logits[-1, 3].item(),
        lambda out: np.asarray(out.logits)[-1, 3],
    ],
)
def test_a_metric_that_makes_a_number_is_told(model: Llama, metric: Any) -> None:
    with pytest.raises(TypeError, match=r"^The metric makes .* return the value as it is"):
        sweep(model, IDS, HeadAblation.grid(model.config), metric)


@pytest.mark.parametrize("site", ["pattern", "scores"])
@pytest.mark.parametrize("backend", ["jax", pytest.param("torch", marks=pytest.mark.torch)])
def test_padding_is_not_along_the_keys_of_a_direction(model: Llama, site: str, backend: str, tmp_path: Path) -> None:
    """Whatever stands in the direction at padding, and in a function of one's own that mixes keys."""
    if backend == "torch":
        model.save_pretrained(tmp_path)
        model = Llama.from_pretrained(tmp_path, backend="torch")
    direction = np.random.default_rng(0).normal(size=6).astype(np.float32)
    real = np.arange(8) > 1
    tokens = np.r_[5, 7, IDS]
    plain, edited = forward(model, IDS).logits, forward(model, IDS, DirectionAblation(site, 1, direction)).logits
    assert np.abs(np.asarray(plain) - np.asarray(edited)).max() > 1e-2
    for filler in (1.0, -50.0):
        wide = DirectionAblation(site, 1, np.r_[filler, filler, direction].astype(np.float32))
        found = forward(model, tokens, wide, mask=real).logits[2:]
        np.testing.assert_allclose(found, edited, atol=ROUNDING * np.abs(np.asarray(edited)).max())
    halved = Edit(site, "apply", 1, fn=lambda x, value: x - x.sum(-1, keepdims=True) / 2)
    np.testing.assert_allclose(
        forward(model, tokens, halved, mask=real).logits[2:],
        forward(model, IDS, halved).logits,
        atol=ROUNDING * np.abs(np.asarray(plain)).max() * 4,
    )


def test_outputs_compare_by_identity(model: Llama) -> None:
    out = forward(model, IDS, capture="z")
    assert out == out and out != copy.deepcopy(out) and len({out, out.activations}) == 2
    assert out.activations == out.activations and out.activations != copy.deepcopy(out.activations)


def test_a_recovery_that_is_none_is_nan_under_debugging_too() -> None:
    with jax.debug_nans(True):
        assert np.isnan(recovery(jnp.ones(3), jnp.float32(2), jnp.float32(2))).all()
        np.testing.assert_allclose(recovery(jnp.ones(3), jnp.float32(2), jnp.float32(0)), 0.5)


BEGUN = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
    "from oculi_jax import cli; print('begun', flush=True); sys.argv[0] = 'oculi'; cli.main()"
)


def reporting(folder: Path) -> subprocess.Popen:
    """`oculi report` in a process of its own, once it has begun, with nothing compiled before."""
    command = [sys.executable, "-c", BEGUN, "report", "The capital of France is", "-o", str(folder / "page.html")]
    env = {**os.environ, "XLA_FLAGS": "", "XDG_CACHE_HOME": str(folder / "cache")}
    found = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert found.stdout is not None and found.stdout.readline() == "begun\n"
    return found


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=120)
    return process.returncode, out, error


@pytest.mark.parametrize("after", [0.1, 0.6, 1.4, 2.2])
def test_control_c_ends_without_a_word(after: float, tmp_path: Path) -> None:
    """While modules are imported, while a model is read, while it runs; nothing is written."""
    process = reporting(tmp_path)
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    code, _, error = ended(process)
    assert code == 130 and "Traceback" not in error, error
    assert not list(tmp_path.glob("*.html"))


def test_terminating_ends_it(tmp_path: Path) -> None:
    process = reporting(tmp_path)
    time.sleep(0.5)
    process.terminate()
    assert ended(process)[0] == -signal.SIGTERM  # 143 in a shell


def test_a_full_standard_output_is_named() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "oculi_jax.cli", "sites"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "XLA_FLAGS": ""},
        )
    assert done.returncode == 1 and done.stderr == "oculi: Cannot write to standard output: No space left on device.\n"


def test_an_empty_prompt_is_said(oculi_here) -> None:
    code, _, error = oculi_here("lens", "")
    assert code == 0 and "The prompt is empty" in error


@pytest.mark.real
def test_the_other_spelling_of_an_answer_is_said(oculi_here, directory: Path) -> None:
    """A byte-level tokenizer has both spellings as tokens; the one with a space is what follows a word."""
    for command in (["sweep", "--target"], ["attribute", "--target"]):
        code, _, error = oculi_here(
            *command[:1], "The capital of France is", "--target", "Paris", "--model", str(directory)
        )
        assert code == 0 and "' Paris' is one token too, and likelier here" in error and "give ' Paris'" in error
    code, _, error = oculi_here(
        "attribute", "The capital of France is", "--target", " Paris", "--model", str(directory)
    )
    assert code == 0 and "likelier" not in error


def test_steering_from_a_file(oculi_here, tmp_path: Path, embedded) -> None:
    model, tokenizer = embedded
    vector = 30 * np.asarray(model.lm_head.weight)[tokenizer.encode("Rome")[-1]]
    np.save(tmp_path / "v.npy", vector)
    save({"v": vector}, tmp_path / "v.safetensors")
    for name in ("v.npy", "v.safetensors"):
        line = f"steer:file={tmp_path / name},layer=3,scale=2,site=resid_post"
        code, out, _ = oculi_here("generate", "The capital of France is", "-n", "2", "--intervene", line)
        assert code == 0 and "Rome" in out
    for line, said in {
        f"steer:file={tmp_path / 'no.npy'},layer=3": "there is no file",
        "steer:layer=3": "file is missing",
        f"steer:file={tmp_path / 'v.npy'},layer=30": "there are 4 layers",
        "spectra:layer=1,head=2,alpha=-1": "alpha",
        "head:layer=9,head=2": "there are 4 layers",
    }.items():
        code, _, error = oculi_here("generate", "The capital of France is", "--intervene", line)
        assert code == 2 and said in error, error


def test_what_cannot_be_is_refused_before_weights_are_read(oculi_here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Llama, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    for arguments in (
        ["generate", "Hello", "--intervene", "spectra:layer=1,head=2,alpha=-1"],
        ["generate", "Hello", "--intervene", "head:layer=9,head=2"],
        ["capture", "Hello", "-o", "x.safetensors", "--sites", "paterns"],
        ["patch", "a", "b", "--target", "c", "--site", "zz"],
    ):
        code, _, error = oculi_here(*arguments)
        assert code == 2 and error.startswith("oculi: "), error


def test_a_plans_seconds_are_arithmetic_and_reading_at_three_quarters_of_a_products_rate(model: Llama) -> None:
    todo = oculi_jax.plan(model, IDS, HeadAblation.grid(model.config), log_probability(3))
    assert dataclasses.replace(todo, rate=lambda: 4e9).seconds == pytest.approx((todo.flops + todo.reading) / 3e9)
    assert 1e8 < todo.rate() < 1e14 and "about" in repr(todo)
