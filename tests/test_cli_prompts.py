"""`--prompts FILE`: means over a set are those of single runs, intervals those of all resamples; what a file may hold."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oculi_jax import forward
from oculi_jax.cli import attribute, lens, patch, sweep
from oculi_jax.models.llama import LlamaAttentionAdapter

from .prompts import IOI
from .test_cli_sweep import Words
from .tiny import tiny_llama
from .tolerances import ROUTES

# Of three lengths, and two kinds of answer.
ROWS = [
    {"prompt": "The capital of France is", "target": "Paris", "against": "Rome"},
    {"prompt": "The capital of Italy is", "target": "Rome", "against": "Paris"},
    {"prompt": IOI.format("John"), "target": "Mary", "against": "John"},
    {"prompt": "John gave a drink to", "target": "Mary", "against": "John"},
]
CAPITALS = [
    {"clean": "The capital of France is", "corrupted": "The capital of Italy is"},
    {"clean": "The capital of Spain is", "corrupted": "The capital of Italy is"},
    {"clean": "The capital of Germany is", "corrupted": "The capital of France is"},
]
PAIRS = [
    {**CAPITALS[0], "target": "Paris", "against": "Rome"},
    {"clean": IOI.format("John"), "corrupted": IOI.format("Mary"), "target": "Mary", "against": "John"},
    {**CAPITALS[1], "target": "Madrid", "against": "Rome"},
]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, oculi_here, trained: LlamaAttentionAdapter) -> Callable[..., dict[str, Any]]:
    """Runs a command on the embedded model: its arguments → the JSON that it prints."""
    for module in (attribute, lens, patch, sweep):
        monkeypatch.setattr(module, "open_adapter", lambda *given, chat: trained)

    def run(*arguments: str) -> dict[str, Any]:
        code, out, err = oculi_here(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


def written(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")  # with empty lines between them
    return str(path)


def options(row: dict[str, str]) -> list[str]:
    return [word for name in ("target", "against") if name in row for word in (f"--{name}", row[name])]


def assert_over_prompts(found: dict[str, Any], each: Any, tolerance: float = ROUTES) -> None:
    """Values of each prompt, their mean, and ends within what 2000 of all possible resamples leave in doubt.

    A quantile of 2000 draws is, to four standard errors, one of the population between 1.1 and 3.9 %.
    """
    each = np.asarray(each, np.float64)
    np.testing.assert_allclose(found["by_prompt"], each, atol=tolerance)
    np.testing.assert_allclose(found["mean"], each.mean(axis=0), atol=tolerance)
    draws = np.array(list(itertools.product(range(len(each)), repeat=len(each))))
    means = each[draws].mean(axis=1)
    for name, (near, far) in {"low": (0.011, 0.039), "high": (0.961, 0.989)}.items():
        lower, higher = (np.quantile(means, q, axis=0, method=m) for q, m in ((near, "lower"), (far, "higher")))
        end = np.asarray(found[name])
        assert (lower - tolerance <= end).all() and (end <= higher + tolerance).all(), name
    assert (np.asarray(found["high"]) > np.asarray(found["low"])).any()


def test_oculi_lens_of_a_set(run, tmp_path: Path, trained: LlamaAttentionAdapter) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeff" + "\r\n".join(["", *(row["prompt"] for row in ROWS), "  ", ""]), encoding="utf-8")
    found = run("lens", "--prompts", str(file), "-o", str(tmp_path / "x.png"))
    single = [run("lens", row["prompt"]) for row in ROWS]
    assert found["prompt"] == [row["prompt"] for row in ROWS] and found["answers"] == [one["answer"] for one in single]
    assert found["answers"][:3] == [" Paris", " Rome", " Mary"]
    chances = [[layer["probability_of_answer"] for layer in one["layers"]] for one in single]
    assert_over_prompts(found["probability_of_answer"], chances)
    first = [[layer["predictions"][0][0] == one["answer"] for layer in one["layers"]] for one in single]
    assert_over_prompts(found["likeliest"], first)
    assert (tmp_path / "x.png").stat().st_size > 10_000

    # A row's own target, beside a row that has none.
    rows = [{"text": ROWS[0]["prompt"], "target": "Rome"}, {"text": ROWS[1]["prompt"], "target": None}]
    found = run("lens", "--prompts", written(tmp_path / "x.jsonl", rows))
    logits = np.asarray(forward(trained.model, trained.tokenizer.encode(ROWS[0]["prompt"])).logits, np.float64)[-1]
    rome = trained.tokenizer.encode("Rome")[-1]
    np.testing.assert_allclose(
        found["probability_of_answer"]["by_prompt"][0][-1],
        np.exp(logits[rome] - logits.max()) / np.exp(logits - logits.max()).sum(),
        atol=1e-6,
    )
    assert found["likeliest"]["by_prompt"][0] != found["likeliest"]["by_prompt"][1] == first[1]
    assert found["answers"] == [" Rome", " Rome"] and found["target"] == ["Rome", None]


@pytest.mark.parametrize("against", [True, False])
def test_oculi_attribute_of_a_set(run, tmp_path: Path, against: bool) -> None:
    rows = [
        {name: row[name] for name in ("prompt", "target", "against") if against or name != "against"} for row in ROWS
    ]
    found = run("attribute", "--prompts", written(tmp_path / "x.jsonl", rows), "-o", str(tmp_path / "x.png"))
    single = [run("attribute", row["prompt"], *options(row)) for row in rows]
    for name in ("logit", "embedding", "heads", "mlps"):
        assert_over_prompts(found[name], [one[name] for one in single], 10 * ROUTES)
    assert np.abs(found["completeness_error"]).max() < 1e-3 and (tmp_path / "x.png").stat().st_size > 10_000


@pytest.mark.parametrize("against", [True, False])
def test_oculi_sweep_of_a_set(run, tmp_path: Path, against: bool) -> None:
    rows = [
        {name: row[name] for name in ("prompt", "target", "against") if against or name != "against"} for row in ROWS
    ]
    found = run("sweep", "--prompts", written(tmp_path / "x.jsonl", rows), "-o", str(tmp_path / "x.png"))
    single = [run("sweep", row["prompt"], *options(row)) for row in rows]
    for name in ("plain", "change"):
        assert_over_prompts(found[name], [one[name] for one in single], 10 * ROUTES)
    assert np.shape(found["change"]["mean"]) == (4, 6) and (tmp_path / "x.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("rows", "asked", "by"),
    [
        (PAIRS, ["--site", "z"], ["layer", "head"]),
        (PAIRS, ["--site", "mlp_out", "--direction", "noising"], ["layer"]),
        (CAPITALS, ["--target", "Paris", "--against", "Rome"], ["layer", "position"]),
    ],
)
def test_oculi_patch_of_a_set(run, tmp_path: Path, rows, asked: list[str], by: list[str]) -> None:
    found = run("patch", "--prompts", written(tmp_path / "x.jsonl", rows), *asked, "-o", str(tmp_path / "x.png"))
    assert found["by"] == by and (tmp_path / "x.png").stat().st_size > 5_000
    single = [run("patch", row["clean"], row["corrupted"], *options(row), *asked, "--by", ",".join(by)) for row in rows]
    clean, corrupted, patched = (np.array([one[name] for one in single]) for name in ("clean", "corrupted", "patched"))
    for name, each in (("clean", clean), ("corrupted", corrupted), ("patched", patched)):
        assert_over_prompts(found[name], each, 10 * ROUTES)
    start = (clean if "noising" in asked else corrupted).reshape(-1, *[1] * len(by))
    assert_over_prompts(found["change"], patched - start, 10 * ROUTES)
    means = (patched.mean(axis=0) - corrupted.mean()) / (clean.mean() - corrupted.mean())
    np.testing.assert_allclose(found["recovery"], means, atol=ROUTES)
    assert np.abs(means - np.mean([one["recovery"] for one in single], axis=0)).max() > 10 * ROUTES  # no mean of ratios


def test_pairs_in_a_text_file(run, oculi_here, tmp_path: Path) -> None:
    """With a tab between them; the table names places, with the tokens that all prompts have there."""
    file = tmp_path / "pairs.tsv"
    file.write_text("".join(f"{row['clean']}\t{row['corrupted']}\n" for row in CAPITALS), encoding="utf-8")
    given = ("patch", "--prompts", str(file), "--target", "Paris", "--against", "Rome")
    assert run(*given)["clean_prompt"] == [row["clean"] for row in CAPITALS]
    code, out, err = oculi_here(*given)
    assert code == 0, err
    assert "Means over 3 pairs of prompts" in out and "95 % interval" in out
    assert "\n5 ' is' L" in out and "\n4 … L" in out  # countries differ from prompt to prompt


def test_many_prompts_are_as_few(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A set that is captured in several parts."""
    texts = [{"prompt": row["prompt"]} for row in ROWS]
    files = {"lens": written(tmp_path / "x.jsonl", texts), "attribute": written(tmp_path / "y.jsonl", ROWS)}
    whole = [run(command, "--prompts", file) for command, file in files.items()]
    monkeypatch.setattr("oculi_jax.cli.sets.AT_ONCE", 2)
    parts = [run(command, "--prompts", file) for command, file in files.items()]
    for one, other, name in zip(whole, parts, ("probability_of_answer", "heads"), strict=True):
        np.testing.assert_allclose(one[name]["by_prompt"], other[name]["by_prompt"], atol=ROUTES)


