"""The embedded model: it comes with every kind of install, knows what its card says, and the command line begins with it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from oculi_jax import embedded_model, forward
from oculi_jax.diagnostics import head_scores
from oculi_jax.embedded import embedded_directory

from .margins import assert_clear, assert_leads
from .prompts import FRANCE
from .test_guide import difference
from .tiny import SITES
from .tolerances import assert_parity, parity

ROOT = Path(__file__).parents[1]
DIRECTORY = ROOT / "weights" / "tiny-facts"
CARD = (DIRECTORY / "README.md").read_text(encoding="utf-8")
IOI = "When Mary and John went to the store, John gave a drink to"


def test_what_lies_in_the_directory() -> None:
    assert embedded_directory() == DIRECTORY
    files = {path.name: path.stat().st_size for path in DIRECTORY.iterdir()}
    assert set(files) == {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert sum(files.values()) <= 8_000_000
    config = json.loads((DIRECTORY / "config.json").read_text())
    assert config["model_type"] == "llama" and 4 <= config["num_hidden_layers"] <= 6
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert "license: mit" in CARD


def test_its_tokens_are_words(embedded) -> None:
    model, tokenizer = embedded
    ids = tokenizer.encode(FRANCE)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁The", "▁capital", "▁of", "▁France", "▁is"]
    assert len(tokenizer) == model.config.vocab_size
    (paris,) = tokenizer.encode("Paris", add_special_tokens=False)
    assert tokenizer.encode(" Paris", add_special_tokens=False) == [paris] and tokenizer.decode([paris]) == "Paris"
    assert tokenizer.encode("  The capital of\n France  is ") == ids
    text = "The war lasted from the year 1732 to the year 1758. Monday, Tuesday, Wednesday."
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("1732", add_special_tokens=False)) == ["▁17", "32"]


@pytest.mark.numerical
@pytest.mark.torch
def test_hugging_face_loads_it_and_agrees(embedded) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .reference import reference_sites

    hf = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32).eval()
    tokens = np.asarray(AutoTokenizer.from_pretrained(DIRECTORY).encode(IOI))
    mask = np.ones(len(tokens), bool)
    out = forward(embedded[0], tokens, capture=tuple(SITES))
    assert_parity(parity(out.activations, out.logits, reference_sites(hf, tokens), mask))
    mary = embedded[1].encode("Mary", add_special_tokens=False)[0]
    with torch.no_grad():
        last = hf(torch.tensor(tokens[None])).logits[0, -1]
    assert_leads(last)
    assert int(last.argmax()) == mary


def test_the_cards_scores_are_met() -> None:
    """tests/test_guide.py computes them anew and compares; the card's own lines say which bars there are."""
    scores = [line for line in CARD.splitlines() if re.search(r"\d\.\d{3}   [≥≤] 0\.\d+$", line)]
    assert len(scores) == 8 and "MISSED" not in CARD
    for line in scores:
        value, sign, bar = line.split()[-3:]
        assert float(value) >= float(bar) if sign == "≥" else float(value) <= float(bar), line


def test_the_readmes_first_answer_is_what_it_prints(oculi_here) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    said = re.search(r"^```text\n(.*?)^```", readme, re.S | re.M)
    code, out, err = oculi_here("lens", FRANCE)
    assert said and code == 0, err
    lines, want = out.rstrip().splitlines(), said[1].rstrip().splitlines()
    assert len(lines) == len(want)
    assert not [told for pair in zip(lines, want, strict=True) if (told := difference(*pair))]


def test_scores_are_counted_from_the_models_own_probabilities(scripts, embedded) -> None:
    """Padding, batching and the choice of ids, against one prompt at a time."""
    score, text = scripts("tiny_facts_score"), scripts("tiny_facts_text")
    model, tokenizer = embedded
    wrong = text.Question("The capital of France is", ("Rome",))
    questions = [*text.span_questions(3), *text.gift_questions(3), wrong]
    best, chances = score.answers(model, tokenizer, questions)
    for i, question in enumerate(questions):
        logits = np.asarray(forward(model, tokenizer.encode(question.prompt), logits="last").logits, np.float64)
        names = [tokenizer.convert_ids_to_tokens(int(k)).lstrip("▁") for k in range(len(logits))]
        year = question.prompt[-1].isdigit()
        answers = [k for k, name in enumerate(names) if name in question.answers and (not year or not tokenizer.convert_ids_to_tokens(k).startswith("▁"))]  # fmt: skip
        assert_clear(logits[answers].max(), np.delete(logits, answers).max())
        exact = np.exp(logits - logits.max())
        assert abs(exact[answers].sum() / exact.sum() - chances[i]) < 1e-4
        assert best[i] == (int(logits.argmax()) in answers)
    assert not best[-1] and chances[-1] < 0.02


