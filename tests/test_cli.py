"""`oculi heads`, `attribute` and `generate`: what they print and draw, and interventions written in one line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from oculi_jax import generate
from oculi_jax.cli.interventions import KINDS, parse
from oculi_jax.intervention import Ablation, HeadAblation, KScaler, QScaler, SpectraScaler
from oculi_jax.models.llama import LlamaAttentionAdapter

from .prompts import FRANCE, IOI
from .test_real import oculi


def test_a_line_is_an_intervention() -> None:
    lines = {
        "spectra:layer=15,head=5,alpha=2.5": SpectraScaler(15, 5, 2.5),
        "head: layer = 3 , head = 0": HeadAblation(3, 0),
        "queries:head=1,layer=2,alpha=-1e-1": QScaler(2, 1, -0.1),
        "keys:layer=2,kv_head=1,alpha=0": KScaler(2, 1, 0.0),
        "ablate:site=mlp_out,layer=7": Ablation("mlp_out", 7),
        "ablate:site=act,layer=7,index=11": Ablation("act", 7, 11),
        "ablate:site=final_norm,index=3": Ablation("final_norm", None, 3),
    }
    for line, want in lines.items():
        found = parse(line)
        assert type(found) is type(want) and vars(found) == vars(want)
    assert {type(parse(line)) for line in lines} == set(KINDS.values())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("spectr:layer=1", "no kind 'spectr'. Did you mean 'spectra'?"),
        ("", "no kind ''"),
        ("spectra", "layer, head, alpha is missing; write spectra:layer=…,head=…,alpha=…"),
        ("spectra:layer=15,head=5,beta=2", "'beta=2' is not one of layer=…, head=…, alpha=…"),
        ("spectra:layer=1.5,head=5,alpha=2", "layer is '1.5', and an integer is needed"),
        ("spectra:layer=1,head=5,alpha=x", "alpha is 'x', and a number is needed"),
        ("spectra:layer=1,head=5,alpha=nan", "a finite number is needed"),
        ("head:layer=1,layer=2", "layer is given twice"),
        ("ablate:site=patern,layer=1", "did you mean 'pattern'"),
        ("head:layer,head=1", "'layer' is not one of"),
    ],
)
def test_a_line_that_is_none_says_why(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(line)


def png(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)


@pytest.mark.real
def test_oculi_heads(directory: Path, tmp_path: Path) -> None:
    run = oculi("heads", "--model", str(directory), "-o", str(tmp_path / "heads.png"), cache=tmp_path)
    assert run.returncode == 0, run.stderr
    rows = {line.split()[0]: line for line in run.stdout.splitlines() if line.strip()}
    # The heads that Hugging Face's patterns on repeated random tokens name; the scores come from tests/test_circuits.py's.
    assert re.search(r"induction +\d+ +L18H6 0\.[89]\d ± 0\.0\d, L17H3", rows["induction"])
    assert re.search(r"previous_token +\d+ +L16H0 0\.8\d ± 0\.0\d, L11H1", rows["previous_token"])
    counts = [int(row.split()[1]) for name, row in rows.items() if name in ("previous_token", "induction", "bos", "duplicate_token", "recent", "local", "uniform", "unknown")]  # fmt: skip
    assert len(counts) == 8 and sum(counts) == 270
    assert png(tmp_path / "heads.png").std() > 0.05


@pytest.mark.real
def test_oculi_attribute(directory: Path, tmp_path: Path) -> None:
    arguments = ("--target", " Mary", "--versus", " John", "-m", str(directory), "-o", str(tmp_path / "parts.svg"))
    run = oculi("attribute", IOI.format("John"), *arguments, cache=tmp_path)
    assert run.returncode == 0, run.stderr
    difference = re.search(r"logit of ' Mary' − logit of ' John' after .*: \+(6\.1\d+)", run.stdout)
    assert difference and abs(float(difference[1]) - 6.120) < 2e-3  # Hugging Face's
    missed = re.search(r"all parts together miss the logit by (\S+)\.\n", run.stdout)
    assert missed and abs(float(missed[1])) < 6e-3
    assert re.search(r"^L23H3 +\+2\.8", run.stdout, re.M)
    assert "<svg" in (tmp_path / "parts.svg").read_text()


@pytest.mark.real
def test_oculi_generate(directory: Path, adapter: LlamaAttentionAdapter, tmp_path: Path) -> None:
    lines = ("--intervene", "ablate:site=mlp_out,layer=0", "--intervene", "head:layer=17,head=3")
    run = oculi(
        "generate", FRANCE, *lines, "-n", "8", "-m", str(directory), "-o", str(tmp_path / "texts.png"), cache=tmp_path
    )
    assert run.returncode == 0, run.stderr
    ids = adapter.tokenizer.encode(FRANCE)
    plain, changed = (
        adapter.tokenizer.decode(np.asarray(generate(adapter.model, ids, 8, items)))
        for items in ((), [Ablation("mlp_out", 0), HeadAblation(17, 3)])
    )
    shown = re.sub(r"\s+", "", run.stdout)
    assert re.sub(r"\s+", "", plain)[:6] in shown and changed != plain
    assert f"part at new token 0: {adapter.tokenizer.decode([ids_of(adapter, ids, ())])!r}" in run.stdout
    assert png(tmp_path / "texts.png").std() > 0.05


def ids_of(adapter: LlamaAttentionAdapter, ids: list[int], interventions: tuple) -> int:
    return int(generate(adapter.model, ids, 1, interventions)[0])


@pytest.mark.real
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["heads", "-m", "{}", "-o", "{tmp}/x.jpg"], "must end in .png, .svg, .pdf"),
        (["attribute", "x", "--target", "Parisien", "-m", "{}"], "'Parisien' is not one token"),
        (["generate", "x", "-m", "{}", "-i", "head:layer=40,head=0"], "there are 30 layers"),
        (["generate", "x", "-m", "{}", "--top-p", "0.5"], "temperature is 0, which is greedy"),
    ],
)
def test_mistakes_are_one_line_and_code_2(
    directory: Path, tmp_path: Path, oculi_here, arguments: list[str], message: str
) -> None:
    code, out, err = oculi_here(*(a.replace("{tmp}", str(tmp_path)).replace("{}", str(directory)) for a in arguments))
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert not list(tmp_path.iterdir()) and out == ""