def test_the_other_spelling_of_a_sets_answers_is_said(monkeypatch, oculi_here, tmp_path: Path) -> None:
    """Of the prompts in which it is ten times as likely, counted here from the logits."""
    adapter = LlamaAttentionAdapter(tiny_llama(), Words())
    monkeypatch.setattr(sweep, "open_adapter", lambda *given, chat: adapter)
    texts = [
        f"the{a}{b}{c}" for a, b, c in itertools.product((" cat", " saw", " dog"), (" so", " cow"), (" the", " cat"))
    ]
    logits = np.array([np.asarray(forward(adapter.model, Words().encode(text)).logits)[-1] for text in texts])
    lead = logits[:, 1] - logits[:, 0]  # of " the" over "the"
    assert np.abs(np.abs(lead) - np.log(10)).min() > 1e-2 and (lead > 2.31).any() and (lead < 2.29).any()
    file = tmp_path / "x.txt"
    file.write_text("\n".join(texts), encoding="utf-8")
    code, _, err = oculi_here("sweep", "--prompts", str(file), "--target", "the")
    line, said = int(np.argmax(lead > 2.3)) + 1, " ".join(err.split())
    assert (
        code == 0 and f"In {(lead > 2.3).sum()} of 12 prompts the other spelling of the target is one token too" in said
    )
    assert said.endswith(f"likelier: ' the' for 'the' in {file}, line {line}.")


