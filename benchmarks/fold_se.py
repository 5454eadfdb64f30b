"""FOLD-SE's training time against a decision tree and gradient boosting of scikit-learn, over the number of rows.

Ours is NumPy and Python, theirs compiled; the last column says how the gap scales with the rows.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.tree import DecisionTreeClassifier

from paperlab.data.tables import Table, default_rules
from paperlab.explainable_classifiers.fold_se import FoldSE

PEERS: dict[str, Callable[[Table, np.ndarray], object]] = {
    "FOLD-SE": lambda table, x: FoldSE().fit(table),
    "FOLD-R++ (300 rules)": lambda table, x: FoldSE(heuristic="information_gain", tail=0.0, max_rules=300).fit(table),
    "decision tree": lambda table, x: DecisionTreeClassifier(min_samples_leaf=3).fit(x, table.labels),
    "gradient boosting": lambda table, x: HistGradientBoostingClassifier(early_stopping=False).fit(x, table.labels),
}


def seconds(train: Callable[[Table, np.ndarray], object], table: Table, x: np.ndarray) -> float:
    """Wall-clock time of one training."""
    begun = time.perf_counter()
    train(table, x)
    return time.perf_counter() - begun


def run(quick: bool = False) -> None:
    """Print milliseconds and ratios to FOLD-SE, trained in turns, median of the rounds."""
    sizes, rounds = ((500, 2000), 3) if quick else ((500, 2000, 8000, 32000), 7)
    medians: dict[str, list[float]] = {name: [] for name in PEERS}
    print(f"{'rows':>7}  " + "  ".join(f"{name:>22}" for name in PEERS))
    for rows in sizes:
        table = default_rules(rows, noise=0.075, seed=0)
        x = table.one_hot()
        times: dict[str, list[float]] = {name: [] for name in PEERS}
        for _ in range(rounds):  # interleaved: a slow moment of the machine hits everybody
            for name, train in PEERS.items():
                if name.startswith("FOLD-R++") and rows > 8000:
                    continue  # minutes, and the trend is plain by then
                times[name].append(seconds(train, table, x))
        for name in PEERS:
            medians[name].append(statistics.median(times[name]) if times[name] else float("nan"))
        ours = medians["FOLD-SE"][-1]
        cells = (f"{1e3 * medians[n][-1]:9.1f} ms (x{medians[n][-1] / ours:7.2f})" for n in PEERS)
        print(f"{rows:>7}  " + "  ".join(f"{cell:>22}" for cell in cells), flush=True)
    print("exponent of time in rows: " + ", ".join(
        f"{name} {np.polyfit(np.log(sizes)[: sum(np.isfinite(m))], np.log(np.array(m)[np.isfinite(m)]), 1)[0]:.2f}"
        for name, m in medians.items()
    ))  # fmt: skip
