"""Mechanistic interpretability of Llama models as transformations of one pure JAX function.

A table of contents: what is named here is imported when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import (
        analysis,
        causal,
        circuits,
        data,
        diagnostics,
        intervention,
        metrics,
        models,
        rules,
        tasks,
        training,
        utils,
        visualize,
    )
    from .adapter import (
        AttentionCapture,
        CaptureConfig,
        FullCapture,
        LogitCapture,
        LogitConfig,
        MLPCapture,
        MLPConfig,
        ResidualCapture,
        ResidualConfig,
        capture_bytes,
        load,
        save,
    )
    from .capture import CaptureSpec
    from .decoding.generation import generate
    from .embedded import embedded_model
    from .intervals import bootstrap
    from .intervention import (
        Ablation,
        ActivationPatch,
        AttentionKnockout,
        Blend,
        DirectionAblation,
        Edit,
        Freeze,
        HeadAblation,
        KScaler,
        PerLayer,
        PerPrompt,
        QScaler,
        RankOne,
        SpectraScaler,
        Steer,
        Subspace,
    )
    from .means import mean_activations
    from .models.llama.model import Llama
    from .models.loading import from_pretrained
    from .output import Output
    from .pages import report
    from .prompts import padded
    from .reading import lens
    from .run import forward
    from .sites import SITES, Site, find_site
    from .sweeps.planning import Plan, SweepPlan
    from .sweeps.sweeping import plan, sweep
    from .utils.tokens import load_tokenizer

__version__ = "0.1.0"

# Module → what of it is named here.
_CONTENTS = {
    "adapter": (
        "AttentionCapture", "CaptureConfig", "FullCapture", "LogitCapture", "LogitConfig", "MLPCapture", "MLPConfig",
        "ResidualCapture", "ResidualConfig", "capture_bytes", "load", "save",
    ),
    "intervals": ("bootstrap",),
    "capture": ("CaptureSpec",),
    "decoding.generation": ("generate",),
    "embedded": ("embedded_model",),
    "intervention": (
        "Ablation", "ActivationPatch", "AttentionKnockout", "Blend", "DirectionAblation", "Edit", "Freeze", "HeadAblation",
        "KScaler", "PerLayer", "PerPrompt", "QScaler", "RankOne", "SpectraScaler", "Steer", "Subspace",
    ),
    "means": ("mean_activations",),
    "models.llama.model": ("Llama",),
    "models.loading": ("from_pretrained",),
    "output": ("Output",),
    "pages": ("report",),
    "prompts": ("padded",),
    "reading": ("lens",),
    "run": ("forward",),
    "sites": ("SITES", "Site", "find_site"),
    "sweeps.planning": ("Plan", "SweepPlan"),
    "sweeps.sweeping": ("plan", "sweep"),
    "utils.tokens": ("load_tokenizer",),
}  # fmt: skip
_MODULES = (
    "analysis",
    "causal",
    "circuits",
    "data",
    "diagnostics",
    "intervention",
    "metrics",
    "models",
    "rules",
    "tasks",
    "training",
    "utils",
    "visualize",
)
_HOMES = {name: module for module, names in _CONTENTS.items() for name in names}

__all__ = [
    "SITES",
    "Ablation",
    "ActivationPatch",
    "AttentionCapture",
    "AttentionKnockout",
    "Blend",
    "CaptureConfig",
    "CaptureSpec",
    "DirectionAblation",
    "Edit",
    "Freeze",
    "FullCapture",
    "HeadAblation",
    "KScaler",
    "Llama",
    "LogitCapture",
    "LogitConfig",
    "MLPCapture",
    "MLPConfig",
    "Output",
    "PerLayer",
    "PerPrompt",
    "Plan",
    "QScaler",
    "RankOne",
    "ResidualCapture",
    "ResidualConfig",
    "Site",
    "SpectraScaler",
    "Steer",
    "Subspace",
    "SweepPlan",
    "analysis",
    "bootstrap",
    "capture_bytes",
    "causal",
    "circuits",
    "data",
    "diagnostics",
    "embedded_model",
    "find_site",
    "forward",
    "from_pretrained",
    "generate",
    "intervention",
    "lens",
    "load",
    "load_tokenizer",
    "mean_activations",
    "metrics",
    "models",
    "padded",
    "plan",
    "report",
    "rules",
    "save",
    "sweep",
    "tasks",
    "training",
    "utils",
    "visualize",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif name in _MODULES:
        found = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
