"""`oculi job`: what a file asks for is what single calls give; a second start, several processes, and what is wrong in a file."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from oculi_jax import CaptureSpec, circuits, data, forward, sweep
from oculi_jax.causal import activation_patching, attribution_patching
from oculi_jax.cli import job, jobfile
from oculi_jax.cli.hosts import n_expected
from oculi_jax.cli.jobfile import COMPUTATIONS, read_job
from oculi_jax.intervention import Ablation, HeadAblation
from oculi_jax.metrics import log_probability, logit_difference

TEXTS = ["The capital of Italy is", "Rome", "Paris is in", "The capital of France is", "Berlin"]
PAIRS = [
    {
        "prompt": f"The capital of {a} is",
        "spoilt": f"The capital of {b} is",
        "answer": f" {x}",
        "other": f" {y}",
        "n": "a",
    }
    for a, b, x, y in (
        ("Italy", "France", "Rome", "Paris"),
        ("France", "Germany", "Paris", "Berlin"),
        ("Germany", "Italy", "Berlin", "Rome"),
    )
]
CAPTURE = """
[data]
file = "{tmp}/texts.txt"
[capture]
sites = ["resid_post", "final_norm"]
layers = [1, 3]
[store]
directory = "{tmp}/s"
chunk_size = 2
"""
SWEEP = """
[data]
file = "{tmp}/pairs.jsonl"
column = "prompt"
[sweep]
each = "head"
target = "answer"
against = "other"
[store]
directory = "{tmp}/s"
chunk_size = 2
"""


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Writes the file of a job, of which some lines are others, and its data."""
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))

    def write(text: str, *changes: tuple[str, str]) -> Path:
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "job.toml"
        path.write_text(text.replace("{tmp}", str(tmp_path)))
        return path

    return write


