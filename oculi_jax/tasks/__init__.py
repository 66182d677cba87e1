"""Tasks: pairs of prompts that are studied, made from published templates."""

from .ioi import indirect_object
from .pairs import PromptPairs

__all__ = ["PromptPairs", "indirect_object"]
