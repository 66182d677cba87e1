"""The axes that the core's annotations name, checked by beartype wherever the core is traced."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
CHECKED = ("backends.jax", "models.decoder.rope", "models.decoder.model", "intervention.edit")
FILES = ("axes.py", "test_forward_laws.py", "test_generate.py", "test_language.py", "test_sweep.py")


def test_the_core_keeps_the_axes_that_it_names() -> None:
    """Quick tests of JAX in a process of their own, since the checks make all tracing a third slower."""
    packages = ",".join(f"oculi_jax.{name}" for name in CHECKED)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "-m",
        "quick and not torch",
        f"--jaxtyping-packages={packages},beartype.beartype",
    ]
    done = subprocess.run(
        [*command, *(str(TESTS / name) for name in FILES)], cwd=TESTS.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "passed" in done.stdout
