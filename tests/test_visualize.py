"""Pictures: what they show is what was given, and nothing outside the figure changes."""

from __future__ import annotations

import io
import subprocess
import sys
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch

from oculi_jax import visualize as v
from oculi_jax.analysis.result import Result
from oculi_jax.circuits import Circuit, Graph
from oculi_jax.visualize.canvas import LINES, MISSING, NEGATIVE, POSITIVE, token_labels

BAD = "$_$"  # matplotlib cannot draw this as mathematics
TOKENS = ["The", " price", BAD, "\n"]
SHOWN = ["The", "␣price", BAD, "\\n"]
RNG = np.random.default_rng(0)
PATTERN = np.tril(RNG.uniform(0.1, 1.0, (4, 4)))
PATTERN /= PATTERN.sum(-1, keepdims=True)
HEADS = RNG.normal(size=(3, 5))
ONE = [
    {"layer": 4, "predictions": [(" the", 0.5), (BAD, 0.25)]},
    {"layer": 9, "predictions": [("\t", 0.875), (" of", 0.125)]},
]
GRAPH = Graph(3, 4, 4, 16)
SCORES = np.where(GRAPH.edges, RNG.normal(size=GRAPH.edges.shape) ** 3, 0.0)
PATH = ("input->m0", "m0->a1.h2<q>", "m0->a1.h2<v>", "a1.h2->a2.h0<k>", "a2.h0->logits", "m0->logits")
CIRCUIT = Circuit(GRAPH, edges=PATH, scores=SCORES)
# One call of each public function, drawing into `ax` where it takes one.
CALLS: dict[str, Any] = {
    "alpha_curve": lambda **k: v.alpha_curve([0.5, 1.0, 2.0], {BAD: [1.0, 3.0, 2.0]}, **k),
    "attention_heatmap": lambda **k: v.attention_heatmap(PATTERN, TOKENS, **k),
    "attribution_bars": lambda **k: v.attribution_bars(HEADS, label=BAD, **k),
    "entropy_heatmap": lambda **k: v.entropy_heatmap(np.abs(HEADS), **k),
    "head_grid": lambda **k: v.head_grid(np.stack([PATTERN] * 3), [BAD, "", "_"], tokens=TOKENS, **k),
    "head_heatmap": lambda **k: v.head_heatmap(HEADS, BAD, **k),
    "layer_profile": lambda **k: v.layer_profile(HEADS, labels=["_a", BAD, "c"], ylabel=BAD, **k),
    "lens_table": lambda **k: v.lens_table(ONE, **k),
    "plot_circuit": lambda **k: v.plot_circuit(CIRCUIT, **k),
    "probability_trajectory": lambda **k: v.probability_trajectory({" a": [0.1, 0.9], BAD: [0.2, 0.0]}, **k),
    "sweep_heatmap": lambda **k: v.sweep_heatmap(HEADS[:, :4], tokens=TOKENS, **k),
}


def drawn(figure: Figure) -> bytes:
    """Draws as a user's `savefig` does; warnings (a missing glyph, a layout that collapsed) are errors here."""
    stream = io.BytesIO()
    figure.savefig(stream, format="rgba", dpi=60)
    return stream.getvalue()


def image(ax: Any) -> Any:
    (found,) = ax.images
    return found


def texts(labels: Any) -> list[str]:
    return [label.get_text() for label in labels]


def bar_label(figure: Figure) -> str:
    (found,) = figure.axes[0].child_axes
    return found.get_ylabel()


def test_every_public_function_is_called_here() -> None:
    views = {"attention_view", "circuit_view", "lens_view", "token_view"}  # HTML: tests/test_views.py
    assert set(CALLS) == set(v.__all__) - {"panels"} - views


def test_panels_are_axes_to_draw_in() -> None:
    figure, axes = v.panels(2, 3, 6.0, 4.0, widths=(1, 1, 2))
    assert len(axes) == 6 and tuple(figure.get_size_inches()) == (6.0, 4.0) and plt.get_fignums() == []
    assert v.head_heatmap(HEADS, "score", ax=axes[4]) is figure and len(axes[4].images) == 1 and not axes[0].images


