"""FedAU against fixed points, renewal theory and a loop written from the algorithm's text."""

import inspect

import pytest
import torch

from paperlab.data.federated import bernoulli_participation
from paperlab.devices import generator
from paperlab.federated_and_private.fedau import (
    IntervalWeights,
    average_participants,
    expected_weight,
    fedau_weights,
    simulate,
    weighted_average,
)


def test_weights_are_means_of_cut_intervals_counted_by_hand():
    present = torch.tensor([0, 0, 1, 0, 0, 0, 0, 1, 1, 0]).bool().view(10, 1)
    # Intervals with K = 3: rounds 1-3 (present), 4-6 (cut), 7-8 (present), 9 (present): lengths 3, 3, 2, 1.
    used = fedau_weights(present, cutoff=3).flatten().tolist()
    assert used == pytest.approx([1, 1, 1, 3, 3, 3, 3, 3, 8 / 3, 9 / 4])


def test_weights_agree_with_intervals_cut_by_other_means():
    present = bernoulli_participation(torch.tensor([0.07, 0.4]), 400, generator(0))
    cutoff = 9
    for n in range(2):
        lengths, last = [], -1
        for t in range(399):  # the weight used in the last round knows the rounds before it
            if present[t, n] or t - last == cutoff:
                lengths.append(t - last)
                last = t
        assert fedau_weights(present, cutoff)[-1, n].item() == pytest.approx(sum(lengths) / len(lengths), rel=1e-5)


def test_no_weight_knows_the_present_or_the_future():
    present = bernoulli_participation(torch.full((6,), 0.3), 50, generator(1))
    other = present.clone()
    other[20:] = ~other[20:]
    a, b = fedau_weights(present, 10), fedau_weights(other, 10)
    assert torch.equal(a[:21], b[:21])
    assert not torch.equal(a[21:], b[21:])


@pytest.mark.parametrize("cutoff", [1, 5, 50])
def test_long_run_weight_is_the_truncated_geometric_mean(cutoff):
    rates = torch.tensor([0.02, 0.1, 0.5, 1.0])
    present = bernoulli_participation(rates.expand(64, -1), 3000, generator(2))
    found = fedau_weights(present, cutoff)[:, -1].mean(0)
    by_sum = torch.stack([sum((1 - rates) ** k for k in range(cutoff))]).squeeze(0)  # E min(T, K) = sum P(T > k)
    torch.testing.assert_close(expected_weight(rates, cutoff), by_sum, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, by_sum, rtol=0.02, atol=0)


def test_periodic_participation_is_learned_exactly():
    clock = torch.arange(200).view(-1, 1)
    period = torch.tensor([4, 10, 25])
    present = (clock + 1) % period == 0  # the first interval, too, has the full length
    torch.testing.assert_close(fedau_weights(present, 50)[-1], period.float())


def test_cutoff_one_is_blind_to_participation():
    present = bernoulli_participation(torch.tensor([0.05, 0.9]), 100, generator(3))
    assert (fedau_weights(present, 1) == 1).all()


