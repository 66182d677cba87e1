"""Which way imports point, what importing does, and that the documents' names exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "oculi_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def imports(path: Path, *, typed: bool = True) -> set[str]:
    """Absolute names of modules that a file imports when it runs: not those for type checkers alone.

    `typed` says whether imports inside the functions of `TYPED` count.
    """
    module = path.relative_to(ROOT).with_suffix("").parts
    package = module[:-1]
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if not typed and isinstance(node, ast.FunctionDef) and node.name in TYPED:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            name = ".".join([*base, *(node.module.split(".") if node.module else [])])
            # `from package import module` means the module; of anything else the package itself is meant.
            inner = {f"{name}.{alias.name}" for alias in node.names}
            found.update(inner & set(MODULES))
            if not inner <= set(MODULES):
                found.add(name)
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


# Room → what it may import of ours, lazily too. `models` are the networks: they never sees edits or captures.
CORE = {"arrays", "buckets", "capture", "intervention", "output", "prompts", "rules", "sites"}
ALLOWED = {
    "cells.py": set(),
    "pytrees.py": set(),
    "sites.py": set(),
    "arrays.py": set(),
    "traced.py": set(),
    "output.py": {"arrays", "sites"},
    "intervals.py": {"arrays"},
    "capture.py": {"sites"},
    "prompts.py": {"arrays"},
    "rules.py": {"arrays", "models.decoder.derivatives", "sites"},
    "buckets.py": {"prompts"},
    "intervention": {"arrays", "intervention", "sites"},
    "metrics.py": {"arrays", "capture", "intervals", "output"},
    "models/decoder": {"models.decoder", "models.families", "sites", "utils"},
    "models/families": {"models.decoder", "models.families"},
    "models/llama": {"models.decoder", "models.llama"},
    "models/loading.py": {"models.decoder", "models.llama", "backends.torch"},
    "decoding/sampling.py": {"arrays"},
    "backends": {*CORE, "backends", "decoding.sampling", "metrics", "models", "utils"},
    "tail.py": {"arrays", "intervention", "sites"},
    "run.py": {*CORE, "backends", "tail"},
    "reading.py": {*CORE, "backends"},
    "means.py": {*CORE, "backends"},
    "sweeps": {*CORE, "backends", "metrics", "sweeps", "utils"},
    "decoding": {*CORE, "backends", "decoding", "utils"},
    "causal": {
        *CORE,
        "backends",
        "causal",
        "decoding.generation",
        "metrics",
        "models.decoder.attention",
        "run",
        "sweeps",
    },
    "tasks": {"metrics", "prompts", "tasks", "utils"},
    "circuits": {
        *CORE,
        "backends",
        "causal",
        "circuits",
        "intervals",
        "metrics",
        "models",
        "sweeps",
        "utils",
        "webpage",
    },
    "data": {*CORE, "backends", "data", "sweeps", "utils"},
    "analysis": {"adapter.structures", "analysis", "capture", "utils"},
    "diagnostics.py": {"analysis", "backends", "intervention", "run"},
    "training": {
        *CORE,
        "backends",
        "circuits",
        "data.record",
        "data.streams",
        "intervals",
        "means",
        "metrics",
        "reading",
        "run",
        "sweeps.running",
        "training",
        "utils",
    },
    "adapter": {*CORE, "adapter", "backends", "decoding", "models", "trust", "utils"},
    "trust.py": {"backends.torch", "embedded", "models", "run", "sites", "utils"},
    "webpage": {"utils.files", "webpage"},
    "visualize": {"visualize", "webpage"},
    "pages": {*CORE, "adapter", "analysis", "diagnostics", "metrics", "pages", "run", "sweeps", "utils", "webpage"},
    "utils": {"utils", "backends.torch.devices"},
}
# The lines that users type, which go against the arrows; and tables of contents, which import what they are asked for.
TYPED = ("generate", "from_pretrained", "__getattr__")


@pytest.mark.parametrize("room", ALLOWED)
def test_arrows_point_one_way(room: str) -> None:
    paths = [PACKAGE / room] if room.endswith(".py") else sorted((PACKAGE / room).rglob("*.py"))
    for path in paths:
        for name in imports(path, typed=False):
            if name.startswith("oculi_jax."):
                inner = name.removeprefix("oculi_jax.")
                assert inner in ("pytrees", "arrays", "cells", "traced") or any(
                    inner == ok or inner.startswith(f"{ok}.") for ok in ALLOWED[room]
                ), (path.name, name)


def test_no_circle_of_imports() -> None:
    """Lazy imports counted; the only exceptions are the functions of `TYPED`."""
    leads = {name: (imports(path, typed=False) & set(MODULES)) - {name} for name, path in MODULES.items()}
    while True:
        ends = {name for name, found in leads.items() if not found & set(leads)}
        if not ends:
            break
        leads = {name: found for name, found in leads.items() if name not in ends}
    assert not leads, f"these files import one another: {', '.join(sorted(leads))}"


@pytest.mark.torch  # imports every module
def test_no_module_is_hidden_by_a_function_of_its_name() -> None:
    import importlib
    import types

    for path in FILES:
        if path.name not in ("__init__.py", "__main__.py"):
            *package, name = path.relative_to(ROOT).with_suffix("").parts
            importlib.import_module(".".join([*package, name]))
            assert isinstance(getattr(importlib.import_module(".".join(package)), name), types.ModuleType), path


@pytest.mark.torch
def test_both_backends_keep_the_contract_of_programs() -> None:
    """The signatures, which type checkers compare too, of every program and fact."""
    import inspect

    from oculi_jax.backends import Programs, jax, torch

    for backend in (jax, torch):
        for name, wanted in vars(Programs).items():
            if inspect.isfunction(wanted) and not name.startswith("_"):
                own = list(inspect.signature(getattr(backend, name)).parameters)
                assert own == list(inspect.signature(wanted).parameters)[1:], (backend.__name__, name)
            elif isinstance(wanted, property):
                assert isinstance(getattr(backend, name), bool)


def test_one_loop_over_layers_a_backend() -> None:
    """Whoever runs the blocks of a model calls `run_layers`; nobody else scans, or counts, over layers of a network."""
    for backend in ("jax", "torch"):
        files = {path.name: path.read_text(encoding="utf-8") for path in (PACKAGE / "backends" / backend).glob("*.py")}
        assert {name for name, text in files.items() if "def run_layers(" in text} == {"layers.py"}
        if backend == "jax":
            assert {name for name, text in files.items() if "lax.scan(" in text or "fori_loop(" in text} == {
                "layers.py"
            }


def test_the_command_line_says_of_each_command_what_it_says_of_itself() -> None:
    import inspect

    from oculi_jax import cli

    for name, summary in cli.COMMANDS.items():
        function = cli.load(name)
        assert function.__name__ == name
        assert " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split()) == summary


def test_help_needs_neither_jax_nor_the_library() -> None:
    code = """
