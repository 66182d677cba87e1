"""The examples of the reference: every public name has one, and each runs and prints what its docstring says."""

from __future__ import annotations

import doctest
import importlib
import inspect
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from .test_guide import DOCS, blocks, difference, run

ROOT = Path(__file__).parents[1]
PAGE = "reference/index.md"  # whose block is what examples begin from
MODULES = (
    "oculi_jax", "oculi_jax.intervention", "oculi_jax.metrics", "oculi_jax.causal", "oculi_jax.circuits", "oculi_jax.data", "oculi_jax.analysis",
    "oculi_jax.tasks", "oculi_jax.visualize", "oculi_jax.training", "oculi_jax.rules", "oculi_jax.models.llama", "oculi_jax.diagnostics",
    "oculi_jax.utils",
)  # fmt: skip
# A method that takes one of these is called inside a run or a fit, and `check` before one: users call neither.
INSIDE = {"fixed", "frame", "n_prompts", "owner", "parameters", "sizes", "tap", "values"}
PARSER = doctest.DocTestParser()


class Tolerant(doctest.OutputChecker):
    """Compares output as the documents' is compared: words are the same, and decimals are close."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        lines = got.splitlines(), want.splitlines()
        return len(lines[0]) == len(lines[1]) and not any(map(difference, *lines))


def public(module: str) -> dict[str, Any]:
    """Name → class or function in a module's `__all__`, or that it defines where it has none: no modules, no plain data."""
    home = importlib.import_module(module)
    own = [name for name, value in vars(home).items() if getattr(value, "__module__", "") == module and name[0] != "_"]
    found = {name: getattr(home, name) for name in getattr(home, "__all__", own)}
    return {name: value for name, value in found.items() if inspect.isclass(value) or inspect.isroutine(value)}


def members(cls: type) -> dict[str, Any]:
    """Name → public method or property of a class, those of our own bases included."""
    ours = [base for base in reversed(cls.__mro__) if base.__module__.startswith("oculi_jax")]
    found = {name: value for base in ours for name, value in vars(base).items() if not name.startswith("_")}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, property | classmethod | staticmethod) or inspect.isfunction(value)
    }


def docstrings(module: str) -> Iterator[tuple[str, str]]:
    """Where they stand and their text: of what a module is the first to name, and of its methods."""
    earlier = [value for other in MODULES[: MODULES.index(module)] for value in public(other).values()]
    for name, value in public(module).items():
        if value not in earlier:
            yield f"{module}.{name}", own_docstring(value)
            for member, method in members(value).items() if inspect.isclass(value) else ():
                yield f"{module}.{name}.{member}", own_docstring(method)


def own_docstring(value: Any) -> str:
    return inspect.cleandoc(vars(value).get("__doc__") or "" if inspect.isclass(value) else value.__doc__ or "")


def calls(docstring: str) -> str:
    """What the examples of a docstring run."""
    return "".join(example.source for example in PARSER.get_examples(docstring))


@pytest.fixture(scope="module")
def prepared() -> dict[str, Any]:
    """What the reference's first page says that every example begins from."""
    namespace: dict[str, Any] = {"__name__": "examples"}
    run(blocks(PAGE, (DOCS / PAGE).read_text(encoding="utf-8"))[0], namespace)
    return namespace


@pytest.fixture
def programs_stay() -> Iterator[None]:
    """Where the suite keeps them, whatever an example says."""
    kept = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", kept)


@pytest.mark.usefixtures("programs_stay")
@pytest.mark.parametrize("module", MODULES)
def test_examples_print_what_they_say(
    module: str, prepared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    n_run = 0
    for where, text in docstrings(module):
        runner = doctest.DocTestRunner(Tolerant(), verbose=False)
        test = PARSER.get_doctest(text, prepared | public(module), where, None, None)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            runner.run(test, out=said.write)
        n_run += runner.tries
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close("all")
    assert n_run
    if said.getvalue():
        pytest.fail(said.getvalue(), pytrace=False)


@pytest.mark.quick
@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_an_example(module: str) -> None:
    """And so has every method that users call: in its own docstring, or in its class's."""
    without = []
    for name, value in public(module).items():
        own = calls(own_docstring(value))
        if not own:
            without.append(name)
        for member, method in members(value).items() if inspect.isclass(value) else ():
            function = method.fget if isinstance(method, property) else getattr(method, "__func__", method)
            inside = member == "check" or INSIDE & set(inspect.signature(function).parameters)
            if not inside and not re.search(rf"\.{member}\b", own + calls(own_docstring(method))):
                without.append(f"{name}.{member}")
    assert not without, f"no example calls {', '.join(without)}"


@pytest.mark.quick
def test_what_stands_under_examples_is_run() -> None:
    """A heading of examples is followed by a prompt, which alone is run; and there is one spelling of it."""
    for path in sorted((ROOT / "oculi_jax").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert "Example:\n" not in text, path
        assert text.count("Examples:\n") == len(re.findall(r"^ +Examples:\n +>>> ", text, re.M)), path


def test_an_example_that_prints_something_else_fails() -> None:
    def printed(want: str) -> bool:
        test = PARSER.get_doctest(f">>> 1 / 3, 'word'\n{want}", {}, "example", None, None)
        return doctest.DocTestRunner(Tolerant(), verbose=False).run(test, out=lambda text: None).failed == 0

    assert printed("(0.3333, 'word')\n")
    assert not any(map(printed, ("(0.3343, 'word')\n", "(0.3333, 'sword')\n", "(0.3333, 'word')\nmore\n", "")))


@pytest.mark.quick
@pytest.mark.parametrize("module", MODULES)
def test_arguments_that_a_docstring_explains_are_the_functions(module: str) -> None:
    """griffe's own warning is off, since it does not read `a, b: what both are`."""
    wrong = []
    for where, value in explained(module):
        text = inspect.getdoc(value) or ""
        section = re.search(r"^Args:\n((?:    .*\n|\n)+)", text + "\n", re.M)
        names = re.findall(r"^    ([*\w][*\w, ]*):", section[1], re.M) if section else []
        taken = set(inspect.signature(value).parameters)
        wrong += [f"{where}: {name}" for row in names for name in row.replace("*", "").split(", ") if name not in taken]
    assert not wrong


def explained(module: str) -> Iterator[tuple[str, Any]]:
    """Every public class and function, and their methods."""
    for name, value in public(module).items():
        yield f"{module}.{name}", value
        for member, method in members(value).items() if inspect.isclass(value) else ():
            function = getattr(method, "__func__", method)
            if inspect.isfunction(function):
                yield f"{module}.{name}.{member}", function
