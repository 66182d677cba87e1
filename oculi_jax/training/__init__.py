"""Things fitted to a model that is left as it is: `fit`, the loop, and what is built on it; lenses."""

from .aligning import align, interchange_accuracy
from .alignment import Alignment, Alignments, VariableScore
from .controls import untrained
from .detection import auroc
from .direction_masks import DBM
from .directions import Direction
from .disentangling import Disentanglement, disentanglement
from .editing import RankOneEdit, rank_one_edit
from .fitting import Fit, fit
from .gradient_sampling import SampledEdges, ugs
from .jacobian_lens import JacobianLens, fit_jacobian_lens
from .lenses import FittedLens, lens_kl
from .masks import LearnedScores
from .nested_masks import matryoshka
from .optimal import OptimalAblation, optimal_ablation
from .probes import linear_probe, logistic_probe
from .pruning import Pruned, prune
from .rotations import DAS, BoundlessDAS
from .steering import difference_of_means
from .steps import Now
from .top_k import soft_top_k
from .tuned_lens import TunedLens, train_tuned_lens

__all__ = [
    "DAS",
    "DBM",
    "Alignment",
    "Alignments",
    "BoundlessDAS",
    "Direction",
    "Disentanglement",
    "Fit",
    "FittedLens",
    "JacobianLens",
    "LearnedScores",
    "Now",
    "OptimalAblation",
    "Pruned",
    "RankOneEdit",
    "SampledEdges",
    "TunedLens",
    "VariableScore",
    "align",
    "auroc",
    "difference_of_means",
    "disentanglement",
    "fit",
    "fit_jacobian_lens",
    "interchange_accuracy",
    "lens_kl",
    "linear_probe",
    "logistic_probe",
    "matryoshka",
    "optimal_ablation",
    "prune",
    "rank_one_edit",
    "soft_top_k",
    "train_tuned_lens",
    "ugs",
    "untrained",
]
