"""Sparsey: against closed forms, exact counting, limits of the noise, and plain loops over sets."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, chisquare

from paperlab.memory import sparsey as sp

P, S, Q, K = 144, 12, 24, 12


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(copies: int = 20, items: int = 20, seed: int = 0, **kwargs):
    mac = sp.Mac(copies, P, Q, K, g(seed), **kwargs)
    x = sp.random_inputs(copies, items, P, S, g(seed + 1))
    return mac, x, mac.store_all(x)


def test_an_empty_memory_knows_nothing_and_draws_uniformly():
    mac = sp.Mac(400, P, Q, K, g())
    x = sp.random_inputs(400, 1, P, S, g(1))
    V = mac.support(x)
    assert (sp.familiarity(V) == 0).all()
    torch.testing.assert_close(sp.win_probabilities(V, sp.Noise()), torch.full_like(V, 1 / K))
    codes = mac.propose(x)
    assert chisquare(np.bincount(codes.flatten().numpy(), minlength=K)).pvalue > 1e-3
    expected = Q / K  # of two independent codes, binomial with Q trials of 1/K
    mean = sp.shared(codes[::2], codes[1::2]).double().mean().item()
    assert mean == pytest.approx(expected, abs=4 * math.sqrt(Q / K * (1 - 1 / K) / 200))


def test_a_stored_input_is_fully_familiar_and_comes_back():
    mac, x, codes = filled(items=5)
    assert (sp.familiarity(mac.support(x)) == 1).all()
    assert (sp.shared(mac.recognise(x), codes) == Q).double().mean() > 0.99


@pytest.mark.parametrize("chi", [0.0, 1.0, 100.0])
def test_the_chance_to_repeat_a_unit(chi):
    """(1 + chi K) / (K + chi K) at G = 1, the others' support being 0."""
    V = torch.zeros(1, 1, Q, K, dtype=torch.float64)
    V[..., 3] = 1
    rho = sp.win_probabilities(V, sp.Noise(chi=chi, sigma2=200.0, sigma3=0.5))
    assert rho[0, 0, 0, 3].item() == pytest.approx((1 + chi * K) / (K + chi * K), abs=1e-9)


def test_the_probabilities_by_hand():
    """Two modules of two units, every symbol of equations 2 to 4 written out with numbers of its own."""
    V = torch.tensor([[[[0.9, 0.2], [0.6, 0.5]]]], dtype=torch.float64)
    noise = sp.Noise(floor=0.2, gamma=3.0, chi=5.0, sigma1=2.0, sigma2=7.0, sigma3=0.4, sigma4=1.5)
    G = (0.9 + 0.6) / 2
    eta = 1 + ((G - 0.2) / 0.8) ** 3 * 5 * 2
    psi = [(eta - 1) / (1 + 2 * math.exp(-7 * (v - 0.4))) ** 1.5 + 1 for v in (0.9, 0.2, 0.6, 0.5)]
    rho = sp.win_probabilities(V, noise).flatten().tolist()
    wanted = [
        psi[0] / (psi[0] + psi[1]),
        psi[1] / (psi[0] + psi[1]),
        psi[2] / (psi[2] + psi[3]),
        psi[3] / (psi[2] + psi[3]),
    ]
    assert rho == pytest.approx(wanted, abs=1e-12)


def test_noise_falls_with_familiarity_and_starts_at_the_floor():
    G = torch.linspace(0, 1, 101, dtype=torch.float64)[None]
    eta = sp.expansivity(G, K, sp.Noise())
    assert (eta[0, G[0] <= 0.3] == 1).all()
    assert (eta[0].diff()[31:] > 0).all()
    assert eta[0, -1].item() == pytest.approx(1 + 100 * K)


def test_one_constant_for_each_copy():
    V = torch.rand(3, 5, Q, K, generator=g(), dtype=torch.float64)
    floor, chi = torch.tensor([0.1, 0.5, 0.9]).double(), torch.tensor([2.0, 50.0, 7.0]).double()
    sigma3 = torch.tensor([0.3, 0.7, 1.0]).double()
    together = sp.win_probabilities(V, sp.Noise(floor=floor, chi=chi, sigma3=sigma3))
    for i in range(3):
        alone = sp.Noise(floor=floor[i].item(), chi=chi[i].item(), sigma3=sigma3[i].item())
        torch.testing.assert_close(together[i : i + 1], sp.win_probabilities(V[i : i + 1], alone))


def test_draws_follow_the_probabilities():
    rho = torch.tensor([0.5, 0.0, 0.3, 0.2]).expand(20_000, 1, 4)
    counts = np.bincount(sp.draw(rho, g()).flatten().numpy(), minlength=4)
    assert counts[1] == 0
    assert chisquare(counts[[0, 2, 3]], 20_000 * np.array([0.5, 0.3, 0.2])).pvalue > 1e-3


