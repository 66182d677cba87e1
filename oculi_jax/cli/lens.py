"""`oculi lens`: layer by layer, what the model would say if it stopped there."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer
from rich.table import Table
from rich.text import Text as TextCell

from ..adapter.configs import LogitConfig
from ..analysis.logit_lens import LogitLensAnalysis
from .common import (
    Dtype,
    Json,
    Longer,
    Model,
    Picture,
    Text,
    check_picture,
    console,
    open_adapter,
    print_json,
    save_picture,
    shown,
    working,
)


def lens(
    text: Text,
    top_k: Annotated[
        int, typer.Option("--top-k", "-k", help="How many tokens to show at each layer.", min=1, max=20)
    ] = 3,
    output: Picture = None,
    as_json: Json = False,
    model: Model = None,
    dtype: Dtype = "auto",
    allow_longer: Longer = False,
) -> None:
    """Layer by layer, what the model would say if it stopped there, and how the final answer comes up.

    The logit lens: final norm and unembedding applied to the residual stream after each layer.
    """
    picture = check_picture(output)
    adapter = open_adapter(model, dtype, text)
    analysis = LogitLensAnalysis(adapter.tokenizer)
    with working("Running the model"):
        capture = adapter.capture_logits(text, LogitConfig(top_k=top_k, positions=[-1]), allow_longer=allow_longer)
        predictions = analysis.layer_predictions(capture, top_k=top_k)
        answer = analysis.prediction_trajectory(capture)[-1]
        trajectory = np.asarray(analysis.token_probability_trajectory(capture, answer["token"]))
    name = shown(answer["text"])
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", justify="right")
    for k in range(top_k):
        table.add_column("what it would say" if k == 0 else "")
    table.add_column(TextCell(f"P({name})"))
    for row, p in zip(predictions, trajectory, strict=True):
        cells = [TextCell(f"{shown(token)} {chance:.3f}") for token, chance in row["predictions"]]
        table.add_row(str(row["layer"]), *cells, f"{p:.3f} {'█' * round(20 * float(p))}")
    if as_json:
        rows = zip(predictions, trajectory, strict=True)
        layers = [{**row, "probability_of_answer": float(p)} for row, p in rows]
        print_json({"prompt": text, "answer": answer["text"], "answer_id": answer["token"], "layers": layers})
    out = console(quiet=as_json)
    out.print(table)
    out.print(TextCell(f"{text} → {name} with probability {trajectory[-1]:.3f}"))
    if picture:
        from ..visualize import lens_table

        save_picture(lens_table(predictions, title=text), picture, as_json)
