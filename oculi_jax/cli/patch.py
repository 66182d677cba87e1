"""`oculi patch`: where two prompts' runs carry what makes their answers differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer
from rich.table import Table
from rich.text import Text as TextCell

import oculi_jax

from ..sites import SITES, Site, unknown_site
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
    shown,
)
from .effects import Against, Target, announce, bar, column, counting, heading, measure, strongest
from .pairs import Clean, Corrupted, aligned, check_aligned, print_ends, print_mean_ends, read_pairs
from .prompts import PairFile, Row, check_one, check_target, token_ids
from .sets import as_lists, interval_cells, mean_and_interval, measure_set, note_few

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from ..causal.patching import PatchingResult
    from ..metrics import Metric
    from ..models.llama import LlamaAttentionAdapter

DIRECTIONS = {
    "denoising": "clean values go into the corrupted run",
    "noising": "corrupted values go into the clean run",
}

VARIES = "…"  # a position's token, where prompts differ


def patch(
    clean: Clean = None,
    corrupted: Corrupted = None,
    prompts: PairFile = None,
    target: Target = None,
    against: Against = None,
    site: Annotated[str, typer.Option(help="What is patched; `oculi sites` lists them.")] = "resid_pre",
    by: Annotated[
        str | None,
        typer.Option(
            help="What is patched at a time: layer,position or layer,head or layer,head,position or layer or position. "
            "Left out: layer,head where the site has heads, else layer,position, or layer where prompts have several lengths.",
            show_default=False,
        ),
    ] = None,
    direction: Annotated[
        str, typer.Option(help="denoising: clean into corrupted; noising: the other way.")
    ] = "denoising",
    top: Annotated[int, typer.Option(help="How many places to show.", min=1)] = 12,
    output: Picture = None,
    as_json: Json = False,
    chat: Chat = False,
    model: Model = None,
    dtype: Dtype = "auto",
    allow_longer: Longer = False,
) -> None:
    """Where two prompts' runs carry what makes their answers differ: one run's values are put into the other, place by place.

    Recovery is 1 where the patched run answers as the clean one, and 0 where as the corrupted one. The metric is the
    log-probability of the target after the prompt; with --against, the difference of two logits. Of a file of pairs (a line
    is clean and corrupted with a tab between them, or an object with these fields) effects are means, and recovery is the
    ratio of means.
    """
    check_one(prompts, clean=clean, corrupted=corrupted)
    picture = check_picture(output)
    if site not in SITES:
        raise ValueError(unknown_site(site))
    axes = _axes(SITES[site], by)
    if direction not in DIRECTIONS:
        raise ValueError(f"--direction is {direction!r}, and must be {' or '.join(DIRECTIONS)}.")
    if picture and len(axes) > 2:
        raise ValueError(
            "A picture has two axes, and --by layer,head,position makes three: leave out --output or one of them."
        )
    asked = _Asked(top, picture, as_json, chat, allow_longer, SITES[site], axes, free=by is None, direction=direction)
    if prompts is not None:
        rows, texts = read_pairs(prompts, target, against)
        _of_set(open_adapter(model, dtype, *texts, chat=chat), rows, asked)
    elif clean is not None and corrupted is not None:
        goal = check_target(target)
        adapter = open_adapter(model, dtype, clean, corrupted, chat=chat)
        _of_one(adapter, clean, corrupted, goal, against, asked)


@dataclass(frozen=True)
class _Asked(Asked):
    """What a line asks of patching beside that; `free` says that the axes are ours to choose."""

    site: Site
    axes: tuple[str, ...]
    free: bool
    direction: str

    @property
    def denoising(self) -> bool:
        return self.direction == "denoising"

    @property
    def noun(self) -> str:
        return "recovery" if self.denoising else "loss"

    @property
    def ends(self) -> tuple[str, str]:
        """The run that is 1, and the one that is 0."""
        return ("clean", "corrupted") if self.denoising else ("corrupted", "clean")


def _patched(
    adapter: LlamaAttentionAdapter, ids: Sequence[np.ndarray], mask: np.ndarray | None, metric: Metric, asked: _Asked
) -> PatchingResult:
    site, direction = asked.site.name, cast("Literal['denoising', 'noising']", asked.direction)
    patching = oculi_jax.causal.activation_patching
    given = (adapter.model, ids[0], ids[1], metric, site, asked.axes)
    announce(oculi_jax.plan(patching, *given, direction=direction, mask=mask))
    with counting(f"Patching {site}") as progress:
        return patching(*given, direction=direction, mask=mask, progress=progress)


def _of_one(
    adapter: LlamaAttentionAdapter, clean: str, corrupted: str, target: str, against: str | None, asked: _Asked
) -> None:
    import numpy as np

    ids = [token_ids(adapter, text, asked.longer, asked.chat) for text in (clean, corrupted)]
    metric, name = measure(adapter, ids[0], target, against)
    texts = [adapter.str_tokens(tokens) for tokens in ids]
    check_aligned(adapter, *ids)
    found = _patched(adapter, ids, None, metric, asked)
    patched, recovery = np.asarray(found.patched), np.asarray(found.recovery)
    if float(found.clean) == float(found.corrupted):
        raise ValueError(f"The {name} is {float(found.clean):+.3f} in both runs: there is nothing to recover.")
    if asked.as_json:
        print_json(
            {
                "clean_prompt": clean, "corrupted_prompt": corrupted, "chat": asked.chat, "metric": name,
                "site": asked.site.name, "by": asked.axes, "direction": asked.direction, "clean": found.clean,
                "corrupted": found.corrupted, "patched": patched, "recovery": recovery,
            }
        )  # fmt: skip
    effects = recovery if asked.denoising else 1.0 - recovery
    run, source = texts[::-1] if asked.denoising else texts
    out = console(quiet=asked.as_json)
    print_ends(out, (clean, corrupted), (found.clean, found.corrupted), asked.chat)
    columns = {"metric": lambda place: f"{float(patched[place]):+.3f}"}
    _print(out, name, effects, asked, (run, source), columns)
    if asked.picture:
        ends = f"{name}: clean {float(found.clean):+.2f}, corrupted {float(found.corrupted):+.2f}"
        _draw(effects, asked, (run, source), ends)


def _of_set(adapter: LlamaAttentionAdapter, rows: list[Row], asked: _Asked) -> None:
    clean, corrupted, mask = aligned(adapter, rows, asked)
    pairs = [(a[m], b[m]) for a, b, m in zip(clean, corrupted, mask, strict=True)]
    asked = replace(asked, axes=_axes_of_set(asked, mask, rows))
    metric, name = measure_set(adapter, clean, mask, rows)
    found = _patched(adapter, (clean, corrupted), mask, metric, asked)
    runs = {kind: mean_and_interval(getattr(found, kind)) for kind in ("clean", "corrupted", "patched")}
    start, patched = runs[asked.ends[1]]["by_prompt"], runs["patched"]["by_prompt"]
    change = mean_and_interval(patched - start.reshape(-1, *[1] * (patched.ndim - 1)))
    recovery = _of_means({kind: run["mean"] for kind, run in runs.items()}, name)
    note_few(rows)
    if asked.as_json:
        print_json(
            {
                "clean_prompt": [row["clean"] for row in rows], "corrupted_prompt": [row["corrupted"] for row in rows],
                **as_lists(rows, "target", "against"), "chat": asked.chat, "metric": name, "site": asked.site.name,
                "by": asked.axes, "direction": asked.direction, **runs, "change": change, "recovery": recovery,
            }
        )  # fmt: skip
    effects = recovery if asked.denoising else 1.0 - recovery
    tokens = [
        _common([adapter.str_tokens(pair[i]) for pair in pairs]) if "position" in asked.axes else [] for i in (0, 1)
    ]
    run, source = tokens[::-1] if asked.denoising else tokens
    out = console(quiet=asked.as_json)
    print_mean_ends(out, rows, {kind: runs[kind] for kind in ("clean", "corrupted")})
    columns = {
        "mean change": lambda at: interval_cells(change, at)[0],
        "95 % interval": lambda at: interval_cells(change, at)[1],
    }
    _print(out, name, effects, asked, (run, source), columns)
    if asked.picture:
        _draw(effects, asked, (run, source), f"{name}, means over {len(rows)} pairs of prompts")


def _axes_of_set(asked: _Asked, mask: np.ndarray, rows: Sequence[Row]) -> tuple[str, ...]:
    """The axes that prompts of these lengths have in common."""
    lengths = mask.sum(axis=1)
    if "position" not in asked.axes or (lengths == lengths[0]).all():
        return asked.axes
    if asked.free and asked.site.layered:
        return ("layer",)
    odd = rows[int((lengths != lengths[0]).argmax())]
    raise ValueError(
        f"A position is one of each prompt's tokens, and these prompts have several lengths, {lengths[0]} in {rows[0].where} and "
        f"{lengths[(lengths != lengths[0]).argmax()]} in {odd.where}: give --by without position, or prompts of one length."
    )


def _of_means(means: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """The recovery of the means of three kinds of runs; raises where there is none."""
    import jax.numpy as jnp
    import numpy as np

    from ..causal.patching import recovery

    found = np.asarray(recovery(*(jnp.asarray(means[kind]) for kind in ("patched", "clean", "corrupted"))))
    if np.isnan(found).all():
        raise ValueError(f"The mean {name} is {float(means['clean']):+.3f} in both runs: there is nothing to recover.")
    return found


def _common(texts: Sequence[Sequence[str]]) -> list[str]:
    """Each position's token, or … where prompts differ there."""
    return [column[0] if len(set(column)) == 1 else VARIES for column in zip(*texts, strict=True)]


