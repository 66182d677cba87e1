"""Models: the network, its families, and the door to their checkpoints."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loading import from_pretrained

__all__ = ["from_pretrained"]


def __getattr__(name: str) -> Any:
    if name == "from_pretrained":
        from .loading import from_pretrained

        return from_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
