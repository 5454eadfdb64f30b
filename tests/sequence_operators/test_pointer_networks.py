"""Pointer networks against torch's LSTM, SciPy's hulls and searches through everything."""

import math
from itertools import permutations, product

import numpy as np
import pytest
import torch
from scipy.spatial import ConvexHull
from torch import nn

from paperlab.sequence_operators.pointer_networks import (
    KINDS,
    Attention,
    Pointer,
    Race,
    StackedLSTM,
    area,
    convex_hull,
    coverage,
    decode,
    draw_points,
    is_polygon,
    outline,
    same_cycle,
    scores,
    shortest_tours,
    tour_length,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw_labels(seeds, batch, n, dictionary, g):
    return torch.rand(seeds, batch, dictionary, generator=g).argsort(-1)[..., :n].sort(-1).values


def race(*kinds, seeds=2, width=8, seed=0):
    return Race(kinds or tuple(KINDS), seeds, width=width, dictionary=9, generator=generator(seed)).double()


def problem(n=5, seeds=2, batch=3, seed=0):
    points = draw_points(seeds, batch, n, generator(seed)).double()
    return points, convex_hull(points), draw_labels(seeds, batch, n, 9, generator(seed + 1))


def in_torchs_order(width):
    """Columns for the gates i, f, g, o; ours are o, i, f, g."""
    return torch.arange(4 * width).roll(-width)


def torch_lstm(stack, copy, features, width):
    """torch's own LSTM with the weights of one copy."""
    lstm = nn.LSTM(features, width).double()
    weight = stack.weight[copy].detach()[:, in_torchs_order(width)]
    with torch.no_grad():
        lstm.weight_ih_l0.copy_(weight[:features].T)
        lstm.bias_ih_l0.copy_(weight[features])
        lstm.bias_hh_l0.zero_()
        lstm.weight_hh_l0.copy_(weight[features + 1 :].T)
    return lstm


def test_each_copy_is_torchs_lstm_forwards_and_backwards():
    stack = StackedLSTM(3, 2, 4, generator=generator()).double()
    x = torch.randn(6, 3, 5, 2, dtype=torch.float64, generator=generator(1), requires_grad=True)
    h, c = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=generator(2))
    out, (last_h, last_c) = stack(x, (h, c))
    (out.sin().sum() + last_c.square().sum()).backward()
    for copy in range(3):
        lstm, y = torch_lstm(stack, copy, 2, 4), x[:, copy].detach().clone().requires_grad_()
        expected, (_, cell) = lstm(y, (h[copy][None], c[copy][None]))
        (expected.sin().sum() + cell.square().sum()).backward()
        torch.testing.assert_close(out[copy].transpose(0, 1), expected)
        torch.testing.assert_close(last_h[copy], expected[-1])
        torch.testing.assert_close(last_c[copy], cell[0])
        torch.testing.assert_close(x.grad[:, copy], y.grad)
        grad = stack.weight.grad[copy][:, in_torchs_order(4)]
        torch.testing.assert_close(grad[:2], lstm.weight_ih_l0.grad.T)
        torch.testing.assert_close(grad[2], lstm.bias_ih_l0.grad)
        torch.testing.assert_close(grad[3:], lstm.weight_hh_l0.grad.T)


def test_scores_are_the_equation_and_its_derivative():
    keys, query = (torch.randn(2, 3, m, 4, dtype=torch.float64, generator=generator(m)) for m in (5, 2))
    v = torch.randn(2, 4, dtype=torch.float64, generator=generator(9))
    u = scores(keys, query, v)
    assert u.shape == (2, 3, 2, 5)
    by_hand = sum(v[1, k] * math.tanh(keys[1, 2, 4, k] + query[1, 2, 0, k]) for k in range(4))
    assert u[1, 2, 0, 4].item() == pytest.approx(by_hand.item(), abs=1e-12)
    assert torch.autograd.gradcheck(scores, [t.requires_grad_() for t in (keys, query, v)])


