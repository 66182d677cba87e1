"""What the commands share: the model and tokenizer, XLA's cache on disk, how things are shown.

Commands import nothing slow at their top, so that a mistake in a line is told at once: the public names of `oculi_jax` are
imported when they are first used, and what is not public is imported in the function that needs it.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

import oculi_jax

from ..embedded import embedded_directory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..models.decoder.config import DecoderConfig
    from ..models.llama import LlamaAttentionAdapter

Text = Annotated[str, typer.Argument(help="The prompt.", show_default=False)]
Chat = Annotated[
    bool,
    typer.Option(
        "--chat",
        help="The text is what a user says: it is put into the tokenizer's chat template, and the model is at the place where the "
        "assistant answers.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="A directory with a model, or a Hub id.", show_default="tiny-facts, which comes with this"
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Of the weights; auto leaves them as they are stored."),
]
Picture = Annotated[
    Path | None, typer.Option("--output", "-o", help="Draw it to this .png, .svg or .pdf.", show_default=False)
]
PICTURES = (".png", ".svg", ".pdf")
Json = Annotated[bool, typer.Option("--json", help="Print the numbers as JSON, and nothing else.")]
Longer = Annotated[bool, typer.Option("--allow-longer", help="Go beyond the length that the model was made for.")]


@dataclass(frozen=True)
class Asked:
    """What a line asks beside prompts and model.

    Attributes:
        top: how many rows to show.
        picture: where to draw; None for nowhere.
        as_json: whether numbers are printed as JSON, and nothing else.
        chat: whether prompts are a user's messages.
        longer: whether prompts may be longer than the model was made for.
    """

    top: int
    picture: Path | None
    as_json: bool
    chat: bool
    longer: bool


def console(*, error: bool = False, quiet: bool = False) -> Console:
    """A console that does not wrap tables at 80 columns when its output goes to a file."""
    found = Console(stderr=error, highlight=False, quiet=quiet)
    return found if found.is_terminal else Console(stderr=error, highlight=False, width=140, quiet=quiet)


def print_json(values: dict[str, Any]) -> None:
    """An object on standard output; arrays are lists, and what is not finite is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(name): plain(part) for name, part in value.items()}
        if hasattr(value, "tolist"):
            return plain(value.tolist())
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    print(json.dumps(plain(values), ensure_ascii=False, allow_nan=False))


def keep_programs() -> None:
    """Keeps compiled programs on disk, so that the second run is quick."""
    from ..utils import enable_compilation_cache

    with contextlib.suppress(OSError, ValueError):  # where none can be kept here, they are compiled anew
        enable_compilation_cache()


def check_model(model: str | None) -> None:
    """Raises for a model that is no directory, and that the Hub cannot have either: before anything slow is imported."""
    if model is None or os.path.isdir(os.path.expanduser(model)):
        return
    if os.path.exists(os.path.expanduser(model)):
        raise NotADirectoryError(f"{model!r} is a file; give the directory that holds config.json and the weights.")
    if not re.fullmatch(r"[^/.~][^/]*/[^/]+", model):
        raise FileNotFoundError(f"There is no directory {model!r}, and it has not the form 'owner/name' of a Hub id.")


def config_of(model: str | None) -> DecoderConfig | None:
    """A model's config, before its weights are read; None where it is not on this disk."""
    from ..models.decoder.config import DecoderConfig

    check_model(model)
    directory = embedded_directory() if model is None else Path(model).expanduser()
    return DecoderConfig.from_pretrained(directory) if (directory / "config.json").is_file() else None


def open_adapter(model: str | None, dtype: str, *texts: str | None, chat: bool = False) -> LlamaAttentionAdapter:
    """Loads a model, the embedded one for None, and its tokenizer; says which words of the texts it does not know."""
    check_model(model)
    keep_programs()
    from ..models.llama import LlamaAttentionAdapter
    from ..utils.tokens import unknown_words

    # transformers warns where torch is missing, which is not needed here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    source = embedded_directory() if model is None else model
    tokenizer = oculi_jax.load_tokenizer(source)
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"--chat is given, and the tokenizer of {model or 'tiny-facts'} has no chat template: leave it out."
        )
    adapter = LlamaAttentionAdapter(oculi_jax.from_pretrained(source, dtype=dtype), tokenizer)
    notes = console(error=True)
    if model is None:
        size = len(tokenizer) - len(tokenizer.all_special_tokens)
        notes.print(
            f"No --model is given: this is tiny-facts, a small Llama that comes with oculi_jax and knows {size} words."
        )
    if "" in texts:
        what = (
            "message is empty: what follows is about the answer to nothing"
            if chat
            else "prompt is empty: what follows is about the start of a text"
        )
        notes.print(f"The {what}.")
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
        raise ValueError(f"Cannot write {str(path)!r}: its name must end in {', '.join(suffixes)}.")
    return path


def check_picture(path: Path | None) -> Path | None:
    """The same for a picture, which matplotlib draws."""
    if path is None:
        return None
    path = check_output(path, *PICTURES)
    from ..visualize.canvas import door

    door()
    return path


def save_picture(figure: Figure, path: Path, quiet: bool = False) -> None:
    """Writes a figure, whole or not at all."""
    from ..utils.files import write_aside

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


def prompt_label(text: str, chat: bool) -> str:
    """A prompt as titles and lines say it: under --chat, that a user says it."""
    return f"user: {text}" if chat else text
