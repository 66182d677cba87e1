"""One HTML page with a prompt's insides: lens, attention patterns, what heads do, what they matter, whence the answer."""

from .html import page, report
from .measured import Measured, measure

__all__ = ["Measured", "measure", "page", "report"]
