"""What was measured → one HTML page that needs nothing else: no network, no fonts, no libraries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from ..adapter.adapter import LlamaAttentionAdapter
from ..webpage.network import checked, network, network_data
from ..webpage.page import Page, numbers, packed, part
from ..webpage.page import page as web_page
from ..webpage.visible import visible_prompt, visible_token
from .measured import Measured, measure

if TYPE_CHECKING:
    from ..backends.protocol import ModelLike
    from ..circuits import Circuit
    from ..models.decoder.config import DecoderConfig
    from ..utils.tokens import Tokenizer

# What stands below the grid of heads in a report.
CARD = """<p class="soft small">Shaded by what its ablation does, as further below.</p>
    <dl id="head-card" class="card" aria-live="polite" aria-label="The chosen head"></dl>"""

# What a report has beside, where a circuit is given.
CIRCUIT = """  <section id="circuit" aria-labelledby="network-heading">
    <h2 id="network-heading">Circuit</h2>
    <p class="lead">A part of the model, layers upwards: nodes, and edges by which one tells another, as wide as their scores are
      large. Point at a node for its edges; a click keeps it, and Escape lets it go.</p>
{}  </section>
"""

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


def report(
    model: LlamaAttentionAdapter | ModelLike,
    text: str | Sequence[Mapping[str, str]],
    *,
    tokenizer: Tokenizer | None = None,
    target: str | None = None,
    heads: Sequence[tuple[int, int]] | None = None,
    circuit: Circuit | None = None,
    progress: Callable[[int, int], None] | bool | None = None,
    allow_longer: bool = False,
) -> Page:
    """A prompt's insides as one self-contained HTML page. Host function.

    What the model says next; the logit lens at every layer and token; attention patterns; head scores on repeated random
    tokens (`head_scores`); what each head's absence does to the target's lead over the likeliest other token (`sweep` of
    `HeadAblation`); and direct logit attribution of the target (`AttributionMethods`).

    Args:
        model: an adapter, which has its tokenizer; or a model.
        text: the prompt; or messages of a chat, which are put into the tokenizer's template.
        tokenizer: of the model, where that is no adapter.
        target: a text of one token, whose logit is attributed and whose lead over the likeliest other ablations are judged by; None
            for the likeliest next token.
        heads: (layer, head) pairs whose patterns the page holds; None for all of them where they take a few MB, else the
            strongest by ablation and by scores.
        circuit: of this model, which the page then shows too, as `oculi_jax.visualize.circuit_view` does.
        progress: as in `sweep`, of the ablations.
        allow_longer: go beyond the length that the model was made for.

    Returns:
        The page: a text that shows itself in a notebook, and `save(path)`. Texts of the prompt are data in it, never markup,
        and it may load nothing and run nothing but its own script, by a content security policy.

    Raises:
        ValueError, TypeError: a prompt, target or head that cannot be; a circuit of another model; a prompt too long for a page
            (512 tokens, or 20,000 cells of the lens); inside an `InterventionContext`.

    Examples:
        >>> page = report(model, text, tokenizer=tokenizer)
        >>> page.save("italy.html")
    """
    if isinstance(model, LlamaAttentionAdapter):
        adapter = model
    elif tokenizer is None:
        raise TypeError(
            "A report needs a tokenizer beside the model: report(model, text, tokenizer=…), or give an adapter."
        )
    else:
        adapter = LlamaAttentionAdapter(model, tokenizer)
    if circuit is not None:
        check_circuit(circuit, adapter.model.config)
    measured = measure(adapter, text, target=target, heads=heads, progress=progress, allow_longer=allow_longer)
    return page(measured, circuit)


def check_circuit(circuit: Circuit, config: DecoderConfig) -> None:
    """Raises for a circuit of another model."""
    graph, c = checked(circuit).graph, config.sizes
    if (graph.n_layers, graph.n_heads) != (c["L"], c["H"]):
        raise ValueError(
            f"circuit is of a model of {graph.n_layers} layers with {graph.n_heads} heads each, and this one has {c['L']} with "
            f"{c['H']}."
        )


def page(measured: Measured, circuit: Circuit | None = None) -> Page:
    """The HTML of what was measured, and of a circuit where there is one."""
    here = files("oculi_jax.pages")
    body, script = (here.joinpath(f"report.{kind}").read_text("utf-8") for kind in ("html", "js"))
    parts = {"lens": part("lens"), "attention": part("attention", chooser=CARD), "circuit": "", "circuit_link": ""}
    data, scripts = _data(measured), ("lens.js", "attention.js")
    if circuit is None:
        return web_page("Oculi report", "report", Template(body).substitute(parts), scripts, script, data)
    parts |= {"circuit": CIRCUIT.format(part("network")), "circuit_link": '\n    <a href="#circuit">Circuit</a>'}
    data["network"] = network_data(network(circuit))
    return web_page(
        "Oculi report",
        "report",
        Template(body).substitute(parts),
        (*scripts, "network.js"),
        f"{script}\ndrawNetwork();",
        data,
        styles=("network.css",),
    )


def _data(m: Measured) -> dict[str, Any]:
    """What the script reads."""
    words = {i: visible_token(text) for i, text in m.words.items()}
    order = {i: place for place, i in enumerate(words)}
    sizes = m.sizes
    # The head that is shown first: of those whose patterns are kept, the one whose ablation does most.
    first = int(np.argmax([abs(m.effects[layer, head]) for layer, head in m.heads]))
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
        "layers": list(range(sizes["L"])),
        "heads": sizes["H"],
        "words": list(words.values()),
        "tokens": [order[i] for i in m.tokens.tolist()],
        "next": {"words": [order[i] for i in m.next_ids.tolist()], "probabilities": numbers(m.next_probabilities)},
        "target": {
            "word": order[m.target],
            "chosen": m.chosen,
            "logProbability": numbers(m.target_log_probability),
            "logit": numbers(m.target_logit),
        },
        "rival": {"word": order[m.rival], "logit": numbers(m.rival_logit)},
        "lens": {
            "positions": list(range(len(m.tokens))),
            "words": np.vectorize(order.__getitem__, otypes=[int])(m.lens_ids).tolist(),
            "probabilities": numbers(m.lens_probabilities),
            "target": numbers(m.lens_target),
        },
        "attention": {"heads": m.heads, "first": first, "selection": m.selection, "weights": packed(m.patterns)},
        "scores": _scores(m),
        "ablation": numbers(m.effects),
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
                "values": numbers(m.scores[name]),
                "errors": numbers(m.errors[name]),
            }
            for name, (label, meaning) in SCORES.items()
        ],
    }


def _attribution(m: Measured) -> dict[str, Any]:
    """What the parts of the model add to the target's logit."""
    return {
        "embedding": numbers(m.embedding),
        "attention": numbers(m.attention),
        "mlp": numbers(m.mlp),
        "other": numbers(m.other),
        "heads": numbers(m.by_head),
        "bias": numbers(m.bias),
        "logit": numbers(m.attributed_logit),
        "capped": m.capped,
        "error": numbers(m.completeness_error),
    }
