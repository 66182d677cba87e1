"""Things fitted to a model that is left as it is: `fit`, the loop, and what is built on it; the tuned lens."""

from .alignment import Alignment, boundless_das, das, interchange_accuracy
from .controls import untrained
from .fitting import Fit, fit
from .masks import LearnedScores
from .nested_masks import matryoshka
from .pruning import Pruned, prune
from .steps import Now
from .top_k import soft_top_k
from .tuned_lens import TunedLens, train_tuned_lens, tuned_lens_kl

__all__ = [
    "Alignment",
    "Fit",
    "LearnedScores",
    "Now",
    "Pruned",
    "TunedLens",
    "boundless_das",
    "das",
    "fit",
    "interchange_accuracy",
    "matryoshka",
    "prune",
    "soft_top_k",
    "train_tuned_lens",
    "tuned_lens_kl",
    "untrained",
]
