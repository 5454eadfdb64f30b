r"""HNSW: nearest neighbours by walking down a stack of graphs, each several times sparser than the one below.

To find the nearest of $N$ points one can compute $N$ distances, or one can walk: look at a point's neighbours, step to
the nearest, repeat. Short links make for long walks, so the index lays sparse graphs of long links over the full
one, as a skip list does for a sorted list. Work is counted in distance evaluations, never in seconds.

Malkov and Yashunin (2016), https://arxiv.org/abs/1603.09320, algorithms 1 to 5. Distances are squared Euclidean
throughout: only their order is ever used.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from copy import copy
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from heapq import heappop, heappush, heappushpop, heapreplace
from math import inf, log

import numpy as np
from jaxtyping import Float, Int

from paperlab import checks

Point, Points = Float[np.ndarray, " d"], Float[np.ndarray, "n d"]
Queries, Truth = Float[np.ndarray, "q d"], Int[np.ndarray, "q k"]  # truth: the k nearest points of every query
Ranked = list[tuple[float, int]]  # (squared distance, node), nearest first
Ruler = Callable[[Collection[int]], Iterable[float]]  # from nodes to their squared distances from one query


def _check(points: np.ndarray) -> None:
    checks.require_ndim(2, points=points)
    checks.require_nonempty(points=points)
    checks.require_finite(points=points)


def _squared(points: Points, query: Point) -> list[float]:
    gap = points - query
    return np.vecdot(gap, gap).tolist()


@dataclass
class Walk:
    """The record of one search: ``seen``, every point whose distance it knows, in the order in which it met them, and
    ``taken``, every candidate it took up: (distance, node, how many points had been seen by then)."""

    seen: Ranked = field(default_factory=list)
    taken: list[tuple[float, int, int]] = field(default_factory=list)


@dataclass(eq=False, repr=False)
class HNSW:
    r"""The index. ``layers[l]`` maps each node of layer $l$ to the set of its links; layer 0 holds every point.

    ``m`` is $M$, links per new node; ``ef_construction`` the width of the search that proposes them; ``level_scale`` is
    $m_L$ (``None``: the paper's $1/\ln M$; 0: everything on one layer). ``select`` is "simple" (algorithm 3) or
    "heuristic" (algorithm 4, with ``extend`` and ``keep_pruned``). Without ``shrink`` degrees are unbounded; together
    with ``level_scale=0`` and ``select="simple"`` that is the older flat NSW. ``computed`` counts distances so far.

    ``lookup`` is for counting on a few thousand points, never for timing: all distances from a query are then computed
    in one call, and those that the walk asks for are looked up and counted. Same graph, same counts, half the time.

    Raises:
        ValueError: ``points`` is empty, not (n, d) or not finite; ``m`` < 2; ``ef_construction`` < 1;
            ``level_scale`` < 0; ``select`` is unknown.
    """

    points: Points
    _: KW_ONLY
    m: int = 8
    ef_construction: int = 50
    level_scale: float | None = None
    select: str = "heuristic"
    extend: bool = False
    keep_pruned: bool = False
    shrink: bool = True
    lookup: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.points)
        checks.require_at_least(2, m=self.m)
        checks.require_at_least(1, ef_construction=self.ef_construction)
        checks.require_nonnegative(level_scale=self.level_scale or 0.0)
        checks.require_one_of(("simple", "heuristic"), select=self.select)
        self.points = np.ascontiguousarray(self.points)
        uniform = 1 - np.random.default_rng(self.seed).random(len(self.points))  # in (0, 1]: its logarithm is finite
        scale = 1 / log(self.m) if self.level_scale is None else self.level_scale
        self.levels = np.floor(-np.log(uniform) * scale).astype(int).tolist()
        self.layers: list[dict[int, set[int]]] = []
        self.entry, self.size, self.computed = 0, 0, 0

    def distances(self, query: Point, nodes: list[int]) -> list[float]:
        """Squared distances from ``query`` to ``nodes``, in one batch. Every one of them is counted."""
        self.computed += len(nodes)
        return _squared(self.points.take(nodes, 0), query)

    def ruler(self, query: Point) -> Ruler:
        """The squared distances from one query as a function of the nodes. Whoever uses it does the counting."""
        if self.lookup:
            return partial(map, _squared(self.points[: self.size], query).__getitem__)
        return lambda nodes: _squared(self.points.take(list(nodes), 0), query)

    def search_layer(self, measure: Ruler, entries: Ranked, ef: int, layer: int, walk: Walk | None = None) -> Ranked:
        """SEARCH-LAYER (algorithm 2): best first, keeping the ``ef`` nearest, until no candidate can improve them.

        ``measure`` gives the distances from the query to nodes, see ``ruler``.
        """
        links, visited = self.layers[layer], {node for _, node in entries}
        # The heaps C, nearest on top, and W, furthest on top. Ranked lists are heaps as they stand.
        candidates, found = list(entries), [(-distance, node) for distance, node in reversed(entries)]
        horizon = inf if len(found) < ef else -found[0][0]  # nothing beyond it can enter W
        while candidates:
            distance, node = heappop(candidates)
            if walk is not None:
                walk.taken.append((distance, node, len(visited)))
            if distance > horizon:
                break
            fresh = links[node] - visited
            visited |= fresh
            reached = zip(measure(fresh), fresh, strict=True) if fresh else ()
            if walk is not None:
                walk.seen += (reached := list(reached))
            for distance, other in reached:
                if distance < horizon:
                    heappush(candidates, (distance, other))
                    (heappush if len(found) < ef else heapreplace)(found, (-distance, other))
                    if len(found) == ef:
                        horizon = -found[0][0]
        self.computed += len(visited) - len(entries)
        return sorted([(-negative, node) for negative, node in found])

    def select_neighbors(self, base: int, candidates: Ranked, count: int, layer: int) -> list[int]:
        """At most ``count`` links for ``base`` out of ``candidates``, which are ranked by their distance to it.

        "simple" takes the nearest. "heuristic" keeps a candidate only if it is closer to ``base`` than to every one
        kept before it; told the other way round, whoever is kept strikes out those closer to it than to ``base``.
        """
        if self.select == "simple":
            return [node for _, node in candidates[:count]]
        if self.extend:
            known = {node for _, node in candidates} | {base}
            more = list(set().union(*(self.layers[layer][node] for _, node in candidates)) - known)
            if more:
                candidates = sorted([*candidates, *zip(self.distances(self.points[base], more), more, strict=True)])
        kept, alive = [], candidates
        while alive and len(kept) < count:
            (_, nearest), *rest = alive
            kept.append(nearest)
            gaps = self.distances(self.points[nearest], [node for _, node in rest]) if rest else []
            alive = [pair for pair, gap in zip(rest, gaps, strict=True) if pair[0] < gap]
        if self.keep_pruned:
            kept += [node for _, node in candidates if node not in kept][: count - len(kept)]
        return kept

    def insert(self) -> None:
        """INSERT (algorithm 1) of the next point: descend, search, link both ways, shrink who has too many links."""
        node, level, top = self.size, self.levels[self.size], len(self.layers) - 1
        if node:
            query = self.points[node]
            measure = self.ruler(query)
            nearest = [(self.distances(query, [self.entry])[0], self.entry)]
            for layer in range(top, level, -1):
                nearest = self.search_layer(measure, nearest, 1, layer)
            for layer in range(min(top, level), -1, -1):
                nearest = self.search_layer(measure, nearest, self.ef_construction, layer)
                chosen = self.select_neighbors(node, nearest, self.m, layer)
                self.layers[layer][node] = set(chosen)
                for other in chosen:
                    self._link(other, node, layer)
        if level > top:
            self.layers += [{node: set()} for _ in range(level - top)]
            self.entry = node
        self.size += 1

    def _link(self, node: int, new: int, layer: int) -> None:
        links, bound = self.layers[layer][node], (1 if layer else 2) * self.m if self.shrink else inf
        links.add(new)
        if len(links) > bound:
            ranked = sorted(zip(self.distances(self.points[node], list(links)), links, strict=True))
            self.layers[layer][node] = set(self.select_neighbors(node, ranked, bound, layer))

    def grow(self, size: int) -> "HNSW":
        """Insert points in their order until the index holds ``size`` of them; returns the index.

        Raises:
            ValueError: ``size`` is less than it holds already, or more than there are points.
        """
        checks.require_between(self.size, len(self.points), size=size)
        while self.size < size:
            self.insert()
        return self

    def knn_search(self, query: Point, k: int, ef: int, walks: list[Walk] | None = None) -> Ranked:
        """K-NN-SEARCH (algorithm 5): greedy (ef = 1) down to layer 1, then SEARCH-LAYER with ``ef`` on layer 0.

        Where ``walks`` is given, the record of every layer is appended to it, top layer first.

        Raises:
            ValueError: the index is empty, ``k`` < 1, ``ef`` < ``k``, or ``query`` is not finite.
        """
        checks.require_at_least(1, **{"size of the index": self.size}, k=k)
        checks.require_at_least(k, ef=ef)
        checks.require_finite(query=query)
        measure = self.ruler(query)
        nearest = [(self.distances(query, [self.entry])[0], self.entry)]
        for layer in range(len(self.layers) - 1, -1, -1):
            if walks is not None:
                walks.append(Walk(seen=list(nearest)))
            nearest = self.search_layer(measure, nearest, 1 if layer else ef, layer, walks[-1] if walks else None)
        return nearest[:k]

    def ground_floor(self, entry: int) -> "HNSW":
        """The same layer 0 without the layers above it, entered at node ``entry``: the hierarchy taken out.

        Raises:
            ValueError: the index holds no node ``entry``.
        """
        checks.require_between(0, self.size - 1, entry=entry)
        flat = copy(self)
        flat.layers, flat.entry = self.layers[:1], entry
        return flat


@dataclass(frozen=True)
class Curve:
    """Mean work (distance evaluations a query) and mean recall along a sweep of a search's one knob."""

    work: Float[np.ndarray, " settings"]
    recall: Float[np.ndarray, " settings"]

    def work_at(self, recall: float) -> float:
        """Work where the curve first reaches ``recall``, linear between settings; infinite if it never does."""
        reached = np.flatnonzero(self.recall >= recall)
        around = slice(max(reached[0] - 1, 0), reached[0] + 1) if len(reached) else None
        return float(np.interp(recall, self.recall[around], self.work[around])) if around else inf


def _curve(trails: list[tuple[list[int], np.ndarray, int]], truth: Truth) -> Curve:
    """``trails``: per query the nodes in the order in which they were met, where each setting stops, and extra work."""
    checks.require_nonempty(queries=trails)
    checks.require_same_length(queries=trails, truth=truth)
    work, recall = 0.0, 0.0
    for (order, stops, extra), neighbours in zip(trails, truth.tolist(), strict=True):
        place = {node: i for i, node in enumerate(order)}
        met = np.array([place.get(node, len(order)) for node in neighbours])
        work += stops + extra
        recall += (met < stops[:, None]).mean(1)  # one of the k nearest, once met, is never pushed out
    return Curve(work / len(truth), recall / len(truth))


def sweep_ef(index: HNSW, queries: Queries, truth: Truth, efs: Sequence[int]) -> Curve:
    """Recall of the ``k`` true neighbours against work, for every ``ef`` of ``efs`` out of one search a query.

    The order in which best-first search takes up candidates does not depend on ``ef``; ``ef`` only says when it ends:
    at the first candidate than which ``ef`` of the points met so far are closer. The walk at the largest ``ef``
    therefore contains all the others. For ``ef`` < ``k`` the ``k`` best of all points met are returned.

    Raises:
        ValueError: ``queries`` is empty or differs in length from ``truth``, or an ``ef`` < 1.
    """
    checks.require_at_least(1, efs=efs)
    trails = []
    for query in queries:
        index.knn_search(query, 1, int(max(efs)), walks := [])
        *upper, last = walks
        distance, (taken, _, count) = np.array([d for d, _ in last.seen]), np.array(last.taken).T
        closer = ((distance < taken[:, None]) & (np.arange(len(distance)) < count[:, None])).sum(1)
        stops = np.append(count, len(distance))[(np.append(closer, max(efs)) >= np.array(efs)[:, None]).argmax(1)]
        trails.append(([node for _, node in last.seen], stops, sum(len(walk.seen) - 1 for walk in upper)))
    return _curve(trails, truth)


def kd_tree(points: Points) -> tuple[list[int], np.ndarray, np.ndarray]:
    """The rival: a k-d tree (Bentley 1975), cut at the median of the widest axis down to one point a leaf.

    Gives for every point the number of its leaf (1 is the root, the children of node i are 2i and 2i + 1) and the low
    and the high corner of the leaf's box, both (n, d). The boxes tile the space.

    Raises:
        ValueError: ``points`` is empty, not (n, d) or not finite.
    """
    _check(points)
    number, low, high = np.ones(len(points), int), np.full(points.shape, -inf), np.full(points.shape, inf)
    parts = [(1, np.arange(len(points)))]
    while parts:
        name, nodes = parts.pop()
        number[nodes] = name
        if len(nodes) == 1:
            continue
        axis, half = int(np.ptp(points[nodes], axis=0).argmax()), len(nodes) // 2
        nodes = nodes[np.argsort(points[nodes, axis], kind="stable")]
        high[nodes[:half], axis] = low[nodes[half:], axis] = points[nodes[half - 1 : half + 1], axis].mean()
        parts += [(2 * name, nodes[:half]), (2 * name + 1, nodes[half:])]
    return number.tolist(), low, high


def kd_visit(points: Points, tree: tuple, query: Point, k: int) -> tuple[list[int], np.ndarray, np.ndarray]:
    r"""Best-bin-first search of the tree without an end: the points in the order in which it would meet them.

    A real search finds that order with a heap on its way down; to count points it is enough to sort the boxes by their
    distance from the query. With every point come the squared distance of its box, and that of the k-th best point
    before it: the exact search ends where the first exceeds the second, one with slack $\epsilon$ where
    $(1+\epsilon)^2$ times the first does.
    """
    outside = np.maximum(tree[1] - query, query - tree[2]).clip(0)
    bounds = np.vecdot(outside, outside)
    order = bounds.argsort(kind="stable")
    best, worst = [-inf] * k, [inf]
    for distance in _squared(points[order], query):
        heappushpop(best, -distance)
        worst.append(-best[0])
    return order.tolist(), bounds[order], np.array(worst[:-1])


def sweep_slack(points: Points, queries: Queries, truth: Truth, slacks: Sequence[float]) -> Curve:
    r"""Recall against work of the tree when it skips boxes further than $1/(1+\epsilon)$ of the k-th best distance.

    ``slacks`` are the values of $\epsilon \ge 0$; at 0 the search is exact. Only distances to points are counted; the
    bounds of the boxes, one coordinate each, are free.

    Raises:
        ValueError: ``queries`` is empty or differs in length from ``truth``, or a slack is negative; see `kd_tree`.
    """
    checks.require_nonnegative(slacks=slacks)
    tree, trails, stretch = kd_tree(points), [], (1 + np.array(slacks)[:, None]) ** 2
    for query in queries:
        order, bounds, worst = kd_visit(points, tree, query, truth.shape[1])
        trails.append((order, (np.append(bounds, inf) * stretch > np.append(worst, 0)).argmax(1), 0))
    return _curve(trails, truth)
