"""Buckets: the prompts of a set in groups of near lengths, each run with the columns in which its tokens lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped

from .prompts import bucket
from .pytrees import pytree, static

# Of a bucket's columns, at most so much is padding.
MOST_PADDING = 0.25
# What is computed in some tenths of a second, which a program for another length must spare to be worth its compiling.
FLOPS_OF_A_PROGRAM = {"cpu": 2e10}
FLOPS_OF_A_PROGRAM_ELSEWHERE = 1e13


@pytree
class Window:
    """Which columns of a prompt run, where they are not all of them.

    Attributes:
        first: the first one, int32; `[C]` of several prompts.
        mask: bool `[T]`, True at real tokens among all columns; `[C, T]` of several prompts.
        n_columns: `T`, which the arrays of interventions cover; a window may reach beyond. Static.
    """

    first: Any
    mask: Any
    n_columns: int = static()


def widened(logits: Float[Array, "C V"], window: Window) -> Float[Array, "T V"]:
    """Logits of the columns that run among those of all; zero where there is padding."""
    whole = jnp.zeros((window.n_columns + len(logits), logits.shape[-1]), logits.dtype)
    whole = jax.lax.dynamic_update_slice_in_dim(whole, logits, window.first, 0)
    return jnp.where(window.mask[:, None], whole[: window.n_columns], 0.0)


@dataclass(frozen=True, eq=False)
class Bucket:
    """Prompts that run with the same number of columns.

    Attributes:
        prompts: their numbers.
        first: the column at which each begins, its first real token's.
        n_tokens: how many columns run.
    """

    prompts: Int[np.ndarray, "P"]
    first: Int[np.ndarray, "P"]
    n_tokens: int

    def of(self, places: Int[np.ndarray, "R"]) -> Bucket:
        """Some of its prompts."""
        return Bucket(self.prompts[places], self.first[places], self.n_tokens)

    def spread(self, value: Shaped[np.ndarray, "..."], axis: int, n_columns: int) -> Shaped[np.ndarray, "..."]:
        """What was found in the columns that ran, along `axis` of an array that leads with the prompts, among all; 0 in others."""
        whole = np.zeros((*value.shape[:axis], n_columns, *value.shape[axis + 1 :]), value.dtype)
        for first, own, target in zip(self.first, value, whole, strict=True):
            n = min(self.n_tokens, n_columns - first)
            np.moveaxis(target, axis - 1, 0)[first : first + n] = np.moveaxis(own, axis - 1, 0)[:n]
        return whole

    def cut(self, x: Shaped[np.ndarray, "B T"]) -> Shaped[np.ndarray, "P C"]:
        """The columns that run, of the bucket's prompts; zeros where they reach beyond."""
        columns = self.first[:, None] + np.arange(self.n_tokens)
        found = x[self.prompts[:, None], np.minimum(columns, x.shape[1] - 1)]
        return np.where(columns < x.shape[1], found, np.zeros((), x.dtype))


def whole(n_prompts: int, n_tokens: int) -> Bucket:
    """All prompts with all their columns."""
    return Bucket(np.arange(n_prompts), np.zeros(n_prompts, np.int32), n_tokens)


def weights_of(c: Mapping[str, int]) -> tuple[int, int]:
    """How many numbers a layer's attention and its MLP multiply with, of their sizes by letter."""
    return 2 * c["E"] * c["D"] * (c["H"] + c["K"]), 3 * c["E"] * c["F"]


def columns_of_a_program(platform: str, work: float) -> float:
    """How many columns, of so many operations each, take as long as a second or two of compiling is worth."""
    return FLOPS_OF_A_PROGRAM.get(platform, FLOPS_OF_A_PROGRAM_ELSEWHERE) / work


def buckets_of(mask: Bool[np.ndarray, "B T"], worth: float) -> list[Bucket]:
    """Prompts by the next length of `bucket`'s ladder, longest first, so that any two sets run the same lengths.

    Args:
        mask: True at real tokens.
        worth: how many columns of padding are cheaper than a program for another length, as `columns_of_a_program` has it. So
            many may join those of a longer bucket, as long as `MOST_PADDING` is kept.
    """
    first, last = mask.argmax(axis=1), mask.shape[1] - mask[:, ::-1].argmax(axis=1)
    spans = last - first
    lengths = np.array([bucket(int(span)) for span in spans])
    found: list[Bucket] = []
    for length in sorted(set(lengths.tolist()), reverse=True):
        prompts = np.flatnonzero(lengths == length)
        if found:
            joined = np.concatenate([found[-1].prompts, prompts])
            longer = found[-1].n_tokens
            padding = 1 - spans[joined].sum() / (len(joined) * longer)
            if len(prompts) * (longer - length) < worth and padding <= MOST_PADDING:
                found[-1] = Bucket(joined, first[joined].astype(np.int32), longer)
                continue
        found.append(Bucket(prompts, first[prompts].astype(np.int32), length))
    return found