import sys
sys.argv = ["oculi", "--help"]
from oculi_jax import cli
try:
    cli.main()
except SystemExit as end:
    assert not end.code
assert not {"jax", "flax", "numpy", "oculi_jax.run"} & set(sys.modules), sorted(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "attribute" in done.stdout


def test_no_file_is_long() -> None:
    long = {
        str(path.relative_to(ROOT)): n
        for path in FILES
        if (n := len(path.read_text(encoding="utf-8").splitlines())) > 420
    }
    assert not long


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_no_function_is_long() -> None:
    """Fifty lines of code, docstrings apart."""
    long = {}
    for path in FILES:
        for function in functions(ast.parse(path.read_text(encoding="utf-8"))):
            first = (
                function.body[1] if ast.get_docstring(function) is not None and function.body[1:] else function.body[0]
            )
            assert function.end_lineno is not None
            if (n := function.end_lineno - first.lineno + 1) > 50:
                long[f"{path.relative_to(ROOT)}:{function.name}"] = n
    assert not long


def test_parameters_say_what_they_take() -> None:
    """`Any` is for pytrees, and for what a library gives no type of: a handful of the parameters of public functions."""

    def public(body: Sequence[ast.stmt]) -> Iterator[ast.FunctionDef]:
        for node in body:
            if isinstance(node, ast.FunctionDef) and (
                not node.name.startswith("_") or node.name in ("__init__", "__call__")
            ):
                yield node
            elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from public(node.body)

    vague, n = [], 0
    for path in FILES:
        for function in public(ast.parse(path.read_text(encoding="utf-8")).body):
            taken = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            n += len(taken)
            vague += [
                f"{path.name}:{function.name}({x.arg})"
                for x in taken
                if x.annotation and ast.unparse(x.annotation) == "Any"
            ]
    assert n > 1000 and len(vague) <= 8, vague


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


def test_the_table_of_contents_is_what_type_checkers_see() -> None:
    import oculi_jax

    block = next(
        node
        for node in ast.parse(Path(oculi_jax.__file__).read_text(encoding="utf-8")).body
        if isinstance(node, ast.If)
    )
    typed = {alias.name for node in ast.walk(block) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == {*oculi_jax._HOMES, *oculi_jax._MODULES} == set(oculi_jax.__all__)
    for name in oculi_jax.__all__:
        assert getattr(oculi_jax, name) is not None


def test_the_pages_table_of_sites_is_the_table() -> None:
    from oculi_jax import SITES

    page = (ROOT / "docs" / "shapes.md").read_text(encoding="utf-8")
    for site in SITES.values():
        assert f"| `{site.name}` | {site.shape} | {site.meaning} |" in page


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


def test_the_version_is_in_one_place() -> None:
    """`oculi_jax.__version__`; packages are built with it, and the citation says it."""
    import tomllib
    from importlib.metadata import version

    import oculi_jax

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    assert version("oculi-jax") == oculi_jax.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", citation, re.M) == [oculi_jax.__version__]
