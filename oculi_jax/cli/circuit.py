"""`oculi circuit`: the edges that make two prompts' answers differ, and how much of the difference they keep."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text as TextCell

import oculi_jax

from .common import (
    PICTURES,
    Asked,
    Chat,
    Dtype,
    Json,
    Longer,
    Model,
    check_output,
    check_picture,
    config_of,
    console,
    open_adapter,
    print_json,
    save_picture,
    working,
)
from .effects import Against, Target, announce, as_fields, bar, heading, measure, print_check
from .pairs import Clean, Corrupted, aligned, check_aligned, print_ends, print_mean_ends, read_pairs
from .prompts import PairFile, Row, check_one, check_target, token_ids
from .sets import as_lists, mean_and_interval, measure_set, note_few

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike
    from rich.console import Console

    from ..causal import Verification
    from ..circuits import Circuit, Curve, Scores
    from ..metrics import Metric
    from ..models.llama import LlamaAttentionAdapter

ABLATIONS = {
    "corrupted": "what it says on the corrupted prompt",
    "mean": "its mean over the corrupted prompts' tokens",
    "mean-positional": "its mean over the corrupted prompts at that position",
    "zero": "zeros",
}
EDGES = 60  # where neither --edges nor --fraction is given: as many as a picture shows well


def circuit(
    clean: Clean = None,
    corrupted: Corrupted = None,
    prompts: PairFile = None,
    target: Target = None,
    against: Against = None,
    edges: Annotated[
        int | None, typer.Option(help="How many edges: those of the largest scores.", min=1, show_default=str(EDGES))
    ] = None,
    fraction: Annotated[
        float | None, typer.Option(help="How many instead, of all edges: 0.01 is one in a hundred.", show_default=False)
    ] = None,
    absolute: Annotated[
        bool, typer.Option("--absolute", help="Choose edges by magnitude: those too that lower the metric.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Of the scores' integrated gradients; 1 is a plain gradient.", min=1)] = 5,
    ablation: Annotated[
        str,
        typer.Option(help=f"What takes the place of what the circuit leaves out: {', '.join(ABLATIONS)}."),
    ] = "corrupted",
    nulls: Annotated[
        int, typer.Option(help="How many random circuits of as many edges to compare it with.", min=0)
    ] = 20,
    top: Annotated[int, typer.Option(help="How many edges to show.", min=1)] = 12,
    verify: Annotated[
        int,
        typer.Option(
            help="Beside the largest, so many other edges, drawn at random, are corrupted to see what scores miss; 0: none is.",
            min=0,
        ),
    ] = 20,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Where the circuit goes: .json, in MIB's format; .html, a page that answers to the pointer; .png, .svg, .pdf.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    chat: Chat = False,
    model: Model = None,
    dtype: Dtype = "auto",
    allow_longer: Longer = False,
) -> None:
    """The part of the model that makes two prompts' answers differ: its edges, how much of the difference it keeps, and how much
    is left without it.

    Edges are scored by EAP-IG (Hanna et al. 2024), and the largest are kept. Faithfulness is 1 where the circuit alone answers as
    the whole model, and 0 where as nothing of it; a circuit that is complete leaves nothing in the rest. The metric is the
    log-probability of the target after the prompt; with --against, the difference of two logits. Of a file of pairs (a line is
    clean and corrupted with a tab between them, or an object with these fields) values are means.
    """
    check_one(prompts, clean=clean, corrupted=corrupted)
    path = _check_output(output)
    if ablation not in ABLATIONS:
        near = difflib.get_close_matches(ablation, ABLATIONS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"--ablation is {ablation!r}, and must be {', '.join(ABLATIONS)}.{hint}")
    size = _Size(edges, fraction, absolute)
    size.check(model)
    asked = _Asked(top, path, as_json, chat, allow_longer, size, steps, ablation, nulls, verify)
    if prompts is not None:
        rows, texts = read_pairs(prompts, target, against)
        _of_set(open_adapter(model, dtype, *texts, chat=chat), rows, asked)
    elif clean is not None and corrupted is not None:
        goal = check_target(target)
        adapter = open_adapter(model, dtype, clean, corrupted, chat=chat)
        _of_one(adapter, (clean, corrupted), goal, against, asked)


@dataclass(frozen=True)
class _Size:
    """How many edges are kept, and by what."""

    edges: int | None
    fraction: float | None
    absolute: bool

    def check(self, model: str | None) -> None:
        """Raises for what no model has, or not this one where its config is on this disk."""
        if self.edges is not None and self.fraction is not None:
            raise ValueError("--edges and --fraction are both given: give one of them.")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"--fraction is {self.fraction:g}, and must be above 0 and at most 1.")
        if self.edges is not None and (config := config_of(model)) is not None:
            n = oculi_jax.circuits.Graph.of(config).n_edges
            if self.edges > n:
                raise ValueError(f"--edges is {self.edges}, and this model has {n}.")

    def of(self, scores: Scores) -> Circuit:
        n_all = scores.graph.n_edges
        n = min(self.edges or EDGES, n_all) if self.fraction is None else int(self.fraction * n_all)
        return scores.top(n, absolute=self.absolute)


@dataclass(frozen=True)
class _Asked(Asked):
    """What a line asks of a circuit beside that; `picture` may be a page, or MIB's file, too."""

    size: _Size
    steps: int
    ablation: str
    nulls: int
    verify: int


