"""VQ-Logits against torch's own heads, scikit-learn, scipy, closed forms, limits and brute force."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp
from sklearn.cluster import KMeans
from torch.nn import functional as F

from paperlab.output_layers import vq_logits as vq

F64 = torch.float64


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def head(copies: int = 2, vocab: int = 12, codes: int = 5, d: int = 4, bias: bool = False, rank: int = 0):
    """A random head without empty clusters."""
    g = gen(1)
    code_of = torch.stack([vq.random_map(vocab, codes, generator=g) for _ in range(copies)])
    made = torch.randn(copies, codes, d, generator=g, dtype=F64)
    token_bias = torch.randn(copies, vocab, generator=g, dtype=F64) if bias else None
    parts = (torch.randn(copies, vocab, rank, generator=g, dtype=F64),
             torch.randn(copies, rank, d, generator=g, dtype=F64))  # fmt: skip
    return vq.VQLogits(code_of, made, token_bias=token_bias, residual=parts if rank else None)


def batch(copies: int = 2, n: int = 30, vocab: int = 12, d: int = 4):
    g = gen(2)
    return torch.randn(copies, n, d, generator=g, dtype=F64), torch.randint(vocab, (copies, n), generator=g)


def test_one_code_for_each_token_is_the_dense_head():
    rows = torch.randn(12, 4, generator=gen(), dtype=F64)
    h, v = batch()
    dense = vq.VQLogits(torch.arange(12).expand(2, -1), rows.expand(2, -1, -1))
    torch.testing.assert_close(dense(h), F.linear(h, rows))
    torch.testing.assert_close(dense.nll(h, v), F.cross_entropy(F.linear(h, rows).mT, v, reduction="none"))
    assert dense.within_nll(v).abs().max() == 0


def test_one_code_for_all_is_a_low_rank_head():
    rows = torch.randn(12, 5, generator=gen(), dtype=F64)
    u, a, bias = vq.low_rank(rows, 2)
    h = F.pad(torch.randn(30, 4, generator=gen(3), dtype=F64), (0, 1), value=1.0)
    parts = u[None], a[None]
    one = vq.VQLogits(torch.zeros(1, 12, dtype=torch.long), torch.randn(1, 1, 5, dtype=F64), token_bias=bias[None],
                      residual=parts)  # fmt: skip
    torch.testing.assert_close(one(h[None])[0].log_softmax(1), (h @ a.T @ u.T + bias).log_softmax(1))
    full = vq.low_rank(rows, 4)  # of full rank: the dense logits
    torch.testing.assert_close(h @ full[1].T @ full[0].T + full[2], h @ rows.T)
    best = np.linalg.svd(rows[:, :-1].numpy())[1][2:]  # Eckart and Young: what rank 2 must leave
    assert ((rows[:, :-1] - (u @ a)[:, :-1]).square().sum() - (best**2).sum()).abs() < 1e-10


@pytest.mark.parametrize(("bias", "rank"), [(False, 0), (True, 0), (False, 2), (True, 2)])
def test_loss_from_k_numbers_is_the_softmax_over_the_vocabulary(bias, rank):
    made, (h, v) = head(bias=bias, rank=rank), batch()
    logits = made(h).detach().numpy()
    expected = logsumexp(logits, axis=2) - np.take_along_axis(logits, v.numpy()[..., None], 2)[..., 0]
    np.testing.assert_allclose(made.nll(h, v).detach().numpy(), expected, atol=1e-12)
    every = torch.arange(12).repeat(2, 1)
    chances = torch.stack([(-made.nll(h[:, :1].expand(-1, 12, -1), every)).exp()]).sum(2)
    torch.testing.assert_close(chances, torch.ones_like(chances))


def test_scatter_by_hand():
    made = vq.VQLogits(torch.tensor([[1, 0, 1]]), torch.tensor([[[2.0], [0.0]]]))
    h = torch.ones(1, 1, 1)
    assert made(h).flatten().tolist() == [0, 2, 0]
    total = 1 * math.exp(2) + 2 * math.exp(0)
    assert math.isclose(made.nll(h, torch.tensor([[1]])).item(), -math.log(math.exp(2) / total), rel_tol=1e-6)
    assert math.isclose(made.nll(h, torch.tensor([[2]])).item(), -math.log(1 / total), rel_tol=1e-6)


def test_tokens_of_a_cluster_are_tied_and_the_floor_cannot_be_passed():
    made, (h, v) = head(), batch()
    p = made(h).softmax(-1)
    for c in range(2):
        for k in range(5):
            mine = p[c][:, made.code_of[c] == k]
            assert (mine.amax(1) - mine.amin(1)).max() < 1e-15
            # the identity, with P(code) summed over the vocabulary
            rows = made.code_of[c].gather(0, v[c]) == k
            expected = -mine.sum(1).log() + math.log(mine.shape[1])
            torch.testing.assert_close(made.nll(h, v)[c][rows], expected[rows])
    assert (made.nll(h, v) >= made.within_nll(v)).all()
    sure = vq.VQLogits(made.code_of, made.codebook.detach())
    one = torch.full((2, 1), 3)
    with torch.no_grad():  # a state that is certain of token 3's code reaches the floor
        right = sure.code_of[:, 3]
        sure.codebook.zero_()
        sure.codebook[torch.arange(2), right, 0] = 1
    gap = sure.nll(1e4 * torch.eye(4, dtype=F64)[:1].expand(2, 1, -1), one) - sure.within_nll(one)
    assert gap.abs().max() < 1e-12


def test_kmeans_against_scikit_learn():
    rows = torch.randn(300, 6, generator=gen(4), dtype=F64)
    picks = vq.spread(rows, 8, generator=gen(5))
    weights = torch.randint(1, 5, (300,), generator=gen(6)).to(F64)
    for w in (None, weights):
        ours = vq.kmeans(rows, picks, weights=w, iterations=300)
        theirs = KMeans(8, init=rows[picks].numpy(), n_init=1, max_iter=300, tol=0).fit(rows.numpy(), sample_weight=w)
        assert (ours.numpy() == theirs.labels_).all()
    repeated = rows.repeat_interleave(weights.long(), 0)  # a weight is a repetition
    torch.testing.assert_close(
        vq.code_means(rows, ours[None], 8, weights)[0],
        vq.code_means(repeated, ours.repeat_interleave(weights.long())[None], 8)[0],
    )


def test_spread_draws_by_squared_distance():
    rows = torch.tensor([[0.0], [1.0], [3.0]])
    second = [vq.spread(rows, 2, generator=gen(s)).tolist() for s in range(600)]
    after_first = [b for a, b in second if a == 0]
    assert abs(np.mean(np.array(after_first) == 2) - 0.9) < 0.04  # 9 against 1
    many = vq.spread(torch.randn(200, 3, generator=gen()), 200, generator=gen())
    assert sorted(many.tolist()) == list(range(200))


def test_kmeans_leaves_no_code_empty():
    rows = torch.cat([torch.zeros(9, 2), torch.ones(3, 2)])
    picks = vq.spread(rows, 5, generator=gen())
    assert len(set(picks.tolist())) == 5
    assert sorted(vq.kmeans(rows, picks).unique().tolist()) == [0, 1, 2, 3, 4]


def test_maps_by_frequency_and_chance():
    counts = torch.tensor([1.0, 50, 3, 20, 2, 10, 8, 6])
    by_size = vq.frequency_map(counts, 4, equal="tokens")
    assert by_size.bincount().tolist() == [2, 2, 2, 2]
    assert (by_size[counts.argsort(descending=True)].diff() >= 0).all()
    by_mass = vq.frequency_map(counts, 4, equal="mass")
    assert by_mass.tolist() == [3, 0, 3, 1, 3, 2, 2, 3]  # 50 | 20 | 10 + 8 | 6 + 3 + 2 + 1
    even = vq.frequency_map(torch.ones(100), 7, equal="mass").bincount()
    assert even.max() - even.min() <= 1
    assert len(vq.frequency_map(torch.tensor([1.0] + [0.0] * 30), 9, equal="mass").unique()) == 9
    drawn = vq.random_map(100, 7, generator=gen()).bincount()
    assert drawn.max() - drawn.min() <= 1


def test_class_unigram_is_the_best_token_bias():
    """Maximum likelihood over all token biases, by scipy, finds the shares of the counts within each cluster."""
    made, (h, v) = head(copies=1), batch(copies=1, n=400)
    h[..., -1] = 1  # where the biases sit
    counts = v[0].bincount(minlength=12).to(F64)
    share = made.with_unigram(counts, 1e-12)
    torch.testing.assert_close(share.code_nll(h, v), made.code_nll(h, v))
    code_of = made.code_of[0].numpy()

    def within(b):
        return (counts.numpy() * (np.log(np.bincount(code_of, np.exp(b)))[code_of] - b)).sum()

    found = minimize(within, np.zeros(12), tol=1e-10).fun / 400
    assert math.isclose(share.within_nll(v).mean().item(), found, rel_tol=1e-6)
    assert found < made.within_nll(v).mean()


def test_distillation_sees_only_sums_over_clusters():
    made, (h, _) = head(), batch()
    teacher = torch.rand(2, 30, 12, generator=gen(7), dtype=F64).softmax(-1)
    full = -(teacher * made(h).log_softmax(-1)).sum(-1)  # cross-entropy over the vocabulary
    floor = (teacher * made.sizes.to(F64).gather(1, made.code_of).log()[:, None]).sum(-1)
    torch.testing.assert_close(made.distil_loss(h, teacher), full - floor)


def test_ties_by_counting():
    made, (h, v) = head(copies=1, codes=7), batch(copies=1)
    tied, right = made.ties(h, v)
    logits = made(h)[0].detach()
    at_top = logits == logits.amax(1, keepdim=True)
    assert math.isclose(tied.item(), (at_top.sum(1) > 1).double().mean(), abs_tol=1e-6)
    hit = at_top[torch.arange(30), v[0]] / at_top.sum(1)
    assert math.isclose(right.item(), hit.mean(), abs_tol=1e-6)


def test_straight_through_gradient_and_moving_average():
    rows, (h, v) = torch.randn(12, 4, generator=gen(8), dtype=F64), batch(copies=1)
    book = rows[None, :3].clone()
    model = vq.StraightThrough(rows, book, commitment=0.25, decay=0.8)
    code_of = model.map()
    assert (code_of[0] == torch.cdist(rows, book[0]).argmin(1)).all()
    quantised = book[0][code_of[0]].clone().requires_grad_()  # the dense gradient at the rows that were read
    F.cross_entropy(h[0] @ quantised.T, v[0]).backward()
    model.nll(h, v).mean().backward()
    expected = quantised.grad + 0.25 * 2 * (rows - quantised.detach()) / 12
    torch.testing.assert_close(model.rows.grad[0], expected)
    mean = torch.stack([rows[code_of[0] == k].mean(0) for k in range(3)])
    torch.testing.assert_close(model.codebook[0], 0.8 * book[0] + 0.2 * mean)


def test_straight_through_only_measures_in_eval():
    rows, (h, v) = torch.randn(12, 4, generator=gen(8), dtype=F64), batch(copies=1)
    model = vq.StraightThrough(rows, rows[None, :3].clone()).eval()
    before = model.codebook.clone()
    pure = vq.VQLogits(model.map(), before)  # the head that is left when the rows are thrown away
    torch.testing.assert_close(model.nll(h, v), pure.nll(h, v))
    assert (model.codebook == before).all()


def test_adaptive_softmax_is_torchs():
    g, n, q, d, vocab = gen(9), 4, 2, 5, 12
    theirs = torch.nn.AdaptiveLogSoftmaxWithLoss(d, vocab, [n], div_value=d / q, dtype=F64)
    rank_of = torch.randperm(vocab, generator=g)
    ours = vq.AdaptiveSoftmax(rank_of, theirs.head.weight[None], theirs.tail[0][0].weight[None],
                              theirs.tail[0][1].weight[None])  # fmt: skip
    h, v = torch.randn(1, 50, d, generator=g, dtype=F64), torch.randint(vocab, (1, 50), generator=g)
    torch.testing.assert_close(-ours.nll(h, v)[0], theirs(h[0], rank_of[v[0]]).output)


def test_adaptive_softmax_of_full_rank_starts_as_the_dense_head():
    rows, h = torch.randn(12, 3, generator=gen(), dtype=F64), torch.randn(2, 3, generator=gen(3), dtype=F64)
    rank_of = torch.randperm(12, generator=gen(4))  # two states in three dimensions: the door can be exact
    ours = vq.AdaptiveSoftmax.from_dense(rows, rank_of, h, n=4, q=3, copies=1)
    v = torch.tensor([5, 7])
    torch.testing.assert_close(ours.nll(h[None], v[None])[0], F.cross_entropy(h @ rows.T, v, reduction="none"))


def test_new_coordinates_keep_the_logits_and_measure_distance_in_logits():
    g = gen(10)
    h, rows = torch.randn(500, 4, generator=g, dtype=F64) @ torch.randn(4, 4, generator=g, dtype=F64) + 1, torch.randn(
        9, 4, generator=g, dtype=F64)  # fmt: skip
    turn, turned = vq.whitened(h, rows, ridge=1e-9)
    torch.testing.assert_close(turn(h) @ turned.T, h @ rows.T)
    torch.testing.assert_close(turn(h)[:, :4].T.cov(), torch.eye(4, dtype=F64), atol=1e-6, rtol=0)
    gap = (h @ (rows[2] - rows[5])).square().mean()
    torch.testing.assert_close((turned[2] - turned[5]).square().sum(), gap, rtol=0.01, atol=0)


def test_training_reaches_scipys_optimum_copy_by_copy():
    made, (h, v) = head(copies=2, codes=3, d=4), batch(copies=2, n=200)
    states, tokens = h.flatten(0, 1), v.flatten()
    all_rows = torch.arange(400).view(2, 200).expand(400, 2, 200)
    vq.train(made, states, tokens, all_rows, 0.1)
    for c in range(2):
        code_of, x, y = made.code_of[c].numpy(), h[c].numpy(), v[c].numpy()

        def loss(flat, code_of=code_of, x=x, y=y):
            z = (x @ flat.reshape(3, 4).T)[:, code_of]
            return (logsumexp(z, axis=1) - z[np.arange(200), y]).mean()

        best = minimize(loss, np.zeros(12)).fun
        assert abs(made.nll(h, v)[c].mean().item() - best) < 1e-4


@pytest.mark.parametrize("never", [0, 3])
def test_least_floor_against_every_partition(never):
    p = np.append(np.random.default_rng(0).dirichlet(np.full(6 - never, 0.4)), np.zeros(never))
    every = np.array(list(itertools.product(range(6), repeat=6)))
    same = (every[:, :, None] == every[:, None]).sum(2)  # how many share a code with each token
    costs, used = np.log(same) @ p, (1 / same).sum(1).round()
    least = [costs[used <= codes].min() for codes in range(1, 7)]
    np.testing.assert_allclose(vq.least_floor(p, 6), least, rtol=1e-5, atol=1e-6)


def test_kmeans_stops_when_the_sum_hardly_falls():
    rows = torch.randn(300, 6, generator=gen(4), dtype=F64)
    picks = vq.spread(rows, 8, generator=gen(5))

    def spans(code_of):
        return (rows - vq.code_means(rows, code_of[None], 8)[0][code_of]).square().sum()

    one, some, best = (spans(vq.kmeans(rows, picks, iterations=n, tolerance=t))
                       for n, t in ((1, 0.0), (300, 0.01), (300, 0.0)))  # fmt: skip
    assert best < some < one
    assert some < 1.05 * best


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: vq.spread(torch.zeros(3, 2), 4, generator=gen()), "codes"),
        (lambda: vq.spread(torch.full((3, 2), math.nan), 2, generator=gen()), "rows"),
        (lambda: vq.spread(torch.ones(3, 2), 2, generator=gen(), weights=torch.zeros(3)), "weights"),
        (lambda: vq.kmeans(torch.zeros(3, 2), torch.tensor([3])), "picks"),
        (lambda: vq.kmeans(torch.zeros(3, 2), torch.tensor([0]), iterations=0), "iterations"),
        (lambda: vq.kmeans(torch.ones(3, 2), torch.tensor([0]), weights=torch.zeros(3)), "weights"),
        (lambda: vq.kmeans(torch.ones(3, 2), torch.tensor([0]), tolerance=-1.0), "tolerance"),
        (lambda: vq.random_map(3, 0, generator=gen()), "codes"),
        (lambda: vq.frequency_map(torch.ones(3), 2, equal="luck"), "equal"),
        (lambda: vq.frequency_map(-torch.ones(3), 2, equal="mass"), "counts"),
        (lambda: vq.VQLogits(torch.tensor([[0, 2]]), torch.zeros(1, 2, 1)), "code_of"),
        (lambda: head(bias=True).ties(*batch()), "inside a cluster"),
        (lambda: head(rank=2).distil_loss(batch()[0], torch.ones(2, 30, 12, dtype=F64) / 12), "inside a cluster"),
        (lambda: vq.AdaptiveSoftmax(torch.arange(9), torch.ones(1, 3, 4), torch.ones(1, 2, 4), torch.ones(1, 8, 2)),
         "head and up"),
        (lambda: head().with_unigram(torch.ones(12, dtype=F64), 0.0), "smoothing"),
        (lambda: head(bias=True).with_unigram(torch.ones(12, dtype=F64), 1.0), "inside a cluster"),
        (lambda: vq.StraightThrough(torch.zeros(4, 2), torch.zeros(1, 2, 2), decay=1.5), "decay"),
        (lambda: vq.low_rank(torch.zeros(4, 3), 3), "rank"),
        (lambda: vq.whitened(torch.zeros(1, 2), torch.zeros(4, 2)), "states"),
        (lambda: vq.least_floor(np.array([0.5, 0.4]), 1), "chances"),
        (lambda: vq.train(head(), torch.ones(3, 4), torch.ones(3).long(), torch.ones(0, 2, 3).long(), 0.1), "batches"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