def test_ties_are_broken_evenly():
    V = torch.tensor([0.5, 1.0, 1.0, 0.0]).expand(5000, 1, 4)
    won = np.bincount(sp.hard_max(V, g()).flatten().numpy(), minlength=4)
    assert won[0] == won[3] == 0
    assert chisquare(won[1:3]).pvalue > 1e-3


def test_recognition_never_takes_a_lesser_unit():
    V = torch.randint(0, 3, (2000, Q, 13), generator=g(2)) / 12
    won = sp.hard_max(V, g(3))
    assert (V.gather(-1, won[..., None])[..., 0] == V.amax(-1)).all()


def test_weights_against_sets_of_pairs():
    """Support, weights and pictures recomputed with Python's sets, one copy at a time."""
    mac, x, codes = filled(copies=2, items=15)
    new = sp.random_inputs(2, 3, P, S, g(9))
    V, seen = mac.support(new), mac.imagine(codes)
    for c in range(2):
        pairs = {(p, q, k) for xi, code in zip(x[c].tolist(), codes[c].tolist(), strict=True)
                 for p in xi for q, k in enumerate(code)}  # fmt: skip
        assert mac.W[c].sum() == len(pairs)
        for i, q, k in [(0, 0, 0), (1, 5, 7), (2, 23, 11), (2, 3, 4)]:
            assert V[c, i, q, k].item() == pytest.approx(sum((p, q, k) in pairs for p in new[c, i].tolist()) / S)
        for p in (0, 77, 143):
            assert seen[c, 4, p] == sum((p, q, k) in pairs for q, k in enumerate(codes[c, 4].tolist()))


def test_weights_only_ever_rise():
    mac = sp.Mac(3, P, Q, K, g())
    x, before, previous = sp.random_inputs(3, 30, P, S, g(1)), torch.zeros_like(mac.W), None
    for t in range(30):
        previous = mac.store(x[:, t], previous)
        assert (mac.W - before).min() >= 0
        assert set(mac.W.unique().tolist()) <= {0.0, 1.0}
        before = mac.W.clone()
    assert set(mac.H.unique().tolist()) == {0.0, 1.0}


def test_full_noise_recall_against_probability_theory():
    """A stranger's unit is fully supported when its n other inputs cover all S pixels; ties are then broken evenly."""
    items, copies = 160, 40
    mac, x, codes = filled(copies, items, noise=sp.Noise(chi=0.0))
    found = (sp.shared(mac.recognise(x), codes).double().mean() / Q).item()
    n = np.arange(items)
    full = (binom.pmf(n, items - 1, 1 / K) * (1 - (1 - S / P) ** n) ** S).sum()
    assert found == pytest.approx((1 - (1 - full) ** K) / (K * full), abs=0.02)


def test_capacity_does_not_know_q_under_full_noise_and_is_endless_without_noise():
    x = sp.random_inputs(20, 250, P, S, g(3))
    small, large = (
        sp.capacity(sp.Mac(20, P, q, K, g(q), sp.Noise(chi=0.0)), x, growth=1.3).mean().item() for q in (8, 32)
    )
    assert small == pytest.approx(large, rel=0.05)
    assert (sp.capacity(sp.Mac(20, P, Q, K, g(), sp.Noise(greedy=True)), x[:, :60], growth=1.5) == 60).all()


def test_capacity_finds_a_known_failure():
    """Recall that falls in a straight line, by n / 200: share 0.9 is crossed at n = 20, whatever the checkpoints."""

    class Leaky(sp.Mac):
        def recognise(self, active, previous=None):
            n = active.shape[1]
            code = torch.stack(self.kept[:n], 1).clone()
            code[:, :, : round(Q * n / 200)] += 1
            return code

        def store(self, active, previous=None):
            code = super().store(active)
            self.kept = [*getattr(self, "kept", []), code]
            return code

    found = sp.capacity(Leaky(2, P, Q, K, g()), sp.random_inputs(2, 60, P, S, g(1)), share=0.9)
    assert found.tolist() == pytest.approx([20, 20], abs=1.5)


