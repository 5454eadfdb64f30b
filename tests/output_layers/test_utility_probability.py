"""Utilities as chances: against autograd, the Jacobian, SciPy, PyTorch, enumeration of all outputs, and limits."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import LinearConstraint, minimize, minimize_scalar
from torch.nn import functional as F

from paperlab.nn.transformer import Transformer, TransformerConfig, generate, nucleus
from paperlab.output_layers import utility_probability as up

F64 = torch.float64


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(vocab: int = 5, seed: int = 0) -> Transformer:
    """A decoder of five tokens, made decisive enough that its outputs differ."""
    model = Transformer(
        TransformerConfig(vocab=vocab, layers=2, width=16, heads=2, context=16, hidden=32), generator=draws(seed)
    )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(12)
    return model.requires_grad_(False).eval()


def all_outputs(model, prompt, ends, length):
    """Every output of at most ``length`` tokens with its log-probability, by whole forward passes."""
    found = {}
    for size in range(1, length + 1):
        for tokens in itertools.product(range(len(ends)), repeat=size):
            closed = [bool(ends[t]) for t in tokens]
            if any(closed[:-1]) or not (closed[-1] or size == length):
                continue
            row = torch.tensor([[*prompt, *tokens]])
            log_p = model(row[:, :-1]).log_softmax(-1)[0, len(prompt) - 1 :]
            found[tokens] = log_p.gather(-1, row[0, len(prompt) :, None]).sum().item()
    return found


def test_beta_one_is_softmax_and_the_order_never_changes():
    u = 3 * torch.randn(20, 7, generator=draws(), dtype=F64)
    torch.testing.assert_close(up.boltzmann(u), torch.softmax(u, -1))
    torch.testing.assert_close(up.boltzmann(u, 1 / 2.5), F.softmax(u / 2.5, -1))  # temperature scaling
    for beta in (0.01, 0.3, 5.0):
        assert (up.boltzmann(u, beta).argsort(-1) == u.argsort(-1)).all()
    torch.testing.assert_close(up.boltzmann(u, 1e-9), torch.full_like(u, 1 / 7))
    torch.testing.assert_close(up.boltzmann(u, 1e4), F.one_hot(u.argmax(-1), 7).to(F64), atol=1e-6, rtol=0)


def test_the_gradient_identity_against_the_jacobian():
    """Every output's gradient by itself, from autograd's Jacobian; the expectation is summed here, by hand."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 5)).double()
    x, y = torch.randn(4, generator=draws(), dtype=F64), torch.tensor(3)
    names, weights = zip(*net.named_parameters(), strict=True)

    def utilities(*w):
        return torch.func.functional_call(net, dict(zip(names, w, strict=True)), (x,))

    p = net(x).softmax(-1)
    by_gap = torch.autograd.grad(up.preference_gap(net(x), y), weights)
    by_likelihood = torch.autograd.grad(-F.cross_entropy(net(x), y), weights)
    jacobians = torch.func.jacrev(utilities, tuple(range(4)))(*weights)
    for jacobian, a, b in zip(jacobians, by_gap, by_likelihood, strict=True):
        expected = jacobian[3] - torch.einsum("y,y...->...", p, jacobian)
        torch.testing.assert_close(a, expected)
        torch.testing.assert_close(b, expected)


def test_drawn_choices_have_the_right_step_on_average():
    u = torch.randn(6, generator=draws(), dtype=F64, requires_grad=True)
    exact = F.one_hot(torch.tensor(2), 6) - u.detach().softmax(-1)
    total = 0
    for choice in range(6):
        (slope,) = torch.autograd.grad(up.preference_gap(u, torch.tensor(2), torch.tensor(choice)), u)
        total = total + u.detach().softmax(-1)[choice] * slope
    torch.testing.assert_close(total, exact)


