"""What was measured → one HTML page that needs nothing else: no network, no fonts, no libraries."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from ..adapter.adapter import LlamaAttentionAdapter
from ..utils.files import write_aside
from .measured import Measured, measure
from .visible import visible_prompt, visible_token

if TYPE_CHECKING:
    from ..backends.protocol import ModelLike
    from ..utils.tokens import Tokenizer

# Score → its label, and what it is the mean of; `oculi_jax.analysis.circuits` defines them.
SCORES = {
    "previous_token": ("previous token", "attention to the token before"),
    "induction": ("induction", "attention to what followed earlier occurrences of the current token"),
    "duplicate_token": ("duplicate token", "attention to earlier occurrences of the current token"),
    "bos": ("first token", "attention to the first token"),
    "recent": ("recent", "attention to the 4 tokens before"),
    "local": ("local", "attention to the 4 tokens before and to itself"),
    "uniform": ("uniform", "entropy of the attention over the largest possible"),
}


class Page(str):
    """A page's text, which a notebook shows in a frame of its own, and which saves itself."""

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{escape(self, quote=True)}" sandbox="allow-scripts" width="100%" height="720" '
            'style="border:1px solid #8884"></iframe>'
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the page, whole or not at all."""
        with write_aside(path) as aside:
            aside.write_text(self, encoding="utf-8", newline="\n")


def report(
    model: LlamaAttentionAdapter | ModelLike,
    text: str,
    *,
    tokenizer: Tokenizer | None = None,
    target: str | None = None,
    heads: Sequence[tuple[int, int]] | None = None,
    progress: Callable[[int, int], None] | bool | None = None,
    allow_longer: bool = False,
) -> Page:
    """A prompt's insides as one self-contained HTML page. Host function.

    What the model says next; the logit lens at every layer and token; attention patterns; head scores on repeated random
    tokens (`head_scores`); what each head's absence does to the target's lead over the likeliest other token (`sweep` of
    `HeadAblation`); and direct logit attribution of the target (`AttributionMethods`).

    Args:
        model: an adapter, which has its tokenizer; or a model.
        text: the prompt.
        tokenizer: of the model, where that is no adapter.
        target: a text of one token, whose logit is attributed and whose lead over the likeliest other ablations are judged by; None
            for the likeliest next token.
        heads: (layer, head) pairs whose patterns the page holds; None for all of them where they take a few MB, else the
            strongest by ablation and by scores.
        progress: as in `sweep`, of the ablations.
        allow_longer: go beyond the length that the model was made for.

    Returns:
        The page: a text that shows itself in a notebook, and `save(path)`. Texts of the prompt are data in it, never markup,
        and it may load nothing and run nothing but its own script, by a content security policy.

    Raises:
        ValueError, TypeError: a prompt, target or head that cannot be; a prompt too long for a page (512 tokens, or 20,000
            cells of the lens); inside an `InterventionContext`.
    """
    if isinstance(model, LlamaAttentionAdapter):
        adapter = model
    elif tokenizer is None:
        raise TypeError(
            "A report needs a tokenizer beside the model: report(model, text, tokenizer=…), or give an adapter."
        )
    else:
        adapter = LlamaAttentionAdapter(model, tokenizer)
    return page(measure(adapter, text, target=target, heads=heads, progress=progress, allow_longer=allow_longer))


def page(measured: Measured) -> Page:
    """The HTML of what was measured."""
    here = files("oculi_jax.pages")
    template, style, script = (here.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    # "<" alone could end the element that holds the data; what else JSON escapes leaves nothing but ASCII.
    data = json.dumps(_data(measured), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    text = Template(template).substitute(
        style=style, style_hash=_hash(style), script=script, script_hash=_hash(script), data=data
    )
    return Page(text)


def _hash(text: str) -> str:
    """How a content security policy names an inline element: nothing but this very text is run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _data(m: Measured) -> dict[str, Any]:
    """What the script reads."""
    words = {i: visible_token(text) for i, text in m.words.items()}
    order = {i: place for place, i in enumerate(words)}
    sizes = m.sizes
    return {
        "prompt": visible_prompt(m.prompt),
        "model": {
            "name": m.name,
            "parameters": m.parameters,
            "dtype": m.dtype,
            "layers": sizes["L"],
            "heads": sizes["H"],
            "kvHeads": sizes["K"],
            "width": sizes["E"],
            "mlp": sizes["F"],
            "vocabulary": sizes["V"],
        },
        "words": list(words.values()),
        "tokens": [order[i] for i in m.tokens.tolist()],
        "next": {"words": [order[i] for i in m.next_ids.tolist()], "probabilities": _numbers(m.next_probabilities)},
        "target": {
            "word": order[m.target],
            "chosen": m.chosen,
            "logProbability": _numbers(m.target_log_probability),
            "logit": _numbers(m.target_logit),
        },
        "rival": {"word": order[m.rival], "logit": _numbers(m.rival_logit)},
        "lens": {
            "words": np.vectorize(order.__getitem__, otypes=[int])(m.lens_ids).tolist(),
            "probabilities": _numbers(m.lens_probabilities),
            "target": _numbers(m.lens_target),
        },
        "attention": {"heads": m.heads, "selection": m.selection, "weights": _packed(m.patterns)},
        "scores": _scores(m),
        "ablation": _numbers(m.effects),
        "attribution": _attribution(m),
    }


def _scores(m: Measured) -> dict[str, Any]:
    """What each head does on repeated random tokens."""
    return {
        "sequences": m.n_sequences,
        "repeat": m.repeat,
        "kinds": [
            {
                "name": name,
                "label": label,
                "meaning": meaning,
                "values": _numbers(m.scores[name]),
                "errors": _numbers(m.errors[name]),
            }
            for name, (label, meaning) in SCORES.items()
        ],
    }


def _attribution(m: Measured) -> dict[str, Any]:
    """What the parts of the model add to the target's logit."""
    return {
        "embedding": _numbers(m.embedding),
        "attention": _numbers(m.attention),
        "mlp": _numbers(m.mlp),
        "other": _numbers(m.other),
        "heads": _numbers(m.by_head),
        "bias": _numbers(m.bias),
        "error": _numbers(m.completeness_error),
    }


def _numbers(values: Any) -> Any:
    """Python floats of five digits, nested as the array is."""
    array = np.asarray(values, np.float64)
    return np.array([float(f"{x:.5g}") for x in array.ravel()]).reshape(array.shape).tolist()


def _packed(patterns: np.ndarray) -> str:
    """Rows 0 … t of every head's triangle as unsigned 16-bit integers, 65535 for a weight of 1; little-endian, base64."""
    rows, columns = np.tril_indices(patterns.shape[-1])
    scaled = np.rint(np.clip(patterns[:, rows, columns], 0.0, 1.0) * 65535.0)
    return base64.b64encode(scaled.astype("<u2").tobytes()).decode()
