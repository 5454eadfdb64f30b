"""Clients for federated learning: who holds which examples, and who shows up when.

Real federations fail in two ways at once: clients hold different data, and the ones that show up often are not the ones
that show up seldom. These generators make both, with the true participation rates kept as ground truth.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperlab.checks import require_at_least, require_between, require_positive


def dirichlet_clients(
    labels: Int[Tensor, " n"], clients: int, per_client: int, concentration: float, generator: torch.Generator
) -> Int[Tensor, "clients per_client"]:
    r"""Indices of the examples that each client holds, no example twice.

    Client $n$ draws its class shares $\kappa_n \sim \mathrm{Dir}(\text{concentration})$ and then its examples; a class
    that runs out is left out of later clients' shares. Small concentrations give clients of one or two classes.

    Raises:
        ValueError: a size below 1, a concentration that is not positive, or more examples asked for than there are.
    """
    require_at_least(1, clients=clients, per_client=per_client)
    require_positive(concentration=concentration)
    if clients * per_client > len(labels):
        raise ValueError(f"per_client: {clients} x {per_client} examples asked for, labels holds {len(labels)}")
    classes = int(labels.max()) + 1
    pools = [torch.nonzero(labels == c).flatten() for c in range(classes)]
    pools = [pool[torch.randperm(len(pool), generator=generator)].tolist() for pool in pools]
    gamma = torch._standard_gamma(torch.full((clients, classes), concentration), generator=generator)
    held = []
    for shares in gamma.clamp_min(1e-30):
        mine: list[int] = []
        while len(mine) < per_client:
            open_classes = torch.tensor([float(bool(pool)) for pool in pools])
            picks = torch.multinomial(shares * open_classes, per_client - len(mine), True, generator=generator)
            mine += [pools[c].pop() for c in picks.tolist() if pools[c]]
        held.append(mine)
    return torch.tensor(held)


def tied_rates(score: Float[Tensor, "*batch clients"], mean: float, minimum: float) -> Float[Tensor, "*batch clients"]:
    """Participation rates proportional to a nonnegative ``score`` above a floor, with the given mean over clients.

    Raises:
        ValueError: not 0 < minimum < mean <= 1, or a negative score.
    """
    require_at_least(0, score=score)
    if not 0 < minimum < mean <= 1:
        raise ValueError(f"minimum must lie between 0 and mean, and mean below 1, got {minimum} and {mean}")
    return (minimum + (mean - minimum) * score / score.mean(-1, keepdim=True)).clamp(max=1.0)


def bernoulli_participation(
    rates: Float[Tensor, "*batch clients"], rounds: int, generator: torch.Generator
) -> Bool[Tensor, "*batch rounds clients"]:
    """Every client flips its own coin every round.

    Raises:
        ValueError: a rate outside 0 to 1, or fewer than 1 round.
    """
    require_between(0, 1, rates=rates)
    require_at_least(1, rounds=rounds)
    shape = (*rates.shape[:-1], rounds, rates.shape[-1])
    return torch.rand(shape, generator=generator, dtype=rates.dtype) < rates.unsqueeze(-2)


def markov_participation(
    rates: Float[Tensor, "*batch clients"], rounds: int, generator: torch.Generator, fastest: float = 0.05
) -> Bool[Tensor, "*batch rounds clients"]:
    r"""A two-state chain for each client, stationary at $p_n$ from the start: presence comes in spells.

    With $a$ and $l$ the probabilities to arrive and to leave, $p = a / (a + l)$; the larger of both is ``fastest``.

    Raises:
        ValueError: a rate or ``fastest`` outside (0, 1), or fewer than 1 round.
    """
    require_between(1e-9, 1 - 1e-9, rates=rates, fastest=fastest)
    require_at_least(1, rounds=rounds)
    odds = rates / (1 - rates)  # a / l
    leave = torch.where(odds < 1, fastest, fastest / odds)
    arrive = leave * odds
    draws = torch.rand((rounds, *rates.shape), generator=generator, dtype=rates.dtype)
    present = draws[0] < rates
    path = [present]
    for u in draws[1:]:
        present = torch.where(present, u >= leave, u < arrive)
        path.append(present)
    return torch.stack(path, dim=-2)


def cyclic_participation(
    rates: Float[Tensor, "*batch clients"], rounds: int, generator: torch.Generator, cycle: int = 100
) -> Bool[Tensor, "*batch rounds clients"]:
    r"""Client $n$ is there for $\lceil p_n \cdot \text{cycle} \rceil$ rounds in a row of a cycle, at its own offset.

    Raises:
        ValueError: a rate outside 0 to 1, or fewer than 1 round or a cycle below 1.
    """
    require_between(0, 1, rates=rates)
    require_at_least(1, rounds=rounds, cycle=cycle)
    offset = torch.randint(0, cycle, rates.shape, generator=generator)
    clock = torch.arange(rounds).view(-1, 1)
    return (clock + offset.unsqueeze(-2)) % cycle < torch.ceil(rates * cycle - 1e-6).unsqueeze(-2)