def _print(
    out: Console, metric: str, effects: np.ndarray, asked: _Asked, tokens: tuple[list[str], list[str]],
    columns: Mapping[str, Callable[[tuple[int, ...]], str]],
) -> None:  # fmt: skip
    out.print(TextCell(f"Metric: {metric}."))
    out.print(TextCell(f"{asked.site.name}, one {' × '.join(asked.axes)} at a time: {DIRECTIONS[asked.direction]}."))
    out.print(_table(effects, asked, [_pair(a, b) for a, b in zip(*tokens, strict=True)], columns))
    one, zero = asked.ends
    out.print(f"{asked.noun} 1: as the {one} run; 0: as the {zero} one", style="dim")


def _pair(run: str, source: str) -> str:
    a, b = (text if text == VARIES else shown(text) for text in (run, source))
    return a if a == b else f"{a}→{b}"


def _axes(site: Site, by: str | None) -> tuple[str, ...]:
    """What is patched at a time, of what this site has."""
    ways = ["layer,position", "layer"] if site.layered else ["position"]
    if site.head_axis is not None:
        ways = ["layer,head", "layer,position", "layer,head,position", "layer"]
    chosen = ways[0] if by is None else ",".join(part.strip() for part in by.split(","))
    if chosen not in ways:
        raise ValueError(f"--by is {by!r}; {site.name} [{', '.join(site.axes)}] can be patched by {' or '.join(ways)}.")
    return tuple(chosen.split(","))


