"""What the tests of the report share: prompts, and how a page is taken apart."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from typing import Any

import jax
import numpy as np

PROMPT = "The capital of France is"
HOSTILE = "The capital </script><script>window.ran=1</script> <img src=x onerror=window.ran=1> \"of\" 'it' &amp; 🦙\n\u2028\u202e \\n is"
SHOWN = 6e-4  # a number of three decimals, and the rounding of what it was stored as


class Elements(HTMLParser):
    """What a page is made of: (tag, attributes), and the text of each script and style."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[tuple[str, dict[str, str | None], str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        tag, attributes = self.tags[-1] if self.tags else ("", {})
        if tag in ("script", "style") and data.strip():
            self.inline.append((tag, attributes, data))


def content(html: str) -> dict[str, Any]:
    """The data of a page."""
    found = [text for tag, attributes, text in Elements(html).inline if attributes.get("id") == "data"]
    assert len(found) == 1
    return json.loads(found[0])


def triangles(data: dict[str, Any]) -> list[list[np.ndarray]]:
    """Rows of each head's pattern as the page stores them, decoded in a loop."""
    n_tokens, numbers = (
        len(data["tokens"]),
        np.frombuffer(base64.b64decode(data["attention"]["weights"]), "<u2") / 65535,
    )
    heads, at = [], 0
    for _ in data["attention"]["heads"]:
        rows = []
        for t in range(n_tokens):
            rows.append(numbers[at : at + t + 1])
            at += t + 1
        heads.append(rows)
    assert at == len(numbers)
    return heads


def softmax(logits: Any) -> np.ndarray:
    return np.asarray(jax.nn.softmax(logits, axis=-1))
