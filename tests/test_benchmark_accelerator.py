"""`benchmarks/accelerator.py` on tiny shapes: every row runs, and the arithmetic that its shares rest on is Hugging Face's."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.torch

FILE = Path(__file__).parents[1] / "benchmarks" / "accelerator.py"


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("XLA_PYTHON_CLIENT_PREALLOCATE", "HF_HUB_OFFLINE"):  # what the file sets goes with the test
        monkeypatch.setenv(name, "1")
    spec = importlib.util.spec_from_file_location("accelerator", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "accelerator", module)  # where its dataclasses look for their names
    spec.loader.exec_module(module)
    return module


def products_of_layers(hf: Any, n_tokens: int) -> list[int]:
    """Operations of each layer's products on a prompt, counted by torch as they run."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        hf(torch.zeros(1, n_tokens, dtype=torch.long), use_cache=False)
    counts = counter.get_flop_counts()
    layers = range(hf.config.num_hidden_layers)
    return [counts[f"LlamaForCausalLM.model.layers.{i}"][torch.ops.aten.mm] for i in layers]


def test_every_kind_of_row_runs_and_counts_what_must_be_done(
    accelerator: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "table.md"
    # Not those that are another one with other sizes or another peer.
    wanted = [
        key for key in accelerator.ROWS if key not in ("forward-long", "forward-batch", "decode-16", "set-shared")
    ]
    assert len(wanted) == len(accelerator.ROWS) - 4
    rows = {row.key: row for row in accelerator.main(["--small", "--shape", "8B", "-o", str(file), "--only", *wanted])}
    assert list(rows) == wanted
    for key, row in rows.items():
        assert all(row.checks.values()), (key, row.checks, row.note)
        assert row.values and all(math.isfinite(x) and x >= 0 for x in row.values.values()), (key, row.values)
        assert ("ratio" in row.values) == (key not in ("first", "memory")), key
    assert len(file.read_text(encoding="utf-8").splitlines()) == len(rows) + 5
    assert capsys.readouterr().out.endswith(file.read_text(encoding="utf-8"))

    case = accelerator.Case("8B", True, "", math.nan)
    needed = 0
    for prompt in accelerator.prompts(case):
        layers = products_of_layers(case.peer.hf, len(prompt))
        needed += sum(case.config.num_attention_heads * sum(layers[first:]) for first in range(len(layers)))
    assert rows["set"].values["flops"] == needed
