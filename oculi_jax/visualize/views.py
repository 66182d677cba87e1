"""What a notebook shows that answers to the pointer: attention, the lens, a text coloured by numbers; offline, in a frame."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import integer
from ..webpage.page import Page, numbers, packed, page, part
from ..webpage.visible import visible_prompt, visible_token
from .canvas import as_numbers, as_texts, as_values
from .lens import FORM, is_of_positions, read_positions

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

ABOVE, BELOW, UNKNOWN = (143, 63, 0), (8, 81, 156), (128, 128, 128)  # the ends of the page's colours, and a grey
MOST_BYTES = 16 << 20  # of patterns, two a weight
_HEADING = '<h2 id="{}-heading">{}</h2>\n'
_OWN = files("oculi_jax.webpage").joinpath("attention_view.js")


def attention_view(
    capture: Any,
    tokens: Sequence[str] | None = None,
    *,
    layers: Sequence[int] | None = None,
    layer: int | None = None,
    head: int = 0,
) -> Page:
    """Attention patterns to look through: choose a layer and a head, point at a token. Host function.

    Args:
        capture: an `AttentionCapture` of one prompt with its patterns (or a `FullCapture`), of which padding is left out; or
            patterns `[L, H, T, T]`.
        tokens: the texts of all T tokens, as `adapter.str_tokens(ids)`; None for the ids, or positions.
        layers: true layer numbers, where `capture` is an array; None for 0 to L − 1.
        layer: the true number of the layer that is shown first; None for the first.
        head: the head that is shown first.

    Returns:
        A page that shows itself in a notebook, works offline, and saves itself: `.save("attention.html")`.

    Raises:
        ValueError, TypeError: a shape, a number of tokens, a layer or a head that cannot be; what is no attention, or is to later
            tokens; more than 16 MB of patterns.

    Examples:
        >>> attention_view(capture, adapter.str_tokens(ids)).save("attention.html")
    """
    patterns, numbered, names = _patterns(capture, layers, tokens)
    n_layers, n_heads, n_tokens = patterns.shape[:3]
    first = numbered[0] if layer is None else integer(layer, "layer")
    if first not in numbered:
        raise ValueError(f"layer is {first}, and there are {', '.join(map(str, numbered))}.")
    head = integer(head, "head", 0, n_heads - 1)
    words, (places,) = _words(names)
    size = n_layers * n_heads * n_tokens * (n_tokens + 1)
    if size > MOST_BYTES:
        raise ValueError(
            f"{n_layers} layers × {n_heads} heads of {n_tokens} tokens are {size / 2**20:.0f} MB of patterns, and a page holds "
            f"{MOST_BYTES >> 20}: capture some layers alone, CaptureConfig(layers=[…])."
        )
    data = {
        "words": words,
        "tokens": places,
        "layers": numbered,
        "heads": n_heads,
        "attention": {
            "heads": [(number, h) for number in numbered for h in range(n_heads)],
            "first": numbered.index(first) * n_heads + head,
            "weights": packed(patterns.reshape(-1, n_tokens, n_tokens)),
        },
    }
    body = _HEADING.format("attention", "Attention") + part("attention", chooser="")
    return page("Attention", "view", body, ("attention.js",), _OWN.read_text("utf-8"), data, 720)


def lens_view(
    predictions: Sequence[Any], tokens: Sequence[str] | None = None, *, positions: Sequence[int] | None = None
) -> Page:
    """What the model would say at each layer and position; point at a cell for its likeliest tokens. Host function.

    Args:
        predictions: a list of what `LogitLensAnalysis.layer_predictions` returns, one for each position.
        tokens: the text of the token at each; None for the positions.
        positions: where in the prompt they are; None for 0, 1, ….

    Returns:
        A page that shows itself in a notebook, works offline, and saves itself.

    Raises:
        ValueError, TypeError: predictions of another form; layers that differ between positions; a number of tokens that
            cannot be.

    Examples:
        >>> tool = analysis.LogitLensAnalysis(tokenizer)
        >>> lens_view([tool.layer_predictions(capture.logits, t) for t in (4, 5)], positions=[4, 5]).save("lens.html")
    """
    if not is_of_positions(predictions):
        raise TypeError(f"predictions is not a list, one entry for each position, of {FORM}.")
    layers, rows = read_positions(predictions)
    count = len(rows[0])
    where = as_numbers(positions, count, "positions")
    if not np.isfinite([p for row in rows for cell in row for _, p in cell]).all():
        raise ValueError(
            "predictions has probabilities that are not finite: the model's logits are not, at these positions."
        )
    names = [str(t) for t in where] if tokens is None else as_texts(tokens, count, "tokens")
    words, (places, *said) = _words(names, *([text for text, _ in cell] for row in rows for cell in row))
    data = {
        "words": words,
        "tokens": places,
        "layers": layers,
        "heads": 0,
        "lens": {
            "positions": where,
            "words": [said[i * count : (i + 1) * count] for i in range(len(layers))],
            "probabilities": [[numbers([p for _, p in cell]) for cell in row] for row in rows],
        },
    }
    body = _HEADING.format("lens", "Logit lens") + part("lens")
    return page("Logit lens", "view", body, ("lens.js",), "drawLens();", data, min(240 + 30 * len(layers), 720))


class Text(str):
    """HTML that a notebook shows, without a script."""

    def __repr__(self) -> str:
        return f"Text({len(self.encode()) / 1e3:.1f} kB of HTML)"

    def _repr_html_(self) -> str:
        return str(self)


def token_view(tokens: Sequence[str], values: ArrayLike, label: str = "") -> Text:
    """A text whose tokens are coloured by a number each: orange above zero, blue below it; pointing says the number.

    Args:
        tokens: the texts of T tokens, as `adapter.str_tokens(ids)`.
        values: `[T]`, for instance log-probabilities, a head's norm, or a feature's activation. What is not finite is grey.
        label: what the numbers are, shown below with their range.

    Returns:
        HTML without a script, which a notebook shows, a code host too.

    Raises:
        ValueError, TypeError: a shape, or a number of tokens, that cannot be.

    Examples:
        >>> strength = np.asarray(capture.residual.post_mlp[1]).std(-1)  # of the stream after layer 1
        >>> token_view(adapter.str_tokens(ids), strength, "standard deviation").count("<span")
        6
    """
    numbers_of = as_values(values, "values", "T")
    names = as_texts(tokens, len(numbers_of), "tokens")
    finite = np.isfinite(numbers_of)
    largest = float(np.abs(numbers_of[finite]).max(initial=0.0))
    pieces = []
    for name, value, known in zip(names, numbers_of, finite, strict=True):
        share = abs(value) / largest if known and largest else 0.0
        red, green, blue = (ABOVE if value > 0 else BELOW) if known else UNKNOWN
        style = f"background:rgba({red},{green},{blue},{share if known else 0.3:.3f});padding:1px 2px;border-radius:3px"
        if share > 0.8:  # white on it has the better contrast from here on
            style += ";color:#fff"
        pieces.append(f'<span title="{value:.4g}" style="{style}">{escape(_broken(name))}</span>')
    written = "".join(piece + "<br>" * ("\n" in name) for piece, name in zip(pieces, names, strict=True))
    span = f"{numbers_of[finite].min():.4g} to {numbers_of[finite].max():.4g}" if finite.any() else "none is finite"
    below = f"<div style='font-size:smaller'>{escape(label)}: {span}</div>" if label else ""
    return Text(f"<div style='white-space:pre-wrap;line-height:1.8'>{written}</div>{below}")


def _broken(token: str) -> str:
    """A token as it stands in running text: spaces stay, what is invisible is written out."""
    return visible_prompt(token).replace("\n", "")


def _words(*lists: Sequence[str]) -> tuple[list[str], list[list[int]]]:
    """Every text once, as people can read it; and each list as places among them."""
    order: dict[str, int] = {}
    places = [[order.setdefault(text, len(order)) for text in texts] for texts in lists]
    return [visible_token(text) for text in order], places


def _patterns(
    capture: Any, layers: Sequence[int] | None, tokens: Sequence[str] | None
) -> tuple[np.ndarray, list[int], list[str]]:
    """Patterns `[L, H, T, T]`, true layer numbers, and texts, ids or positions of the real tokens of a capture or an array."""
    capture = getattr(capture, "attention", capture)
    found = getattr(capture, "patterns", capture)
    if found is None:
        raise ValueError("This capture has no patterns: take them with CaptureConfig(capture_patterns=True).")
    patterns = as_values(found, "patterns", "L H T T", hint="A batch is shown one prompt at a time: capture[0].")
    n_tokens = patterns.shape[-1]
    if patterns.shape[2] != n_tokens:
        raise ValueError(f"patterns has shape {list(patterns.shape)}, and as many queries as keys are needed.")
    if found is capture:
        numbered, names = as_numbers(layers, len(patterns), "layers"), list(map(str, range(n_tokens)))
    elif layers is not None:
        raise ValueError("layers names those of an array, and a capture knows its own.")
    else:
        numbered, names = list(capture.captured_layers), [str(i) for i in capture.tokens]
    if len(set(numbered)) < len(numbered):
        raise ValueError(f"layers is {numbered}, and names one of them twice.")
    names = names if tokens is None else as_texts(tokens, n_tokens, "tokens")
    if (mask := getattr(capture, "mask", None)) is not None:
        real = np.flatnonzero(np.asarray(mask))
        patterns, names = patterns[:, :, real][..., real], [names[i] for i in real]
    low, high = patterns.min(), patterns.max()  # NaN where there is one
    if not (low >= 0 and high <= 1 + 1e-2):
        raise ValueError(f"patterns has values from {low:.3g} to {high:.3g}, and weights of attention are 0 to 1.")
    if np.triu(patterns, 1).any():
        raise ValueError(
            "patterns has attention to later tokens, which this view does not show; attention_heatmap does."
        )
    return patterns, numbered, names
