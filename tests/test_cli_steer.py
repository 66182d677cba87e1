"""`oculi steer`, and `oculi generate` with the file that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from oculi_jax import forward, generate, load, padded, save
from oculi_jax.cli.interventions import parse
from oculi_jax.intervention import HeadAblation, Steer
from oculi_jax.models.llama import LlamaAttentionAdapter
from oculi_jax.training import difference_of_means

FRENCH, ITALIAN = (
    [f"{what} of {country}" for what in ("The capital", "The currency", "The language", "The continent", "The flag")]
    for country in ("France", "Italy")
)
ROME = "The capital of Italy is"


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, ...]:
    """The options that name them."""
    (tmp_path / "french.txt").write_text("\n".join(FRENCH) + "\n\n")
    (tmp_path / "italian.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in ITALIAN))
    return "--positive", str(tmp_path / "french.txt"), "--negative", str(tmp_path / "italian.jsonl")


def test_a_direction_is_written_judged_and_generated_with(
    trained: LlamaAttentionAdapter, files: tuple[str, ...], tmp_path: Path, oculi_here
) -> None:
    where = tmp_path / "to_paris.safetensors"
    code, out, err = oculi_here("steer", *files, "--layer", "1", "-o", str(where), "--json")
    assert code == 0, err
    (first, first_mask), (second, second_mask) = (padded(texts, trained.tokenizer) for texts in (FRENCH, ITALIAN))
    want = difference_of_means(trained.model, first, second, layers=1, key=jax.random.key(0),
                               positive_mask=first_mask, negative_mask=second_mask)  # fmt: skip
    found = json.loads(out)
    assert found["auroc"]["mean"] == [float(want.auroc.mean)] and found["held_out"] == len(want.held_out)
    assert set(found["controls"]) == {"random direction", "shuffled labels", "untrained model"}
    assert found["site"] == "resid_pre" and found["layers"] == [1] and found["position"] == -1

    saved = load(where)
    assert isinstance(saved, Steer) and saved.layer == 1 and saved.site == "resid_pre"
    np.testing.assert_array_equal(saved.vector, want.vector)
    line = f"steer:file={where}"
    for written, fields in (
        (line, (1, 1.0, "resid_pre")),
        (f"{line},scale=2.5", (1, 2.5, "resid_pre")),
        (f"{line},layer=2,site=resid_mid", (2, 1.0, "resid_mid")),
    ):
        item = parse(written)
        assert (item.layer, item.scale, item.site) == fields
        np.testing.assert_array_equal(item.vector, want.vector)

    code, out, err = oculi_here("generate", ROME, "-i", line, "-n", "1", "--json")
    assert code == 0, err
    plain, steered = json.loads(out)["runs"]
    ids = trained.tokenizer.encode(ROME)
    new = generate(trained.model, ids, 1, Steer(1, want.vector))
    assert plain["tokens"] == [trained.str_tokens(forward(trained.model, ids).logits[-1].argmax()[None])[0]]
    assert steered["tokens"] == trained.str_tokens(new)


def test_without_a_layer_the_one_in_the_middle_is_written(
    trained: LlamaAttentionAdapter, files: tuple[str, ...], tmp_path: Path, oculi_here
) -> None:
    code, out, err = oculi_here("steer", *files, "-o", str(tmp_path / "x.safetensors"))
    assert code == 0, err
    assert "x.safetensors: layer 2, the one in the middle; --layer says another." in "".join(out.split("\n"))
    (first, first_mask), (second, second_mask) = (padded(texts, trained.tokenizer) for texts in (FRENCH, ITALIAN))
    want = difference_of_means(trained.model, first, second, key=jax.random.key(0), controls=False,
                               positive_mask=first_mask, negative_mask=second_mask)  # fmt: skip
    saved = load(tmp_path / "x.safetensors")
    assert isinstance(saved, Steer) and saved.layer == 2
    np.testing.assert_array_equal(saved.vector, want.vector[2])


def test_all_layers_are_shown_beside_their_controls(files: tuple[str, ...], tmp_path: Path, oculi_here) -> None:
    code, out, err = oculi_here("steer", *files, "--position", "mean", "--site", "mlp_out")
    assert code == 0, err
    header, *rows, where = out.strip().splitlines()
    assert header.split("  ")[0] == "layer" and all(
        name in header for name in ("AUROC", "random direction", "shuffled labels", "untrained model", "length")
    )
    assert [row.split()[0] for row in rows] == list("0123") and "mlp_out, mean over tokens; 4 held-out prompts" in where
    assert list(tmp_path.glob("*.safetensors")) == []


def test_mistakes_are_told(files: tuple[str, ...], tmp_path: Path, oculi_here) -> None:
    (tmp_path / "few.txt").write_text("a\nb\nc")
    target = str(tmp_path / "x.safetensors")
    for arguments, message in (
        (("steer", *files[:3], str(tmp_path / "few.txt")), "holds 3 prompts, and --negative needs 4 at least"),
        (("steer", *files, "--site", "resid"), "Unknown site"),
        (
            ("steer", *files, "--layer", "1", "--site", "z", "-o", target),
            "one row of features for each token is needed",
        ),
        (("steer", *files, "--layer", "1", "-o", str(tmp_path / "no" / "x")), "there is no directory"),
    ):
        code, out, err = oculi_here(*arguments)
        assert code == 2 and message in " ".join(err.split()) and not out, err
    assert not Path(target).exists()


def test_a_file_that_is_no_direction_says_so(tmp_path: Path) -> None:
    cases: dict[str, Any] = {
        "holds HeadAblation, and one Steer": HeadAblation(0, 1),
        "holds Steer, Steer, and one Steer": [Steer(0, np.ones(3)), Steer(1, np.ones(3))],
        "and a direction .E. of floats is needed": Steer(np.arange(2), np.ones((2, 3))),
    }
    for message, given in cases.items():
        save(given, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=message):
            parse(f"steer:file={tmp_path / 'x.safetensors'}")
    np.save(tmp_path / "x.npy", np.ones(3))
    with pytest.raises(ValueError, match="layer is missing: this file holds a direction and not where it belongs"):
        parse(f"steer:file={tmp_path / 'x.npy'}")
    assert parse(f"steer:file={tmp_path / 'x.npy'},layer=2").layer == 2
