"""K9: programs of functions that are gone are let go, and those of functions that are used stay."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import Edit, HeadAblation, forward, sweep
from oculi_jax.backends.jax.compiled import KEPT, compiled
from oculi_jax.causal import attribution_patching

from ..compilations import compilations
from ..tiny import prompt, tiny_llama

MODEL = tiny_llama()
IDS = prompt(6)


@compiled()
def small(x: Any, metric: Any) -> Any:
    return metric.func(x)


def use(count: int) -> None:
    """Programs of as many other functions."""
    for number in range(count):
        small(jnp.float32(1), jax.tree_util.Partial(lambda x, number=number: x + number))


def sweeping(function: Any) -> Any:
    return sweep(MODEL, IDS, HeadAblation.grid(MODEL.config), function)


def attributing(function: Any) -> Any:
    return attribution_patching(MODEL, IDS, prompt(6, 1), function).values["z"]


def alive(name: str) -> int:
    """How many compiled programs of this name there are."""
    gc.collect()
    programs = jax.devices()[0].client.live_executables()
    return sum(program.hlo_modules()[0].name == f"jit_{name}" for program in programs)


@pytest.mark.parametrize(("call", "name"), [(sweeping, "run_variants"), (attributing, "attribute")])
def test_a_metrics_programs_go(call: Any, name: str) -> None:
    jax.clear_caches()  # what a test before this one compiled
    first = np.asarray(call(lambda out: out.logits[-1, 3] * 2))
    assert alive(name) == 1

    def metric(out: Any) -> Any:
        return out.logits[-1, 3] * 2

    assert (np.asarray(call(metric)) == first).all() and alive(name) == 2
    with compilations() as again:
        call(metric)
    assert not again  # as long as it is used, it stays
    use(KEPT - 1)
    assert alive(name) == 1
    with compilations() as again:
        call(metric)
    assert not again
    use(KEPT)
    assert alive(name) == 0


def test_what_an_edit_applies_goes_too() -> None:
    jax.clear_caches()
    first = forward(MODEL, IDS, Edit("mlp_out", "apply", 1, fn=lambda x, value: x / 2)).logits
    want = forward(MODEL, IDS, Edit("mlp_out", "scale", 1, value=0.5)).logits
    np.testing.assert_allclose(first, want, atol=1e-5)
    assert alive("run") == 2
    use(KEPT)
    assert alive("run") == 1  # that of the edit without a function


def test_clearing_jaxs_caches_frees_what_a_metric_holds() -> None:
    class Held:
        pass

    held = Held()
    seen = weakref.ref(held)

    def metric(out: Any, held: Any = held) -> Any:
        return out.logits[-1, 3]

    sweeping(metric)
    del held, metric
    jax.clear_caches()
    gc.collect()
    assert seen() is None


def test_a_method_is_one_function() -> None:
    class Reader:
        def last(self, out: Any) -> Any:
            return out.logits[-1, 3]

    reader = Reader()
    first = np.asarray(sweeping(reader.last))
    with compilations() as again:
        assert (np.asarray(sweeping(reader.last)) == first).all()
    assert not again


def test_what_cannot_be_hashed_is_refused_in_a_sentence() -> None:
    class Scaling:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, x: Any, value: Any) -> Any:
            return x * 2

    with pytest.raises(TypeError, match="fn of an Edit is a Scaling that cannot be hashed"):
        forward(MODEL, IDS, Edit("mlp_out", "apply", 1, fn=Scaling()))
