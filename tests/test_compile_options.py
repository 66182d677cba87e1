"""On a GPU programs are compiled with options, at the top level alone: a stand-in says that this CPU is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxlib.version import __version__ as jaxlib_version

from oculi_jax import embedded_model, forward
from oculi_jax.backends.jax import compiled as module
from oculi_jax.backends.jax.compiled import accepts, compiled, platform_of
from oculi_jax.circuits import edge_attribution
from oculi_jax.tasks import indirect_object
from oculi_jax.utils.devices import CPU_OPTIONS, GPU_OPTIONS

from .compilations import compilations
from .tiny import prompt, tiny_llama

X = np.arange(3, dtype=np.float32)
TEMPLATE = "When {name_A} and {name_B} met at the {place}, {name_C} handed a {object} to"
UNKNOWN = {"xla_gpu_no_such_option": True}


def program() -> Any:
    """A fresh one, which compiles with the options as they are now."""

    @compiled("power", donate=())
    def run(x: Any, *, power: int = 2) -> Any:
        return jnp.sin(x) ** power

    return run


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Options, and whether they are known (None: ask the compiler), of what is then said to be a GPU."""

    def say(options: dict[str, Any], known: bool | None = None) -> None:
        monkeypatch.setattr(module, "GPU_OPTIONS", options)
        monkeypatch.setattr(module, "has_gpu", lambda: True)
        monkeypatch.setattr(module, "platform_of", lambda leaves: "gpu")
        if known is not None:
            monkeypatch.setattr(module, "accepts", lambda: known)
        accepts.cache_clear()

    yield say
    accepts.cache_clear()


NESTED: dict[str, Callable[[Any], Any]] = {
    "jit": lambda run: jax.jit(run)(X),
    "jit around what is not traced": lambda run: jax.jit(lambda: run(X))(),
    "vmap": lambda run: jax.vmap(run)(X),
    "jvp": lambda run: jax.jvp(run, (X,), (np.ones_like(X),))[0],
    "grad": lambda run: jax.vjp(run, X)[0],
    "scan": lambda run: jax.lax.scan(lambda none, x: (none, run(x)), None, X)[1],
    "checkpoint": lambda run: jax.checkpoint(run)(X),
    "grad of checkpoint": lambda run: jax.vjp(jax.checkpoint(run), X)[0],
    "shapes": lambda run: np.zeros(jax.eval_shape(run, X).shape, np.float32) + np.sin(X) ** 2,
}


def test_programs_at_the_top_level_are_given_the_options_and_nested_ones_are_not(on_a_gpu: Any) -> None:
    on_a_gpu(UNKNOWN, known=True)  # so that whoever is given the options is refused by the compiler
    for call in (lambda run: run(X), lambda run: run.lower(X).compile(), lambda run: run(jnp.asarray(X), power=3)):
        with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
            call(program())
    for name, call in NESTED.items():
        np.testing.assert_allclose(call(program()), np.sin(X) ** 2, rtol=1e-6, err_msg=name)
    model, ids = tiny_llama(), prompt(5)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        forward(model, ids)


def test_a_function_that_holds_what_an_outer_trace_follows_is_part_of_it(on_a_gpu: Any) -> None:
    """Nothing that is given shows it, and JAX refuses options there."""
    on_a_gpu(dict(GPU_OPTIONS), known=True)

    @compiled("fn")
    def run(x: Any, *, fn: Any) -> Any:
        return jnp.sum(fn(x))

    slope = jax.grad(lambda scale: run(X, fn=lambda x: x * scale))(2.0)
    np.testing.assert_allclose(slope, X.sum(), rtol=1e-6)


def test_the_real_options_are_known_and_nothing_else_is_seen_of_them(on_a_gpu: Any) -> None:
    """The newest JAX may have dropped one: then this fails, and users' programs run without."""
    on_a_gpu(dict(GPU_OPTIONS))
    assert accepts()
    np.testing.assert_allclose(program()(X), np.sin(X) ** 2, rtol=1e-6)


def test_an_option_that_the_compiler_does_not_know_is_asked_for_once(on_a_gpu: Any) -> None:
    on_a_gpu(UNKNOWN)
    run = program()
    np.testing.assert_allclose(run(X), np.sin(X) ** 2, rtol=1e-6)
    assert run.lower(X).compile() is not None and not accepts()
    with compilations() as found:
        np.testing.assert_array_equal(run(X), program()(X))
    assert accepts.cache_info().misses == 1 and len(found) == 1  # that of the fresh program


def test_mapped_products_that_are_summed_are_right() -> None:
    """Of more than 32,768 rows jaxlib 0.10.2 gives another number on a CPU (jax-ml/jax#39103), without an option."""
    rows = np.stack([np.arange(40_000), np.zeros(40_000), np.ones(40_000)], axis=1).astype(np.float32)
    matrix = np.diag(np.float32([1, 2, 3]))

    @compiled(alone=True)
    def run(matrix: Any, rows: Any) -> Any:
        return jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(rows)

    np.testing.assert_allclose(run(matrix, rows), np.arange(40_000.0) ** 2 + 9, rtol=1e-6)
    assert (CPU_OPTIONS == {}) == (jaxlib_version != "0.10.2")


@pytest.mark.real
def test_scores_of_several_pairs_and_steps_are_the_means_of_single_pairs() -> None:
    """Gradients of keys and values of twenty runs of fourteen tokens are such products."""
    model, tokenizer = embedded_model()
    pairs = indirect_object(tokenizer, 4, templates=[TEMPLATE], places=["park"], objects=["key"])

    def scores(some: Any) -> np.ndarray:
        given = dict(clean=some.clean, corrupted=some.corrupted, metric=some.metric, mask=some.mask)
        return np.asarray(edge_attribution(model, **given, steps=5).values)

    each = np.mean([scores(pairs[i : i + 1]) for i in range(4)], axis=0)
    np.testing.assert_allclose(scores(pairs), each, atol=1e-4)


def test_where_a_program_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not module.has_gpu() and platform_of([X, "text", None]) == "cpu"
    assert platform_of([jax.device_put(X, jax.devices()[3])]) == "cpu"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert platform_of([X, jnp.asarray(X)]) == "gpu"  # nothing is committed
    assert platform_of([X, jax.device_put(X, jax.devices()[0])]) == "cpu"
    with jax.default_device(jax.devices()[1]):
        assert platform_of([X]) == "cpu"
    assert jax.jit(lambda x: x if platform_of([x]) == "gpu" else -x)(X)[2] == 2  # a tracer lies nowhere
