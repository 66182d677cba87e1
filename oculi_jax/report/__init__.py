"""One HTML page with a prompt's insides: lens, attention patterns, what heads do, what they matter, whence the answer."""

from .measure import Measured, measure
from .page import page, report

__all__ = ["Measured", "measure", "page", "report"]
