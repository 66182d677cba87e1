"""Rank-one edits on tiny-facts: capitals moved, phrasings and neighbours kept back; the form beside its definition."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from oculi_jax import embedded_model, forward, padded, sweep
from oculi_jax.intervention import RankOne
from oculi_jax.metrics import rank
from oculi_jax.training import RankOneEdit, auroc, rank_one_edit

sys.path.insert(0, str(Path(__file__).parents[1] / "weights"))

LAYER, HELD = 3, (0, 3)  # "The capital of {p} is", "In {p}, the capital is"
EVERY = 4  # of these edits, each of one country: its capital becomes the next one's


@cache
def world() -> dict[str, Any]:
    """Every capital in every phrasing, and the other facts of the edited countries, in which they are to stay as they are."""
    from tiny_facts_text import CAPITAL, CONTINENT, CURRENCY, LANGUAGE, WORLD

    rows = WORLD[::4]
    texts, country, phrasing, own = [], [], [], []
    others = [(text, column) for column, some in ((2, CONTINENT), (3, LANGUAGE), (4, CURRENCY)) for text in some[:2]]
    for number, row in enumerate(rows):
        of_country = [(text, 1, i) for i, text in enumerate(CAPITAL)]
        if number % EVERY == 0:
            of_country += [
                (text, column, i % 2 * 3) for i, (text, column) in enumerate(others)
            ]  # the second of each kept back
        for text, column, i in of_country:
            texts.append(text.partition(" {x}")[0].format(p=row[0]))
            country.append(number)
            phrasing.append(i if column == 1 else 3 if i else 1)
            own.append((row[column], column == 1))
    model, tokenizer = embedded_model()
    tokens, mask = padded(texts, tokenizer)
    ids = np.array([tokenizer.encode(word)[-1] for word, _ in own])
    capital = np.array([is_capital for _, is_capital in own])
    countries = np.arange(0, len(rows), EVERY)
    targets = np.array([tokenizer.encode(rows[(n + 1) % len(rows)][1])[-1] for n in countries])
    answers = np.where((np.array(country) == countries[:, None]) & capital, targets[:, None], ids)
    return {"model": model, "tokens": tokens, "mask": mask, "answers": answers, "own": ids,
            "held_out": np.isin(phrasing, HELD), "country": np.array(country), "countries": countries}  # fmt: skip


@cache
def learnt() -> RankOneEdit:
    w = world()
    return rank_one_edit(w["model"], w["tokens"], w["answers"], layer=LAYER, steps=60, held_out=w["held_out"], mask=w["mask"], seeds=2,
                         key=jax.random.key(0), progress=False)  # fmt: skip


def said(item: Any, rows: np.ndarray) -> np.ndarray:
    """Whether each prompt says its own fact, by an ordinary sweep of the interventions, `[B, …]`."""
    w = world()
    return np.asarray(sweep(w["model"], w["tokens"][rows], item, rank(w["own"][rows]), mask=w["mask"][rows])) == 0


def test_capitals_are_moved_in_phrasings_kept_back_and_neighbours_stay() -> None:
    """The issue's bar: at least 0.9 of the prompts, and at least 0.95 of their neighbours'."""
    found, w = learnt(), world()
    assert found.changed.mean() >= 0.9 and len(found.changed) == 2 * len(w["countries"])
    assert found.kept.mean() >= 0.95
    same = w["country"][found.held_out] == w["countries"][:, None]
    facts = found.hits[same & ~found.changes]  # the edited countries' own languages, currencies and continents
    assert facts.size == 3 * len(w["countries"]) and facts.mean() >= 0.9
    assert found.detection.mean.shape == (4,) and found.detection.mean.min() >= 0.9
    assert found.losses.shape == (60, 4) and (found.losses[-1] < 0.3 * found.losses[0]).all()


def test_controls_are_beside_it() -> None:
    found = learnt()
    assert set(found.controls) == {"random direction", "steering", "untrained model"}
    changed = {name: hits[found.changes].mean() for name, hits in found.controls.items()}
    kept = {name: hits[~found.changes].mean() for name, hits in found.controls.items()}
    assert changed["random direction"] <= 0.1
    assert kept["steering"] <= 0.5  # what writes everywhere changes what is to stay
    assert "changed" in repr(found) and "kept" in repr(found) and repr(found).count("untrained model") == 2
    assert "detection AUROC" in repr(found) and repr(found).count("random direction") == 2
    # Intervals are over prompts, which the four edits share: each of them is to stay under three edits at least.
    assert f"of {len(found.held_out)} held-out prompts" in repr(found) and len(found.kept) > 3 * len(found.held_out)


def test_hits_are_what_ordinary_sweeps_of_the_edits_say() -> None:
    found = learnt()
    held = found.held_out
    some = np.flatnonzero(np.arange(len(held)) % 5 == 0)
    want = said(found.edit, held[some])  # [B, R], whether the own fact is still said
    kept = ~found.changes[:, some]
    np.testing.assert_array_equal(found.hits[:, some][kept], want.T[kept])
    assert not want.T[~kept].any()


def test_each_seed_does_as_well() -> None:
    found = learnt()
    assert found.by_seed.shape == (2, *found.hits.shape) and repr(found).count("; 2 seeds ") == 2
    np.testing.assert_array_equal(found.by_seed[0], found.hits)
    second = found.by_seed[1]
    assert second[found.changes].mean() >= 0.9 and second[~found.changes].mean() >= 0.95


def test_one_edit_is_one_of_many_and_detects_what_it_reads() -> None:
    """And what is read is the definition's, of the stream of whole runs."""
    w, n = world(), 2
    rows = np.flatnonzero(np.isin(w["country"], [0, 1, 2, 8, 9, 10]))
    settings: Any = dict(layer=LAYER, steps=40, controls=False, held_out=w["held_out"][rows], mask=w["mask"][rows],
                         key=jax.random.key(0), progress=False)  # fmt: skip
    one, two = (
        rank_one_edit(w["model"], w["tokens"][rows], w["answers"][n, rows], seeds=seeds, **settings) for seeds in (1, 2)
    )
    np.testing.assert_allclose(two.losses, one.losses, rtol=1e-2, atol=1e-4)
    np.testing.assert_array_equal(two.by_seed[0], one.hits)
    assert one.by_seed.shape == (1, *one.hits.shape) and "seeds" not in repr(one)
    assert one.hits.shape == (one.held_out.size,) and one.losses.shape == (40,) and one.changed.mean() == 1
    edit, reads = one.edit, []
    assert isinstance(edit, RankOne) and edit.layer == LAYER
    for row in rows[one.held_out]:
        out = forward(w["model"], w["tokens"][row], capture="resid_pre", mask=w["mask"][row], logits="none")
        stream = np.asarray(out["resid_pre"][LAYER])[w["mask"][row]]
        reads.append(np.maximum(stream @ np.asarray(edit.read) + float(edit.bias), 0).max())
    reads = np.array(reads)
    want = (reads[one.changes][:, None] > reads[~one.changes]) + 0.5 * (
        reads[one.changes][:, None] == reads[~one.changes]
    )
    assert float(one.detection.mean) == pytest.approx(want.mean(), abs=1e-6)


