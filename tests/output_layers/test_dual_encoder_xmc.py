"""Losses against cross-entropy, finite differences and closed forms; metrics against scikit-learn and by hand."""

import ast
import inspect
import itertools
import math
import textwrap

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from sklearn.metrics import ndcg_score
from torch.nn import functional as F

from paperlab.nn.saved_bytes import SavedBytes
from paperlab.output_layers import dual_encoder_xmc as de

F64 = torch.float64


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(queries: int = 30, labels: int = 12, most: int = 4):
    s = 3 * torch.randn(queries, labels, generator=draws(), dtype=F64)
    count = torch.randint(1, most + 1, (queries, 1), generator=draws(1))
    order = torch.rand(queries, labels, generator=draws(2)).argsort(-1)
    return s, order < count


def slope(loss, s, *args, **kwargs):
    s = s.clone().requires_grad_()
    return torch.autograd.grad(loss(s, *args, **kwargs).sum(), s)[0]


def test_one_positive_is_cross_entropy():
    s, y = batch(most=1)
    expected = F.cross_entropy(s, y.long().argmax(-1), reduction="none")
    for loss in (de.infonce, de.decoupled):
        torch.testing.assert_close(loss(s, y), expected)
    torch.testing.assert_close(slope(de.infonce, s, y), slope(de.one_sided, s, y))
    torch.testing.assert_close(slope(de.decoupled, s, y), slope(de.one_sided, s, y, balanced=True))


def test_losses_by_their_sums():
    s, y = batch()
    for i in range(len(s)):
        e, right = s[i].exp(), [j for j in range(12) if y[i, j]]
        wrong = sum(e[j] for j in range(12) if not y[i, j])
        nce = -sum((e[j] / e.sum()).log() for j in right)
        torch.testing.assert_close(de.infonce(s, y)[i], nce / len(right))
        torch.testing.assert_close(de.infonce(s, y, summed=True)[i], nce)
        alone = -sum((e[j] / (e[j] + wrong)).log() for j in right)
        torch.testing.assert_close(de.decoupled(s, y)[i], alone / len(right))
        torch.testing.assert_close(de.decoupled(s, y, summed=True)[i], alone)
    torch.testing.assert_close(
        de.binary(s, y), F.binary_cross_entropy_with_logits(s, y.double(), reduction="none").sum(-1)
    )


def test_who_is_pushed_down():
    """InfoNCE pushes a positive above 1/|P| down; the decoupled softmax pulls every positive up."""
    s, y = batch()
    p, share = s.softmax(-1), 1 / y.sum(-1, keepdim=True)
    nce, dec, one = (slope(loss, s, y) for loss in (de.infonce, de.decoupled, de.one_sided))
    torch.testing.assert_close(nce, p - share * y)
    confident = y & (p > share)
    assert confident.any()
    assert (nce[confident] > 0).all()
    assert (dec[y] < 0).all()
    assert (one[confident] == 0).all()
    torch.testing.assert_close(one[~confident], nce[~confident])
    for g in (nce, dec, slope(de.one_sided, s, y, balanced=True)):
        torch.testing.assert_close(g.sum(-1), torch.zeros(30, dtype=F64), atol=1e-12, rtol=0)
        ratio = (g / p).masked_fill(y, 0)  # negatives are pushed in proportion to p in all three
        torch.testing.assert_close(ratio.amax(-1).expand(12, -1).T[~y], ratio[~y])


def test_losses_stay_finite_at_extreme_scores():
    s = torch.tensor([[500.0, -500.0, 0.0, 0.0]], requires_grad=True)
    y = torch.tensor([[True, True, False, False]])
    for loss in (de.infonce, de.decoupled, lambda s, y: de.soft_top_k_loss(s, y, 2.0)):
        (g,) = torch.autograd.grad(loss(s, y).sum(), s)
        assert g.isfinite().all()
    assert de.decoupled(s, y).item() == pytest.approx((500 + math.log(2)) / 2)


@pytest.mark.parametrize("k", [1, 3, 7.5])
def test_soft_top_k_sums_to_k_and_agrees_with_scipy(k):
    s, _ = batch(labels=20)
    logits = de.soft_top_k(s, k, alpha=1.7)
    torch.testing.assert_close(logits.sigmoid().sum(-1), torch.full((30,), float(k), dtype=F64), atol=1e-9, rtol=0)
    for row, found in zip(s.numpy(), logits.numpy(), strict=True):
        t = brentq(lambda t, row=row: (1 / (1 + np.exp(-1.7 * (row + t)))).sum() - k, -99, 99, xtol=1e-13)
        np.testing.assert_allclose(found, 1.7 * (row + t), atol=1e-9)
    single = de.soft_top_k(s.float(), k).sigmoid().sum(-1)
    torch.testing.assert_close(single, torch.full((30,), float(k)), atol=1e-5 * max(k, 5), rtol=0)


