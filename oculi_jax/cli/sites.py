"""`oculi sites`: the table of what can be read and edited."""

from __future__ import annotations

from rich.table import Table

from ..sites import SITES
from .common import Json, Model, config_of, console, print_json


def sites(model: Model = None, as_json: Json = False) -> None:
    """The sites: every value of the forward pass that can be read and edited, with its axes.

    Of one model where --model is given; else all that there are, of which each family has some.
    """
    there, config = SITES, None
    if model is not None:
        config = config_of(model)
        if config is None:
            raise FileNotFoundError(f"{model!r} is not on this disk: give the directory of a model that is.")
        there = config.sites
    if as_json:
        rows = {
            s.name: {"axes": s.axes, "layered": s.layered, "meaning": s.meaning, "names": s.aliases}
            for s in there.values()
        }
        print_json(rows)
        return
    table = Table(box=None, pad_edge=False)
    for column in ("site", "axes", "what it is", "in the guide", "in TransformerLens"):
        table.add_column(column, no_wrap=column == "site")
    for site in there.values():
        lens = next((alias for alias in site.aliases if "hook" in alias), "")
        table.add_row(site.name, site.shape.replace("[", r"\["), site.meaning, site.guide, lens.replace("{}", "i"))
    out = console()
    out.print(table)
    if config is not None:
        sizes = ", ".join(f"{letter} = {size}" for letter, size in config.sizes.items())
        out.print(f"{config.family.title}: {sizes}")
    out.print(
        "L layers · T tokens · S key positions · E residual width · H query heads · K key/value heads · D head size · F MLP width",
        style="dim",
    )