@pytest.mark.parametrize("name", CALLS)
def test_nothing_outside_the_figure_changes(name: str) -> None:
    before = dict(matplotlib.rcParams)
    figure = CALLS[name](title=BAD)
    drawn(figure)
    assert isinstance(figure, Figure)
    assert plt.get_fignums() == [] and dict(matplotlib.rcParams) == before
    titles = [*texts([ax.title for ax in figure.axes]), figure.get_suptitle()]
    assert BAD in titles


@pytest.mark.parametrize("name", sorted(set(CALLS) - {"head_grid"}))
@pytest.mark.parametrize("layout", ["constrained", None])
def test_a_given_ax_is_drawn_in_and_its_figure_returned(name: str, layout: Any) -> None:
    figure = Figure(figsize=(8, 3), layout=layout)
    left, right = figure.subplots(1, 2)
    assert CALLS[name](ax=right) is figure
    assert right.has_data() and not left.has_data() and left.get_xlabel() == ""
    drawn(figure)
    with pytest.raises(TypeError, match="one matplotlib Axes"):
        CALLS[name](ax=np.array([left, right]))


@pytest.mark.parametrize("name", CALLS)
def test_the_axes_and_colours_are_named(name: str) -> None:
    figure = CALLS[name]()
    expected = {
        "alpha_curve": ("strength α", "score", None),
        "attention_heatmap": ("Key (attending to)", "Query (attending from)", "attention weight"),
        "attribution_bars": (BAD, "head", None),
        "entropy_heatmap": ("head", "layer", "attention entropy (nats)"),
        "head_heatmap": ("head", "layer", BAD),
        "layer_profile": ("layer", BAD, None),
        "lens_table": ("rank of the prediction", "layer", "probability"),
        "plot_circuit": ("6 of 262 edges", "", None),
        "probability_trajectory": ("layer", "P(token)", None),
        "sweep_heatmap": ("token", "layer", "effect on the metric"),
    }
    if name == "head_grid":
        assert (figure.get_supxlabel(), figure.get_supylabel()) == ("Key (attending to)", "Query (attending from)")
        assert figure.axes[-1].get_ylabel() == "attention weight"
    else:
        ax = figure.axes[0]
        label = bar_label(figure) if ax.child_axes else None
        assert (ax.get_xlabel(), ax.get_ylabel(), label) == expected[name]


def test_an_attention_heatmap_is_its_pattern() -> None:
    figure = v.attention_heatmap(jnp.asarray(PATTERN, jnp.bfloat16), TOKENS)
    ax = figure.axes[0]
    np.testing.assert_array_equal(image(ax).get_array(), np.asarray(jnp.asarray(PATTERN, jnp.bfloat16), np.float64))
    assert image(ax).get_clim() == (0.0, 1.0)
    for axis in (ax.xaxis, ax.yaxis):
        assert texts(axis.get_ticklabels()) == SHOWN and list(axis.get_ticklocs()) == [0, 1, 2, 3]
        assert not any(label.get_parse_math() for label in axis.get_ticklabels())
    assert ax.yaxis_inverted()  # the first query on top
    some = v.attention_heatmap(PATTERN[-1:], TOKENS).axes[0]  # of which query is not known
    assert texts(some.get_xticklabels()) == SHOWN and texts(some.get_yticklabels()) == []
    alone = v.attention_heatmap([[1.0]], ["x"])
    assert texts(alone.axes[0].get_xticklabels()) == ["x"] and drawn(alone)


def test_dollars_are_dollars() -> None:
    """matplotlib alone refuses the text that all pictures above were drawn with."""
    figure = Figure()
    figure.text(0, 0, BAD)
    with pytest.raises(ValueError, match="Expected"):
        drawn(figure)


def test_a_users_style_does_not_turn_pictures_over() -> None:
    with matplotlib.rc_context({"image.origin": "lower", "axes.grid": True, "image.interpolation": "bilinear"}):
        ax = v.attention_heatmap(PATTERN).axes[0]
        assert ax.yaxis_inverted() and image(ax).get_interpolation() == "nearest"
        assert not any(line.get_visible() for line in ax.get_xgridlines() + ax.get_ygridlines())


