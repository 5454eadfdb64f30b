r"""Pointer networks: attention whose weights are the answer.

Some questions are answered by picking among the inputs, in order: the corners of a convex hull, the stops of a tour.
A classifier over a list of indices has no output for an input beyond its list; the softmax that attention computes
over the inputs is always as long as the input.

Vinyals, Fortunato and Jaitly (2015), https://arxiv.org/abs/1506.03134, section 2. `Pointer` is their equation 3,
`Attention` (2.2) and `Plain` (2.1) are its rivals; `Race` trains copies of all of them side by side.
"""

from collections.abc import Sequence
from itertools import permutations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperlab.checks import require_at_least, require_between, require_finite, require_one_of
from paperlab.nn import StackedLinear


def uniform(*shape: int, width: int, generator: torch.Generator | None) -> nn.Parameter:
    r"""Parameters drawn as `torch.nn.LSTM` draws them, uniform with bound $1/\sqrt{\text{width}}$."""
    return nn.Parameter(torch.empty(*shape).uniform_(-(width**-0.5), width**-0.5, generator=generator))


class _Recurrence(torch.autograd.Function):
    """`StackedLSTM` with its derivative written out: one product a step for inputs, bias and state together."""

    @staticmethod
    def forward(ctx, x, W, h, c):
        (steps, copies, batch, inputs), width = x.shape, h.shape[-1]
        rows = x.new_ones(copies, steps + 1, batch, inputs + 1 + width)  # [x_t, 1, h_t-1]
        rows[:, :-1, :, :inputs] = x.transpose(0, 1)
        gates, squashed = x.new_empty(steps, copies, batch, 4 * width), x.new_empty(steps, *c.shape)
        states, cells = rows[..., inputs + 1 :].transpose(0, 1), x.new_empty(steps + 1, *c.shape)
        states[0], cells[0] = h, c
        views = rows.transpose(0, 1), gates, gates[..., : 3 * width], *gates.chunk(4, -1), squashed, states[1:]
        for t, (row, gate, ofi, o, i, f, g, tanh, state) in enumerate(zip(*(v.unbind() for v in views), strict=False)):
            torch.bmm(row, W, out=gate)
            ofi.sigmoid_()
            torch.mul(f, cells[t], out=cells[t + 1]).addcmul_(i, g.tanh_())
            torch.mul(o, torch.tanh(cells[t + 1], out=tanh), out=state)
        ctx.save_for_backward(W, rows, gates.unflatten(-1, (4, width)), cells, squashed)
        return states[1:], cells[-1]

    @staticmethod
    def backward(ctx, dstates, dc):
        W, rows, gates, cells, squashed = ctx.saved_tensors
        (steps, copies, batch, _, width), (o, i, f, g) = gates.shape, gates.unbind(-2)
        slope = (1 - gates).mul_(gates)  # large tensors change in place: fresh memory costs more than the sums
        torch._foreach_mul_(slope[..., :3, :].unbind(-2), [squashed, g, cells[:-1]])
        torch.addcmul(i, i, g.square(), value=-1, out=slope[..., 3, :])
        to_cell, dh = torch.addcmul(o, o, squashed.square(), value=-1), torch.zeros_like(dc)
        dz, back = gates.new_empty(copies, steps, batch, 4, width).transpose(0, 1), W.transpose(1, 2)
        views = dstates, to_cell, slope[..., 0, :], slope[..., 1:, :], dz[..., 0, :], dz[..., 1:, :], dz, f
        for dstate, to, state, cell, do, difg, now, forget in zip(*(v.unbind()[::-1] for v in views), strict=True):
            dh = dh + dstate
            dc = torch.addcmul(dc, dh, to)
            torch.mul(dh, state, out=do)
            torch.mul(dc[:, :, None], cell, out=difg)
            dh, dc = torch.bmm(now.flatten(-2), back[:, :, -width:]), dc * forget
        rows, dz = rows[:, :-1].flatten(1, 2), dz.transpose(0, 1).flatten(-2).flatten(1, 2)
        dx = torch.bmm(dz, back[:, :, : -width - 1]).unflatten(1, (steps, -1)).transpose(0, 1)
        return dx, torch.bmm(rows.transpose(1, 2), dz), dh, dc