def _check_output(path: Path | None) -> Path | None:
    if path is None:
        return None
    path = check_output(path, ".json", ".html", *PICTURES)
    return check_picture(path) if path.suffix.lower() in PICTURES else path


@dataclass(frozen=True)
class _Found:
    """The circuit, what it leaves out, a curve of these two points, and exact effects of some edges."""

    circuit: Circuit
    rest: Circuit
    curve: Curve
    checked: Verification | None


def _found(
    adapter: LlamaAttentionAdapter, tokens: tuple[np.ndarray, np.ndarray], mask: Any, metric: Metric, name: str, asked: _Asked
) -> _Found:  # fmt: skip
    import numpy as np

    tools, given = oculi_jax.circuits, (*tokens, metric)
    announce(oculi_jax.plan(tools.edge_attribution, adapter.model, *given, mask=mask, steps=asked.steps))
    with working("Scoring edges"):
        scores = tools.edge_attribution(adapter.model, *given, mask=mask, steps=asked.steps)
        chosen = asked.size.of(scores)
        rest = chosen.complement
    parts, how = [chosen, rest], {"ablation": asked.ablation, "nulls": asked.nulls, "mask": mask}
    announce(oculi_jax.plan(tools.faithfulness, adapter.model, parts, *given, **how))
    with working("Running the circuit"):
        curve = tools.faithfulness(adapter.model, parts, *given, **how)
    if np.mean(curve.whole) == np.mean(curve.empty):
        raise ValueError(f"The {name} is {np.mean(curve.whole):+.3f} in both runs: there is nothing to explain.")
    if not asked.verify:
        return _Found(chosen, rest, curve, None)
    with working("Corrupting single edges"):
        checked = tools.verify(scores, adapter.model, *given, mask=mask, top=asked.top, sample=asked.verify)
    return _Found(chosen, rest, curve, checked)


def _of_one(
    adapter: LlamaAttentionAdapter, texts: tuple[str, str], target: str, against: str | None, asked: _Asked
) -> None:
    clean, corrupted = (token_ids(adapter, text, asked.longer, asked.chat) for text in texts)
    metric, name = measure(adapter, clean, target, against)
    check_aligned(adapter, clean, corrupted)
    found = _found(adapter, (clean, corrupted), None, metric, name, asked)
    ends = found.curve.whole[0], found.curve.empty[0]
    if asked.as_json:
        given = {"clean_prompt": texts[0], "corrupted_prompt": texts[1], "target": target, "against": against}
        _print_json(given, name, found, asked, ends)
    out = console(quiet=asked.as_json)
    if asked.ablation == "corrupted":
        print_ends(out, texts, ends, asked.chat)
    else:
        print_ends(out, texts[:1], ends[:1], asked.chat)
        out.print(f"ablated   {_signed(ends[1])}  everything replaced", markup=False)
    _print(out, name, found, asked)
    _write(found.circuit, asked, name)


def _of_set(adapter: LlamaAttentionAdapter, rows: list[Row], asked: _Asked) -> None:
    clean, corrupted, mask = aligned(adapter, rows, asked)
    metric, name = measure_set(adapter, clean, mask, rows)
    found = _found(adapter, (clean, corrupted), mask, metric, name, asked)
    ends = mean_and_interval(found.curve.whole), mean_and_interval(found.curve.empty)
    note_few(rows)
    if asked.as_json:
        given = {f"{kind}_prompt": [row[kind] for row in rows] for kind in ("clean", "corrupted")}
        _print_json({**given, **as_lists(rows, "target", "against")}, name, found, asked, ends)
    out = console(quiet=asked.as_json)
    other = "corrupted" if asked.ablation == "corrupted" else "ablated"
    print_mean_ends(out, rows, {"clean": ends[0], other: ends[1]})
    _print(out, name, found, asked)
    _write(found.circuit, asked, f"{name}, over {len(rows)} pairs of prompts")


