r"""Pointer networks: attention whose weights are the answer.

Some questions are answered by picking among the inputs, in order: the corners of a convex hull, the stops of a tour.
A classifier over a fixed list of indices cannot answer for more inputs than its list is long. Here the softmax over
the inputs that attention computes anyway is itself the output distribution, so that it is as long as the input.

Vinyals, Fortunato and Jaitly (2015), https://arxiv.org/abs/1506.03134, section 2. `Pointer` is equation (3); `Attention`
and `Plain` are its rivals, with an output for each entry of a dictionary. All three share `Reader`'s recurrences.
"""

from collections.abc import Sequence
from itertools import permutations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paperlab.checks import require_at_least, require_finite, require_nonempty, require_one_of
from paperlab.nn import StackedLinear

class _Recurrence(torch.autograd.Function):
    """`StackedLSTM` with its derivative written out: one product a step for inputs, bias and state together."""

    @staticmethod
    def forward(ctx, x, W, h, c):
        steps, copies, batch, inputs = x.shape
        width = W.shape[-1] // 4
        xh = x.new_ones(steps + 1, copies, batch, inputs + 1 + width)  # rows [x_t, 1, h_t-1]
        xh[:-1, ..., :inputs] = x
        xh[0, ..., inputs + 1 :] = h
        cells, squashed = x.new_empty(steps + 1, *c.shape), x.new_empty(steps, *c.shape)
        cells[0] = c
        gates = x.new_empty(steps, copies, batch, 4 * width)
        for t in range(steps):
            i, f, g, o = torch.bmm(xh[t], W, out=gates[t]).sigmoid_().chunk(4, -1)
            g.mul_(2).sub_(1)  # tanh(x) = 2 sigmoid(2x) - 1, and its x comes doubled: one function for all gates
            torch.mul(f, cells[t], out=cells[t + 1]).addcmul_(i, g)
            torch.mul(cells[t + 1], 2, out=squashed[t]).sigmoid_().mul_(2).sub_(1)
            torch.mul(o, squashed[t], out=xh[t + 1, ..., inputs + 1 :])
        ctx.save_for_backward(W, xh, gates, cells, squashed)
        return xh[1:, ..., inputs + 1 :], cells[-1]

    @staticmethod
    def backward(ctx, dhs, dc):
        W, xh, gates, cells, squashed = ctx.saved_tensors
        inputs, dW, back = xh.shape[-1] - dc.shape[-1] - 1, torch.zeros_like(W), W.transpose(1, 2)
        dh, dx = torch.zeros_like(dc), xh.new_empty(*xh.shape[:-1], inputs)
        for t in reversed(range(len(gates))):
            dh = dh + dhs[t]
            i, f, g, o = gates[t].chunk(4, -1)
            dc = torch.addcmul(dc, dh * o, 1 - squashed[t].square())
            dz = torch.cat([dc * g, dc * cells[t], dc * i, dh * squashed[t]], -1)
            slope = gates[t] * (1 - gates[t])
            slope.chunk(4, -1)[2].copy_((1 - g.square()) / 2)
            dz *= slope
            dW.baddbmm_(xh[t].transpose(1, 2), dz)
            dxh = torch.bmm(dz, back)
            dx[t], dh, dc = dxh[..., :inputs], dxh[..., inputs + 1 :], dc * f
        return dx[:-1], dW, dh, dc


class StackedLSTM(nn.Module):
    def __init__(self, copies, in_features, width, *, generator=None):
        super().__init__()
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(copies, in_features + 1 + width, 4 * width).uniform_(-bound, bound, generator=generator))
        scale = torch.ones(4 * width)
        scale[2 * width : 3 * width] = 2
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x, state=None):
        steps, copies, batch, _ = x.shape
        if state is None:
            zero = x.new_zeros(copies, batch, self.weight.shape[-1] // 4)
            state = zero, zero
        h, c = _Recurrence.apply(x, self.weight * self.scale, *state)
        return h.permute(1,2,0,3).contiguous(), (h[-1], c)


class _Pointing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keys, query, v):
        t = torch.add((2 * keys)[:, :, None], (2 * query)[:, :, :, None]).sigmoid_().mul_(2).sub_(1)
        ctx.save_for_backward(t, v)
        return torch.linalg.vecdot(t, v[:, None, None, None])

    @staticmethod
    def backward(ctx, du):
        t, v = ctx.saved_tensors
        dv = torch.bmm(du.flatten(1)[:, None], t.flatten(1, 3))[:, 0]
        back = torch.addcmul(du[..., None], t, t * du[..., None], value=-1)
        v = v[:, None, None]
        return back.sum(2) * v, back.sum(3) * v, dv

pointing = _Pointing.apply

def heads(linear, x):
    return linear(x.flatten(1, 2)).unflatten(1, x.shape[1:3])

