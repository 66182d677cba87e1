"""Whole data sets: each row's results are its single run's, whatever it ran beside, and a second start does what is missing."""

from __future__ import annotations

import datetime
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from oculi_jax import CaptureSpec, data, forward, sweep
from oculi_jax.intervention import Ablation, HeadAblation, Steer
from oculi_jax.metrics import logit_difference
from oculi_jax.utils.progress import Pace

from . import slow_job

TEXTS = ["The capital of Italy is", "Rome", "When Mary and John met at the park, John gave a ring to", "Paris is in"]
MANY = [TEXTS[i * i % 4] + " a" * (i % 3) for i in range(23)]
CAPTURE = ("resid_post", CaptureSpec("z", [1, 3], [-1]), "final_norm")
LATE = HeadAblation(np.arange(2, 4)[:, None], np.arange(6))


def scaled(model, batch, by):
    return batch.mask.sum(axis=1)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("backend", ["jax", pytest.param("torch", marks=pytest.mark.torch)])
def test_captures_are_those_of_single_runs(embedded, backend: str, request, tmp_path: Path) -> None:
    model, tokenizer = embedded
    ours = model if backend == "jax" else request.getfixturevalue("hf_trained")
    change = Steer(1, np.ones(192, np.float32), 2.0, positions=[1])
    store = data.capture_dataset(
        ours, MANY, CAPTURE, tmp_path / "s", interventions=change, tokenizer=tokenizer, chunk_size=10, progress=False
    )
    assert store.names == ("final_norm", *(f"resid_post.{n}" for n in range(4)), "z.1", "z.3") and not store.missing
    for number in (0, 2, 9, 10, 21, 22):
        ids = np.array(tokenizer.encode(MANY[number]))
        alone = forward(model, ids, change, capture=CAPTURE, logits="none")
        assert (store.ids[number] == ids).all()
        for layer in range(4):
            np.testing.assert_allclose(store["resid_post", layer][number], alone["resid_post"][layer], atol=2e-4)
        np.testing.assert_allclose(store["z", 3][number], alone["z"][1], atol=1e-4)
        np.testing.assert_allclose(store["final_norm"][number], alone["final_norm"], atol=2e-4)


def test_a_function_gets_columns_and_its_tokens_are_kept_as_they_are_named(embedded, tmp_path: Path) -> None:
    model, tokenizer = embedded
    clean, other = (
        ("When Mary and John met, John gave a ring to", "When Mary and John met, Mary gave a ring to"),
        TEXTS[:2],
    )
    answers = [tokenizer.encode(f" {name}", add_special_tokens=False)[-1] for name in ("Mary", "John")]
    rows = [
        {
            "clean": clean[i % 2],
            "second": other[i % 2],
            "answer": answers[i % 2],
            "other": answers[1 - i % 2],
            "share": i / 4,
        }
        for i in range(7)
    ]

    @jax.jit
    def stream(model, tokens, mask):
        run = jax.vmap(lambda ids, real: forward(model, ids, mask=real, capture="embed", logits="none")["embed"])
        return run(tokens, mask)

    def fn(model, batch):
        metric = logit_difference(batch["answer"], batch["other"])
        assert batch["second"].shape == batch["clean"].shape == batch.tokens.shape
        return {
            "heads": sweep(model, batch.tokens, LATE, metric, mask=batch.mask),
            "own": (stream(model, batch.tokens, batch.mask), batch["share"]),
            "second": batch.mask_of("second").sum(axis=1),
            "turned": np.moveaxis(np.asarray(stream(model, batch.tokens, batch.mask)), 1, 2),
        }

    store = data.map_dataset(
        model, rows, fn, tmp_path / "s", tokenizer=tokenizer, tokens={"own.0": 1, "turned": 2}, chunk_size=4
    )
    assert store.names == ("heads", "own.0", "own.1", "second", "turned")
    assert np.array(store["own.1"]).tolist() == [i / 4 for i in range(7)]
    assert np.array(store["second"]).tolist() == [len(tokenizer.encode(other[i % 2])) for i in range(7)]
    for number in (0, 3, 6):
        ids = np.array(tokenizer.encode(clean[number % 2]))
        metric = logit_difference(rows[number]["answer"], rows[number]["other"])
        np.testing.assert_allclose(store["heads"][number], sweep(model, ids, LATE, metric), atol=1e-4)
        embed = np.asarray(forward(model, ids, capture="embed")["embed"])
        np.testing.assert_array_equal(store["own.0"][number], embed)
        np.testing.assert_array_equal(store["turned"][number], embed)