GOOD = '{"prompt": "a", "target": "b"}\n'


@pytest.mark.parametrize(
    ("command", "name", "text", "message"),
    [
        ("sweep", "x.jsonl", GOOD + "{'prompt': 'a'}", "x.jsonl, line 2: this is no JSON: "),
        ("sweep", "x.jsonl", GOOD + "[" * 100_000, "line 2: this is no JSON."),
        ("sweep", "x.jsonl", GOOD + '\n["a"]', "line 3: this is a list, and an object is needed: {\"prompt\": "),
        ("sweep", "x.jsonl", GOOD + "3", "line 2: this is a number, and an object is needed"),
        ("sweep", "x.jsonl", '{"promt": "a"}', "line 1: there is no field 'promt'. Did you mean 'prompt'? There are prompt, "),
        ("lens", "x.jsonl", '{"prompt": "a", "against": "b"}', "line 1: there is no field 'against'."),
        ("sweep", "x.jsonl", '{"prompt": "a", "text": "b"}', "'text' is another name of 'prompt', and both are given"),
        ("sweep", "x.jsonl", '{"prompt": "a", "target": 3}', "line 1: target is a number, and a text is needed"),
        ("sweep", "x.jsonl", '{"prompt": ["a"], "target": "b"}', "line 1: prompt is a list, and a text is needed"),
        ("attribute", "x.jsonl", GOOD + '{"prompt": "a"}', "line 2: there is no target: give it in the row of a .jsonl, or --target"),
        ("attribute", "x.jsonl", GOOD + '{"prompt": "a", "target": null}', "line 2: there is no target"),
        ("attribute", "x.txt", "a\nb", "line 1: there is no target: give it in the row of a .jsonl, or --target for all rows"),
        ("sweep", "x.jsonl", GOOD + '{"target": "b"}', "line 2: there is no prompt: give it in the row"),
        ("sweep", "x.jsonl", GOOD + '{"prompt": "a", "target": "b", "against": "c"}', "line 2: against is given in some rows"),
        ("lens", "x.txt", "a\n\n", "holds one prompt, and an interval over prompts needs at least two"),
        ("lens", "x.txt", "\n \n", "holds no prompt"),
        ("patch", "x.txt", "a\tb\na b", "line 2: 0 tabs, and a line is clean and corrupted with one tab between them"),
        ("patch", "x.txt", "a\tb\tc", "line 1: 2 tabs"),
        ("patch", "x.jsonl", '{"clean": "a", "target": "b"}', "line 1: there is no corrupted"),
        ("patch", "x.jsonl", '{"prompt": "a"}', "line 1: there is no field 'prompt'."),
    ],
)  # fmt: skip
def test_files_that_cannot_be_are_refused_before_a_model_loads(
    monkeypatch: pytest.MonkeyPatch, oculi_here, tmp_path: Path, command: str, name: str, text: str, message: str
) -> None:
    for module in (attribute, lens, patch, sweep):
        monkeypatch.setattr(module, "open_adapter", lambda *given, chat: pytest.fail("a model was loaded"))
    (tmp_path / name).write_text(text, encoding="utf-8")
    given = ("--target", "b") if name == "x.txt" and command == "patch" else ()
    code, out, err = oculi_here(command, "--prompts", str(tmp_path / name), *given)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1 and out == "", err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lens", "x", "--prompts", "{file}"], "TEXT and --prompts are both given: give TEXT, or a file of prompts."),
        (["sweep", "--target", "x"], "There is no prompt: give TEXT, or a file of prompts with --prompts FILE."),
        (["patch", "x", "--target", "x"], "There is no prompt: give CLEAN and CORRUPTED, or a file"),
        (["patch", "x", "--prompts", "{file}"], "CLEAN and --prompts are both given"),
        (["attribute", "--prompts", "{tmp}"], "and it is a directory"),
        (["attribute", "--prompts", "{tmp}/none"], "and there is no such file"),
        (["lens", "--prompts", "{tmp}/latin"], "latin is not text in UTF-8: byte 1 is 0xe9"),
    ],
)
def test_one_prompt_or_a_file(oculi_here, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "file").write_text("a\nb")
    (tmp_path / "latin").write_bytes(b"\n\xe9")
    given = [a.replace("{file}", str(tmp_path / "file")).replace("{tmp}", str(tmp_path)) for a in arguments]
    code, out, err = oculi_here(*given, "--model", "nowhere")
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1 and out == "", err


