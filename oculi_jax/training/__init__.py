"""Things fitted to a model that is left as it is: `fit`, the loop, and what is built on it; lenses."""

from .aligning import align, interchange_accuracy
from .alignment import Alignment, Alignments, VariableScore
from .constants import OptimalAblation, optimal_ablation
from .controls import untrained
from .disentangling import Disentanglement, disentanglement
from .fitting import Fit, fit
from .jacobian_lens import JacobianLens, fit_jacobian_lens
from .lenses import FittedLens, lens_kl
from .masking import DBM
from .rotations import DAS, BoundlessDAS
from .sampled_edges import SampledEdges, ugs
from .steps import Now
from .top_k import soft_top_k
from .tuned_lens import TunedLens, train_tuned_lens

__all__ = [
    "DAS",
    "DBM",
    "Alignment",
    "Alignments",
    "BoundlessDAS",
    "Disentanglement",
    "Fit",
    "FittedLens",
    "JacobianLens",
    "Now",
    "OptimalAblation",
    "SampledEdges",
    "TunedLens",
    "VariableScore",
    "align",
    "disentanglement",
    "fit",
    "fit_jacobian_lens",
    "interchange_accuracy",
    "lens_kl",
    "optimal_ablation",
    "soft_top_k",
    "train_tuned_lens",
    "ugs",
    "untrained",
]