def test_a_pointer_is_a_distribution_and_follows_its_inputs():
    head = Pointer(2, 6, 9, generator())
    e, d = torch.randn(2, 3, 7, 6, generator=generator(1)), torch.randn(2, 3, 4, 6, generator=generator(2))
    logp = head(e, d)
    torch.testing.assert_close(logp.exp().sum(-1), torch.ones(2, 3, 4))
    order = torch.randperm(7, generator=generator(3))
    torch.testing.assert_close(head(e[:, :, order], d)[..., :7], logp[..., order])
    torch.testing.assert_close(head(e[:, :, order], d)[..., 7], logp[..., 7])
    longer = head(torch.cat([e, torch.randn(2, 3, 30, 6, generator=generator(4))], 2), d)
    assert longer.shape == (2, 3, 4, 38)  # no parameter knows how many inputs there are
    torch.testing.assert_close(longer[..., 1] - longer[..., 0], logp[..., 1] - logp[..., 0], atol=1e-5, rtol=1e-4)


def test_attention_can_only_name_what_is_in_its_dictionary():
    head = Attention(1, 6, 9, generator())
    e, d = torch.randn(1, 2, 4, 6, generator=generator(1)), torch.randn(1, 2, 3, 6, generator=generator(2))
    rows = [head(e, d, torch.tensor(labels).expand(1, 2, 4)).exp() for labels in ([0, 1, 2, 3], [4, 5, 6, 7])]
    absent = head(e, d, torch.tensor([8] * 4).expand(1, 2, 4)).exp()[..., 0]
    total = rows[0][..., :4].sum(-1) + rows[1][..., :4].sum(-1) + absent + rows[0][..., 4]
    torch.testing.assert_close(total, torch.ones(1, 2, 3))  # all nine entries and the end
    order = [2, 0, 3, 1]
    torch.testing.assert_close(head(e[:, :, order], d, torch.arange(4).expand(1, 2, 4)), rows[0].log())  # a blend


def test_copies_do_not_hear_of_one_another():
    model, (points, hull, labels) = race(), problem()
    whole = model(points, hull, labels)
    moved = points.clone()
    moved[1] = moved[1].flip(-1)
    again = model(moved, hull, labels)
    for k in range(len(KINDS)):
        torch.testing.assert_close(again[2 * k], whole[2 * k])
        assert not torch.allclose(again[2 * k + 1], whole[2 * k + 1])
    model.loss(points, hull, labels)[3].backward()
    used = model.encoder.weight.grad.flatten(1).abs().sum(1) > 0
    assert used.tolist() == [copy == 3 for copy in range(8)]


def test_teacher_forcing_does_not_look_ahead():
    model, (points, hull, labels) = race(), problem(n=6)
    before = model(points, hull, labels)
    changed = hull.clone()
    changed[..., 2] = (changed[..., 2] + 1) % 6
    after = model(points, changed, labels)
    torch.testing.assert_close(after[:, :, :3], before[:, :, :3])
    assert (after[:, :, 3:] - before[:, :, 3:]).abs().max() > 1e-4


def test_labels_matter_only_where_they_are_shown():
    model, (points, hull, labels) = race(), problem()
    other = (labels + 1) % 9
    same = (model(points, hull, labels) == model(points, hull, other)).flatten(1).all(1).view(len(KINDS), 2).all(1)
    assert same.tolist() == [kind != "attention, labels shown" for kind in KINDS]


def test_loss_is_the_mean_surprise_up_to_the_end():
    model, (points, hull, labels) = race("pointer", seeds=1), problem(seeds=1)
    logp = model(points, hull, labels)[0]
    terms = []
    for b in range(3):
        for t, place in enumerate(hull[0, b].tolist()):
            terms.append(-logp[b, t, place].item())
            if place == 5:
                break
    assert model.loss(points, hull)[0].item() == pytest.approx(sum(terms) / len(terms))