def test_fit_beta_against_scipy():
    u = torch.randn(400, 6, generator=draws(), dtype=F64)
    y = torch.multinomial((2.3 * u).softmax(-1), 1, generator=draws(1))[:, 0]
    best = minimize_scalar(lambda b: F.cross_entropy(b * u, y).item(), bounds=(0.05, 20), options={"xatol": 1e-9})
    assert up.fit_beta(u, y) == pytest.approx(best.x, abs=1e-4)
    assert up.fit_beta(u, y) == pytest.approx(2.3, abs=0.4)
    assert up.fit_beta(u + 100, y) == pytest.approx(best.x, abs=1e-4)
    assert up.fit_beta(5 * u, y) == pytest.approx(best.x / 5, abs=1e-4)  # cardinal: the unit of u matters
    assert up.fit_beta(u, u.argmax(-1)) == 20  # nothing but best choices: no finite optimum
    assert up.fit_beta(u, u.argmin(-1)) == 0.05


def test_fit_ranks_is_the_monotone_maximum_of_the_likelihood():
    u = torch.randn(60, 5, generator=draws(), dtype=F64)
    y = torch.multinomial(torch.tensor([[0.1, 0.3, 0.2, 0.2, 0.2]]).expand(60, -1), 1, generator=draws(2))[:, 0]
    place = np.array([sorted(row.tolist(), reverse=True).index(row[k].item()) for row, k in zip(u, y, strict=True)])
    counts = np.bincount(place, minlength=5) + 1 / 5
    rule = LinearConstraint(np.vstack([np.eye(5)[:-1] - np.eye(5)[1:], np.ones(5)]), [0] * 4 + [1], [1] * 4 + [1])
    best = minimize(lambda p: -(counts * np.log(np.clip(p, 1e-9, 1))).sum(), np.full(5, 0.2), constraints=rule,
                    method="SLSQP", options={"ftol": 1e-12})  # fmt: skip
    shares = up.fit_ranks(u, y)
    np.testing.assert_allclose(shares, best.x, atol=2e-4)
    torch.testing.assert_close(up.fit_ranks(u**3, y), shares)  # ordinal: any rising function of u will do
    assert up.ranks(u, y).tolist() == place.tolist()


def test_fit_curve_finds_the_exponent_and_keeps_the_order():
    log_p = torch.randn(40_000, 6, generator=draws(), dtype=F64).log_softmax(-1)
    y = torch.multinomial((2 * log_p).softmax(-1), 1, generator=draws(1))[:, 0]
    curve, test = up.fit_curve(log_p, y), log_p[:2000]
    made = curve(test)
    torch.testing.assert_close(made.sum(-1), torch.ones(2000, dtype=F64))
    order = test.argsort(-1)
    assert (made.gather(-1, order).diff(dim=-1) >= -1e-12).all()

    def cost(p):
        return -p.gather(-1, y[:2000, None]).log().mean().item()

    assert cost(made) < cost(test.exp()) - 0.1
    assert cost(made) == pytest.approx(cost(up.boltzmann(test, 2.0)), abs=0.05)


def test_nucleus_by_hand():
    p = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    torch.testing.assert_close(nucleus(p, 0.7), torch.tensor([[0.0, 2 / 3, 0.0, 1 / 3]]))
    torch.testing.assert_close(nucleus(p, 0.0), torch.tensor([[0.0, 1.0, 0.0, 0.0]]))
    torch.testing.assert_close(nucleus(p, 1.0), p)


def test_calibration_error_by_hand():
    confidence = torch.tensor([0.95, 0.91, 0.55, 0.52])
    right = torch.tensor([True, False, True, True])
    assert up.calibration_error(confidence, right) == pytest.approx((abs(1.86 - 1) + abs(1.07 - 2)) / 4, abs=1e-6)
    assert up.calibration_error(torch.ones(3), torch.tensor([True] * 3)) == 0