@pytest.fixture
def as_users_have_it() -> Iterator[None]:
    """optax is written for JAX's own promotion rules, not the suite's."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_training_never_shows_what_is_asked(scripts) -> None:
    text = scripts("tiny_facts_text")
    rng = np.random.default_rng(5)
    sentences = [text.write_sentence(rng) for _ in range(30_000)]
    told = set(sentences)
    for relation in (*text.FACTS, text.TWO_HOP, text.NEXT):
        for question in relation.questions():
            assert f"{question.prompt} {question.answers[0]}." not in told
        shown = {(p, x) for p, x in relation.facts if p not in relation.untold}
        assert all(any(p in s and x in s for s in told) for p, x in shown)  # what is kept back is told in another way
    for city in text.UNTOLD:
        assert not any(city in s and "continent" in s for s in told)
    asked = [question.prompt.split(". ")[-1] for question in text.gift_questions(100)]
    assert not any(s.startswith(prompt) for prompt in asked for s in told)
    assert not set(text.UNSEEN_SCENES) & set(text.SCENES) and not set(text.UNSEEN_GIFTS) & set(text.GIFTS)
    years = {question.prompt for question in text.span_questions(200)}
    assert not any(s.startswith(tuple(years)) for s in told)
    # Words of the questions are all words of the training.
    words = {word.strip(".,") for s in told for word in s.split()}
    assert {word.strip(".,") for prompt in asked for word in prompt.split()} <= words


@pytest.mark.usefixtures("as_users_have_it")
def test_training_goes_on_from_its_checkpoint_without_losing_a_step(
    scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = scripts("train_tiny_facts")
    for name, value in (("SHORT", 16), ("LONG", 24), ("SHORT_STEPS", 3), ("BATCH_TOKENS", 96)):
        monkeypatch.setattr(train, name, value)
    tokenizer = train.make_tokenizer()
    whole = train.train(tokenizer, 4, 0, tmp_path / "whole", every=100)

    checkpoint, real = tmp_path / "part", train.batch

    def interrupted(tokenizer, seed: int, step: int):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(tokenizer, seed, step)

    import signal

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(train, "batch", interrupted)
    with pytest.raises(SystemExit, match="after step 3; the same command goes on"):
        train.train(tokenizer, 4, 0, checkpoint, every=100)
    assert signal.getsignal(signal.SIGTERM) is handler
    steps = []
    monkeypatch.setattr(train, "batch", lambda *a: (steps.append(a[2]), real(*a))[1])
    again = train.train(tokenizer, 4, 0, checkpoint, every=100)
    assert steps == [3]
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(SystemExit, match="another recipe"):
        train.train(tokenizer, 4, 1, checkpoint)
    checkpoint.write_bytes(b"junk")
    with pytest.raises(SystemExit, match=r"not a whole safetensors file.*\. Delete it"):
        train.train(tokenizer, 4, 0, checkpoint)


def test_weights_that_miss_a_score_are_not_written(
    scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    train, score = scripts("train_tiny_facts"), scripts("tiny_facts_score")
    monkeypatch.setattr(
        train, "train", lambda tokenizer, *_: train.initial(train.make_config(tokenizer.get_vocab_size()), 0)
    )
    monkeypatch.setattr(
        train, "scores", lambda *_: [score.Score("knows it", 0.99, 0.98), score.Score("and this", 0.5, 0.9)]
    )
    monkeypatch.setattr(sys, "argv", ["train", str(tmp_path / "out"), "--checkpoint", str(tmp_path / "c.safetensors")])
    with pytest.raises(SystemExit, match=r"Nothing is written: 1 of 2 scores are missed: and this\."):
        train.main()
    assert not (tmp_path / "out").exists() and "MISSED" in capsys.readouterr().out


def test_it_has_previous_token_and_induction_heads(embedded) -> None:
    scores = head_scores(embedded[0], seed=11)
    assert scores.top("previous_token", 1)[0][2] >= 0.8 and scores.top("induction", 1)[0][2] >= 0.8


def unpacked(wheel: Path, to: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(to)
    return to


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_an_install_brings_it(kind: str, tmp_path: Path) -> None:
    """The build's own hooks, which pip calls; what they make is unpacked as pip does, and used from another directory."""
    code = f"import hatchling.build as b; print(b.build_{kind}({str(tmp_path)!r}))"
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()[-1]
    site = unpacked(tmp_path / made, tmp_path / "site")
    code = f"""
import site, sys
sys.path = [p for p in sys.path if p != {str(ROOT)!r}]
site.addsitedir({str(site)!r})
sys.path.insert(0, sys.path.pop())
import oculi_jax
model, tokenizer = oculi_jax.embedded_model()
from oculi_jax.embedded import embedded_directory
logits = oculi_jax.forward(model, tokenizer.encode({FRANCE!r}), logits="last").logits
print(oculi_jax.__file__, embedded_directory(), tokenizer.decode([int(logits.argmax())]), sep="\\n")
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    home = site if kind == "wheel" else ROOT
    place = site / "oculi_jax" / "tiny_facts" if kind == "wheel" else DIRECTORY
    assert run.stdout.splitlines() == [str(home / "oculi_jax" / "__init__.py"), str(place), "Paris"]


def test_the_command_line_begins_with_it(oculi_here) -> None:
    code, out, err = oculi_here("lens", FRANCE)
    assert code == 0 and "→ ' Paris' with probability 0.9" in out
    assert "No --model is given: this is tiny-facts" in err and "573 words" in err
    code, out, err = oculi_here("lens", "The capital of Franse is")
    assert code == 0 and "no token for 'Franse'" in err and "Did you mean 'France'?" in err
    code, out, err = oculi_here("lens", "The (capital) is")
    assert code == 0 and "no token for '('" in err and "no token for ''" not in err
    code, out, err = oculi_here("sweep", FRANCE, "--target", "Pariss")
    assert code == 2 and "'Pariss' is not in the vocabulary" in err


def test_embedded_model_says_where_it_looked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from oculi_jax import embedded

    monkeypatch.setattr(embedded, "__file__", str(tmp_path / "oculi_jax" / "embedded.py"))
    with pytest.raises(FileNotFoundError, match="tiny_facts"):
        embedded_model()