class StackedLSTM(nn.Module):
    r"""``copies`` independent LSTMs in one recurrence: $o, i, f = \sigma(\cdot)$ and $g = \tanh(\cdot)$ of
    $[x_t, 1, h_{t-1}] W$, then $c_t = f c_{t-1} + i g$ and $h_t = o \tanh c_t$.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, copies: int, in_features: int, width: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        require_at_least(1, copies=copies, in_features=in_features, width=width)
        self.weight = uniform(copies, in_features + 1 + width, 4 * width, width=width, generator=generator)

    def forward(
        self, x: Float[Tensor, "steps copies batch features"], state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Float[Tensor, "copies batch steps width"], tuple[Tensor, Tensor]]:
        """All states, and the last (h, c); ``state`` is the (h, c) to start from, by default zeros."""
        if state is None:
            state = (x.new_zeros(*x.shape[1:3], self.weight.shape[-1] // 4),) * 2
        h, c = _Recurrence.apply(x, self.weight, *state)
        return h.permute(1, 2, 0, 3).contiguous(), (h[-1], c)


def scores(
    keys: Float[Tensor, "copies batch n width"],
    query: Float[Tensor, "copies batch m width"],
    v: Float[Tensor, "copies width"],
) -> Float[Tensor, "copies batch m n"]:
    r"""$u^i_j = v^\top \tanh(k_j + q_i)$ with the keys $k_j = W_1 e_j$ and the queries $q_i = W_2 d_i$."""
    s = torch.sigmoid((2 * keys)[:, :, None] + (2 * query)[:, :, :, None])  # tanh(x) = 2 s(2x) - 1, and s is quicker
    return torch.linalg.vecdot(s, 2 * v[:, None, None, None]) - v.sum(-1)[:, None, None, None]


class Pointer(nn.Module):
    r"""$p(C_i = j) = \mathrm{softmax}_j(u^i)$ over the inputs and a learned end: the softmax is the output."""

    def __init__(self, copies: int, width: int, dictionary: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.W1, self.W2 = (StackedLinear(copies, width, width, generator=generator) for _ in range(2))
        self.v = uniform(copies, width, width=width, generator=generator)
        self.end = uniform(copies, 1, 1, width, width=width, generator=generator)

    def forward(
        self, e: Float[Tensor, "copies batch n width"], d: Float[Tensor, "copies batch m width"], labels: object = None
    ) -> Float[Tensor, "copies batch m places"]:
        """Log-probability of each of the n inputs and, last, of the end, for each of the m decoder states."""
        e = torch.cat([e, self.end.expand(-1, e.shape[1], -1, -1)], 2)
        return scores(self.W1(e), self.W2(d), self.v).log_softmax(-1)


class Plain(nn.Module):
    """An output for every entry of a dictionary and one for the end, read off the decoder state alone."""

    sources = 1

    def __init__(self, copies: int, width: int, dictionary: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.out = StackedLinear(copies, self.sources * width, dictionary + 1, generator=generator)

    def forward(
        self,
        e: Float[Tensor, "copies batch n width"],
        d: Float[Tensor, "copies batch m sources"],
        labels: Int[Tensor, "copies batch n"],
    ) -> Float[Tensor, "copies batch m places"]:
        """As `Pointer`; input j is entry ``labels[j]``, and a row sums to less than 1 where entries go unused."""
        logp = self.out(d).log_softmax(-1)
        return torch.cat([logp.gather(-1, labels[:, :, None].expand(-1, -1, d.shape[2], -1)), logp[..., -1:]], -1)


class Attention(Plain):
    r"""As `Plain`, of $[d_i, d_i']$: the softmax blends the inputs into $d_i' = \sum_j a^i_j e_j$."""

    sources = 2

    def __init__(self, copies: int, width: int, dictionary: int, generator: torch.Generator | None = None) -> None:
        super().__init__(copies, width, dictionary, generator)
        self.W1, self.W2 = (StackedLinear(copies, width, width, generator=generator) for _ in range(2))
        self.v = uniform(copies, width, width=width, generator=generator)

    def forward(self, e: Tensor, d: Tensor, labels: Tensor) -> Tensor:
        """As `Plain`."""
        a = scores(self.W1(e), self.W2(d), self.v).softmax(-1)
        return super().forward(e, torch.cat([d, torch.matmul(a, e)], -1), labels)


KINDS = {"pointer": Pointer, "attention": Attention, "attention, labels shown": Attention, "plain": Plain}


class Race(nn.Module):
    """Encoder, decoder and output of each of ``kinds``, ``seeds`` copies of each; copy c is of kind c // seeds.

    Input j is entry j of the dictionary; in a kind "labels shown" it is the entry that ``labels`` says, and the
    encoder sees which. All kinds get the same points, and the point chosen last as the decoder's input.

    Raises:
        ValueError: no or an unknown kind, or a size below 1.
    """

    def __init__(
        self,
        kinds: Sequence[str],
        seeds: int,
        *,
        width: int = 32,
        dictionary: int = 15,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        require_at_least(1, **{"number of kinds": len(kinds)}, seeds=seeds, dictionary=dictionary)
        for kind in kinds:
            require_one_of(KINDS, kinds=kind)
        self.kinds, self.seeds, self.dictionary = tuple(kinds), seeds, dictionary
        self.shown = ["shown" in kind for kind in kinds]
        copies, features = len(kinds) * seeds, 2 + dictionary * any(self.shown)
        self.encoder = StackedLSTM(copies, features, width, generator=generator)
        self.decoder = StackedLSTM(copies, features, width, generator=generator)
        self.start = uniform(copies, 1, 1, features, width=width, generator=generator)
        self.heads = nn.ModuleList(KINDS[kind](seeds, width, dictionary, generator) for kind in kinds)

    def read(
        self, points: Float[Tensor, "seeds batch n 2"], labels: Int[Tensor, "seeds batch n"] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """What the networks are given (copies, batch, n, features), the labels, the states e_j, and the last (h, c).

        Raises:
            ValueError: points that are not finite or too many for a kind with a dictionary, or labels missing.
        """
        require_finite(points=points)
        seeds, batch, n, _ = points.shape
        require_at_least(1 if set(self.kinds) == {"pointer"} else n, dictionary=self.dictionary)
        if any(self.shown) and labels is None:
            raise ValueError("labels must be given for a kind to which they are shown")
        own = torch.arange(n, device=points.device).expand(seeds, batch, n)
        used = torch.stack([labels if shown else own for shown in self.shown])
        x = (points - 0.5).expand(len(self.kinds), -1, -1, -1, -1)
        if any(self.shown):
            seen = torch.tensor(self.shown, device=points.device).view(-1, 1, 1, 1, 1)
            x = torch.cat([x, (F.one_hot(used, self.dictionary) * seen).to(x)], -1)
        x = x.flatten(0, 1)
        return x, used.flatten(0, 1), *self.encoder(x.permute(2, 0, 1, 3))

    def point(self, e: Tensor, d: Tensor, labels: Tensor) -> Float[Tensor, "copies batch m places"]:
        """The log-probabilities of every copy, from its own head."""
        parts = (v.split(self.seeds) for v in (e, d, labels))
        return torch.cat([head(*part) for head, *part in zip(self.heads, *parts, strict=True)])

    def forward(
        self,
        points: Float[Tensor, "seeds batch n 2"],
        sequence: Int[Tensor, "seeds batch m"],
        labels: Int[Tensor, "seeds batch n"] | None = None,
    ) -> Float[Tensor, "copies batch m places"]:
        """Log-probabilities of every place at every step, given what ``sequence`` chose before (n means the end).

        Raises:
            ValueError: as `read`.
        """
        x, labels, e, state = self.read(points, labels)
        before = sequence[..., :-1].clamp(max=x.shape[2] - 1).repeat(len(self.kinds), 1, 1)
        given = x.gather(2, before[..., None].expand(-1, -1, -1, x.shape[-1]))
        given = torch.cat([self.start.expand(-1, x.shape[1], -1, -1), given], 2)
        return self.point(e, self.decoder(given.permute(2, 0, 1, 3), state)[0], labels)

    def loss(self, points: Tensor, sequence: Tensor, labels: Tensor | None = None) -> Float[Tensor, " copies"]:
        """Mean of $-\\log p(C_i)$ over the steps up to and with the end, for each copy.

        Raises:
            ValueError: as `read`.
        """
        sequence = sequence[..., : int((sequence < points.shape[2]).sum(-1).max()) + 1]
        chosen = sequence.repeat(len(self.kinds), 1, 1)[..., None]
        logp = self(points, sequence, labels).gather(-1, chosen)[..., 0]
        counts = F.pad(chosen[..., :-1, 0] < points.shape[2], (1, 0), value=True)
        return -(logp * counts).sum((1, 2)) / counts.sum((1, 2))


@torch.no_grad()
def decode(
    model: Race,
    points: Float[Tensor, "seeds batch n 2"],
    labels: Int[Tensor, "seeds batch n"] | None = None,
    *,
    beam: int = 1,
    tours: bool = False,
) -> Int[Tensor, "copies batch steps"]:
    """The likeliest sequence that a beam search finds; n stands for the end and all that follows it.

    At most n + 1 steps. Nothing is forbidden, unless ``tours``: then every input comes once, and the end last.

    Raises:
        ValueError: ``beam`` below 1, or as `Race.read`.
    """
    require_at_least(1, beam=beam)
    x, labels, e, (h, c) = model.read(points, labels)
    (copies, batch, n, features), width = x.shape, h.shape[-1]
    h, c = (v[:, :, None].expand(-1, -1, beam, -1) for v in (h, c))
    given = model.start.expand(-1, batch, beam, -1)
    total = points.new_full((copies, batch, beam), -torch.inf)
    total[..., 0] = 0  # one empty sequence; the other places of the beam are free
    sequence = torch.full((copies, batch, beam, n + 1), n, device=points.device)
    ended = torch.zeros_like(total, dtype=torch.bool)
    barred = torch.zeros(copies, batch, beam, n + 1, dtype=torch.bool, device=points.device)
    barred[..., n] = tours
    for step in range(n + 1 - tours):
        d, (h, c) = model.decoder(given.flatten(1, 2)[None], (h.flatten(1, 2), c.flatten(1, 2)))
        logp = model.point(e, d.view(copies, batch, beam, width), labels).masked_fill(barred, -torch.inf)
        logp[..., :n].masked_fill_(ended[..., None], -torch.inf)
        logp[..., n].masked_fill_(ended, 0)
        total, best = (total[..., None] + logp).flatten(2).topk(beam)
        parent, chosen = best // (n + 1), best % (n + 1)
        kept = (sequence, barred, *(v.view(copies, batch, beam, width) for v in (h, c)))
        sequence, barred, h, c = (v.gather(2, parent[..., None].expand(*parent.shape, v.shape[-1])) for v in kept)
        sequence[..., step] = chosen
        ended = chosen == n
        barred.scatter_(-1, chosen[..., None], tours)
        if ended.all():
            break
        given = x.gather(2, chosen.clamp(max=n - 1)[..., None].expand(-1, -1, -1, features))
    return sequence[:, :, 0]


def draw_points(seeds: int, batch: int, n: int, generator: torch.Generator) -> Float[Tensor, "seeds batch n 2"]:
    """Points uniform in the unit square, from left to right.

    Raises:
        ValueError: a size below 1.
    """
    require_at_least(1, seeds=seeds, batch=batch, n=n)
    points = torch.rand(seeds, batch, n, 2, generator=generator, device=generator.device)
    return points.gather(-2, points[..., :1].argsort(-2).expand_as(points))


def turn(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Twice the signed area of the triangles a, b, c: positive where the way from a over b to c turns left."""
    return (b - a)[..., 0] * (c - a)[..., 1] - (b - a)[..., 1] * (c - a)[..., 0]


def convex_hull(points: Float[Tensor, "*batch n 2"]) -> Int[Tensor, "*batch steps"]:
    """The corners of the convex hull, counter-clockwise from the lowest index; then n, up to n + 1 entries.

    From i to j there is an edge where all other points lie to its left: n³ tests, without a loop over the batch.

    Raises:
        ValueError: fewer than 3 points, points not finite, or three on one line of the hull.
    """
    require_at_least(3, **{"number of points": (n := points.shape[-2])})
    require_finite(points=points)
    x, y = points.double().unbind(-1)
    z = x[..., :, None] * y[..., None, :] - y[..., :, None] * x[..., None, :]  # z_ij + z_jk + z_ki is `turn` of i, j, k
    left = z[..., None] + z[..., None, :, :] + z.transpose(-1, -2)[..., :, None, :] > 0
    own = torch.eye(n, dtype=torch.bool, device=z.device)
    edges = (left | own[:, None] | own).all(-1) & ~own
    if not torch.equal(edges.sum(-1), edges.sum(-2)) or not (edges.sum((-1, -2)) > 2).all():
        raise ValueError("points must not lie three on one line of the hull")
    follows = edges.int().argmax(-1)
    first = edges.any(-1).int().argmax(-1, keepdim=True)
    corners = [first]
    for _ in range(n):
        at = follows.gather(-1, corners[-1].clamp(max=n - 1))
        corners.append(torch.where((at == first) | (corners[-1] == n), n, at))
    return torch.cat(corners, -1)


def outline(points: Float[Tensor, "*batch n 2"], sequence: Int[Tensor, "*batch m"]) -> Float[Tensor, "*batch m 2"]:
    """The corners of a sequence in order; entries n become the first corner again, which changes no polygon."""
    closed = torch.where(sequence < points.shape[-2], sequence, sequence[..., :1]).clamp(max=points.shape[-2] - 1)
    return points.gather(-2, closed[..., None].expand(*closed.shape, 2))


def area(polygon: Float[Tensor, "*batch m 2"]) -> Float[Tensor, "*batch"]:
    r"""Signed area (shoelace), positive counter-clockwise: $\frac12 \sum_i x_i y_{i+1} - x_{i+1} y_i$."""
    return turn(torch.zeros_like(polygon), polygon, polygon.roll(-1, -2)).sum(-1) / 2


def is_polygon(points: Float[Tensor, "*batch n 2"], sequence: Int[Tensor, "*batch m"]) -> Bool[Tensor, "*batch"]:
    """Does the sequence end, with three corners or more, no corner twice and no edge across another?"""
    n = points.shape[-2]
    visits = F.one_hot(sequence, n + 1).sum(-2)[..., :n]
    a = outline(points.double(), sequence)
    b = a.roll(-1, -2)
    sides = [turn(a[..., :, None, :], b[..., :, None, :], other[..., None, :, :]) for other in (a, b)]
    apart = sides[0] * sides[1] < 0  # the ends of edge j lie on different sides of edge i
    crossed = (apart & apart.transpose(-1, -2)).flatten(-2).any(-1)
    return (sequence == n).any(-1) & (visits.sum(-1) > 2) & (visits < 2).all(-1) & ~crossed


def coverage(
    points: Float[Tensor, "*batch n 2"], sequence: Int[Tensor, "*batch m"], hull: Int[Tensor, "*batch steps"]
) -> Float[Tensor, "*batch"]:
    """Area of the polygon as a share of the hull's; 0 for what is no polygon."""
    return area(outline(points, sequence)).abs() / area(outline(points, hull)) * is_polygon(points, sequence)


def same_cycle(a: Int[Tensor, "*batch m"], b: Int[Tensor, "*batch m"], n: int) -> Bool[Tensor, "*batch"]:
    """Are two sequences the same up to where they start?"""
    step, turned = torch.arange(a.shape[-1], device=a.device), []
    for s in (a, b):
        length = (s < n).sum(-1, keepdim=True)
        from_lowest = s.gather(-1, (s.argmin(-1, keepdim=True) + step) % length.clamp(min=1))
        turned.append(torch.where(step < length, from_lowest, n))
    return (turned[0] == turned[1]).all(-1)


def tour_length(points: Float[Tensor, "*batch n 2"], tour: Int[Tensor, "*batch m"]) -> Float[Tensor, "*batch"]:
    """Length of the closed way through the points of a sequence."""
    corners = outline(points, tour)
    return (corners - corners.roll(-1, -2)).norm(dim=-1).sum(-1)


def shortest_tours(points: Float[Tensor, "*batch n 2"]) -> Int[Tensor, "*batch steps"]:
    """The shortest tours, from point 0 and counter-clockwise, then n: by trying all of them.

    Raises:
        ValueError: fewer than 3 points or more than 8.
    """
    require_between(3, 8, **{"number of points": (n := points.shape[-2])})
    orders = torch.tensor([(0, *p) for p in permutations(range(1, n)) if p[0] < p[-1]], device=points.device)
    lengths = torch.cdist(points, points).flatten(-2)[..., orders * n + orders.roll(-1, -1)].sum(-1)
    tour = orders[lengths.argmin(-1)]
    back = torch.cat([tour[..., :1], tour[..., 1:].flip(-1)], -1)
    return F.pad(torch.where(area(outline(points, tour))[..., None] > 0, tour, back), (0, 1), value=n)
