"""How long does it take? Clocks that a busy machine disturbs as little as possible."""

import math
import time
from collections.abc import Callable, Mapping

import numpy as np

from paperlab.checks import require_at_least, require_nonempty


def race(jobs: Mapping[str, Callable[[int], object]], rounds: int, seconds: float = 1e-3) -> dict[str, np.ndarray]:
    """Seconds a run of each job, once a round, the jobs interleaved and each round starting at another one.

    Seconds of the calling thread on a processor: while another program has the core, the clock stands still. What jobs
    do in other threads is not seen.

    A job takes how many times to run, chosen so that a measurement lasts at least ``seconds``. Of two measurements in a
    row the shorter counts: noise only ever adds. What slows a whole round slows all its jobs, so compare within rounds.

    Raises:
        ValueError: fewer than 3 rounds, or no jobs.
    """
    require_at_least(3, rounds=rounds)
    require_nonempty(jobs=jobs)

    def clock(job: Callable[[int], object], times: int) -> float:
        began = time.thread_time()
        job(times)
        return (time.thread_time() - began) / times

    def enough(job: Callable[[int], object]) -> int:
        times = 1
        while (lasted := times * clock(job, times)) < seconds:
            times = math.ceil(times * min(10, 1.5 * seconds / max(lasted, 1e-9)))
        return times

    times = {name: enough(job) for name, job in jobs.items()}
    names, taken = list(jobs), {name: np.empty(rounds) for name in jobs}
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            taken[name][r] = min(clock(jobs[name], times[name]) for _ in range(2))
    return taken
