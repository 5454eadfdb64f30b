r"""A network for small tables that keeps the whole training set open before it, and looks it up in every block.

Most networks read their training set once and then forget it: a few weights are what remains. On a table of a hundred
rows that is a waste. Here each block compares the row in question with all training rows, labels included, then its
features with one another, and corrects its guess; the next block looks again.

Schäfl, Gruber, Bitto-Nemling and Hochreiter (2022), https://arxiv.org/abs/2206.00664. A row has $F$ features, the
target counted as the last; each is embedded into $e$ dimensions, a row into $Fe$. All weights carry a leading axis of
*copies*: splits and settings that are trained side by side.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperlab.checks import require_at_least, require_between, require_finite, require_nonempty, require_positive
from paperlab.data.tables import Table
from paperlab.nn import StackedLinear
from paperlab.training import fit


def encode(table: Table) -> tuple[Float[Tensor, "rows features width"], tuple[int, ...]]:
    """The cells of a table with the label as the last feature, and the size of each feature.

    A number has size 1; one of k words has size k and is one-hot. All are padded with zeros to the largest size.

    Raises:
        ValueError: a column of the table that holds both numbers and words, or a number that is missing.
    """
    columns = []
    for j, words in enumerate(table.categories):
        numeric = table.codes[:, j] < 0
        if numeric.any() and not numeric.all():
            raise ValueError(f"table: column {table.names[j]} holds both numbers and words")
        columns.append(np.eye(len(words))[table.codes[:, j]] if words else table.numbers[:, j : j + 1])
    words = np.unique(table.labels)
    numeric = np.issubdtype(table.labels.dtype, np.floating)
    columns.append(table.labels[:, None] if numeric else (table.labels[:, None] == words).astype(float))
    require_finite(**{"numbers in table": np.hstack(columns)})
    sizes = tuple(column.shape[1] for column in columns)
    padded = [np.pad(column, ((0, 0), (0, max(sizes) - column.shape[1]))) for column in columns]
    return torch.tensor(np.stack(padded, axis=1), dtype=torch.float32), sizes


def standardised(
    cells: Float[Tensor, "copies rows features width"],
    sizes: Sequence[int],
    known: Int[Tensor, "copies some"],
) -> Float[Tensor, "copies rows features width"]:
    """Numbers with mean 0 and standard deviation 1 over the ``known`` rows of each copy; categories as they are.

    Raises:
        ValueError: no known row.
    """
    require_nonempty(known=known)
    seen = torch.gather(cells, 1, known[..., None, None].expand(-1, -1, *cells.shape[2:]))
    mean, deviation = seen.mean(1, keepdim=True), seen.std(1, keepdim=True, correction=0).clamp_min(1e-6)
    numeric = torch.tensor([size == 1 for size in sizes], device=cells.device)[:, None]
    first = torch.arange(cells.shape[-1], device=cells.device) == 0
    return torch.where(numeric & first, (cells - mean) / deviation, cells)


def cell_loss(
    predicted: Float[Tensor, "copies rows features width"],
    true: Float[Tensor, "copies rows features width"],
    sizes: Sequence[int],
) -> Float[Tensor, "copies rows features"]:
    """Squared error of a number, cross-entropy of a category, for every cell."""
    losses, j = [], 0
    for size, same in itertools.groupby(sizes):  # neighbours of one size in one go
        cells = (..., slice(j, j := j + len(list(same))), slice(size))
        guess, told = predicted[cells], true[cells]
        losses.append((guess - told).square()[..., 0] if size == 1 else -(told * guess.log_softmax(-1)).sum(-1))
    return torch.cat(losses, dim=-1)


def error(
    predicted: Float[Tensor, "copies rows width"], true: Float[Tensor, "copies rows width"], size: int
) -> Float[Tensor, " copies"]:
    """Share of rows whose likeliest word is wrong; for a number (``size`` 1) the share $1 - R^2$ of the variance."""
    if size > 1:
        return (predicted[..., :size].argmax(-1) != true[..., :size].argmax(-1)).to(true).mean(1)
    residual, x = (predicted - true)[..., 0], true[..., 0]
    return residual.square().mean(1) / x.var(1, correction=0)


def folds(
    rows: int, known: int, seed: int, count: int = 5
) -> tuple[Int[Tensor, "count known"], Int[Tensor, "count fold"], Int[Tensor, "count fold"]]:
    """Rows to train on, to choose settings on and to test on, one line a split; the test rows are disjoint.

    The shuffled rows are cut into ``count`` folds. Split i tests on fold i, chooses on fold i + 1 and trains on the
    first ``known`` rows of the others.

    Raises:
        ValueError: fewer than 3 folds, or more ``known`` rows than the other folds hold.
    """
    require_at_least(3, count=count)
    fold = rows // count
    require_between(1, (count - 2) * fold, known=known)
    order = torch.tensor(np.random.default_rng(seed).permutation(rows)[: count * fold]).view(count, fold)
    turned = torch.stack([order.roll(-i, 0) for i in range(count)])  # (split, fold, rows); fold i comes first
    return turned[:, 2:].flatten(1)[:, :known], turned[:, 1], turned[:, 0]


def choose(scores: Float[Tensor, "settings splits"]) -> Int[Tensor, " splits"]:
    """The setting for each split: the least mean score over all splits but the one that scored on its test rows.

    With `folds`, split i - 1 chooses on the fold that split i tests on; its score has no say in the choice for i.

    Raises:
        ValueError: fewer than 2 splits.
    """
    require_at_least(2, **{"number of splits in scores": scores.shape[1]})
    others = scores.sum(1, keepdim=True) - scores.roll(1, 1)
    return others.argmin(0)


def dropped(x: Float[Tensor, "copies *rest"], share: float, training: bool) -> Float[Tensor, "copies *rest"]:
    """Dropout with one mask for all copies: what differs between two of them is not the luck of the draw."""
    if not (training and share):
        return x
    return x * torch.empty_like(x[0]).bernoulli_(1 - share).div_(1 - share)


def standard(x: Float[Tensor, "*rest size"]) -> Float[Tensor, "*rest size"]:
    """The last axis with mean 0 and variance 1: a layer norm before its scale and shift."""
    return F.layer_norm(x, x.shape[-1:])


class StackedNorm(nn.Module):
    """Layer norm over the last axis with a scale and a shift of their own for each copy."""

    def __init__(self, copies: int, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(copies, size)), nn.Parameter(torch.zeros(copies, size))

    def forward(self, x: Float[Tensor, "copies *rest size"]) -> Float[Tensor, "copies *rest size"]:
        """Normalise ``x[c]`` with the parameters of copy c."""
        shape = (len(x), *[1] * (x.ndim - 2), x.shape[-1])
        return torch.addcmul(self.bias.view(shape), standard(x), self.weight.view(shape))

    def then(
        self, x: Float[Tensor, "copies rows size"], *layers: StackedLinear
    ) -> Float[Tensor, "copies rows outputs"]:
        """Linear ``layers`` of ``x``, which has mean 0 and variance 1 already; their outputs side by side.

        Scale and shift are folded into the layers' weights: the same function, with fewer passes over ``x``.
        """
        weight, bias = (torch.cat([getattr(layer, key) for layer in layers], dim=-1) for key in ("weight", "bias"))
        bias = torch.baddbmm(bias, self.bias[:, None], weight)
        return torch.baddbmm(bias, x, self.weight[..., None] * weight)


class Embedding(nn.Module):
    r"""Cell and mask flag $\to$ linear, plus type and place, $\to$ GELU, dropout, norm, linear; feature by feature.

    The layers of a feature are copies of their own: feature f of copy c is entry $f \cdot$ copies $+\, c$.
    """

    def __init__(self, copies: int, sizes: Sequence[int], size: int, dropout: float) -> None:
        super().__init__()
        many, width = len(sizes), max(sizes)
        self.dropout, bound = dropout, size**-0.5
        self.read, self.write = StackedLinear(many * copies, width + 1, size), StackedLinear(many * copies, size, size)
        with torch.no_grad():  # the bound of a feature's own inputs, not of the padding's
            for parameter in (self.read.weight, self.read.bias):
                for j, own in enumerate(sizes):
                    parameter[j * copies : (j + 1) * copies] *= math.sqrt((width + 1) / (own + 1))
        self.kind = nn.Parameter(torch.empty(copies, 2, size).uniform_(-bound, bound))
        self.place = nn.Parameter(torch.empty(copies, many, size).uniform_(-bound, bound))
        self.norm = StackedNorm(many * copies, size)
        self.register_buffer("is_category", torch.tensor([int(own > 1) for own in sizes]))

    def forward(
        self, cells: Float[Tensor, "copies rows features width"], hidden: Bool[Tensor, "copies rows features"]
    ) -> Float[Tensor, "copies rows features size"]:
        """Embed cells; a hidden cell shows nothing but its flag."""
        x = torch.cat([cells.masked_fill(hidden[..., None], 0), hidden[..., None].to(cells)], dim=-1)
        type_and_place = rearrange(self.kind[:, self.is_category] + self.place, "c f e -> (f c) 1 e")
        x = torch.baddbmm(self.read.bias + type_and_place, rearrange(x, "c r f i -> (f c) r i"), self.read.weight)
        x = rearrange(F.gelu(x), "(f c) r e -> c f r e", c=len(cells))
        x = rearrange(dropped(x, self.dropout, self.training), "c f r e -> (f c) r e")
        x = self.norm.then(standard(x), self.write)
        return rearrange(x, "(f c) r e -> c r f e", c=len(cells))


class Association(nn.Module):
    r"""A Hopfield retrieval with its residual: $\xi \leftarrow n(\xi) + W_O\,[\mathrm{softmax}(\beta\,QK^\top)\,V]$.

    In each of ``heads`` $Q = n(\xi) W_Q$, $K = n(Y) W_K$, $V = n(Y) W_V$; $\beta$ is ``scaling`` over the square root
    of ``hidden``. One layer norm $n$ serves state and memory, and the residual adds to the *normalised* state.

    Raises:
        ValueError: a size below 1, or ``scaling`` not positive.
    """

    def __init__(
        self, copies: int, size: int, *, heads: int, hidden: int, scaling: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        require_at_least(1, size=size, heads=heads, hidden=hidden)
        require_positive(scaling=scaling)
        self.heads, self.hidden, self.beta, self.dropout = heads, hidden, scaling / math.sqrt(hidden), dropout
        self.norm = StackedNorm(copies, size)
        self.W_Q, self.W_K, self.W_V = (StackedLinear(copies, size, heads * hidden) for _ in range(3))
        self.W_O = StackedLinear(copies, heads * hidden, size)

    def forward(
        self,
        state: Float[Tensor, "copies sets queries size"],
        stored: Float[Tensor, "copies sets keys size"],
        own: Bool[Tensor, "copies queries keys"] | None = None,
    ) -> tuple[Float[Tensor, "copies sets queries size"], Float[Tensor, "copies sets heads queries keys"]]:
        """The new states, and the weights that retrieved them; ``stored`` is `standard`, what ``own`` marks gets 0."""
        state, flat = self.norm(state), lambda x: x.flatten(1, 2)
        (q,) = self._split(self.W_Q(flat(state)), len(state[0]))
        k, v = self._split(self.norm.then(flat(stored), self.W_K, self.W_V), len(stored[0]))
        overlap = self.beta * q @ k.mT  # (copies, sets, heads, queries, keys)
        if own is not None:
            overlap = overlap.masked_fill(own[:, None, None], -math.inf)
        p = torch.softmax(overlap, dim=-1)
        found = rearrange(dropped(p, self.dropout, self.training) @ v, "c s h q d -> c (s q) (h d)")
        return state + self.W_O(found).view(state.shape), p

    def _split(self, x: Float[Tensor, "copies all outputs"], sets: int) -> Tensor:
        return rearrange(x, "c (s n) (t h d) -> t c s h n d", s=sets, h=self.heads, d=self.hidden)


class Hopular(nn.Module):
    """Embedding, blocks of two associations each, and one read-out of all features.

    Each block first associates the state with the memory of all training rows (``samples``), then each of its features
    with the features of the original input (``features``); either can be left out.

    Raises:
        ValueError: fewer than 2 features, a size below 1, or a dropout outside 0 to 1.
    """

    def __init__(
        self,
        copies: int,
        sizes: Sequence[int],
        *,
        size: int = 8,
        blocks: int = 2,
        samples: bool = True,
        features: bool = True,
        heads: int = 2,
        hidden: int = 16,
        scaling: float = 1.0,
        dropout: float = 0.1,
        lookup_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        require_at_least(2, **{"number of features in sizes": len(sizes)})
        require_at_least(1, copies=copies, sizes=sizes, size=size, blocks=blocks)
        require_between(0, 1, dropout=dropout, lookup_dropout=lookup_dropout)
        self.sizes, row = tuple(sizes), len(sizes) * size
        options = {"heads": heads, "scaling": scaling, "dropout": lookup_dropout}
        self.embed, self.dropout = Embedding(copies, sizes, size, dropout), dropout
        self.H_s = nn.ModuleList(Association(copies, row, hidden=hidden, **options) for _ in range(blocks * samples))
        narrow = max(1, size // heads)
        self.H_f = nn.ModuleList(Association(copies, size, hidden=narrow, **options) for _ in range(blocks * features))
        self.blocks, self.norm = blocks, StackedNorm(copies, row)
        self.summary = StackedLinear(copies, row, len(sizes) * max(sizes))

    def states(
        self,
        cells: Float[Tensor, "copies rows features width"],
        hidden: Bool[Tensor, "copies rows features"],
        memory: Float[Tensor, "copies known features width"],
        own: Int[Tensor, "copies rows"] | None = None,
    ) -> tuple[list[Float[Tensor, "copies rows features size"]], list[Float[Tensor, "copies heads rows known"]]]:
        """The state before and after each block, and the weights of each look into the memory.

        ``own`` says which row of the memory is the query itself; that row is masked out. At test there is none.
        """
        if self.H_s:  # one pass for both; of the memory nothing is hidden
            shown = torch.zeros(memory.shape[:3], dtype=torch.bool, device=memory.device)
            both = self.embed(torch.cat([cells, memory], dim=1), torch.cat([hidden, shown], dim=1))
            start, Y = both.split([cells.shape[1], memory.shape[1]], dim=1)
            Y = standard(Y.flatten(2)[:, None])
        else:
            start = self.embed(cells, hidden)
        mask = None if own is None else own[..., None] == torch.arange(memory.shape[1], device=own.device)
        states, weights, pieces = [start], [], standard(start) if self.H_f else None
        for block in range(self.blocks):
            xi = states[-1]
            if self.H_s:
                xi, p = self.H_s[block](rearrange(xi, "c r f e -> c 1 r (f e)"), Y, mask)
                xi = xi.view(start.shape)
                weights.append(p[:, 0])
            if self.H_f:
                xi, _ = self.H_f[block](xi, pieces)
            states.append(xi)
        return states, weights

    def read_out(
        self, state: Float[Tensor, "copies rows features size"]
    ) -> Float[Tensor, "copies rows features width"]:
        """All features as the state describes them: a number, or the scores of the words."""
        x = dropped(F.gelu(state.flatten(2)), self.dropout, self.training)
        x = self.norm.then(standard(x), self.summary)
        return x.unflatten(-1, (len(self.sizes), -1))

    def forward(self, *inputs: Tensor | None) -> Float[Tensor, "copies rows features width"]:
        """The read-out of the last state; inputs as in `states`."""
        return self.read_out(self.states(*inputs)[0][-1])


def annealed(step: int, steps: int) -> float:
    r"""Weight of the feature loss, $\lambda_t = \frac12(1 + \cos \pi t / (T-1))$: from 1 to 0.

    Raises:
        ValueError: ``step`` is not among the ``steps``.
    """
    require_between(0, steps - 1, step=step)
    return (1 + math.cos(math.pi * step / max(1, steps - 1))) / 2


def train(
    network: Hopular,
    cells: Float[Tensor, "copies known features width"],
    *,
    steps: int,
    lr: float | Sequence[float],
    memory: Float[Tensor, "copies known features width"] | None = None,
    batch: int = 64,
    hide: float = 0.025,
    replace: float = 0.175,
    anneal: bool | Sequence[bool] = True,
    leak: bool = False,
) -> list[float]:
    r"""Minimise $\lambda_t L_{\text{features}} + (1 - \lambda_t) L_{\text{target}}$; returns the loss of every step.

    In a batch the target is always hidden, a share ``hide`` of the features is, and a share ``replace`` is replaced by
    the same feature of a random row; the loss asks for all of them. The memory is all of ``cells``, or ``memory`` in
    its place, every row in full but for the query itself (``leak`` lets that one in). Without ``anneal``, said for all
    copies or one by one, $\lambda_t = 0$. All copies share the draws of rows, masks and dropout.

    Raises:
        ValueError: a share outside 0 to 1, a batch below 1, or as `paperlab.training.fit`.
    """
    require_between(0, 1, hide=hide, replace=replace)
    require_at_least(1, batch=batch)
    copies, known, many, _ = cells.shape
    memory, columns = cells if memory is None else memory, torch.arange(many, device=cells.device)

    with_features = torch.tensor(anneal, dtype=cells.dtype, device=cells.device)

    def loss(step: int) -> Tensor:
        rows = torch.randperm(known, device=cells.device)[:batch]
        true, chance = cells[:, rows], torch.rand(len(rows), many, device=cells.device)
        hidden = chance < hide
        hidden[:, -1] = True
        other = cells[:, torch.randint(known, chance.shape, device=cells.device), columns]
        seen = torch.where(((chance >= hide) & (chance < hide + replace))[..., None], other, true)
        predicted = network(seen, hidden.expand(copies, -1, -1), memory, None if leak else rows.expand(copies, -1))
        errors = cell_loss(predicted, true, network.sizes).mean(1)  # (copies, features)
        weight = annealed(step, steps) * with_features
        return (weight * errors[:, :-1].mean(1) + (1 - weight) * errors[:, -1]).sum()

    network.train()
    history = fit(network.parameters(), loss, steps=steps, lr=lr, weight_decay=0.1, schedule="cosine")
    network.eval()
    return history


@torch.no_grad()
def predict(
    network: Hopular,
    cells: Float[Tensor, "copies rows features width"],
    memory: Float[Tensor, "copies known features width"],
    own: Int[Tensor, "copies rows"] | None = None,
) -> tuple[
    Float[Tensor, "reads copies rows width"],
    list[Float[Tensor, "copies rows features size"]],
    list[Float[Tensor, "copies heads rows known"]],
]:
    """The target as it is read out before and after each block, with the states and the weights of each look.

    The targets in ``cells`` are hidden, those in ``memory`` are not.
    """
    hidden = torch.zeros(cells.shape[:3], dtype=torch.bool, device=cells.device)
    hidden[..., -1] = True
    states, weights = network.states(cells, hidden, memory, own)
    return torch.stack([network.read_out(state)[..., -1, :] for state in states]), states, weights
