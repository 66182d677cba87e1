"""Tokens whose space is part of them, for every family of tokenizer."""

from __future__ import annotations

from typing import Any

import pytest

from oculi_jax.utils.tokens import load_tokenizer, str_tokens, to_single_token

WORDS = ["<unk>", "▁", "a", "c", "t", "at", "cat", "▁a", "▁cat"]
VOCAB = {word: i for i, word in enumerate(WORDS)}


def fast(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def bpe() -> Any:
    from tokenizers import Tokenizer, models

    merges = [("a", "t"), ("c", "at"), ("▁", "cat"), ("▁", "a")]
    return Tokenizer(models.BPE(VOCAB, merges, unk_token="<unk>", fuse_unk=True))


def llama2() -> Any:
    """The normaliser and decoder of Llama 1 and 2, TinyLlama, Vicuna, CodeLlama."""
    from tokenizers import decoders, normalizers

    found = bpe()
    found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    found.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast(found)


def metaspace() -> Any:
    """SentencePiece's, as newer conversions write it."""
    from tokenizers import decoders, pre_tokenizers

    found = bpe()
    found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    found.decoder = decoders.Metaspace(prepend_scheme="first")
    return fast(found)


def gemma() -> Any:
    """A space becomes ▁, and none is put before a text."""
    from tokenizers import decoders, normalizers

    found = bpe()
    found.normalizer = normalizers.Replace(" ", "▁")
    found.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return fast(found)


@pytest.mark.parametrize("make", [llama2, metaspace, gemma])
def test_every_token_has_its_own_text(make: Any) -> None:
    tokenizer = make()
    assert str_tokens(tokenizer, list(range(1, 9))) == [word.replace("▁", " ") for word in WORDS[1:]]
    assert "".join(str_tokens(tokenizer, "a cat")).strip() == "a cat"


@pytest.mark.parametrize("make", [llama2, metaspace, gemma])
def test_a_word_with_its_space_is_found(make: Any) -> None:
    assert to_single_token(make(), " cat") == VOCAB["▁cat"]


def test_a_hint_says_which_way_it_is_one_token() -> None:
    with pytest.raises(ValueError, match="is not one token but 2") as error:
        to_single_token(llama2(), "cata")
    assert str(error.value).count("' cat'") == 1


@pytest.mark.real
def test_bytes_decode_as_before(directory) -> None:
    """A byte-level tokenizer loses no space, so each token is what decoding it alone gives."""
    tokenizer = load_tokenizer(directory)
    ids = range(0, len(tokenizer), 97)
    assert str_tokens(tokenizer, list(ids)) == [tokenizer.decode([i]) for i in ids]
