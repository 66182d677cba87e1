"""The documents: every block runs, prints what the page says, and draws the pictures that it shows."""

from __future__ import annotations

import contextlib
import io
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest

from . import memory

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# The pages of one document are run in one namespace.
MAC = "mac.md"
CARD = "../weights/tiny-facts/README.md"
COMING = "coming-from.md"
SCALING = "scaling.md"
DOCUMENTS = (
    ("guide.md", "troubleshooting.md"),
    ("causal.md",),
    ("circuits.md",),
    ("learning.md",),
    ("batch-jobs.md",),
    (SCALING,),
    (MAC,),
    (COMING,),
    (CARD,),
)
MARKS = {MAC: [pytest.mark.real, pytest.mark.torch]} | {
    page: [] for page in (CARD, COMING, "batch-jobs.md", SCALING)
}  # of the embedded model

CHAPTERS = (
    "Preface", "Chapter 1: Getting started", "Chapter 2: Attention", "Chapter 3: The residual stream",
    "Chapter 4: MLP internals", "Chapter 5: Logit lens", "Chapter 6: Circuit detection", "Chapter 7: Attribution",
    "Chapter 8: Head composition", "Chapter 9: Interventions", "Appendix A: Shapes", "Appendix B: Troubleshooting",
)  # fmt: skip
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
OURS = re.compile(r"^\| .+ \| oculi_jax \|\n\|.+\n((?:\|.+\n)+)", re.M)  # a table from other tools' lines to ours
NUMBER = re.compile(r"[-+−]?(?:\d+\.\d+(?:e[-+]\d+)?|\b(?:inf|nan)\b)")

# Another machine sums in another order: logits then differ by 2e-4 (tests/tolerances.py, LOGITS), and what is computed from
# them by about ten times that. A last printed digit may round the other way, whatever the digits.
RELATIVE = 2e-3
LAST_DIGIT = 1.01
# What hundreds of steps have fitted ends where rounding took it: of forty pairs, another machine hits some more or some less. What
# such a page says of its figures is of more than that.
SLACK = {"learning.md": 0.15}


@dataclass
class Block:
    """One python block, what the page says that it prints, and where it begins."""

    page: str
    line: int
    code: str
    printed: str | None


def blocks(page: str, text: str) -> list[Block]:
    """The python blocks of a page; a text block belongs to the python block that it directly follows."""
    found, end = [], -1
    for fence in FENCE.finditer(text):
        kind, body = fence.groups()
        if kind == "python":
            found.append(Block(page, text.count("\n", 0, fence.start()) + 2, body, None))
        elif kind == "text":
            assert found and not text[end : fence.start()].strip(), f"{page}: a text block that follows no python block"
            found[-1].printed = body
        end = fence.end()
    return found


def run(block: Block, namespace: dict) -> str:
    """What a block prints. The promotion rules are those of a user, not of the suite."""
    code = compile("\n" * (block.line - 1) + block.code, block.page, "exec", dont_inherit=True)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(code, namespace)
    return out.getvalue()


def difference(got: str, want: str, slack: float = 0.0) -> str | None:
    """How a line differs from what the page says; None where its words are the same and its decimals are close, `slack` besides."""
    words = [" ".join(NUMBER.sub("#", line).split()) for line in (got, want)]
    if words[0] != words[1]:
        return f"printed {got!r}, and the page says {want!r}"
    for ours, theirs in zip(NUMBER.findall(got), NUMBER.findall(want), strict=True):
        x, y = (float(text.replace("−", "-")) for text in (ours, theirs))
        digits, _, exponent = theirs.partition("e")
        last = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
        near = math.isfinite(y) and abs(x - y) <= RELATIVE * abs(y) + LAST_DIGIT * last + slack
        if not near and repr(x) != repr(y):
            return f"printed {ours}, and the page says {theirs} in {want!r}"
    return None


def pages(document: tuple[str, ...] = sum(DOCUMENTS, ())) -> dict[str, str]:
    return {page: (DOCS / page).read_text(encoding="utf-8") for page in document}


def pictures(text: str) -> set[str]:
    """The names of the pictures that a page shows."""
    return {Path(target).name for picture, _, target in LINK.findall(FENCE.sub("", text)) if picture}


def ours(text: str) -> list[str]:
    """What a page's tables give as our line for one of another tool's: the code in the last column."""
    rows = [row for table in OURS.findall(text) for row in table.splitlines()]
    return [row.rpartition(" | ")[2].strip("| ").strip("`") for row in rows]


