"""Interventions in files: every kind comes back to the bit, nothing in a file is run, and what is none says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from oculi_jax import forward, generate, load, save, sweep
from oculi_jax.intervention import (
    Ablation,
    ActivationPatch,
    AttentionKnockout,
    Blend,
    DirectionAblation,
    Edit,
    Freeze,
    HeadAblation,
    KScaler,
    Layer,
    PerLayer,
    PerPrompt,
    QScaler,
    RankOne,
    SpectraScaler,
    Steer,
    Subspace,
    field,
    pytree,
)
from oculi_jax.intervention.stored import CLASSES
from oculi_jax.metrics import logit_difference

from .tiny import prompt, tiny_llama

MODEL, IDS, T, E = tiny_llama(), prompt(), 11, 24
RNG = np.random.default_rng(0)
V = RNG.normal(size=E).astype(np.float32)
ITEMS: list[Any] = [
    HeadAblation(1, [0, 2], V[:6]), Blend("z", RNG.random((3, 4))), QScaler(0, 1, np.float32(0.1)), KScaler(0, 1, 0.1),
    SpectraScaler(range(1, 3), 0, 2.0), ActivationPatch("resid_pre", 2, jnp.asarray(V)[None], positions=[4, -1], index=(3, 5)),
    Steer(1, V, 0.1 + 0.2, "resid_mid", positions=-1), DirectionAblation("resid_post", 0, PerLayer(np.stack([V, 2 * V, 3 * V]))),
    RankOne("resid_pre", np.int64(1), V, jnp.asarray(V), 1e-30), AttentionKnockout(0, 1, -1, [0, 1]), Ablation("act", 1, 7),
    Subspace("resid_pre", 1, RNG.normal(size=(E, 2)), 0.0), Edit("final_norm", "scale", None, value=V[None]),
    Edit("z", "set", [0, 1], np.arange(4)[:, None, None] == 1, 0.0),
]  # fmt: skip


def leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]


def assert_same(found: Any, want: Any) -> None:
    """Structure, static fields and every value, its type and its bits."""
    assert jax.tree.structure(found) == jax.tree.structure(want)
    for (name, x), (other, y) in zip(leaves(found), leaves(want), strict=True):
        assert name == other and isinstance(x, np.ndarray) == hasattr(y, "dtype"), name
        if hasattr(y, "dtype"):
            assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == np.asarray(y).tobytes(), name
        else:
            assert type(x) is type(y) and x == y, name


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: type(item).__name__)
def test_every_kind_comes_back_to_the_bit(item: Any, tmp_path: Path) -> None:
    save(item, tmp_path / "x", metadata={"model": "tiny"})
    assert_same(load(tmp_path / "x"), item)
    with safe_open(tmp_path / "x", "numpy") as file:
        assert file.metadata()["model"] == "tiny"


def test_all_kinds_are_here_and_go_together(tmp_path: Path) -> None:
    run = forward(MODEL, IDS, capture=("pattern", "resid_pre"))
    every = [*ITEMS, Freeze(run, "pattern", layers=1), Freeze(run.activations, ("pattern", "resid_pre"))]
    assert {type(item) for item in every} == set(CLASSES.values())
    save(every, tmp_path / "x")
    found = load(tmp_path / "x")
    assert isinstance(found, list) and len(found) == len(every)
    assert_same(found[: len(ITEMS)], ITEMS)
    held = found[len(ITEMS)]
    assert set(held.run) == {"pattern"} and held.sites == ("pattern",)  # of a whole run, what is held
    np.testing.assert_array_equal(held.run["pattern"], run["pattern"])
    some = [0, 6, len(ITEMS)]
    want = forward(MODEL, IDS, [every[n] for n in some]).logits
    np.testing.assert_array_equal(forward(MODEL, IDS, [found[n] for n in some]).logits, want)


def test_what_is_saved_is_swept_and_generated_with(tmp_path: Path) -> None:
    family = Steer(np.arange(3), RNG.normal(size=(3, E)), PerPrompt([1.0, 2.0]))
    save(family, tmp_path / "x")
    tokens = np.stack([IDS, prompt(seed=1)])
    metric = logit_difference(3, 7)
    np.testing.assert_array_equal(
        sweep(MODEL, tokens, load(tmp_path / "x"), metric), sweep(MODEL, tokens, family, metric)
    )
    save([ITEMS[8]], tmp_path / "y")
    np.testing.assert_array_equal(generate(MODEL, IDS, 3, load(tmp_path / "y")), generate(MODEL, IDS, 3, [ITEMS[8]]))


@pytree
class Silence:
    layer: Any = field(Layer())

    def edits(self, sizes: Any) -> tuple[Edit, ...]:
        return (Edit("mlp_out", "set", self.layer, value=0.0),)


def test_code_is_not_saved(tmp_path: Path) -> None:
    for item, message in (
        (Silence(0), "A Silence cannot be saved: a file holds data, and names of classes that are known"),
        (
            [ITEMS[0], Edit("z", "apply", 0, fn=lambda x, _: x)],
            "An Edit with a function of one's own, fn, cannot be saved",
        ),
        (Steer(0, object()), "vector is <object .*>, and what a file holds are arrays"),
    ):
        with pytest.raises(TypeError, match=message):
            save(item, tmp_path / "x")
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match="what a file holds are arrays"):
        jax.jit(lambda v: save(Steer(0, v), tmp_path / "x"))(V)


def changed(path: Path, node: Any, **arrays: np.ndarray) -> Path:
    """A file that describes something else."""
    save_file(
        arrays or {"vector": V}, path, metadata={"format": "oculi_jax interventions 1", "static": json.dumps(node)}
    )
    return path


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"Stear": {}}, "it holds a 'Stear', which is no intervention that is known here. Is Steer meant?"),
        (
            {"Steer": {"layer": 1}},
            "it holds a Steer of layer, and its fields are layer, positions, scale, site, vector",
        ),
        (
            {"Ablation": {"site": {"list": []}, "layer": 1, "index": None}},
            r"Ablation.site is \[\], and a name is needed",
        ),
        ({"array": "other"}, "it lacks the array 'other'"),
        ({"array": "vector"}, "it holds array"),
        ({"eval": "1"}, "it holds a 'eval'"),
        ({"list": [1, {"range": [0, 3, 0]}]}, "it holds a 'range'"),
        ([1], r"it describes '\[1\]'"),
        ({"list": []}, r"it holds \[\]"),
        (3, "it holds 3"),
    ],
)
def test_a_file_that_describes_something_else_says_so(node: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"does not describe interventions that this version knows: {message}"):
        load(changed(tmp_path / "x", node))


def test_a_file_that_was_changed_says_so(tmp_path: Path) -> None:
    save(ITEMS[6], tmp_path / "x")
    whole = bytearray((tmp_path / "x").read_bytes())
    whole[-1] ^= 1
    (tmp_path / "x").write_bytes(whole)
    with pytest.raises(ValueError, match="was changed since it was written: vector is not what was saved"):
        load(tmp_path / "x")
    (tmp_path / "x").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load(tmp_path / "x")
    with pytest.raises(ValueError, match="metadata holds .'format'."):
        save(ITEMS[6], tmp_path / "y", metadata={"format": "mine"})