@pytest.mark.parametrize(
    ("command", "rows", "given", "message"),
    [
        ("sweep", [ROWS[0], {"prompt": "a", "target": "Parisien", "against": "Rome"}], [], "line 3: 'Parisien' is not in the voc"),
        ("sweep", [ROWS[0], {**ROWS[1], "against": "Rome"}], [], "line 3: target and against are both 'Rome'"),
        ("lens", [{"prompt": "The"}, {"prompt": "The " * 200}], [], "line 3: The prompt has 201 tokens"),
        ("patch", [PAIRS[0], {**PAIRS[0], "corrupted": "The"}], [], "line 3: Patching puts the prompts' tokens side by side"),
        ("patch", [PAIRS[0], {**PAIRS[0], "corrupted": PAIRS[0]["clean"]}], [], "line 3: Both prompts are the tokens"),
        ("patch", PAIRS, ["--by", "layer,position"], "these prompts have several lengths, 6 in {file}, line 1 and 15 in {file}, line 3"),
        ("patch", PAIRS, ["--site", "embed"], "these prompts have several lengths"),
        ("patch", [PAIRS[0], {"clean": PAIRS[0]["corrupted"], "corrupted": PAIRS[0]["clean"], "target": "Paris", "against": "Rome"}],
         [], "in both runs: there is nothing to recover"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_run_say_which(run, oculi_here, tmp_path: Path, command, rows, given, message: str) -> None:
    file = written(tmp_path / "x.jsonl", rows)
    code, out, err = oculi_here(command, "--prompts", file, *given)
    assert code == 2 and message.replace("{file}", file) in err and out == "", err
