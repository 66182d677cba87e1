"""`oculi attribute`: which heads and MLPs an answer comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text as TextCell

import oculi_jax

from .common import (
    Asked,
    Chat,
    Dtype,
    Json,
    Longer,
    Model,
    Picture,
    check_picture,
    console,
    open_adapter,
    print_json,
    prompt_label,
    save_picture,
    shown,
    working,
)
from .effects import Target, answer_ids, as_fields, bar, print_check
from .prompts import OneText, PromptFile, Row, check_one, check_target, read_rows, token_ids
from .sets import (
    answers,
    as_lists,
    chunks,
    difference,
    encoded,
    in_words,
    interval_cells,
    mean_and_interval,
    note_few,
    others,
)

if TYPE_CHECKING:
    import numpy as np

    from ..analysis.result import Result
    from ..causal import Verification
    from ..models.llama import LlamaAttentionAdapter


LOST = "Lost without it: exact, the part set to zero and all else live"


def attribute(
    text: OneText = None,
    prompts: PromptFile = None,
    target: Target = None,
    against: Annotated[
        str | None,
        typer.Option(help="Another token: attribute the difference of the two logits.", show_default=False),
    ] = None,
    top: Annotated[int, typer.Option(help="How many heads and MLPs to show.", min=1)] = 12,
    verify: Annotated[
        int,
        typer.Option(
            help="Beside those shown, so many others, drawn at random, are set to zero to see what the logit loses; 0: no part is.",
            min=0,
        ),
    ] = 10,
    output: Picture = None,
    as_json: Json = False,
    chat: Chat = False,
    model: Model = None,
    dtype: Dtype = "auto",
    allow_longer: Longer = False,
) -> None:
    """Which heads and MLPs an answer comes from: direct logit attribution at the last token.

    Every part of the residual stream goes through the final norm, with its scale in this run, and the unembedding; the
    parts sum to the logit; where the family caps logits, to the logit before the cap. Beside it stands what the logit loses
    where a part is set to zero, which others may make up for, or need.
    """
    check_one(prompts, text=text)
    asked = _Asked(top, check_picture(output), as_json, chat, allow_longer, verify)
    if prompts is not None:
        rows = read_rows(prompts, ("prompt",), {"target": target, "against": against}, needed=("target",))
        adapter = open_adapter(model, dtype, *(row["prompt"] for row in rows), chat=chat)
        _of_set(adapter, rows, asked)
    elif text is not None:
        goal = check_target(target)
        adapter = open_adapter(model, dtype, text, chat=chat)
        _of_one(adapter, text, goal, against, asked)


@dataclass(frozen=True)
class _Asked(Asked):
    """What a line asks of attribution beside that: how many parts that are not shown are set to zero too."""

    verify: int

    def verified(
        self,
        adapter: LlamaAttentionAdapter,
        tokens: np.ndarray,
        mask: np.ndarray | None,
        token: np.ndarray,
        by_head: np.ndarray,
        by_mlp: np.ndarray,
    ) -> Verification | None:
        """What the logit loses without parts; None where that is not asked."""
        from .without import without

        return without(adapter, tokens, mask, token, by_head, by_mlp, self.top, self.verify) if self.verify else None


def _attributed(
    adapter: LlamaAttentionAdapter, tokens: np.ndarray, mask: np.ndarray | None, token: np.ndarray, longer: bool
) -> tuple[Result, Result]:
    """By component and by head, of one prompt `[T]` and an id `[]` or a pair `[2]`, or of several, which lead with `B`."""
    kept: dict[str, Any] = {  # heads' outputs come with any capture of attention
        "attention": oculi_jax.CaptureConfig(
            capture_queries=False, capture_keys=False, capture_values=False, capture_patterns=False
        ),
        "mlp": oculi_jax.MLPConfig(capture_gate=False, capture_up=False, capture_post_activation=False),
        "logits": oculi_jax.LogitConfig(layers=[0], top_k=1, positions=[-1]),
    }
    full = adapter.capture_full(tokens, attention_mask=mask, allow_longer=longer, **kept)
    return _program(mask is not None)(adapter.model, full.attention, full.residual, full.mlp, token)


@cache
def _program(of_set: bool) -> Callable[..., tuple[Result, Result]]:
    """The attribution of one prompt's captures or of several, as one program for prompts of a length."""
    import jax

    methods = oculi_jax.analysis.AttributionMethods

    def one(model: Any, attention: Any, residual: Any, mlp: Any, token: Any) -> tuple[Result, Result]:
        token = token if token.ndim == 0 else (token[0], token[1])
        parts = methods.component_attribution(residual, mlp, model.lm_head.weight, token)
        return parts, methods.head_attribution(attention, model, token, residual=residual)

    return jax.jit(jax.vmap(one, (None, 0, 0, 0, 0)) if of_set else one)


