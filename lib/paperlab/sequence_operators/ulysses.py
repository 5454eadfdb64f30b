r"""Ulysses: attention over a sequence that no device holds, by trading tokens for heads.

A sequence too long for one device is cut into P pieces. Everything in a Transformer but attention works token by token;
attention works head by head. One all-to-all turns "my tokens, all heads" into "all tokens, my heads", another one turns
back, and what a device sends is in proportion to its own piece.

The schemes are written once, against a `Group` of ranks that can only exchange messages. Two kinds of group carry
them: all ranks in this process, or one of them without the others (`Simulated`), and one rank a process on
``torch.distributed`` (`Distributed`). A list of tensors, "shards", has one for each rank that lives in this process.

Jacobs, Tanaka, Zhang, Zhang, Song, Rajbhandari and He, "DeepSpeed Ulysses: System Optimizations for Enabling Training
of Extreme Long Sequence Transformer Models" (2023), https://arxiv.org/abs/2309.14509.
"""

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch import distributed as dist
from torch.multiprocessing import start_processes
from torch.nn import functional as F

from paperlab.checks import require_at_least, require_between

Heads = list[Float[Tensor, "_ _ dim"]]  # tokens, heads, dim of a head; of the ranks in this process
Boxes = list[dict[int, Tensor]]


