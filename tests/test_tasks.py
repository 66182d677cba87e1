"""Tasks: prompts are of their templates, and the two of a pair differ in the one token that the answer hangs on."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from typing import Any

import numpy as np
import pytest

from oculi_jax.tasks import PromptPairs, arithmetic, indirect_object, multiple_choice

MIB = json.loads(files("oculi_jax.tasks").joinpath("ioi.json").read_text(encoding="utf-8"))
FEW: dict[str, Any] = dict(names=("Mary", "John", "Anna"), places=("park",), objects=("key",))


@pytest.fixture(scope="module")
def pairs(embedded: Any) -> PromptPairs:
    return indirect_object(embedded[1], 60)


def pattern(template: str) -> str:
    """A template as an expression whose groups are what stands in its places; where a place comes again, so does that."""
    seen: set[str] = set()

    def group(match: re.Match[str]) -> str:
        again = match[1] in seen
        seen.add(match[1])
        return f"(?P={match[1]})" if again else f"(?P<{match[1]}>[A-Za-z]+)"

    return re.sub(r"\{(\w+)\}", group, template.replace(".", r"\."))


def read(text: str) -> dict[str, str]:
    """What stands in the places of the template that a text is of."""
    found = [match.groupdict() for template in MIB["templates"] if (match := re.fullmatch(pattern(template), text))]
    assert found, f"{text!r} is of no template"
    return found[0]


def test_prompts_are_of_mibs_templates(pairs: PromptPairs) -> None:
    orders = set()
    assert len(set(pairs.texts)) == len(pairs) == 60
    for text, corrupted in zip(pairs.texts, pairs.corrupted_texts, strict=True):
        clean, other = read(text), read(corrupted)
        assert {clean["name_A"], clean["name_B"]} == {clean["name_C"], other["name_C"]} <= set(MIB["names"])
        assert clean.get("place", "store") in MIB["places"] and clean.get("object", "ring") in MIB["objects"]
        assert clean | {"name_C": ""} == other | {"name_C": ""}
        orders.add(clean["name_A"] == clean["name_C"])
    assert orders == {True, False}


def test_a_pair_differs_in_the_giver_alone_and_its_answer_is_the_other(pairs: PromptPairs, embedded: Any) -> None:
    tokenizer = embedded[1]
    assert pairs.clean.shape == pairs.corrupted.shape == pairs.mask.shape
    for row, text in enumerate(pairs.texts):
        ids = tokenizer.encode(text)
        assert pairs.clean[row, pairs.mask[row]].tolist() == ids and pairs.mask[row, : len(ids)].all()
        (place,) = np.flatnonzero(pairs.clean[row] != pairs.corrupted[row])
        assert pairs.mask[row, place]
        assert (pairs.clean[row, place], pairs.corrupted[row, place]) == (pairs.others[row], pairs.answers[row])
        assert f" {tokenizer.decode([pairs.answers[row]]).strip()} " in f" {text} "


def test_a_seed_is_one_draw_and_a_slice_keeps_its_pairs(pairs: PromptPairs, embedded: Any) -> None:
    tokenizer = embedded[1]
    assert indirect_object(tokenizer, 60).texts == pairs.texts != indirect_object(tokenizer, 60, seed=1).texts
    some = pairs[40:]
    assert len(some) == 20 and some.texts == pairs.texts[40:] and np.array_equal(some.metric.ids, pairs.metric.ids[40:])
    with pytest.raises(TypeError, match="cut by a slice"):
        pairs[0]  # pyright: ignore


def test_what_makes_no_pairs_is_refused(embedded: Any) -> None:
    tokenizer = embedded[1]
    cases: list[tuple[dict[str, Any], str]] = [
        (dict(n=0), "n is 0"),
        (dict(n=9, templates=["{name_A} {name_B} {name_C}"], **FEW | {"names": ("Mary", "John")}), "only 4 different"),
        (dict(n=2, names=("Mary", "Zzyzx")), "Of 2 names 1 are a single token"),
        (dict(n=2, templates=["{name_A} and {name_B} left"], **FEW), r"has no \{name_C\}"),
        (dict(n=2, templates=["{name_A} {name_B} {name_C} {thing}"], **FEW), "cannot be filled"),
    ]
    for given, words in cases:
        with pytest.raises(ValueError, match=words):
            indirect_object(tokenizer, **given)


@pytest.mark.torch
def test_the_embedded_model_is_asked_for_opposites(pairs: PromptPairs, hf_trained: Any) -> None:
    """By Hugging Face's logits of the last real token."""
    import torch

    found = np.zeros((len(pairs), 2))
    for row, real in enumerate(pairs.mask):
        for column, tokens in enumerate((pairs.clean, pairs.corrupted)):
            with torch.no_grad():
                logits = hf_trained(torch.tensor(tokens[row : row + 1, real])).logits[0, -1]
            found[row, column] = logits[pairs.answers[row]] - logits[pairs.others[row]]
    away = found.mean(axis=0) / (found.std(axis=0) / len(pairs) ** 0.5)  # in standard errors
    assert away[0] > 4 and away[1] < -4


