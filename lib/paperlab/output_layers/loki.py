r"""Loki: answer with the label that lies in the middle of what a classifier believes, and not with its favourite.

A classifier can only name what it was trained on. If the labels are points of a space, with a distance between any two,
its probabilities say more than their largest: half "spaniel" and half "wolf" may well be a shepherd dog. The *Fréchet
mean*, the label with the least mean squared distance to the believed ones, reaches such labels without any training.

Roberts, Li, Adila, Cromp, Huang, Zhao and Sala, "Geometry-Aware Adaptation for Pretrained Models" (2023),
https://arxiv.org/abs/2307.12226.
"""

import colorsys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linprog
from scipy.sparse import block_diag, coo_array
from scipy.sparse.csgraph import shortest_path
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor
from torch.nn import functional as F

from paperlab.checks import (
    require_at_least,
    require_between,
    require_finite,
    require_nonempty,
    require_nonnegative,
    require_positive,
)
from paperlab.data.scenes import PALETTE, SHAPES, Scenes, render
from paperlab.nn.resnet import ResNet


def graph_distances(edges: Int[Tensor, "edges 2"], nodes: int) -> Float[Tensor, "nodes nodes"]:
    """Length of the shortest path between any two nodes of a connected graph, every edge of length 1.

    Raises:
        ValueError: an end of ``edges`` outside the nodes, or a graph that falls into parts.
    """
    require_at_least(1, nodes=nodes)
    require_between(0, nodes - 1, edges=edges)
    a, b = edges.T.cpu().numpy()
    found = shortest_path(coo_array((np.ones(len(a)), (a, b)), shape=(nodes, nodes)).tocsr(), directed=False)
    if not np.isfinite(found).all():
        raise ValueError("edges must connect all nodes")
    return torch.as_tensor(found, device=edges.device)


def grid_distances(rows: int, columns: int) -> Float[Tensor, "labels labels"]:
    """Path length between the places of a grid, numbered row by row: steps down plus steps to the side.

    Raises:
        ValueError: a side below 1.
    """
    require_at_least(1, rows=rows, columns=columns)
    place = torch.cartesian_prod(torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64))
    return torch.cdist(place, place, p=1)


def tempered(probabilities: Float[Tensor, "*batch observed"], temperature: float) -> Float[Tensor, "*batch observed"]:
    r"""$P_\lambda^{1/T} / \sum_{\lambda'} P_{\lambda'}^{1/T}$: what dividing the logits by $T$ would have given.

    Raises:
        ValueError: ``temperature`` is not positive, or a probability is negative or not finite.
    """
    require_positive(temperature=temperature)
    require_nonnegative(probabilities=probabilities)
    return (probabilities.log() / temperature).softmax(-1)


def frechet_values(
    probabilities: Float[Tensor, "*batch observed"], distances: Float[Tensor, "observed labels"], power: float = 2.0
) -> Float[Tensor, "*batch labels"]:
    r"""$F(y) = \sum_{\lambda \in \Lambda} P(\lambda \mid x)\, d(y, \lambda)^p$ of every label: one matrix product.

    With $p = 2$ the Fréchet variance of $P$ around $y$; with $p = 1$ the mean distance.

    Raises:
        ValueError: nothing observed, ``power`` not positive, or a probability or distance negative or not finite.
    """
    require_nonempty(distances=distances)
    require_positive(power=power)
    require_nonnegative(probabilities=probabilities, distances=distances)
    return probabilities @ distances.to(probabilities).pow(power)


def frechet_mean(
    probabilities: Float[Tensor, "*batch observed"], distances: Float[Tensor, "observed labels"], power: float = 2.0
) -> Int[Tensor, "*batch"]:
    r"""Loki's answer, $\hat y = \arg\min_{y \in \mathcal Y} F(y)$, over all labels and not only the observed ones.

    If all labels are equally far from each other it is the argmax of $P$; if they are points of a Euclidean space it
    is the label nearest to the mean of $P$; with ``power=1`` a weighted median. The first of equally good labels.

    Raises:
        ValueError: as `frechet_values`.
    """
    return frechet_values(probabilities, distances, power).argmin(-1)


def mean_square(answers: Int[Tensor, "*batch"], truth: Int[Tensor, "*batch"], distances: Tensor) -> float:
    r"""The score: $\mathbb E[d(y, \hat y)^2]$.

    Raises:
        ValueError: no answer.
    """
    require_nonempty(answers=answers)
    return distances[truth, answers].square().mean().item()


