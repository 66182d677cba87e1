"""`oculi sites`: the table of what can be read and edited."""

from __future__ import annotations

from rich.table import Table

from ..sites import SITES
from .common import console


def sites() -> None:
    """The sites: every value of the forward pass that can be read and edited, with its axes."""
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