def contents(directory: Path) -> dict[str, bytes]:
    """Without hidden names: one that was killed just after it had renamed its file leaves an empty directory of such a name."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if not path.name.startswith(".")}


def test_a_capture_from_a_file(trained, oculi_here, written, tmp_path: Path) -> None:
    path = str(written(CAPTURE))
    code, out, _ = oculi_here("job", path, "--plan")
    assert code == 0 and not (tmp_path / "s").exists()
    n_tokens = sum(len(trained.tokenizer.encode(text)) for text in TEXTS)
    assert "capture of tiny-facts (float32) over 5 rows" in out and "3 chunks of 2 rows: 0 there." in out
    size = n_tokens * (3 * 192 * 4 + 4) + 5 * 8  # three streams and the ids, and where rows begin
    assert f"5 rows of {n_tokens} tokens; {size / 1000:.3g} kB will be written." in out
    code, out, _ = oculi_here("job", path)
    assert code == 0 and "5 rows in 3 chunks of 2, all written." in out and "resid_post.3  float32 [tokens, 192]" in out
    whole, store = contents(tmp_path / "s"), data.Store.open(tmp_path / "s")
    for number, text in enumerate(TEXTS):
        alone = forward(trained.model, trained.tokenizer.encode(text), capture=("resid_post", "final_norm"))
        np.testing.assert_allclose(store["resid_post", 3][number], alone["resid_post"][3], atol=2e-4)
        np.testing.assert_allclose(store["final_norm"][number], alone["final_norm"], atol=2e-4)
    same = data.capture_dataset(
        trained.model, TEXTS, (CaptureSpec("resid_post", [1, 3]), "final_norm"), tmp_path / "t",
        tokenizer=trained.tokenizer, chunk_size=2, progress=False,
    )  # fmt: skip
    assert (same["resid_post", 1].tokens() == store["resid_post", 1].tokens()).all()

    (tmp_path / "s" / "part-000001.safetensors").unlink()
    code, out, _ = oculi_here("job", path, "--plan")
    assert "3 chunks of 2 rows: 2 there." in out and "To do: 2 rows of" in out
    damaged = tmp_path / "s" / "part-000002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    code, _, error = oculi_here("job", path)
    assert code == 0 and contents(tmp_path / "s") == whole
    assert re.match(
        r"'.*part-000002.safetensors' is damaged: .*It is done again\.\n", " ".join(error.split()) + "\n"
    ), error
    assert "3 there." in oculi_here("job", path)[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[1, 3]", "[2]"), "capture is .*'layers': \\[1, 3\\].* there, and .*'layers': \\[2\\]"),
        (("chunk_size = 2", "chunk_size = 3"), "chunk_size is 2 there, and 3 here"),
        (
            ("[capture]", '[model]\ndtype = "bfloat16"\n[capture]'),
            "model.dtype is 'float32' there, and 'bfloat16' here",
        ),
        (('file = "{tmp}/texts.txt"', 'texts = ["Rome", "a"]'), "n_rows is 5 there, and 2 here"),
        (("layers = [1, 3]", 'layers = [1, 3]\nintervene = "head:layer=0,head=1"'), "interventions is \\[\\] there"),
    ],
)
def test_a_changed_capture_is_refused(
    change: tuple[str, str], message: str, trained, oculi_here, written, tmp_path: Path
) -> None:
    data.capture_dataset(
        trained.model, TEXTS, (CaptureSpec("resid_post", [1, 3]), "final_norm"), tmp_path / "s",
        tokenizer=trained.tokenizer, chunk_size=2, progress=False,
    )  # fmt: skip
    for more in ((), ("--plan",)):
        code, _, error = oculi_here("job", str(written(CAPTURE, change)), *more)
        assert code == 2 and re.search(f"holds the results of another job: .*{message}", error), error


def test_a_sweep_from_a_file(trained, oculi_here, written, tmp_path: Path) -> None:
    code, out, error = oculi_here("job", str(written(SWEEP)))
    assert code == 0 and "change  float32 [rows, 4, 6]" in out, error
    store = data.Store.open(tmp_path / "s")
    for number, row in enumerate(PAIRS):
        ids = trained.tokenizer.encode(row["prompt"])
        answer, other = (trained.to_single_token(row[name]) for name in ("answer", "other"))
        metric = logit_difference(answer, other)
        plain = sweep(trained.model, ids, (), metric)
        after = sweep(trained.model, ids, HeadAblation.grid(trained.model.config), metric)
        np.testing.assert_allclose(store["plain"][number], plain, atol=2e-4)
        np.testing.assert_allclose(store["change"][number], after - plain, atol=4e-4)
    code, _, error = oculi_here("job", str(written(SWEEP, ('"head"', '"mlp"'))))
    assert code == 2 and "about.sweep.each is 'head' there, and 'mlp' here" in error
    code, _, error = oculi_here("job", str(written(SWEEP, ('against = "other"\n', ""))))
    assert code == 2 and "about.sweep.against is 'other' there, and None here" in error


@pytest.mark.parametrize(
    ("each", "family"),
    [
        ("neuron", Ablation("act", 3, np.arange(512))),
        ("mlp", Ablation("mlp_out", 3)),
        ("attention", Ablation("attn_out", 3)),
    ],
)
def test_a_sweep_of_other_parts(each: str, family, trained, oculi_here, written, tmp_path: Path) -> None:
    changes = (('"head"', f'"{each}"\nlayers = [3]'), ('against = "other"\n', ""))
    code, _, error = oculi_here("job", str(written(SWEEP, *changes)))
    assert code == 0, error
    row, store = PAIRS[2], data.Store.open(tmp_path / "s")
    metric, ids = log_probability(trained.to_single_token(row["answer"])), trained.tokenizer.encode(row["prompt"])
    plain, after = (sweep(trained.model, ids, x, metric, progress=False) for x in ((), family))
    np.testing.assert_allclose(store["change"][2][0], after - plain, atol=4e-4)


def test_patching_attribution_and_curves_from_a_file(trained, oculi_here, written, tmp_path: Path) -> None:
    measured = 'corrupted = "spoilt"\ntarget = "answer"\nagainst = "other"\n'
    model, encode = trained.model, trained.tokenizer.encode
    circuits.Circuit(circuits.Graph.of(model.config), nodes=["input", "m0", "m3", "a2.h0", "a1.h1"]).save(
        tmp_path / "c.json"
    )
    asked = {
        "patch": 'site = "z"\nby = "layer,head"\n',
        "patch 2": 'by = "layer,position"\n',
        "attribute": 'sites = ["z", "mlp_out"]\nsteps = 2\n',
        "curve": f'circuits = "{tmp_path / "c.json"}"\nablation = "zero"\n',
    }
    stores = {}
    for name, more in asked.items():
        changes = (
            '[sweep]\neach = "head"\ntarget = "answer"\nagainst = "other"\n',
            f"[{name.split()[0]}]\n{measured}{more}",
        )
        code, _, error = oculi_here("job", str(written(SWEEP, changes, ("{tmp}/s", f"{{tmp}}/{name}"))))
        assert code == 0, (name, error)
        stores[name] = data.Store.open(tmp_path / name)
    row, number = PAIRS[1], 1
    ids, spoilt = encode(row["prompt"]), encode(row["spoilt"])
    metric = logit_difference(*(trained.to_single_token(row[name]) for name in ("answer", "other")))
    heads = activation_patching(model, ids, spoilt, metric, "z", ("layer", "head"))
    places = activation_patching(model, ids, spoilt, metric, "resid_pre", ("layer", "position"))
    np.testing.assert_allclose(stores["patch"]["patched"][number], heads.patched, atol=4e-4)
    np.testing.assert_allclose(stores["patch"]["corrupted"][number], heads.corrupted, atol=4e-4)
    np.testing.assert_allclose(stores["patch 2"]["patched"][number], np.asarray(places.patched).T, atol=4e-4)
    estimates = attribution_patching(model, ids, spoilt, metric, ("z", "mlp_out"), steps=2).values
    np.testing.assert_allclose(
        stores["attribute"]["z"][number], np.moveaxis(np.asarray(estimates["z"]), -1, 0), atol=4e-4
    )
    np.testing.assert_allclose(stores["attribute"]["mlp_out"][number], np.asarray(estimates["mlp_out"]).T, atol=4e-4)
    circuit = circuits.Circuit.load(tmp_path / "c.json")
    curve = circuits.faithfulness(model, circuit, ids, spoilt, metric, ablation="zero")
    np.testing.assert_allclose(stores["curve"]["by_prompt"][number], curve.by_prompt[0], atol=4e-4)
    np.testing.assert_allclose(stores["curve"]["whole"][number], curve.whole[0], atol=4e-4)


def test_the_file_of_the_page_runs(
    trained, oculi_here, written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs" / "batch-jobs.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```toml\n(.*?)^```$", page, re.M | re.S)
    assert len([line for line in text.splitlines() if line]) <= 15
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").symlink_to(root / "weights")
    path = written(text)
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps({**row, "text": row["prompt"]}) for row in PAIRS))
    code, out, error = oculi_here("job", str(path))
    assert code == 0 and "change  float32 [rows, 4, 6]" in out, error
    assert len(data.Store.open("heads")) == 3
    rows = dict(re.findall(r"^\| `\[(\w+)\]` \| (.+) \|$", page, re.M))
    for name, table in COMPUTATIONS.items():
        for field in dataclasses.fields(table):
            assert f"`{field.name}`" in rows[name], (name, field.name)


@pytest.mark.parametrize(
    ("text", "change", "message"),
    [
        (CAPTURE, ("[capture]", "[captures]"), "no table [captures]. Did you mean 'capture'?"),
        (CAPTURE, ("sites =", "site ="), "[capture] has no 'site'. Did you mean 'sites'? There are sites, layers,"),
        (CAPTURE, ('"resid_post", "final_norm"', '"resid_pots"'), "did you mean 'resid_post'"),
        (CAPTURE, ("[1, 3]", '"1-3"'), "[capture] layers is '1-3', and a list of integers is needed"),
        (CAPTURE, ("[1, 3]", "[true]"), "[capture] layers is [True], and a list of integers is needed"),
        (CAPTURE, ("chunk_size = 2", "chunk_size = 2.5"), "[store] chunk_size is 2.5, and an integer is needed"),
        (CAPTURE, ("chunk_size = 2", "chunk_size = 0"), "chunk_size is 0, and must be at least 1"),
        (CAPTURE, ('directory = "{tmp}/s"\n', ""), "[store] directory is missing"),
        (CAPTURE, ("[data]", "[model]"), "[model] has no 'file'"),
        (CAPTURE, ('[data]\nfile = "{tmp}/texts.txt"', ""), "the table [data] is missing"),
        (CAPTURE, ('file = "{tmp}/texts.txt"', ""), "[data] needs either file or texts"),
        (CAPTURE, ("[store]", '[sweep]\ntarget = "a"\n[store]'), "[capture] and [sweep] are both given"),
        (CAPTURE, ("[capture]", "[capture"), "is not TOML"),
        (CAPTURE, ("[data]", '[model]\nmesh = { data = 2, modl = 2 }\n[data]'), "[model] mesh has no 'modl'. Did you mean 'model'?"),
        (CAPTURE, ("[data]", '[model]\ndtype = "float8"\n[data]'), "[model] dtype is 'float8', and must be 'auto' or"),
        (CAPTURE, ("[data]", 'model = "x"\n[data]'), "[model] is 'x', and a table is needed"),
        (SWEEP, ('target = "answer"\n', ""), "[sweep] target is missing"),
        (SWEEP, ('"head"', '"heads"'), "[sweep] each is 'heads', and must be 'head' or 'neuron' or 'mlp' or 'attention'. Did you mean 'head'?"),
        (SWEEP, ("[sweep]\neach", "[curve]\nablation"), "[curve] ablation is 'head', and must be 'corrupted' or 'zero'"),
        (SWEEP, ('[sweep]\neach = "head"', "[curve]"), "[curve] circuits is missing"),
        (SWEEP, ('[sweep]\neach = "head"', "[attribute]\nsteps = 0"), "[attribute] steps is 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_said(text: str, change: tuple[str, str], message: str, written) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_job(written(text, change))


@pytest.mark.parametrize(
    ("text", "change", "message"),
    [
        (SWEEP, ('target = "answer"', 'target = "anser"'), "row 0, has no column 'anser': .* Did you mean 'answer'?"),
        (SWEEP, ('"prompt"', '"promt"'), "column is 'promt'.*Did you mean 'prompt'"),
        (SWEEP, ('against = "other"', 'against = "prompt"'), "row 0, prompt: 'The capital of Italy is' is not one token"),
        (SWEEP, ("pairs.jsonl", "texts.txt"), "texts.txt has no columns, and 'prompt' is asked for"),
        (CAPTURE, ("texts.txt", "text.txt"), "There is no file"),
        (CAPTURE, ("[1, 3]", "[4]"), "this model has 4 layers"),
        (CAPTURE, ('"resid_post", "final_norm"', '"pattern"'), "pattern has an axis of keys"),
        (CAPTURE, ("layers = [1, 3]", 'intervene = "head:layer=9,head=0"'), "there are 4 layers"),
        (CAPTURE, ("[data]", "[model]\nmesh = { data = 64 }\n[data]"), "mesh is 64 × 1 devices, and this host has"),
        (CAPTURE, ('file = "{tmp}/texts.txt"', "texts = [\"" + "a " * 600 + "\"]"), "row 0, text has .* at most"),
    ],
)  # fmt: skip
def test_rows_and_models_that_do_not_fit_are_said(
    text: str, change: tuple[str, str], message: str, oculi_here, written, tmp_path: Path
) -> None:
    code, _, error = oculi_here("job", str(written(text, change)))
    assert code == 2 and re.search(message, error), error
    assert not (tmp_path / "s").exists()


def test_the_model_runs_on_the_first_column_that_is_nothing_else(oculi_here, written, tmp_path: Path) -> None:
    path = written(SWEEP, ("pairs.jsonl", "turned.jsonl"), ('column = "prompt"\n', ""))
    turned = [{name: row[name] for name in ("other", "answer", "prompt")} for row in PAIRS]
    (tmp_path / "turned.jsonl").write_text("\n".join(map(json.dumps, turned)))
    code, _, error = oculi_here("job", str(path), "--plan")
    assert code == 0, error
    (tmp_path / "turned.jsonl").write_text(json.dumps({**turned[0], "prompt": 5}))
    code, _, error = oculi_here("job", str(path), "--plan")
    assert code == 2 and "[data] column is missing: of other, answer, prompt none is left" in error, error
    (tmp_path / "turned.jsonl").write_text(json.dumps(turned[0]) + "\n" + json.dumps({**turned[0], "prompt": 5}))
    code, _, error = oculi_here("job", str(path), "--plan")
    assert code == 2 and "Row 1 of the data set, prompt, is an array" in error, error


def test_pairs_of_unequal_lengths_are_said(oculi_here, written, tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text(json.dumps({**PAIRS[0], "spoilt": "Rome is"}))
    patch = ('[sweep]\neach = "head"', '[patch]\ncorrupted = "spoilt"')
    code, _, error = oculi_here("job", str(written(SWEEP, patch, ("pairs.jsonl", "odd.jsonl"))))
    assert code == 2 and "row 0, has 6 tokens in prompt and 3 in spoilt" in error


def test_a_mesh_gives_the_same(trained, oculi_here, written, tmp_path: Path) -> None:
    code, _, error = oculi_here(
        "job", str(written(CAPTURE, ("[data]", "[model]\nmesh = { data = 2, model = 2 }\n[data]")))
    )
    assert code == 0, error
    alone = forward(trained.model, trained.tokenizer.encode(TEXTS[0]), capture="resid_post")
    np.testing.assert_allclose(data.Store.open(tmp_path / "s")["resid_post", 3][0], alone["resid_post"][3], atol=2e-4)


def started(path: Path, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "oculi_jax.cli", "job", str(path)]
    env, root = {**os.environ, **environment}, Path(__file__).parents[1]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root, env=env)


def until(found: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not found() and process.poll() is None:
        time.sleep(0.01)


def test_killed_and_asked_to_end_it_goes_on(oculi_here, written, tmp_path: Path) -> None:
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, PAIRS * 4)))
    changes = (("pairs", "many"), ("chunk_size = 2", "chunk_size = 1"), ('"head"', '"neuron"\nlayers = [3]'))
    path = written(SWEEP, *changes)
    with started(path) as process:
        until((tmp_path / "s" / "part-000000.safetensors").exists, process)
        process.kill()
    store = data.Store.open(tmp_path / "s")
    there = 12 - len(store.missing)
    assert 0 < there < 12
    with started(path) as process:
        until(lambda: 12 - len(store.missing) > there, process)
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate()
    n_missing = len(store.missing)
    assert process.returncode == 128 + signal.SIGTERM and 0 < n_missing < 12 - there, error
    assert "ends after the chunk at hand" in error and f"{12 - n_missing} of 12 chunks are there." in out
    assert oculi_here("job", str(path))[0] == 0
    stopped = contents(tmp_path / "s")
    assert oculi_here("job", str(written(SWEEP, *changes, ("{tmp}/s", "{tmp}/whole"))))[0] == 0
    assert stopped == contents(tmp_path / "whole") and len(stopped) == 13


def test_two_tasks_of_slurm_share_the_chunks(oculi_here, written, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    path = written(CAPTURE)
    common = dict(SLURM_JOB_ID="1", SLURM_STEP_NODELIST="localhost", SLURM_NTASKS="2", JAX_COORDINATOR_PORT=port)
    first, second = (started(path, **common, SLURM_PROCID=str(n), SLURM_LOCALID=str(n)) for n in range(2))
    with first, second:
        out = [process.communicate() for process in (first, second)]
    assert first.returncode == second.returncode == 0, out
    assert "on each of 2 hosts" in out[0][0] and "all written." in out[0][0] and "chunks" not in out[1][0]
    shared = contents(tmp_path / "s")
    assert oculi_here("job", str(written(CAPTURE, ("{tmp}/s", "{tmp}/whole"))))[0] == 0
    assert shared == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 1),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, 1),  # a script of sbatch, or a shell of salloc
        ({"OMPI_COMM_WORLD_SIZE": "3"}, 3),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, 4),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),
    ],
)
def test_how_many_processes_there_are(
    environment: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "TPU_"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert n_expected() == expected


def test_processes_that_cannot_be_joined_are_said(oculi_here, written, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    monkeypatch.setattr("jax.distributed.initialize", lost)
    code, _, error = oculi_here("job", str(written(CAPTURE)))
    assert code == 2 and "one of 3 processes" in error and "coordinator_address should be defined." in error


def test_a_mesh_is_of_one_host_or_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = jax.devices()[:4]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "local_devices", lambda: devices[:2])
    for asked, found in ((jobfile.Mesh(1, 2), devices[:2]), (jobfile.Mesh(2, 2), devices)):
        mesh = job._mesh(asked)
        assert mesh.devices.ravel().tolist() == found and mesh.shape == {"data": asked.data, "model": asked.model}
    with pytest.raises(ValueError, match="3 × 1 devices, and this host has 2, and all hosts 4"):
        job._mesh(jobfile.Mesh(3, 1))
