"""Which way imports point, what importing does, and that the documents' names exist."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "oculi_jax"
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Absolute names of modules that a file imports when it runs: not those for type checkers alone."""
    module = path.relative_to(ROOT).with_suffix("").parts
    package = module[:-1]
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            name = ".".join([*base, *(node.module.split(".") if node.module else [])])
            found.add(name)
            found.update(f"{name}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def users_of(name: str) -> set[str]:
    return {
        str(path.relative_to(PACKAGE))
        for path in FILES
        if any(found == name or found.startswith(f"{name}.") for found in imports(path))
    }


def test_only_the_doors_import_torch_and_transformers() -> None:
    assert users_of("torch") and all(path.startswith("backends/torch/") for path in users_of("torch"))
    assert users_of("transformers") == {"utils/tokens.py"}
    assert users_of("matplotlib") <= {str(p.relative_to(PACKAGE)) for p in FILES if "visualize" in p.parts}


# Room → what it may import of ours. `models/llama` is the model: it never sees edits or captures.
ALLOWED = {
    "pytrees.py": set(),
    "sites.py": set(),
    "arrays.py": set(),
    "output.py": {"arrays"},
    "intervention": {"arrays", "intervention", "sites"},
    "capture.py": {"sites"},
    "forward.py": {"arrays", "backends.torch", "capture", "intervention", "output"},
    "lens.py": {"arrays", "forward"},
    "backends": {
        "adapter.parts",
        "arrays",
        "backends",
        "capture",
        "forward",
        "generate",
        "intervention",
        "metrics",
        "models",
        "output",
        "replay",
        "sampling",
        "sites",
    },
    "prompts.py": set(),
    "sampling.py": {"arrays"},
    "generate.py": {"arrays", "capture", "forward", "intervention", "sampling"},
    "planner.py": set(),
    "replay.py": {"capture", "forward", "intervention", "metrics", "output", "sites"},
    "sweep_inputs.py": {"arrays", "forward", "metrics"},
    "sweep.py": {
        "arrays",
        "forward",
        "intervention",
        "metrics",
        "output",
        "planner",
        "replay",
        "sweep_inputs",
        "utils",
    },
    "bootstrap.py": {"arrays"},
    "metrics.py": {"arrays", "bootstrap", "capture", "output"},
    "causal": {
        "arrays",
        "capture",
        "causal",
        "forward",
        "generate",
        "intervention",
        "metrics",
        "prompts",
        "replay",
        "sites",
        "sweep",
        "sweep_inputs",
        "utils",
    },
    # Llama.generate, alone, leads to what stands above the model.
    "models/llama": {
        "models.llama",
        "utils",
        "adapter.adapter",
        "models.continuation",
        "intervention.context",
        "backends.torch",
    },
    "models/continuation.py": {"capture", "forward", "generate", "prompts", "sampling", "utils"},
    "adapter": {
        "adapter",
        "arrays",
        "capture",
        "doctor",
        "forward",
        "intervention",
        "lens",
        "models.continuation",
        "models.llama",
        "prompts",
        "sites",
        "utils",
    },
    "analysis": {"adapter.structures", "analysis", "capture", "utils"},
    "diagnostics.py": {"analysis", "forward", "intervention"},
    "training": {"arrays", "capture", "forward", "training", "utils"},
    "visualize": {"visualize"},
    "report": {
        "adapter",
        "report",
        "analysis",
        "capture",
        "diagnostics",
        "forward",
        "intervention",
        "metrics",
        "prompts",
        "sweep",
    },
    "doctor.py": {"backends.torch", "embedded", "forward", "models.llama", "sites", "utils"},
    "utils": {"utils", "backends.torch"},
}


@pytest.mark.parametrize("room", ALLOWED)
def test_arrows_point_one_way(room: str) -> None:
    paths = [PACKAGE / room] if room.endswith(".py") else sorted((PACKAGE / room).rglob("*.py"))
    for path in paths:
        for name in imports(path):
            if name.startswith("oculi_jax."):
                inner = name.removeprefix("oculi_jax.")
                assert inner.startswith("pytrees") or any(
                    inner == ok or inner.startswith(f"{ok}.") for ok in ALLOWED[room]
                ), (path.name, name)
    model = PACKAGE / "models" / "llama" / "model.py"
    assert not any("adapter" in name for name in imports(model))


def test_no_file_is_long() -> None:
    long = {
        str(path.relative_to(ROOT)): n
        for path in FILES
        if (n := len(path.read_text(encoding="utf-8").splitlines())) > 420
    }
    assert not long


def test_importing_starts_no_backend_changes_no_setting_and_needs_no_transformers() -> None:
    code = """
import jax
before = dict(jax.config.values)
import oculi_jax, oculi_jax.models.llama, oculi_jax.intervention, oculi_jax.utils
import oculi_jax.analysis, oculi_jax.diagnostics, oculi_jax.training, oculi_jax.visualize
from jax._src import xla_bridge
assert not xla_bridge._backends, xla_bridge._backends
assert dict(jax.config.values) == before
import sys
assert not {"torch", "transformers", "matplotlib", "huggingface_hub", "scipy.stats"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_of_the_contract_are_where_it_says() -> None:
    import oculi_jax
    from oculi_jax import analysis, intervention, training, visualize
    from oculi_jax.models import llama

    for name in ("forward", "lens", "CaptureSpec", "CaptureConfig", "ResidualConfig", "MLPConfig", "LogitConfig", "save", "load",
                 "AttentionCapture", "ResidualCapture", "MLPCapture", "LogitCapture", "capture_bytes"):  # fmt: skip
        assert name in oculi_jax.__all__ and getattr(oculi_jax, name).__doc__
    assert "generate" in oculi_jax.__all__ and "InterventionContext" in intervention.__all__
    for module in (intervention, analysis, training, visualize):
        for name in module.__all__:
            assert getattr(module, name).__doc__
    for name in ("EntropyAnalysis", "NormAnalysis", "AttentionAnalysis", "CorrelationAnalysis", "StratifiedView", "LogitLensAnalysis",
                 "CircuitDetection", "AttributionMethods", "CompositionAnalysis", "InterventionMetrics"):  # fmt: skip
        methods = {
            method: value for method, value in vars(getattr(analysis, name)).items() if not method.startswith("_")
        }
        assert methods and all(getattr(value, "__doc__", None) for value in methods.values()), name
    assert {"Llama", "LlamaConfig", "LlamaAttentionAdapter"} <= set(llama.__all__)


def test_the_readmes_table_of_sites_is_the_table() -> None:
    from oculi_jax import SITES

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for site in SITES.values():
        assert f"| `{site.name}` | {site.shape} | {site.meaning} |" in readme


def test_no_two_of_our_pytrees_have_equal_structures() -> None:
    """jit keeps programs by structure: of two that are equal, one would now and then be served the other's program."""
    import jax

    from oculi_jax import Output, intervention, metrics

    made = [
        intervention.QScaler(0, 1, 2.0), intervention.SpectraScaler(0, 1, 2.0), intervention.KScaler(0, 1, 2.0),
        intervention.HeadAblation(0, 1, 2.0), metrics.rank(3), metrics.probability(3), metrics.log_probability(3),
        Output(1, 2, 3, 4), intervention.AttentionKnockout(0, 1, 2, 3),
    ]  # fmt: skip
    structures = [jax.tree.structure(one) for one in made]
    assert [[a == b for b in structures] for a in structures] == [
        [i == j for j in range(len(made))] for i in range(len(made))
    ]
    assert [path.name for path in FILES if "tree_util.register_dataclass" in path.read_text(encoding="utf-8")] == [
        "pytrees.py"
    ]
