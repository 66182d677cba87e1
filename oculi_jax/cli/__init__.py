"""The command line: `oculi lens`, `capture`, `heads`, `attribute`, `sweep`, `patch`, `generate`, `report`, `sites`, `doctor`."""

from __future__ import annotations

import io
import sys

import typer

from .attribute import attribute
from .capture import capture
from .doctor import doctor
from .generate import generate
from .heads import heads
from .lens import lens
from .patch import patch
from .report import report
from .sites import sites
from .sweep import sweep

app = typer.Typer(
    help="Look inside a Llama.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
app.command()(lens)
app.command()(capture)
app.command()(heads)
app.command()(attribute)
app.command()(sweep)
app.command()(patch)
app.command()(generate)
app.command()(report)
app.command()(sites)
app.command()(doctor)

# What the library raises at input that it refuses; anything else is a bug and keeps its traceback.
REFUSALS = (ValueError, TypeError, KeyError, IndexError, OSError, NotImplementedError, ModuleNotFoundError)


def _not_text(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:
        return True
    return False


def main() -> None:
    """Runs the command line; what the user can mend is one clear line on standard error and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no "█" shows something else, and goes on
    try:
        if wrong := [word for word in sys.argv if _not_text(word)]:
            raise ValueError(f"{wrong[0]!r} is not valid text in UTF-8.")
        app()
    except REFUSALS as error:
        message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        option = message.replace("pass allow_longer=True", "give --allow-longer")
        print(f"oculi: {option}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
