"""What is wrong in a line is said at once: no library is imported for it, and no model loaded."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

SLOW = ("numpy", "jax", "flax", "transformers", "matplotlib", "torch", "scipy")
HEAVY = f"""
import atexit, sys
from oculi_jax import cli
atexit.register(lambda: print("imported:", *sorted(set({SLOW!r}) & set(sys.modules))))
sys.argv[0] = "oculi"
cli.main()
"""
# A command of a line, which refuses an option: what typer and rich take.
PAID = """
import sys, typer
def command(number: int = 0) -> None: ...
sys.argv = ["command", "--nope"]
typer.run(command)
"""

LINES = {
    "an option": (["lens", "x", "--nope"], "--nope"),
    "a command": (["lense", "x"], "lense"),
    "a number": (["lens", "x", "--top-k", "0"], "--top-k"),
    "no prompt": (
        ["sweep", "--target", "a"],
        "There is no prompt: give TEXT, or a file of prompts with --prompts FILE.",
    ),
    "no target": (["sweep", "x"], "--target is missing: the answer, one token"),
    "a directory": (["lens", "x", "-o", "{tmp}/no/x.png"], "there is no directory"),
    "a kind of picture": (["sweep", "x", "--target", "a", "-o", "{tmp}/x.xyz"], "must end in .png, .svg, .pdf"),
    "a page": (["report", "x", "-o", "{tmp}/x.pdf"], "must end in .html"),
    "heads of a page": (["report", "x", "-o", "{tmp}/x.html", "--heads", "3"], "--heads is '3'"),
    "a file of prompts": (["patch", "--prompts", "{tmp}/no.txt"], "and there is no such file"),
    "a direction": (["generate", "x", "-i", "steer:file={tmp}/no.npy,layer=1"], "there is no file"),
    "an intervention": (["generate", "x", "-i", "spectre:layer=1"], "Did you mean 'spectra'?"),
    "a model": (["attribute", "x", "--target", "a", "--model", "{tmp}/no/such"], "There is no directory"),
    "a file for a model": (["heads", "--model", "{tmp}/file"], "is a file; give the directory"),
    "a model to compare": (["doctor", "--model", "{tmp}/no/such"], "There is no directory"),
    "a site": (["capture", "x", "--sites", "patern", "-o", "{tmp}/x"], "did you mean 'pattern'"),
    "axes": (["patch", "a", "b", "--target", "a", "--by", "head"], "--by is 'head'"),
    "an ablation": (["circuit", "a", "b", "--target", "a", "--ablation", "means"], "Did you mean 'mean'?"),
    "a dtype": (["lens", "x", "--dtype", "float33"], "--dtype"),
    "a message": (["heads", "--chat"], "there is no --text"),
}


def ran(code: str, *arguments: str, within: float = 0.0, times: int = 1) -> tuple[float, subprocess.CompletedProcess]:
    """Seconds of processor time and what the last run said: of at most so many runs, as long as they take longer than `within`."""
    seconds: list[float] = []
    while len(seconds) < times and min(seconds, default=1e9) > within:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds), done


@pytest.fixture(scope="module")
def bar() -> float:
    """Six tenths of a second; on a slow or busy machine, twice what a command of a line takes."""
    return max(0.6, 2 * ran(PAID, times=3)[0])


@pytest.mark.parametrize("mistake", LINES)
def test_a_mistake_is_told_at_once(mistake: str, tmp_path: Path, bar: float) -> None:
    (tmp_path / "file").write_text("x")
    arguments, message = LINES[mistake]
    seconds, done = ran(HEAVY, *(part.replace("{tmp}", str(tmp_path)) for part in arguments), within=bar, times=3)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stdout == "imported:\n" and seconds <= bar, (done.stdout, seconds, bar)


@pytest.mark.parametrize("command", ["lens", "generate", "patch", "report"])
def test_help_and_completion_import_no_library(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    done = ran(HEAVY, command, "--help")[1]
    assert done.returncode == 0 and "--chat" in done.stdout and "--allow-longer" in done.stdout
    assert done.stdout.endswith("imported:\n")
    monkeypatch.setenv("_OCULI_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"oculi {command} --ch")
    monkeypatch.setenv("COMP_CWORD", "2")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", f"oculi {command} --ch")
    done = ran(HEAVY)[1]
    assert done.stdout.splitlines() == ["--chat", "imported:"], os.linesep.join((done.stdout, done.stderr))


@pytest.fixture(scope="module")
def library() -> float:
    """Three seconds; on a slow or busy machine, half as much again as the library takes."""
    code = "import jax, flax.nnx, oculi_jax.models.llama, oculi_jax.intervention.canonical, oculi_jax.capture"
    return max(3.0, 1.5 * ran(code, times=2)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "-i", "head:layer=9,head=2"], "there are 4 layers"),
        (["generate", "x", "-i", "spectra:layer=1,head=2,alpha=-1"], "alpha"),
        (["generate", "x", "--temperature", "1", "--top-p", "3"], "top_p is 3.0, and must be"),
        (["generate", "x", "--top-k", "5"], "temperature is 0, which is greedy"),
        (
            ["report", "x", "-o", "{tmp}/x.html", "--heads", "L99H0"],
            "There is no head L99H0: this model has layers 0 to 3",
        ),
        (["capture", "x", "--sites", "q", "--layers", "9", "-o", "{tmp}/x"], "this model has 4 layers"),
        (["circuit", "a", "b", "--target", "a", "--edges", "928"], "--edges is 928, and this model has 927"),
    ],
)
def test_what_a_model_cannot_have_is_told_before_it_is_loaded(arguments, message, tmp_path: Path, library) -> None:
    """Which takes the library, and neither weights nor a tokenizer."""
    seconds, done = ran(HEAVY, *(part.replace("{tmp}", str(tmp_path)) for part in arguments), within=library, times=4)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    imported = done.stdout.removeprefix("imported:").split()
    assert set(imported) <= {"flax", "jax", "numpy"} and seconds <= library, (done.stdout, seconds, library)
