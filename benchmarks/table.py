"""What the benchmarks share: rows beside their bars, two things timed in turn, and the table that is printed."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
from rich.console import Console
from rich.table import Table

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
Row = dict[str, Any]
# What a row measures, the peer that it needs (or none), and how.
Plan = list[tuple[str, str, Callable[[], Row]]]


@contextmanager
def compilations() -> Iterator[list[float]]:
    """Seconds of each backend compilation within it."""
    heard: list[float] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            heard.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield heard
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def verdict(measured: str, bar: str, ok: bool | None, **values: Any) -> Row:
    """A row of the table without its number and name; `ok` is None where it was not measured."""
    return {"measured": measured, "bar": bar, "ok": ok, **values}


def side_by_side(a: Callable[[], Any], b: Callable[[], Any], bar: float, pairs: int = 21) -> Row:
    """A row of the time of `a` over that of `b`, alternating; what a call returns is freed before the next one."""
    times: list[list[float]] = [[], []]
    for number in range(pairs + 2):  # two to warm up, which compile
        for call, kept in zip((a, b), times, strict=True):
            start = time.perf_counter()
            result = call()
            kept.append(time.perf_counter() - start)
            del result
            if number < 2:
                kept.clear()
    ratios = [x / y for x, y in zip(*times, strict=True)]
    ratio, ours, other = map(statistics.median, (ratios, *times))
    text = f"{ratio:.2f} ({min(ratios):.2f}–{max(ratios):.2f}): {ours:.3f} s, {other:.3f} s"
    return verdict(text, f"≤ {bar}", ratio <= bar, ratio=ratio, ratios=ratios, seconds=ours, other_seconds=other)


def hugging_face(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()


def arguments(description: str, name: str = HUB_ID.split("/")[1], script: str = "smollm2") -> argparse.Namespace:
    """`--model` and `--json`, and a refusal of machines and places where nothing can be measured.

    `name` is the directory under `weights/` of the model that is meant, and `script` what brings it there.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "weights" / name)
    parser.add_argument("--json", type=Path, help="a file to write the rows to as well")
    args = parser.parse_args()
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        sys.exit("XLA_FLAGS asks for virtual devices, which share the cores; benchmarks do not run on them.")
    if not (args.model / "config.json").exists():
        sys.exit(f"There is no checkpoint in {args.model}: python weights/{script}.py {args.model}")
    jax.config.update("jax_enable_compilation_cache", False)
    return args


def installed(name: str) -> bool:
    return find_spec(name) is not None


def measure(plan: Plan, title: str, args: argparse.Namespace) -> None:
    """Runs the rows one after another, prints them, and exits with 1 where a bar is missed."""
    rows, busy = [], os.getloadavg()[0]
    for number, (what, peer, row_of) in enumerate(plan, 1):
        print(f"[{number}/{len(plan)}] {what}", file=sys.stderr, flush=True)
        row = row_of() if not peer or installed(peer) else verdict(f"{peer} is not installed", "", None)
        rows.append({"row": number, "what": what, **row})
    show(rows, f"{args.model.name}, float32, {title}")
    print(f"Load average {busy:.1f} before, {os.getloadavg()[0]:.1f} after, {os.cpu_count()} cores: was it idle?")
    if args.json:
        machine = {"platform": platform.platform(), "cores": os.cpu_count(), "jax": jax.__version__}
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    sys.exit(any(row["ok"] is False for row in rows))


def show(rows: list[Row], title: str) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    table = Table("", title, "measured", "bar", "")
    for row in rows:
        state = {True: "ok", False: "MISSED", None: "not measured"}[row["ok"]]
        table.add_row(str(row["row"]), row["what"], row["measured"], row["bar"], state)
    notes = (f"{row['row']}: {row['note']}" for row in rows if "note" in row)
    console.print(table, *notes, sep="\n")