def test_long_prompts_keep_a_label_for_every_nth_token() -> None:
    tokens = [f" t{i}" for i in range(300)]
    figure = v.attention_heatmap(np.eye(300), tokens)
    width, height = figure.get_size_inches()
    assert width < 13 and height < 13
    for axis, extent in ((figure.axes[0].xaxis, width), (figure.axes[0].yaxis, height)):
        places = [int(i) for i in axis.get_ticklocs()]
        assert texts(axis.get_ticklabels()) == [f"␣t{i}" for i in places]
        assert len(set(np.diff(places))) == 1 and 20 < len(places) < extent / 0.12
    drawn(figure)
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert all(a.y0 >= b.y1 - 1 for a, b in pairwise(boxes))  # none covers the next


def test_token_labels() -> None:
    tokens = [" a ", "   ", "", "\n\t", "\u200b", "\xa0", "é", "a b", "\\", "'", '"', "_", "中", "🙂", "\ud800",
              "x" * 40]  # fmt: skip
    shown = ["␣a␣", "␣␣␣", "''", "\\n\\t", "\\u200b", "\\xa0", "é", "a b", "\\\\", "'", '"', "_", "\\u4e2d", "\\U0001f642",
             "\\ud800", "x" * 15 + "…"]  # fmt: skip
    assert token_labels(tokens) == shown
    drawn(v.attention_heatmap(np.eye(len(tokens)), tokens))


def test_what_is_not_finite_is_grey() -> None:
    values = HEADS.copy()
    values[0, 1], values[2, 3] = np.nan, np.inf
    for figure in (
        v.head_heatmap(values, "score"),
        v.sweep_heatmap(values),
        v.head_heatmap(np.full((2, 2), np.nan), "score"),
    ):
        drawn_image = image(figure.axes[0])
        grey = np.all(drawn_image.to_rgba(drawn_image.get_array()) == to_rgba(MISSING), axis=-1)
        np.testing.assert_array_equal(grey, drawn_image.get_array().mask)
        assert np.isfinite(drawn_image.get_clim()).all() and drawn(figure)
    np.testing.assert_array_equal(image(v.head_heatmap(values, "score").axes[0]).get_array().mask, ~np.isfinite(values))
    ax = v.attribution_bars([1.0, np.nan, -1.0]).axes[0]
    (stripe,) = [p for p in ax.patches if to_rgba(MISSING) == p.get_facecolor()]
    assert stripe.get_x() < 1.0 < stripe.get_x() + stripe.get_width()
    (line,) = v.layer_profile([1.0, np.nan, 2.0], ylabel="norm").axes[0].lines
    np.testing.assert_array_equal(line.get_ydata(), [1.0, np.nan, 2.0])


def test_a_grid_of_heads_has_a_panel_for_each() -> None:
    patterns = np.stack([[PATTERN, np.eye(4)], [PATTERN.T, PATTERN**2], [1 - np.eye(4), PATTERN / 2]])  # [L, H, T, S]
    figure = v.head_grid(patterns, layers=[3, 7, 8], tokens=TOKENS)
    *panels, _ = figure.axes
    assert texts([ax.title for ax in panels]) == ["L3H0", "L3H1", "L7H0", "L7H1", "L8H0", "L8H1"]
    for ax, expected in zip(panels, patterns.reshape(6, 4, 4), strict=True):
        np.testing.assert_array_equal(image(ax).get_array(), expected)
        assert image(ax).get_clim() == (0.0, 1.0)
    drawn(figure)
    centres = [((b.x0 + b.x1) / 2, (b.y0 + b.y1) / 2) for b in (ax.get_position() for ax in panels)]
    assert centres[0][0] == pytest.approx(centres[2][0]) and centres[0][1] == pytest.approx(centres[1][1])
    assert centres[0][1] > centres[2][1] and centres[1][0] > centres[0][0]
    seen = [(any(t.label1.get_visible() for t in ax.xaxis.get_major_ticks()),
             any(t.label1.get_visible() for t in ax.yaxis.get_major_ticks())) for ax in panels]  # fmt: skip
    assert seen == [(False, True), (False, False)] * 2 + [(True, True), (True, False)]

    some = v.head_grid(patterns.reshape(6, 4, 4)[:5], layers=[1, 1, 2, 2, 9], heads=[0, 4, 1, 2, 3], columns=3)
    assert texts([ax.title for ax in some.axes]) == [
        "L1H0",
        "L1H4",
        "L2H1",
        "L2H2",
        "L9H3",
        "",
    ]  # the last is the bar's
    assert texts([ax.title for ax in v.head_grid(patterns[0], titles=["$a", "b$"]).axes[:2]]) == ["$a", "b$"]
    own = Figure()
    assert v.head_grid(patterns[0], figure=own) is own and len(own.axes) == 3


