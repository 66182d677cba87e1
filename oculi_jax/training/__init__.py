"""Things fitted to a model that is left as it is: `fit`, the loop, and what is built on it; the tuned lens."""

from .alignment import Alignment, boundless_das, das, interchange_accuracy
from .controls import untrained
from .detection import auroc
from .directions import Direction
from .editing import RankOneEdit, rank_one_edit
from .fitting import Fit, fit
from .probes import linear_probe, logistic_probe
from .steering import difference_of_means
from .steps import Now
from .top_k import soft_top_k
from .tuned_lens import TunedLens, train_tuned_lens, tuned_lens_kl

__all__ = [
    "Alignment",
    "Direction",
    "Fit",
    "Now",
    "RankOneEdit",
    "TunedLens",
    "auroc",
    "boundless_das",
    "das",
    "difference_of_means",
    "fit",
    "interchange_accuracy",
    "linear_probe",
    "logistic_probe",
    "rank_one_edit",
    "soft_top_k",
    "train_tuned_lens",
    "tuned_lens_kl",
    "untrained",
]