def _print_json(prompts: dict[str, Any], metric: str, found: _Found, asked: _Asked, ends: tuple[Any, Any]) -> None:
    curve, graph = found.curve, found.circuit.graph
    values = {
        "whole": ends[0], "ablated": ends[1], "every_edge": graph.n_edges, "edges": dict(_ranked(found.circuit)),
        "faithfulness": curve.faithfulness[0], "by_prompt": curve.by_prompt[:, 0], "nulls": curve.nulls[:, 0],
        "rest": {"edges": int(found.rest.mask.sum()), "faithfulness": curve.faithfulness[1],
                 "by_prompt": curve.by_prompt[:, 1], "nulls": curve.nulls[:, 1]},
    }  # fmt: skip
    how = {"steps": asked.steps, "ablation": asked.ablation}
    print_json({**prompts, "chat": asked.chat, "metric": metric, **how, **values, **as_fields(found.checked)})


def _ranked(chosen: Circuit) -> list[tuple[str, float]]:
    """Its edges with their scores, the largest first."""
    found = zip(chosen.names, chosen.scores[chosen.mask].tolist(), strict=True)
    return sorted(found, key=lambda edge: -abs(edge[1]))


def _print(out: Console, metric: str, found: _Found, asked: _Asked) -> None:
    chosen = found.circuit
    out.print(TextCell(f"Metric: {metric}."))
    kept, every = int(chosen.mask.sum()), chosen.graph.n_edges
    by = "magnitude" if asked.size.absolute else "score"
    out.print(
        TextCell(
            f"{kept} of {every} edges: the largest by {by}, EAP-IG in {asked.steps} steps, without those that lead nowhere. In "
            f"place of what else a component says: {ABLATIONS[asked.ablation]}."
        )
    )
    out.print(_judged(found, asked))
    edges = _ranked(chosen)
    table = Table(box=None, pad_edge=False)
    table.add_column("edge", no_wrap=True)
    table.add_column("score", justify="right")
    exact = {} if found.checked is None else {entry["edge"]: entry["exact"] for entry in found.checked.entries}
    if exact:
        table.add_column("exact", justify="right")
    table.add_column("", no_wrap=True, overflow="crop")
    for name, score in edges[: asked.top]:
        own = [f"{exact[name]:+.3f}" if name in exact else ""] if exact else []
        table.add_row(name, f"{score:+.3f}", *own, bar(score, abs(edges[0][1]) or 1.0))
    out.print(table)
    print_check(out, "Exact: what the metric loses where that edge alone is corrupted", found.checked, "edge")
    out.print("faithfulness 1: as the whole model; 0: as with everything ablated", style="dim")


def _judged(found: _Found, asked: _Asked) -> Table:
    """Faithfulness of the circuit and of the rest, beside random circuits."""
    import numpy as np

    curve, several = found.curve, len(found.curve.by_prompt) > 1
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("edges", "faithfulness", *(["95 % interval"] if several else [])):
        table.add_column(name, justify="right")
    if asked.nulls:
        table.add_column(f"{asked.nulls} random circuits, 95 %", justify="right")
        table.add_column("edges of these", justify="right")
    spread = curve.interval() if several else None
    for i, (name, part) in enumerate((("circuit", found.circuit), ("the rest", found.rest))):
        cells = [str(int(part.mask.sum())), _signed(curve.faithfulness[i])]
        if spread is not None:
            cells.append(f"{_signed(spread.low[i])} to {_signed(spread.high[i])}")
        if asked.nulls:
            low, high = np.quantile(curve.nulls[:, i], [0.025, 0.975])
            cells += [f"{_signed(low)} to {_signed(high)}", f"{curve.null_counts[:, i, 1].mean():.0f}"]
        table.add_row(name, *cells)
    return table


def _signed(value: ArrayLike) -> str:
    """With its sign, which what rounds to zero has not of its own."""
    return f"{round(float(value), 3) + 0.0:+.3f}"  # type: ignore[arg-type]


def _write(chosen: Circuit, asked: _Asked, metric: str) -> None:
    path = asked.picture
    if path is None:
        return
    match path.suffix.lower():
        case ".json":
            chosen.save(path)
            console(quiet=asked.as_json).print(f"Wrote {path}.", markup=False)
        case ".html":
            oculi_jax.visualize.circuit_view(chosen).save(path)
            console(quiet=asked.as_json).print(f"Wrote {path}; open it in a browser.", markup=False)
        case _:
            figure = oculi_jax.visualize.plot_circuit(chosen)
            heading(figure, metric)
            save_picture(figure, path, asked.as_json)