def test_context_multiplies():
    """With recurrent weights a unit's support is the product of its two shares, each with its exponent."""
    mac, _, codes = filled(copies=2, items=2)
    third = sp.random_inputs(2, 1, P, S, g(8))
    mac.store(third[:, 0], codes[:, 1])
    u = mac.support(third)
    h = torch.zeros(2, Q, K)
    own = mac.recognise(third)[:, 0]
    for c in range(2):
        for q in range(Q):
            h[c, q, own[c, q]] = 1.0  # all winners of item 2 point to the third item's winners, and to nothing else
    mac.lambda_u, mac.lambda_h = 2.0, 0.5
    torch.testing.assert_close(mac.support(third, codes[:, [1]])[:, 0], u[:, 0] ** 2 * h)
    assert (sp.shared(mac.predict(codes[:, [1]])[:, 0], own) == Q).all()
    mac.lambda_h = 0.0
    torch.testing.assert_close(mac.support(third, codes[:, [1]]), u**2)


def test_overlapping_inputs_overlap_as_asked():
    x = sp.random_inputs(3, 40, P, S, g())
    for keep in (0, 5, 12):
        y = sp.overlapping(x, keep, P, g(1))
        for a, b in zip(x.flatten(0, 1).tolist(), y.flatten(0, 1).tolist(), strict=True):
            assert len(set(b)) == S
            assert len(set(a) & set(b)) == keep


def test_all_pairs_of_codes():
    a, b = torch.randint(K, (2, 7, Q), generator=g()), torch.randint(K, (2, 5, Q), generator=g(1))
    wanted = [
        [[sum(p == q for p, q in zip(i, j, strict=True)) for j in bb] for i in aa]
        for aa, bb in zip(a.tolist(), b.tolist(), strict=True)
    ]
    assert sp.overlaps(a, b, K).tolist() == wanted


def test_label_units_count_winners_that_met_the_class():
    codes, labels = torch.tensor([[[0, 1, 2], [0, 2, 2], [1, 1, 1]]]), torch.tensor([[0, 0, 1]])
    votes = sp.label_votes(codes, labels, torch.tensor([[[0, 1, 2], [1, 2, 0]]]), 3, 2)
    assert votes.tolist() == [[[3, 1], [1, 1]]]


def test_hash_is_a_fixed_function_of_the_set():
    x, weights = sp.random_inputs(2, 30, P, S, g()), torch.randn(P, Q, K, generator=g(1))
    code = sp.hash_code(x, weights)
    assert (sp.hash_code(x.flip(-1), weights) == code).all()
    assert (sp.hash_code(x[0], weights) == code[0]).all()
    i = weights[x[1, 7]].numpy().sum(0)
    assert code[1, 7].tolist() == i.argmax(1).tolist()


def test_the_count_of_numbers_written():
    a, b = torch.ones(3, 4), torch.zeros(10)
    assert sp.numbers_written(lambda: a + 1) == 12
    assert sp.numbers_written(lambda: a.view(12)[:5]) == 0
    assert sp.numbers_written(lambda: b.__setitem__(torch.tensor([1, 2, 3]), 1.0)) in (3, 4)  # the 1.0 may be a tensor
    assert sp.numbers_written(lambda: (a @ torch.ones(4, 2)).sum()) == 8 + 6 + 1


def test_operations_do_not_depend_on_the_number_stored():
    counts = set()
    for items in (1, 10, 300):
        mac, x, _ = filled(copies=1, items=items)
        counts.add(
            (
                sp.numbers_written(lambda m=mac, x=x: m.store(x[:, 0])),
                sp.numbers_written(lambda m=mac, x=x: m.recognise(x[:, :1])),
            )
        )
    assert len(counts) == 1


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("floor", lambda: sp.Noise(floor=1.0)),
        ("chi", lambda: sp.Noise(chi=-1.0)),
        ("K", lambda: sp.Mac(1, P, Q, 1, g())),
        ("lambda_h", lambda: sp.Mac(1, P, Q, K, g(), lambda_h=-1.0)),
        ("V", lambda: sp.win_probabilities(torch.full((1, 1, 2, 3), 1.5), sp.Noise())),
        ("active", lambda: sp.Mac(1, P, Q, K, g()).support(torch.tensor([[[P]]]))),
        ("recurrent", lambda: sp.Mac(1, P, Q, K, g()).predict(torch.zeros(1, 1, Q, dtype=torch.int64))),
        ("share", lambda: sp.capacity(sp.Mac(1, P, Q, K, g()), sp.random_inputs(1, 3, P, S, g()), share=2.0)),
        (
            "labels",
            lambda: sp.label_votes(torch.zeros(1, 1, 2).long(), torch.tensor([[5]]), torch.zeros(1, 1, 2).long(), 3, 2),
        ),
        ("S", lambda: sp.random_inputs(1, 1, 10, 11, g())),
        ("keep", lambda: sp.overlapping(sp.random_inputs(1, 1, P, S, g()), 13, P, g())),
    ],
)
def test_bad_arguments_are_named(name, call):
    with pytest.raises(ValueError, match=name):
        call()