def test_the_threshold_of_many_queries_is_found_in_few_steps():
    """Queries that are done must wait for the others: a step of rounding error would throw them out of the bracket."""
    s = 10 * torch.randn(300, 400, generator=draws())
    for k in (1.0, 5.0):
        total = de.soft_top_k(s, k, steps=6).sigmoid().sum(-1)
        torch.testing.assert_close(total, torch.full((300,), k), atol=1e-4, rtol=0)


def test_soft_top_k_gradient():
    s = torch.randn(4, 9, generator=draws(), dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: de.soft_top_k(s, 3, alpha=1.3).sigmoid(), s)
    y = torch.rand(4, 9, generator=draws(3)) < 0.4
    y[:, 0] = True
    assert torch.autograd.gradcheck(lambda s: de.soft_top_k_loss(s, y, 3.0), s)
    v = 1.3 * (pi := de.soft_top_k(s[0], 3, alpha=1.3).sigmoid().detach()) * (1 - pi)
    jacobian = torch.autograd.functional.jacobian(lambda s: de.soft_top_k(s, 3, alpha=1.3).sigmoid(), s[0].detach())
    torch.testing.assert_close(jacobian, v.diag() - torch.outer(v, v) / v.sum())


def test_sharp_soft_top_k_is_hard_and_ignores_a_shift():
    s = torch.rand(10, 20, generator=draws(), dtype=F64).argsort(-1).double()
    pi = de.soft_top_k(s, 5, alpha=400.0).sigmoid()
    torch.testing.assert_close(pi, (s >= 15).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(de.soft_top_k(s + 3, 5), de.soft_top_k(s, 5))
    torch.testing.assert_close(de.soft_top_k(0 * s, 5).sigmoid(), torch.full_like(s, 0.25))


def test_sampled_negatives_leave_the_rest_out():
    s, y = batch()
    pool = torch.zeros(12, dtype=torch.bool)
    pool[:5] = True
    for loss in (de.infonce, de.decoupled):
        g = slope(lambda s, y, loss=loss: loss(de.sampled(s, y, pool), y), s, y)
        assert (g[~(pool | y)] == 0).all()
        kept = (pool | y)[0].nonzero()[:, 0]
        torch.testing.assert_close(loss(de.sampled(s, y, pool), y)[0], loss(s[:1, kept], y[:1, kept])[0])
    torch.testing.assert_close(de.sampled(s, y, torch.ones(12, dtype=torch.bool)), s)


def small(**kwargs):
    return de.DualEncoder(2, 6, 5, 3, temperature=[0.1, 0.5], generator=draws(4), **kwargs)


def test_scores_are_scaled_cosines_and_copies_are_independent():
    net, x, texts = small(bias=-1.0), torch.randn(2, 7, 6, generator=draws()), torch.randn(9, 6, generator=draws(1))
    s = net(x, texts)
    assert s.shape == (2, 7, 9)
    for c, t in enumerate((0.1, 0.5)):

        def f(z, c=c):
            hidden = (z @ net.first.weight[c] + net.first.bias[c]).relu()
            return hidden @ net.second.weight[c] + net.second.bias[c]

        cosine = F.cosine_similarity(f(x[c])[:, None], f(texts)[None], dim=-1)
        torch.testing.assert_close(s[c], cosine / t - 1)
    s[0].sum().backward()
    assert all((p.grad[1] == 0).all() for p in net.parameters())


def test_a_head_owns_its_labels():
    x = torch.randn(2, 7, 6, generator=draws())
    for cosine in (True, False):
        head = small(labels=9, cosine=cosine)
        s = head(x)
        assert s.shape == (2, 7, 9)
        q, e = head.queries(x), head.table.detach()
        torch.testing.assert_close(q.norm(dim=-1), torch.ones(2, 7)) if cosine else None
        e = e / e.norm(dim=-1, keepdim=True) if cosine else e
        torch.testing.assert_close(s, torch.einsum("cqd,cld->cql", q, e) / head.temperature + head.bias)

    def size(net):
        return sum(p.numel() for p in net.parameters()) / 2

    assert size(small(labels=9)) - size(small()) == 9 * 3 + 9 - 1
    assert size(small(labels=1000)) - size(small(labels=9)) == 991 * 4


@pytest.mark.parametrize("chunk", [1, 4, 50])
def test_gradient_caching_is_exact_and_remembers_less(chunk):
    x, texts = torch.randn(2, 7, 6, generator=draws()), torch.randn(50, 6, generator=draws(1))
    y = torch.rand(2, 7, 50, generator=draws(2)) < 0.1
    y[..., 0] = True

    def loss(s):
        return de.decoupled(s, y).sum()

    direct, cached = small(), small()
    with SavedBytes([*direct.parameters()]) as all_at_once:
        value = loss(direct(x, texts))
        value.backward()
    with SavedBytes([*cached.parameters()]) as in_chunks:
        torch.testing.assert_close(de.cached_backward(cached, x, texts, loss, chunk), value.detach())
    for p, r in zip(direct.parameters(), cached.parameters(), strict=True):
        torch.testing.assert_close(p.grad, r.grad, atol=1e-5, rtol=1e-4)
    if chunk < 50:
        assert in_chunks.peak < all_at_once.peak


def test_metrics_by_hand_and_against_sklearn():
    s = torch.tensor([[5.0, 4, 3, 2, 1, 0]])
    y = torch.tensor([[True, False, True, False, False, True]])
    found = de.metrics(s, y, ks=(1, 2, 5), propensity=torch.tensor([1.0, 1, 0.5, 1, 1, 0.25]))
    assert [found[f"P@{k}"].item() for k in (1, 2, 5)] == pytest.approx([1, 0.5, 0.4])
    assert [found[f"PSP@{k}"].item() for k in (1, 2, 5)] == pytest.approx([1 / 4, 1 / 6, 3 / 7])
    s, y = batch()
    ours = de.metrics(s, y, ks=(3, 5))
    for k in (3, 5):
        assert ours[f"nDCG@{k}"].mean().item() == pytest.approx(ndcg_score(y.numpy(), s.numpy(), k=k))


def test_propensities_rise_with_frequency():
    p = de.propensities(torch.tensor([0.0, 1, 10, 1000], dtype=F64), 4000)
    assert (p.diff() > 0).all()
    assert p[2].item() == pytest.approx(1 / (1 + (math.log(4000) - 1) * 2.5**0.55 * math.exp(-0.55 * math.log(11.5))))


def test_trigrams():
    x = de.trigrams(["read_line", "readLine", "READ LINE", "parse_int", ""], 4096)
    np.testing.assert_allclose(x[0], x[1])
    np.testing.assert_allclose(x[0], x[2])
    np.testing.assert_allclose(np.linalg.norm(x[:4], axis=1), 1, rtol=1e-6)
    assert (x[0] > 0).sum() == len("read line")
    assert x[0] @ x[3] < 0.1
    assert np.linalg.norm(x[4]) <= 1


def test_semantic_keeps_what_the_rank_allows():
    counts = torch.rand(40, 3, generator=draws()) @ torch.eye(30)[:3]
    counts = counts * (torch.rand(40, 30, generator=draws(1)) < 0.7)
    counts[:, 0] += 0.1
    x = de.semantic(counts, 3, seed=0)
    weight = (40 / (1 + (counts > 0).sum(0))).log().clamp(min=0)
    full = F.normalize(counts * weight, dim=-1)
    torch.testing.assert_close((x @ x.T)[1:, 1:], (full @ full.T)[1:, 1:], atol=1e-4, rtol=0)
    torch.testing.assert_close(x, de.semantic(counts, 3, seed=0))


SOURCE = '''
def load(path):
    """Read a file."""
    with open(path) as f:  # not close(f)
        return parse(f.read())

class A:
    def save(self, x):
        """Write it."""
        open(self.path).write(x)

    def quiet(self):
        return open(1)

def nothing(x):
    """Call nothing."""
    return x
'''


def test_called_names():
    queries, labels, marks = de.called_names([SOURCE], 10)
    assert queries == ["load Read a file.", "save Write it."]
    assert labels == ["open", "parse", "read", "write"]
    assert marks.astype(int).tolist() == [[1, 1, 1, 0], [1, 0, 0, 1]]
    assert de.called_names([SOURCE, SOURCE], 1)[1:][0] == ["open"]


def test_called_names_against_the_parser():
    source = inspect.getsource(textwrap) + "\n" + inspect.getsource(inspect)
    queries, labels, marks = de.called_names([source], 10_000)
    ours = {q.split(" ")[0] + q[-20:]: {labels[j] for j in m.nonzero()[0]} for q, m in zip(queries, marks, strict=True)}
    agree = total = 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)):
            key = node.name + f"{node.name} {' '.join(doc.split())[:300]}"[-20:]
            calls = [c.func for c in itertools.chain(*map(ast.walk, node.body)) if isinstance(c, ast.Call)]
            names = {
                c.id if isinstance(c, ast.Name) else c.attr for c in calls if isinstance(c, ast.Name | ast.Attribute)
            }
            if key in ours:
                agree, total = agree + len(ours[key] & names), total + len(ours[key] | names)
    assert total > 200
    assert agree / total > 0.95


S, Y = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: de.infonce(S, ~Y), "positives"),
        (lambda: de.decoupled(S, ~Y), "positives"),
        (lambda: de.one_sided(S, ~Y), "positives"),
        (lambda: de.soft_top_k(S, 3), "k"),
        (lambda: de.soft_top_k(S, 0), "k"),
        (lambda: de.soft_top_k(S, 1, alpha=-1.0), "alpha"),
        (lambda: de.soft_top_k(S * math.nan, 1), "scores"),
        (lambda: de.metrics(S, Y, ks=(4,)), "ks"),
        (lambda: de.DualEncoder(1, 2, 2, 2, temperature=0.0), "temperature"),
        (lambda: de.cached_backward(small(), torch.zeros(2, 1, 6), torch.zeros(2, 6), torch.sum, 0), "chunk"),
        (lambda: de.trigrams(["a"], 0), "buckets"),
        (lambda: de.semantic(S, 4, seed=0), "dim"),
        (lambda: de.called_names(["x = 1"], 5), "calls"),
        (lambda: de.called_names([SOURCE], 0), "labels"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
