"""Softmax of one long row: two passes against three, against online softmax and against torch.

All run in one process on one core, interleaved; every ratio is taken within a round. Below 1, two passes win.
"""

import numpy as np
import torch

from paperlab.output_layers.two_pass_softmax import ALGORITHMS, compiled, last_level_cache
from paperlab.timing import race

RIVALS = (*ALGORITHMS[1:], "torch.softmax")


def run(quick: bool = False) -> None:
    """Print the time of a two-pass softmax over its rivals' for rows from the first cache to far beyond the last."""
    torch.set_num_threads(1)
    kernels = compiled()
    llc = last_level_cache()
    print(f"last-level cache: {llc / 2**20:.0f} MiB" if llc else "last-level cache: unknown")
    print("\ntwo-pass time / rival's time: median [quartiles] over rounds; below 1 the two-pass algorithm is faster")
    print(
        f"{'floats':>8}{'MiB in':>9}{'GB/s':>7}  "
        + "".join(f"{name.removeprefix('three_pass_'):>22}" for name in RIVALS)
    )
    for exponent in (12, 16, 20, 24) if quick else range(10, 27, 2):
        n = 2**exponent
        x, y = torch.randn(n), torch.zeros(n)
        jobs = {name: lambda times, name=name, x=x, y=y: kernels(name, x, y, times) for name in ALGORITHMS}
        jobs["torch.softmax"] = lambda times, x=x, y=y: [torch.softmax(x, -1, out=y) for _ in range(times)]
        taken = race(jobs, rounds=7 if quick else 15)
        ours = taken["two_pass"]
        cells = []
        for name in RIVALS:
            low, middle, high = np.quantile(ours / taken[name], [0.25, 0.5, 0.75])
            cells.append(f"{middle:.2f} [{low:.2f}, {high:.2f}]")
        speed = 12 * n / np.median(ours) / 1e9
        print(f"{'2^' + str(exponent):>8}{4 * n / 2**20:>9.3g}{speed:>7.1f}  " + "".join(f"{c:>22}" for c in cells))
