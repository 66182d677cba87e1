"""`oculi patch`: where two prompts' runs carry what makes their answers differ."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table
from rich.text import Text as TextCell

from ..causal import activation_patching
from ..sites import SITES, Site, unknown_site
from .common import (
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
from .effects import Against, Target, bar, column, counting, heading, measure, strongest, token_ids

DIRECTIONS = {
    "denoising": "clean values go into the corrupted run",
    "noising": "corrupted values go into the clean run",
}


def patch(
    clean: Annotated[str, typer.Argument(help="The prompt with the answer.", show_default=False)],
    corrupted: Annotated[
        str, typer.Argument(help="The same prompt but for some tokens, which change the answer.", show_default=False)
    ],
    target: Target,
    against: Against = None,
    site: Annotated[str, typer.Option(help="What is patched; `oculi sites` lists them.")] = "resid_pre",
    by: Annotated[
        str | None,
        typer.Option(
            help="What is patched at a time: layer,position or layer,head or layer,head,position or layer or position. "
            "Left out: layer,head where the site has heads, else layer,position.",
            show_default=False,
        ),
    ] = None,
    direction: Annotated[
        str, typer.Option(help="denoising: clean into corrupted; noising: the other way.")
    ] = "denoising",
    top: Annotated[int, typer.Option(help="How many places to show.", min=1)] = 12,
    output: Picture = None,
    as_json: Json = False,
    model: Model = None,
    dtype: Dtype = "auto",
    allow_longer: Longer = False,
) -> None:
    """Where two prompts' runs carry what makes their answers differ: one run's values are put into the other, place by place.

    Recovery is 1 where the patched run answers as the clean one, and 0 where as the corrupted one. The metric is the
    log-probability of the target after the prompt; with --against, the difference of two logits.
    """
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
    adapter = open_adapter(model, dtype, clean, corrupted)
    ids = [token_ids(adapter, text, allow_longer) for text in (clean, corrupted)]
    metric, name = measure(adapter, ids[0], target, against)
    texts = [adapter.str_tokens(tokens) for tokens in ids]
    _check_aligned(ids, texts)
    with counting(f"Patching {site}") as progress:
        found = activation_patching(
            adapter.model, ids[0], ids[1], metric, site, axes, progress=progress,
            direction=direction,  # type: ignore[arg-type]
        )  # fmt: skip
        patched, recovery = np.asarray(found.patched), np.asarray(found.recovery)
    if float(found.clean) == float(found.corrupted):
        raise ValueError(f"The {name} is {float(found.clean):+.3f} in both runs: there is nothing to recover.")
    if as_json:
        print_json(
            {
                "clean_prompt": clean, "corrupted_prompt": corrupted, "metric": name, "site": site, "by": axes,
                "direction": direction, "clean": found.clean, "corrupted": found.corrupted, "patched": patched,
                "recovery": recovery,
            }
        )  # fmt: skip
    denoising = direction == "denoising"
    effects, noun = (recovery, "recovery") if denoising else (1.0 - recovery, "loss")
    run, source = texts[::-1] if denoising else texts

    out = console(quiet=as_json)
    for text, kind, value in ((clean, "clean", found.clean), (corrupted, "corrupted", found.corrupted)):
        out.print(TextCell(f"{kind:9} {float(value):+.3f}  {shown(text)}"))
    out.print(TextCell(f"Metric: {name}."))
    out.print(TextCell(f"{site}, one {' × '.join(axes)} at a time: {DIRECTIONS[direction]}."))
    tokens = [shown(a) if a == b else f"{shown(a)}→{shown(b)}" for a, b in zip(run, source, strict=True)]
    out.print(_table(patched, effects, axes, SITES[site].head_axis or "", tokens=tokens, noun=noun, top=top))
    one, zero = ("clean", "corrupted") if denoising else ("corrupted", "clean")
    out.print(f"{noun} 1: as the {one} run; 0: as the {zero} one", style="dim")
    if picture:
        figure = _draw(effects, axes, SITES[site], run, source, f"{noun} (1: {one}, 0: {zero})")
        ends = f"clean {float(found.clean):+.2f}, corrupted {float(found.corrupted):+.2f}"
        heading(figure, f"{site}: {DIRECTIONS[direction]}", f"{name}: {ends}")
        save_picture(figure, picture, as_json)


def _check_aligned(ids: list[np.ndarray], texts: list[list[str]]) -> None:
    if len(ids[0]) != len(ids[1]):
        raise ValueError(
            "Patching puts the prompts' tokens side by side, and there are not as many of them: the clean prompt has "
            f"{len(ids[0])}, {texts[0]}, and the corrupted one {len(ids[1])}, {texts[1]}."
        )
    if (ids[0] == ids[1]).all():
        raise ValueError(f"Both prompts are the tokens {texts[0]}: there is nothing to patch.")


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
    patched: np.ndarray, effects: np.ndarray, axes: tuple[str, ...], head: str, tokens: list[str], noun: str, top: int
) -> Table:
    """The strongest places; of layers and positions, where neighbours are much alike, each token's strongest layer."""
    by_token = axes == ("layer", "position")
    table = Table(box=None, pad_edge=False)
    table.add_column("token, layer" if by_token else ", ".join(axes), no_wrap=True)
    table.add_column("metric", justify="right")
    table.add_column(noun, justify="right")
    table.add_column(f"layers 0 to {len(effects) - 1}" if by_token else "", no_wrap=True, overflow="crop")
    if by_token:
        best = np.abs(np.nan_to_num(effects)).argmax(axis=0)
        places = [(int(best[t]), t) for (t,) in strongest(effects[best, np.arange(len(best))], top)]
    else:
        places = strongest(effects, top)
    largest = max((abs(float(effects[place])) for place in places), default=1.0)
    for place in places:
        effect = float(effects[place])
        drawn = column(effects[:, place[1]]) if by_token else bar(effect, largest)
        name = TextCell(_name(dict(zip(axes, place, strict=True)), head, tokens))
        table.add_row(name, f"{float(patched[place]):+.3f}", f"{effect:+.3f}", drawn)
    return table


def _name(at: dict[str, int], head: str, tokens: list[str]) -> str:
    """A place in words: `L23H3`, `L23K1` (a key/value head), `9 ' Mary'→' John' L16`."""
    words = [f"{at['position']} {tokens[at['position']]}"] if "position" in at else []
    letters = {"layer": "L", "head": head}
    if part := "".join(f"{letters[axis]}{at[axis]}" for axis in letters if axis in at):
        words.append(part)
    return " ".join(words)


def _draw(effects: np.ndarray, axes: tuple[str, ...], site: Site, run: list[str], source: list[str], label: str) -> Any:
    from ..visualize import attribution_bars, layer_profile, sweep_heatmap

    if axes == ("layer",):
        return layer_profile(effects, ylabel=label)
    if axes == ("position",):
        return attribution_bars(
            effects, labels=[a if a == b else f"{a}→{b}" for a, b in zip(run, source, strict=True)], label=label
        )
    if axes == ("layer", "head"):
        return sweep_heatmap(effects, "head" if site.head_axis == "H" else "key/value head", label)
    return sweep_heatmap(effects, "token, and the one it is patched from", label, tokens=run, sources=source)