class Group:
    """Ranks that share nothing and send each other messages; every message is counted as it is handed over.

    ``ranks`` are those that live in this process, by default all. ``sent[direction, rank]`` counts bytes and
    ``messages[direction, rank]`` messages, to *other* ranks only; the direction is "forward" or "backward".

    The four collectives are differentiable, and take and return one tensor for each rank here:

    - ``all_to_all``: slice d of axis 0 (length P) goes to rank d, slice s of the result came from rank s;
    - ``all_gather``: the tensors of all ranks, stacked on a new axis 0;
    - ``reduce_scatter``: slice d of axis 0 (length P), summed over the ranks, ends on rank d;
    - ``shift``: everyone sends to the next rank and receives from the one before.

    A subclass says how messages travel: its ``deliver(outboxes, inboxes)`` carries, for each rank here, ``outbox[k]``
    to the rank k further on, and fills ``inbox[k]`` with what comes from k back.

    Raises:
        ValueError: ``size`` is less than 1, or a rank is outside 0 to ``size - 1``.
    """

    def __init__(self, size: int, ranks: Iterable[int] | None = None) -> None:
        require_at_least(1, size=size)
        self.size, self.ranks = size, list(range(size) if ranks is None else ranks)
        require_between(0, size - 1, ranks=self.ranks)
        self.sent, self.messages = Counter(), Counter()

    def collective(self, name: str, shards: Sequence[Tensor]) -> list[Tensor]:
        """One of the four collectives by its name, with a gradient.

        Raises:
            ValueError: not one of ``shards`` for each rank here, or one whose axis 0 should have length P and has not.
        """
        if len(shards) != len(self.ranks):
            raise ValueError(f"shards must be {len(self.ranks)}, one for each rank here, got {len(shards)}")
        if name in ("all_to_all", "reduce_scatter") and any(x.shape[:1] != (self.size,) for x in shards):
            shapes = ", ".join(str(tuple(x.shape)) for x in shards)
            raise ValueError(f"shards must have {self.size} slices on axis 0, one for each rank, got shapes {shapes}")
        return list(_Collective.apply(self, name, *shards))

    all_to_all = partialmethod(collective, "all_to_all")
    all_gather = partialmethod(collective, "all_gather")
    reduce_scatter = partialmethod(collective, "reduce_scatter")
    shift = partialmethod(collective, "shift")

    def run(self, name: str, shards: Sequence[Tensor], direction: str) -> list[Tensor]:
        """A collective without a gradient; its bytes are counted under ``direction``."""
        self._direction = direction
        return getattr(self, f"_{name}")(shards)

    def _exchange(self, outboxes: Boxes, inboxes: Boxes) -> None:
        for rank, outbox, inbox in zip(self.ranks, outboxes, inboxes, strict=True):
            if 0 in outbox:  # what a rank keeps is no communication
                inbox.pop(0).copy_(outbox.pop(0))
            for message in outbox.values():
                self.sent[self._direction, rank] += message.numel() * message.element_size()
                self.messages[self._direction, rank] += 1
        self.deliver(outboxes, inboxes)

    def _all_to_all(self, shards: Sequence[Tensor]) -> list[Tensor]:
        out, offsets = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in shards], range(self.size)
        self._exchange(
            [{k: x[(r + k) % self.size] for k in offsets} for r, x in zip(self.ranks, shards, strict=True)],
            [{k: x[(r - k) % self.size] for k in offsets} for r, x in zip(self.ranks, out, strict=True)],
        )
        return out

    def _all_gather(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return self._all_to_all([x.expand(self.size, *x.shape) for x in shards])  # the same message to everyone

    def _reduce_scatter(self, shards: Sequence[Tensor]) -> list[Tensor]:
        total = [x[r].clone() for r, x in zip(self.ranks, shards, strict=True)]
        for k in range(1, self.size):  # one message at a time: the sum needs no room for all of them
            new = [torch.empty_like(t) for t in total]
            self._exchange(
                [{k: x[(r + k) % self.size]} for r, x in zip(self.ranks, shards, strict=True)],
                [{k: t} for t in new],
            )
            total = [t.add_(part) for t, part in zip(total, new, strict=True)]
        return total

    def _shift(self, shards: Sequence[Tensor], by: int = 1) -> list[Tensor]:
        out = [torch.empty_like(x) for x in shards]
        self._exchange([{by % self.size: x} for x in shards], [{by % self.size: y} for y in out])
        return out

    _shift_back = partialmethod(_shift, by=-1)


class _Collective(torch.autograd.Function):
    """A collective is a linear map between ranks; gradients travel by its transpose."""

    transposes = {"all_gather": "reduce_scatter", "reduce_scatter": "all_gather", "shift": "shift_back"}  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, group: Group, name: str, *shards: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.transpose = group, _Collective.transposes.get(name, name)
        return tuple(group.run(name, shards, "forward"))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        return None, None, *ctx.group.run(ctx.transpose, grads, "backward")


class Simulated(Group):
    """Ranks in this process: all of them, or rank r alone, ``Simulated(P, [r])``. A message is a copy between tensors.

    The peers of a rank alone are shams that send it back what it sent: the values are wrong, counts and sizes are not.
    On torch's meta device, whose tensors have a shape and no contents, a rank's share of any size runs in no time.
    """

    def deliver(self, outboxes: Boxes, inboxes: Boxes) -> None:
        """Copy every message into its place."""
        for rank, inbox in enumerate(inboxes):
            for k, slot in inbox.items():
                slot.copy_(outboxes[(rank - k) % len(outboxes)][k])


class Distributed(Group):
    """This process is one rank of ``torch.distributed``'s default group; a message is a send and a receive."""

    def __init__(self) -> None:
        super().__init__(dist.get_world_size(), [dist.get_rank()])

    def deliver(self, outboxes: Boxes, inboxes: Boxes) -> None:
        """Send and receive all messages at once, and wait for them."""
        (rank,), (outbox,), (inbox,) = self.ranks, outboxes, inboxes
        sends = [dist.P2POp(dist.isend, x.contiguous(), (rank + k) % self.size) for k, x in outbox.items()]
        receives = [dist.P2POp(dist.irecv, slot, (rank - k) % self.size) for k, slot in inbox.items()]
        for work in dist.batch_isend_irecv(sends + receives) if sends else []:
            work.wait()


def attend(
    q: Float[Tensor, "tokens heads dim"],
    k: Float[Tensor, "keys kv_heads dim"],
    v: Float[Tensor, "keys kv_heads dim"],
    causal: bool = False,
) -> Float[Tensor, "tokens heads dim"]:
    """Ordinary attention on one device, by torch's fused kernel; fewer key heads serve several query heads each.

    Raises:
        ValueError: the heads of ``q`` are no multiple of those of ``k``.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"heads of q must be a multiple of the {k.shape[1]} heads of k, got {q.shape[1]}")
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) if x.shape[1] < q.shape[1] else x for x in (k, v))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    # A meta tensor would take the unfused path, with a score for every pair of tokens: its kernel is named.
    out = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)[0]
        if q.is_meta
        else F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    )
    return out[0].transpose(0, 1)


def heads_for_tokens(group: Group, shards: Heads) -> Heads:
    """The first all-to-all: from (N/P tokens, H heads) to (N tokens, H/P heads) on every rank.

    Raises:
        ValueError: P does not divide the number of heads, and so in particular there are more ranks than heads.
    """
    if shards[0].shape[1] % group.size:
        raise ValueError(f"heads must be a multiple of {group.size}, the number of ranks, got {shards[0].shape[1]}")
    boxes = group.all_to_all([rearrange(x, "n (p h) d -> p n h d", p=group.size) for x in shards])
    return [rearrange(x, "p n h d -> (p n) h d") for x in boxes]


def tokens_for_heads(group: Group, shards: Heads) -> Heads:
    """The second all-to-all, inverse to the first: from (N tokens, H/P heads) to (N/P tokens, H heads).

    Raises:
        ValueError: P does not divide the number of tokens.
    """
    if len(shards[0]) % group.size:
        raise ValueError(f"tokens must be a multiple of {group.size}, the number of ranks, got {len(shards[0])}")
    dealt = [rearrange(x, "(p n) h d -> p n h d", p=group.size) for x in shards]
    return [rearrange(x, "p n h d -> n (p h) d") for x in group.all_to_all(dealt)]


def ulysses(group: Group, q: Heads, k: Heads, v: Heads, attention: Callable = attend) -> Heads:
    """Attention over the whole sequence, of which each rank holds N/P tokens; section 3.1 of the paper.

    ``attention`` sees all tokens in order and some of the heads, and may be anything. Where keys and values have fewer
    heads than there are ranks (grouped queries), they are copied until every rank gets one.

    Raises:
        ValueError: heads cannot be dealt: those of ``q``, or those of ``k``, which may also divide the ranks.
    """
    P, kv_heads = group.size, k[0].shape[1]
    if kv_heads < P:
        if P % kv_heads:
            raise ValueError(f"heads of k must divide {P} ranks or be a multiple of them, got {kv_heads}")
        k, v = ([x.repeat_interleave(P // kv_heads, 1) for x in shards] for shards in (k, v))
    q, k, v = (heads_for_tokens(group, shards) for shards in (q, k, v))
    return tokens_for_heads(group, [attention(*qkv) for qkv in zip(q, k, v, strict=True)])


def _scores(q: Tensor, k: Tensor, order: Tensor | None, rank: int, source: int) -> Tensor:
    """Scaled scores (heads, queries, keys) of one block, -inf where a key stands behind the query."""
    scores = torch.einsum("nhd,mhd->hnm", q, k) * q.shape[-1] ** -0.5
    return scores if order is None else scores.masked_fill(order[rank][:, None] < order[source], -torch.inf)


class _Ring(torch.autograd.Function):
    """Ring attention, forward and backward: keys and values go round, nothing of length N is ever held."""

    @staticmethod
    def forward(ctx: Any, group: Group, order: Tensor | None, *qkv: Tensor) -> tuple[Tensor, ...]:
        blocks, out = [x[1:] for x in qkv], [torch.zeros_like(x[0]) for x in qkv]
        lse = [x.new_full((x.shape[2], x.shape[1]), -torch.inf) for x in qkv]  # log of the softmax's denominator so far
        for step in range(group.size):
            for i, rank in enumerate(group.ranks):
                scores = _scores(qkv[i][0], blocks[i][0], order, rank, (rank - step) % group.size)
                total = torch.logaddexp(lse[i], scores.logsumexp(-1))
                new = torch.einsum("hnm,mhd->nhd", (scores - total[..., None]).exp(), blocks[i][1])
                out[i], lse[i] = out[i] * (lse[i] - total).exp().mT[..., None] + new, total
            if step < group.size - 1:
                blocks = group.run("shift", blocks, "forward")
        ctx.group, ctx.order = group, order
        ctx.save_for_backward(*qkv, *out, *lse)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        group, here = ctx.group, len(grads)
        qkv, out, lse = (ctx.saved_tensors[i * here : (i + 1) * here] for i in range(3))
        parcels = [torch.cat([x[1:], torch.zeros_like(x[1:])]) for x in qkv]  # keys, values, and their gradients so far
        dq = [torch.zeros_like(x[0]) for x in qkv]
        for step in range(group.size):
            for i, rank in enumerate(group.ranks):
                (q, _, _), (k, v, dk, dv), g = qkv[i], parcels[i], grads[i]
                weights = (_scores(q, k, ctx.order, rank, (rank - step) % group.size) - lse[i][..., None]).exp()
                dv += torch.einsum("hnm,nhd->mhd", weights, g)
                ds = torch.einsum("nhd,mhd->hnm", g, v) - (g * out[i]).sum(-1).mT[..., None]
                ds *= weights * q.shape[-1] ** -0.5
                dq[i] += torch.einsum("hnm,mhd->nhd", ds, k)
                dk += torch.einsum("hnm,nhd->mhd", ds, q)
            last = step == group.size - 1  # keys and values have been everywhere; their gradients have one step to go
            parcels = group.run("shift", [x[2:] if last else x for x in parcels], "backward")
        return None, None, *(torch.cat([a[None], b]) for a, b in zip(dq, parcels, strict=True))


def ring(group: Group, q: Heads, k: Heads, v: Heads, order: Int[Tensor, "ranks tokens"] | None = None) -> Heads:
    """The rival (Liu et al., 2023): queries stay, keys and values circulate, softmax is accumulated on the way.

    ``order`` gives the place in the text of each rank's tokens and makes it causal; None: every token sees every other.
    The backward pass circulates keys and values again, with their gradients. Any number of ranks will do.

    Raises:
        ValueError: keys have other heads than queries (copy them before), or ``order`` does not fit.
    """
    if q[0].shape != k[0].shape:
        raise ValueError(f"k must have the shape of q, {tuple(q[0].shape)}, got {tuple(k[0].shape)}")
    if order is not None and order.shape != (group.size, len(q[0])):
        raise ValueError(f"order must have shape {(group.size, len(q[0]))}, got {tuple(order.shape)}")
    return list(_Ring.apply(group, order, *(torch.stack(qkv) for qkv in zip(q, k, v, strict=True))))


def matrices(weights: Float[Tensor, "heads 12 dim h"]) -> tuple[Float[Tensor, "rows h"], ...]:
    """Query-key-value, output, up and down matrix of a Transformer layer of width h, for some or all of its heads.

    A head's share of a layer is 12 slabs of d × h: one each for query, key, value and output, and 4 each for the way up
    to its 4 d hidden units and down again. So the layer is one tensor, and its P slices along the heads are both what a
    rank stores under ZeRO-3, where they are gathered to compute, and what it computes with in tensor parallelism.
    """
    return tuple(part.flatten(0, 2) for part in weights.split([3, 1, 4, 4], 1))


def sequence_layer(
    group: Group, shards: list[Tensor], weights: list[Tensor], mix: Callable[..., Heads]
) -> list[Float[Tensor, "tokens h"]]:
    """A pre-norm Transformer layer on N/P tokens a rank; all of it is local but attention, ``mix(group, q, k, v)``.

    ``weights`` are whole on each rank, (heads, 12, dim, h) as in `matrices`.
    """
    qkv, out, up, down = zip(*map(matrices, weights), strict=True)
    parts = [
        F.linear(F.layer_norm(x, x.shape[-1:]), w).unflatten(-1, (len(weights[0]), 3, -1)).unbind(2)
        for x, w in zip(shards, qkv, strict=True)
    ]
    mixed = mix(group, *map(list, zip(*parts, strict=True)))
    shards = [x + a.flatten(1) @ w for x, a, w in zip(shards, mixed, out, strict=True)]
    return [
        x + F.gelu(F.linear(F.layer_norm(x, x.shape[-1:]), u)) @ d for x, u, d in zip(shards, up, down, strict=True)
    ]


def megatron_layer(
    group: Group, shards: list[Tensor], weights: list[Tensor], attention: Callable = attend
) -> list[Float[Tensor, "tokens h"]]:
    """The same layer in Megatron's way: a rank has N/P tokens and the ``weights`` of H/P heads, (H/P, 12, dim, h).

    Two all-gathers and two reduce-scatters of N × h forward (Korthikanti et al., 2022). What was gathered is not kept,
    but gathered again in the backward pass.
    """
    qkv, out, up, down = zip(*map(matrices, weights), strict=True)
    rows = _GatheredProduct.apply(group, *(F.layer_norm(x, x.shape[-1:]) for x in shards), *qkv)
    mixed = [attention(*y.unflatten(-1, (len(weights[0]), 3, -1)).unbind(2)).flatten(1) for y in rows]
    shards = _add_sums(group, shards, mixed, out)
    rows = _GatheredProduct.apply(group, *(F.layer_norm(x, x.shape[-1:]) for x in shards), *up)
    return _add_sums(group, shards, map(F.gelu, rows), down)


def _add_sums(group: Group, shards: list[Tensor], parts: Iterable[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    sums = group.reduce_scatter([(y @ w).unflatten(0, (group.size, -1)) for y, w in zip(parts, weights, strict=True)])
    return [x + y for x, y in zip(shards, sums, strict=True)]


class _GatheredProduct(torch.autograd.Function):
    """All tokens times this rank's columns; only the rank's own tokens are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, here = group, len(group.ranks)
        ctx.save_for_backward(*tensors)  # the rank's own tokens, and not all
        whole = group.run("all_gather", tensors[:here], "forward")
        return tuple(F.linear(x.flatten(0, 1), w) for x, w in zip(whole, tensors[here:], strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        group, shards, matrices = ctx.group, ctx.saved_tensors[: len(grads)], ctx.saved_tensors[len(grads) :]
        # Nothing holds on to what is gathered here: when the next line begins, it is gone.
        dw = [g.mT @ x.flatten(0, 1) for x, g in zip(group.run("all_gather", shards, "backward"), grads, strict=True)]
        dx = [(g @ w).unflatten(0, (group.size, -1)) for g, w in zip(grads, matrices, strict=True)]
        return None, *group.run("reduce_scatter", dx, "backward"), *dw


def in_processes(size: int, job: Callable[..., Any], *arguments: Any, timeout: float = 60.0) -> list[Any]:
    """Run ``job(Distributed(), *arguments)`` in ``size`` processes, one a rank, on gloo; returns their results.

    The processes are forked: they start at once and may run any function, but must not touch an accelerator. They meet
    through a file, talk over the loopback device, and have ended in any case when this returns.

    Raises:
        ValueError: ``size`` is less than 1, or the system cannot fork.
        TimeoutError: not all of them are done after ``timeout`` seconds.
        torch.multiprocessing.ProcessException: one failed; its traceback is in the message.
    """
    require_at_least(1, size=size)
    end = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        crew = start_processes(
            _work, (size, folder, timeout, job, arguments), size, join=False, daemon=True, start_method="fork"
        )
        try:
            while not crew.join(max(0.0, end - time.monotonic())):
                if time.monotonic() >= end:
                    raise TimeoutError(f"{size} processes were not done within {timeout:g} seconds")
        finally:
            for process in crew.processes:
                process.kill()
                process.join()
            for report in crew.error_files:  # torch leaves the traceback of a failed process behind
                Path(report).unlink(missing_ok=True)
        return [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(size)]


def _work(rank: int, size: int, folder: str, timeout: float, job: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)  # a forked process must not wait for threads that stayed behind
    if os.path.exists("/sys/class/net/lo"):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        rank=rank,
        world_size=size,
        store=dist.FileStore(f"{folder}/store", size),
        timeout=timedelta(seconds=timeout),
    )
    torch.save(job(Distributed(), *arguments), f"{folder}/{rank}")
    dist.barrier()  # nobody hangs up while another is still listening
    dist.destroy_process_group()