def test_sums_are_those_of_single_runs(embedded) -> None:
    model, tokenizer = embedded

    def last(model, batch):
        spec = CaptureSpec("resid_post", [2], [-1])
        run = jax.vmap(lambda ids, mask: forward(model, ids, mask=mask, capture=spec)["resid_post"][0, 0])
        return {"stream": run(batch.tokens, batch.mask), "n": np.ones(len(batch.rows), int)}

    found = data.sum_dataset(model, MANY, last, tokenizer=tokenizer)
    alone = [forward(model, tokenizer.encode(text), capture="resid_post")["resid_post"][2, -1] for text in MANY]
    np.testing.assert_allclose(found["stream"], np.sum(np.asarray(alone, np.float64), axis=0), rtol=1e-4, atol=1e-3)
    assert found["n"] == 23 and found["stream"].dtype == np.float64


def test_sums_go_on_from_their_file(embedded, tmp_path: Path) -> None:
    """Of three chunks: stopped in the second one by an error, and after it by Ctrl-C."""
    model, _ = embedded
    rows, seen = [[1, 2 + i % 500] for i in range(1100)], []
    path = tmp_path / "sums.safetensors"

    def fn(model, batch):
        seen.append(int(batch.rows[0]) // 512)
        if seen[-1] == fails:
            raise RuntimeError("stopped")
        if seen[-1] == interrupts:
            os.kill(os.getpid(), signal.SIGINT)
        return batch.tokens[:, 1].astype(np.float32), {"n": np.ones(len(batch.rows))}

    run = functools.partial(data.sum_dataset, model, rows, fn, file=path, progress=False)
    fails, interrupts = 1, None
    with pytest.raises(RuntimeError, match="stopped"):
        run()
    seen.clear()
    fails, interrupts = None, 1
    with pytest.raises(KeyboardInterrupt):
        run()
    assert set(seen) == {1}  # the first is there, and the third was not begun
    seen.clear()
    interrupts = None
    total, found = run()
    assert set(seen) == {2}
    want = sum(row[1] for row in rows)
    assert total == want and found["n"] == 1100 and total.dtype == np.float64 and list(tmp_path.iterdir()) == [path]
    before = path.read_bytes()
    again, _ = run()
    assert again == want and path.read_bytes() == before
    assert load_file(path)["1.n"] == 1100
    with pytest.raises(ValueError, match="holds the sums of another job: .*n_rows is 1100 there, and 1099 here"):
        data.sum_dataset(model, rows[:-1], fn, file=path)
    with pytest.raises(ValueError, match=r"about\.by is None there, and 2 here"):
        run(about={"by": 2})
    path.write_bytes(before[:-1])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        run()


def test_a_second_start_does_what_is_missing_or_damaged_and_comes_to_the_same_bytes(embedded, tmp_path: Path) -> None:
    model, tokenizer = embedded
    asked: list[tuple[int, int]] = []
    run = functools.partial(
        data.capture_dataset, model, MANY, CAPTURE, tmp_path / "s", tokenizer=tokenizer, chunk_size=5,
        progress=lambda *at: asked.append(at),
    )  # fmt: skip
    store = run()
    whole = contents(tmp_path / "s")
    assert len(whole) == 6 and asked[-1] == (23, 23) and repr(store).startswith("Store(23 of 23 rows")
    (tmp_path / "s" / "part-000000.safetensors").unlink()
    assert data.Store.open(tmp_path / "s").missing == (0,)
    with pytest.raises(IndexError, match="Chunk 0 of .* is not written yet"):
        data.Store.open(tmp_path / "s")["resid_post", 2][3]
    damaged, cut = (tmp_path / "s" / f"part-00000{n}.safetensors" for n in (2, 4))
    flipped = bytearray(whole[damaged.name])
    flipped[-1000] ^= 1
    damaged.write_bytes(flipped)
    cut.write_bytes(whole[cut.name][:-1])
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    from oculi_jax.utils.files import _HOST

    left = (
        tmp_path / "s" / f".part-000000.safetensors.{_HOST}.{dead.stdout.strip()}.abc.part"
    )  # of a process that was killed
    left.mkdir()
    with pytest.raises(ValueError, match="part-000002.safetensors' is damaged"):
        data.Store.open(tmp_path / "s").check()
    with pytest.warns(UserWarning) as warned:
        run()
    assert [("is damaged" in str(w.message), "was cut off" in str(w.message)) for w in warned] == [
        (True, False),
        (False, True),
    ]
    assert contents(tmp_path / "s") == whole
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()}
    run().check()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()} == before  # nothing was done again


