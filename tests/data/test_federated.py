"""Participation patterns have the rates they are asked for; clients hold disjoint examples."""

import pytest
import torch

from paperlab.data.federated import (
    bernoulli_participation,
    cyclic_participation,
    dirichlet_clients,
    markov_participation,
    tied_rates,
)
from paperlab.devices import generator

RATES = torch.tensor([0.02, 0.1, 0.3, 0.7])


@pytest.mark.parametrize("pattern", [bernoulli_participation, markov_participation, cyclic_participation])
def test_every_pattern_keeps_its_rates(pattern):
    present = pattern(RATES.expand(200, -1), 500, generator(0))
    assert present.shape == (200, 500, 4)
    torch.testing.assert_close(present.float().mean((0, 1)), RATES, atol=0.02, rtol=0)


def test_markov_comes_in_spells_of_the_right_length():
    present = markov_participation(torch.full((2000,), 0.1), 400, generator(1)).float()
    arrivals = ((present[:-1] == 0) & (present[1:] == 1)).float().sum() / (present[:-1] == 0).sum()
    departures = ((present[:-1] == 1) & (present[1:] == 0)).float().sum() / (present[:-1] == 1).sum()
    assert abs(departures - 0.05) < 0.003  # the faster of the two
    assert abs(arrivals - 0.05 / 9) < 0.001  # a / (a + l) = 0.1


def test_cycles_repeat():
    present = cyclic_participation(RATES, 300, generator(2), cycle=100)
    assert torch.equal(present[:100], present[100:200])
    assert present[:100].sum(0).tolist() == [2, 10, 30, 70]


def test_clients_hold_disjoint_examples_of_few_classes():
    labels = torch.arange(2000) % 10
    held = dirichlet_clients(labels, 50, 36, 0.1, generator(0))
    assert held.shape == (50, 36)
    assert len(held.flatten().unique()) == 50 * 36
    even = dirichlet_clients(labels, 50, 36, 1000.0, generator(0))

    def largest_share(split):
        return (labels[split].unsqueeze(-1) == torch.arange(10)).float().mean(1).max(1).values.mean()

    assert largest_share(held[:25]) > 0.6  # while no class has run out
    assert largest_share(even) < 0.3


def test_all_examples_can_be_given_away():
    labels = torch.arange(100) % 3
    assert len(dirichlet_clients(labels, 10, 10, 0.1, generator(0)).unique()) == 100


def test_tied_rates_have_floor_and_mean():
    rates = tied_rates(torch.rand(50, generator=generator(0)), mean=0.1, minimum=0.02)
    assert rates.min() >= 0.02
    torch.testing.assert_close(rates.mean(), torch.tensor(0.1))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda g: dirichlet_clients(torch.zeros(9, dtype=torch.long), 2, 5, 0.1, g), "per_client: 2 x 5"),
        (lambda g: dirichlet_clients(torch.zeros(9, dtype=torch.long), 0, 5, 0.1, g), "clients must be at least 1"),
        (lambda g: dirichlet_clients(torch.zeros(9, dtype=torch.long), 1, 5, 0.0, g), "concentration must be positive"),
        (lambda g: tied_rates(torch.ones(3), mean=0.1, minimum=0.2), "minimum must lie between"),
        (lambda g: tied_rates(-torch.ones(3), mean=0.1, minimum=0.02), "score must be at least 0"),
        (lambda g: bernoulli_participation(2 * RATES, 5, g), "rates must be between 0 and 1"),
        (lambda g: bernoulli_participation(RATES, 0, g), "rounds must be at least 1"),
        (lambda g: markov_participation(torch.zeros(2), 5, g), "rates must be between|fastest"),
        (lambda g: cyclic_participation(RATES, 5, g, cycle=0), "cycle must be at least 1"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call(generator(0))
