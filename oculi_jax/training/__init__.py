"""Things fitted to a model that is left as it is: `fit`, the loop, and what is built on it; lenses."""

from .alignment import Alignment, boundless_das, das, interchange_accuracy
from .controls import untrained
from .fitting import Fit, fit
from .jacobian_lens import JacobianLens, fit_jacobian_lens
from .lenses import FittedLens, lens_kl
from .steps import Now
from .top_k import soft_top_k
from .tuned_lens import TunedLens, train_tuned_lens

__all__ = [
    "Alignment",
    "Fit",
    "FittedLens",
    "JacobianLens",
    "Now",
    "TunedLens",
    "boundless_das",
    "das",
    "fit",
    "fit_jacobian_lens",
    "interchange_accuracy",
    "lens_kl",
    "soft_top_k",
    "train_tuned_lens",
    "untrained",
]
