"""`oculi paths`: which components tell others, by paths that lead through no other head, what makes answers differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    save_picture,
)
from .effects import Against, Target, announce, bar, heading, measure, strongest
from .pairs import Clean, Corrupted, aligned, check_aligned, print_ends, print_mean_ends, read_pairs
from .prompts import PairFile, Row, check_one, check_target, token_ids
from .sets import as_lists, interval_cells, mean_and_interval, measure_set, note_few

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from ..circuits import PathEffects
    from ..metrics import Metric
    from ..models.llama import LlamaAttentionAdapter

DIRECTIONS = {
    "noising": "what they say on the corrupted prompt, in the clean run",
    "denoising": "what they say on the clean prompt, in the corrupted run",
}
WORDS = {"direction": tuple(DIRECTIONS), "mlps": ("live", "frozen"), "norms": ("live", "frozen")}


def paths(
    clean: Clean = None,
    corrupted: Corrupted = None,
    prompts: PairFile = None,
    target: Target = None,
    against: Against = None,
    senders: Annotated[
        str | None,
        typer.Option(
            help="What is patched, all of it together: input, heads a9.h6, MLPs m0, with commas between them. Left out: every one "
            "alone.",
            show_default=False,
        ),
    ] = None,
    receivers: Annotated[
        str,
        typer.Option(
            help="Who is told: logits; or the queries, keys and values of heads, 'a9.h9<q>' (keys and values of all heads that "
            "share them, 'a9.g3<k>'), and MLPs, m10, with commas between them."
        ),
    ] = "logits",
    mlps: Annotated[str, typer.Option(help="MLPs on the way: live, or frozen.")] = "live",
    norms: Annotated[str, typer.Option(help="Norms on the way: live, or frozen.")] = "live",
    direction: Annotated[
        str, typer.Option(help="noising: corrupted into clean; denoising: the other way.")
    ] = "noising",
    top: Annotated[int, typer.Option(help="How many senders to show.", min=1)] = 12,
    output: Picture = None,
    as_json: Json = False,
    chat: Chat = False,
    model: Model = None,
    dtype: Dtype = "auto",
    allow_longer: Longer = False,
) -> None:
    """Which components tell others, by paths that lead through no other head, what makes two prompts' answers differ.

    Path patching (Wang et al. 2022): what a sender says on one prompt reaches the receivers in the run of the other, and after
    them all goes on as it does. The metric is the log-probability of the target after the prompt; with --against, the difference
    of two logits. Of a file of pairs (a line is clean and corrupted with a tab between them, or an object with these fields)
    effects are means.
    """
    check_one(prompts, clean=clean, corrupted=corrupted)
    picture = check_picture(output)
    how = {"mlps": mlps, "norms": norms, "direction": direction}
    for name, word in how.items():
        if word not in WORDS[name]:
            raise ValueError(f"--{name} is {word!r}, and must be {' or '.join(WORDS[name])}.")
    if picture and senders is not None:
        raise ValueError("A picture is of every head alone, and --senders are patched together: leave out one of them.")
    asked = _Asked(top, picture, as_json, chat, allow_longer, _names(senders), _names(receivers) or (), how)
    if prompts is not None:
        rows, texts = read_pairs(prompts, target, against)
        _of_set(open_adapter(model, dtype, *texts, chat=chat), rows, asked)
    elif clean is not None and corrupted is not None:
        goal = check_target(target)
        adapter = open_adapter(model, dtype, clean, corrupted, chat=chat)
        _of_one(adapter, clean, corrupted, goal, against, asked)


@dataclass(frozen=True)
class _Asked(Asked):
    """What a line asks of paths beside that; `how` is what `path_patching` takes by name."""

    senders: tuple[str, ...] | None
    receivers: tuple[str, ...]
    how: Mapping[str, Any]

    @property
    def base(self) -> str:
        """The run that is patched."""
        return "clean" if self.how["direction"] == "noising" else "corrupted"


def _names(text: str | None) -> tuple[str, ...] | None:
    """Names with commas between them."""
    return None if text is None else tuple(part.strip() for part in text.split(","))


def _found(
    adapter: LlamaAttentionAdapter, clean: np.ndarray, corrupted: np.ndarray, mask: Any, metric: Metric, asked: _Asked
) -> PathEffects:
    patching = oculi_jax.circuits.path_patching
    given = (adapter.model, clean, corrupted, metric, asked.senders, asked.receivers)
    announce(oculi_jax.plan(patching, *given, mask=mask, **asked.how))
    return patching(*given, mask=mask, **asked.how)


def _of_one(
    adapter: LlamaAttentionAdapter, clean: str, corrupted: str, target: str, against: str | None, asked: _Asked
) -> None:
    import numpy as np

    ids = [token_ids(adapter, text, asked.longer, asked.chat) for text in (clean, corrupted)]
    metric, name = measure(adapter, ids[0], target, against)
    check_aligned(adapter, *ids)
    found = _found(adapter, ids[0], ids[1], None, metric, asked)
    if asked.as_json:
        values = {"clean": found.clean, "corrupted": found.corrupted, "patched": found.patched, "change": found.values}
        _print_json({"clean_prompt": clean, "corrupted_prompt": corrupted}, name, found, asked, values)
    out = console(quiet=asked.as_json)
    print_ends(out, (clean, corrupted), (found.clean, found.corrupted), asked.chat)
    patched, change = np.atleast_1d(found.patched), np.atleast_1d(found.values)
    columns = {"metric": lambda at: f"{patched[at]:+.3f}", "change": lambda at: f"{change[at]:+.3f}"}
    _print(out, name, change, asked, found, columns)
    if asked.picture:
        ends = f"{name}: clean {float(found.clean):+.2f}, corrupted {float(found.corrupted):+.2f}"
        _draw(np.asarray(found.heads), asked, ends)


def _of_set(adapter: LlamaAttentionAdapter, rows: list[Row], asked: _Asked) -> None:
    import numpy as np

    clean, corrupted, mask = aligned(adapter, rows, asked)
    metric, name = measure_set(adapter, clean, mask, rows)
    found = _found(adapter, clean, corrupted, mask, metric, asked)
    runs = {kind: mean_and_interval(getattr(found, kind)) for kind in ("clean", "corrupted", "patched")}
    change = mean_and_interval(found.values)
    note_few(rows)
    if asked.as_json:
        prompts = {f"{kind}_prompt": [row[kind] for row in rows] for kind in ("clean", "corrupted")}
        _print_json({**prompts, **as_lists(rows, "target", "against")}, name, found, asked, {**runs, "change": change})
    out = console(quiet=asked.as_json)
    print_mean_ends(out, rows, {kind: runs[kind] for kind in ("clean", "corrupted")})
    several = change if np.ndim(change["mean"]) else {key: np.asarray(x)[None] for key, x in change.items()}
    columns = {
        "mean change": lambda at: interval_cells(several, at)[0],
        "95 % interval": lambda at: interval_cells(several, at)[1],
    }
    _print(out, name, several["mean"], asked, found, columns)
    if asked.picture:
        _draw(np.asarray(found.heads).mean(axis=0), asked, f"{name}, means over {len(rows)} pairs of prompts")


def _print_json(
    prompts: dict[str, Any], metric: str, found: PathEffects, asked: _Asked, values: dict[str, Any]
) -> None:
    names = {"senders": found.senders, "receivers": found.receivers}
    print_json({**prompts, "chat": asked.chat, "metric": metric, **names, **asked.how, **values})


def _said(asked: _Asked) -> str:
    """What is patched, in words."""
    ways = f"MLPs between are {asked.how['mlps']}, norms {asked.how['norms']}"
    return f"{DIRECTIONS[asked.how['direction']]}, told to {', '.join(asked.receivers)}; {ways}"


def _print(
    out: Console, metric: str, change: np.ndarray, asked: _Asked, found: PathEffects,
    columns: Mapping[str, Callable[[tuple[int, ...]], str]],
) -> None:  # fmt: skip
    """The strongest senders, or the one effect of those that were patched together."""
    out.print(TextCell(f"Metric: {metric}."))
    who = "One sender at a time" if asked.senders is None else "The senders together"
    out.print(TextCell(f"{who}: {_said(asked)}."))
    table = Table(box=None, pad_edge=False)
    table.add_column("sender" if asked.senders is None else "senders", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    table.add_column("", no_wrap=True, overflow="crop")
    places = strongest(change, asked.top) if asked.senders is None else [(0,)]
    largest = max((abs(float(change[place])) for place in places), default=0.0) or 1.0
    for place in places:
        name = found.senders[place[0]] if asked.senders is None else ", ".join(found.senders)
        table.add_row(name, *(cell(place) for cell in columns.values()), bar(float(change[place]), largest))
    out.print(table)
    out.print(f"change: from the {asked.base} run's metric", style="dim")


def _draw(heads: np.ndarray, asked: _Asked, below: str) -> None:
    assert asked.picture is not None
    figure = oculi_jax.visualize.sweep_heatmap(heads, "head", f"change of the {asked.base} run's metric")
    heading(figure, f"Heads: {_said(asked)}", below)
    save_picture(figure, asked.picture, asked.as_json)
