"""Vectorised Soft-NMS against the plain double loop, for several N.

Both rescore the same boxes, in one process and in turns, so that a slow moment of the machine hits both. The loop is
written as the paper prints it, over Python lists. Run it with ``python benchmarks/soft_nms.py``.
"""

import math
import statistics
import time
from collections.abc import Callable

import torch

from paperlab.detection import box_iou
from paperlab.vision.soft_nms import FLOOR, gaussian, rescore

SIGMA = 0.5


def plain(scores: list[float], overlaps: list[list[float]]) -> list[float]:
    """The paper's figure 3 in two nested loops over one image and class."""
    final, current, waiting = [0.0] * len(scores), list(scores), list(range(len(scores)))
    while waiting:
        best = max(waiting, key=current.__getitem__)
        final[best], row = current[best], overlaps[best]
        rest = []
        for i in waiting:
            if i != best:
                current[i] *= math.exp(-row[i] * row[i] / SIGMA)
                if current[i] >= FLOOR:
                    rest.append(i)
        waiting = rest
    return final


def boxes(batch: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and overlaps of ``n`` boxes in clouds of ten, as a detector proposes them."""
    g = torch.Generator().manual_seed(n)
    side = 15 * max(1.0, n / 10) ** 0.5
    centre = torch.rand(batch, max(1, n // 10), 2, generator=g).repeat_interleave(10, 1)[:, :n] * side
    centre = centre + 2 * torch.randn(centre.shape, generator=g)
    half = 4 + 3 * torch.rand(centre.shape, generator=g)
    corners = torch.cat([centre - half, centre + half], -1)
    return torch.rand(centre.shape[:2], generator=g) * 0.9 + 0.05, box_iou(corners, corners).clamp(max=1)


def seconds(call: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def run(quick: bool = False) -> None:
    """Measure and print medians with their quartiles, and the median ratio of the two."""
    torch.set_num_threads(1)
    batch, repeats = (32, 5) if quick else (100, 15)
    rule = gaussian(SIGMA)
    print(f"milliseconds for {batch} images: median [quartiles] of {repeats} turns")
    print(f"{'N':>5} {'vectorised':>24} {'double loop':>26} {'loop / vectorised':>18}")
    for n in (10, 20, 50, 100, 200) if quick else (10, 20, 50, 100, 200, 400):
        scores, overlaps = boxes(batch, n)
        lists = list(zip(scores.tolist(), overlaps.tolist(), strict=True))

        def vectorised(scores=scores, overlaps=overlaps) -> torch.Tensor:
            return rescore(scores, overlaps, rule)

        def loop(lists=lists) -> torch.Tensor:
            return torch.tensor([plain(*one) for one in lists])

        torch.testing.assert_close(vectorised(), loop(), atol=2e-3, rtol=1e-3)  # at the floor one rounding decides
        times = [(1e3 * seconds(vectorised), 1e3 * seconds(loop)) for _ in range(repeats)]
        cells = []
        for row in zip(*times, strict=True):
            low, middle, high = statistics.quantiles(row, n=4)
            cells.append(f"{middle:.1f} [{low:.1f}, {high:.1f}]")
        ratio = statistics.median(b / a for a, b in times)
        print(f"{n:>5} {cells[0]:>24} {cells[1]:>26} {ratio:>17.1f}x")


if __name__ == "__main__":
    run()