def test_heatmaps_have_true_layer_numbers_and_honest_colours() -> None:
    figure = v.head_heatmap(HEADS, "score", layers=(2, 11, 30), diverging=True)
    ax = figure.axes[0]
    np.testing.assert_array_equal(image(ax).get_array(), HEADS)
    assert texts(ax.get_yticklabels()) == ["2", "11", "30"] and texts(ax.get_xticklabels()) == list("01234")
    top = np.abs(HEADS).max()
    assert image(ax).get_clim() == (-top, top)
    assert min(image(ax).to_rgba(0.0)[:3]) > 0.95  # zero is white
    assert image(v.sweep_heatmap(HEADS).axes[0]).get_clim() == (-top, top)
    entropy = v.entropy_heatmap(np.abs(HEADS) + 1.0, layers=[2, 11, 30])
    assert image(entropy.axes[0]).get_clim() == (0.0, np.abs(HEADS).max() + 1.0)
    assert image(v.head_heatmap(HEADS, "score", limits=(-3.0, 5.0)).axes[0]).get_clim() == (-3.0, 5.0)
    assert image(v.head_heatmap(HEADS, "score").axes[0]).get_clim() == (HEADS.min(), HEADS.max())
    assert drawn(v.head_heatmap(np.zeros((1, 1)), "score"))
    many = v.sweep_heatmap(np.zeros((120, 64)), layers=range(5, 125)).axes[0]
    assert texts(many.get_yticklabels()) == [str(5 + int(i)) for i in many.get_yticks()]
    assert 10 < len(many.get_yticks()) <= 120
    assert v.sweep_heatmap(HEADS, "position", "bits").axes[0].get_xlabel() == "position"


def test_a_profile_runs_over_true_layers() -> None:
    figure = v.layer_profile(
        HEADS.T, layers=[12, 4, 8], labels=["_a", "$b$", "c", "d", "e"], ylabel="norm", spread=np.abs(HEADS.T)
    )
    ax = figure.axes[0]
    for i, line in enumerate(ax.lines):
        np.testing.assert_array_equal(line.get_xdata(), [4, 8, 12])
        np.testing.assert_array_equal(line.get_ydata(), HEADS[[1, 2, 0], i])
        assert line.get_color() == LINES[i]
    assert texts(ax.get_legend().get_texts()) == ["_a", "$b$", "c", "d", "e"]
    low, high = (ax.collections[2].get_datalim(ax.transData).get_points()[i, 1] for i in (0, 1))
    assert low == pytest.approx((HEADS - np.abs(HEADS))[:, 2].min())
    assert high == pytest.approx((HEADS + np.abs(HEADS))[:, 2].max())
    assert drawn(figure)
    assert v.layer_profile([3.0], ylabel="norm").axes[0].lines[0].get_ydata().tolist() == [3.0]
    many = v.layer_profile(np.zeros((60, 3)), labels=[str(i) for i in range(60)], ylabel="norm")
    assert len({(line.get_color(), line.get_linestyle()) for line in many.axes[0].lines}) == 28 and drawn(many)


def test_a_trajectory_is_a_probability() -> None:
    figure = v.probability_trajectory({" Paris": [0.0, 0.25, 1.0], "_x$": [0.5, 0.25, 0.0]}, layers=[1, 2, 5])
    ax = figure.axes[0]
    assert [line.get_ydata().tolist() for line in ax.lines] == [[0.0, 0.25, 1.0], [0.5, 0.25, 0.0]]
    assert ax.lines[0].get_xdata().tolist() == [1, 2, 5]
    assert texts(ax.get_legend().get_texts()) == ["␣Paris", "_x$"]
    assert -0.1 < ax.get_ylim()[0] <= 0.0 and 1.0 <= ax.get_ylim()[1] < 1.1
    assert v.probability_trajectory(jnp.array([0.5, 0.75])).axes[0].get_legend() is None
    with pytest.raises(ValueError, match="from -1 to 3, and probabilities"):
        v.probability_trajectory([-1.0, 3.0])
    with pytest.raises(ValueError, match=r"lengths \[1, 2\]"):
        v.probability_trajectory({"a": [0.5], "b": [0.5, 0.5]})


