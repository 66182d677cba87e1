"""The Jacobian lens: torch's autograd finds the same matrices, and a published file is parsed and never run."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import LogitConfig, forward, lens, load, save
from oculi_jax.analysis.logit_lens import LogitLensAnalysis
from oculi_jax.models.llama import LlamaAttentionAdapter
from oculi_jax.training import FittedLens, JacobianLens, fit_jacobian_lens
from oculi_jax.training.splitting import apart
from oculi_jax.utils.files import read_tensors, write_tensors

from .test_forward_laws import near
from .test_logit_lens import chances
from .tiny import prompt, tiny_llama
from .tolerances import ROUNDING

L, E, SKIP = 3, 24, 4
MODEL = tiny_llama()
CONFIG = MODEL.config


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def some_lens(seed: int = 0) -> JacobianLens:
    matrix = np.random.default_rng(seed).normal(0, 0.3, (L, E, E)).astype(np.float32) + np.eye(E, dtype=np.float32)
    matrix[-1] = np.eye(E)
    return JacobianLens(jnp.asarray(matrix), np.int32(7))


def jacobians_by_torch(model: Any, ids: np.ndarray) -> np.ndarray:
    """The definition, `[L, E, E]`: one backward pass for each t' and output dimension, in float64."""
    import torch

    from .by_autograd import ByAutograd

    theirs, seen = ByAutograd(model), {}

    def keep(name: str, layer: int | None, x: Any) -> Any:
        if name == "resid_post":
            seen[layer] = x
        return x

    embed = theirs.tensor(model.embed[...])[torch.tensor(ids, dtype=torch.long)].requires_grad_()
    theirs(embed, site=keep)
    positions = range(SKIP, len(ids) - 1)
    found = np.zeros((L, E, E))
    for i in range(E):
        for later in positions:
            slopes = torch.autograd.grad(seen[L - 1][later, i], [seen[n] for n in range(L)], retain_graph=True)
            for layer, slope in enumerate(slopes):
                found[layer, i] += sum(slope[t].numpy() for t in positions if t <= later)
    return found / len(positions)


@pytest.mark.torch
def test_it_is_the_mean_of_what_autograd_finds(x64: None) -> None:
    model = tiny_llama(dtype=np.float64)
    lengths, total = (9, 8, 9, SKIP + 1), 10
    tokens, mask = np.zeros((4, total), np.int32), np.zeros((4, total), bool)
    for row, n in enumerate(lengths):  # on the right, and on the left
        mask[row, :n] = True
        mask[row] = mask[row, :: 1 - 2 * (row % 2)]
        tokens[row, mask[row]] = prompt(n, row)
    keys = map(jax.random.key, range(99))
    key = next(
        key for key in keys if apart(jax.random.permutation(jax.random.split(key)[0], 4), 0.25)[0][0] == 0
    )  # the first is kept back
    with pytest.warns(UserWarning, match="1 of 3 prompts to fit on have fewer than 6 tokens"):
        found = fit_jacobian_lens(model, tokens, mask=mask, skip=SKIP, key=key, controls=False, progress=False)
    want = np.mean([jacobians_by_torch(model, prompt(lengths[row], row)) for row in (1, 2)], axis=0)
    got = np.asarray(found.lens.matrix)
    assert got.dtype == np.float64 and found.lens.n_prompts == 2
    np.testing.assert_allclose(got, want, atol=1e-10)
    assert np.abs(want[0] - np.eye(E)).max() > 0.1  # it is no identity
    np.testing.assert_array_equal(got[-1], np.eye(E))


def test_sums_over_positions_are_float32s_in_a_model_of_half_precision(tmp_path: Path) -> None:
    """Of more positions than bfloat16 counts: the last layer's matrix, a sum of ones over their number, is the identity still."""
    tokens = np.stack([prompt(261, seed) for seed in range(2)])
    model = tiny_llama(dtype=jnp.bfloat16)
    found = fit_jacobian_lens(model, tokens, skip=1, key=jax.random.key(0), controls=False, progress=False).lens
    np.testing.assert_array_equal(found.matrix[-1], np.eye(E))
    found.save(tmp_path / "lens.pt")


def test_a_fit_stands_beside_its_controls() -> None:
    tokens = np.stack([prompt(9, seed) for seed in range(4)])
    found = fit_jacobian_lens(MODEL, tokens, skip=SKIP, key=jax.random.key(0), progress=False)
    assert isinstance(found, FittedLens) and found.losses is None
    resid = forward(MODEL, tokens[found.held_out[0]], capture="resid_post")
    p = np.asarray(jax.nn.softmax(resid.logits), np.float64)
    for name, matrix in (("", found.lens.matrix), ("logit lens", np.stack([np.eye(E)] * L))):
        kl = found.kl if not name else found.controls[name]
        moved = np.einsum("lij,ltj->lti", matrix, np.asarray(resid["resid_post"], np.float64))
        q = chances(moved, MODEL.norm.weight[...], MODEL.lm_head.weight)
        near(kl[0], (p * np.log(p / q)).sum(-1).mean(-1))
    assert (
        found.controls["untrained weights"].shape == (1, L)
        and abs(found.controls["untrained weights"][0, -1]) < ROUNDING
    )
    assert not np.array_equal(found.controls["untrained weights"], found.kl)
    said = repr(found)
    assert said.startswith("JacobianLens(matrix [3, 24, 24], 3 prompts), nats from the model: ")
    assert (
        f"{found.kl[0, :-1].mean():.2f} of 1 held-out prompts; logit lens " in said and "; untrained weights " in said
    )


