"""Mechanistic interpretability of Llama models as transformations of one pure JAX function."""

from .capture_spec import CaptureSpec
from .forward import Output, forward, lens
from .sites import SITES, Site, find_site

__all__ = ["SITES", "CaptureSpec", "Output", "Site", "find_site", "forward", "lens"]
__version__ = "0.1.0"