def test_a_lens_table_shows_texts_and_probabilities() -> None:
    ax = v.lens_table(ONE).axes[0]
    np.testing.assert_array_equal(image(ax).get_array(), [[0.5, 0.25], [0.875, 0.125]])
    assert texts(ax.get_yticklabels()) == ["4", "9"] and texts(ax.get_xticklabels()) == ["1", "2"]
    cells = {(round(t.get_position()[0]), t.get_position()[1], t.get_ha()): t.get_text() for t in ax.texts}
    assert cells == {
        (0, 0, "left"): "␣the", (0, 0, "right"): "0.50", (1, 0, "left"): BAD, (1, 0, "right"): "0.25",
        (0, 1, "left"): "\\t", (0, 1, "right"): "0.88", (1, 1, "left"): "␣of", (1, 1, "right"): "0.12",
    }  # fmt: skip
    inks = {t.get_text(): t.get_color() for t in ax.texts}
    assert inks["\\t"] == "black" and inks["␣of"] == "white"  # on yellow, on violet

    other = [{"layer": row["layer"], "predictions": [("long" * 9, 0.1 * row["layer"])]} for row in ONE]
    ax = v.lens_table([ONE, other], ["x", "\n"]).axes[0]
    np.testing.assert_allclose(image(ax).get_array(), [[0.5, 0.4], [0.875, 0.9]])
    assert texts(ax.get_xticklabels()) == ["x", "\\n"]
    shown = {t.get_position(): t.get_text() for t in ax.texts}
    assert (
        (shown[0, 0], shown[0, 1]) == ("␣the", "\\t") and shown[1, 0].startswith("longl") and shown[1, 0].endswith("…")
    )
    uneven = v.lens_table([ONE[0], {"layer": 9, "predictions": [("x", 1.0)]}])
    assert image(uneven.axes[0]).get_array().mask.tolist() == [[False, False], [False, True]] and drawn(uneven)

    figure = v.lens_table([ONE] * 400)
    assert figure.get_size_inches()[0] < 30 and not figure.axes[0].texts  # no cell holds two letters
    figure = v.lens_table([other] * 12)
    drawn(figure)
    width = figure.axes[0].get_window_extent().width / 12
    assert all(t.get_window_extent().width < width for t in figure.axes[0].texts)


def test_bars_are_the_contributions() -> None:
    values = np.array([0.5, -2.0, 1.0])
    ax = v.attribution_bars(Result(jnp.asarray(values), "direct_logit_attribution", layers=(3, 4, 9))).axes[0]
    assert [bar.get_height() for bar in ax.patches] == values.tolist()
    assert [bar.get_facecolor() for bar in ax.patches] == [to_rgba(c) for c in (POSITIVE, NEGATIVE, POSITIVE)]
    assert texts(ax.get_xticklabels()) == ["3", "4", "9"] and ax.get_xlabel() == "layer"
    assert ax.get_ylabel() == "contribution to the logit"
    named = v.attribution_bars(values, labels=["embedding", " $a$", "\n"]).axes[0]
    assert texts(named.get_xticklabels()) == ["embedding", "␣$a$", "\\n"]

    parts = np.array([[1.0, -1.0], [0.5, 2.0]])
    ax = v.attribution_bars(Result(parts, "component_attribution", layers=(0, 7))).axes[0]
    assert [bar.get_height() for bar in ax.patches] == [1.0, 0.5, -1.0, 2.0]
    assert [round(bar.get_x() + bar.get_width() / 2, 6) for bar in ax.patches] == [-0.2, 0.8, 0.2, 1.2]
    assert texts(ax.get_legend().get_texts()) == ["attention", "MLP"] and texts(ax.get_xticklabels()) == ["0", "7"]
    ranked = v.attribution_bars(parts, k=3, layers=[0, 7]).axes[0]
    assert [bar.get_width() for bar in ranked.patches] == [2.0, 1.0, -1.0]
    assert texts(ranked.get_yticklabels()) == ["L7 MLP", "L0 attention", "L0 MLP"]


