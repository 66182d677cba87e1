"""Things fitted to a model that is left as it is: `fit`, the loop, and what is built on it; the tuned lens."""

from .alignment import Alignment, boundless_das, das, interchange_accuracy
from .controls import untrained
from .fitting import Fit, fit
from .gradient_sampling import SampledEdges, ugs
from .optimal import OptimalAblation, optimal_ablation
from .steps import Now
from .top_k import soft_top_k
from .tuned_lens import TunedLens, train_tuned_lens, tuned_lens_kl

__all__ = [
    "Alignment",
    "Fit",
    "Now",
    "OptimalAblation",
    "SampledEdges",
    "TunedLens",
    "boundless_das",
    "das",
    "fit",
    "interchange_accuracy",
    "optimal_ablation",
    "soft_top_k",
    "train_tuned_lens",
    "tuned_lens_kl",
    "ugs",
    "untrained",
]
