"""The text of a token by its name in the vocabulary, for tokenizers whose names are texts."""

from __future__ import annotations

from typing import Any


def token_text(tokenizer: Any, token: Any) -> str:
    """Metaspace tokenizers write the space that is part of a token as ▁."""
    return tokenizer.convert_ids_to_tokens(int(token)).replace("▁", " ")
