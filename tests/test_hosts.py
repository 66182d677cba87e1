"""Models on devices of two processes: everything gives on each of them what it gives on one device."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from oculi_jax import data, from_pretrained
from oculi_jax.models.decoder.parameters import parameter_table

from . import hosts
from .tiny import tiny_config, tiny_llama

CLOSE = 1e-5  # of the largest value: two devices add up the halves of a product


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where two hosts of two devices each have written what every function gives."""
    path = tmp_path_factory.mktemp("hosts")
    tiny_llama(**hosts.KIND).save_pretrained(path / "model")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = re.sub(r"(device_count)=\d+", r"\1=2", os.environ["XLA_FLAGS"])
    command = [sys.executable, "-m", "tests.hosts", str(path)]
    env = {**os.environ, "XLA_FLAGS": flags}
    root = Path(__file__).parents[1]
    with ExitStack() as stack:
        files = [stack.enter_context(open(path / f"{host}.log", "w+", encoding="utf8")) for host in range(2)]
        started = [
            subprocess.Popen([*command, str(host), str(port)], cwd=root, env=env, stdout=file, stderr=file)
            for host, file in enumerate(files)
        ]
        for process in started:
            stack.callback(process.kill)
        for process, file in zip(started, files, strict=True):
            assert process.wait(900) == 0, file.seek(0) or file.read()[-3000:]
        hosts.OUT[:] = [path]
        yield path


@pytest.fixture(scope="module")
def one_device(directory: Path) -> Callable[[str], list[np.ndarray]]:
    """What a function gives on one device."""
    model = from_pretrained(directory / "model")
    return cache(lambda name: hosts.leaves(name, model))


@pytest.mark.parametrize(
    ("split", "name"), [("data", name) for name in hosts.FUNCTIONS] + [("model", name) for name in hosts.MODEL_SPLIT]
)
def test_two_hosts_give_what_one_device_does(
    split: str, name: str, directory: Path, one_device: Callable[[str], list[np.ndarray]]
) -> None:
    for host in range(2):
        why = directory / f"{split}-{name}-{host}.txt"
        assert not why.exists(), why.read_text(encoding="utf8")
        with np.load(directory / f"{split}-{name}-{host}.npz") as file:
            found = [file[key] for key in file.files]
        want = one_device(name)
        assert len(found) == len(want) > 0
        for ours, theirs in zip(found, want, strict=True):
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            if np.issubdtype(theirs.dtype, np.inexact):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=CLOSE * np.nanmax(np.abs(theirs), initial=1))
            else:
                np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("split", ["data", "model"])
def test_each_host_reads_what_lies_on_its_devices(split: str, directory: Path) -> None:
    config = tiny_config(**hosts.KIND)
    for host in range(2):
        read = json.loads((directory / f"{split}-{host}.json").read_text(encoding="utf8"))
        for row in parameter_table(config):
            share = 2 if split == "model" and any(letter in "HKFV" for letter in row.axes) else 1
            assert read[row.name] * share == np.prod(row.shape), row.name


def test_a_job_of_two_hosts_goes_on_with_one(directory: Path, one_device: Callable[[str], list[np.ndarray]]) -> None:
    """Each host has written its own chunks, and each of these is whole: one that is gone is made anew, where the model is whole."""
    one_device("jobs")
    files = sorted((directory / "jobs" / "map").glob("part-*"))
    assert len(files) == 5
    want = np.array(data.Store.open(directory / "alone" / "map")["values"])
    files[3].unlink()
    (directory / "alone").rename(directory / "before")
    (directory / "jobs").rename(directory / "alone")
    again = hosts.leaves("jobs", from_pretrained(directory / "model"))[0]
    np.testing.assert_allclose(again, want, rtol=0, atol=CLOSE * np.abs(want).max())
    assert sorted(path.name for path in (directory / "alone" / "map").glob("part-*")) == [path.name for path in files]