def test_the_strongest_heads_are_named() -> None:
    heads = np.array([[0.1, -3.0, 0.2], [2.0, np.nan, -0.3]])
    figure = v.attribution_bars(Result(heads, "head_attribution", layers=(5, 18)), k=3)
    ax = figure.axes[0]
    assert texts(ax.get_yticklabels()) == ["L5H1", "L18H0", "L18H2"] and ax.get_ylabel() == "head"
    assert [bar.get_width() for bar in ax.patches] == [-3.0, 2.0, -0.3]
    assert ax.yaxis_inverted() and drawn(figure)  # the strongest on top
    assert len(v.attribution_bars(RNG.normal(size=(30, 9))).axes[0].patches) == 20
    two = Result(np.array([[1.0, 2.0]]), "head_attribution", layers=(4,))
    assert texts(v.attribution_bars(two).axes[0].get_yticklabels()) == ["L4H1", "L4H0"]
    neurons = Result(np.array([[1.0, 2.0]]), "neuron_attribution", layers=(4,))
    assert texts(v.attribution_bars(neurons).axes[0].get_yticklabels()) == ["L4N1", "L4N0"]


def test_an_alpha_curve_marks_no_change_and_the_best() -> None:
    figure = v.alpha_curve(
        [2.0, 0.5, 1.25], {"accuracy": [0.5, np.nan, 0.75], "_loss": [3.0, 1.0, 2.0]}, ylabel="score"
    )
    ax = figure.axes[0]
    curves = [line for line in ax.lines if line.get_marker() == "o"]
    stars = [line for line in ax.lines if line.get_marker() == "*"]
    assert curves[1].get_xdata().tolist() == [0.5, 1.25, 2.0] and curves[1].get_ydata().tolist() == [1.0, 2.0, 3.0]
    assert [(star.get_xdata()[0], star.get_ydata()[0]) for star in stars] == [(1.25, 0.75), (2.0, 3.0)]
    (unchanged,) = [line for line in ax.lines if line.get_marker() == "None"]
    assert list(unchanged.get_xdata()) == [1.0, 1.0]
    legend = texts(ax.get_legend().get_texts())
    assert legend == ["accuracy: ★ at α = 1.25 (0.75)", "_loss: ★ at α = 2 (3)", "no change (α = 1)"] and drawn(figure)
    (star,) = [
        line for line in v.alpha_curve([1, 2, 3], [5.0, 4.0, 6.0], best=2).axes[0].lines if line.get_marker() == "*"
    ]
    assert star.get_ydata()[0] == 4.0
    with pytest.raises(ValueError, match="none of the strengths: 1, 2"):
        v.alpha_curve([1.0, 2.0], [5.0, 4.0], best=7.0)


def lines_of(ax: Any) -> list[Any]:
    return [patch for patch in ax.patches if type(patch) is PathPatch]