def test_tree_agrees_with_whole_passes_and_padding():
    """Two prompts of different lengths, branches that fork and cross: every node like a pass over its own text."""
    model = tiny()
    rows = torch.tensor([[0, 0, 3, 1], [2, 4, 1, 3]])
    padding = torch.tensor([[True, True, False, False], [False] * 4])
    root = up.TokenTree(model, rows, padding)
    tree = root.fork()
    tree.grow(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1, 2, 4, 3, 1]))
    tree.grow(torch.tensor([2, 0, 2, 3]), torch.tensor([3, 3, 0, 4]))
    assert tree.owner.tolist() == [0, 0, 0, 1]
    texts = [[3, 1, 4, 3], [3, 1, 1, 3], [3, 1, 4, 0], [2, 4, 1, 3, 3, 4]]
    for logits, text in zip(tree.logits, texts, strict=True):
        torch.testing.assert_close(logits, model(torch.tensor([text]))[0, -1], atol=1e-4, rtol=1e-4)
    tree.grow(torch.tensor([3, 3]), torch.tensor([0, 2]))  # the first prompt has ended
    for logits, token in zip(tree.logits, (0, 2), strict=True):
        alone = model(torch.tensor([[*texts[3], token]]))[0, -1]
        torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)
    assert len(root.keys[0]) == 0  # the fork has left the root as it was


def test_spread_puts_the_rows_of_each_owner_side_by_side():
    wide = up.spread(torch.tensor([[5], [6], [7]]), torch.tensor([0, 2, 2]), 4, empty=-1)
    assert wide[..., 0].tolist() == [[5, -1], [-1, -1], [6, 7], [-1, -1]]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_wide_beam_is_the_best_of_all_outputs_and_width_one_is_greedy(seed):
    model, prompts = tiny(seed=seed), torch.tensor([[1, 2, 3], [4, 0, 2]])
    ends, lengths = torch.tensor([True, False, False, False, False]), torch.tensor([3, 2])
    (found,), (score,) = up.beams(up.TokenTree(model, prompts, None), [200], ends, lengths)
    for row in range(2):
        every = all_outputs(model, prompts[row].tolist(), ends, int(lengths[row]))
        best = max(every, key=every.get)
        assert tuple(t for t in found[row].tolist() if t >= 0) == best
        assert score[row].item() == pytest.approx(every[best], abs=1e-4)
    (greedy,), _ = up.beams(up.TokenTree(model, prompts, None), [1], ends, torch.tensor([3, 3]))
    told = generate(model, prompts, steps=3, stop=0)[:, 3:]
    after = (told == 0).cumsum(1) - (told == 0).long() > 0
    assert greedy.tolist() == told.masked_fill(after, -1).tolist()


def by_hand(model, prompt, width, ends, length):
    """A textbook beam over lists of tokens, by whole forward passes; without ever dropping what cannot win."""
    open_ones, finished = [((), 0.0)], []
    for step in range(length):
        grown = []
        for tokens, score in open_ones:
            log_p = model(torch.tensor([[*prompt, *tokens]]))[0, -1].log_softmax(-1)
            grown += [((*tokens, t), score + log_p[t].item()) for t in range(len(ends))]
        grown.sort(key=lambda found: -found[1])
        closed = [bool(ends[tokens[-1]]) or step + 1 == length for tokens, _ in grown]
        finished += [found for found, c in zip(grown[:width], closed, strict=False) if c]
        open_ones = [found for found, c in zip(grown, closed, strict=True) if not c][:width]
    return max(finished, key=lambda found: found[1])


def test_widths_side_by_side_find_what_each_finds_alone():
    ends, lengths = torch.tensor([True, False, False, True, False]), torch.tensor([4, 3, 4])
    prompts = torch.tensor([[1, 2, 3], [4, 0, 2], [2, 2, 1]])
    for seed in range(3):
        model = tiny(seed=seed)
        found, score = up.beams(up.TokenTree(model, prompts, None), [1, 2, 5], ends, lengths)
        for k, width in enumerate([1, 2, 5]):
            for row in range(3):
                tokens, best = by_hand(model, prompts[row].tolist(), width, ends, int(lengths[row]))
                assert tuple(t for t in found[k, row].tolist() if t >= 0) == tokens
                assert score[k, row].item() == pytest.approx(best, abs=1e-4)


