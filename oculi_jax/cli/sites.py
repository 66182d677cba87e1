"""`oculi sites`: the table of what can be read and edited."""

from __future__ import annotations

from rich.table import Table

from ..sites import SITES
from .common import Json, console, print_json


def sites(as_json: Json = False) -> None:
    """The sites: every value of the forward pass that can be read and edited, with its axes."""
    if as_json:
        rows = {
            s.name: {"axes": s.axes, "layered": s.layered, "meaning": s.meaning, "names": s.aliases}
            for s in SITES.values()
        }
        print_json(rows)
        return
    table = Table(box=None, pad_edge=False)
    for column in ("site", "axes", "what it is", "in the guide", "in TransformerLens"):
        table.add_column(column, no_wrap=column == "site")
    for site in SITES.values():
        lens = next((alias for alias in site.aliases if "hook" in alias), "")
        table.add_row(site.name, site.shape.replace("[", r"\["), site.meaning, site.guide, lens.replace("{}", "i"))
    out = console()
    out.print(table)
    out.print(
        "L layers · T tokens · S key positions · E residual width · H query heads · K key/value heads · D head size · F MLP width",
        style="dim",
    )
