r"""HNSW: nearest neighbours by walking down a stack of graphs, each several times sparser than the one below.

To find the nearest of $N$ points one can compute $N$ distances, or one can walk: look at a point's neighbours, step to
the nearest, repeat. Short links make for long walks, so the index lays sparse graphs of long links over the full
one, as a skip list does for a sorted list. Work is counted in distance evaluations, never in seconds.

Malkov and Yashunin (2016), https://arxiv.org/abs/1603.09320, algorithms 1 to 5. Distances are squared Euclidean
throughout: only their order is ever used.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace
from math import inf, log

import numpy as np
from jaxtyping import Float, Int

from paperlab.checks import (
    require_at_least,
    require_between,
    require_finite,
    require_ndim,
    require_nonempty,
    require_nonnegative,
    require_one_of,
    require_same_length,
)

Ranked = list[tuple[float, int]]  # (squared distance, node), nearest first


def _check(points: np.ndarray) -> None:
    require_ndim(2, points=points)
    require_nonempty(points=points)
    require_finite(points=points)


@dataclass
class Walk:
    """The record of one search: ``seen``, every point whose distance it knows, in the order in which it met them, and
    ``taken``, every candidate it took up: (distance, node, how many points had been seen by then)."""

    seen: Ranked = field(default_factory=list)
    taken: list[tuple[float, int, int]] = field(default_factory=list)


class HNSW:
    r"""The index. ``layers[l]`` maps each node of layer $l$ to the set of its links; layer 0 holds every point.

    ``m`` is $M$, links per new node; ``ef_construction`` the width of the search that proposes them; ``level_scale`` is
    $m_L$ (``None``: the paper's $1/\ln M$; 0: everything on one layer). ``select`` is "simple" (algorithm 3) or
    "heuristic" (algorithm 4, with ``extend`` and ``keep_pruned``). Without ``shrink`` degrees are unbounded; together
    with ``level_scale=0`` and ``select="simple"`` that is the older flat NSW. ``computed`` counts distances so far.

    Raises:
        ValueError: ``points`` is empty, not (n, d) or not finite; ``m`` < 2; ``ef_construction`` < 1;
            ``level_scale`` < 0; ``select`` is unknown.
    """

    def __init__(
        self,
        points: Float[np.ndarray, "n d"],
        *,
        m: int = 8,
        ef_construction: int = 50,
        level_scale: float | None = None,
        select: str = "heuristic",
        extend: bool = False,
        keep_pruned: bool = False,
        shrink: bool = True,
        seed: int = 0,
    ) -> None:
        _check(points)
        require_at_least(2, m=m)
        require_at_least(1, ef_construction=ef_construction)
        require_nonnegative(level_scale=level_scale or 0.0)
        require_one_of(("simple", "heuristic"), select=select)
        self.points, self.m, self.ef_construction = np.ascontiguousarray(points), m, ef_construction
        self.select, self.extend, self.keep_pruned, self.shrink = select, extend, keep_pruned, shrink
        uniform = 1 - np.random.default_rng(seed).random(len(points))  # in (0, 1], so that its logarithm is finite
        scale = 1 / log(m) if level_scale is None else level_scale
        self.levels = np.floor(-np.log(uniform) * scale).astype(int).tolist()
        self.layers: list[dict[int, set[int]]] = []
        self.entry, self.size, self.computed = 0, 0, 0

    def distances(self, query: Float[np.ndarray, " d"], nodes: Sequence[int]) -> list[float]:
        """Squared distances from ``query`` to ``nodes``, in one batch. Every one of them is counted."""
        self.computed += len(nodes)
        gap = self.points.take(nodes, 0)
        gap -= query
        return np.vecdot(gap, gap).tolist()

    def search_layer(
        self, query: Float[np.ndarray, " d"], entries: Ranked, ef: int, layer: int, walk: Walk | None = None
    ) -> Ranked:
        """SEARCH-LAYER (algorithm 2): best first, keeping the ``ef`` nearest, until no candidate can improve them."""
        links, visited = self.layers[layer], {node for _, node in entries}
        candidates, found = list(entries), [(-distance, node) for distance, node in entries]
        heapify(candidates)  # C, nearest on top
        heapify(found)  # W, furthest on top
        horizon = inf if len(found) < ef else -found[0][0]  # nothing beyond it can enter W
        while candidates:
            distance, node = heappop(candidates)
            if walk is not None:
                walk.taken.append((distance, node, len(visited)))
            if distance > horizon:
                break
            fresh = list(links[node] - visited)
            if not fresh:
                continue
            visited.update(fresh)
            reached = self.distances(query, fresh)
            if walk is not None:
                walk.seen += zip(reached, fresh, strict=True)
            for distance, other in zip(reached, fresh, strict=True):
                if distance < horizon:
                    heappush(candidates, (distance, other))
                    (heappush if len(found) < ef else heapreplace)(found, (-distance, other))
                    if len(found) == ef:
                        horizon = -found[0][0]
        return sorted((-negative, node) for negative, node in found)

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
        kept, struck, alive = [], [], candidates
        while alive and len(kept) < count:
            (_, nearest), *rest = alive
            kept.append(nearest)
            gaps = self.distances(self.points[nearest], [node for _, node in rest]) if rest else []
            if self.keep_pruned:
                struck += [pair for pair, gap in zip(rest, gaps, strict=True) if pair[0] >= gap]
            alive = [pair for pair, gap in zip(rest, gaps, strict=True) if pair[0] < gap]
        if self.keep_pruned:
            kept += [node for _, node in sorted(struck)[: count - len(kept)]]
        return kept

    def insert(self) -> None:
        """INSERT (algorithm 1) of the next point: descend, search, link both ways, shrink who has too many links."""
        node, level, top = self.size, self.levels[self.size], len(self.layers) - 1
        if node:
            query = self.points[node]
            nearest = [(self.distances(query, [self.entry])[0], self.entry)]
            for layer in range(top, level, -1):
                nearest = self.search_layer(query, nearest, 1, layer)
            for layer in range(min(top, level), -1, -1):
                nearest = self.search_layer(query, nearest, self.ef_construction, layer)
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
        require_between(self.size, len(self.points), size=size)
        while self.size < size:
            self.insert()
        return self

    def knn_search(self, query: Float[np.ndarray, " d"], k: int, ef: int, walks: list[Walk] | None = None) -> Ranked:
        """K-NN-SEARCH (algorithm 5): greedy (ef = 1) down to layer 1, then SEARCH-LAYER with ``ef`` on layer 0.

        Where ``walks`` is given, the record of every layer is appended to it, top layer first.

        Raises:
            ValueError: the index is empty, ``k`` < 1, ``ef`` < ``k``, or ``query`` is not finite.
        """
        require_at_least(1, **{"size of the index": self.size}, k=k)
        require_at_least(k, ef=ef)
        require_finite(query=query)
        nearest = [(self.distances(query, [self.entry])[0], self.entry)]
        for layer in range(len(self.layers) - 1, -1, -1):
            if walks is not None:
                walks.append(Walk(seen=list(nearest)))
            walk = walks[-1] if walks else None
            nearest = self.search_layer(query, nearest, 1 if layer else ef, layer, walk)
        return nearest[:k]

    def ground_floor(self, entry: int) -> "HNSW":
        """The same layer 0 without the layers above it, entered at node ``entry``: the hierarchy taken out.

        Raises:
            ValueError: the index holds no node ``entry``.
        """
        require_between(0, self.size - 1, entry=entry)
        flat = copy(self)
        flat.layers, flat.entry = self.layers[:1], entry
        return flat


@dataclass(frozen=True)
class Curve:
    """Mean work (distance evaluations a query) and mean recall along a sweep of a search's one knob."""

    setting: Float[np.ndarray, " settings"]
    work: Float[np.ndarray, " settings"]
    recall: Float[np.ndarray, " settings"]

    def work_at(self, recall: float) -> float:
        """Work where the curve first reaches ``recall``, linear between settings; infinite if it never does."""
        reached = np.flatnonzero(self.recall >= recall)
        around = slice(max(reached[0] - 1, 0), reached[0] + 1) if len(reached) else None
        return float(np.interp(recall, self.recall[around], self.work[around])) if around else inf


def _curve(
    setting: Sequence[float], trails: list[tuple[list[int], np.ndarray, int]], truth: Int[np.ndarray, "q k"]
) -> Curve:
    """``trails``: per query the nodes in the order in which they were met, where each setting stops, and extra work."""
    require_nonempty(queries=trails)
    require_same_length(queries=trails, truth=truth)
    work, recall = np.zeros(len(setting)), np.zeros(len(setting))
    for (order, stops, extra), neighbours in zip(trails, truth.tolist(), strict=True):
        place = {node: i for i, node in enumerate(order)}
        met = np.array([place.get(node, len(order)) for node in neighbours])
        work += stops + extra
        recall += (met < stops[:, None]).mean(1)  # one of the k nearest, once met, is never pushed out
    return Curve(np.asarray(setting, dtype=float), work / len(truth), recall / len(truth))


def sweep_ef(
    index: HNSW, queries: Float[np.ndarray, "q d"], truth: Int[np.ndarray, "q k"], efs: Sequence[int]
) -> Curve:
    """Recall of the ``k`` true neighbours against work, for every ``ef`` of ``efs`` out of one search a query.

    The order in which best-first search takes up candidates does not depend on ``ef``; ``ef`` only says when it ends:
    at the first candidate than which ``ef`` of the points met so far are closer. The walk at the largest ``ef``
    therefore contains all the others. For ``ef`` < ``k`` the ``k`` best of all points met are returned.

    Raises:
        ValueError: ``queries`` is empty or differs in length from ``truth``, or an ``ef`` < 1.
    """
    require_at_least(1, efs=efs)
    trails = []
    for query in queries:
        index.knn_search(query, 1, int(max(efs)), walks := [])
        *upper, last = walks
        distance, (taken, _, count) = np.array([d for d, _ in last.seen]), np.array(last.taken).T
        closer = ((distance < taken[:, None]) & (np.arange(len(distance)) < count[:, None])).sum(1)
        stops = np.append(count, len(distance))[(np.append(closer, max(efs)) >= np.array(efs)[:, None]).argmax(1)]
        trails.append(([node for _, node in last.seen], stops, sum(len(walk.seen) - 1 for walk in upper)))
    return _curve(efs, trails, truth)


class KDTree:
    """The rival: a k-d tree (Bentley 1975), cut at the median of the widest axis and searched best bin first.

    ``leaf`` is the largest number of points in a leaf. Only distances to points are counted; the bounds of the boxes,
    one coordinate each, are free.

    Raises:
        ValueError: ``points`` is empty, not (n, d) or not finite; ``leaf`` < 1.
    """

    def __init__(self, points: Float[np.ndarray, "n d"], *, leaf: int = 1) -> None:
        _check(points)
        require_at_least(1, leaf=leaf)
        self.points, self.leaf = points, leaf
        self.root = self._split(np.arange(len(points)))

    def _split(self, nodes: Int[np.ndarray, " some"]) -> tuple | np.ndarray:
        if len(nodes) <= self.leaf:
            return nodes
        axis, half = int(np.ptp(self.points[nodes], axis=0).argmax()), len(nodes) // 2
        nodes = nodes[np.argsort(self.points[nodes, axis], kind="stable")]
        cut = float(self.points[nodes[half - 1 : half + 1], axis].mean())
        return axis, cut, self._split(nodes[:half]), self._split(nodes[half:])

    def walk(self, query: Float[np.ndarray, " d"], k: int, slack: float = 0.0) -> Walk:
        """Visit leaves by the distance of their boxes, until no box within $1/(1+slack)$ of the k-th best is left.

        ``taken`` holds, for every leaf, (squared distance of its box / that of the k-th best so far, bounds
        computed so far, points seen).
        """
        coordinates, ticket, best, walk = query.tolist(), 0, [], Walk()
        boxes = [(0.0, ticket, self.root, (0.0,) * len(query))]
        while boxes:
            bound, _, part, offsets = heappop(boxes)
            worst = -best[0] if len(best) == k else inf
            walk.taken.append((bound / worst if worst else inf, ticket, len(walk.seen)))
            if bound * (1 + slack) ** 2 > worst:
                break
            while isinstance(part, tuple):
                axis, cut, low, high = part
                beyond = coordinates[axis] - cut
                part, far = (low, high) if beyond <= 0 else (high, low)
                ticket += 1  # breaks ties, so that the heap never compares trees
                sides = (*offsets[:axis], beyond**2, *offsets[axis + 1 :])
                heappush(boxes, (bound - offsets[axis] + beyond**2, ticket, far, sides))
            gap = self.points[part] - query
            for distance, node in zip(np.vecdot(gap, gap).tolist(), part.tolist(), strict=True):
                walk.seen.append((distance, node))
                heappush(best, -distance)
                if len(best) > k:
                    heappop(best)
        return walk


def sweep_slack(
    tree: KDTree, queries: Float[np.ndarray, "q d"], truth: Int[np.ndarray, "q k"], slacks: Sequence[float]
) -> Curve:
    r"""Recall against work of the tree when it skips boxes further than $1/(1+\epsilon)$ of the k-th best distance.

    ``slacks`` are the values of $\epsilon \ge 0$; at 0 the search is exact.

    Raises:
        ValueError: ``queries`` is empty or differs in length from ``truth``, or a slack is negative.
    """
    require_nonnegative(slacks=slacks)
    trails = []
    for query in queries:
        walk = tree.walk(query, truth.shape[1], min(slacks))
        ratio, _, count = np.array([*walk.taken, (inf, 0, len(walk.seen))]).T
        stops = count[(ratio * (1 + np.array(slacks)[:, None]) ** 2 > 1).argmax(1)]
        trails.append(([node for _, node in walk.seen], stops, 0))
    return _curve(slacks, trails, truth)