def test_three_numbers_a_client():
    state = IntervalWeights((7, 5), 50)
    state.update(torch.ones(7, 5, dtype=torch.bool))
    tensors = [value for value in vars(state).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 3  # S, M and the weight itself
    assert all(value.shape == (7, 5) for value in tensors)  # nothing of the model's size


# Quadratics F_n(x) = |x - a_n|^2 / 2, whose fixed points are weighted means of the a_n.
TARGETS = torch.randn(12, 3, generator=generator(4), dtype=torch.float64)


def pull(models, runs, clients):
    return models - TARGETS[clients].unsqueeze(-1)


def run(participation, coefficients, remembers=(False,), lr=0.02, steps=1, keep=None):
    arms = len(coefficients)
    return simulate(
        pull, torch.zeros(3, dtype=torch.float64), participation, coefficients.double(),
        torch.tensor(list(remembers)), server_lr=torch.full((arms,), lr, dtype=torch.float64),
        local_lr=0.5, local_steps=steps, keep=keep,
    )  # fmt: skip


def test_wrong_weights_have_the_predicted_fixed_point():
    rates = torch.linspace(0.1, 0.9, 12, dtype=torch.float64)
    present = bernoulli_participation(rates.expand(40, -1), 2500, generator(5))
    weights = torch.stack([torch.ones(40, 2500, 12, dtype=torch.float64), (1 / rates).expand(40, 2500, -1)])
    found = run(present, weighted_average(present, weights), (False, False))[:, :, -1000:].mean((1, 2))
    blind = (rates.unsqueeze(1) * TARGETS).sum(0) / rates.sum()
    torch.testing.assert_close(found, torch.stack([blind, TARGETS.mean(0)]), atol=0.02, rtol=0)
    assert (blind - TARGETS.mean(0)).norm() > 0.1  # far enough apart for the test to mean something


def test_averaging_participants_weights_by_the_expected_share():
    rates = torch.linspace(0.1, 0.9, 12)
    present = bernoulli_participation(rates.expand(40, -1), 2500, generator(6))
    shares = average_participants(present)
    torch.testing.assert_close(shares.sum(-1), present.any(-1).float())
    share = shares.mean((0, 1)).double()
    found = run(present, shares.unsqueeze(0))[:, :, -1000:].mean((1, 2))[0]
    torch.testing.assert_close(found, share @ TARGETS / share.sum(), atol=0.02, rtol=0)


def test_full_participation_is_plain_federated_averaging():
    present = torch.ones(1, 30, 12, dtype=torch.bool)
    ours = weighted_average(present, fedau_weights(present, 50))
    theirs = average_participants(present)
    path = run(present, torch.stack([ours, theirs]), (False, False), lr=0.3, steps=4)
    torch.testing.assert_close(path[0], path[1])
    x = torch.zeros(3, dtype=torch.float64)
    for t in range(30):  # in closed form: 4 local steps of rate 1/2 leave 1/16 of the distance to a_n
        x = x + 0.3 * (TARGETS.mean(0) - x) * (1 - 0.5**4)
        torch.testing.assert_close(path[0, 0, t], x)


def test_memory_agrees_with_a_loop_over_clients():
    present = bernoulli_participation(torch.full((2, 12), 0.3), 15, generator(7))
    mifa, fedvarp = weighted_average(present, torch.ones(2, 15, 12)), average_participants(present)
    path = run(present, torch.stack([fedvarp, mifa, mifa]), (True, False, True), lr=0.4)
    for r in range(2):
        for arm, coefficient in {0: fedvarp, 2: mifa}.items():
            x, y = torch.zeros(3, dtype=torch.float64), torch.zeros(12, 3, dtype=torch.float64)
            for t in range(15):
                fresh = {n: -0.5 * (x - TARGETS[n]) for n in range(12) if present[r, t, n]}
                step = y.mean(0) + sum((coefficient[r, t, n] * (d - y[n]) for n, d in fresh.items()), torch.zeros(3))
                for n, d in fresh.items():
                    y[n] = d
                x = x + 0.4 * step
                torch.testing.assert_close(path[arm, r, t], x)


def test_clients_that_are_away_do_not_matter():
    present = torch.zeros(1, 5, 12, dtype=torch.bool)
    assert (run(present, average_participants(present).unsqueeze(0)) == 0).all()


def test_the_last_rounds_are_the_end_of_the_path():
    present = bernoulli_participation(torch.full((3, 12), 0.4), 20, generator(10))
    coefficients = average_participants(present).unsqueeze(0)
    whole = run(present, coefficients, (True,))
    assert whole.shape == (1, 3, 20, 3)
    torch.testing.assert_close(run(present, coefficients, (True,), keep=7), whole[:, :, -7:])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: fedau_weights(p, 0), "cutoff must be at least 1"),
        (lambda p: expected_weight(torch.tensor([0.0]), 5), "rates must be between"),
        (lambda p: run(p, average_participants(p).unsqueeze(0), lr=0.0), "server_lr must be positive"),
        (lambda p: run(p, average_participants(p).unsqueeze(0), steps=0), "local_steps must be at least 1"),
        (lambda p: run(p, average_participants(p).unsqueeze(0), keep=0), "keep must be at least 1"),
    ],
)
def test_bad_input(call, words):
    present = bernoulli_participation(torch.full((2, 12), 0.5), 4, generator(8))
    with pytest.raises(ValueError, match=words):
        call(present)


def test_shapes_that_do_not_fit_are_named_without_the_type_checker():
    present = bernoulli_participation(torch.full((2, 12), 0.5), 4, generator(8))
    bare = inspect.unwrap(simulate)
    rates = torch.full((2,), 0.1)
    with pytest.raises(ValueError, match="coefficients must have shape"):
        bare(pull, torch.zeros(3), present, average_participants(present).unsqueeze(0), torch.tensor([False, False]),
             server_lr=rates, local_lr=0.5, local_steps=1)  # fmt: skip
    with pytest.raises(ValueError, match="participation must have 3 axes"):
        bare(pull, torch.zeros(3), present[0], present[0], torch.tensor([False, False]),
             server_lr=rates, local_lr=0.5, local_steps=1)  # fmt: skip


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu():
    device = torch.device("cuda")
    present = bernoulli_participation(torch.full((2, 12), 0.3), 20, generator(9))
    coefficients = weighted_average(present, fedau_weights(present, 10)).unsqueeze(0).double()
    targets = TARGETS.to(device)
    on_gpu = simulate(
        lambda m, r, c: m - targets[c].unsqueeze(-1), torch.zeros(3, dtype=torch.float64, device=device),
        present.to(device),
        weighted_average(present.to(device), fedau_weights(present.to(device), 10)).unsqueeze(0).double(),
        torch.tensor([False], device=device), server_lr=torch.full((1,), 0.02, dtype=torch.float64, device=device),
        local_lr=0.5, local_steps=1,
    )  # fmt: skip
    torch.testing.assert_close(on_gpu.cpu(), run(present, coefficients))
