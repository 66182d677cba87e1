"""What notebooks show: well-formed, small, shapes and pictures; never screens of numbers."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import HeadAblation, Steer, cells, forward, plan, sweep
from oculi_jax.analysis.attribution import AttributionMethods
from oculi_jax.causal import activation_patching
from oculi_jax.models.llama import LlamaAttentionAdapter

from ..tiny import prompt, tiny_llama

IDS = prompt(6)


def metric(out: Any) -> Any:
    return out.logits[-1, 3]


class Balanced(HTMLParser):
    """Every tag that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def shown(thing: Any) -> str:
    html = thing._repr_html_()
    parser = Balanced()
    parser.feed(html)
    assert not parser.open and len(html) < 30_000
    text = re.sub(r"<[^>]*>", " ", html)
    assert "array(" not in text and len(re.findall(r"\d\.\d{3}", text)) < 8
    return text


def test_each_kind_shows_its_shapes() -> None:
    model = tiny_llama()
    adapter = LlamaAttentionAdapter(model)
    out = forward(model, IDS, HeadAblation(1, 2), capture=("z", "pattern"))
    assert "[3, 4, 6, 6] float32" in shown(out) and "[3, 4, 6, 6] float32" in shown(out.activations)
    assert "query heads" in shown(model) and "61" in shown(model)
    full = adapter.capture_full(IDS)
    shown(full)
    assert "[3, 2, 6, 6] float32" in shown(full.attention)
    heads = AttributionMethods.head_attribution(full.attention, model, 3, residual=full.residual)
    assert "[3, 4] float32" in shown(heads) and "<img" in heads._repr_html_()
    assert "[3, 1] int64" in shown(HeadAblation.grid(model.config)) and "[24] float32" in shown(
        Steer(1, np.ones(24, np.float32))
    )
    todo = shown(plan(model, IDS, HeadAblation.grid(model.config), metric))
    assert "layer evaluations" in todo and "about" in todo
    patched = activation_patching(model, IDS, IDS[::-1], metric, "z", ("layer", "head"))
    assert "[3, 4] float32" in shown(patched) and "<img" in patched._repr_html_()
    assert sweep(model, IDS, HeadAblation(1, np.arange(2)), metric).shape == (2,)


def test_a_picture_has_the_signs_of_its_numbers() -> None:
    from matplotlib.image import imread

    grid = np.array([[1.0, 0.0, -1.0], [0.5, np.nan, -0.25]])
    data = re.search(r"base64,([^']+)'", cells.picture(grid))
    assert data
    pixels = imread(io.BytesIO(base64.b64decode(data[1])), format="png")
    assert pixels.shape[:2] == (2, 3)
    red, green, blue = np.moveaxis(pixels[..., :3], -1, 0)
    np.testing.assert_array_equal(np.sign(red - blue), [[1, 0, -1], [1, 0, -1]])
    assert green[0, 1] == 1 and green[0, 0] < green[1, 0] < 1


@pytest.mark.parametrize(
    "value", [np.ones((65, 3)), np.ones(4), np.ones((1, 1)), "text", np.zeros((0, 3)), np.array([["a", "b"]])]
)
def test_what_is_no_small_grid_has_no_picture(value: Any) -> None:
    assert cells.picture(value) == ""


def test_names_and_texts_are_escaped() -> None:
    html = cells.table("<b>", [("<script>", "<i>")])
    assert "<script>" not in html and "<i>" not in html and "&lt;b&gt;" in html


def test_values_that_are_not_known_yet_are_shapes() -> None:
    said = []
    jax.jit(lambda x: said.append(cells.table("x", [("x", x), ("y", x[0, 0])])))(jnp.ones((3, 3)))
    assert "[3, 3] float32" in said[0] and "<img" not in said[0]
