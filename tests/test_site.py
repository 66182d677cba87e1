"""The site: everything public is on one page of the reference, every page can be reached, and its first page says what runs."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
REFERENCE = sorted((DOCS / "reference").glob("*.md"))


def public() -> Iterator[tuple[str, Any]]:
    """Every name that users type, with what it is; modules apart."""
    import oculi_jax

    inner = ["models.llama" if name == "models" else name for name in oculi_jax._MODULES]
    for path in ("oculi_jax", *(f"oculi_jax.{name}" for name in inner)):
        module = import_module(path)
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == path]
        for name in getattr(module, "__all__", [name for name in own if not name.startswith("_")]):
            if not isinstance(value := getattr(module, name), types.ModuleType):
                yield f"{path}.{name}", value


def directives() -> list[tuple[str, str]]:
    """The page and the name of each `:::` line."""
    return [
        (page.name, name) for page in REFERENCE for name in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.M)
    ]


def test_everything_public_is_on_one_page_under_a_name_that_users_type() -> None:
    names = dict(public())
    assert len(names) > 100
    pages: dict[int, list[str]] = {id(value): [] for value in names.values()}
    for page, name in directives():
        assert name in names, f"{page} has {name}, which is no public name"
        assert not name.startswith("oculi_jax.intervention.") or name.replace(".intervention", "") not in names, name
        pages[id(names[name])].append(page)
    missing = sorted({name for name, value in names.items() if not pages[id(value)]})
    assert not missing, f"on no page of docs/reference: {', '.join(missing)}"
    twice = sorted({name for name, value in names.items() if len(pages[id(value)]) > 1})
    assert not twice, f"more than once in docs/reference: {', '.join(twice)}"


def test_every_page_can_be_reached() -> None:
    nav = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2].partition("\n\n")[0]
    listed = re.findall(r"(\S+\.(?:md|ipynb))$", nav, re.M)
    there = {path.relative_to(DOCS).as_posix() for kind in ("*.md", "*.ipynb") for path in DOCS.rglob(kind)}
    assert len(listed) == len(set(listed)) and there <= set(listed)
    elsewhere = re.findall(r'^    "(\S+)": "(\S+)",$', (DOCS / "hooks.py").read_text("utf-8"), re.M)
    assert set(listed) - there == {page for _, page in elsewhere}
    assert elsewhere and all((ROOT / path).is_file() for path, _ in elsewhere)


def test_the_first_page_says_what_the_readme_says() -> None:
    """So its script is run, with the README's, and its answer is the command's."""
    readme = (ROOT / "README.md").read_text("utf-8")
    blocks = re.findall(r"^```\w+\n.*?^```$", (DOCS / "index.md").read_text("utf-8"), re.S | re.M)
    assert len(blocks) == 3 and all(block in readme for block in blocks)