def advantage(distances: Float[Tensor, "observed labels"]) -> Float[Tensor, " labels"]:
    r"""By how much each label can beat every other one, at the weights $w$ that suit it best:

    $$\max_w \min_{y' \ne y} \sum_\lambda w_\lambda \big(d(y', \lambda)^2 - d(y, \lambda)^2\big), \qquad
    w_\lambda \ge 0,\ \sum_\lambda w_\lambda = 1 .$$

    Above 0, $y$ is *the* Fréchet mean for some weights; at 0 it is one at best together with others; below, never. The
    labels at 0 or above are the locus of the observed ones. One linear program a label, all solved as one: they share
    no variable, and the sum of the advantages is largest where each of them is.

    Raises:
        ValueError: fewer than 2 labels, nothing observed, or a distance that is negative or not finite.
    """
    require_nonempty(distances=distances)
    require_nonnegative(distances=distances)
    require_at_least(2, **{"number of labels in distances": distances.shape[1]})
    square = distances.double().square().cpu().numpy().T
    labels, observed = square.shape
    behind = (square[:, None] - square)[~np.eye(labels, dtype=bool)].reshape(labels, labels - 1, observed)
    weights = np.r_[np.ones(observed), 0.0]
    solved = linprog(
        np.tile(weights - 1, labels),
        block_diag([np.c_[rows, np.ones(len(rows))] for rows in behind], format="csr"),  # w · (own - other) + a <= 0
        np.zeros(labels * (labels - 1)),
        block_diag([weights[None]] * labels, format="csr"),
        np.ones(labels),
        np.tile(np.c_[np.where(weights > 0, 0, -np.inf), np.full(observed + 1, np.inf)], (labels, 1)),
        options={"presolve": False},  # it finds nothing to remove, and takes longer than the solution
    )
    found = solved.x.reshape(labels, observed + 1)[:, -1]
    return torch.as_tensor(found.copy(), device=distances.device)


def tree_paths(distances: Float[Tensor, "nodes nodes"], root: int) -> Bool[Tensor, "nodes nodes"]:
    """Row v holds the nodes on the path from ``root`` to v: those through which it is no detour to go.

    ``distances`` are those of a tree.

    Raises:
        ValueError: a root that does not exist, or distances that are not finite.
    """
    require_between(0, len(distances) - 1, root=root)
    require_finite(distances=distances)
    return (distances[root] + distances - distances[root][:, None]).abs() < 1e-9


def tree_locus(distances: Float[Tensor, "nodes nodes"], observed: Sequence[int]) -> Bool[Tensor, " nodes"]:
    """The Steiner subtree of the observed nodes: all that lie on a path from the first of them to another.

    Raises:
        ValueError: nothing observed, or as `tree_paths`.
    """
    require_nonempty(observed=observed)
    require_between(0, len(distances) - 1, observed=observed)
    return tree_paths(distances, observed[0])[list(observed)].any(0)


def farthest(distances: Float[Tensor, "nodes nodes"], locus: Bool[Tensor, " nodes"]) -> int:
    """The node to observe next: the one farthest from the locus, the first of several.

    In a tree a node at distance k adds the k nodes on its way, so that this choice makes the largest next locus.

    Raises:
        ValueError: an empty locus.
    """
    if not locus.any():
        raise ValueError("locus must hold at least one node")
    return int(distances[:, locus].amin(1).argmax())


def grow(
    distances: Float[Tensor, "nodes nodes"], first: int, choose: Callable[[list[int], Tensor], int]
) -> tuple[list[int], list[int]]:
    """Observe node after node of a tree until the locus is everything; the order, and the size of the locus after each.

    ``choose(observed, locus)`` names the next node.

    Raises:
        ValueError: ``first`` is no node, or ``choose`` repeats one.
    """
    paths = tree_paths(distances, first)
    observed, locus = [first], paths[first]
    sizes = [1]
    while sizes[-1] < len(distances):
        new = choose(observed, locus)
        if new in observed:
            raise ValueError(f"choose must name a node that is not observed yet, got {new}")
        observed.append(new)
        locus = locus | paths[new]
        sizes.append(int(locus.sum()))
    return observed, sizes