def test_what_cannot_be_is_told() -> None:
    w = world()
    good: dict[str, Any] = dict(layer=1, steps=1, mask=w["mask"], key=jax.random.key(0))
    for changes, message in (
        ({"answers": w["answers"][:, :3]}, r"answers is int64 \[4, 3\]: ids \[B, T\], and \[B\], or \[R, B\]"),
        ({"answers": w["answers"] - 1000}, "answers holds what is no token id of this model: they are 0 to 575"),
        ({"answers": w["own"]}, "The edit has no prompt to be changed among the .* that it is fitted on"),
        ({"answers": np.zeros_like(w["own"])}, "The edit has no prompt to be kept among the .* that it is fitted on"),
        ({"held_out": w["country"] > 0}, "Edit 1 has no prompt to be changed among the .* that it is fitted on"),
        ({"held_out": 3}, "held_out is 3, and a share between 0 and 1, or a bool of each of the 120 prompts"),
        ({"layer": 4}, "layer is 4, and must be 0 to 3"),
        ({"site": "z"}, "one row of features for each token is needed: it has heads"),
        ({"penalty": -1}, "penalty is -1"),
        ({"learning_rate": 0}, "learning_rate is 0, and must be a finite number above 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"tokens": w["tokens"][0], "mask": w["mask"][0]}, r"tokens has shape \[8\]"),
    ):  # fmt: skip
        options = {"tokens": w["tokens"], "answers": w["answers"], **good, **changes}
        with pytest.raises(ValueError, match=message):
            rank_one_edit(w["model"], options.pop("tokens"), options.pop("answers"), **options)


def test_the_area_under_the_curve_is_mann_and_whitneys() -> None:
    from scipy.stats import mannwhitneyu

    rng = np.random.default_rng(0)
    positive, negative = rng.normal(0.7, 1, (40, 2)).round(1), rng.normal(0, 1, (30, 2)).round(1)  # with ties
    found = auroc(positive, negative)
    for n in range(2):
        want = mannwhitneyu(positive[:, n], negative[:, n]).statistic / (40 * 30)
        assert float(found.mean[n]) == pytest.approx(want, abs=1e-6)
    assert ((found.low < found.mean) & (found.mean < found.high)).all()
    # How wide the interval is: beside the spread of areas of new samples from the same two distributions.
    drawn = [auroc(rng.normal(0.7, 1, 40), rng.normal(0, 1, 30)).mean for _ in range(50)]
    assert 0.7 < float(found.high[0] - found.low[0]) / (4 * np.std(drawn)) < 1.4
    for wrong, message in (((positive, negative[:, 0]), "the same axes"), (([], [1.0]), "at least one prompt"),
                           (([np.nan], [1.0]), "no finite number")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            auroc(*wrong)