def test_a_fit_that_is_ended_goes_on_to_the_same_matrices(tmp_path: Path) -> None:
    tokens, file = np.stack([prompt(9, seed) for seed in range(5)]), tmp_path / "lens.safetensors"
    settings: Any = dict(skip=SKIP, key=jax.random.key(1))
    whole = fit_jacobian_lens(MODEL, tokens, progress=False, **settings)
    for last in (2, 6):  # of eight: in the middle of the lens, and of the untrained model's
        seen: list[int] = []

        def stop(done: int, total: int, last: int = last, seen: list[int] = seen) -> None:
            assert total == 8
            seen.append(done)
            if done >= last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit_jacobian_lens(MODEL, tokens, file=file, progress=stop, **settings)
    assert seen[0] >= 1  # it went on
    again: list[int] = []
    found = fit_jacobian_lens(MODEL, tokens, file=file, progress=lambda done, _: again.append(done), **settings)
    assert again[0] == 4  # the lens had ended
    np.testing.assert_array_equal(found.lens.matrix, whole.lens.matrix)
    np.testing.assert_array_equal(found.controls["untrained weights"], whole.controls["untrained weights"])
    with pytest.raises(ValueError, match="is of another fit: skip is 4 there, and 3 here"):
        fit_jacobian_lens(MODEL, tokens, file=file, progress=False, skip=3, key=jax.random.key(1))
    with pytest.raises(ValueError, match="is of another fit: not the same prompts"):
        fit_jacobian_lens(MODEL, tokens[:, ::-1], file=file, progress=False, **settings)
    arrays, header = read_tensors(file)
    write_tensors(file, {**arrays, "lens done": np.array(9)}, header, name=file)
    with pytest.raises(ValueError, match="is damaged: lens done is not there, or not what a fit writes"):
        fit_jacobian_lens(MODEL, tokens, file=file, progress=False, **settings)


def test_the_identity_is_the_logit_lens_exactly() -> None:
    resid = forward(MODEL, prompt(), capture="resid_post")["resid_post"]
    for dtype in (jnp.float32, jnp.bfloat16):
        moved = JacobianLens.identity(CONFIG).translate(resid.astype(dtype), (0, 1, 2))
        assert moved.dtype == dtype
        np.testing.assert_array_equal(moved, resid.astype(dtype))
    np.testing.assert_array_equal(
        lens(MODEL, JacobianLens.identity(CONFIG).translate(resid, (0, 1, 2))), lens(MODEL, resid)
    )


def test_matrices_belong_to_true_layers_and_stand_behind_the_same_calls(tmp_path: Path) -> None:
    resid = np.asarray(forward(MODEL, prompt(), capture="resid_post")["resid_post"])
    own = some_lens()
    want = np.einsum("lij,ltj->lti", np.asarray(own.matrix, np.float64), resid)
    near(own.translate(resid[[2, 0]], (2, 0)), want[[2, 0]], ROUNDING)
    with pytest.raises(ValueError, match=r"layers holds \[3\], and this lens has layers 0 to 2"):
        own.translate(resid, (0, 3, 1))
    adapter = LlamaAttentionAdapter(MODEL)
    capture = adapter.capture_logits(prompt(), LogitConfig(layers=[2, 0], top_k=3, positions=[-1]), lens=own)
    assert capture.lens == "jacobian"
    p = chances(want[[2, 0], -1], MODEL.norm.weight[...], MODEL.lm_head.weight)
    near(LogitLensAnalysis().token_probability_trajectory(capture, 9), p[:, 9])
    save(capture, tmp_path / "capture")
    assert load(tmp_path / "capture").lens == "jacobian"
    with pytest.raises(ValueError, match="made for another model"):
        adapter.capture_logits(prompt(), lens=JacobianLens.identity(tiny_llama(num_hidden_layers=2).config))
    with pytest.raises(TypeError, match="lens is a dict, and a TunedLens or a JacobianLens is needed"):
        adapter.capture_logits(prompt(), lens={})