def relabelled(distances: Float[Tensor, "labels labels"], order: Int[Tensor, " labels"]) -> Tensor:
    r"""A metric of the same shape whose labels have changed places: $d'(a, b) = d(\pi(a), \pi(b))$.

    Raises:
        ValueError: ``order`` does not hold every label once.
    """
    if order.sort().values.tolist() != list(range(len(distances))):
        raise ValueError("order must hold every label once")
    return distances[order][:, order]


def label_pictures(
    labels: Int[Tensor, " n"], *, side: int, size: int, tremble: float, noise: float, generator: torch.Generator
) -> Float[Tensor, "n 3 size size"]:
    """Pictures of one shape each, for labels on a grid: the row is how large it is, the column its hue, red to blue.

    The painter trembles: radius and hue miss the label's by a normal error of ``tremble`` steps of the grid, so that
    neighbours overlap. Shape and place are random, the background some dark grey, and every pixel has ``noise``.

    Args:
        labels: row times ``side`` plus column.
        side: of the grid, at least 2.
        size: of the pictures in pixels.
        tremble: standard deviation in steps of the grid.
        noise: standard deviation in the pixels, which lie between 0 and 1.
        generator: of all that is drawn.

    Raises:
        ValueError: a label outside the grid, or as `paperlab.data.scenes.render`.
    """
    require_at_least(2, side=side)
    require_between(0, side**2 - 1, labels=labels)
    require_nonnegative(tremble=tremble, noise=noise)
    n, device = len(labels), generator.device
    meant = torch.stack([labels // side, labels % side], 1).to(device)
    drawn = (meant + tremble * torch.randn(n, 2, generator=generator, device=device)) / (side - 1)
    row, column = drawn.clamp(-0.1, 1.1).T
    radius = (0.12 + 0.30 * row)[:, None]
    colour = torch.tensor([colorsys.hsv_to_rgb(h % 1, 0.85, 0.95) for h in (2 / 3 * column).tolist()], device=device)
    centre = radius + (1 - 2 * radius) * torch.rand(n, 2, generator=generator, device=device)
    none = torch.zeros(n, 1, dtype=torch.long, device=device)
    scenes = Scenes(
        shape=torch.randint(len(SHAPES), (n, 1), generator=generator, device=device),
        colour=none,
        size=none,
        centre=centre[:, None],
        radius=radius,
        turn=torch.zeros_like(radius),
        velocity=torch.zeros_like(centre[:, None]),
        tint=(colour - PALETTE[0].to(device))[:, None],
        ground=0.05 + 0.25 * torch.rand(n, generator=generator, device=device),
    )
    pictures = render(scenes, size)
    return (pictures + noise * torch.randn(pictures.shape, generator=generator, device=device)).clamp(0, 1)


@torch.no_grad()
def pooled_maps(net: ResNet, pictures: Float[Tensor, "n 3 h w"], batch: int = 128) -> Float[Tensor, "n features"]:
    """Mean and largest value over the picture of every channel, at every depth of a residual network.

    Raises:
        ValueError: no picture.
    """
    require_nonempty(pictures=pictures)
    found = []
    for part in pictures.split(batch):
        maps = [net.stem(part), *net.maps(part)]
        found.append(torch.cat([m.mean((2, 3)) for m in maps] + [m.amax((2, 3)) for m in maps], 1))
    return torch.cat(found)


class Part(NamedTuple):
    """Some of the pictures: their features and their labels."""

    features: Float[np.ndarray, "n features"]
    labels: Int[np.ndarray, " n"]


class Linear(NamedTuple):
    """What classifier, class means and regression have in common: an affine map of the features."""

    weights: Float[np.ndarray, "features outputs"]
    bias: Float[np.ndarray, " outputs"]

    def __call__(self, features: Float[np.ndarray, "n features"]) -> Float[np.ndarray, "n outputs"]:
        """Logits of the observed classes in ascending order, or coordinates."""
        return features @ self.weights + self.bias


Search = dict[float, float]  # penalty to score on held-out pictures, lower is better


def _columns(train: Part, valid: Part) -> tuple[int, Int[np.ndarray, " n"], Int[np.ndarray, " m"]]:
    """How many classes there are, and where the labels of either part stand among them in ascending order."""
    classes, index = np.unique(train.labels, return_inverse=True)
    if not np.isin(valid.labels, classes).all():
        raise ValueError("valid must hold no label that train lacks")
    return len(classes), index, np.searchsorted(classes, valid.labels)


def _log_loss(model: Linear, part: Part, column: Int[np.ndarray, " n"]) -> float:
    return F.cross_entropy(torch.as_tensor(model(part.features)), torch.as_tensor(column)).item()


def fit_classifier(train: Part, valid: Part, penalties: Sequence[float]) -> tuple[Linear, Search]:
    """Logistic regression on observed classes, with the C that has the least log loss on other pictures of them.

    The search goes through ``penalties`` in their order and ends where the log loss rises.

    Raises:
        ValueError: no penalty, one that is not positive, or a label in ``valid`` that ``train`` lacks.
    """
    require_nonempty(penalties=penalties)
    require_positive(penalties=penalties)
    classes, _, column = _columns(train, valid)
    best, search, single = None, {}, train.features.astype(np.float32)  # the tolerance is coarser than that
    fitted = LogisticRegression(tol=1e-3, max_iter=300, warm_start=True)  # each fit begins where the last one ended
    for c in penalties:
        fitted.set_params(C=c).fit(single, train.labels)
        weights, bias = fitted.coef_.T, fitted.intercept_
        if classes == 2:  # scikit-learn keeps the second class's lead only
            weights, bias = np.c_[0 * weights, weights], np.r_[0, bias]
        model = Linear(weights.astype(train.features.dtype), bias.astype(train.features.dtype))
        search[c] = _log_loss(model, valid, column)
        if search[c] > min(search.values()):
            break
        best = model
    return best, search


def fit_prototypes(train: Part, valid: Part, shares: Sequence[float]) -> tuple[Linear, Search]:
    r"""The nearest class mean in the metric of $\Sigma^{-1}$, $\Sigma = (1 - s) S + s \bar\sigma^2 I$.

    $S$ is the covariance within the classes and $\bar\sigma^2$ its mean variance; the share $s$ is the one of
    ``shares`` with the least log loss on ``valid``. The logits, $\mu_k^\top \Sigma^{-1} (x - \mu_k / 2)$, are those of
    normal classes of one covariance and equal frequency.

    Raises:
        ValueError: no share, one outside 0.001 to 1, or a label in ``valid`` that ``train`` lacks.
    """
    require_nonempty(shares=shares)
    require_between(0.001, 1, shares=shares)
    classes, index, column = _columns(train, valid)
    member = np.eye(classes, dtype=train.features.dtype)[index]
    means = member.T @ train.features / member.sum(0)[:, None]
    rest = train.features - means[index]
    covariance, models, search = rest.T @ rest / len(rest), {}, {}
    sphere = np.diag(np.full_like(covariance[0], covariance.trace() / len(covariance)))
    for s in shares:
        weights = np.linalg.solve((1 - s) * covariance + s * sphere, means.T)
        models[s] = Linear(weights, -(means.T * weights).sum(0) / 2)
        search[s] = _log_loss(models[s], valid, column)
    return models[min(search, key=search.get)], search


def nearest_place(points: Float[np.ndarray, "n 2"], side: int) -> Int[np.ndarray, " n"]:
    """The label on a grid of ``side`` by ``side`` that is nearest to each point (row, column).

    Raises:
        ValueError: ``side`` below 1, or a point that is not finite.
    """
    require_at_least(1, side=side)
    require_finite(points=points)
    row, column = np.clip(np.rint(points), 0, side - 1).astype(int).T
    return row * side + column


def fit_coordinates(
    train: Part, valid: Part, penalties: Sequence[float], side: int, distances: Float[Tensor, "labels labels"]
) -> tuple[Linear, Search]:
    """The rival: ridge regression to the coordinates of the labels on a grid, to be snapped by `nearest_place`.

    The penalty is the one whose answers have the least mean squared label distance on ``valid``.

    Raises:
        ValueError: no penalty, or one that is not positive.
    """
    require_nonempty(penalties=penalties)
    require_positive(penalties=penalties)
    places = np.stack([train.labels // side, train.labels % side], 1)
    square, models, search = distances.square().cpu().numpy(), {}, {}
    for alpha in penalties:
        fitted = Ridge(alpha=alpha).fit(train.features, places)
        models[alpha] = Linear(fitted.coef_.T, fitted.intercept_)
        answers = nearest_place(models[alpha](valid.features), side)
        search[alpha] = float(square[valid.labels, answers].mean())
    return models[min(search, key=search.get)], search