def test_a_circuits_edges_are_as_wide_as_their_scores_and_lead_upwards() -> None:
    figure = v.plot_circuit(CIRCUIT)
    drawn(figure)
    ax = figure.axes[0]
    places = {text.get_text(): text.get_position() for text in ax.texts}
    assert set(places) == {"input", "m0", "a1.h2", "a2.h0", "logits"}
    heights = [places[name][1] for name in ("input", "m0", "a1.h2", "a2.h0", "logits")]
    assert heights == sorted(set(heights))
    assert texts(ax.get_yticklabels()) == ["input", "layer 0", "layer 1", "layer 2", "logits"]
    sizes = {abs(SCORES[GRAPH.edge(name)]): SCORES[GRAPH.edge(name)] for name in PATH}
    lines = sorted(lines_of(ax), key=lambda line: line.get_linewidth())
    assert len(lines) == 6
    for line, (size, score) in zip(lines, sorted(sizes.items()), strict=True):
        assert line.get_linewidth() == pytest.approx(0.5 + 3.5 * size / max(sizes))
        assert line.get_edgecolor()[:3] == to_rgba(NEGATIVE if score < 0 else POSITIVE)[:3]
        heights = line.get_path().vertices[:, 1]
        assert (np.diff(heights) >= 0).all() and heights[-1] > heights[0]
    marks = [(line.get_marker(), *line.get_xydata()[0]) for line in ax.lines]
    x, y = places["a1.h2"]
    (queries,), (values,), (keys,) = ([mark for mark in marks if mark[0] == kind] for kind in "o^s")
    assert queries[1] < x < values[1] and queries[2] == values[2] < y < keys[2]
    said = texts(ax.get_legend().get_texts())
    assert "arrives at queries" in said and any(text.startswith("raises the metric: +") for text in said)
    # What passes a row passes beside its nodes.
    (passing,) = [line for line in lines if len(line.get_path().vertices) > 10]
    low, high = 0.0, 0.0
    for name in ("a1.h2", "a2.h0"):
        (box,) = [
            b
            for b in ax.patches
            if type(b) is FancyBboxPatch and abs(b.get_y() + b.get_height() / 2 - places[name][1]) < 1e-9
        ]
        low, high = box.get_y(), box.get_y() + box.get_height()
        inside = [x for x, y in passing.get_path().vertices if low <= y <= high]
        assert inside and all(abs(x - places[name][0]) > box.get_width() / 2 for x in inside)


@pytest.mark.parametrize("n", [10, 200])
def test_no_name_of_a_circuit_covers_another(n: int) -> None:
    graph = Graph(12, 9, 9, 64)
    scores = np.where(graph.edges, np.random.default_rng(1).normal(size=graph.edges.shape), 0.0)
    scores[0] += 3  # so that a circuit of the largest hangs together
    scores[:, -1] += 3
    order = np.argsort(-scores, axis=None)[:400]
    edges = np.zeros(graph.edges.size, bool)
    edges[order] = True
    figure = v.plot_circuit(Circuit(graph, edges=edges.reshape(scores.shape) & graph.edges, scores=scores), n)
    drawn(figure)
    ax = figure.axes[0]
    assert len(lines_of(ax)) == n and ax.get_xlabel().endswith(f"; drawn are the {n} largest")
    boxes = [text.get_window_extent() for text in ax.texts]
    assert len(boxes) > n / 10
    for i, a in enumerate(boxes):
        assert not any(a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1 for b in boxes[:i])


def test_circuits_of_nodes_and_neurons_and_of_next_to_nothing() -> None:
    own = np.linspace(-2.0, 1.0, len(GRAPH.writers))
    own[2] = np.nan
    ax = v.plot_circuit(Circuit(GRAPH, nodes=["input", "a0.h1", "m0", "a2.h3"], scores=own)).axes[0]
    colours = {name.get_text(): box.get_facecolor() for name, box in zip(ax.texts, [p for p in ax.patches if type(p) is FancyBboxPatch], strict=True)}  # fmt: skip
    assert not lines_of(ax) and ax.get_xlabel() == "4 of 16 nodes, and all edges between them"
    assert colours["a0.h1"] == to_rgba("0.75") and "no score" in texts(ax.get_legend().get_texts())
    assert colours["input"][2] > 2 * colours["input"][0] and colours["a2.h3"][0] > colours["a2.h3"][2]  # blue, red
    neurons = np.zeros((3, 40), bool)
    neurons[1, :30] = True
    figure = v.plot_circuit(Circuit(GRAPH, neurons=neurons))
    names = texts(figure.axes[0].texts)
    assert (
        names == [f"m1.n{i}" for i in range(30)]
        and figure.axes[0].get_xlabel() == "30 of 120 neurons"
        and drawn(figure)
    )
    one = v.plot_circuit(Circuit(GRAPH, edges=["input->logits"]))
    (line,) = lines_of(one.axes[0])
    assert line.get_linewidth() == 1.0 and texts(one.axes[0].get_legend().get_texts()) == ["no score"] and drawn(one)
    empty = v.plot_circuit(Circuit(GRAPH, edges=np.zeros_like(GRAPH.edges)))
    assert texts(empty.axes[0].texts) == ["nothing is kept"] and drawn(empty)
    assert empty.axes[0].get_xlabel() == "empty: 0 of 262 edges"


