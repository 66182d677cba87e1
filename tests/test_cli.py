"""`oculi heads`, `attribute`, `generate`, `capture`, `sites`, `store`: what they print and draw, and interventions written in one line."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import oculi_jax
from oculi_jax import SITES, data, forward, generate, load
from oculi_jax.analysis import CircuitDetection
from oculi_jax.cli.interventions import KINDS, parse
from oculi_jax.cli.without import Logits
from oculi_jax.diagnostics import head_scores
from oculi_jax.embedded import embedded_directory
from oculi_jax.intervention import Ablation, HeadAblation, KScaler, QScaler, SpectraScaler, Steer
from oculi_jax.models.llama import LlamaAttentionAdapter

from .margins import assert_leads
from .prompts import FRANCE, IOI
from .tiny import BASE
from .tolerances import ROUTES


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
    made = {type(parse(line)) for line in lines} | {Steer}  # whose direction is in a file
    assert {kind.__name__ for kind in made} == {name for name, _, _ in KINDS.values()}


def test_the_fields_of_a_line_are_those_of_the_classes() -> None:
    """Numbers and names; a direction is a file, and other arrays cannot be written in a line."""
    said_by_files = {"Steer": {"layer"}}
    for name, needed, optional in KINDS.values():
        fields = [f for f in dataclasses.fields(getattr(oculi_jax, name)) if f.name not in ("replacement", "positions")]
        named = [f.name.replace("vector", "file") for f in fields]
        assert sorted(named) == sorted((*needed, *optional))
        without = {n for n, f in zip(named, fields, strict=True) if f.default is dataclasses.MISSING}
        assert without - said_by_files.get(name, set()) == set(needed)


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


def test_oculi_heads(trained: LlamaAttentionAdapter, tmp_path: Path, oculi_here) -> None:
    code, out, err = oculi_here("heads", "-o", str(tmp_path / "heads.png"))
    assert code == 0, err
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    scores = head_scores(trained.model)  # which tests/test_circuits.py compares with Hugging Face's patterns
    for name in ("induction", "previous_token"):
        assert_leads(np.ravel(getattr(scores, name)))
        (layer, head, value, _), *_ = scores.top(name, 1)
        said = re.search(rf"{name} +\d+ +L{layer}H{head} (\d\.\d\d) ± 0\.\d\d", rows[name])
        assert said and abs(float(said[1]) - value) < 5e-3 + ROUTES
    counts = [int(row.split()[1]) for name, row in rows.items() if name in ("previous_token", "induction", "bos", "duplicate_token", "recent", "local", "uniform", "unknown")]  # fmt: skip
    assert len(counts) == 8 and sum(counts) == 24
    assert png(tmp_path / "heads.png").std() > 0.05


def test_oculi_attribute(trained: LlamaAttentionAdapter, tmp_path: Path, oculi_here) -> None:
    text = IOI.format("John")
    code, out, err = oculi_here(
        "attribute", text, "--target", "Mary", "--against", "John", "-o", str(tmp_path / "x.svg")
    )
    assert code == 0, err
    logits = forward(trained.model, trained.tokenizer.encode(text), logits="last").logits
    want = float(logits[trained.to_single_token("Mary")] - logits[trained.to_single_token("John")])
    difference = re.search(r"logit of 'Mary' − logit of 'John' after .*: \+(\S+)", out)
    assert difference and abs(float(difference[1]) - want) < 2e-3
    missed = re.search(r"all parts together miss the logit by (\S+)\.\n", out)
    assert missed and abs(float(missed[1])) < 6e-3
    parts = [float(value) for value in re.findall(r"^(?:L\d\S*|\w+) +([+-]\d+\.\d+)", out, re.M)]
    assert len(parts) >= 5 and abs(parts[0]) == max(map(abs, parts)) > 0.5
    assert "<svg" in (tmp_path / "x.svg").read_text()


def test_oculi_attribute_says_what_is_lost_without_each_part(trained: LlamaAttentionAdapter, oculi_here) -> None:
    """Beside what it adds: a forward pass with that head, or that MLP, set to zero."""
    ids, paris = trained.tokenizer.encode(FRANCE), trained.to_single_token("Paris")
    given = ("attribute", FRANCE, "--target", "Paris", "--top", "5")
    found = strict(oculi_here(*given, "--verify", "4", "--json")[1])
    entries = found["verification"]["entries"]
    assert [entry["top"] for entry in entries] == [True] * 5 + [False] * 4

    def logit(*items: HeadAblation | Ablation) -> float:
        return float(forward(trained.model, ids, items, logits="last").logits[paris])

    for entry in entries:
        layer, kind = re.fullmatch(r"L(\d)(?: MLP|H(\d))", entry["part"]).groups()
        part = Ablation("mlp_out", int(layer)) if kind is None else HeadAblation(int(layer), int(kind))
        adds = found["mlps"][int(layer)] if kind is None else found["heads"][int(layer)][int(kind)]
        assert entry["estimate"] == pytest.approx(adds) and abs(entry["exact"] - (logit() - logit(part))) < 1e-3
    out = oculi_here(*given, "--verify", "4")[1]
    assert re.search(r"9 runs, of these 5 and of 4 others drawn at\s+random", out)
    for entry in entries[:5]:  # those that are shown
        row = re.search(rf"^{entry['part']} +(\S+) +(\S+)", out, re.M)
        assert row and abs(float(row[1]) - entry["estimate"]) < 2e-3 and abs(float(row[2]) - entry["exact"]) < 2e-3
    silent = strict(oculi_here(*given, "--verify", "0", "--json")[1])
    assert "verification" not in silent and "lost" not in oculi_here(*given, "--verify", "0")[1]


def test_a_logit_that_a_family_caps_is_taken_before_its_cap() -> None:
    x = np.random.default_rng(0).normal(0, 15, (3, 61)).astype(np.float32)
    out = oculi_jax.Output(30 * np.tanh(x / 30), {}, np.zeros(0, np.int32), None)
    for ids, wanted in (([3, 17], x[-1, 3] - x[-1, 17]), ([3], x[-1, 3])):
        assert abs(float(Logits((-1,), np.array(ids, np.int32), 30.0)(out)) - wanted) < 1e-3


def test_oculi_generate(trained: LlamaAttentionAdapter, tmp_path: Path, oculi_here) -> None:
    given = ("--intervene", "ablate:site=mlp_out,layer=0", "--intervene", "head:layer=1,head=3")
    code, out, err = oculi_here("generate", FRANCE, *given, "-n", "8", "-o", str(tmp_path / "texts.png"))
    assert code == 0, err
    ids = trained.tokenizer.encode(FRANCE)
    texts = []
    for items in ((), [Ablation("mlp_out", 0), HeadAblation(1, 3)]):
        new = np.asarray(generate(trained.model, ids, 8, items, capture="final_norm")[0])  # as the command reads it
        # That the best token leads at every step, so that every way to decode takes the same ones.
        assert_leads(forward(trained.model, [*ids, *new.tolist()], items).logits[len(ids) - 1 : -1])
        texts.append(trained.tokenizer.decode(new))
    plain, changed = texts
    assert plain.startswith("Paris. ") and changed != plain
    assert re.search(r"^The capital of France is Paris\. \w+ \w+ .*\s{2,}The capital of France is", out, re.M)
    assert "part at new token 0: ' Paris'" in out
    assert png(tmp_path / "texts.png").std() > 0.05
    runs = strict(oculi_here("generate", FRANCE, *given, "-n", "8", "--json")[1])["runs"]
    assert [run["interventions"] for run in runs] == ["plain", ", ".join(given[1::2])]
    assert runs[0]["tokens"][0] == " Paris" and len(runs[0]["probabilities"]) == len(runs[0]["tokens"]) == 8
    assert [run["text"] for run in runs] == [" " + text for text in texts]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["heads", "-o", "{tmp}/x.jpg"], "must end in .png, .svg, .pdf"),
        (["attribute", "The", "--target", "Paris in France"], "'Paris in France' is not one token"),
        (["attribute", "The", "--target", "Parisien"], "'Parisien' is not in the vocabulary"),
        (["generate", "The", "-i", "head:layer=40,head=0"], "there are 4 layers"),
        (["generate", "The", "--top-p", "0.5"], "temperature is 0, which is greedy"),
        (["lens", "x", "--model", "nowhere"], "There is no directory 'nowhere'"),
        (["lens", "The " * 200], "made for at most 128"),
        (["attribute", "The", "--target", "Mary", "--against", "Mary"], "--target and --against are both 'Mary'"),
        (["capture", "The", "--sites", "patern", "-o", "{tmp}/x"], "did you mean 'pattern'"),
        (["capture", "The", "--sites", "q", "--layers", "5", "-o", "{tmp}/x"], "[5], but this model has 4 layers"),
        (["capture", "The", "--sites", "q", "--layers", "a", "-o", "{tmp}/x"], "--layers is 'a'"),
        (["capture", "The", "--sites", "q", "--layers", "2-1,0", "-o", "{tmp}/x"], "a rising range"),
        (["capture", "The", "--sites", "embed", "--layers", "1", "-o", "{tmp}/x"], "outside the layers"),
        (["capture", "The", "--sites", "q", "-o", "{tmp}/no/x"], "there is no directory"),
        (["capture", "The", "--sites", "q", "-o", "{tmp}"], "it is a directory"),
    ],
)
def test_mistakes_are_one_line_and_code_2(tmp_path: Path, oculi_here, arguments: list[str], message: str) -> None:
    given = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    code, out, err = oculi_here(*given, *(() if "--model" in given else ("-m", str(embedded_directory()))))
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert not list(tmp_path.iterdir()) and out == ""


def test_oculi_capture(trained: LlamaAttentionAdapter, tmp_path: Path, oculi_here) -> None:
    from safetensors import safe_open

    out = tmp_path / "out.safetensors"
    code, _, err = oculi_here(
        "capture", FRANCE, "--sites", "q,k,pattern,final_scale", "--layers", "1,3", "-o", str(out)
    )
    assert code == 0, err
    arrays, ids = load(out), trained.tokenizer.encode(FRANCE)
    want = forward(trained.model, ids, capture=tuple(arrays)).activations
    assert set(arrays) == {"q", "k", "pattern", "final_scale"}
    np.testing.assert_allclose(arrays["pattern"], np.asarray(want["pattern"])[[1, 3]], atol=1e-5)
    with safe_open(out, "numpy") as file:
        metadata = file.metadata()
    assert json.loads(metadata["axes"])["pattern"] == "L H T S" and json.loads(metadata["tokens"]) == ids
    assert metadata["model"] == "tiny-facts" and json.loads(metadata["layers"]) == [1, 3]


def test_oculi_store_says_what_a_directory_holds(trained, oculi_here, tmp_path: Path) -> None:
    texts = [FRANCE, "Rome", "Paris"]
    data.capture_dataset(
        trained.model, texts, "mlp_out", tmp_path / "s", tokenizer=trained.tokenizer, chunk_size=1, progress=False
    )
    code, out, _ = oculi_here("store", str(tmp_path / "s"), "--check")
    assert code == 0 and "3 rows in 3 chunks of 1, all written; all as they were written." in out
    assert "  mlp_out.3  float32 [tokens, 192]\n" in out and "(jax, float32)" in out
    last = tmp_path / "s" / "part-000002.safetensors"
    last.write_bytes(last.read_bytes()[:-1] + b"x")
    (tmp_path / "s" / "part-000001.safetensors").unlink()
    code, out, error = oculi_here("store", str(tmp_path / "s"))
    assert code == 0 and "1 not written yet: 1." in out
    assert json.loads(oculi_here("store", str(tmp_path / "s"), "--json")[1])["missing"] == [1]
    code, out, error = oculi_here("store", str(tmp_path / "s"), "--check")
    assert code == 2 and "is damaged" in " ".join(error.split())
    code, out, error = oculi_here("store", str(tmp_path))
    assert code == 2 and "There are no results in" in " ".join(error.split())


def test_oculi_sites_prints_the_table(oculi_here) -> None:
    code, out, _ = oculi_here("sites")
    assert code == 0 and all(f"\n{name} " in f"\n{out}" for name in SITES)


def test_oculi_sites_of_a_model(oculi_here, tmp_path: Path) -> None:
    """Gemma 3 normalises queries, keys and what sublayers add; OLMo 2 what they add, and nothing that they read."""
    sizes = {**BASE, "head_dim": 6}
    for kind, has, lacks in (
        ("gemma3_text", {"q_proj", "k_scale", "attn_post_scale", "attn_scale"}, set()),
        ("olmo2", {"q_proj", "attn_post_scale"}, {"attn_scale", "mlp_scale"}),
        ("qwen2", {"attn_scale"}, {"q_proj", "mlp_proj"}),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**sizes, "model_type": kind}))
        code, out, _ = oculi_here("sites", "--model", str(tmp_path), "--json")
        assert code == 0 and has <= set(strict(out)) and not lacks & set(strict(out))
        code, out, _ = oculi_here("sites", "--model", str(tmp_path))
        assert code == 0 and "E = 24, " in out and {line.split()[0] for line in out.splitlines()} >= has
    code, _, err = oculi_here("sites", "--model", "nobody/nothing")
    assert code == 2 and "'nobody/nothing' is not on this disk" in err


@pytest.mark.torch
def test_a_model_of_another_family_is_taken(oculi_here, tmp_path: Path) -> None:
    from .test_families import make

    hf = make("gemma2, no caps")
    hf.resize_token_embeddings(576)
    hf.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_directory() / file, tmp_path)
    code, out, err = oculi_here("lens", FRANCE, "--model", str(tmp_path), "--json")
    assert code == 0, err
    import torch

    with torch.no_grad():
        logits = hf(torch.tensor([oculi_jax.load_tokenizer(tmp_path).encode(FRANCE)])).logits[0, -1]
    found = strict(out)
    assert len(found["layers"]) == 4 and found["answer_id"] == int(logits.argmax())


def strict(text: str) -> dict:
    """JSON as the standard has it: one object, and no NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_numbers_as_json(oculi_here, trained: LlamaAttentionAdapter) -> None:
    """What each command prints, against the functions that it calls; standard output holds the object and nothing else."""
    code, out, _ = oculi_here("lens", FRANCE, "--json")
    found = strict(out)
    assert code == 0 and found["answer"] == " Paris" and len(found["layers"]) == 4
    logits = np.asarray(forward(trained.model, trained.tokenizer.encode(FRANCE), logits="last").logits, np.float64)
    chance = np.exp(logits - logits.max())[found["answer_id"]] / np.exp(logits - logits.max()).sum()
    assert abs(found["layers"][-1]["probability_of_answer"] - chance) < 1e-5

    found = strict(oculi_here("sweep", FRANCE, "--target", "Paris", "--json")[1])
    ids, paris = trained.tokenizer.encode(FRANCE), trained.tokenizer.encode("Paris")[-1]
    without = np.asarray(forward(trained.model, ids, HeadAblation(2, 1), logits="last").logits, np.float64)

    def log_p(x: np.ndarray) -> float:
        return float(x[paris] - x.max() - np.log(np.exp(x - x.max()).sum()))

    assert abs(found["plain"] - log_p(logits)) < 1e-4
    assert abs(found["change"][2][1] - (log_p(without) - log_p(logits))) < 1e-4

    found = strict(oculi_here("attribute", FRANCE, "--target", "Paris", "--json")[1])
    total = found["embedding"] + np.sum(found["heads"]) + np.sum(found["mlps"])
    assert abs(found["logit"] - logits[paris]) < 1e-4 and abs(total - found["logit"]) < 1e-3

    found = strict(oculi_here("heads", "--json")[1])
    assert np.shape(found["scores"]["induction"]) == (4, 6) and np.max(found["scores"]["induction"]) > 0.9
    scores = head_scores(trained.model)
    for name, values in scores.standard_error.items():
        np.testing.assert_allclose(found["standard_errors"][name], values, atol=ROUTES)
    for name, heads in scores.summarize().items():
        assert {(n, h) for n, h, *_ in heads} == {
            (n, h) for n in range(4) for h in range(6) if found["classes"][n][h] == name
        }
    found = strict(oculi_here("heads", "--text", FRANCE, "--json")[1])
    assert found["standard_errors"] is None and np.shape(found["classes"]) == (4, 6)
    capture = trained.capture(FRANCE)
    of_head = CircuitDetection.classify_attention_head
    assert found["classes"] == [[of_head(capture, n, h)["pattern"] for h in range(6)] for n in range(4)]

    words = ("The capital of France is", "The capital of Italy is")
    found = strict(oculi_here("patch", *words, "--target", "Paris", "--against", "Rome", "--json")[1])
    assert np.shape(found["recovery"]) == (4, 6) and found["clean"] > 0 > found["corrupted"]

    assert strict(oculi_here("sites", "--json")[1])["z"]["axes"] == ["H", "T", "D"]