def _table(
    effects: np.ndarray, asked: _Asked, tokens: list[str], columns: Mapping[str, Callable[[tuple[int, ...]], str]]
) -> Table:
    """The strongest places; of layers and positions, where neighbours are much alike, each token's strongest layer."""
    import numpy as np

    by_token = asked.axes == ("layer", "position")
    table = Table(box=None, pad_edge=False)
    table.add_column("token, layer" if by_token else ", ".join(asked.axes), no_wrap=True)
    for name in (*columns, asked.noun):
        table.add_column(name, justify="right")
    table.add_column(f"layers 0 to {len(effects) - 1}" if by_token else "", no_wrap=True, overflow="crop")
    if by_token:
        best = np.abs(np.nan_to_num(effects)).argmax(axis=0)
        places = [(int(best[t]), t) for (t,) in strongest(effects[best, np.arange(len(best))], asked.top)]
    else:
        places = strongest(effects, asked.top)
    largest = max((abs(float(effects[place])) for place in places), default=1.0)
    for place in places:
        effect = float(effects[place])
        drawn = column(effects[:, place[1]]) if by_token else bar(effect, largest)
        name = TextCell(_name(dict(zip(asked.axes, place, strict=True)), asked.site.head_axis or "", tokens))
        table.add_row(name, *(cell(place) for cell in columns.values()), f"{effect:+.3f}", drawn)
    return table


def _name(at: dict[str, int], head: str, tokens: list[str]) -> str:
    """A place in words: `L23H3`, `L23K1` (a key/value head), `9 ' Mary'→' John' L16`."""
    words = [f"{at['position']} {tokens[at['position']]}"] if "position" in at else []
    letters = {"layer": "L", "head": head}
    if part := "".join(f"{letters[axis]}{at[axis]}" for axis in letters if axis in at):
        words.append(part)
    return " ".join(words)


def _draw(effects: np.ndarray, asked: _Asked, tokens: tuple[list[str], list[str]], below: str) -> None:
    """Draws effects by one or two axes, with a title and a line below it."""
    assert asked.picture is not None
    show, (one, zero) = oculi_jax.visualize, asked.ends
    label = f"{asked.noun} (1: {one}, 0: {zero})"
    if asked.axes == ("layer",):
        figure = show.layer_profile(effects, ylabel=label)
    elif asked.axes == ("position",):
        names = [a if a == b else f"{a}→{b}" for a, b in zip(*tokens, strict=True)]
        figure = show.attribution_bars(effects, labels=names, label=label)
    elif asked.axes == ("layer", "head"):
        figure = show.sweep_heatmap(effects, "head" if asked.site.head_axis == "H" else "key/value head", label)
    else:
        run, source = tokens
        what = "token, and the one it is patched from"
        figure = show.sweep_heatmap(effects, what, label, tokens=run, sources=source)
    heading(figure, f"{asked.site.name}: {DIRECTIONS[asked.direction]}", below)
    save_picture(figure, asked.picture, asked.as_json)