WORDS: dict[str, Any] = dict(
    things=(("key", "small"), ("map", "new"), ("hat", "old"), ("lamp", "bright"), ("cup", "cold")),
    letters=("B", "one", "two", "three", "four", "five", "six"),  # of which the first is no token
)


@pytest.mark.parametrize("kind", ["position", "letters", "both"])
def test_choices_differ_in_what_is_asked_for(kind: str, embedded: Any) -> None:
    """Read back from the texts: what is right, where it stands, and by which letter."""
    tokenizer = embedded[1]
    pairs = multiple_choice(tokenizer, 40, counterfactual=kind, n_choices=3, **WORDS)

    def read(text: str) -> tuple[str, str, list[str], list[str]]:
        match = re.fullmatch(
            r"The (\w+) is (\w+)\. What color is the \1\?\n(\w+)\. (\w+)\n(\w+)\. (\w+)\n(\w+)\. (\w+)\nAnswer:", text
        )
        assert match, text
        thing, color, *rest = match.groups()
        return thing, color, rest[::2], rest[1::2]

    assert len(set(pairs.texts)) == len(pairs) == 40 and pairs.clean.shape == pairs.corrupted.shape
    for row, texts in enumerate(zip(pairs.texts, pairs.corrupted_texts, strict=True)):
        (thing, color, letters, colors), (other, same, theirs, changed) = map(read, texts)
        assert (thing, color) == (other, same) and [thing, color] in [list(x) for x in WORDS["things"]]
        assert letters == ["one", "two", "three"] and len(set(colors)) == 3 and sorted(colors) == sorted(changed)
        place, there = colors.index(color), changed.index(color)
        assert (place == there) == (kind == "letters") and (theirs == letters) == (kind == "position")
        assert kind == "position" or not set(theirs) & set(letters)
        said = [tokenizer.decode([int(x[row])]) for x in (pairs.answers, pairs.others, pairs.pointed)]
        assert said == [letters[place], theirs[there], letters[there]]
    assert type(pairs[:3]).__name__ == "ChoicePairs" and pairs[:3].pointed.shape == (3,)


def test_choices_that_cannot_be_made_are_told(embedded: Any) -> None:
    for options, message in (
        ({"counterfactual": "symbol"}, "counterfactual is 'symbol', and must be one of 'position'"),
        ({"n_choices": 6}, "things have 5 colors, and 6 choices"),
        ({"counterfactual": "both", "n_choices": 4}, "Of the letters 6 are a single token of this tokenizer, and 8"),
        ({"template": "What color is the {object}?"}, "has no {color}"),
        ({"n": 60, "n_choices": 2}, "different prompts were found"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            multiple_choice(embedded[1], **{"n": 2, **WORDS, **options})


@pytest.mark.real
@pytest.mark.parametrize("operation", ["addition", "subtraction"])
def test_sums_are_right(operation: str, directory: Any) -> None:
    from oculi_jax import load_tokenizer

    tokenizer = load_tokenizer(directory)
    pairs = arithmetic(tokenizer, 50, operation=operation)
    word, sign = {"addition": ("plus", 1), "subtraction": ("minus", -1)}[operation]
    assert len(set(pairs.texts)) == 50
    for texts, ids in ((pairs.texts, pairs.answers), (pairs.corrupted_texts, pairs.others)):
        for text, answer in zip(texts, ids, strict=True):
            match = re.fullmatch(rf"Q: How much is (\d\d) {word} (\d\d)\? A: ", text)
            assert match, text
            a, b = map(int, match.groups())
            assert tokenizer.decode([int(answer)]) == str(a + sign * b)[0]
    assert (pairs.answers != pairs.others).all()


def test_sums_that_cannot_be_asked_are_told(embedded: Any) -> None:
    for options, message in (
        ({"operation": "product"}, "operation is 'product', and must be 'addition' or 'subtraction'"),
        ({"template": "{a} and"}, "has no {b}"),
        ({}, "This tokenizer does not know '0'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            arithmetic(embedded[1], 2, **options)
