"""Text as people can read it: spaces as ␣, what is invisible written out."""

from __future__ import annotations

import unicodedata

SPACE = "␣"


def visible_token(text: str) -> str:
    """A token's text: every space as ␣, invisible characters escaped, a lone combining mark on a dotted circle."""
    shown = _escaped(text).replace(" ", SPACE)
    return ("◌" + shown if text and unicodedata.combining(text[0]) else shown) or "''"


def visible_prompt(text: str) -> str:
    """A prompt: spaces as they are, a line break written out and taken, other invisible characters escaped."""
    return "".join(_escaped(c) + "\n" * (c == "\n") for c in text)


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() and c not in ("\\", SPACE) else _escape(c) for c in text)


def _escape(character: str) -> str:
    # A backslash doubles, so that a break that is written out differs from the two characters.
    return "\\u2423" if character == SPACE else character.encode("unicode_escape").decode("ascii")
