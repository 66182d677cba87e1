"""Gemma 3 270M: the facts that are known of it, and parity with Hugging Face."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from oculi_jax import HeadAblation, forward, from_pretrained, load_tokenizer, sweep
from oculi_jax.metrics import logit_difference

from .prompts import FRANCE, IOI

pytestmark = pytest.mark.real

Gemma = tuple[Any, Any, Path]


@pytest.fixture(scope="module")
def gemma() -> Gemma:
    """Model, tokenizer and directory. Who brings the weights accepts their terms of use: so it is asked for."""
    path = Path(__file__).parents[1] / "weights" / "gemma-3-270m"
    if not path.exists():
        if os.environ.get("OCULI_TESTS") != "all":
            pytest.skip("Gemma's weights are not here: python weights/gemma3.py weights/gemma-3-270m brings them.")
        subprocess.run([sys.executable, path.parent / "gemma3.py", path], check=True)
    return from_pretrained(path, dtype="float32"), load_tokenizer(path), path


def one(gemma: Gemma, text: str) -> int:
    (token,) = gemma[1].encode(text, add_special_tokens=False)
    return token


@pytest.mark.numerical
def test_known_answers(gemma: Gemma) -> None:
    """Figures that Hugging Face gives for these weights."""
    model, tokenizer, _ = gemma
    ids = tokenizer.encode(FRANCE)
    assert ids == [2, 818, 5279, 529, 7001, 563]
    chances = np.asarray(jax.nn.softmax(forward(model, ids, logits="last").logits))
    for text, chance in ((" the", 0.191), (" a", 0.111), (" Paris", 0.084), (" one", 0.072)):
        assert abs(chances[one(gemma, text)] - chance) < 6e-4
    mary, john = one(gemma, " Mary"), one(gemma, " John")
    for giver, difference in (("John", 5.220), ("Mary", -3.610)):
        logits = forward(model, tokenizer.encode(IOI.format(giver)), logits="last").logits
        assert abs(float(logits[mary] - logits[john]) - difference) < 2e-3
        if giver == "John":
            chances = jax.nn.softmax(logits)
            assert abs(float(chances[mary]) - 0.853) < 6e-4 and abs(float(chances[one(gemma, " the")]) - 0.048) < 6e-4


@pytest.mark.numerical
def test_the_heads_that_matter(gemma: Gemma) -> None:
    model, tokenizer, _ = gemma
    ids, metric = tokenizer.encode(IOI.format("John")), logit_difference(one(gemma, " Mary"), one(gemma, " John"))
    changes = np.asarray(sweep(model, ids, HeadAblation.grid(model.config), metric)) - 5.220
    known = {(7, 1): -1.61, (11, 3): -1.41, (6, 1): -1.30, (17, 0): -1.06}
    assert [tuple(divmod(int(i), 4)) for i in np.argsort(changes, axis=None)[:4]] == list(known)
    for place, change in known.items():
        assert abs(changes[place] - change) < 6e-3


def test_greedy_continuation(gemma: Gemma) -> None:
    model, tokenizer, _ = gemma
    ids = tokenizer.encode(FRANCE)
    found = tokenizer.decode(np.asarray(model.generate(ids, 16))[len(ids) :])
    assert found.startswith(" the capital of the country of France. It is the largest city in France and")


def test_the_tokenizer_gives_texts_back(gemma: Gemma) -> None:
    tokenizer = gemma[1]
    for text in ("  two  spaces", "line\n\n\ttab", "naïve 😀 123", "<start_of_turn>user\n"):
        ids = tokenizer.encode(text)
        assert ids[0] == 2 and tokenizer.decode(ids[1:]) == text
    assert tokenizer.encode("line\n\n\ttab") == [2, 1257, 108, 255968, 4823]  # as transformers reads the file itself


@pytest.mark.numerical
@pytest.mark.torch
def test_every_site_agrees_with_hugging_face(gemma: Gemma) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from .reference import assert_near

    model, tokenizer, directory = gemma
    hf = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokens = np.array([0, 0, *tokenizer.encode(IOI.format("John"))])
    mask = np.arange(len(tokens)) >= 2
    out = forward(model, tokens, capture=tuple(model.config.sites), mask=mask)
    assert_near(hf, out, tokens, mask)
