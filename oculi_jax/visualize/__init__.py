"""Pictures of what captures, analyses and sweeps return: arrays in, a matplotlib `Figure` out.

The views (`attention_view`, `circuit_view`, `lens_view`, `token_view`) are HTML instead, for notebooks, and need nothing.
The others need `pip install "oculi-jax[viz]"`; matplotlib is imported when the first picture is drawn. Nothing here touches
pyplot: write a figure with `figure.savefig("file.png")`, or give an `ax` of your own figure, best made with
`layout="constrained"`, which is then drawn in and returned. Layers run downwards, those of a circuit upwards, and all text is
shown literally: no mathematics between dollars.
"""

from ..webpage.network import circuit_view
from .attention import attention_heatmap, head_grid
from .bars import attribution_bars
from .canvas import panels
from .circuit import plot_circuit
from .curves import alpha_curve, layer_profile
from .heads import entropy_heatmap, head_heatmap, sweep_heatmap
from .lens import lens_table, probability_trajectory
from .views import attention_view, lens_view, token_view

__all__ = [
    "alpha_curve",
    "attention_heatmap",
    "attention_view",
    "attribution_bars",
    "circuit_view",
    "entropy_heatmap",
    "head_grid",
    "head_heatmap",
    "layer_profile",
    "lens_table",
    "lens_view",
    "panels",
    "plot_circuit",
    "probability_trajectory",
    "sweep_heatmap",
    "token_view",
]
