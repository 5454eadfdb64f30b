"""Sequence operators over the length of the sequence: seconds, bytes alive, and where each overtakes fused attention.

All run in one process on one core, interleaved; exponents are fitted over the longest four lengths, round by round.
"""

import numpy as np
import torch
from torch.nn import functional as F

from paperlab.nn.live_bytes import LiveBytes
from paperlab.nn.recurrence import chunked, masked
from paperlab.nn.sequence import attention, fused_attention
from paperlab.stats import crossover, mean_interval, scaling_exponents
from paperlab.timing import race

HEADS, DIM, STATE = 2, 32, 32
MOST = 2**30  # bytes that an operator may hold; it stops at the last length below


def operators(tokens: int) -> dict:
    """Each operator as a function without arguments, causal, on the same random heads."""
    q, k, v = torch.randn(3, 1, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(0))
    log_decay = F.logsigmoid(torch.randn(1, HEADS, tokens, generator=torch.Generator().manual_seed(1)) + 4)
    return {
        "softmax, fused": lambda: fused_attention(q, k, v, causal=True),
        "softmax, in the open": lambda: attention(q, k, v, causal=True),
        "recurrence, masked": lambda: masked(q, k, v, log_decay),
        "recurrence, chunked": lambda: chunked(q, k, v, log_decay),
    }


def _peak(operator) -> int:
    with LiveBytes() as meter:
        operator()
    return meter.peak


@torch.no_grad()
def run(quick: bool = False) -> None:
    """Print seconds and peak bytes at each length, the exponents, and the length from which each beats the first."""
    torch.set_num_threads(1)
    lengths = [2**e for e in (range(8, 12) if quick else range(8, 15))]
    clocked: dict[str, list[np.ndarray]] = {}
    peaks: dict[str, list[int]] = {}
    for tokens in lengths:
        jobs = {}
        for name, operator in operators(tokens).items():
            if name not in peaks or 4 * peaks[name][-1] < MOST or len(peaks[name]) < 3:
                jobs[name] = lambda times, operator=operator: [operator() for _ in range(times)]
                peaks.setdefault(name, []).append(_peak(operator))
        taken = race(jobs, rounds=3 if quick else 5)
        for name in jobs:
            clocked.setdefault(name, []).append(taken[name])
        print(
            f"  {tokens} tokens: " + ", ".join(f"{name} {1e3 * taken[name].min():.2f} ms" for name in jobs), flush=True
        )
    first = [min(t) for t in clocked["softmax, fused"]]
    print(f"\n{HEADS} heads of {DIM}, state {STATE}, forward pass, one core")
    print(f"{'':24}{'longest':>9}{'seconds':>10}{'MiB alive':>11}   exponent of time, of bytes   beats fused from")
    for name, rounds in clocked.items():
        sizes, last = lengths[: len(rounds)], lengths[: len(rounds)][-4:]
        time = mean_interval(scaling_exponents(last, np.stack(rounds[-4:], axis=-1)))
        held = scaling_exponents(last, peaks[name][-4:])
        at = crossover(sizes, [min(t) for t in rounds], first[: len(rounds)])
        print(
            f"{name:24}{sizes[-1]:>9}{min(rounds[-1]):>10.3f}{peaks[name][-1] / 2**20:>11.1f}   "
            f"{time:.2f}, {held:.2f}{'':>9}{at:>12.0f}"
        )
