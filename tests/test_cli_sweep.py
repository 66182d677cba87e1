"""`oculi sweep`, `oculi patch` and `oculi paths`: what they print and draw is what one run after another gives."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oculi_jax import forward
from oculi_jax.cli import patch as patch_command
from oculi_jax.cli import paths as paths_command
from oculi_jax.cli import sweep as sweep_command
from oculi_jax.cli.effects import column, strongest
from oculi_jax.intervention import ActivationPatch, Freeze, HeadAblation, PerLayer
from oculi_jax.models.llama import LlamaAttentionAdapter
from oculi_jax.visualize import sweep_heatmap

from .margins import assert_clear, assert_leads
from .prompts import IOI
from .tiny import tiny_llama
from .tolerances import ROUTES

CLEAN, CORRUPTED = "the cat saw the dog so the cat", "the cat saw the cow so the cat"
MODEL = cache(tiny_llama)
PRINTED = 5e-4  # half of the last of three decimals; what is smaller gets no row
HOOKS = 2e-3  # of a printed difference of logits, from one of Hugging Face's
# Where the numbers of a place's name are.
NUMBERS = {"layer": r"L(\d+)", "head": r"[HK](\d+)", "position": r"^(\d+)"}


class Words:
    """A tokenizer whose tokens are words, with the space before them."""

    words = ("the", " the", " cat", " saw", " dog", " cow", " so", " two words")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [self.words.index(word) for word in re.findall(r" ?\S+", text)]

    def decode(self, ids: Any) -> str:
        return "".join(self.words[i] for i in ids)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, oculi_here, tmp_path: Path) -> Callable:
    """Runs a command on a tiny model: its arguments → its lines, and the figure that it drew."""
    adapter = LlamaAttentionAdapter(MODEL(), Words())
    figures: list[Any] = []
    for module in (patch_command, paths_command, sweep_command):
        monkeypatch.setattr(module, "open_adapter", lambda *given, chat: adapter)
        monkeypatch.setattr(module, "save_picture", lambda figure, path, quiet: figures.append(figure))

    def run(*arguments: str) -> tuple[list[str], Any]:
        code, out, err = oculi_here(*arguments, "-m", "tiny", "-o", str(tmp_path / "x.png"))
        assert code == 0 and err == "", err
        figures[-1].savefig(tmp_path / "x.png", dpi=60)  # a warning, as of a label too large, is an error
        return out.splitlines(), figures[-1]

    return run


def metric(text: str, interventions: Any = (), against: bool = True) -> float:
    """logit(" cow") − logit(" dog") at the last token, or the log-probability of " cow"; of one plain run."""
    logits = np.asarray(forward(MODEL(), Words().encode(text), interventions).logits)[-1].astype(np.float64)
    return float(logits[5] - logits[4] if against else logits[5] - np.log(np.exp(logits).sum()))


@pytest.mark.parametrize("against", [True, False])
def test_a_sweep_is_one_run_after_another(tiny, against: bool) -> None:
    given = ("--target", " cow", *(("--against", " dog") if against else ()), "--top", "20")
    lines, figure = tiny("sweep", CLEAN, *given)
    plain = metric(CLEAN, against=against)
    change = np.array([[metric(CLEAN, HeadAblation(n, h), against) - plain for h in range(4)] for n in range(3)])
    assert_clear(np.abs(change), PRINTED)  # so all twelve have a row
    name = "logit of ' cow' − logit of ' dog'" if against else "log-probability of ' cow'"
    head, value = lines[0].rsplit(": ", 1)
    assert head == f"{name} after {CLEAN!r}" and abs(float(value) - plain) < PRINTED + ROUTES
    assert "of 12 (3 layers × 4)" in lines[1]

    columns: tuple[list[tuple[str, float]], ...] = [], []
    for line in lines[3:]:
        for part, number, drawn in re.findall(r"(L\dH\d) +([+-]\S+) *([█░]*)", line):
            columns[number[0] == "+"].append((part, float(number)))
            assert not drawn or drawn[0] == ("█" if number[0] == "+" else "░")
    assert all(columns) and len(columns[0]) + len(columns[1]) == 12
    for side in columns:
        assert [abs(v) for _, v in side] == sorted((abs(v) for _, v in side), reverse=True)
        for part, number in side:
            assert abs(number - change[int(part[1]), int(part[3])]) < PRINTED + ROUTES, part

    (image,) = figure.axes[0].images
    np.testing.assert_allclose(image.get_array(), change, atol=ROUTES)
    low, high = image.get_clim()
    assert low == -high and abs(high - np.abs(change).max()) < ROUTES  # centred on the plain run's metric
    assert figure.axes[0].child_axes[0].get_ylabel() == f"change of the {name}"
    assert CLEAN in figure.get_suptitle()


@pytest.mark.parametrize("options", [(), ("--receivers", "a2.h1<q>", "--mlps", "frozen", "--direction", "denoising")])
def test_paths_are_two_runs_after_another(tiny, options: tuple[str, ...]) -> None:
    to_queries = bool(options)
    run, source = (CORRUPTED, CLEAN) if to_queries else (CLEAN, CORRUPTED)
    lines, figure = tiny("paths", CLEAN, CORRUPTED, "--target", " cow", "--against", " dog", "--top", "99", *options)
    sites = ("z", "mlp_out", "q")
    base, other = (forward(MODEL(), Words().encode(text), capture=sites) for text in (run, source))
    held = Freeze(base, ("z", "mlp_out") if to_queries else "z")
    start = metric(run)
    change = {}
    for layer, head in product(range(3), (*range(4), None)):
        site = "mlp_out" if head is None else "z"
        edits = [held, ActivationPatch(site, layer, PerLayer(other[site]), head)]
        if to_queries:
            told = forward(MODEL(), Words().encode(run), edits, capture="q")["q"]
            edits = [ActivationPatch("q", 2, PerLayer(told), 1)]
        change[f"m{layer}" if head is None else f"a{layer}.h{head}"] = metric(run, edits) - start
    assert f"the {'clean' if to_queries else 'corrupted'} prompt, in the" in lines[3] and "told to " in lines[3]
    (image,) = figure.axes[0].images
    wanted = np.array([[change[f"a{layer}.h{head}"] for head in range(4)] for layer in range(3)])
    np.testing.assert_allclose(image.get_array(), wanted, atol=ROUTES)
    rows = {}
    for line in lines[5:]:
        if found := re.match(r"(\S+) +([+-]\d+\.\d+) +([+-]\d+\.\d+)", line):
            rows[found[1]] = float(found[2]), float(found[3])
    assert len(rows) > 2 and set(rows) - {"input"} == {name for name, x in change.items() if abs(x) >= PRINTED}
    for name in set(rows) - {"input"}:
        assert abs(rows[name][0] - start - change[name]) < PRINTED + ROUTES
        assert abs(rows[name][1] - change[name]) < PRINTED + ROUTES
    sizes = [abs(x) for _, x in rows.values()]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("options", "site", "by"),
    [
        ((), "resid_pre", ("layer", "position")),
        (("--site", "v", "--direction", "noising"), "v", ("layer", "head")),
        (("--site", "z", "--by", "layer,position", "--direction", "noising"), "z", ("layer", "position")),
        (("--site", "mlp_out", "--by", "layer"), "mlp_out", ("layer",)),
        (("--site", "embed"), "embed", ("position",)),
    ],
)
def test_patching_is_one_run_after_another(tiny, options: tuple[str, ...], site: str, by: tuple[str, ...]) -> None:
    denoising = "noising" not in options
    lines, figure = tiny("patch", CLEAN, CORRUPTED, "--target", " cow", "--against", " dog", "--top", "99", *options)
    run, source = (CORRUPTED, CLEAN) if denoising else (CLEAN, CORRUPTED)
    value = np.asarray(forward(MODEL(), Words().encode(source), capture=site).activations[site])
    sizes = {"layer": 3, "head": 2 if site == "v" else 4, "position": 8}
    patched = np.zeros([sizes[axis] for axis in by])
    for place in product(*map(range, patched.shape)):
        at: dict[str, Any] = dict(zip(by, place, strict=True))
        one = value if site == "embed" else value[at["layer"]]
        one = one[at["head"]] if "head" in at else one
        positions = [at["position"]] if "position" in at else None
        patched[place] = metric(run, ActivationPatch(site, at.get("layer"), one, at.get("head"), positions))
    clean, corrupted = metric(CLEAN), metric(CORRUPTED)
    start, end = (corrupted, clean) if denoising else (clean, corrupted)
    effects = (patched - start) / (end - start)

    for line, kind, number, text in ((lines[0], "clean", clean, CLEAN), (lines[1], "corrupted", corrupted, CORRUPTED)):
        said = re.fullmatch(rf"{kind} +([+-]\d+\.\d{{3}}) .*{text}'", line)
        assert said and abs(float(said[1]) - number) < PRINTED + ROUTES, line
    assert "logit of ' cow' − logit of ' dog'" in lines[2]
    assert ("clean values go into the corrupted run" in lines[3]) == denoising
    ax = figure.axes[0]
    if len(by) == 2:
        (image,) = ax.images
        np.testing.assert_allclose(image.get_array(), effects, atol=ROUTES)
        assert image.get_clim()[0] == -image.get_clim()[1]  # centred on 0
    elif by == ("layer",):
        np.testing.assert_allclose(ax.lines[0].get_ydata(), effects, atol=ROUTES)
    else:
        np.testing.assert_allclose([b.get_height() for b in ax.patches], effects, atol=ROUTES)
    pair = ("cow", "dog") if denoising else ("dog", "cow")
    if "position" in by:
        labels = [tick.get_text() for tick in ax.get_xticklabels()]
        assert (
            labels[0] == "the" and labels[1] == "␣cat" and labels[4].replace("␣", "").replace(" ", "") == "→".join(pair)
        )

    rows = {}
    for line in lines[5:]:
        if found := re.match(r"(\S.*?) +([+-]\d+\.\d+) +([+-]\d+\.\d+)", line):
            rows[found[1]] = float(found[2]), float(found[3])
    sizes_of = [abs(effect) for _, effect in rows.values()]
    assert sizes_of == sorted(sizes_of, reverse=True) and sizes_of[-1] > 0
    for name, (number, effect) in rows.items():
        place = tuple(int(re.search(NUMBERS[axis], name)[1]) for axis in by)  # type: ignore[index]
        assert abs(number - patched[place]) < PRINTED + ROUTES and abs(effect - effects[place]) < PRINTED + ROUTES, name
    if by == ("layer", "position"):  # a row for each token, at its strongest layer
        strong = np.abs(effects).max(axis=0)
        for threshold in (PRINTED, 2 * PRINTED):
            assert_clear(strong, threshold, 2 * ROUTES)
        assert_leads(strong)
        assert len(rows) == (strong > 2 * PRINTED).sum()
        assert max(rows, key=lambda name: abs(rows[name][1])).startswith(f"{strong.argmax()} ")
        assert any(name.startswith(f"4 ' {pair[0]}'→' {pair[1]}' L") for name in rows)
    else:
        assert_clear(np.abs(effects), PRINTED, 2 * ROUTES)
        assert len(rows) == (np.abs(effects) > PRINTED).sum()
        assert ("K" in "".join(rows)) == (site == "v")


def test_the_strongest_of_either_sign_or_of_one() -> None:
    effects = np.array([[0.5, -2.0], [np.nan, 1e-4]])
    assert strongest(effects, 9) == [(0, 1), (0, 0)] and strongest(effects, 1) == [(0, 1)]
    assert strongest(effects, 9, 1) == [(0, 0)] and strongest(effects, 9, -1) == [(0, 1)]
    assert column([0.0, 0.5, 1.0, 3.0, -1.0, np.nan]) == " ▄██  "


def test_columns_are_labelled_with_both_tokens_where_they_differ() -> None:
    tokens, sources = ["The", " Mary", "\n", "one very long word"], ["The", " John", "\n", "another very long word"]
    ax = sweep_heatmap(np.zeros((2, 4)), tokens=tokens, sources=sources).axes[0]
    labels = [tick.get_text() for tick in ax.get_xticklabels()]
    assert labels == ["The", "␣Mary→␣John", "\\n", "one ver…→another…"]
    with pytest.raises(ValueError, match="sources has 1 texts, and 4"):
        sweep_heatmap(np.zeros((2, 4)), tokens=tokens, sources=["x"])
    with pytest.raises(ValueError, match="give those of the patched run"):
        sweep_heatmap(np.zeros((2, 4)), sources=sources)


def table(out: str) -> dict[str, float]:
    """Head → the number beside it that is the last of its kind."""
    found = re.findall(r"(L\d+H\d+)((?: +[+-]\d+\.\d+)+)", out)
    return {head: float(numbers.split()[-1]) for head, numbers in found}


def hf_differences(hf: Any, tokenizer: Any, text: str, put: Any = None) -> tuple[float, np.ndarray, list[Any]]:
    """By hooks on Hugging Face's Llama: logit(Mary) − logit(John), the same with each head's z zero or as in `put`, and z."""
    import torch

    ids = torch.tensor([tokenizer.encode(text)])
    mary, john = tokenizer.convert_tokens_to_ids(["▁Mary", "▁John"])
    kept: list[Any] = []

    def run(edit: tuple[int, int] | None = None) -> float:
        kept.clear()

        def hook(number: int, given: Any) -> Any:
            z = given[0].clone()
            kept.append(z.clone())
            if edit and edit[0] == number:
                part = slice(32 * edit[1], 32 * edit[1] + 32)
                z[..., part] = 0.0 if put is None else put[number][..., part]
            return (z,)

        handles = [
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, given, n=n: hook(n, given))
            for n, layer in enumerate(hf.model.layers)
        ]
        try:
            with torch.no_grad():
                logits = hf(ids).logits[0, -1]
        finally:
            for handle in handles:
                handle.remove()
        return float(logits[mary] - logits[john])

    each = np.array([[run((n, h)) for h in range(6)] for n in range(4)])
    return run(), each, list(kept)


def numbers(out: str) -> dict[tuple[int, int], list[float]]:
    """(layer, head) → the numbers beside it."""
    found = re.findall(r"L(\d+)H(\d+)((?: +[+-]\d+\.\d+)+)", out)
    return {(int(layer), int(head)): [float(x) for x in row.split()] for layer, head, row in found}


@pytest.mark.torch
def test_oculi_sweep_is_hooks_on_hugging_face(embedded, hf_trained, tmp_path: Path, oculi_here) -> None:
    text = IOI.format("John")
    given = (text, "--target", "Mary", "--against", "John", "-o", str(tmp_path / "heads.svg"), "--top", "24")
    code, out, err = oculi_here("sweep", *given)
    assert code == 0 and "tiny-facts" in err, err
    plain, each, _ = hf_differences(hf_trained, embedded[1], text)
    said = re.search(rf"after {re.escape(repr(text))}: (\S+)", out)
    assert plain > 1 and said and abs(float(said[1]) - plain) < HOOKS and "of 24 (4 layers × 6)" in out
    for head, (change, *_) in numbers(out).items():
        assert abs(change - (each[head] - plain)) < HOOKS, head
    assert_leads(np.ravel(plain - each), margin=2 * HOOKS)
    strongest = np.unravel_index((each - plain).argmin(), each.shape)
    assert next(iter(numbers(out))) == strongest and each[strongest] < plain - 0.5
    svg = (tmp_path / "heads.svg").read_text()
    assert svg.startswith("<?xml") and f"Drew {tmp_path / 'heads.svg'}." in out


@pytest.mark.torch
def test_oculi_patch_is_hooks_on_hugging_face(embedded, hf_trained, tmp_path: Path, oculi_here) -> None:
    texts = IOI.format("John"), IOI.format("Mary")
    given = (*texts, "--target", "Mary", "--against", "John", "--top", "24")
    code, out, err = oculi_here("patch", *given, "--site", "z", "-o", str(tmp_path / "patch.png"))
    assert code == 0 and "tiny-facts" in err, err
    clean, _, source = hf_differences(hf_trained, embedded[1], texts[0])
    corrupted, each, _ = hf_differences(hf_trained, embedded[1], texts[1], source)
    found = numbers(out)
    assert len(found) > 5
    for head, (patched, recovered) in found.items():
        assert (
            abs(patched - each[head]) < HOOKS
            and abs(recovered - (each[head] - corrupted) / (clean - corrupted)) < HOOKS
        )
    assert_leads(np.ravel(abs(each - corrupted)), margin=2 * HOOKS)
    assert next(iter(found)) == np.unravel_index(abs(each - corrupted).argmax(), each.shape)
    said = re.search(r"clean +(\S+) .*\ncorrupted +(\S+) ", out)
    assert said and abs(float(said[1]) - clean) < HOOKS and abs(float(said[2]) - corrupted) < HOOKS
    assert (tmp_path / "patch.png").stat().st_size > 10_000

    code, out, err = oculi_here("patch", *given, "--site", "resid_pre")
    assert code == 0, err
    # The giver's name carries the answer up to some layer, and the last token from there on.
    profile = {int(line.split()[0]): line for line in out.splitlines() if re.match(r"\d+ '", line)}
    recovered = [abs(float(re.findall(r"[+-]\d+\.\d+", line)[1])) for line in profile.values()]
    assert min(recovered[:2]) - max(recovered[2:], default=0.0) > 2 * HOOKS  # so which two lead is in no doubt
    assert set(list(profile)[:2]) == {10, 14} and "10 ' Mary'→' John'" in profile[10]
    assert min(profile) >= 10  # nothing before the first token that differs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "The", "--target", "Parisien"], "'Parisien' is not in the vocabulary"),
        (["sweep", "The", "--target", "Paris in"], "'Paris in' is not one token"),
        (["sweep", "The", "--target", "Mary", "--against", "Parisien"], "'Parisien' is not in the vocabulary"),
        (["sweep", "The", "--target", "Mary", "--against", "Mary"], "are both 'Mary'"),
        (["sweep", "The " * 200, "--target", "Mary"], "made for at most 128"),
        (["sweep", "The", "--target", "Mary", "-o", "{tmp}/x.jpg"], "must end in .png, .svg, .pdf"),
        (
            ["patch", "one two", "one", "--target", "Mary"],
            "the clean prompt has 3, ['<s>', ' one', ' two'], and the corrupted one 2, ['<s>', ' one']",
        ),
        (["patch", "one two", "one two", "--target", "Mary"], "Both prompts are the tokens ['<s>', ' one', ' two']"),
        (["patch", "one two", "one three", "--target", "Parisien"], "'Parisien' is not in the vocabulary"),
    ],
)
def test_mistakes_are_one_line_and_code_2(
    trained, monkeypatch, tmp_path: Path, oculi_here, arguments, message: str
) -> None:
    for module in (patch_command, paths_command, sweep_command):
        monkeypatch.setattr(module, "open_adapter", lambda *given, chat: trained)
    code, out, err = oculi_here(*(a.replace("{tmp}", str(tmp_path)) for a in arguments))
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert not list(tmp_path.iterdir()) and out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--site", "resid"], "Unknown site 'resid': did you mean 'resid_"),
        (["--by", "layer,head"], "resid_pre [T, E] can be patched by layer,position or layer."),
        (["--site", "z", "--by", "head"], "z [H, T, D] can be patched by layer,head or layer,position or"),
        (["--site", "embed", "--by", "layer,position"], "embed [T, E] can be patched by position."),
        (["--direction", "forwards"], "--direction is 'forwards', and must be denoising or noising."),
        (["--site", "z", "--by", "layer,head,position", "-o", "{tmp}/x.png"], "A picture has two axes"),
    ],
)
def test_what_cannot_be_patched_is_refused_before_a_model_loads(tmp_path: Path, oculi_here, arguments, message) -> None:
    given = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    code, out, err = oculi_here("patch", "a b", "a c", "--target", " x", "-m", "nowhere", *given)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert out == ""