def anchors(text: str) -> set[str]:
    """What headings are linked by, as GitHub makes it."""
    outside = FENCE.sub("", text)
    headings = re.findall(r"^#+ (.+)$", outside, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "document",
    [pytest.param(document, marks=MARKS.get(document[0], [pytest.mark.real])) for document in DOCUMENTS],
    ids=lambda document: document[0],
)
def test_every_block_runs(
    document: tuple[str, ...], request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if request.node.get_closest_marker("real"):
        request.getfixturevalue("loaded_once")
    if CARD in document:  # it computes for longer than it compiles
        jax.config.update("jax_disable_most_optimizations", False)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the card's blocks import from weights/
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    (tmp_path / "docs" / "pictures").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "guide"}
    wrong = []
    texts = pages(document)
    for page, text in texts.items():
        for block in blocks(page, text):
            printed = run(block, namespace).splitlines()
            if memory.is_full():
                memory.let_go()
            want = (block.printed or "").splitlines()
            where = f"{page}:{block.line}"
            if len(printed) != len(want):
                wrong.append(f"{where}: prints {len(printed)} lines, and the page has {len(want)}")
            slack = SLACK.get(page, 0.0)
            wrong += [
                f"{where}: {said}" for x, y in zip(printed, want, strict=False) if (said := difference(x, y, slack))
            ]
        for line in ours(text):
            run(Block(page, 1, line, None), namespace)
    assert not wrong, "\n".join(wrong)
    drawn = {path.name for path in (tmp_path / "docs" / "pictures").iterdir()}
    assert drawn == set[str]().union(*map(pictures, texts.values()))
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in (tmp_path / "docs" / "pictures").iterdir())


def test_the_comparison_of_output_is_strict() -> None:
    assert difference("L18H6: 0.899", "L18H6: 0.899") is None
    assert difference("0.50", "0.60", slack=0.15) is None and difference("0.50", "0.70", slack=0.15)
    for same in (
        ("inf", "inf"),
        ("nan", "nan"),
        ("1.52e-100", "1.53e-100"),
        ("0.0e+00", "0.0e+00"),
        ("-0.00", "+0.00"),
    ):
        assert difference(*same) is None
    for other in (("-inf", "inf"), ("0.5", "inf"), ("inf", "0.5"), ("1.2e-07", "1.2e-06"), ("inform", "infirm")):
        assert difference(*other)
    assert difference("a  0.8991", "a 0.8990") is None and difference("-0.00", "0.00") is None
    assert difference("L18H7: 0.899", "L18H6: 0.899") and difference("L18H6: 0.91", "L18H6: 0.93")
    assert difference("+1.25", "-1.25") and difference("(30, 9)", "(30, 8)") and difference("nan", "0.5")
    text = "```python\nprint(1)\n```\n\n```text\n1\n```\n\n```python\nx = 2\n```\n"
    assert [(block.line, block.printed) for block in blocks("page", text)] == [(2, "1\n"), (10, None)]
    assert ours(
        "| a | oculi_jax |\n|---|---|\n| `x` | `f(1)` |\n| y, `z` | `g()` |\n\n| b | c |\n|--|--|\n| d | `e` |\n"
    ) == ["f(1)", "g()"]


def test_the_guide_is_whole() -> None:
    """Every chapter is there; links, anchors and pictures exist; every committed picture is shown, and is small."""
    texts = pages()
    headings = re.findall(r"^## (.+)$", texts["guide.md"], re.M)
    assert [next((c for c in CHAPTERS if h.startswith(c)), h) for h in headings] == list(CHAPTERS)
    contents = [link for _, link in re.findall(r"^\d+\. \[(.+)\]\((.+)\)$", texts["guide.md"], re.M)]
    assert len(contents) == len(CHAPTERS)
    shown = set()
    for page, text in texts.items():
        for picture, label, target in LINK.findall(FENCE.sub("", text)):
            if re.match(r"\w+:", target):
                continue
            name, _, anchor = target.partition("#")
            path = (DOCS / (name or page)).resolve()
            assert path.is_file() and path.is_relative_to(ROOT), f"{page}: {target} does not exist"
            if anchor:
                assert anchor in anchors(path.read_text(encoding="utf-8")), f"{page}: {target} has no such heading"
            if picture:
                assert len(label) > 30, f"{page}: {target} needs words for those who do not see it"
                shown.add(path)
    assert shown == set((DOCS / "pictures").glob("*.png"))
    assert len(shown) >= 8 and all(path.stat().st_size < 150_000 for path in shown)
