"""HNSW against exact neighbours, the geometry of its definition, networkx, and the authors' own hnswlib."""

from heapq import heappop, heappush
from itertools import pairwise
from math import inf, log

import networkx
import numpy as np
import pytest
from sklearn.neighbors import KDTree as ExactTree
from sklearn.neighbors import NearestNeighbors

from paperlab.embeddings_and_retrieval.hnsw import HNSW, Curve, Walk, kd_tree, kd_visit, sweep_ef, sweep_slack

K = 10


def uniform(n: int, d: int, seed: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    points, queries = rng.random((n, d)), rng.random((30, d))
    return points, queries, exact(points, queries)


def exact(points: np.ndarray, queries: np.ndarray) -> np.ndarray:
    brute = NearestNeighbors(n_neighbors=K, algorithm="brute").fit(points)
    return brute.kneighbors(queries, return_distance=False)


def recall(index: HNSW, queries: np.ndarray, truth: np.ndarray, ef: int) -> float:
    hits = [
        len({node for _, node in index.knn_search(q, K, ef)} & set(t)) / K
        for q, t in zip(queries, truth.tolist(), strict=True)
    ]
    return float(np.mean(hits))


@pytest.fixture(scope="module")
def built() -> HNSW:
    return HNSW(uniform(600, 4)[0], seed=3).grow(600)


def test_searching_everything_is_exact(built):
    # The oracle: with ef = N on a connected layer 0 nothing can be missed, and distances are the true ones.
    points, queries, truth = uniform(600, 4)
    ground = networkx.DiGraph([(a, b) for a, links in built.layers[0].items() for b in links])
    assert len(networkx.descendants(ground, built.entry)) + 1 == 600
    for query, neighbours in zip(queries, truth, strict=True):
        found = built.knn_search(query, K, 600)
        assert [node for _, node in found] == neighbours.tolist()
        np.testing.assert_allclose([d for d, _ in found], ((points[neighbours] - query) ** 2).sum(1))


def test_every_search_is_a_subset_of_brute_force_and_recall_rises(built):
    _, queries, truth = uniform(600, 4)
    recalls = [recall(built, queries, truth, ef) for ef in (10, 20, 60, 600)]
    assert recalls[0] > 0.9
    assert recalls[-1] == 1.0
    assert recalls == sorted(recalls)


def test_levels_are_geometric_with_ratio_one_over_m():
    levels = np.array(HNSW(np.zeros((60_000, 1)), m=8, seed=1).levels)
    for level in (1, 2, 3):  # P(level >= l) = M**-l, within five standard errors
        p = 8.0**-level
        assert abs((levels >= level).mean() - p) < 5 * (p * (1 - p) / len(levels)) ** 0.5
    doubled = np.array(HNSW(np.zeros((60_000, 1)), m=8, level_scale=2 / log(8), seed=1).levels)
    assert abs((doubled >= 1).mean() - 8**-0.5) < 0.01


def test_layers_are_nested_and_top_holds_the_entry(built):
    for lower, upper in pairwise(built.layers):
        assert set(upper) < set(lower)
    assert built.entry in built.layers[-1]
    assert dict(enumerate(built.levels)) == {
        node: max(layer for layer, nodes in enumerate(built.layers) if node in nodes) for node in range(600)
    }


def test_no_level_scale_means_one_layer():
    flat = HNSW(uniform(300, 4)[0], level_scale=0.0).grow(300)
    assert len(flat.layers) == 1
    assert set(flat.layers[0]) == set(range(300))
    assert flat.entry == 0


@pytest.mark.parametrize("options", [{}, {"select": "simple"}, {"extend": True, "keep_pruned": True}])
def test_degrees_stay_bounded_and_links_inside_their_layer(options):
    index = HNSW(uniform(400, 3)[0], m=4, **options).grow(400)
    for layer, nodes in enumerate(index.layers):
        assert max(map(len, nodes.values())) <= (8 if layer == 0 else 4)
        assert all(links <= set(nodes) - {node} for node, links in nodes.items())
    assert max(map(len, index.layers[0].values())) > 4  # layer 0 may hold M_max0 = 2M links, and does


@pytest.mark.parametrize("options", [{}, {"select": "simple"}, {"extend": True, "keep_pruned": True}, {"m": 3}])
def test_lookup_changes_nothing_but_the_time(options):
    points, queries, truth = uniform(400, 5)
    plain, looked = HNSW(points, **options).grow(400), HNSW(points, lookup=True, **options).grow(400)
    assert plain.layers == looked.layers
    assert plain.computed == looked.computed
    for query in queries:
        assert plain.knn_search(query, K, 30) == looked.knn_search(query, K, 30)
    assert plain.computed == looked.computed
    one, two = sweep_ef(plain, queries, truth, [3, 20]), sweep_ef(looked, queries, truth, [3, 20])
    np.testing.assert_array_equal(one.work, two.work)
    np.testing.assert_array_equal(one.recall, two.recall)


def test_flat_nsw_never_drops_a_link():
    # Without shrinking every link is two-way, so the graph is connected and early nodes become hubs.
    index = HNSW(uniform(400, 3)[0], m=4, level_scale=0.0, select="simple", shrink=False).grow(400)
    links = index.layers[0]
    assert all(node in links[other] for node in links for other in links[node])
    assert networkx.is_connected(networkx.Graph([(a, b) for a in links for b in links[a]]))
    assert sum(map(len, links.values())) == 2 * (6 + 4 * 396)  # 4 + 3 + ... for the first, then M each
    assert max(map(len, links.values())) > 16


def relative_neighbours(points: np.ndarray, base: int, ranked: list[tuple[float, int]]) -> list[int]:
    """Algorithm 4 as its sentence reads, with true distances: keep e if closer to base than to all kept before."""
    kept = []
    for _, node in ranked:
        to_base = np.linalg.norm(points[node] - points[base])
        if all(to_base < np.linalg.norm(points[node] - points[other]) for other in kept):
            kept.append(node)
    return kept


def test_heuristic_is_the_sentence_of_the_paper():
    points = uniform(60, 3)[0]
    index = HNSW(points)
    for base in range(20):
        distance = ((points - points[base]) ** 2).sum(1)
        ranked = sorted((float(distance[i]), i) for i in range(60) if i != base)
        assert index.select_neighbors(base, ranked, 60, 0) == relative_neighbours(points, base, ranked)
        assert index.select_neighbors(base, ranked, 3, 0) == relative_neighbours(points, base, ranked)[:3]


def test_heuristic_with_all_candidates_is_a_subset_of_no_longer_detour():
    # Whoever is left out is closer to a kept neighbour than to the base: greedy routing loses nothing.
    points = uniform(80, 2)[0]
    distance = ((points - points[0]) ** 2).sum(1)
    ranked = sorted((float(distance[i]), i) for i in range(1, 80))
    kept = HNSW(points).select_neighbors(0, ranked, 80, 0)
    for far, node in ranked:
        if node not in kept:
            assert min(((points[node] - points[k]) ** 2).sum() for k in kept) <= far


def test_select_options():
    points = np.array([[0.0, 0.0], [1.0, 0.0], [1.1, 0.3], [-2.0, 0.0]])
    ranked = [(1.0, 1), (1.3, 2), (4.0, 3)]
    assert HNSW(points, select="simple").select_neighbors(0, ranked, 2, 0) == [1, 2]
    assert HNSW(points).select_neighbors(0, ranked, 2, 0) == [1, 3]  # 2 is closer to 1 than to 0
    assert HNSW(points, keep_pruned=True).select_neighbors(0, ranked, 3, 0) == [1, 3, 2]
    extended = HNSW(points, extend=True)
    extended.layers = [{0: set(), 1: {3}, 2: set(), 3: set()}]
    assert extended.select_neighbors(0, ranked[:1], 2, 0) == [1, 3]  # 3 is known only as a neighbour of 1


def test_counts_every_distance_once(built, monkeypatch):
    _, queries, _ = uniform(600, 4)
    asked = []
    real = HNSW.ruler

    def spied(self, query):
        measure = real(self, query)
        return lambda nodes: asked.extend(nodes) or measure(nodes)

    monkeypatch.setattr(HNSW, "ruler", spied)
    ground = built.ground_floor(5)
    before = ground.computed
    ground.knn_search(queries[0], K, 40)
    assert len(asked) == len(set(asked))  # on one layer no point is looked at twice
    assert ground.computed - before == len(asked) + 1  # and the entry
    asked.clear()
    before = built.computed
    built.knn_search(queries[0], K, 40)
    assert built.computed - before == len(asked) + 1


@pytest.mark.parametrize("flat", [False, True])
def test_one_walk_contains_all_the_shorter_ones(built, flat):
    _, queries, truth = uniform(600, 4)
    index = built.ground_floor(0) if flat else built
    efs = [10, 13, 20, 41, 64]
    curve = sweep_ef(index, queries, truth, efs)
    for i, ef in enumerate(efs):  # against a separate search for every ef
        before = index.computed
        assert recall(index, queries, truth, ef) == pytest.approx(curve.recall[i], abs=1e-12)
        assert (index.computed - before) / len(queries) == pytest.approx(curve.work[i], abs=1e-9)
    assert (np.diff(curve.work) > 0).all()
    assert (np.diff(curve.recall) >= 0).all()


@pytest.mark.parametrize("flat", [False, True])
def test_narrower_than_k_stops_early_and_returns_the_best_of_all_met(built, flat):
    # Below K the reference is a search for one neighbour with that ef, and the ten best of every point it met.
    _, queries, truth = uniform(600, 4)
    index = built.ground_floor(0) if flat else built
    efs = [1, 2, 5, 9]
    curve = sweep_ef(index, queries, truth, efs)
    for i, ef in enumerate(efs):
        hits, before = 0, index.computed
        for query, neighbours in zip(queries, truth.tolist(), strict=True):
            index.knn_search(query, 1, ef, walks := [])
            hits += len({node for _, node in sorted(walks[-1].seen)[:K]} & set(neighbours))
        assert curve.recall[i] == pytest.approx(hits / (K * len(queries)), abs=1e-12)
        assert curve.work[i] == pytest.approx((index.computed - before) / len(queries), abs=1e-9)


def test_ground_floor_leaves_the_index_alone(built):
    layers = len(built.layers)
    flat = built.ground_floor(11)
    assert (len(flat.layers), flat.entry, len(built.layers)) == (1, 11, layers)
    assert flat.layers[0] is built.layers[0]


def test_ground_floor_is_what_a_flat_build_gives():
    # m_L = 0 enters every search at the first point; the same neighbours are found, so the same links are made.
    points = uniform(1000, 4)[0]
    tall, flat = HNSW(points).grow(1000).ground_floor(0), HNSW(points, level_scale=0.0).grow(1000)
    links = [{(a, b) for a, near in index.layers[0].items() for b in near} for index in (tall, flat)]
    assert len(links[0] ^ links[1]) <= 0.001 * len(links[0])
    assert tall.entry == flat.entry


def test_search_does_not_depend_on_scale_rotation_or_shift():
    points, queries, truth = uniform(300, 3)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    a, b = HNSW(points, seed=5).grow(300), HNSW(4 * points @ turn + 9, seed=5).grow(300)
    assert a.layers == b.layers
    one, two = (sweep_ef(i, q, truth, [1, 5, 20]).work for i, q in ((a, queries), (b, 4 * queries @ turn + 9)))
    np.testing.assert_array_equal(one, two)


def test_growth_in_steps_is_growth_at_once():
    points = uniform(250, 4)[0]
    assert HNSW(points, seed=2).grow(100).grow(250).layers == HNSW(points, seed=2).grow(250).layers


def test_tree_without_slack_is_exact_and_looks_at_few():
    points, queries, truth = uniform(600, 4)
    curve = sweep_slack(points, queries, truth, [2.0, 0.5, 0.0])
    assert curve.recall[-1] == 1.0
    assert (np.diff(curve.recall) >= 0).all()
    # scikit-learn's tree counts its distances too. It prunes by tight boxes, ours by cells: alike.
    theirs = ExactTree(points, leaf_size=2)  # a tight box around one point is already its distance
    theirs.query(queries, k=K)
    assert 0.5 < curve.work[-1] * len(queries) / theirs.get_n_calls() < 2


def test_boxes_tile_the_space_and_leaves_are_numbered_as_a_heap():
    points, queries, _ = uniform(200, 3)
    number, low, high = kd_tree(points)
    assert ((low <= points) & (points <= high)).all()
    for query in queries:
        assert ((low <= query) & (query < high)).all(1).sum() == 1
    assert sum(2.0 ** -(name.bit_length() - 1) for name in number) == 1  # a complete binary tree (Kraft's equality)
    assert len(set(number)) == 200


def heap_search(points: np.ndarray, query: np.ndarray, k: int, slack: float) -> tuple[list[int], int]:
    """Best-bin-first as it is really done: split on the way down, the far sides on a heap. Points met, bounds made."""

    def split(nodes):
        if len(nodes) == 1:
            return nodes[0]
        axis = int(np.ptp(points[nodes], axis=0).argmax())
        nodes = nodes[np.argsort(points[nodes, axis], kind="stable")]
        half = len(nodes) // 2
        return axis, points[nodes[half - 1 : half + 1], axis].mean(), split(nodes[:half]), split(nodes[half:])

    met, best, made, boxes = [], [], 0, [(0.0, 0, split(np.arange(len(points))), np.zeros(len(query)))]
    while boxes:
        bound, _, part, offsets = heappop(boxes)
        if len(best) == k and bound * (1 + slack) ** 2 > best[-1]:
            break
        while isinstance(part, tuple):
            axis, cut, below, above = part
            part, far = (below, above) if query[axis] <= cut else (above, below)
            sides = offsets.copy()
            sides[axis] = (query[axis] - cut) ** 2
            made += 1
            heappush(boxes, (sides.sum(), made, far, sides))
        met.append(int(part))
        best = sorted([*best, float(((points[part] - query) ** 2).sum())])[:k]
    return met, made


@pytest.mark.parametrize("slack", [0.0, 0.6, 2.0])
def test_sorted_boxes_are_what_a_heap_on_the_way_down_finds(slack):
    points, queries, truth = uniform(300, 4)
    tree = kd_tree(points)
    searched = [heap_search(points, query, K, slack) for query in queries]
    for query, (met, made) in zip(queries, searched, strict=True):
        order, bounds, worst = kd_visit(points, tree, query, K)
        assert order[: len(met)] == met
        assert bounds[len(met)] * (1 + slack) ** 2 > worst[len(met)]
        opened = {tree[0][node] >> up for node in met for up in range(1, tree[0][node].bit_length())}
        assert len(opened) == made  # every inner node above a leaf that was visited costs one bound
    work = sweep_slack(points, queries, truth, [slack]).work[0]
    assert work == pytest.approx(np.mean([len(met) for met, _ in searched]))


def test_slack_keeps_its_promise():
    points, queries, truth = uniform(600, 4)
    tree = kd_tree(points)
    for query, neighbours in zip(queries, truth, strict=True):
        order, bounds, worst = kd_visit(points, tree, query, K)
        met = order[: int((bounds * 2**2 > worst).argmax())]  # slack 1
        kth = np.sort(((points[met] - query) ** 2).sum(1))[K - 1]
        assert kth <= 4 * ((points[neighbours[-1]] - query) ** 2).sum() + 1e-12


def test_work_at_interpolates():
    curve = Curve(np.array([10.0, 20.0, 40.0]), np.array([0.5, 0.7, 0.9]))
    assert curve.work_at(0.8) == pytest.approx(30)
    assert curve.work_at(0.5) == pytest.approx(10)
    assert curve.work_at(0.91) == inf


def test_simple_selection_can_lose_connectivity_where_the_heuristic_does_not():
    rng = np.random.default_rng(0)
    centres = rng.random((20, 10))
    points = centres[rng.integers(0, 20, 600)] + 0.03 * rng.standard_normal((600, 10))

    def reachable(select: str) -> int:
        index = HNSW(points, select=select).grow(600)
        graph = networkx.DiGraph([(a, b) for a, links in index.layers[0].items() for b in links])
        from_entry = networkx.descendants(graph, index.entry) | {index.entry}
        # ef = N returns the K nearest of what can be reached from where the descent lands, and nothing else.
        index.ground_floor(index.entry).knn_search(points[0], 1, 600, walks := [])
        assert {node for _, node in walks[-1].seen} == from_entry
        return len(from_entry)

    assert reachable("heuristic") == 600
    assert reachable("simple") < 600


def test_recall_agrees_with_the_authors_library():
    hnswlib = pytest.importorskip("hnswlib", reason="hnswlib is a development extra")
    points, queries, truth = uniform(1500, 16)
    theirs = hnswlib.Index("l2", 16)
    theirs.init_index(1500, ef_construction=50, M=8, random_seed=1)
    theirs.set_num_threads(1)
    theirs.add_items(points)
    ours = HNSW(points, seed=1).grow(1500)
    for ef in (10, 30, 100):
        theirs.set_ef(ef)
        found, _ = theirs.knn_query(queries, k=K)
        reference = np.mean([len(set(f) & set(t)) / K for f, t in zip(found.tolist(), truth.tolist(), strict=True)])
        assert abs(recall(ours, queries, truth, ef) - reference) < 0.06


def test_bad_input_is_named(built):
    good = np.random.default_rng(0).random((5, 2))
    for bad, name in [
        ({"points": np.zeros((0, 2))}, "points"),
        ({"points": np.array([[np.nan, 0.0]])}, "points"),
        ({"points": good, "m": 1}, "m must"),
        ({"points": good, "ef_construction": 0}, "ef_construction"),
        ({"points": good, "level_scale": -1.0}, "level_scale"),
        ({"points": good, "select": "best"}, "select"),
    ]:
        with pytest.raises(ValueError, match=name):
            HNSW(bad.pop("points"), **bad)
    with pytest.raises(ValueError, match="ef must"):
        built.knn_search(np.zeros(4), 10, 5)
    with pytest.raises(ValueError, match="query"):
        built.knn_search(np.full(4, np.nan), 1, 5)
    with pytest.raises(ValueError, match="size"):
        HNSW(good).knn_search(np.zeros(2), 1, 5)
    with pytest.raises(ValueError, match="size must"):
        HNSW(good).grow(6)
    with pytest.raises(ValueError, match="entry"):
        built.ground_floor(600)
    with pytest.raises(ValueError, match="points"):
        kd_tree(np.full((4, 2), np.inf))
    with pytest.raises(ValueError, match="slacks"):
        sweep_slack(good, good, np.zeros((5, 1), dtype=int), [-0.1])
    with pytest.raises(ValueError, match="efs"):
        sweep_ef(HNSW(good).grow(5), good, np.zeros((5, 1), dtype=int), [0])


def test_a_walk_records_what_was_met(built):
    _, queries, _ = uniform(600, 4)
    walks: list[Walk] = []
    found = built.knn_search(queries[0], K, 30, walks)
    assert len(walks) == len(built.layers)
    assert sorted(walks[-1].seen)[:K] == found
    assert all(a[2] <= b[2] for walk in walks for a, b in pairwise(walk.taken))