def test_keys_that_heads_share_are_told_to_each_of_them_that_is_kept() -> None:
    graph = Graph(3, 4, 2, 16, grouped=True)
    edges = ["input->a1.g0<k>", "a1.h0->logits", "a1.h1->logits"]
    assert len(lines_of(v.plot_circuit(Circuit(graph, edges=edges)).axes[0])) == 4
    assert len(lines_of(v.plot_circuit(Circuit(graph, edges=edges[:2])).axes[0])) == 2


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: v.plot_circuit(CIRCUIT, n=0), "n is 0, and must be at least 1"),
        (lambda: v.plot_circuit(PATTERN), "circuit is a ndarray, and a Circuit is needed"),
        (lambda: v.attention_heatmap(np.zeros((2, 3, 3))), r"pattern has shape \[2, 3, 3\], and \[T, S\].*head_grid"),
        (lambda: v.attention_heatmap(PATTERN, TOKENS[:2]), "tokens has 2 texts, and 4"),
        (lambda: v.attention_heatmap(PATTERN, "text"), "tokens is of type str"),
        (lambda: v.attention_heatmap(np.zeros((0, 0))), "nothing to draw"),
        (lambda: v.attention_heatmap([[1.0], [1.0, 0.0]]), "not an array of numbers"),
        (lambda: jax.jit(v.attention_heatmap)(PATTERN), "traced|Tracer"),
        (lambda: v.head_grid(PATTERN), "attention_heatmap"),
        (lambda: v.head_grid(PATTERN[None], columns=0), "columns is 0"),
        (lambda: v.head_grid(PATTERN[None], titles=["a", "b"]), "titles has 2 texts, and 1"),
        (lambda: v.head_grid(PATTERN[None], figure=3), "a matplotlib Figure"),
        (lambda: v.entropy_heatmap(np.zeros((2, 3, 4))), r"entropy\.mean\(axis=-1\)"),
        (lambda: v.head_heatmap(HEADS, "x", layers=[1, 2]), "2 numbers, and the values have 3 layers.*captured_layers"),
        (lambda: v.head_heatmap(HEADS, "x", layers=["a"]), "sequence of integers"),
        (lambda: v.sweep_heatmap(HEADS, tokens=TOKENS), "tokens has 4 texts, and 5"),
        (lambda: v.layer_profile(HEADS, ylabel="x", labels=["a"]), "labels has 1 texts, and 3"),
        (lambda: v.layer_profile(HEADS, ylabel="x", spread=HEADS[0]), "spread has shape"),
        (lambda: v.lens_table([]), "no layers"),
        (lambda: v.lens_table([{"layer": 0}]), "layer_predictions"),
        (lambda: v.lens_table(ONE, tokens=["a"]), "several positions"),
        (lambda: v.lens_table([ONE, ONE[:1]]), "layers differ"),
        (lambda: v.attribution_bars(Result({"q": 1}, "weight_composition")), "named: q"),
        (lambda: v.attribution_bars(HEADS, k=0), "k is 0"),
        (lambda: v.attribution_bars(HEADS, labels=["a"] * 3), "names of their own"),
        (lambda: v.attribution_bars(np.zeros((1, 3, 4))), "one prompt"),
        (lambda: v.alpha_curve([1.0, 2.0], [1.0]), "1 entries, and alphas 2"),
        (lambda: v.alpha_curve([1.0, np.nan], [1.0, 2.0]), "not finite"),
        (lambda: v.alpha_curve([1.0], {}), "no lines"),
    ],
)  # fmt: skip
def test_refusals_are_sentences(call: Any, sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=sentence):
        call()
    assert plt.get_fignums() == []


@pytest.mark.parametrize("name", CALLS)
def test_without_matplotlib_the_way_to_get_it_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "oculi-jax\[viz\]"'):
        CALLS[name]()


def test_importing_brings_no_matplotlib_and_drawing_no_pyplot() -> None:
    code = """
import sys
import oculi_jax.visualize as visualize
assert "matplotlib" not in sys.modules
visualize.attention_heatmap([[1.0]]).savefig(__import__("io").BytesIO())
assert "matplotlib.figure" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
