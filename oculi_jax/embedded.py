"""The model that comes with the package: tiny-facts, a small Llama that knows capitals, people and years."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .models.llama.model import Llama


def embedded_directory() -> Path:
    """Where tiny-facts lies, in Hugging Face's format: in the package where it is installed, beside it in a clone.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    package = Path(__file__).parent
    places = (package / "tiny_facts", package.parent / "weights" / "tiny-facts")
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise FileNotFoundError(f"The embedded model is neither in {str(places[0])!r} nor in {str(places[1])!r}.")


def embedded_model() -> tuple[Llama, Any]:
    """The embedded model and its tokenizer: 4 layers, 6 query and 2 key/value heads, 573 words; see its card, README.md.

    Returns:
        `(model, tokenizer)`: a float32 `Llama`, and a tokenizer of `transformers` that makes one token of a word.

    Raises:
        FileNotFoundError: the model does not lie in the package or beside it.

    Examples:
        >>> model, tokenizer = embedded_model()
        >>> says(forward(model, tokenizer.encode("The capital of Italy is")))
        'Rome'
    """
    from .models.llama import Llama
    from .utils.tokens import load_tokenizer

    directory = embedded_directory()
    return Llama.from_pretrained(directory), load_tokenizer(directory)
