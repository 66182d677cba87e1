"""Tasks: pairs of prompts that are studied, made from published templates."""

from .choices import ChoicePairs, multiple_choice
from .ioi import indirect_object
from .numbers import arithmetic
from .pairs import PromptPairs

__all__ = ["ChoicePairs", "PromptPairs", "arithmetic", "indirect_object", "multiple_choice"]
