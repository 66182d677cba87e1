"""What the commands share with `--prompts`: the set on a model, answers of each prompt, means with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import oculi_jax

from .common import Asked, console, shown
from .effects import MUCH_LIKELIER, spelling, twin_of
from .prompts import Row, token_ids

if TYPE_CHECKING:
    import numpy as np

    from ..metrics import Metric
    from ..models.llama import LlamaAttentionAdapter

# How many prompts are captured at once: their activations are held together.
AT_ONCE = 32
# So many prompts give an interval that is about as wide as it should be.
ENOUGH = 10


def encoded(
    adapter: LlamaAttentionAdapter, rows: Sequence[Row], field: str, asked: Asked
) -> tuple[np.ndarray, np.ndarray]:
    """The ids `[B, T]` of a field of the rows, and their mask."""
    ids = [with_row(row, lambda row: token_ids(adapter, str(row[field]), asked.longer, asked.chat)) for row in rows]
    return oculi_jax.padded(ids, adapter.tokenizer)


def answers(
    adapter: LlamaAttentionAdapter, tokens: np.ndarray, mask: np.ndarray, rows: Sequence[Row], field: str
) -> np.ndarray:
    """The id `[B]` of each row's answer; says where the other spelling is much likelier, as `effects.answer` does of one."""
    import numpy as np

    ids = np.array([with_row(row, lambda row: adapter.to_single_token(str(row[field]))) for row in rows])
    found = {text: twin_of(adapter, text) for text in {str(row[field]) for row in rows}}
    twins = np.array(
        [i if (twin := found[str(row[field])]) is None else twin for i, row in zip(ids, rows, strict=True)]
    )
    if (twins == ids).all():
        return ids
    chances, better = (
        np.asarray(plain_values(adapter, tokens, mask, oculi_jax.metrics.log_probability(x))) for x in (ids, twins)
    )
    likelier = np.flatnonzero(better > chances + MUCH_LIKELIER)
    if likelier.size:
        row = rows[likelier[0]]
        text = str(row[field])
        console(error=True).print(
            f"In {likelier.size} of {len(rows)} prompts the other spelling of the {field} is one token too, and likelier: "
            f"{shown(spelling(text))} for {shown(text)} in {row.where}.",
            markup=False,
        )
    return ids


def plain_values(adapter: LlamaAttentionAdapter, tokens: np.ndarray, mask: np.ndarray, metric: Metric) -> np.ndarray:
    """A metric `[B]` of the prompts as they are."""
    import numpy as np

    return np.asarray(oculi_jax.sweep(adapter.model, tokens, (), metric, mask=mask, progress=False))


def measure_set(
    adapter: LlamaAttentionAdapter, tokens: np.ndarray, mask: np.ndarray, rows: Sequence[Row]
) -> tuple[Metric, str]:
    """The metric at each prompt's last token, and what it is called."""
    ids = answers(adapter, tokens, mask, rows, "target")
    if rows[0]["against"] is None:
        return oculi_jax.metrics.log_probability(ids), f"log-probability of {in_words(rows, 'target')}"
    return oculi_jax.metrics.logit_difference(ids, others(adapter, tokens, mask, rows, ids)), difference(rows)


def others(
    adapter: LlamaAttentionAdapter, tokens: np.ndarray, mask: np.ndarray, rows: Sequence[Row], ids: np.ndarray
) -> np.ndarray:
    """The id `[B]` of what each row's answer is measured against."""
    import numpy as np

    found = answers(adapter, tokens, mask, rows, "against")
    if (same := np.flatnonzero(found == ids)).size:
        row = rows[same[0]]
        raise ValueError(
            f"{row.where}: target and against are both {shown(row['target'])}: there is no difference to measure."
        )
    return found


def difference(rows: Sequence[Row]) -> str:
    """The difference of two logits, in words."""
    return f"logit of {in_words(rows, 'target')} − logit of {in_words(rows, 'against')}"


def in_words(rows: Sequence[Row], field: str) -> str:
    """What all rows have in a field, or what that is of each."""
    found = {row[field] for row in rows}
    return shown(found.pop()) if len(found) == 1 else "the target" if field == "target" else "the other token"


def chunks(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Arrays of the set, `[B, …]`, in parts of nearly one size, so that at most two programs are compiled."""
    import numpy as np

    parts = -(-len(arrays[0]) // AT_ONCE)
    return zip(*(np.array_split(x, parts) for x in arrays), strict=True)


def mean_and_interval(values: Any) -> dict[str, np.ndarray]:
    """A mean over prompts with the ends of its 95 % interval, and each prompt's own values `[B, …]`."""
    import numpy as np

    found = oculi_jax.bootstrap(np.asarray(values, np.float32))
    ends = {"mean": np.asarray(found.mean), "low": np.asarray(found.low), "high": np.asarray(found.high)}
    return {**ends, "by_prompt": np.asarray(values)}


def note_few(rows: Sequence[Row]) -> None:
    """Says so where intervals are of few prompts."""
    if len(rows) < ENOUGH:
        console(error=True).print(
            f"95 % intervals of {len(rows)} prompts are narrower than they should be: they are made of these values alone, and of "
            f"two prompts are just the two. Give {ENOUGH} prompts or more."
        )


def interval_cells(found: dict[str, np.ndarray], place: tuple[int, ...] = (), sign: str = "+") -> tuple[str, str]:
    """A mean and its interval as two cells of a table."""
    mean, low, high = (format(float(found[name][place]), f"{sign}.3f") for name in ("mean", "low", "high"))
    return mean, f"{low} to {high}"


def as_lists(rows: Sequence[Row], *names: str) -> dict[str, Any]:
    """The rows as JSON has them: each field as a list."""
    return {name: [row[name] for row in rows] for name in names}


def with_row(row: Row, function: Callable[[Row], Any]) -> Any:
    """What a function makes of a row; what is wrong is said of that row."""
    try:
        return function(row)
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from None
