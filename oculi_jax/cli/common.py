"""What the commands share: the model and tokenizer, XLA's cache on disk, how things are shown."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jax
import numpy as np
import typer
from rich.console import Console
from rich.markup import escape

from ..embedded import embedded_directory
from ..intervention.canonical import canonical
from ..intervention.frame import Frame
from ..models.llama import LlamaAttentionAdapter
from ..models.llama.config import LlamaConfig
from ..models.llama.model import Llama
from ..utils.files import write_aside
from ..utils.tokens import load_tokenizer, unknown_words
from ..visualize.canvas import door

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Text = Annotated[str, typer.Argument(help="The prompt.", show_default=False)]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="A directory with a Llama, or a Hub id.", show_default="tiny-facts, which comes with this"
    ),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Picture = Annotated[
    Path | None, typer.Option("--output", "-o", help="Draw it to this .png, .svg or .pdf.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print the numbers as JSON, and nothing else.")]
Longer = Annotated[bool, typer.Option("--allow-longer", help="Go beyond the length that the model was made for.")]


def console(*, error: bool = False, quiet: bool = False) -> Console:
    """A console that does not wrap tables at 80 columns when its output goes to a file."""
    found = Console(stderr=error, highlight=False, quiet=quiet)
    return found if found.is_terminal else Console(stderr=error, highlight=False, width=140, quiet=quiet)


def print_json(values: dict[str, Any]) -> None:
    """An object on standard output; arrays are lists, and what is not finite is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(name): plain(part) for name, part in value.items()}
        if isinstance(value, np.ndarray | jax.Array):
            return plain(np.asarray(value).tolist())
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        if isinstance(value, np.generic):
            return plain(value.item())
        return None if isinstance(value, float) and not math.isfinite(value) else value

    print(json.dumps(plain(values), ensure_ascii=False, allow_nan=False))


def keep_programs() -> None:
    """Keeps compiled programs on disk, so that the second run is quick."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(base / "oculi_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def check_early(model: str | None, interventions: Sequence[Any]) -> None:
    """Raises for interventions that a model cannot have, by its config, before its weights are read."""
    directory = embedded_directory() if model is None else Path(model).expanduser()
    if interventions and (directory / "config.json").is_file():
        canonical(tuple(interventions), Frame(LlamaConfig.from_pretrained(directory), np.dtype(np.float32), 1, None))


def open_adapter(model: str | None, dtype: str, *texts: str | None) -> LlamaAttentionAdapter:
    """Loads a model, the embedded one for None, and its tokenizer; says which words of the texts it does not know."""
    keep_programs()
    # transformers warns where torch is missing, which is not needed here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    source = embedded_directory() if model is None else model
    loaded, tokenizer = Llama.from_pretrained(source, dtype=dtype), load_tokenizer(source)
    adapter, notes = LlamaAttentionAdapter(loaded, tokenizer), console(error=True)
    if model is None:
        size = len(tokenizer) - len(tokenizer.all_special_tokens)
        notes.print(
            f"No --model is given: this is tiny-facts, a small Llama that comes with oculi_jax and knows {size} words."
        )
    if "" in texts:
        notes.print("The prompt is empty: what follows is about the start of a text.")
    for word in dict.fromkeys(word for text in texts if text for word in unknown_words(tokenizer, text)):
        near = difflib.get_close_matches(word, (known.strip("▁") for known in tokenizer.get_vocab()), 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        notes.print(f"The model has no token for {word!r} and reads it as {tokenizer.unk_token!r}.{hint}", markup=False)
    return adapter


def check_output(path: Path, *suffixes: str) -> Path:
    """Where a file is to go, or a sentence that says why it cannot, before anything slow begins."""
    path = path.expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"Cannot write {str(path)!r}: it is a directory.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"Cannot write {str(path)!r}: there is no directory {str(path.parent)!r}.")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"Cannot write {str(path)!r}: no permission to write in {str(path.parent)!r}.")
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"Cannot draw {str(path)!r}: its name must end in {', '.join(suffixes)}.")
    return path


def check_picture(path: Path | None) -> Path | None:
    """The same for a picture, which matplotlib draws."""
    if path is None:
        return None
    door()
    return check_output(path, ".png", ".svg", ".pdf")


def save_picture(figure: Figure, path: Path, quiet: bool = False) -> None:
    """Writes a figure, whole or not at all."""
    with write_aside(path) as aside:
        figure.savefig(aside, format=path.suffix[1:].lower(), dpi=150)
    console(quiet=quiet).print(f"Drew {path}.", markup=False)


@contextmanager
def working(label: str) -> Iterator[None]:
    """A spinner on a terminal while something runs."""
    with console(error=True).status(escape(label)):
        yield


def integers(text: str | None, what: str) -> list[int] | None:
    """`"10,15"` or `"0-5"` → integers; None stays None."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,6})(?:-([0-9]{1,6}))?\s*", part)
        span = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not span:
            raise ValueError(f"{what} is {text!r}; write numbers with commas, or a rising range: 10,15 or 0-5.")
        found += span
    return found


def shown(text: object) -> str:
    """A token as people can read it: quoted, with line breaks and other invisible characters written out."""
    return repr(str(text))