def test_a_directory_of_another_job_is_refused_with_what_differs(embedded, tmp_path: Path) -> None:
    model, tokenizer = embedded

    def ones(model, batch):
        return np.ones(len(batch.rows))

    run = functools.partial(data.map_dataset, model, fn=ones, directory=tmp_path / "s", tokenizer=tokenizer)
    run(TEXTS, about={"threshold": 1})
    for message, options in {
        "about.threshold is 1 there, and 2 here": dict(dataset=TEXTS, about={"threshold": 2}),
        "n_rows is 4 there, and 3 here": dict(dataset=TEXTS[:3], about={"threshold": 1}),
        "data is .* there, and .* here": dict(dataset=[*TEXTS[:3], "Berlin"], about={"threshold": 1}),
        "chunk_size is 512 there, and 3 here": dict(dataset=TEXTS, about={"threshold": 1}, chunk_size=3),
        "function.* there": dict(
            dataset=TEXTS, about={"threshold": 1}, fn=lambda model, batch: np.ones(len(batch.rows))
        ),
    }.items():
        with pytest.raises(ValueError, match=f"holds the results of another job: .*{message}"):
            run(**options)
    with pytest.raises(ValueError, match="capture is None there"):
        data.capture_dataset(model, TEXTS, "resid_post", tmp_path / "s", tokenizer=tokenizer)
    other = jax.tree.map(lambda x: x * 1.01, model)
    with pytest.raises(ValueError, match=r"model\.weights is"):
        data.map_dataset(other, TEXTS, ones, tmp_path / "s", tokenizer=tokenizer, about={"threshold": 1})
    with pytest.raises(ValueError, match=r"have axes \[4\] of a sweep"):
        data.capture_dataset(
            model,
            TEXTS,
            "mlp_out",
            tmp_path / "t",
            interventions=Ablation("mlp_out", np.arange(4)),
            tokenizer=tokenizer,
        )
    assert not (tmp_path / "t").exists()
    bound = data.map_dataset(model, TEXTS, functools.partial(scaled, by=object()), tmp_path / "u", tokenizer=tokenizer)
    assert bound.about["function"]["bound"] == {"by": "<object object>"}
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"is not empty, and holds no results of a job: thesis\.tex"):
        data.map_dataset(model, TEXTS, ones, tmp_path / "own", tokenizer=tokenizer)
    with pytest.raises(FileExistsError, match="Cannot make the directory"):
        data.map_dataset(model, TEXTS, ones, tmp_path / "own" / "thesis.tex", tokenizer=tokenizer)


def started(directory: Path, *options: object) -> subprocess.Popen[str]:
    """A process with a job of so many rows, two in a chunk, that takes so many seconds for each."""
    command = [sys.executable, "-m", "tests.slow_job", directory, *map(str, options)]
    root = Path(__file__).parents[1]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_it_ends_after_the_chunk_at_hand_when_it_is_asked_to(number: int, tmp_path: Path) -> None:
    with started(tmp_path / "s", 20, 0.5) as process:
        assert process.stdout is not None and process.stdout.readline() == process.stdout.readline() == "chunk\n"
        process.send_signal(number)
        out, error = process.communicate()
    assert process.returncode == (-signal.SIGINT if number == signal.SIGINT else 128 + signal.SIGTERM)
    assert "ends after the chunk at hand; the same call does the rest." in error and "done" not in out
    n_done = 2 + out.count("chunk")  # the second was at hand, or on a busy machine one that came after it
    assert len(data.Store.open(tmp_path / "s").missing) == 10 - n_done > 0
    parts = [f"part-{n:06}.safetensors" for n in range(n_done)]
    assert list(contents(tmp_path / "s")) == ["index.json", *parts]


