"""The README: its first script runs, so does every call of its table, and the tour; and it stays short."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short() -> None:
    assert len(README.split()) <= 900
    assert len(re.findall(r"^!\[.{30,}\]\(docs/pictures/\w+\.png\)$", README, re.M)) >= 2
    first = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 8


def test_its_script_and_every_call_of_its_table_run() -> None:
    script, names = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)
    table = README.partition("| to | call |")[2].partition("\n\n")[0]
    calls = [re.findall(r"`([^`]+)`", row)[0] for row in table.splitlines() if row.count("`")]
    calls = [call for call in calls if not call.startswith("oculi ")]
    assert len(calls) >= 13
    namespace: dict = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(script, namespace)
            exec(names, namespace)
        found = {call: eval(call, namespace) for call in calls}
    assert "pattern [4, 6, 6, 6]" in printed.getvalue()
    plain = np.asarray(namespace["forward"](namespace["model"], namespace["tokens"]).logits)
    edited = [
        call for call in calls if call.startswith("forward(model, tokens, ") and not re.search("Blend|resid_post", call)
    ]
    assert len(edited) >= 4
    for call in edited:
        assert np.abs(np.asarray(found[call].logits) - plain).max() > 1e-4, call


def test_the_tours_script_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "tour.md").read_text(encoding="utf-8"), re.S | re.M)
    printed = io.StringIO()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), contextlib.redirect_stdout(printed):
        exec(blocks[0], {})
    said = printed.getvalue()
    assert "Output(logits [6, 576], activations {pattern [4, 6, 6, 6], resid_post [4, 6, 192]})" in said
    assert "[1 1]" in said and "(4, 6)" in said and "(8, 10)" in said and "FullCapture(" in said
    assert "Result(head_attribution: values [4, 6]; completeness_error" in said
    assert "The capital of France is Paris" in said
