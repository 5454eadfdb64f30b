"""The Fréchet mean against closed forms, the locus against networkx and sampled weights, selection against search."""

import itertools

import networkx as nx
import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KDTree

from paperlab.nn.resnet import ResNet
from paperlab.output_layers import loki as lk


def weights(n, observed):
    return torch.distributions.Dirichlet(torch.full((observed,), 0.7, dtype=torch.float64)).sample((n,))


def tree(n, seed):
    graph = nx.random_labeled_tree(n, seed=seed)
    return graph, lk.graph_distances(torch.tensor(list(graph.edges)), n)


def points(n, dim, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_distances_of_graphs_and_grids_are_those_of_networkx():
    for graph in (nx.random_labeled_tree(17, seed=3), nx.cycle_graph(9), nx.petersen_graph()):
        found = lk.graph_distances(torch.tensor(list(graph.edges)), len(graph))
        np.testing.assert_array_equal(found, nx.floyd_warshall_numpy(graph, nodelist=sorted(graph)))
    grid = nx.convert_node_labels_to_integers(nx.grid_2d_graph(3, 5), ordering="sorted")
    np.testing.assert_array_equal(lk.grid_distances(3, 5), nx.floyd_warshall_numpy(grid))


def test_a_doubt_on_a_path_lands_on_the_label_between():
    path = lk.grid_distances(1, 3)[[0, 2]]
    p = torch.tensor([0.6, 0.4], dtype=torch.float64)
    torch.testing.assert_close(lk.frechet_values(p, path), torch.tensor([1.6, 1.0, 2.4], dtype=torch.float64))
    assert lk.frechet_mean(p, path) == 1
    assert lk.frechet_mean(p, path, power=1) == 0


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_with_euclidean_labels_it_snaps_the_weighted_mean(dim):
    torch.manual_seed(dim)
    labels = points(40, dim, dim)
    p = weights(300, 9)
    means = (p @ labels[:9]).numpy()
    expected = KDTree(labels.numpy()).query(means)[1][:, 0]
    np.testing.assert_array_equal(lk.frechet_mean(p, torch.cdist(labels[:9], labels)), expected)


def test_where_all_labels_are_equally_far_it_is_argmax():
    torch.manual_seed(0)
    p = weights(500, 6)
    complete = lk.graph_distances(torch.tensor(list(nx.complete_graph(10).edges)), 10)
    assert (lk.frechet_mean(p, complete[:6]) == p.argmax(-1)).all()
    assert (lk.frechet_mean(p, 3.5 * complete[:6], power=0.3) == p.argmax(-1)).all()


def test_power_one_on_a_line_is_the_weighted_median():
    torch.manual_seed(1)
    places, p = torch.arange(0, 21, 4), weights(200, 6)
    median = places[(p.cumsum(-1) >= 0.5).int().argmax(-1)]
    line = lk.grid_distances(1, 21)
    assert (lk.frechet_mean(p, line[places], power=1) == median).all()


def test_no_answer_has_a_smaller_expected_square_under_the_probabilities_themselves():
    torch.manual_seed(2)
    _, d = tree(12, 5)
    p = weights(50, 4)
    answer, truth = lk.frechet_mean(p, d[:4]), torch.multinomial(p, 4000, replacement=True)
    simulated = torch.stack([d[truth, y].square().mean(1) for y in range(12)], 1)  # (50, labels)
    ours = simulated.gather(1, answer[:, None])[:, 0]
    assert (ours <= simulated.amin(1) + 0.6).all()
    assert lk.mean_square(answer.repeat(4000, 1).T, truth, d) == pytest.approx(ours.mean().item())


def test_temperature_divides_logits_and_has_its_limits():
    logits = points(20, 5)
    p = logits.softmax(-1)
    torch.testing.assert_close(lk.tempered(p, 2.5), (logits / 2.5).softmax(-1))
    torch.testing.assert_close(lk.tempered(p, 1e9), torch.full_like(p, 0.2))
    torch.testing.assert_close(lk.tempered(torch.tensor([0.0, 1.0]), 3.0), torch.tensor([0.0, 1.0]))
    sharp = lk.frechet_mean(lk.tempered(p, 1e-4), lk.grid_distances(3, 3)[:5])
    assert (sharp == p.argmax(-1)).all()


@pytest.mark.parametrize("seed", range(6))
def test_the_locus_of_a_tree_is_networkxs_steiner_tree(seed):
    graph, d = tree(15, seed)
    observed = np.random.default_rng(seed).choice(15, 2 + seed % 4, replace=False).tolist()
    steiner = set(nx.algorithms.approximation.steiner_tree(graph, observed))
    steiner |= {v for a, b in itertools.combinations(observed, 2) for v in nx.shortest_path(graph, a, b)}
    assert set(lk.tree_locus(d, observed).nonzero()[:, 0].tolist()) == steiner
    assert set((lk.advantage(d[observed]) > 1e-9).nonzero()[:, 0].tolist()) == steiner


def test_sampled_weights_find_the_labels_with_an_advantage_and_no_others():
    torch.manual_seed(3)
    graph = nx.convert_node_labels_to_integers(nx.circular_ladder_graph(5))
    d = lk.graph_distances(torch.tensor(list(graph.edges)), 10)[[0, 2, 8]]
    p = torch.cat([weights(40_000, 3), torch.eye(3, dtype=torch.float64)])
    values = lk.frechet_values(p, d)
    lead = values.topk(2, largest=False).values
    unique = values.argmin(1)[lead[:, 1] - lead[:, 0] > 1e-9]
    assert set(unique.tolist()) == set((lk.advantage(d) > 1e-9).nonzero()[:, 0].tolist())
    others = torch.stack([values[:, [j for j in range(10) if j != y]].amin(1) - values[:, y] for y in range(10)], 1)
    torch.testing.assert_close(others.amax(0), lk.advantage(d), atol=0.05, rtol=0)
    assert (others.amax(0) <= lk.advantage(d) + 1e-9).all()


def test_two_corners_of_a_grid_cover_by_ties_and_four_without():
    d = lk.grid_distances(4, 5)
    two, four = lk.advantage(d[[0, 19]]), lk.advantage(d[[0, 4, 15, 19]])
    assert two.min().item() == pytest.approx(0, abs=1e-9)
    assert (two > 1e-9).nonzero()[:, 0].tolist() == [0, 19]
    assert (four > 1e-9).all()
    assert (lk.advantage(d[[0, 4]])[5:] < -1e-9).all()  # one side reaches that side only


@pytest.mark.parametrize("seed", range(4))
def test_the_farthest_node_makes_the_largest_next_locus_and_the_best_set(seed):
    _, d = tree(11, seed)
    order, sizes = lk.grow(d, seed, lambda observed, locus: lk.farthest(d, locus))
    for k in range(1, len(order)):
        others = [v for v in range(11) if v != seed]
        best = max(int(lk.tree_locus(d, [seed, *more]).sum()) for more in itertools.combinations(others, k))
        assert sizes[k] == best
    assert sizes[-1] == 11


def test_selection_ends_with_the_leaves_and_a_leaf_cannot_be_left_out():
    graph, d = tree(30, 8)
    leaves = {v for v in graph if graph.degree(v) == 1}
    order, sizes = lk.grow(d, 0, lambda observed, locus: lk.farthest(d, locus))
    assert set(order) == leaves | {0}
    assert sizes == sorted(sizes)
    rng = np.random.default_rng(0)
    order, _ = lk.grow(d, 0, lambda observed, locus: int(rng.choice(np.setdiff1d(np.arange(30), observed))))
    assert leaves <= set(order)
    with pytest.raises(ValueError, match="choose"):
        lk.grow(d, 0, lambda observed, locus: 0)


def test_a_relabelled_metric_is_the_same_metric_under_other_names():
    torch.manual_seed(4)
    _, d = tree(9, 1)
    order = torch.randperm(9)
    moved = lk.relabelled(d, order)
    assert all(moved[a, b] == d[order[a], order[b]] for a in range(9) for b in range(9))
    p = weights(100, 9)
    whole = torch.zeros_like(p)
    whole[:, order] = p  # the same belief, held about the renamed labels
    found = lk.frechet_values(p, moved)
    torch.testing.assert_close(found, lk.frechet_values(whole, d)[:, order])


def test_pictures_show_their_labels():
    labels = torch.arange(64).repeat(20)
    g = torch.Generator().manual_seed(0)
    x = lk.label_pictures(labels, side=8, size=16, tremble=0.0, noise=0.0, generator=g)
    assert x.shape == (1280, 3, 16, 16)
    assert x.min() >= 0
    assert x.max() <= 1
    colourful = (x.amax(1) - x.amin(1) > 0.4).double().mean((1, 2)).view(20, 8, 8).mean((0, 2))  # share, by row
    assert (colourful.diff() > 0).all()
    red_less_blue = (x[:, 0] - x[:, 2]).amax((1, 2)).view(20, 8, 8).mean((0, 1))
    assert red_less_blue[0] > 0.7 > 0.1 > red_less_blue[-1]
    blue = (x[:, 2] - x[:, 0]).amax((1, 2)).view(20, 8, 8).mean((0, 1))
    assert blue[-1] > 0.7 > 0.1 > blue[0]


def test_pooled_maps_are_the_means_and_maxima_of_every_channel():
    torch.manual_seed(0)
    net, x = ResNet(5, width=4, depth=1).eval(), torch.rand(5, 3, 16, 16)
    found = lk.pooled_maps(net, x, batch=2)
    assert found.shape == (5, 2 * (4 + 4 + 8 + 16))
    torch.testing.assert_close(found[:, 16:32], net.features(x).detach())
    torch.testing.assert_close(found[:, -16:], net.maps(x)[-1].flatten(2).max(2).values.detach())


def parts(seed=0, side=3, n=90):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, side**2, 2 * n)
    x = np.stack([labels // side, labels % side, 0 * labels], 1) + 0.4 * rng.standard_normal((2 * n, 3))
    return lk.Part(x[:n], labels[:n]), lk.Part(x[n:], labels[n:])


def balanced(part):
    rows = np.concatenate([np.flatnonzero(part.labels == k)[:3] for k in range(9)])
    assert len(rows) == 27
    return lk.Part(part.features[rows], part.labels[rows])


def log_loss(p, labels):
    return -np.log(p[np.arange(len(labels)), labels]).mean()  # classes are all of 0, 1, ...


def test_the_classifier_is_the_best_of_scikit_learns():
    train, valid = parts()
    penalties = [1e-3, 1e-1, 10.0, 1e6]
    model, search = lk.fit_classifier(train, valid, penalties)
    fits = {c: LogisticRegression(C=c, tol=1e-8, max_iter=1000).fit(*train) for c in penalties}
    for c, found in list(search.items())[:-1]:  # the last is the one that was given up
        assert found == pytest.approx(log_loss(fits[c].predict_proba(valid.features), valid.labels), rel=0.03)
    best = fits[min(search, key=search.get)]
    assert list(search)[-2:] == [best.C, penalties[penalties.index(best.C) + 1]]
    probabilities = softmax(model(valid.features), axis=1)
    np.testing.assert_allclose(probabilities, best.predict_proba(valid.features), atol=0.1)
    ours, theirs = (
        log_loss(p, train.labels) * len(train.labels) + (w**2).sum() / (2 * best.C)
        for p, w in (
            (softmax(model(train.features), axis=1), model.weights),
            (best.predict_proba(train.features), best.coef_),
        )
    )
    assert theirs * (1 - 1e-6) <= ours <= theirs * 1.01


def test_two_classes_are_no_exception():
    train, valid = (lk.Part(part.features[part.labels < 2], part.labels[part.labels < 2]) for part in parts())
    model, _ = lk.fit_classifier(train, valid, [1.0])
    wanted = LogisticRegression(C=1.0).fit(*train).predict_proba(valid.features)
    np.testing.assert_allclose(softmax(model(valid.features), axis=1), wanted, atol=0.02)


def test_the_class_means_are_the_best_linear_discriminant():
    train, valid = parts()
    train = balanced(train)
    model, search = lk.fit_prototypes(train, valid, [0.01, 0.5, 1.0])
    fits = {
        s: LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s, priors=np.full(9, 1 / 9)).fit(*train) for s in search
    }
    for s, fitted in fits.items():
        assert search[s] == pytest.approx(log_loss(fitted.predict_proba(valid.features), valid.labels))
    best = fits[min(search, key=search.get)]
    probabilities = softmax(model(valid.features), axis=1)
    np.testing.assert_allclose(probabilities, best.predict_proba(valid.features), atol=1e-6)


def test_the_regression_is_the_best_of_scikit_learns():
    train, valid = parts()
    d, places = lk.grid_distances(3, 3), np.stack(np.divmod(train.labels, 3), 1)
    model, search = lk.fit_coordinates(train, valid, [0.1, 10.0, 1e3], 3, d)
    best = Ridge(alpha=min(search, key=search.get)).fit(train.features, places)
    np.testing.assert_allclose(model(valid.features), best.predict(valid.features), atol=1e-9)
    answers = KDTree(np.stack(np.divmod(np.arange(9), 3), 1)).query(best.predict(valid.features))[1][:, 0]
    np.testing.assert_array_equal(lk.nearest_place(model(valid.features), 3), answers)
    assert search[best.alpha] == pytest.approx(d[valid.labels, answers].square().mean().item())


def test_a_search_ends_where_the_loss_rises():
    train, valid = parts(1)
    _, search = lk.fit_classifier(train, valid, [1e-2, 1.0, 1e-4, 1e3])
    losses = list(search.values())
    assert list(search) == [1e-2, 1.0, 1e-4]
    assert losses[1] < losses[0] < losses[2]


D = torch.ones(2, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: lk.graph_distances(torch.tensor([[0, 3]]), 3), "edges"),
        (lambda: lk.graph_distances(torch.tensor([[0, 1]]), 3), "edges"),
        (lambda: lk.grid_distances(0, 3), "rows"),
        (lambda: lk.tempered(torch.ones(2) / 2, 0.0), "temperature"),
        (lambda: lk.frechet_mean(torch.tensor([0.5, -0.5]), D), "probabilities"),
        (lambda: lk.frechet_mean(torch.ones(2) / 2, D * torch.nan), "distances"),
        (lambda: lk.frechet_mean(torch.ones(2) / 2, D, power=0.0), "power"),
        (lambda: lk.frechet_mean(torch.ones(0), D[:0]), "distances"),
        (lambda: lk.advantage(D[:, :1]), "labels"),
        (lambda: lk.tree_paths(torch.zeros(3, 3), 3), "root"),
        (lambda: lk.tree_paths(torch.full((2, 2), torch.inf), 0), "distances"),
        (lambda: lk.tree_locus(torch.zeros(3, 3), []), "observed"),
        (lambda: lk.tree_locus(torch.zeros(3, 3), [3]), "observed"),
        (lambda: lk.farthest(torch.zeros(3, 3), torch.zeros(3, dtype=torch.bool)), "locus"),
        (
            lambda: lk.label_pictures(
                torch.tensor([64]), side=8, size=16, tremble=0.0, noise=0.0, generator=torch.Generator()
            ),
            "labels",
        ),
        (lambda: lk.pooled_maps(ResNet(2), torch.zeros(0, 3, 16, 16)), "pictures"),
        (lambda: lk.fit_classifier(*parts(), []), "penalties"),
        (lambda: lk.fit_prototypes(*parts(), [1.5]), "shares"),
        (lambda: lk.fit_classifier(parts(side=2)[0], parts()[1], [1.0]), "valid"),
        (lambda: lk.fit_prototypes(parts(side=2)[0], parts()[1], [1.0]), "valid"),
        (lambda: lk.nearest_place(np.zeros((1, 2)), 0), "side"),
        (lambda: lk.nearest_place(np.full((1, 2), np.nan), 3), "points"),
        (lambda: lk.mean_square(torch.zeros(0).long(), torch.zeros(0).long(), D), "answers"),
        (lambda: lk.relabelled(torch.zeros(3, 3), torch.tensor([0, 1, 1])), "order"),
        (lambda: lk.fit_coordinates(*parts(), [0.0], 3, lk.grid_distances(3, 3)), "penalties"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