class Pointer(nn.Module):
    def __init__(self, copies, width, dictionary, g):
        super().__init__()
        self.W1, self.W2 = StackedLinear(copies, width, width, generator=g), StackedLinear(copies, width, width, generator=g)
        b = width**-0.5
        self.v = nn.Parameter(torch.empty(copies, width).uniform_(-b, b, generator=g))
        self.end = nn.Parameter(torch.empty(copies, 1, 1, width).uniform_(-b, b, generator=g))
    def forward(self, e, d, labels):
        e = torch.cat([e, self.end.expand(-1, e.shape[1], -1, -1)], 2)
        return pointing(heads(self.W1, e), heads(self.W2, d), self.v).log_softmax(-1)

def positions(logits, labels):
    logp = logits.log_softmax(-1)
    C, B, M, V = logits.shape
    n = labels.shape[-1]
    return torch.cat([logp.gather(-1, labels[:, :, None].expand(C, B, M, n)), logp[..., -1:]], -1)

class Attention(nn.Module):
    def __init__(self, copies, width, dictionary, g):
        super().__init__()
        self.W1, self.W2 = StackedLinear(copies, width, width, generator=g), StackedLinear(copies, width, width, generator=g)
        b = width**-0.5
        self.v = nn.Parameter(torch.empty(copies, width).uniform_(-b, b, generator=g))
        self.out = StackedLinear(copies, 2 * width, dictionary + 1, generator=g)
    def forward(self, e, d, labels):
        C, B, n, H = e.shape
        a = pointing(heads(self.W1, e), heads(self.W2, d), self.v).softmax(-1)
        context = torch.bmm(a.flatten(0, 1), e.flatten(0, 1)).unflatten(0, (C, B))
        return positions(heads(self.out, torch.cat([d, context], -1)), labels)

class Plain(nn.Module):
    def __init__(self, copies, width, dictionary, g):
        super().__init__()
        self.out = StackedLinear(copies, width, dictionary + 1, generator=g)
    def forward(self, e, d, labels):
        return positions(heads(self.out, d), labels)

KINDS = {"pointer": Pointer, "attention": Attention, "named attention": Attention, "plain": Plain}

class Race(nn.Module):
    def __init__(self, kinds, seeds, width=32, dictionary=15, generator=None):
        super().__init__()
        self.kinds, self.seeds, self.dictionary = kinds, seeds, dictionary
        C = len(kinds) * seeds
        self.feat = 2 + (dictionary if "named attention" in kinds else 0)
        self.encoder = StackedLSTM(C, self.feat, width, generator=generator)
        self.decoder = StackedLSTM(C, self.feat, width, generator=generator)
        b = width**-0.5
        self.start = nn.Parameter(torch.empty(C, 1, 1, self.feat).uniform_(-b, b, generator=generator))
        self.heads = nn.ModuleList(KINDS[k](seeds, width, dictionary, generator) for k in kinds)

    def inputs(self, points, names=None):
        S, B, n, _ = points.shape
        plain = torch.arange(n).expand(S, B, n)
        xs, ls = [], []
        for k in self.kinds:
            l = names if k == "named attention" else plain
            ls.append(l)
            if self.feat > 2:
                o = torch.nn.functional.one_hot(l, self.dictionary).to(points) if k == "named attention" else points.new_zeros(S, B, n, self.dictionary)
                xs.append(torch.cat([points, o], -1))
            else: xs.append(points)
        return torch.cat(xs), ls

    def encode(self, x):
        return self.encoder(x.permute(2, 0, 1, 3))

    def read(self, e, d, labels):
        return torch.cat([h(a, b, l) for h, a, b, l in zip(self.heads, e.split(self.seeds), d.split(self.seeds), labels)])

    def forward(self, points, targets, names=None):
        x, labels = self.inputs(points, names)
        C, B, n, F = x.shape
        e, state = self.encode(x)
        t = targets.repeat(len(self.kinds), 1, 1)[:, :, :-1].clamp(0, n - 1)
        prev = x.gather(2, t[..., None].expand(-1, -1, -1, F))
        prev = torch.cat([self.start.expand(-1, B, -1, -1), prev], 2).permute(2, 0, 1, 3)
        d, _ = self.decoder(prev, state)
        return self.read(e, d, labels)


def sort_points(points):
    return points.gather(-2, points[..., :1].argsort(-2).expand_as(points))

def convex_hull(points):
    """(batch, n, 2) -> (batch, n+1) ccw from index 0.. padded with n"""
    N, n, _ = points.shape
    edge = points[:, None] - points[:, :, None]           # N,i,j,2 : p_j - p_i
    cross = edge[:, :, :, None, 0] * edge[:, :, None, :, 1] - edge[:, :, :, None, 1] * edge[:, :, None, :, 0]
    eye = torch.eye(n, dtype=torch.bool)
    ok = (cross > 0) | eye[None, :, None, :] | eye[None, None]
    nxt = (ok.all(-1) & ~eye)
    on = nxt.any(-1)
    succ = nxt.int().argmax(-1)
    first = on.int().argmax(-1)
    out = torch.full((N, n + 1), n)
    at, done = first, torch.zeros(N, dtype=torch.bool)
    for k in range(n):
        out[:, k] = torch.where(done, n, at)
        at = succ.gather(1, at[:, None])[:, 0]
        done = done | (at == first)
    return out
