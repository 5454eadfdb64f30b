r"""The n-gram model that neural language models have to beat: interpolated Kneser–Ney smoothing.

A count is trusted less by a discount $D$, and what that frees goes to the next shorter context; there a token counts by
how many different tokens it has followed, not by how often: "Francisco" is frequent, but only after "San".

Kneser and Ney (1995); in the interpolated form of Chen and Goodman (1999), equations 24 to 26, one discount an order.
"""

import numpy as np
from jaxtyping import Float, Int

from paperlab.checks import require_at_least, require_between, require_ndim


class KneserNey:
    r"""An n-gram model of ``tokens`` (ids below ``vocab``).

    For a context $h$ of k tokens and the context $h'$ without its oldest,

    $$p(w \mid h) = \frac{\max(c(hw) - D_k, 0) + D_k\,|\{v : c(hv) > 0\}|\, p(w \mid h')}{\sum_v c(hv)},$$

    down to the uniform distribution. $c$ counts occurrences at the highest order and different preceding tokens below;
    $D_k = n_1 / (n_1 + 2 n_2)$ from the numbers of n-grams seen once and twice.

    Raises:
        ValueError: fewer tokens than ``order``, an id outside the vocabulary, or n-grams that do not fit in 63 bits.
    """

    def __init__(self, tokens: Int[np.ndarray, " n"], *, vocab: int, order: int = 5) -> None:
        require_ndim(1, tokens=tokens)
        require_at_least(1, order=order)
        require_at_least(2, vocab=vocab)
        require_at_least(order, **{"length of tokens": len(tokens)})
        require_between(0, vocab - 1, tokens=tokens)
        if vocab**order > 2**63:
            raise ValueError(f"order must keep vocab ** order below 2 ** 63, got {order} with vocab = {vocab}")
        self.vocab, self.order = vocab, order
        self.levels: list[tuple[np.ndarray, ...]] = []
        grams, counts = np.unique(_windows(np.asarray(tokens, dtype=np.int64), order, vocab), return_counts=True)
        for size in range(order, 0, -1):
            self.levels.append(_level(grams, counts, vocab))
            # The next shorter n-grams, each counted once for every different token before it.
            grams, counts = np.unique(grams % vocab ** (size - 1), return_counts=True)

    def log_probabilities(self, tokens: Int[np.ndarray, " n"]) -> Float[np.ndarray, " full"]:
        """Natural logarithm of the probability of each token that has a full context, given that context.

        Raises:
            ValueError: fewer tokens than the order, or an id outside the vocabulary.
        """
        require_at_least(self.order, **{"length of tokens": len(tokens)})
        require_between(0, self.vocab - 1, tokens=tokens)
        asked = _windows(np.asarray(tokens, dtype=np.int64), self.order, self.vocab)
        found = np.full(len(asked), 1 / self.vocab)
        for size, (grams, counts, contexts, totals, free) in enumerate(reversed(self.levels), start=1):
            gram = asked % self.vocab**size
            kept = _look_up(grams, counts, gram)
            total, rest = (_look_up(contexts, values, gram // self.vocab) for values in (totals, free))
            seen = total > 0
            found[seen] = (kept[seen] + rest[seen] * found[seen]) / total[seen]
        return np.log(found)


def _windows(tokens: Int[np.ndarray, " n"], size: int, vocab: int) -> Int[np.ndarray, " runs"]:
    """Every run of ``size`` tokens as one number, the oldest token in the highest place."""
    found = np.zeros(len(tokens) - size + 1, dtype=np.int64)
    for k in range(size):
        found = found * vocab + tokens[k : len(tokens) - size + 1 + k]
    return found


def _level(grams: np.ndarray, counts: np.ndarray, vocab: int) -> tuple[np.ndarray, ...]:
    """N-grams with their discounted counts; contexts with their totals and with the mass that the discount frees."""
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    discount = once / (once + 2 * twice) if once and twice else 0.5
    contexts, first, kinds = np.unique(grams // vocab, return_index=True, return_counts=True)
    totals = np.add.reduceat(counts, first)
    return grams, counts - discount, contexts, totals, discount * kinds


def _look_up(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The value of each asked key, 0 where there is none; ``keys`` are sorted."""
    at = np.searchsorted(keys, asked).clip(max=len(keys) - 1)
    return np.where(keys[at] == asked, values[at], 0)