def test_samples_follow_the_enumerated_chances():
    model, prompt = tiny(seed=1), [1, 2, 3]
    ends, lengths = torch.tensor([True, False, False, False, False]), torch.tensor([2])
    tree = up.TokenTree(model, torch.tensor([prompt]), None)
    uniforms = torch.rand(1, 20_000, 2, generator=draws())
    plain, best = up.sample(
        tree, [lambda u, _: up.boltzmann(u), lambda u, _: up.boltzmann(u, 1e6)], uniforms, ends, lengths
    )
    seen = dict.fromkeys(all_outputs(model, prompt, ends, 2), 0)
    for tokens in plain[0].tolist():
        seen[tuple(t for t in tokens if t >= 0)] += 1
    for tokens, log_p in all_outputs(model, prompt, ends, 2).items():
        assert seen[tokens] / 20_000 == pytest.approx(np.exp(log_p), abs=0.012)
    (greedy,), _ = up.beams(tree, [1], ends, lengths)
    assert (best[0] == greedy).all()  # without any chance left, a sample is the greedy output


def test_conversions_know_their_prompt():
    ends, lengths = torch.tensor([True, False, False, False, False]), torch.tensor([1, 1])
    tree = up.TokenTree(tiny(), torch.tensor([[1, 2], [3, 4]]), None)
    own = torch.tensor([[0.0, 0, 1, 0, 0], [0, 0, 0, 0, 1.0]])
    out = up.sample(tree, [lambda u, owner: own[owner]], torch.rand(2, 9, 1, generator=draws()), ends, lengths)
    assert out[0, 0].eq(2).all()
    assert out[0, 1].eq(4).all()


def test_token_f1_and_minimum_bayes_risk_by_hand():
    a, b = torch.tensor([[3, 3, 1, -1]]), torch.tensor([[3, 2, 3, 3, 1, 9]])
    assert up.token_f1(a, b).item() == pytest.approx(2 * 3 / 9)
    assert up.token_f1(b, a).item() == pytest.approx(2 * 3 / 9)
    assert up.token_f1(torch.tensor([-1, -1]), torch.tensor([-1])).item() == 1
    assert up.token_f1(torch.tensor([-1, -1]), torch.tensor([4])).item() == 0
    samples = torch.tensor([[1, 2], [1, 3], [7, 8], [1, 3]])
    assert up.minimum_bayes_risk(up.token_f1(samples[:, None], samples[None])).item() == 1


ROOT, HALF = up.TokenTree(tiny(), torch.tensor([[1, 2]]), None), torch.full((1, 1, 1), 0.5)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: up.boltzmann(torch.zeros(2, 3), 0.0), "beta"),
        (lambda: up.boltzmann(torch.full((2, 3), torch.nan)), "utilities"),
        (lambda: up.preference_gap(torch.full((2, 3), torch.inf), torch.zeros(2, dtype=torch.long)), "utilities"),
        (lambda: up.fit_beta(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), low=0.0), "low"),
        (lambda: up.fit_ranks(torch.full((2, 3), torch.nan), torch.zeros(2, dtype=torch.long)), "utilities"),
        (lambda: up.fit_curve(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), bins=1), "bins"),
        (lambda: up.beams(ROOT, [3, 0], torch.zeros(5, dtype=torch.bool), torch.ones(1, dtype=torch.long)), "width"),
        (lambda: up.beams(ROOT, [2], torch.zeros(5, dtype=torch.bool), torch.zeros(1, dtype=torch.long)), "lengths"),
        (lambda: up.sample(ROOT, [], HALF, torch.zeros(5, dtype=torch.bool), torch.ones(1, dtype=torch.long)), "conv"),
        (
            lambda: up.sample(
                ROOT, [lambda u, _: u], HALF + 1, torch.zeros(5, dtype=torch.bool), torch.ones(1, dtype=torch.long)
            ),
            "uniforms",
        ),
        (lambda: nucleus(torch.ones(1, 2) / 2, 1.5), "top_p"),
        (lambda: up.calibration_error(torch.tensor([1.5]), torch.tensor([True])), "confidence"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