def likeliest(model, points, tours):
    """The best sequence of one problem, among all that can be written down; model's own log-probabilities, summed."""
    n = points.shape[2]
    if tours:
        every = [(*p, n) for p in permutations(range(n))]
    else:
        every = [(*p, *[n] * (n + 1 - m)) for m in range(n + 2) for p in product(range(n), repeat=m)]
    sequence = torch.tensor(every)[None]
    logp = model(points.expand(1, len(every), n, 2), sequence).gather(-1, sequence[..., None])[0, ..., 0]
    counts = torch.cat([torch.ones(len(every), 1), sequence[0, :, :-1] < n], 1)
    if tours:
        counts[:, -1] = 0  # after the last city there is nothing left to choose
    return every[int((logp * counts).sum(-1).argmax())]


@pytest.mark.parametrize("tours", [False, True])
def test_a_wide_beam_finds_the_likeliest_sequence_there_is(tours):
    points, differs = draw_points(1, 1, 3, generator(5)).double(), 0
    for seed in range(6):
        model = race("pointer", seeds=1, seed=seed)
        for p in model.parameters():
            p.data *= 4  # far from uniform, so that the greedy way is not always the best
        best = likeliest(model, points, tours)
        assert tuple(decode(model, points, beam=6 if tours else 150, tours=tours)[0, 0].tolist()) == best
        differs += tuple(decode(model, points, tours=tours)[0, 0].tolist()) != best
    assert differs > 0


def test_greedy_decoding_agrees_with_the_likeliest_next_place():
    model, (points, _, labels) = race(), problem(n=6)
    found = decode(model, points, labels)
    for k in range(len(KINDS)):
        own = race(seed=0)(points, found[2 * k : 2 * k + 2], labels)[2 * k : 2 * k + 2].argmax(-1)
        for sequence, best in zip(found[2 * k : 2 * k + 2].flatten(0, 1), own.flatten(0, 1), strict=True):
            end = int((sequence < 6).sum()) + 1
            assert sequence[:end].tolist() == best[:end].tolist()


def test_a_pointer_network_has_no_largest_input():
    found = decode(race("pointer"), draw_points(2, 4, 40, generator()).double())
    assert found.shape[:2] == (2, 4)
    assert found.max() <= 40


def test_tours_visit_everything_once():
    found = decode(race("pointer"), draw_points(2, 20, 7, generator(1)).double(), beam=3, tours=True)
    assert (found.sort(-1).values == torch.arange(8)).all()
    assert (found[..., 7] == 7).all()


@pytest.mark.parametrize("n", [3, 5, 8, 15])
def test_hulls_are_scipys(n):
    points = draw_points(1, 40, n, generator(n))[0]
    hulls = convex_hull(points)
    for p, h in zip(points, hulls, strict=True):
        oracle = ConvexHull(p.double().numpy())  # corners counter-clockwise, from anywhere
        start = int(np.argmin(oracle.vertices))
        assert h[h < n].tolist() == np.roll(oracle.vertices, -start).tolist()
        assert area(outline(p.double(), h)).item() == pytest.approx(oracle.volume)
    assert (coverage(points, hulls, hulls) == 1).all()
    assert (hulls[:, 0] == 0).all()  # from left to right, the first and the last are corners
    assert (hulls == n - 1).any(-1).all()


def test_what_is_a_polygon():
    square = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1], [0.4, 0.3]])
    cases = {
        (0, 1, 2, 3, 5, 5): 1.0,
        (3, 2, 1, 0, 5, 5): 1.0,  # clockwise
        (0, 1, 2, 3, 4, 5): 1 - 0.2,  # without the triangle 3, 0, 4
        (0, 2, 1, 3, 5, 5): 0.0,  # crosses itself
        (0, 1, 2, 1, 5, 5): 0.0,  # a corner twice
        (0, 1, 5, 5, 5, 5): 0.0,
        (5, 5, 5, 5, 5, 5): 0.0,
        (0, 1, 2, 3, 4, 0): 0.0,  # does not end
    }
    sequence = torch.tensor(list(cases))
    points = square.expand(len(cases), 5, 2)
    hull = torch.tensor([0, 1, 2, 3, 5, 5]).expand(len(cases), 6)
    torch.testing.assert_close(coverage(points, sequence, hull), torch.tensor(list(cases.values())))
    assert is_polygon(points, sequence).tolist() == [share > 0 for share in cases.values()]


