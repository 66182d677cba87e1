"""Things fitted to a model that is left as it is: the tuned lens."""

from .tuned_lens import TunedLens, train_tuned_lens, tuned_lens_kl

__all__ = ["TunedLens", "train_tuned_lens", "tuned_lens_kl"]
