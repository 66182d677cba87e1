"""`fit`: beside NumPy's gradient descent and optax by hand; many fits beside single ones; stopping, resuming, mistakes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oculi_jax import forward
from oculi_jax.data import order
from oculi_jax.intervention import Steer, Subspace
from oculi_jax.training import Now, fit
from oculi_jax.utils.files import read_tensors

from . import slow_fit
from .compilations import compilations
from .tiny import prompt, tiny_llama

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X, TRUE = RNG.normal(size=(12, 3)).astype(np.float32), np.array([1.0, -2.0, 0.5], np.float32)
DATA = (X, X @ TRUE)


def squares(w: Any, example: Any) -> Any:
    x, y = example
    return (x @ w - y) ** 2


def number_of(key: Any) -> int:
    return int.from_bytes(np.asarray(jax.random.key_data(key)).tobytes(), "little")


def test_plain_descent_is_numpys_on_the_order_of_data() -> None:
    found = fit(squares, np.zeros(3), DATA, steps=50, batch_size=5, optimiser=optax.sgd(0.05), key=KEY)
    w, losses, rows = np.zeros(3), [], order(12, 5, key=number_of(KEY))
    for _ in range(50):
        x, y = (part[next_rows] for next_rows in [next(rows)] for part in DATA)
        left = x.astype(np.float64) @ w - y
        losses.append((left**2).mean())
        w -= 0.05 * 2 * (left[:, None] * x).mean(axis=0)
    np.testing.assert_allclose(found.parameters, w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-3, atol=1e-5)
    assert found.held_out is None and found.measured is None


def test_the_held_out_loss_is_measured_at_each_twentieth() -> None:
    found = fit(squares, np.zeros(3), DATA, steps=600, batch_size=4, optimiser=optax.adam(0.05), key=KEY, held_out=DATA)
    np.testing.assert_allclose(found.parameters, TRUE, atol=1e-2)
    assert found.measured is not None and found.held_out is not None
    assert found.measured.tolist() == [*range(0, 601, 30)] and found.held_out[0] == pytest.approx(
        (DATA[1] ** 2).mean(), rel=1e-5
    )
    assert fit(squares, np.zeros(3), DATA, steps=2, batch_size=4, key=KEY).parameters.dtype == jnp.float32
    odd = fit(squares, np.zeros(3), DATA, steps=39, batch_size=4, key=KEY, held_out=DATA).measured
    assert odd is not None and odd.tolist() == [*range(0, 39, 2), 39]  # no more often, of whatever number of steps


def test_the_order_is_a_function_of_key_and_step() -> None:
    """Whatever the length of a fit: its first steps are those of a longer one; another key has another order."""
    runs = [fit(squares, np.zeros(3), DATA, steps=n, batch_size=4, optimiser=optax.sgd(0.1), key=KEY) for n in (5, 40)]
    np.testing.assert_array_equal(runs[0].losses, runs[1].losses[:5])
    other = fit(squares, np.zeros(3), DATA, steps=5, batch_size=4, optimiser=optax.sgd(0.1), key=jax.random.key(1))
    assert not np.array_equal(other.losses, runs[0].losses)


def test_leaves_that_are_no_floats_are_carried_and_a_fit_has_its_own() -> None:
    """Two fits × three, each told by an integer which coordinate is wrong; and dtypes are those of the contract."""
    signs = np.array([[1, -1, 1], [-1, 1, -1]])
    start = {"w": np.zeros((2, 3, 3), np.float16), "sign": signs, "on": np.ones((2, 3), bool)}

    def loss(parameters: Any, example: Any) -> Any:
        assert parameters["w"].shape == (3,) and parameters["w"].dtype == jnp.float32
        assert parameters["sign"].shape == () and parameters["on"].dtype == bool
        return squares(parameters["w"], (example[0], example[1] * parameters["sign"].astype(jnp.float32)))

    found = fit(loss, start, DATA, steps=400, batch_size=6, optimiser=optax.adam(0.05), key=KEY, many=2)
    np.testing.assert_allclose(found.parameters["w"], signs[..., None] * TRUE, atol=2e-2)
    np.testing.assert_array_equal(found.parameters["sign"], signs)
    assert found.losses.shape == (400, 2, 3) and found.parameters["on"].shape == (2, 3)


MODEL = tiny_llama()
TOKENS = np.stack([prompt(6, seed) for seed in range(8)])


def steered(parameters: Any, example: Any) -> Any:
    out = forward(MODEL, example, Steer(parameters["layer"], parameters["vector"]), logits="last")
    return -jax.nn.log_softmax(out.logits)[7]


def test_many_fits_are_the_single_ones_and_one_program() -> None:
    """Three layers × two seeds of a direction; the optimiser clips each fit by itself."""
    optimiser = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.05))
    start = {"layer": np.arange(3)[:, None].repeat(2, 1), "vector": RNG.normal(size=(3, 2, 24)).astype(np.float32)}
    settings: dict[str, Any] = dict(
        steps=30, batch_size=4, optimiser=optimiser, key=KEY, held_out=TOKENS, progress=False
    )
    with compilations() as heard:
        fit(steered, jax.tree.map(lambda x: x[:1], start), TOKENS, many=2, **settings)
        few = len(heard)
        many = fit(steered, start, TOKENS, many=2, **settings)
    assert len(heard) <= 2 * few
    for place in np.ndindex(3, 2):
        one = fit(steered, jax.tree.map(lambda x: x[place], start), TOKENS, **settings)  # noqa: B023
        np.testing.assert_allclose(many.parameters["vector"][place], one.parameters["vector"], atol=1e-4)
        np.testing.assert_allclose(many.losses[:, *place], one.losses, atol=1e-4)
        np.testing.assert_allclose(many.held_out[:, *place], one.held_out, atol=1e-4)  # type: ignore[index]
    assert (many.losses[-1] < many.losses[0]).all()


def test_a_model_that_was_put_on_a_device_has_one_program_of_steps() -> None:
    """As loaded ones are: what a program makes of such arrays is tied to their device, as the first state must be."""
    settings: dict[str, Any] = dict(batch_size=4, key=KEY, progress=False)

    def compiled(x: Any) -> int:
        with compilations() as heard:
            fit(lambda w, example: squares(w, example) + (x * w).sum(), np.zeros(3), DATA, steps=3, **settings)
        return len(heard)

    arrays = jnp.zeros(3), jax.device_put(jnp.zeros(3), jax.devices()[0])
    for x in arrays:  # what all fits share
        compiled(x)
    assert compiled(arrays[1]) == compiled(arrays[0])


def test_it_is_optax_by_hand() -> None:
    """Weight decay, which reads the parameters, and a model, which the loss closes over."""
    optimiser, vector = optax.adamw(0.05, weight_decay=0.1), jnp.ones(24)
    start = {"layer": np.int32(1), "vector": vector}
    found = fit(steered, start, TOKENS, steps=12, batch_size=4, optimiser=optimiser, key=KEY)
    state, rows = optimiser.init(vector), order(8, 4, key=number_of(KEY))

    def mean(vector: Any, tokens: Any) -> Any:
        return jnp.mean(jnp.stack([steered({"layer": 1, "vector": vector}, row) for row in tokens]))

    step = jax.jit(jax.value_and_grad(mean))
    for number in range(12):
        loss, slope = step(vector, TOKENS[next(rows)])
        np.testing.assert_allclose(found.losses[number], loss, atol=2e-4)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(slope, state, vector)
        vector = vector + updates
    np.testing.assert_allclose(found.parameters["vector"], vector, atol=1e-4)


def test_a_model_is_no_constant_of_the_program() -> None:
    """What a loss closes over is handed to the program, which would hold a copy of it otherwise."""
    from oculi_jax.training.fitting import check_examples, check_parameters
    from oculi_jax.training.steps import Loss

    start, _ = check_parameters({"layer": 1, "vector": np.zeros(24)}, 0)
    tokens, _ = check_examples(TOKENS, "data")
    now = Now(jnp.int32(0), KEY, None)
    traced = Loss.of(steered, start, jax.ShapeDtypeStruct(tokens.shape[1:], tokens.dtype), now)
    held = sum(x.size for x in jax.tree.leaves(MODEL))
    assert sum(np.size(x) for x in traced.consts) >= held


def test_chance_is_of_the_step_the_fit_and_the_example() -> None:
    def loss(w: Any, example: Any, now: Now) -> Any:
        return w * 0 + jax.random.uniform(now.key, dtype=jnp.float32) + now.schedule[1] * 0

    rows = np.zeros((6, 2), np.float32)
    runs = [
        fit(loss, np.zeros(2), np.arange(8), steps=6, batch_size=b, key=KEY, many=1, schedules=rows) for b in (1, 1, 8)
    ]
    np.testing.assert_array_equal(runs[0].losses, runs[1].losses)
    assert len(np.unique(runs[0].losses)) == 12
    assert np.abs(runs[2].losses - 0.5).max() < 0.4 and runs[2].losses.std() > 0.02  # means of eight draws


def test_schedules_are_read_by_step() -> None:
    rates = np.linspace(1, 0, 70).astype(np.float32)

    def loss(w: Any, example: Any, now: Now) -> Any:
        return w * 0 + now.schedule["rate"] + now.step.astype(jnp.float32)

    found = fit(loss, 0.0, np.arange(3), steps=70, batch_size=2, key=KEY, schedules={"rate": rates})
    np.testing.assert_allclose(found.losses, rates + np.arange(70), rtol=1e-6)


def test_patience_keeps_the_lowest_and_ends_each_fit_by_itself() -> None:
    """The held-out examples disagree with the data, so that the loss falls and rises again; of two fits one starts beyond."""
    start, held = np.array([0.0, 0.9], np.float32), np.full(4, 0.5, np.float32)
    settings: dict[str, Any] = dict(steps=200, batch_size=4, optimiser=optax.sgd(0.01), key=KEY, held_out=held, stop=3)
    both = fit(lambda w, x: (w - x) ** 2, start, np.ones(8, np.float32), many=1, **settings)
    for number in range(2):
        one = fit(lambda w, x: (w - x) ** 2, start[number], np.ones(8, np.float32), **settings)
        assert one.held_out is not None and one.measured is not None and both.held_out is not None
        n = len(one.losses)
        lowest = int(one.held_out.argmin())
        assert len(one.held_out) == lowest + 4 and n == one.measured[-1] < 200
        want = 1 - (1 - start[number]) * 0.98 ** one.measured[lowest]  # gradient descent on (w − 1)²
        np.testing.assert_allclose([one.parameters, both.parameters[number]], want, rtol=1e-5)
        np.testing.assert_allclose(both.losses[:n, number], one.losses, rtol=1e-5)
        assert np.isnan(both.losses[n:, number]).all()
        np.testing.assert_allclose(both.held_out[: len(one.held_out), number], one.held_out, rtol=1e-5)
    assert len(both.losses) == max(np.isfinite(both.losses).sum(axis=0))


def test_a_loss_that_is_not_finite_is_told() -> None:
    with pytest.warns(UserWarning, match="A loss is not finite at step 2"):
        fit(
            lambda w, x, now: w * jnp.where(now.step < 2, 1.0, jnp.nan), 1.0, np.ones(3), steps=4, batch_size=1, key=KEY
        )


def test_a_held_out_loss_that_is_not_a_number_is_told() -> None:
    with pytest.warns(UserWarning, match="The held-out loss is not a number after 0 steps") as told:
        fit(lambda w, x: (w - x) ** 2, 1.0, np.ones(3, np.float32), steps=4, batch_size=1, key=KEY,
            held_out=np.full(2, np.nan, np.float32))  # fmt: skip
    assert len(told) == 1


def test_a_fit_that_is_killed_goes_on_to_the_same_parameters(tmp_path: Path) -> None:
    whole = slow_fit.run()
    file = tmp_path / "a fit.safetensors"
    command = [sys.executable, "-m", "tests.slow_fit", str(file)]
    reached = []
    for least in (20, 120):
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1], env=os.environ
        ) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if int(line) >= least and file.exists():
                    reached.append(int(line))
                    child.send_signal(signal.SIGKILL)
                    break
    assert reached[0] < reached[1] < slow_fit.STEPS
    told: list[int] = []
    again = slow_fit.run(file, lambda done, total: told.append(done))
    assert 0 < told[0] <= reached[1]  # it went on from the file
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    told.clear()
    done = slow_fit.run(file, lambda done, total: told.append(done))
    assert told == [slow_fit.STEPS]
    np.testing.assert_array_equal(done.parameters, whole.parameters)
    refused(file)


def refused(file: Path) -> None:
    """Another fit's file, with what differs."""
    before = file.read_bytes()
    for changes, said in (
        ({"batch_size": 5}, "batch_size is 4 there, and 5 here"),
        ({"optimiser": optax.adam(0.02)}, "not the same optimiser"),
        ({"key": jax.random.key(4)}, r"key is \[0, 3\] there, and \[0, 4\] here"),
        ({"stop": 2}, "stop is None there, and 2 here"),
        ({"schedules": np.zeros(slow_fit.STEPS, np.float32)}, "not the same schedules"),
        ({"held_out": None}, "not the same held_out"),
    ):
        with pytest.raises(ValueError, match=f"is of another fit: {said}.$"):
            slow_fit.run(file, **changes)
    with pytest.raises(ValueError, match="is of another fit: .*not the same loss"):
        fit(squares, np.zeros(3), DATA, steps=3, batch_size=2, key=KEY, file=file)
    assert file.read_bytes() == before
    file.write_bytes(before[:99])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        slow_fit.run(file)
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        fit(squares, np.zeros(3), DATA, steps=3, batch_size=2, key=KEY, file=file.parent / "none" / "x")


