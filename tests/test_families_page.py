"""docs/families.md says of each family what the code does: the rows of its table are made from the table of families."""

from __future__ import annotations

from pathlib import Path

import pytest

from oculi_jax import SITES
from oculi_jax.models.decoder.config import DecoderConfig
from oculi_jax.models.families import FAMILIES

from .tiny import BASE

pytestmark = pytest.mark.quick

PAGE = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")


def words(names: object) -> str:
    found = [f"`{name}`" for name in names]  # type: ignore[attr-defined]
    return ", ".join(found) or "–"


def row(model_type: str) -> str:
    """| family | type | fields of its own | sites that it has beside Llama's, and has not |"""
    family = FAMILIES[model_type]
    there = DecoderConfig.from_dict({**BASE, "model_type": model_type}).sites
    usual = DecoderConfig.from_dict(BASE).sites
    more, less = ([site for site in SITES if site in a and site not in b] for a, b in ((there, usual), (usual, there)))
    without = f"; not {words(less)}" if less else ""
    return f"| {family.title} | `{model_type}` | {words(sorted(family.used))} | {words(more)}{without} |"


def test_every_family_has_its_row() -> None:
    for model_type in FAMILIES:
        assert row(model_type) in PAGE, f"docs/families.md is to say: {row(model_type)}"
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and line.split(" | ")[1].strip("`") in FAMILIES]
    assert len(rows) == len(FAMILIES)


def test_every_inert_field_of_a_family_is_named() -> None:
    inert = PAGE.partition("## Fields\n")[2].partition("\n## ")[0]
    for family in FAMILIES.values():
        for field in family.inert:
            assert f"`{field}`" in inert, field
