r"""FedAU: federated averaging that learns, round by round, how often each client shows up.

If phones of one kind are online ten times as often as another kind, plain federated averaging trains their model. The
cure would be to weight each client by the inverse of its participation rate, which nobody knows. FedAU reads it off the
gaps: the mean number of rounds between two appearances of a client *is* one over its rate. That takes three numbers a
client (two counters and the mean), and no stored model.

Wang and Ji (2023), https://arxiv.org/abs/2306.03401, algorithms 1 and 2.
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from paperlab.checks import require_at_least, require_between, require_ndim, require_positive

Gradient = Callable[[Tensor, Tensor, Tensor], Tensor]


class IntervalWeights:
    r"""The online estimate $\omega_n \approx 1 / p_n$ of algorithm 2, for any number of clients side by side.

    Each client has $S_n$, the rounds since its last interval ended, and $M_n$, the intervals seen. An interval ends
    when the client shows up, or is cut when it reaches ``cutoff`` $= K$; $\omega_n$ is the mean of the intervals so
    far, and 1 before the first has ended.

    Args:
        shape: (*batch, clients).
        cutoff: $K \ge 1$, in rounds. Small values bias the weights of rare clients, large ones let them vary.

    Raises:
        ValueError: ``cutoff`` is below 1.
    """

    def __init__(self, shape: Sequence[int], cutoff: int, *, device: torch.device | str = "cpu") -> None:
        require_at_least(1, cutoff=cutoff)
        self.cutoff = cutoff
        self.weights: Float[Tensor, "*batch clients"] = torch.ones(*shape, device=device)
        self.intervals = torch.zeros(*shape, device=device)
        self.since = torch.zeros(*shape, device=device)

    def update(self, present: Bool[Tensor, "*batch clients"]) -> None:
        """Take note of who was there in the round that has just ended."""
        self.since = self.since + 1
        ends = present | (self.since >= self.cutoff)
        mean = (self.intervals * self.weights + self.since) / (self.intervals + 1)  # is S_n itself when M_n = 0
        self.weights = torch.where(ends, mean, self.weights)
        self.intervals = self.intervals + ends
        self.since = torch.where(ends, 0.0, self.since)


def fedau_weights(
    participation: Bool[Tensor, "*batch rounds clients"], cutoff: int = 50
) -> Float[Tensor, "*batch rounds clients"]:
    """The weight that each client has in each round, estimated from the rounds before it.

    Raises:
        ValueError: ``cutoff`` is below 1.
    """
    state = IntervalWeights(participation[..., 0, :].shape, cutoff, device=participation.device)
    used = []
    for present in participation.unbind(-2):
        used.append(state.weights)
        state.update(present)
    return torch.stack(used, dim=-2)


def expected_weight(rates: Float[Tensor, "*clients"], cutoff: int) -> Float[Tensor, "*clients"]:
    r"""What $\omega_n$ tends to under independent participation: $\mathbb E \min(\mathrm{Geom}(p), K) = (1-(1-p)^K)/p$.

    Raises:
        ValueError: a rate outside (0, 1], or a cutoff below 1.
    """
    require_between(1e-12, 1, rates=rates)
    require_at_least(1, cutoff=cutoff)
    return (1 - (1 - rates) ** cutoff) / rates


def average_participants(
    participation: Bool[Tensor, "*batch rounds clients"],
) -> Float[Tensor, "*batch rounds clients"]:
    r"""FedAvg's coefficients: those present share the round equally, $I_n / \sum_j I_j$ (0 in an empty round)."""
    present = participation.float()
    return present / present.sum(-1, keepdim=True).clamp_min(1)


def weighted_average(
    participation: Bool[Tensor, "*batch rounds clients"], weights: Float[Tensor, "*more rounds clients"]
) -> Float[Tensor, "*more rounds clients"]:
    r"""The coefficients $\omega_n I_n / N$ of algorithm 1: divided by all clients, not by those present.

    Weights 1 give the average over all, $1/p_n$ the oracle, `fedau_weights` FedAU.
    """
    return weights * participation / participation.shape[-1]


def simulate(
    gradient: Gradient,
    start: Float[Tensor, " dim"],
    participation: Bool[Tensor, "runs rounds clients"],
    coefficients: Float[Tensor, "arms runs rounds clients"],
    remembers: Bool[Tensor, " arms"],
    *,
    server_lr: Float[Tensor, " arms"],
    local_lr: float,
    local_steps: int,
    keep: int | None = None,
) -> Float[Tensor, "arms runs kept_rounds dim"]:
    r"""Federated optimisation of many arms over many runs; returns the model after each round.

    A participant starts from the server's $x$, takes ``local_steps`` steps of SGD and returns the change $\Delta_n$.
    With $S$ the clients present, every method here is one server step with coefficients $c_n$ and, where the arm
    remembers, last changes $y_n$:

    $$x \leftarrow x + \eta \Big[ \sum_{n \in S} c_n (\Delta_n - y_n) + \frac1N \sum_n y_n \Big],
    \quad y_n \leftarrow \Delta_n, n \in S.$$

    Without memory ($y = 0$) it is averaging with weights. With memory, $c_n = 1/N$ is MIFA and $c_n = 1/|S|$ is
    FedVARP: one stored model per client. Only participants are computed, and all arms see the same ones.

    Args:
        gradient: called as ``gradient(models, runs, clients)`` with models (pairs, dim, arms) and, for each pair, the
            index of its run and client; returns gradients of the models' shape. The arms come last, so that a linear
            layer of all arms is one matrix product with the examples of the pair.
        coefficients: $c_n$, zero for absentees.
        server_lr: $\eta$ of each arm.
        keep: return only so many of the last rounds; all of them by default.

    Raises:
        ValueError: shapes that do not fit, fewer than 1 local step or kept round, or a rate that is not positive.
    """
    require_ndim(1, start=start)
    require_ndim(3, participation=participation)
    require_at_least(1, local_steps=local_steps, keep=1 if keep is None else keep)
    require_positive(local_lr=local_lr, server_lr=server_lr)
    arms = len(remembers)
    if coefficients.shape != (arms, *participation.shape) or len(server_lr) != arms:
        raise ValueError(
            f"coefficients must have shape (arms, runs, rounds, clients) = {(arms, *participation.shape)}, server_lr "
            f"{arms} rates, got {tuple(coefficients.shape)} and {len(server_lr)}"
        )
    runs, rounds, clients = participation.shape
    x = start.view(1, -1, 1).expand(runs, -1, arms)
    weight = coefficients.permute(2, 1, 3, 0)  # rounds, runs, clients, arms
    mindful = remembers.nonzero().flatten()
    memory = start.new_zeros(runs, clients, len(start), len(mindful))
    remembered = memory.mean(1)  # of all clients, kept up to date
    path: deque[Tensor] = deque(maxlen=keep)
    for t in range(rounds):
        run, client = participation[:, t].nonzero(as_tuple=True)
        model = x[run]
        for _ in range(local_steps):
            model = torch.sub(model, gradient(model, run, client), alpha=local_lr)
        fresh, step = model - x[run], torch.zeros_like(x)
        if memory.numel():
            step.index_copy_(2, mindful, remembered)
            change = fresh.index_select(2, mindful)
            news = change - memory[run, client]
            fresh.index_copy_(2, mindful, news)
            memory[run, client] = change
            remembered.index_add_(0, run, news, alpha=1 / clients)
        step.index_add_(0, run, weight[t, run, client].unsqueeze(1) * fresh)
        x = torch.addcmul(x, server_lr, step)
        path.append(x)
    return torch.stack(list(path), dim=2).permute(3, 0, 2, 1)