def test_cycles_are_compared_from_wherever_they_start():
    a = torch.tensor([0, 2, 3, 1, 5, 5])
    for shift in range(4):
        turned = torch.cat([a[:4].roll(shift), a[4:]])
        assert same_cycle(turned, a, 5)
    for other in ([0, 1, 3, 2, 5, 5], [0, 2, 3, 5, 5, 5], [0, 2, 3, 1, 4, 5]):
        assert not same_cycle(torch.tensor(other), a, 5)


def held_karp(points):
    """Length of the shortest tour by dynamic programming over sets of cities."""
    n, d = len(points), np.linalg.norm(points[:, None] - points[None], axis=-1)
    best = {(1 << j, j): d[0, j] for j in range(1, n)}
    for visited in sorted(range(2, 1 << n, 2), key=lambda s: s.bit_count()):
        members = [j for j in range(1, n) if visited >> j & 1]
        for j in members if len(members) > 1 else []:
            rest = visited ^ (1 << j)
            best[visited, j] = min(best[rest, k] + d[k, j] for k in members if k != j)
    return min(best[(1 << n) - 2, j] + d[j, 0] for j in range(1, n))


@pytest.mark.parametrize("n", [3, 5, 8])
def test_shortest_tours_are_held_karps(n):
    points = draw_points(1, 10, n, generator(n))[0].double()
    tours = shortest_tours(points)
    assert (tours.sort(-1).values == torch.arange(n + 1)).all()
    assert (tours[:, 0] == 0).all()
    assert (area(outline(points, tours)) > 0).all()
    lengths = torch.tensor([held_karp(p.numpy()) for p in points])
    torch.testing.assert_close(tour_length(points, tours), lengths)


def test_length_of_a_tour_by_hand():
    line = torch.tensor([[0.0, 0], [1, 0], [-1.5, 0], [3, 0]])
    assert tour_length(line, torch.tensor([0, 1, 3, 2, 4])).item() == pytest.approx(9.0)


def test_points_come_from_left_to_right():
    points = draw_points(2, 5, 6, generator())
    assert (points[..., 0].diff() > 0).all()
    assert points.min() >= 0
    assert points.max() <= 1


def test_bad_input_is_named():
    points, hull, _labels = problem()
    with pytest.raises(ValueError, match="kinds"):
        Race(["pointer", "parrot"], 2)
    with pytest.raises(ValueError, match="number of kinds"):
        Race([], 2)
    with pytest.raises(ValueError, match="width"):
        StackedLSTM(1, 2, 0)
    with pytest.raises(ValueError, match="labels"):
        race()(points, hull)
    with pytest.raises(ValueError, match="dictionary must be at least 10"):
        decode(race("pointer", "plain"), draw_points(2, 1, 10, generator()).double())
    with pytest.raises(ValueError, match="points"):
        race("pointer")(points * math.nan, hull)
    with pytest.raises(ValueError, match="beam"):
        decode(race("pointer"), points, beam=0)
    with pytest.raises(ValueError, match="three on one line"):
        convex_hull(torch.tensor([[0.0, 0], [1, 0], [2, 0], [1, 1]]))
    with pytest.raises(ValueError, match="number of points"):
        convex_hull(points[..., :2, :])
    with pytest.raises(ValueError, match="between 3 and 8"):
        shortest_tours(torch.rand(9, 2))
    with pytest.raises(ValueError, match="batch"):
        draw_points(1, 0, 5, generator())


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu():
    model, (points, hull, labels) = race(), problem()
    here = model(points, hull, labels)
    there = model.to("cuda")(*(v.to("cuda") for v in (points, hull, labels)))
    torch.testing.assert_close(there.cpu(), here)
