"""`--chat`: what a user says is put into the tokenizer's chat template, as transformers does it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oculi_jax import HeadAblation, forward
from oculi_jax.embedded import embedded_directory
from oculi_jax.models.llama import LlamaAttentionAdapter

from .margins import assert_leads
from .report.pages import content
from .tolerances import ROUTES

# The message stands in the middle; the place where the assistant answers is a text of its own.
TEMPLATE = (
    "{% for m in messages %}{{ bos_token }}{% if m['role'] == 'user' %}The capital {{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} is{% endif %}"
)
SAID = "of France"


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a chat template in its tokenizer."""
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("chatty")
    shutil.copytree(embedded_directory(), directory, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def ids(chatty: Path) -> Callable[[str], list[int]]:
    """What transformers makes of a user's message."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chatty)

    def ids(text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)

    assert ids(SAID) != tokenizer.encode(SAID) and len(ids(SAID)) > len(tokenizer.encode(SAID))
    return ids


@pytest.fixture
def run(oculi_here, chatty: Path) -> Callable[..., dict[str, Any]]:
    def run(*arguments: str) -> dict[str, Any]:
        code, out, err = oculi_here(*arguments, "--chat", "--json", "--model", str(chatty))
        assert code == 0, err
        found = json.loads(out)
        assert found["chat"] is True
        return found

    return run


def log_softmax(logits: Any) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


@pytest.fixture(scope="module")
def plain(trained: LlamaAttentionAdapter, ids) -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
    """The logits `[V]` after a message, and the patterns of its run."""

    def plain(text: str) -> tuple[np.ndarray, np.ndarray]:
        out = forward(trained.model, ids(text), capture="pattern", logits="last")
        return np.asarray(out.logits), np.asarray(out.activations["pattern"])

    return plain


def test_what_each_command_runs_is_the_template(run, ids, plain, trained: LlamaAttentionAdapter) -> None:
    model, paris, tokens = trained.model, trained.to_single_token("Paris"), ids(SAID)
    logits, pattern = plain(SAID)
    assert_leads(logits)
    chances = np.exp(log_softmax(logits))

    found = run("lens", SAID)
    assert found["prompt"] == SAID and found["answer_id"] == logits.argmax()
    assert abs(found["layers"][-1]["probability_of_answer"] - chances.max()) < ROUTES
    found = run("sweep", SAID, "--target", "Paris")
    assert abs(found["plain"] - log_softmax(logits)[paris]) < ROUTES
    without = forward(model, tokens, HeadAblation(2, 1), logits="last").logits
    assert abs(found["change"][2][1] - (log_softmax(without) - log_softmax(logits))[paris]) < 2 * ROUTES
    found = run("attribute", SAID, "--target", "Paris")
    assert abs(found["logit"] - logits[paris]) < 10 * ROUTES
    found = run("patch", SAID, "of Italy", "--target", "Paris", "--by", "layer")
    other, _ = plain("of Italy")
    assert abs(found["clean"] - log_softmax(logits)[paris]) < ROUTES and found["clean_prompt"] == SAID
    assert abs(found["corrupted"] - log_softmax(other)[paris]) < ROUTES
    found = run("generate", SAID, "-n", "4")
    (written,) = found["runs"]
    new = trained.tokenizer.convert_tokens_to_ids([token.replace(" ", "▁") for token in written["tokens"]])
    steps = np.asarray(forward(model, [*tokens, *new]).logits)[len(tokens) - 1 : -1]
    assert_leads(steps)
    assert len(new) == 4 and new == steps.argmax(axis=-1).tolist()
    assert written["text"].split() == trained.tokenizer.decode(new, skip_special_tokens=True).split()
    previous = np.mean([pattern[:, :, t, t - 1] for t in range(1, len(tokens))], axis=0)
    np.testing.assert_allclose(run("heads", "--text", SAID)["scores"]["previous_token"], previous, atol=ROUTES)


def test_prompts_of_a_file_are_messages_too(run, plain, tmp_path: Path) -> None:
    texts = [SAID, "of Italy", "of Spain"]
    (tmp_path / "x.txt").write_text("\n".join(texts))
    found = run("lens", "--prompts", str(tmp_path / "x.txt"))
    want = [np.exp(log_softmax(plain(text)[0])).max() for text in texts]
    np.testing.assert_allclose([row[-1] for row in found["probability_of_answer"]["by_prompt"]], want, atol=ROUTES)


def test_oculi_capture_writes_the_ids_of_the_template(oculi_here, chatty: Path, ids, tmp_path: Path) -> None:
    from safetensors import safe_open

    file = tmp_path / "x.safetensors"
    code, _, err = oculi_here("capture", SAID, "--chat", "--sites", "z", "-o", str(file), "--model", str(chatty))
    assert code == 0, err
    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["tokens"]) == ids(SAID) and metadata["text"] == SAID
    assert json.loads(metadata["chat"]) is True


def test_oculi_report_of_a_message(oculi_here, chatty: Path, ids, tmp_path: Path, trained) -> None:
    page = tmp_path / "x.html"
    code, _, err = oculi_here("report", SAID, "--chat", "-o", str(page), "--model", str(chatty))
    assert code == 0, err
    data = content(page.read_text(encoding="utf-8"))
    words = [data["words"][token] for token in data["tokens"]]
    assert [word.replace("␣", " ") for word in words] == trained.str_tokens(ids(SAID))
    assert data["prompt"] == f"user: {SAID}"


def test_lines_and_titles_say_that_a_user_says_it(oculi_here, chatty: Path, tmp_path: Path) -> None:
    given = ("--chat", "--model", str(chatty))
    code, out, _ = oculi_here("lens", SAID, *given, "-o", str(tmp_path / "x.svg"))
    assert code == 0 and f"user: {SAID} → ' Paris'" in out
    code, out, _ = oculi_here("sweep", SAID, "--target", "Paris", *given)
    assert code == 0 and f"after 'user: {SAID}': " in out
    code, out, _ = oculi_here("generate", SAID, "-n", "4", *given)
    lines = [line.strip() for line in out.splitlines() if line.strip()]
    assert code == 0 and lines[1] == f"user: {SAID}" and lines[2].startswith("Paris")
    code, _, err = oculi_here("capture", "", "--sites", "embed", "-o", str(tmp_path / "x.safetensors"), *given)
    assert code == 0 and "The message is empty" in err and "start of a text" not in err


def test_a_tokenizer_without_a_template_is_named(oculi_here, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a\nb")
    for line in (
        ["lens", "a"],
        ["heads", "--text", "a"],
        ["sweep", "--prompts", str(tmp_path / "x.txt"), "--target", "a"],
    ):
        code, out, err = oculi_here(*line, "--chat")
        assert code == 2 and out == ""
        assert err == "oculi: --chat is given, and the tokenizer of tiny-facts has no chat template: leave it out.\n"