@pytest.mark.torch
def test_it_reads_and_writes_what_is_published(tmp_path: Path) -> None:
    import torch

    matrix = np.asarray(some_lens().matrix)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        # As TransformerLens 4.3 and anthropics/jacobian-lens write it; a tensor may be a part of a storage, in any order.
        both = torch.tensor(matrix[:-1]).to(dtype)
        rows = {1: both[1].T.contiguous().T, 0: both[0]}
        values = {"J": rows, "n_prompts": 616, "source_layers": [0, 1], "d_model": E}
        torch.save({**values, "metadata": {"corpus": "wikitext", "layers": (0, 1), "x": None}}, tmp_path / "lens.pt")
        found = JacobianLens.load(tmp_path / "lens.pt")
        assert found.n_prompts == 616 and found.matrix.dtype == np.float32
        np.testing.assert_array_equal(found.matrix[:-1], both.float().numpy())
        np.testing.assert_array_equal(found.matrix[-1], np.eye(E))
    some_lens().save(tmp_path / "own.pt")
    theirs = torch.load(tmp_path / "own.pt", weights_only=True)
    assert list(theirs) == ["J", "n_prompts", "source_layers", "d_model"] and list(theirs["J"]) == [0, 1]
    assert (theirs["n_prompts"], theirs["source_layers"], theirs["d_model"]) == (7, [0, 1], E)
    np.testing.assert_array_equal(torch.stack([theirs["J"][n] for n in (0, 1)]).numpy(), matrix[:-1])
    again = JacobianLens.load(tmp_path / "own.pt")
    np.testing.assert_array_equal(again.matrix, matrix)
    assert again.n_prompts == 7


class _Calls:
    def __init__(self, what: Any, *given: Any):
        self.call = what, given

    def __reduce__(self) -> Any:
        return self.call


def packed(path: Path, pickled: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    return path


def test_a_strangers_file_is_parsed_and_nothing_in_it_runs(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for call in (
        _Calls(os.mkdir, str(mark)),
        _Calls(eval, f"__import__('os').mkdir({str(mark)!r})"),
        _Calls(os.system, "true"),
    ):
        path = packed(tmp_path / "bad.pt", pickle.dumps({"J": call}, 2))
        with pytest.raises(
            ValueError, match=r"bad.pt' is no whole file .* it asks for \w+\.\w+, which no plain tensor needs"
        ):
            JacobianLens.load(path)
    assert not mark.exists()
    # A state for what a name stands for, which everybody shares.
    with pytest.raises(ValueError, match="it has BUILD, which no plain tensor needs"):
        JacobianLens.load(packed(tmp_path / "state.pt", b"\x80\x02ctorch\nFloatStorage\n}b."))
    # A tensor that reaches beyond its bytes.
    some_lens().save(tmp_path / "lens.pt")
    whole = (tmp_path / "lens.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "lens.pt") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "short.pt", "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part[:-4] if name == "archive/data/1" else part)
    with pytest.raises(ValueError, match="short.pt' is no whole file"):
        JacobianLens.load(tmp_path / "short.pt")
    for cut in (0, 100, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="cut.pt' is no whole file"):
            JacobianLens.load(tmp_path / "cut.pt")


def test_mistakes_are_told_in_a_sentence(tmp_path: Path) -> None:
    from oculi_jax.utils.torch_files import write_torch

    one = np.eye(E, dtype=np.float32)
    for values, message in (
        ({"jacobian_sum": {0: one}, "n_done": 3}, "holds no Jacobian lens, which has .* but 'jacobian_sum', 'n_done'"),
        ({"J": {0: one, 2: one}, "d_model": E}, r"matrices of the layers \[0, 2\]"),
        ({"J": {0: one[:3]}, "d_model": E}, r"matrices that are not \[E, E\]"),
        ({"J": {0: one * np.nan}, "d_model": E}, "numbers that are not finite"),
    ):
        with (tmp_path / "x.pt").open("wb") as file:
            write_torch(file, values)
        with pytest.raises(ValueError, match=message):
            JacobianLens.load(tmp_path / "x.pt")
    with pytest.raises(IsADirectoryError, match="is a directory, and a file is needed"):
        JacobianLens.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        JacobianLens.load(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="last layer's matrix is not the identity"):
        JacobianLens(some_lens().matrix + 1, np.int32(1)).save(tmp_path / "y.pt")
    with pytest.raises(ValueError, match=r"matrices \[3, 24, 24\], and this model needs \[2, 24, 24\]"):
        some_lens().check(tiny_llama(num_hidden_layers=2).config)
    tokens, key = np.stack([prompt(9, seed) for seed in range(4)]), jax.random.key(0)
    for options, message in (
        ({}, "3 of 3 prompts to fit on have fewer than 18 tokens"),
        ({"skip": -1}, "skip is -1"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"tokens": tokens[:1]}, "There is 1 prompt, and some"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_jacobian_lens(MODEL, **{"tokens": tokens, "key": key, "progress": False, **options})


def test_a_file_of_no_possible_number_of_prompts_is_refused(tmp_path: Path) -> None:
    from oculi_jax.utils.torch_files import write_torch

    file = tmp_path / "lens.pt"
    for n in (2**40, -1, True):
        with file.open("wb") as handle:
            write_torch(
                handle, {"J": {0: np.eye(3, dtype=np.float32)}, "n_prompts": n, "source_layers": [0], "d_model": 3}
            )
        with pytest.raises(ValueError, match=f"is the mean of {n} prompts"):
            JacobianLens.load(file)