def _of_one(adapter: LlamaAttentionAdapter, text: str, target: str, against: str | None, asked: _Asked) -> None:
    import numpy as np

    tokens = token_ids(adapter, text, asked.longer, asked.chat)
    goal, other = answer_ids(adapter, tokens, target, against)
    token = np.array(goal if other is None else [goal, other])
    with working("Running the model"):
        parts, heads = _attributed(adapter, tokens, None, token, asked.longer)
        by_head, by_mlp = np.asarray(heads.values), np.asarray(parts.values)[:, 1]
    details, missed = heads.details, heads.completeness_error
    assert missed is not None
    checked = asked.verified(adapter, tokens, None, token, by_head, by_mlp)
    if asked.as_json:
        ends = {"logit": details["logit"], "embedding": details["embedding"], "completeness_error": missed}
        given = {"prompt": text, "chat": asked.chat, "target": target, "against": against}
        print_json({**given, **ends, "heads": by_head, "mlps": by_mlp, **as_fields(checked)})
    out = console(quiet=asked.as_json)
    what = (
        f"logit of {shown(target)}"
        + (f" − logit of {shown(against)}" if against is not None else "")
        + _before(adapter)
    )
    out.print(TextCell(f"{what} after {shown(prompt_label(text, asked.chat))}: {float(details['logit']):+.3f}"))
    out.print(_table([(name, value, "") for name, value, _ in _ranked(by_head, by_mlp)[: asked.top]], checked))
    rest = _summary(details["embedding"], by_head, by_mlp)
    out.print(f"{rest}; all parts together miss the logit by {float(missed):.1e}.", markup=False)
    print_check(out, LOST, checked, "part")
    if asked.picture:
        save_picture(_draw(parts, heads, what), asked.picture, asked.as_json)


def _of_set(adapter: LlamaAttentionAdapter, rows: list[Row], asked: _Asked) -> None:
    import jax
    import numpy as np

    tokens, mask = encoded(adapter, rows, "prompt", asked)
    token, what = answers(adapter, tokens, mask, rows, "target"), f"logit of {in_words(rows, 'target')}"
    if rows[0]["against"] is not None:
        token, what = np.stack([token, others(adapter, tokens, mask, rows, token)], axis=1), difference(rows)
    what += _before(adapter)
    with working("Running the model"):
        some = [_attributed(adapter, part, real, ids, asked.longer) for part, real, ids in chunks(tokens, mask, token)]
        parts, heads = jax.tree.map(lambda *x: np.concatenate(x), *some)
    by_head, by_mlp = mean_and_interval(heads.values), mean_and_interval(parts.values[:, :, 1])
    logit, embedding = mean_and_interval(heads.details["logit"]), mean_and_interval(heads.details["embedding"])
    checked = asked.verified(adapter, tokens, mask, token, by_head["mean"], by_mlp["mean"])
    note_few(rows)
    if asked.as_json:
        ends = {"logit": logit, "embedding": embedding, "completeness_error": heads.completeness_error}
        given = {**as_lists(rows, "prompt", "target", "against"), "chat": asked.chat}
        print_json({**given, **ends, "heads": by_head, "mlps": by_mlp, **as_fields(checked)})
    out = console(quiet=asked.as_json)
    mean, interval = interval_cells(logit)
    out.print(TextCell(f"{what}, mean over {len(rows)} prompts: {mean} (95 % interval {interval})"))
    ranked = _ranked(by_head["mean"], by_mlp["mean"])[: asked.top]
    cells = [(n, v, interval_cells(by_head if len(at) > 1 else by_mlp, at)[1]) for n, v, at in ranked]
    out.print(_table(cells, checked))
    rest, missed = _summary(embedding["mean"], by_head["mean"], by_mlp["mean"]), np.abs(heads.completeness_error).max()
    out.print(f"{rest}; all parts together miss a prompt's logit by at most {missed:.1e}.", markup=False)
    print_check(out, LOST, checked, "part")
    if asked.picture:
        parts, heads = jax.tree.map(lambda x: x.mean(axis=0), (parts, heads))
        save_picture(_draw(parts, heads, f"{what}\nmean over {len(rows)} prompts"), asked.picture, asked.as_json)


def _before(adapter: LlamaAttentionAdapter) -> str:
    """What parts sum to, where the family caps its logits."""
    return "" if adapter.model.config.logit_cap is None else " before the final soft cap"


def _summary(embedding: Any, by_head: np.ndarray, by_mlp: np.ndarray) -> str:
    rest = {"embedding": embedding, "all attention heads": by_head.sum(), "all MLPs": by_mlp.sum()}
    return ", ".join(f"{name} {float(value):+.3f}" for name, value in rest.items())


def _ranked(by_head: np.ndarray, by_mlp: np.ndarray) -> list[tuple[str, float, tuple[int, ...]]]:
    """Each part's name, what it adds, and its place; the largest first."""
    import numpy as np

    found = [(f"L{n}H{h}", float(v), (n, h)) for (n, h), v in np.ndenumerate(by_head)]
    found += [(f"L{n} MLP", float(v), (n,)) for n, v in enumerate(by_mlp)]
    return sorted(found, key=lambda part: -abs(part[1]))


def _table(parts: list[tuple[str, float, str]], checked: Verification | None) -> Table:
    """Each part's name and what it adds, its interval over prompts and what is lost without it where there are these, and a bar."""
    table = Table(box=None, pad_edge=False)
    table.add_column("part")
    table.add_column("adds to the logit", justify="right")
    if with_intervals := any(interval for _, _, interval in parts):
        table.add_column("95 % interval", justify="right")
    lost = {} if checked is None else {entry["part"]: f"{entry['exact']:+.3f}" for entry in checked.entries}
    if lost:
        table.add_column("lost without it", justify="right")
    table.add_column("")
    largest = abs(parts[0][1]) or 1.0
    for name, value, interval in parts:
        cells = [*([interval] if with_intervals else []), *([lost.get(name, "")] if lost else [])]
        table.add_row(name, f"{value:+.3f}", *cells, bar(value, largest))
    return table


def _draw(parts: Result, heads: Result, what: str) -> Any:
    figure, (left, right) = oculi_jax.visualize.panels(1, 2, 11.0, 5.0, widths=(3, 2))
    oculi_jax.visualize.attribution_bars(parts, ax=left, title=what)
    oculi_jax.visualize.attribution_bars(heads, ax=right, k=15, title="the strongest heads")
    return figure
