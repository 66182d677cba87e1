"""`--prompts FILE`: a set's values are NumPy's of plain runs, intervals those of all resamples; what a file may hold."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from oculi_jax import Output, forward, padded
from oculi_jax.circuits import path_patching
from oculi_jax.cli import attribute, lens, patch, paths, sweep
from oculi_jax.cli.effects import announce
from oculi_jax.cli.prompts import read_rows
from oculi_jax.intervention import ActivationPatch, HeadAblation
from oculi_jax.metrics import logit_difference
from oculi_jax.models.llama import LlamaAttentionAdapter
from oculi_jax.sweeps import sweeping

from .margins import assert_leads
from .prompts import IOI
from .test_cli_sweep import Words
from .tiny import tiny_llama
from .tolerances import ROUTES

# Of two lengths, and two kinds of answer.
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
# The same prompts on both sides.
ROUND = [{"clean": CAPITALS[i]["clean"], "corrupted": CAPITALS[i - 1]["clean"]} for i in range(3)]
PAIRS = [
    {**CAPITALS[0], "target": "Paris", "against": "Rome"},
    {"clean": IOI.format("John"), "corrupted": IOI.format("Mary"), "target": "Mary", "against": "John"},
    {**CAPITALS[1], "target": "Madrid", "against": "Rome"},
]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, oculi_here, trained: LlamaAttentionAdapter) -> Callable[..., dict[str, Any]]:
    """Runs a command on the embedded model: its arguments → the JSON that it prints."""
    for module in (attribute, lens, patch, paths, sweep):
        monkeypatch.setattr(module, "open_adapter", lambda *given, chat: trained)

    def run(*arguments: str) -> dict[str, Any]:
        code, out, err = oculi_here(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


def written(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")  # with empty lines between them
    return str(path)


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


# What each test reads of plain runs, so that they share a program; and the columns of every run, for the same reason.
READ = ("embed", "z", "mlp_out", "resid_pre", "resid_post")
WIDTH = 16


class Runs:
    """Plain and edited runs of single texts on the embedded model, and NumPy's arithmetic on them in float64."""

    def __init__(self, adapter: LlamaAttentionAdapter):
        self.adapter, self.model, self.encode = adapter, adapter.model, adapter.tokenizer.encode
        self.unembed = np.asarray(self.model.lm_head.weight, np.float64)
        self.plain, self.without = cache(self._plain), cache(self._without)
        self.ablated, self.edited = jax.jit(self._ablated), jax.jit(self._patched, static_argnums=0)

    def padded(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids = self.encode(text)
        return np.pad(ids, (0, WIDTH - len(ids))).astype(np.int32), np.arange(WIDTH) < len(ids)

    def _plain(self, text: str) -> Output:
        ids, mask = self.padded(text)
        return forward(self.model, ids, capture=READ, mask=mask)

    def _without(self, text: str) -> np.ndarray:
        """The logits `[L, H, V]` at the last token without each head."""
        layers, heads = (x.ravel() for x in np.indices((4, 6)))
        return np.asarray(self.ablated(*self.padded(text), layers, heads)).reshape(4, 6, -1)

    def _ablated(self, ids: Any, mask: Any, layers: Any, heads: Any) -> Any:
        def one(layer: Any, head: Any) -> Any:
            return forward(self.model, ids, HeadAblation(layer, head), logits="last", mask=mask).logits

        return jax.vmap(one)(layers, heads)

    def _patched(self, site: str, ids: Any, mask: Any, *places: Any) -> Any:
        """The logits `[N, V]` at the last token, with one layer, head, value and mask of tokens at a time."""

        def one(layer: Any, head: Any, value: Any, tokens: Any) -> Any:
            patch = ActivationPatch(site, layer, value, head, tokens)
            return forward(self.model, ids, patch, logits="last", mask=mask).logits

        return jax.vmap(one)(*places)

    def patched(self, text: str, source: str, site: str, by: Sequence[str]) -> np.ndarray:
        """The logits `[*by, V]` of a text with another one's values at one place at a time."""
        ids, mask = self.padded(text)
        values = np.asarray(self.plain(source).activations[site])
        shape = [{"layer": 4, "head": 6, "position": int(mask.sum())}[axis] for axis in by]
        at = dict(zip(by, np.indices(shape).reshape(len(by), -1), strict=True))
        value = values[at["layer"], at["head"]] if "head" in at else values[at["layer"]]
        tokens = np.eye(WIDTH, dtype=bool)[at["position"]] if "position" in at else None
        found = self.edited(site, ids, mask, at["layer"], at.get("head"), value, tokens)
        return np.asarray(found).reshape(*shape, -1)

    def site(self, text: str, name: str) -> np.ndarray:
        """At the text's own tokens."""
        values = np.asarray(self.plain(text).activations[name], np.float64)
        return np.compress(self.padded(text)[1], values, axis=-2)

    def logits(self, text: str) -> np.ndarray:
        return np.asarray(self.plain(text).logits)[len(self.encode(text)) - 1]

    def scale(self, resid: np.ndarray) -> np.ndarray:
        """What the final norm multiplies a stream `[…, E]` with."""
        size = np.sqrt(np.mean(resid**2, axis=-1, keepdims=True) + self.model.config.rms_norm_eps)
        return np.asarray(self.model.norm.weight[...], np.float64) / size

    def direction(self, row: dict[str, str]) -> np.ndarray:
        """What an answer reads off the normed stream, `[E]`."""
        other = self.unembed[self.adapter.to_single_token(row["against"])] if "against" in row else 0.0
        return self.unembed[self.adapter.to_single_token(row["target"])] - other

    def measure(self, logits: np.ndarray, row: dict[str, str]) -> np.ndarray:
        """The metric of logits `[…, V]`."""
        logits = np.asarray(logits, np.float64)
        target = logits[..., self.adapter.to_single_token(row["target"])]
        if "against" in row:
            return target - logits[..., self.adapter.to_single_token(row["against"])]
        most = logits.max(axis=-1)
        return target - most - np.log(np.exp(logits - most[..., None]).sum(axis=-1))


@pytest.fixture(scope="module")
def runs(trained: LlamaAttentionAdapter) -> Runs:
    return Runs(trained)


def test_oculi_lens_of_a_set(run, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured in several parts."""
    monkeypatch.setattr("oculi_jax.cli.sets.AT_ONCE", 2)
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeff" + "\r\n".join(["", *(row["prompt"] for row in ROWS), "  ", ""]), encoding="utf-8")
    found = run("lens", "--prompts", str(file), "-o", str(tmp_path / "x.png"))
    assert found["prompt"] == [row["prompt"] for row in ROWS]
    last = [runs.site(row["prompt"], "resid_post")[:, -1] for row in ROWS]
    logits = np.array([(x * runs.scale(x)) @ runs.unembed.T for x in last])  # [B, L, V]
    ids = [int(runs.logits(row["prompt"]).argmax()) for row in ROWS]
    for x in logits:
        assert_leads(x[-1])
    assert found["answer_ids"] == ids and found["answers"][:3] == [" Paris", " Rome", " Mary"]
    chances = np.exp(logits - logits.max(axis=-1, keepdims=True))
    chances /= chances.sum(axis=-1, keepdims=True)
    assert_over_prompts(found["probability_of_answer"], [x[:, i] for x, i in zip(chances, ids, strict=True)])
    first = [x.argmax(axis=-1) == i for x, i in zip(logits, ids, strict=True)]
    assert_over_prompts(found["likeliest"], first)
    assert (tmp_path / "x.png").stat().st_size > 10_000

    # A row's own target, beside a row that has none.
    rows = [{"text": ROWS[0]["prompt"], "target": "Rome"}, {"text": ROWS[2]["prompt"], "target": None}]
    found = run("lens", "--prompts", written(tmp_path / "x.jsonl", rows))
    rome = runs.adapter.tokenizer.encode("Rome")[-1]
    np.testing.assert_allclose(found["probability_of_answer"]["by_prompt"][0], chances[0, :, rome], atol=ROUTES)
    assert found["likeliest"]["by_prompt"][0] != found["likeliest"]["by_prompt"][1] == first[2].tolist()
    assert found["answers"] == [" Rome", " Mary"] and found["target"] == ["Rome", None]


def rows_of(against: bool) -> list[dict[str, str]]:
    """All rows, with a difference; the first two, which are of one length, with one answer each."""
    names = ("prompt", "target", "against") if against else ("prompt", "target")
    return [{name: row[name] for name in names} for row in (ROWS if against else ROWS[:2])]


@pytest.mark.parametrize("against", [True, False])
def test_oculi_attribute_of_a_set(
    run, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, against: bool
) -> None:
    """Captured in several parts."""
    monkeypatch.setattr("oculi_jax.cli.sets.AT_ONCE", 2)
    rows = rows_of(against)
    picture = ("-o", str(tmp_path / "x.png")) if against else ()
    found = run("attribute", "--prompts", written(tmp_path / "x.jsonl", rows), "--top", "28", *picture)
    output = np.asarray(runs.model.layers.attn.o.weight[...], np.float64)  # [L, E, H, D]
    answer = runs.adapter.to_single_token
    want: dict[str, list[Any]] = {name: [] for name in ("logit", "embedding", "heads", "mlps")}
    for row in rows:
        text, direction = row["prompt"], runs.direction(row)
        read = direction * runs.scale(runs.site(text, "resid_post")[-1, -1])
        logits = runs.logits(text)
        want["logit"].append(logits[answer(row["target"])] - (logits[answer(row["against"])] if against else 0.0))
        want["embedding"].append(runs.site(text, "embed")[-1] @ read)
        want["heads"].append(np.einsum("lhd,lehd,e->lh", runs.site(text, "z")[:, :, -1], output, read))
        want["mlps"].append(runs.site(text, "mlp_out")[:, -1] @ read)
    for name, each in want.items():
        assert_over_prompts(found[name], each, 10 * ROUTES)
    assert np.abs(found["completeness_error"]).max() < 1e-3
    # What is lost without each head, on average over prompts with their own answers.
    lost = {entry["part"]: entry["exact"] for entry in found["verification"]["entries"]}
    assert len(lost) == 28
    wanted = np.zeros((4, 6))
    for row in rows:
        less = runs.logits(row["prompt"]) - runs.without(row["prompt"])
        wanted += less[..., answer(row["target"])] - (less[..., answer(row["against"])] if against else 0.0)
    found_lost = [[lost[f"L{n}H{h}"] for h in range(6)] for n in range(4)]
    np.testing.assert_allclose(found_lost, wanted / len(rows), atol=10 * ROUTES)
    assert not against or (tmp_path / "x.png").stat().st_size > 10_000


@pytest.mark.parametrize("against", [True, False])
def test_oculi_sweep_of_a_set(run, runs: Runs, tmp_path: Path, against: bool) -> None:
    rows = rows_of(against)
    picture = ("-o", str(tmp_path / "x.png")) if against else ()
    found = run("sweep", "--prompts", written(tmp_path / "x.jsonl", rows), *picture)
    plain = np.array([runs.measure(runs.logits(row["prompt"]), row) for row in rows])
    assert_over_prompts(found["plain"], plain, 10 * ROUTES)
    without = np.array([runs.measure(runs.without(row["prompt"]), row) for row in rows])
    assert_over_prompts(found["change"], without - plain[:, None, None], 10 * ROUTES)
    assert np.shape(found["change"]["mean"]) == (4, 6)
    assert not against or (tmp_path / "x.png").stat().st_size > 10_000


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    """What is announced of a patching, and the plan of the sweep that is run."""
    announced: list[Any] = []
    ran: list[Any] = []
    own = sweeping.execute

    def execute(prepared: Any, planned: Any, progress: Any) -> Any:
        ran.append(planned)
        return own(prepared, planned, progress)

    monkeypatch.setattr(patch, "announce", announced.append)
    monkeypatch.setattr(sweeping, "execute", execute)
    return announced, ran


@pytest.mark.parametrize(
    ("rows", "site", "direction", "by"),
    [
        (PAIRS, "z", "denoising", ["layer", "head"]),
        (PAIRS, "mlp_out", "noising", ["layer"]),
        ([{**row, "target": "Paris", "against": "Rome"} for row in CAPITALS], "resid_pre", "denoising", ["layer", "position"]),
    ],
)  # fmt: skip
def test_oculi_patch_of_a_set(
    run, runs: Runs, plans, tmp_path: Path, rows, site: str, direction: str, by: list[str]
) -> None:
    planned, ran = plans
    kinds = ("corrupted", "clean") if direction == "denoising" else ("clean", "corrupted")
    asked = ("--site", site, "--direction", direction, "-o", str(tmp_path / "x.png"))
    found = run("patch", "--prompts", written(tmp_path / "x.jsonl", rows), *asked)
    assert (planned[0].axes, planned[0].n_prompts, len(planned)) == (ran[0].axes, 3, 1)
    assert planned[0].n_runs == ran[0].n_runs + 6 and planned[0].flops > ran[0].flops
    assert found["by"] == by and (tmp_path / "x.png").stat().st_size > 5_000
    clean, corrupted = (
        np.array([runs.measure(runs.logits(row[kind]), row) for row in rows]) for kind in ("clean", "corrupted")
    )
    patched = np.array([
        runs.measure(runs.patched(*(row[kind] for kind in kinds), site, by), row)
        for row in rows
    ])  # fmt: skip
    for name, each in (("clean", clean), ("corrupted", corrupted), ("patched", patched)):
        assert_over_prompts(found[name], each, 10 * ROUTES)
    start = (corrupted if direction == "denoising" else clean).reshape(-1, *[1] * len(by))
    assert_over_prompts(found["change"], patched - start, 10 * ROUTES)
    means = (patched.mean(axis=0) - corrupted.mean()) / (clean.mean() - corrupted.mean())
    np.testing.assert_allclose(found["recovery"], means, atol=ROUTES)
    ratios = (patched.T - corrupted) / (clean - corrupted)
    assert np.abs(means.T - ratios.mean(axis=-1)).max() > 10 * ROUTES  # no mean of ratios


def test_oculi_paths_of_a_set(run, trained: LlamaAttentionAdapter, tmp_path: Path) -> None:
    """Pairs of several lengths, against the function that it calls; named senders are one effect."""
    rows = written(tmp_path / "x.jsonl", PAIRS)
    (clean, mask), (corrupted, _) = (
        padded([trained.tokenizer.encode(row[kind]) for row in PAIRS]) for kind in ("clean", "corrupted")
    )
    ids = ([trained.to_single_token(row[name]) for row in PAIRS] for name in ("target", "against"))
    metric = logit_difference(*map(np.array, ids))
    for senders in (None, ["a0.h1", "m0"]):
        found = run("paths", "--prompts", rows, *(("--senders", ", ".join(senders)) if senders else ()))
        wanted = path_patching(trained.model, clean, corrupted, metric, senders, mask=mask)
        assert_over_prompts(found["change"], wanted.values, 10 * ROUTES)
        assert found["receivers"] == ["logits"] and found["senders"] == list(wanted.senders)


def test_pairs_in_a_text_file(run, oculi_here, tmp_path: Path) -> None:
    """With a tab between them; the table names places, with the tokens that all prompts have there."""
    file = tmp_path / "pairs.tsv"
    file.write_text("".join(f"{row['clean']}\t{row['corrupted']}\n" for row in CAPITALS), encoding="utf-8")
    given = ("patch", "--prompts", str(file), "--target", "Paris", "--against", "Rome")
    assert run(*given)["clean_prompt"] == [row["clean"] for row in CAPITALS]
    code, out, err = oculi_here(*given)
    assert code == 0, err
    assert "Means over 3 pairs of prompts" in out and "95 % interval" in out
    assert " ".join(err.split()).startswith("95 % intervals of 3 prompts are narrower than they should be: ")
    assert "\n5 ' is' L" in out and "\n4 … L" in out  # countries differ from prompt to prompt


def test_the_other_spelling_of_a_sets_answers_is_said(monkeypatch, oculi_here, tmp_path: Path) -> None:
    """Of the prompts in which it is ten times as likely, counted here from the logits."""
    adapter = LlamaAttentionAdapter(tiny_llama(), Words())
    monkeypatch.setattr(sweep, "open_adapter", lambda *given, chat: adapter)
    monkeypatch.setattr(sweep, "_without_each_head", lambda *given: np.zeros((12, 3, 4)))
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
    assert code == 0 and said.startswith(
        f"In {(lead > 2.3).sum()} of 12 prompts the other spelling of the target is one token too"
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
    for module in (attribute, lens, patch, paths, sweep):
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
        ("patch", ROUND, ["--target", "Paris", "--against", "Rome"], "in both runs: there is nothing to recover"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_run_say_which(run, oculi_here, tmp_path: Path, command, rows, given, message: str) -> None:
    file = written(tmp_path / "x.jsonl", rows)
    code, out, err = oculi_here(command, "--prompts", file, *given)
    assert code == 2 and message.replace("{file}", file) in err and out == "", err


def test_what_else_breaks_lines_stands_in_a_text(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_bytes("a\rb\u2028c\x0cd\r\n\ne\x85f".encode())
    rows = read_rows(file, ("prompt",), {})
    assert [row["prompt"] for row in rows] == ["a\rb\u2028c\x0cd", "e\x85f"] and rows[1].where == f"{file}, line 3"


def test_a_long_sweep_of_a_set_says_how_many_runs(capsys: pytest.CaptureFixture) -> None:
    from types import SimpleNamespace

    announce(SimpleNamespace(n_runs=1200, seconds=61.2))  # type: ignore[arg-type]
    assert capsys.readouterr().err == "1200 runs: about 61 s on this device, and compiling.\n"
