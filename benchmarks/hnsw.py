"""HNSW in Python, the authors' compiled hnswlib, and scikit-learn's brute force: queries a second at equal recall.

Every index searches one query at a time on one core; brute force is also timed on the whole batch, where a matrix
product does the work. Both graphs use M = 8, ef_construction = 50 and the smallest ef whose recall of the ten nearest
is at least 0.95. All arms run interleaved, round after round; the table shows medians and the middle half of
the rounds.
"""

import time
from collections.abc import Callable

import numpy as np
from sklearn.neighbors import NearestNeighbors

from paperlab.embeddings_and_retrieval.hnsw import HNSW

K, DIMENSION, RECALL = 10, 8, 0.95
WIDTHS = (10, 12, 15, 20, 26, 34, 45, 60, 80, 110, 150, 200, 300, 500)


def _recall(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([len(set(f) & set(t)) / K for f, t in zip(found.tolist(), truth.tolist(), strict=True)]))


def _narrowest(search: Callable[[int], np.ndarray], truth: np.ndarray) -> tuple[int, float]:
    """The smallest ef that reaches the recall, and the recall it has."""
    for ef in WIDTHS:
        recall = _recall(search(ef), truth)
        if recall >= RECALL:
            return ef, recall
    raise RuntimeError(f"no ef up to {WIDTHS[-1]} reaches recall {RECALL}")


def _compiled(points: np.ndarray) -> object | None:
    try:
        import hnswlib
    except ImportError:
        return None
    index = hnswlib.Index("l2", points.shape[1])
    index.init_index(len(points), ef_construction=50, M=8, random_seed=0)
    index.set_num_threads(1)
    index.add_items(points, num_threads=1)
    return index


def _measure(n: int, queries: int, rounds: int) -> dict[str, tuple[np.ndarray, float, int]]:
    """Per arm: queries a second in every round, recall, ef (0 where there is none)."""
    rng = np.random.default_rng(n)
    points, asked = rng.random((n, DIMENSION), dtype=np.float32), rng.random((queries, DIMENSION), dtype=np.float32)
    brute = NearestNeighbors(n_neighbors=K, algorithm="brute").fit(points)
    truth = brute.kneighbors(asked, return_distance=False)
    ours, theirs = HNSW(points.astype(float)).grow(n), _compiled(points)
    wide = asked.astype(float)

    def python(ef: int) -> np.ndarray:
        return np.array([[node for _, node in ours.knn_search(q, K, ef)] for q in wide])

    def compiled(ef: int) -> np.ndarray:
        theirs.set_ef(ef)
        return np.concatenate([theirs.knn_query(q[None], k=K, num_threads=1)[0] for q in asked])

    ef, recall = _narrowest(python, truth)
    arms = {"HNSW (ours)": (lambda: python(ef), recall, ef)}
    if theirs is not None:
        ef_c, recall_c = _narrowest(compiled, truth)
        arms["hnswlib"] = (lambda: compiled(ef_c), recall_c, ef_c)
    arms["brute, one by one"] = (lambda: [brute.kneighbors(q[None], return_distance=False) for q in asked], 1.0, 0)
    arms["brute, batch"] = (lambda: brute.kneighbors(asked, return_distance=False), 1.0, 0)
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, (search, _, _) in arms.items():
            begun = time.perf_counter()
            search()
            rates[name].append(queries / (time.perf_counter() - begun))
    return {name: (np.array(rates[name]), recall, ef) for name, (_, recall, ef) in arms.items()}


def run(quick: bool = False) -> None:
    """Print the table for several sizes, and how the ratio to brute force grows from the smallest to the largest."""
    sizes, queries, rounds = ((500, 2000), 50, 5) if quick else ((1000, 4000, 16000, 64000), 100, 11)
    ratios: dict[str, list[float]] = {}
    print(f"uniform, {DIMENSION} dimensions, recall@{K} >= {RECALL}, one core; ratio: to brute force, one by one")
    print(f"{'n':>6}  {'arm':18} {'ef':>4} {'recall':>6} {'queries/s':>10}  {'middle half':>17} {'ratio':>7}")
    for n in sizes:
        measured = _measure(n, queries, rounds)
        base = np.median(measured["brute, one by one"][0])
        for name, (rate, recall, ef) in measured.items():
            low, middle, high = np.quantile(rate, [0.25, 0.5, 0.75])
            ratios.setdefault(name, []).append(middle / base)
            row = f"{n:6d}  {name:18} {ef or '–':>4} {recall:6.3f} {middle:10.0f}"
            print(f"{row}  {low:8.0f}–{high:8.0f} {middle / base:7.2f}")
        if "hnswlib" not in measured:
            print(f"{n:6d}  hnswlib: skipped, not installed (pip install hnswlib==0.8.0)")
    for name, values in ratios.items():
        if not name.startswith("brute, one"):
            growth = f"from {values[0]:.2f} to {values[-1]:.2f} times brute force, one by one"
            print(f"{name}: {growth}, as n grows {sizes[-1] // sizes[0]}-fold")


if __name__ == "__main__":
    run()
