"""What an answer after a prompt is, as a metric and in words; a bar while variants run; effects as text."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import oculi_jax

from .common import console, shown

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from rich.console import Console

    from ..causal import Verification
    from ..metrics import Metric
    from ..models.llama import LlamaAttentionAdapter
    from ..sweeps.planning import Plan

Target = Annotated[
    str | None,
    typer.Option(help="The answer, one token; mind the space before a word: ' Paris'.", show_default="none"),
]
Against = Annotated[
    str | None,
    typer.Option(
        help="Another token: the metric is then the difference of the two logits, not the target's log-probability.",
        show_default=False,
    ),
]


def answer(adapter: LlamaAttentionAdapter, tokens: np.ndarray, target: str) -> int:
    """The id of an answer after a prompt; says so where its other spelling, with or without a space, is much likelier there."""
    token = adapter.to_single_token(target)
    twin = twin_of(adapter, target)
    if twin is not None:
        out = oculi_jax.forward(adapter.model, tokens, logits="last")
        chance, better = (float(oculi_jax.metrics.log_probability(i)(out)) for i in (token, twin))
        if better > chance + MUCH_LIKELIER:
            other = shown(spelling(target))
            console(error=True).print(
                f"{other} is one token too, and likelier here: log-probability {better:+.2f}, that of {shown(target)} "
                f"{chance:+.2f}. For that one give {other}.",
                markup=False,
            )
    return token


def spelling(target: str) -> str:
    """A target's other spelling: without the space before it, or with one."""
    return target[1:] if target.startswith(" ") else f" {target}"


def twin_of(adapter: LlamaAttentionAdapter, target: str) -> int | None:
    """The id of a target's other spelling, where that is one token and another one."""
    try:
        twin = adapter.to_single_token(spelling(target))
    except ValueError:
        return None
    return None if twin == adapter.to_single_token(target) else twin


def answer_ids(
    adapter: LlamaAttentionAdapter, tokens: np.ndarray, target: str, against: str | None
) -> tuple[int, int | None]:
    """The ids of an answer after a prompt and, where there is one, of another that it is measured against."""
    token = answer(adapter, tokens, target)
    if against is None:
        return token, None
    other = answer(adapter, tokens, against)
    if token == other:
        raise ValueError(f"--target and --against are both {shown(target)}: there is no difference to measure.")
    return token, other


def measure(adapter: LlamaAttentionAdapter, tokens: np.ndarray, target: str, against: str | None) -> tuple[Metric, str]:
    """The metric at the last token of a prompt, and what it is called."""
    token, other = answer_ids(adapter, tokens, target, against)
    if other is None:
        return oculi_jax.metrics.log_probability(token), f"log-probability of {shown(target)}"
    return oculi_jax.metrics.logit_difference(token, other), f"logit of {shown(target)} − logit of {shown(against)}"


# In nats: ten times as likely.
MUCH_LIKELIER = 2.3


def announce(todo: Plan) -> None:
    """Says beforehand how long a call takes, where that is more than a moment."""
    if todo.seconds > 5:
        console(error=True).print(f"{todo.n_runs} runs: about {todo.seconds:.0f} s on this device, and compiling.")


@contextmanager
def counting(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, for `progress` of a sweep. It is there at once, and pulses while programs are compiled."""
    where = console(error=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=where, transient=True, disable=not where.is_terminal) as bar:
        task = bar.add_task(escape(label), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def strongest(effects: np.ndarray, count: int, sign: int = 0) -> list[tuple[int, ...]]:
    """Where the largest effects are, largest first: of either sign, or of one; without those that three decimals call 0."""
    import numpy as np

    size = np.where(np.isfinite(effects), np.abs(effects) if sign == 0 else sign * effects, 0.0)
    order = np.argsort(-size, axis=None, kind="stable")[:count]
    places = [tuple(map(int, np.unravel_index(flat, size.shape))) for flat in order]
    return [place for place in places if size[place] >= 5e-4]


def bar(effect: float, largest: float, width: int = 20) -> str:
    """Its length is the size; it is full where the effect is positive."""
    return ("█" if effect > 0 else "░") * round(width * abs(effect) / largest)


def column(values: Sequence[float] | np.ndarray) -> str:
    """A profile in one line of text, from 0 to 1; what is negative or not finite is blank."""
    import numpy as np

    steps = " ▁▂▃▄▅▆▇█"
    return "".join(steps[round(8 * float(np.clip(np.nan_to_num(value), 0.0, 1.0)))] for value in values)


def legible(text: str) -> str:
    """A line that can be drawn: what is invisible, or not in the font, is escaped."""
    from ..visualize.canvas import token_labels

    return token_labels([text], longest=10_000)[0]


def heading(figure: Figure, *lines: str) -> None:
    """Titles a figure of one grid; lines that are wider than it go on in the next, at most three of each."""
    from ..visualize.canvas import LITERAL, MEDIUM

    letters = int(figure.get_size_inches()[0] * 72 / (0.55 * MEDIUM))
    wrapped = (textwrap.wrap(legible(line), letters, max_lines=3, placeholder=" …") for line in lines)
    figure.suptitle("\n".join(part for some in wrapped for part in some), fontsize=MEDIUM, **LITERAL)


def as_fields(checked: Verification | None) -> dict[str, Any]:
    """A verification as JSON has it."""
    if checked is None:
        return {}
    names = ("rank_correlation", "sign_errors", "missed", "entries")
    return {"verification": {name: getattr(checked, name) for name in names}}


def print_check(out: Console, what: str, checked: Verification | None, key: str) -> None:
    """How estimates agree with exact effects; `what` these are, and `key` what an entry's name is under."""
    if checked is None:
        return
    n_top, n = sum(entry["top"] for entry in checked.entries), len(checked.entries)
    wrong, missed = (", ".join(entry[key] for entry in found) for found in (checked.sign_errors, checked.missed))
    text = (
        f"{what}; {n} runs, of these {n_top} and of {n - n_top} others drawn at random. Rank correlation "
        f"{checked.rank_correlation:.2f}; of opposite sign {wrong or 'none'}; of the others, among the {n_top} largest losses "
        f"{missed or 'none'}."
    )
    out.print(text, markup=False)