def test_killed_at_any_moment_it_comes_to_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """OCULI_KILLS: how often; twenty are what is promised."""
    slow_job.run(tmp_path / "whole", 24)
    rng, kills = np.random.default_rng(0), int(os.environ.get("OCULI_KILLS", "2"))
    for _ in range(kills):
        with started(tmp_path / "s", 24, 0.05) as process:
            assert (
                process.stdout is not None and process.stdout.readline()
            )  # the first chunk that is missing, if any is
            time.sleep(float(rng.uniform(0, 0.04)))
            process.kill()
    slow_job.run(tmp_path / "s", 24)
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_two_hosts_killed_and_restarted_write_what_one_does(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def hosts(seconds: float) -> list[subprocess.Popen[str]]:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        return [started(tmp_path / "s", 12, seconds, f"--host={n}", f"--port={port}") for n in range(2)]

    first, second = hosts(0.5)
    with first, second:
        for process in (first, second):
            assert process.stdout is not None and "chunk\n" in process.stdout  # each has one at hand
        for process in (first, second):
            process.kill()
    there = 6 - len(data.Store.open(tmp_path / "s").missing)
    assert there < 6
    first, second = hosts(0)
    with first, second:
        out = [process.communicate()[0].count("chunk") for process in (first, second)]
    assert sum(out) == 6 - there and max(out) <= 3 and first.returncode == second.returncode == 0
    slow_job.run(tmp_path / "whole", 12)
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")
    want = sum(1 / (3 + 2 * i) for i in range(1100))
    for n in range(2):  # the whole on every host
        np.testing.assert_allclose(np.load(f"{tmp_path / 's'}-{n}.npy"), want, rtol=1e-6)
    kept = [load_file(tmp_path / f"s-{n}-of-2.safetensors")["values"] for n in range(2)]  # each host's own
    np.testing.assert_allclose(sum(kept), want, rtol=1e-6)
    assert kept[0] > kept[1] > 0  # two chunks, and one


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no file's size")
def test_a_full_disk_is_a_sentence_and_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with started(tmp_path / "s", 6, 0, "--most-bytes=20000") as process:
        error = process.communicate()[1]
    assert process.returncode == 1 and "part-000000.safetensors'" in error, error
    assert "0 of 3 chunks are there; the same call does the rest." in error, error
    assert list(contents(tmp_path / "s")) == ["index.json"]
    slow_job.run(tmp_path / "s", 6)
    slow_job.run(tmp_path / "whole", 6)
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_directories_that_cannot_be_written_are_said(embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so what a read-only file system says is said by hand."""
    import errno
    import tempfile

    model, _ = embedded
    n_done = 0

    def vanishing(model, batch):
        nonlocal n_done
        n_done += 1
        if n_done == 2:
            (tmp_path / "s" / "part-000000.safetensors").unlink()
            (tmp_path / "s" / "index.json").unlink()
            (tmp_path / "s").rmdir()
        return np.ones(len(batch.rows))

    run = functools.partial(data.map_dataset, model, [[1], [2], [3]], vanishing, chunk_size=1)
    with pytest.raises(FileNotFoundError, match="there is no directory '.*s'. 0 of 3 chunks are there; the same call"):
        run(tmp_path / "s")
    assert not (tmp_path / "s").exists()
    assert not run(tmp_path / "s").missing

    def refused(*_: object, dir: Path, **__: object) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))

    monkeypatch.setattr(tempfile, "mkdtemp", refused)
    for where, name in (("s", "part-000001.safetensors"), ("t", "index.json")):
        (tmp_path / "s" / "part-000001.safetensors").unlink(missing_ok=True)
        with pytest.raises(OSError, match=f"Cannot write '.*{name}': Read-only file system"):
            run(tmp_path / where)
    with pytest.raises(OSError, match="Cannot write '.*x.safetensors': Read-only file system"):
        data.sum_dataset(model, [[1]], vanishing, file=tmp_path / "x.safetensors")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no file's size")
def test_a_disk_without_room_for_the_index_is_a_sentence(tmp_path: Path) -> None:
    with started(tmp_path / "s", 6, 0, "--most-bytes=100") as process:
        error = process.communicate()[1]
    assert process.returncode == 1 and re.search("Cannot write '.*index.json': File too large", error), error
    assert list((tmp_path / "s").iterdir()) == []


def test_a_store_is_read_without_this_library(embedded, tmp_path: Path) -> None:
    model, tokenizer = embedded
    store = data.capture_dataset(model, MANY, "mlp_out", tmp_path / "s", tokenizer=tokenizer, chunk_size=8)
    parts = [load_file(path) for path in sorted((tmp_path / "s").glob("part-*.safetensors"))]
    assert json.loads((tmp_path / "s" / "index.json").read_text())["n_rows"] == 23
    begins = [np.diff(part["offsets"]) for part in parts]
    assert np.concatenate(begins).tolist() == [len(tokenizer.encode(text)) for text in MANY]
    whole = np.concatenate([part["mlp_out.2"] for part in parts])
    np.testing.assert_array_equal(whole, store["mlp_out", 2].tokens())
    np.testing.assert_array_equal(np.concatenate([part["ids"] for part in parts]), store.ids.tokens())
    some = store["mlp_out", 2].tokens([22, 3])
    np.testing.assert_array_equal(some, np.concatenate([store["mlp_out", 2][22], store["mlp_out", 2][3]]))
    with pytest.raises(ValueError, match="of unequal lengths"):
        np.array(store["mlp_out", 2])
    with pytest.raises(KeyError, match="Did you mean 'mlp_out"):
        store["mlp_ouch", 2]
    with pytest.raises(IndexError, match="There is no row 23"):
        store["mlp_out", 2][23]

    trained = store["mlp_out", 2].batches(10, key=3)
    seen = np.concatenate([next(trained) for _ in range(len(whole) // 10 + 1)])
    first = sorted(row.tobytes() for row in seen[: len(whole)])
    assert first == sorted(row.tobytes() for row in whole)  # each once before any twice
    again = store["mlp_out", 2].batches(10, key=3, start=4)
    np.testing.assert_array_equal(next(again), seen[40:50])
    assert (next(store["mlp_out", 2].batches(10, key=4)) != seen[:10]).any()


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100, 1000])
def test_an_order_is_a_permutation_over_all_hosts_and_another_each_time_through(n: int) -> None:
    hosts = [data.order(n, 5, key=1, host=host, n_hosts=3) for host in range(3)]
    drawn = np.concatenate([next(hosts[host]) for _ in range(2 * n // 15 + 2) for host in range(3)])
    assert sorted(drawn[:n]) == sorted(drawn[n : 2 * n]) == list(range(n))
    if n >= 100:
        assert (drawn[:n] != drawn[n : 2 * n]).mean() > 0.9 and (drawn[:n] != np.arange(n)).mean() > 0.9
        # As far from where it was as a random one: a third of n on average.
        assert abs(np.abs(drawn[:n] - np.arange(n)).mean() / n - 1 / 3) < 0.1


class Hub:
    """What is asked of a Hugging Face data set: a length, and a row by its number; a slice of it is a dictionary."""

    def __init__(self, rows: list[dict[str, object]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, object]:
        assert isinstance(number, int)
        return self.rows[number]


def test_every_kind_of_source_gives_the_same_rows(embedded, tmp_path: Path) -> None:
    _, tokenizer = embedded
    texts = [*TEXTS, "a\u2028b"]  # which is no end of a line
    ids = [np.array(tokenizer.encode(text)) for text in texts]
    (tmp_path / "x.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    (tmp_path / "x.jsonl").write_text(
        "\n".join(json.dumps({"text": t, "n": i}) for i, t in enumerate(texts)), encoding="utf-8"
    )
    np.save(tmp_path / "x.npy", np.arange(12).reshape(3, 4))
    named = [{"text": text, "n": i} for i, text in enumerate(texts)]
    for source in (texts, ids, named, Hub(named), tmp_path / "x.txt", str(tmp_path / "x.jsonl")):
        dataset = data.Dataset(source, tokenizer)
        rows = dataset.rows(range(len(dataset)))
        assert len(rows) == 5 and all((row[dataset.column] == own).all() for row, own in zip(rows, ids, strict=True))
        assert [row.get("n", i) for i, row in enumerate(rows)] == list(range(5))
    assert (
        data.Dataset(Hub(named), tokenizer).fingerprint() == data.Dataset(tmp_path / "x.jsonl", tokenizer).fingerprint()
    )
    mapped, array = data.Dataset(tmp_path / "x.npy"), data.Dataset(np.arange(12).reshape(3, 4))
    assert mapped.rows([2])[0]["tokens"].tolist() == [8, 9, 10, 11] and mapped.fingerprint() == array.fingerprint()
    assert array.fingerprint() != data.Dataset(np.arange(1, 13).reshape(3, 4)).fingerprint()


def test_what_is_no_data_set_is_said(embedded, tmp_path: Path) -> None:
    _, tokenizer = embedded
    for name, text in {"x.csv": "a", "bad.jsonl": "{}\n{", "x.npy": "no array"}.items():
        (tmp_path / name).write_text(text)
    for source, message in (
        ([], "The data set is empty"),
        ({"text": TEXTS}, "a list of dictionaries, and not a dictionary of lists"),
        (tmp_path / "x.csv", "ends in .txt, .jsonl, .npy"),
        (tmp_path / "bad.jsonl", "line 2, is not JSON"),
        (tmp_path / "x.npy", "no array that NumPy can map"),
        ([{"n": 1}], "Row 0 has n, of which none is a text or ids"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            data.Dataset(source, tokenizer)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        data.Dataset(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="Did you mean 'text'"):
        data.Dataset([{"text": "a"}], tokenizer, column="txt")
    for rows, message in (
        (["a", {"text": "a"}], "Row 1 of the data set is a dictionary"),
        ([{"text": "a"}, {"other": "a"}], "Row 1 of the data set has not the columns of row 0: other, text"),
        (["a", [1.5]], "Row 1 .*float64, and a text or ids"),
        (["a", []], "Row 1 of the data set is empty"),
        (
            [{"text": "a", "n": 1}, {"text": "a", "n": "b"}],
            "Row 1 of the data set, n, is a str, and in row 0 it is a number",
        ),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            data.Dataset(rows, tokenizer).rows([0, 1])
    with pytest.raises(TypeError, match="has no tokenizer"):
        data.Dataset(["a"]).rows([0])


def test_each_host_counts_its_own_rows_from_those_that_are_there(
    embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = embedded
    told: list[tuple[int, int]] = []

    def ones(model, batch):
        return np.ones(len(batch.rows))

    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("jax.experimental.multihost_utils.sync_global_devices", lambda name: None)
    run = functools.partial(data.map_dataset, model, [[1]] * 9, ones, tmp_path / "s", chunk_size=2)
    store = run(progress=lambda *at: told.append(at))
    assert told == [(2, 4), (4, 4)] and store.missing == (0, 2, 4)
    (tmp_path / "s" / "part-000003.safetensors").unlink()
    told.clear()
    run(progress=lambda *at: told.append(at))
    assert told == [(4, 4)]


def test_a_pace_is_of_what_was_done_since_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    pace = Pace(1000, 400)
    assert str(pace) == ""
    now[0], pace.done = 110.0, 450
    assert pace.rate == 5 and str(pace).startswith("5/s, ends ")
    end = datetime.datetime.now() + datetime.timedelta(seconds=(1000 - 450) / 5)
    assert abs(datetime.datetime.strptime(str(pace)[-5:], "%H:%M").minute - end.minute) in (0, 1, 59)
    pace.total = 10**6
    assert re.fullmatch(r"5/s, ends \w+ \d\d \w+ \d\d:\d\d", str(pace))  # another day
