r"""Soft-NMS: do not delete the boxes that overlap the best one, lower their scores.

A detector proposes many boxes for every object. Non-maximum suppression keeps the best and deletes all that overlap it
by more than a threshold; an object that stands close to another one is deleted as well. Multiplying the score by
something that falls with the overlap costs one line and brings such objects back.

Bodla, Singh, Chellappa and Davis (2017), https://arxiv.org/abs/1704.04503, section 4 and figure 3.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from paperlab.checks import require_between, require_finite, require_nonnegative, require_positive

FLOOR = 1e-3  # boxes with less are dropped, to save time only (section 4)
Decay = Callable[[Tensor], Tensor]  # overlap with the picked box -> what the score is multiplied by


def hard(threshold: float) -> Decay:
    r"""Greedy NMS: $\mathbb 1[\mathrm{IoU} < N_t]$.

    Raises:
        ValueError: ``threshold`` is not positive (it may exceed 1: then nothing is suppressed).
    """
    require_positive(threshold=threshold)
    return lambda overlap: (overlap < threshold).to(overlap)


def linear(threshold: float) -> Decay:
    r"""Linear Soft-NMS: $1 - \mathrm{IoU}$ where $\mathrm{IoU} \ge N_t$, else 1; it jumps at $N_t$ (the paper: 0.3).

    Raises:
        ValueError: ``threshold`` is not positive (it may exceed 1: then nothing decays).
    """
    require_positive(threshold=threshold)
    return lambda overlap: torch.where(overlap < threshold, torch.ones_like(overlap), 1 - overlap)


def gaussian(sigma: float) -> Decay:
    r"""Gaussian Soft-NMS: $e^{-\mathrm{IoU}^2/\sigma}$ for every overlap, without a jump (the paper: $\sigma = 0.5$).

    As $\sigma \to 0$ only disjoint boxes keep a score, as $\sigma \to \infty$ every box keeps its own.

    Raises:
        ValueError: ``sigma`` is not positive.
    """
    require_positive(sigma=sigma)
    return lambda overlap: torch.exp(overlap.square() / -sigma)


class Turn(NamedTuple):
    """One turn of the loop, in every image and class at once."""

    pick: Int[Tensor, "*batch"]  # index of the box M that was moved to the output
    final: Float[Tensor, "*batch n"]  # scores of the boxes picked so far, 0 for the others
    waiting: Float[Tensor, "*batch n"]  # current scores of the set B, 0 for boxes that are picked or dropped

    @property
    def scores(self) -> Float[Tensor, "*batch n"]:
        """Current scores of all boxes."""
        return self.final + self.waiting


def turns(
    scores: Float[Tensor, "*batch n"],
    overlaps: Float[Tensor, "*batch n n"],
    decay: Decay,
    *,
    floor: float = FLOOR,
    rerank: bool = True,
    first_only: bool = False,
) -> Iterator[Turn]:
    r"""Figure 3 of the paper: pick $M = \arg\max_{b_i \in B} s_i$, then $s_i \leftarrow s_i\,f(\mathrm{IoU}(M, b_i))$.

    A batch entry is one image and class. A score of 0 marks a box that is not there. Two switches take the mechanism
    apart: without ``rerank`` boxes are picked in the order of their first scores, with ``first_only`` only the first
    pick decays the others.

    Raises:
        ValueError: scores that are not finite or below 0, overlaps outside 0 to 1, a negative ``floor``, shapes that do
            not fit.
    """
    require_finite(scores=scores)
    require_nonnegative(scores=scores, floor=floor)
    require_between(0, 1 + 1e-6, overlaps=torch.stack(overlaps.aminmax()) if overlaps.numel() else overlaps)
    if overlaps.shape != (*scores.shape, scores.shape[-1]):
        raise ValueError(f"overlaps must have shape {(*scores.shape, scores.shape[-1])}, got {tuple(overlaps.shape)}")
    n = scores.shape[-1]
    first, waiting, rows = scores, scores, overlaps.reshape(-1, n)  # a waiting box has a score above 0, others have 0
    final, starts = torch.zeros_like(scores), n * torch.arange(scores[..., 0].numel(), device=scores.device)
    for turn in range(n):
        pick = (waiting if rerank else first * (waiting > 0)).argmax(-1, keepdim=True)  # *batch 1
        top = waiting.gather(-1, pick)
        if not top.any():
            return
        final, waiting = final.scatter_add(-1, pick, top), waiting.scatter(-1, pick, 0.0)
        if turn == 0 or not first_only:
            overlap = rows.index_select(0, starts + pick.flatten()).view_as(scores)  # *batch n
            waiting = waiting * decay(overlap)  # the one line
        waiting = F.threshold(waiting, floor, 0.0)
        yield Turn(pick.squeeze(-1), final, waiting)


def rescore(
    scores: Float[Tensor, "*batch n"],
    overlaps: Float[Tensor, "*batch n n"],
    decay: Decay,
    *,
    floor: float = FLOOR,
    rerank: bool = True,
    first_only: bool = False,
) -> Float[Tensor, "*batch n"]:
    """The final scores, in the order of the input, 0 for what was dropped. The first pick's score never changes.

    Raises:
        ValueError: as in `turns`.
    """
    final = scores
    for turn in turns(scores, overlaps, decay, floor=floor, rerank=rerank, first_only=first_only):
        final = turn.final
    return final


def count_decays(
    scores: Float[Tensor, "*batch n"], overlaps: Float[Tensor, "*batch n n"], decay: Decay, *, floor: float = FLOOR
) -> Int[Tensor, "*batch"]:
    r"""How often a pick meets a box that still waits: the work done, at most $N(N-1)/2$, whatever the machine.

    Raises:
        ValueError: as in `turns`.
    """
    waiting, total = scores, torch.zeros(scores.shape[:-1], dtype=torch.long, device=scores.device)
    for turn in turns(scores, overlaps, decay, floor=floor):
        total += ((waiting > 0).sum(-1) - 1).clamp(min=0)  # all but the pick itself
        waiting = turn.waiting
    return total


def average_boxes(
    boxes: Float[Tensor, "*batch n 4"],
    scores: Float[Tensor, "*batch n"],
    overlaps: Float[Tensor, "*batch n n"],
    threshold: float,
) -> Float[Tensor, "*batch n 4"]:
    """The rival: every box becomes the score-weighted mean of all boxes that overlap it by at least ``threshold``.

    Applied to the boxes that survive hard NMS it repairs their corners; it brings no object back.

    Raises:
        ValueError: ``threshold`` is not between 0 and 1, or scores below 0.
    """
    require_between(0, 1, threshold=threshold)
    require_nonnegative(scores=scores)
    votes = scores[..., None, :] * (overlaps >= threshold)  # *batch n n
    mean = votes @ boxes / votes.sum(-1, keepdim=True).clamp(min=1e-12)
    return torch.where(scores[..., None] > 0, mean, boxes)
