"""Cross-entropy of models that only count: what a trained model has to beat."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def pairs(tokens_N: Tokens, starts_D: Tokens | None) -> tuple[Tokens, Tokens]:
    """Returns each token and the one behind it, (P,) and (P,): all pairs, or those within documents.

    Args:
        tokens_N: tokens (N,).
        starts_D: where documents begin, in these tokens and beyond; None counts pairs over their borders too.
    """
    first, second = tokens_N[:-1], tokens_N[1:]
    if starts_D is None:
        return first, second
    within = np.ones(len(second), dtype=bool)
    within[starts_D[(starts_D > 0) & (starts_D < len(tokens_N))] - 1] = False
    return first[within], second[within]


class Unigram:
    """Add-one smoothed token frequencies: p(w) = (c(w) + 1) / (N + V).

    Args:
        train_N: training tokens (N,).
        vocab_size: V.
    """

    def __init__(self, train_N: Tokens, vocab_size: int) -> None:
        counts = np.bincount(train_N, minlength=vocab_size)
        self._probability_V: Floats = (counts + 1) / (len(train_N) + vocab_size)

    def probability(self, token: Tokens) -> Floats:
        """Returns p(token), elementwise."""
        return self._probability_V[token]


class KneserNeyBigram:
    """Interpolated Kneser-Ney: p(w|v) = max(c(v,w) - D, 0) / c(v) + D n(v,.) / c(v) p_continuation(w).

    n counts distinct pairs. p_continuation is made from n(.,w) in the same way, and interpolated with the uniform
    distribution, so that no token has probability zero. The discounts are n1 / (n1 + 2 n2), with n1 and n2 the number
    of things seen once and twice.

    Source: Kneser and Ney, "Improved backing-off for m-gram language modeling", 1995; Chen and Goodman, "An empirical
    study of smoothing techniques for language modeling", 1999, section 3 (interpolated form, discount).

    Args:
        train_N: training tokens (N,).
        vocab_size: V.
        starts_D: where documents begin in them, to count pairs within documents only.
    """

    def __init__(self, train_N: Tokens, vocab_size: int, starts_D: Tokens | None = None) -> None:
        self._vocab_size = vocab_size
        context_P, token_P = pairs(train_N, starts_D)
        self._pairs, self._pair_counts = np.unique(context_P * vocab_size + token_P, return_counts=True)
        self._discount = _discount(self._pair_counts)
        first, second = np.divmod(self._pairs, vocab_size)
        self._context_counts_V = np.bincount(context_P, minlength=vocab_size)
        self._followers_V = np.bincount(first, minlength=vocab_size)
        predecessors_V = np.bincount(second, minlength=vocab_size)
        num_pairs, discount = max(len(self._pairs), 1), _discount(predecessors_V)
        # With no pair at all, everything goes to the uniform part.
        left = discount * np.count_nonzero(predecessors_V) / num_pairs if len(self._pairs) else 1.0
        self._continuation_V: Floats = np.maximum(predecessors_V - discount, 0) / num_pairs + left / vocab_size

    def probability(self, context: Tokens, token: Tokens) -> Floats:
        """Returns p(token | context), elementwise."""
        pair = context * self._vocab_size + token
        place = np.minimum(np.searchsorted(self._pairs, pair), max(len(self._pairs) - 1, 0))
        count = np.where(self._pairs[place] == pair, self._pair_counts[place], 0) if len(self._pairs) else np.zeros(len(pair))
        seen = self._context_counts_V[context]
        times = np.maximum(seen, 1)
        left = np.where(seen > 0, self._discount * self._followers_V[context] / times, 1.0)
        return np.maximum(count - self._discount, 0) / times + left * self._continuation_V[token]


def _discount(counts: npt.NDArray[Any]) -> float:
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    # The estimate needs both; without them any discount between 0 and 1 is a proper model.
    return once / (once + 2 * twice) if once and twice else 0.5


def baselines(
    train_N: Tokens,
    validation_M: Tokens,
    vocab_size: int,
    train_starts_D: Tokens | None = None,
    validation_starts_D: Tokens | None = None,
) -> dict[str, float]:
    """Returns both cross-entropies over the targets of the validation split that a trained model has.

    Args:
        train_N: training tokens (N,).
        validation_M: validation tokens (M,), M >= 2.
        vocab_size: V.
        train_starts_D, validation_starts_D: where documents begin, if the model sees no document from another: pairs are then
            counted and judged within documents. None judges tokens 1 to M-1.
    Returns:
        `unigram` and `bigram_kneser_ney`, in nats per token.
    """
    context, target = pairs(validation_M, validation_starts_D)
    unigram = Unigram(train_N, vocab_size).probability(target)
    bigram = KneserNeyBigram(train_N, vocab_size, train_starts_D).probability(context, target)
    return {"unigram": float(-np.log(unigram).mean()), "bigram_kneser_ney": float(-np.log(bigram).mean())}
