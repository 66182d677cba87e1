"""The command line: `oculi lens`, `heads`, `patch`, `circuit` and the other commands of `COMMANDS`."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import typer

# What each command is for, as the list of them says it: the first sentence of its own help, which is imported with it alone.
COMMANDS = {
    "lens": "Layer by layer, what the model would say if it stopped there, and how the final answer comes up.",
    "capture": "Writes chosen sites of one prompt as a safetensors file: arrays, and axes, model and tokens as metadata.",
    "heads": "Every attention head, classified: what it does on random tokens that are repeated once, where nothing but the "
    "repetition can be known.",
    "attribute": "Which heads and MLPs an answer comes from: direct logit attribution at the last token.",
    "sweep": "What becomes of an answer without each attention head: the output z of one head at a time is set to zero.",
    "patch": "Where two prompts' runs carry what makes their answers differ: one run's values are put into the other, place by "
    "place.",
    "paths": "Which components tell others, by paths that lead through no other head, what makes two prompts' answers differ.",
    "circuit": "The part of the model that makes two prompts' answers differ: its edges, how much of the difference it keeps, and "
    "how much is left without it.",
    "steer": "The direction from negative prompts to positive ones: how well it tells them apart, and a file to steer with.",
    "generate": "Continues a text, plain and, with --intervene, under interventions, side by side.",
    "report": "A prompt's insides as one HTML page, for a browser: lens, attention, head scores, ablations, attribution.",
    "sites": "The sites: every value of the forward pass that can be read and edited, with its axes.",
    "job": "Runs a job over a data set from a file: model, data, what to compute, where to. A second start does what is missing.",
    "store": "What a directory of results holds: how many rows, of what, from which model and data, and what is missing.",
    "doctor": "Whether what this machine's devices compute can be trusted: each site of one prompt beside the CPU's float32.",
}


def load(command: str) -> Callable[..., Any]:
    """The function of a command, imported when it is asked for: most of them bring the whole library."""
    match command:
        case "lens":
            from .lens import lens as found
        case "capture":
            from .capture import capture as found
        case "heads":
            from .heads import heads as found
        case "attribute":
            from .attribute import attribute as found
        case "sweep":
            from .sweep import sweep as found
        case "patch":
            from .patch import patch as found
        case "paths":
            from .paths import paths as found
        case "circuit":
            from .circuit import circuit as found
        case "steer":
            from .steer import steer as found
        case "generate":
            from .generate import generate as found
        case "report":
            from .report import report as found
        case "sites":
            from .sites import sites as found
        case "job":
            from .job import job as found
        case "store":
            from .store import store as found
        case "doctor":
            from .doctor import doctor as found
        case _:
            raise ValueError(f"There is no command {command!r}; there are {', '.join(COMMANDS)}.")
    return found


def app_for(chosen: str | None) -> typer.Typer:
    """The command line, of which one command can run; the others are there by name and help."""
    import typer

    app = typer.Typer(help="Look inside a language model.", no_args_is_help=True, pretty_exceptions_enable=False)
    for name, summary in COMMANDS.items():
        if name == chosen:
            app.command(name)(load(name))
        else:
            app.command(name, help=summary)(lambda: None)
    return app


# What the library raises at input that it refuses; anything else is a bug and keeps its traceback.
REFUSALS = (ValueError, TypeError, KeyError, IndexError, OSError, NotImplementedError, ModuleNotFoundError)


def _not_text(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:
        return True
    return False


def _stop(*_: object) -> None:
    """Ends at once, and without a word: JAX's callbacks would swallow a KeyboardInterrupt, and imports make other errors of it."""
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h\n")  # the cursor, which a bar or a spinner hides
    os._exit(130)


def _shut(error: OSError) -> None:
    """Nothing more can be written to standard output; what is left of it must not be tried again at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if error.errno != errno.EPIPE:  # whoever read it has what they wanted
        print(f"oculi: Cannot write to standard output: {os.strerror(error.errno or 0)}.", file=sys.stderr)
        sys.exit(1)


def main() -> None:
    """Runs the command line; what the user can mend is one clear line on standard error and exit code 2."""
    before = signal.getsignal(signal.SIGINT)
    ours = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, _stop)
    try:
        try:
            _run()
        finally:
            sys.stdout.flush()
    except OSError as error:
        _shut(error)
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


def _run() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no "█" shows something else, and goes on
    try:
        if wrong := [word for word in sys.argv if _not_text(word)]:
            raise ValueError(f"{wrong[0]!r} is not valid text in UTF-8.")
        # A shell that completes gives the line so far by this name.
        words = os.environ.get("_TYPER_COMPLETE_ARGS", "").split() or sys.argv
        app_for(next((word for word in words[1:] if not word.startswith("-")), None))()
    except REFUSALS as error:
        if (
            isinstance(error, OSError)
            and error.filename is None
            and error.errno in (errno.ENOSPC, errno.EPIPE, errno.EIO)
        ):
            raise
        message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        option = message.replace("pass allow_longer=True", "give --allow-longer")
        print(f"oculi: {option}", file=sys.stderr)
        sys.exit(2)