def test_two_losses_that_differ_by_a_number_are_two_fits(tmp_path: Path) -> None:
    """Also where the number, or the array, is closed over."""

    def of(much: float, many: Any) -> Any:
        return lambda w, x: (w - much * x) ** 2 + jnp.sum(many) * w

    settings: dict[str, Any] = dict(steps=2, batch_size=1, key=KEY, file=tmp_path / "x.safetensors")
    fit(of(1.0, jnp.ones(3)), 0.0, np.ones(3, np.float32), **settings)
    for loss in (of(2.0, jnp.ones(3)), of(1.0, jnp.zeros(3))):
        with pytest.raises(ValueError, match="not the same loss"):
            fit(loss, 0.0, np.ones(3, np.float32), **settings)


def test_what_cannot_be_is_told() -> None:
    good: dict[str, Any] = dict(steps=2, batch_size=2, key=KEY)
    for given, options, error, message in (
        ((squares, np.zeros(3), DATA), {"batch_size": 13}, ValueError, "batch_size is 13, and data holds 12 examples"),
        ((squares, np.zeros(3), DATA), {"steps": 0}, ValueError, "steps is 0"),
        ((squares, np.zeros(3), DATA), {"key": 0}, TypeError, "key is 0, and a JAX random key is needed"),
        ((squares, np.zeros(3), DATA), {"stop": 2}, ValueError, "there are no held_out examples"),
        ((squares, np.zeros(3), DATA), {"optimiser": 0.1}, TypeError, "optimiser is 0.1, and one of optax is needed"),
        ((squares, np.zeros(3), DATA), {"progress": 3}, TypeError, "progress is 3"),
        ((squares, np.zeros(3), DATA), {"many": 2}, ValueError, r"start has shape \[3\], and many=2 says"),
        ((squares, {"a": np.zeros((2, 3)), "b": np.zeros(3)}, DATA), {"many": 1}, ValueError, r"start\['b'\] has shape \[3\], .* \[2\]"),
        ((squares, np.zeros(3, int), DATA), {}, ValueError, "no floating-point leaf"),
        ((squares, "none", DATA), {}, ValueError, "no floating-point leaf"),
        ((squares, np.zeros(3), (X, X[:4])), {}, ValueError, r"data\[1\] has shape \[4, 3\], .*, 12 of them"),
        ((squares, np.zeros(3), ()), {}, ValueError, "there is no array in it"),
        ((squares, np.zeros(3), DATA), {"held_out": X}, ValueError, "held_out holds examples of another kind"),
        ((squares, np.zeros(3), DATA), {"schedules": np.ones(3)}, ValueError, r"schedules has shape \[3\], and must lead with the steps, 2"),
        ((0.5, np.zeros(3), DATA), {}, TypeError, "loss is a float"),
        ((max, np.zeros(3), DATA), {}, TypeError, "loss is <built-in function max>, whose arguments cannot be read"),
        ((lambda w, x: "low", np.zeros(3), DATA), {}, ValueError, "The loss returns a str of one example"),
        ((squares, np.zeros(3), np.array(["a", "b"])), {}, TypeError, "data is an array of <U1, and numbers are needed"),
        ((squares, np.zeros(3), (X, np.full(12, 2**40))), {}, ValueError, r"data\[1\] holds 1099511627776 to .* a int32 holds"),
        ((squares, np.zeros(3), DATA), {"schedules": "linear"}, TypeError, "schedules is an array of <U6"),
        ((squares, np.zeros(3), DATA), {"file": 3}, TypeError, "file is 3, and a path is needed"),
        ((lambda w: w, np.zeros(3), DATA), {}, TypeError, "loss takes 1 arguments, and is called as"),
        ((lambda w, x: w, np.zeros(3), DATA), {}, ValueError, r"The loss returns \[3\] of float32 of one example"),
        ((lambda w, x: (w, w), np.zeros(3), DATA), {}, ValueError, "The loss returns a tuple"),
        ((lambda w, x: jnp.int32(1), np.zeros(3), DATA), {}, ValueError, r"returns \[\] of int32"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            fit(*given, **{**good, **options})


def test_inside_a_trace_it_says_so() -> None:
    settings: dict[str, Any] = dict(steps=2, batch_size=2, key=KEY)
    for mapped in (jax.jit, jax.vmap, jax.grad):
        with pytest.raises(TypeError, match="A fit runs on the host and was called inside a trace"):
            mapped(lambda w: fit(squares, w, DATA, **settings).parameters)(np.zeros((2, 3), np.float32))


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    """What a file of a fit lacks, or has in another shape, is said; it is neither read in part nor written over."""
    from safetensors.numpy import save_file

    file = tmp_path / "fit.safetensors"
    settings: dict[str, Any] = dict(steps=2, batch_size=2, key=KEY, file=file)
    fit(squares, np.zeros(3), DATA, **settings)
    arrays, header = read_tensors(file)
    less = {name: x for name, x in arrays.items() if name != "losses"}
    for held, metadata, said in (
        (less, header, "losses is not there"),
        ({**arrays, "losses": np.zeros((5, 1), np.float32)}, header, "is damaged"),
        ({**arrays, "state.0": np.zeros((7, 3), np.float32)}, header, "state.0 is not there, or not what a fit writes"),
        (arrays, {"format": header["format"]}, "does not say which fit it is of"),
        (arrays, {**header, "job": "[1]"}, "does not say which fit it is of"),
        (arrays, {**header, "job": "{"}, "does not say which fit it is of"),
    ):
        save_file(held, file, metadata=metadata)
        before = file.read_bytes()
        with pytest.raises(ValueError, match=said):
            fit(squares, np.zeros(3), DATA, **settings)
        assert file.read_bytes() == before


def test_parameters_are_float32_over_a_model_of_half_precision() -> None:
    import ml_dtypes

    model, source = tiny_llama(dtype=ml_dtypes.bfloat16), np.ones((1, 24), np.float32)
    assert model.dtype == ml_dtypes.bfloat16

    def loss(basis: Any, example: Any) -> Any:
        out = forward(model, example, Subspace("resid_pre", 1, basis, source, -1), logits="last")
        return -jax.nn.log_softmax(out.logits)[7]

    basis = RNG.normal(size=(24, 2)).astype(ml_dtypes.bfloat16)
    found = fit(loss, basis, TOKENS, steps=40, batch_size=8, optimiser=optax.adam(0.05), key=KEY)
    assert found.parameters.dtype == jnp.float32 and found.losses[-1] < found.losses[0] - 0.1
