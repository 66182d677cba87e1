"""What tiny-facts has to know, and how well it does: `python weights/tiny_facts_score.py [DIRECTORY]` prints the table.

All questions are ones that training never shows (tiny_facts_text.py). The words of an answer are its tokens; a question asks
what the model's next token is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny_facts_text as text

from oculi_jax import forward
from oculi_jax.diagnostics import repeated_tokens
from oculi_jax.models.llama import Llama


@dataclass(frozen=True)
class Score:
    """A figure, its bar if it has one, and whether it must reach it from below (`at_least`) or stay under it."""

    name: str
    value: float
    bar: float | None = None
    at_least: bool = True

    @property
    def met(self) -> bool:
        if self.bar is None:
            return True
        return self.value >= self.bar if self.at_least else self.value <= self.bar

    def __str__(self) -> str:
        bar = "" if self.bar is None else f"   {'≥' if self.at_least else '≤'} {self.bar:<5}"
        return f"{self.name:<72} {self.value:6.3f}{bar} {'' if self.met else 'MISSED'}".rstrip()


def answers(model: Llama, tokenizer: Any, questions: Sequence[text.Question]) -> tuple[np.ndarray, np.ndarray]:
    """For each question: whether the most probable token answers it `[N]`, and the probability of all that do `[N]`."""
    ids = [tokenizer.encode(question.prompt) for question in questions]
    length = max(map(len, ids))
    tokens = np.array([row + [0] * (length - len(row)) for row in ids], np.int32)
    mask = np.array([[t < len(row) for t in range(length)] for row in ids])
    run = jax.jit(jax.vmap(lambda model, row, real: forward(model, row, logits="last", mask=real).logits, (None, 0, 0)))
    chances = np.concatenate(
        [
            np.asarray(jax.nn.softmax(run(model, tokens[i : i + 100], mask[i : i + 100])))
            for i in range(0, len(tokens), 100)
        ]
    )
    vocabulary = tokenizer.get_vocab()
    right = np.zeros(chances.shape, bool)
    for row, question in enumerate(questions):
        right[row, [_id(vocabulary, question.prompt, answer) for answer in question.answers]] = True
    best = right[np.arange(len(right)), chances.argmax(-1)]
    return best, (chances * right).sum(-1)


def _id(vocabulary: dict[str, int], prompt: str, answer: str) -> int:
    """The second half of a year follows its century without a space; any other word has one before it."""
    return vocabulary[answer if prompt[-1].isdigit() else "▁" + answer]


def repeated_loss(model: Llama, seed: int = 3, n: int = 64, length: int = 50, interventions: Any = ()) -> np.ndarray:
    """Mean loss in nats of the first and of the second half `[2]` of repeated random tokens.

    The second half's first token is left out: nothing says that the sequence will be repeated.
    """
    tokens = jnp.asarray(repeated_tokens(model.config, seed, n, length))
    loss = _token_losses(model, tokens, interventions)  # of tokens 1 to 2 · length
    return np.array([loss[:, :length].mean(), loss[:, length + 1 :].mean()])


@jax.jit
def _token_losses(model: Llama, tokens: jax.Array, interventions: Any) -> jax.Array:
    def one(row: jax.Array) -> jax.Array:
        logits = forward(model, row, interventions).logits[:-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), row[1:, None], axis=1)[:, 0]

    return jax.vmap(one)(tokens)


def scores(model: Llama, tokenizer: Any) -> list[Score]:
    """Every score of the model card, with its bar."""
    facts = [question for relation in text.FACTS for question in relation.questions()]
    paris = text.Question("The capital of France is", ("Paris",))
    hops = text.TWO_HOP.questions()
    untold = [question for question in hops if not text.UNTOLD.isdisjoint(question.prompt.split())]
    told = [question for question in hops if question not in untold]
    spans = answers(model, tokenizer, text.span_questions())
    first, second = repeated_loss(model)

    def top(questions: Sequence[text.Question]) -> float:
        return float(answers(model, tokenizer, questions)[0].mean())

    return [
        Score("facts, in phrasings kept back: first choice", top(facts), 0.99),
        Score('P("Paris" | "The capital of France is")', float(answers(model, tokenizer, [paris])[1][0]), 0.95),
        Score("two hops, the continent of a capital, in phrasings kept back", top(told), 0.95),
        Score("the same of the 17 capitals whose continent no sentence tells", top(untold)),
        Score("indirect objects, in scenes, gifts and pairs kept back", top(text.gift_questions()), 0.98),
        Score("repeated random tokens: second half's loss, of the first half's", second / first, 0.05, at_least=False),
        Score("successors of days, months and numbers, in phrasings kept back", top(text.NEXT.questions()), 0.98),
        Score("later years, of events and years kept back: first choice", float(spans[0].mean()), 0.95),
        Score("later years, of events and years kept back: probability", float(spans[1].mean()), 0.95),
    ]


def main() -> None:
    from oculi_jax.utils.tokens import load_tokenizer

    directory = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "tiny-facts")
    found = scores(Llama.from_pretrained(directory), load_tokenizer(directory))
    print(*found, sep="\n")
    sys.exit(0 if all(score.met for score in found) else 1)


if __name__ == "__main__":
    main()