def test_a_doctor_with_nothing_to_compare_prints_an_object(oculi_here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oculi_jax.trust.devices", lambda: [])
    code, out, err = oculi_here("doctor", "--json")
    assert code == 0 and strict(out) == {}, err


def test_a_doctor_says_what_a_jit_of_ones_own_wants_on_a_gpu(oculi_here, monkeypatch: pytest.MonkeyPatch) -> None:
    from oculi_jax.utils import devices

    line = 'export XLA_FLAGS="$XLA_FLAGS --xla_gpu_enable_triton_gemm=false"'
    monkeypatch.setattr("oculi_jax.trust.devices", lambda: [])
    assert line not in oculi_here("doctor")[1]
    info = devices.get_device_info() | {"platform": "gpu"}
    monkeypatch.setattr(devices, "get_device_info", lambda: info)
    assert line in oculi_here("doctor")[1].splitlines()


@pytest.mark.parametrize("wrong", [True, False])
def test_a_doctor_names_a_jaxlib_that_computes_wrongly(
    oculi_here, monkeypatch: pytest.MonkeyPatch, wrong: bool
) -> None:
    from oculi_jax.utils import devices

    line = 'export XLA_FLAGS="$XLA_FLAGS --xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"'
    monkeypatch.setattr("oculi_jax.trust.devices", lambda: [])
    monkeypatch.setattr(devices, "CPU_OPTIONS", devices.ALONE if wrong else {})
    assert (line in oculi_here("doctor")[1].splitlines()) == wrong
    assert line in (Path(__file__).parents[1] / "docs" / "troubleshooting.md").read_text(encoding="utf-8").splitlines()
