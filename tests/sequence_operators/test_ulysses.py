"""Ulysses and its rivals against PyTorch's own encoder layer, collectives and processes, and closed forms."""

import contextlib
import multiprocessing
import os
import socket
import struct
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

from paperlab.nn.live_bytes import LiveBytes
from paperlab.sequence_operators import ulysses as uly

F64 = torch.float64
HEADS, DIM, TOKENS = 8, 4, 32
WIDTH = HEADS * DIM


def draws(*shape, seed=0, dtype=F64, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype, **options)


def pieces(x, group):
    """The part of each rank in this process."""
    return [x.chunk(group.size)[rank] for rank in group.ranks]


def oracle(q, k, v, causal=False):
    """Attention by scores, softmax and weights, in so many words; (tokens, heads, dim)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, k) / q.shape[-1] ** 0.5
    if causal:
        scores = scores + torch.full_like(scores[0], -torch.inf).triu(1)
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v)


def encoder_layer(weights):
    """PyTorch's own layer with our weights."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0, F.gelu, norm_first=True, bias=False, dtype=F64)
    with torch.no_grad():
        layer.self_attn.in_proj_weight.copy_(weights[:, :3].transpose(0, 1).reshape(-1, WIDTH))
        layer.self_attn.out_proj.weight.copy_(weights[:, 3].reshape(-1, WIDTH).T)
        layer.linear1.weight.copy_(weights[:, 4:8].reshape(-1, WIDTH))
        layer.linear2.weight.copy_(weights[:, 8:].reshape(-1, WIDTH).T)
    return layer


def layer_step(group, scheme, x, weights, upstream, causal):
    """Output, gradient of the input and of this process's share of the weights, bytes forward and backward."""
    shards = [t.clone().requires_grad_() for t in pieces(x, group)]
    stored = [t.clone().requires_grad_() for t in pieces(weights, group)]
    if scheme == "megatron":
        out = uly.megatron_layer(group, shards, stored, partial(uly.attend, causal=causal))
    else:
        whole = [w.flatten(0, 1) for w in group.all_gather(stored)]
        order = torch.arange(len(x)).view(group.size, -1) if causal else None
        mix = {"ulysses": partial(uly.ulysses, attention=partial(uly.attend, causal=causal)),
               "ring": partial(uly.ring, order=order)}[scheme]  # fmt: skip
        out = uly.sequence_layer(group, shards, whole, mix)
    torch.autograd.backward(out, pieces(upstream, group))
    grads = ([t.grad for t in part] for part in (shards, stored))
    sent = [[group.sent[way, r] for r in group.ranks] for way in ("forward", "backward")]
    return *(torch.cat(part).detach() for part in ([o.detach() for o in out], *grads)), *sent


def problem(seed=0):
    return (draws(TOKENS, WIDTH, seed=seed), 0.3 * draws(HEADS, 12, DIM, WIDTH, seed=seed + 100),
            draws(TOKENS, WIDTH, seed=seed + 200))  # fmt: skip


def reference(x, weights, upstream, causal):
    layer, x = encoder_layer(weights), x.clone().requires_grad_()
    mask = nn.Transformer.generate_square_subsequent_mask(len(x), dtype=F64) if causal else None
    out = layer(x[:, None], src_mask=mask)[:, 0]
    out.backward(upstream)
    a, b = layer.self_attn, (layer.linear1.weight.grad, layer.linear2.weight.grad.T)
    qkv = a.in_proj_weight.grad.view(3, HEADS, DIM, WIDTH).transpose(0, 1)
    slabs = (g.reshape(HEADS, -1, DIM, WIDTH) for g in (a.out_proj.weight.grad.T, *b))
    return out.detach(), x.grad, torch.cat([qkv, *slabs], 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("scheme", ["ulysses", "megatron", "ring"])
def test_a_layer_and_its_gradients_equal_torchs_encoder_layer(scheme, ranks, causal):
    x, weights, upstream = problem(ranks)
    found = layer_step(uly.Simulated(ranks), scheme, x, weights, upstream, causal)
    for ours, theirs in zip(found, reference(x, weights, upstream, causal), strict=False):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_one_device_attention_equals_the_formula():
    q, k, v = draws(3, 16, HEADS, DIM)
    for causal in (False, True):
        torch.testing.assert_close(uly.attend(q, k, v, causal), oracle(q, k, v, causal))
    torch.testing.assert_close(uly.attend(q, k[:, :2], v[:, :2]), oracle(q, k[:, :2], v[:, :2]))


def test_any_local_attention_will_do():
    """A sliding window, and one that is no attention at all: a running mean of the values."""
    group, (q, k, v) = uly.Simulated(4), draws(3, TOKENS, HEADS, DIM)

    def window(q, k, v):
        near = (torch.arange(len(q))[:, None] - torch.arange(len(q))).abs() < 5
        return F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=near).transpose(0, 1)

    def running_mean(q, k, v):
        return v.cumsum(0) / torch.arange(1, len(v) + 1, dtype=F64)[:, None, None]

    for local in (window, running_mean):
        out = uly.ulysses(group, *(pieces(x, group) for x in (q, k, v)), local)
        torch.testing.assert_close(torch.cat(out), local(q, k, v))


def test_without_the_exchange_the_result_is_another():
    group, (q, k, v) = uly.Simulated(4), draws(3, TOKENS, HEADS, DIM)
    cut = torch.cat([uly.attend(*x) for x in zip(*(pieces(t, group) for t in (q, k, v)), strict=True)])
    assert (cut - oracle(q, k, v)).abs().max() > 0.1


def test_the_second_all_to_all_undoes_the_first_and_owners_are_right():
    group, x = uly.Simulated(4), draws(TOKENS, HEADS, DIM)
    dealt = uly.heads_for_tokens(group, pieces(x, group))
    for rank, mine in enumerate(dealt):
        assert torch.equal(mine, x[:, 2 * rank : 2 * rank + 2])  # all tokens, heads 2r and 2r + 1
    assert torch.equal(torch.cat(uly.tokens_for_heads(group, dealt)), x)


@pytest.mark.parametrize("name", ["all_to_all", "all_gather", "reduce_scatter", "shift"])
def test_collectives_and_their_gradients(name):
    """By definition, and <A x, y> = <x, A* y>: the gradient is the transposed map."""
    P, group = 4, uly.Simulated(4)
    shape = (3,) if name in ("all_gather", "shift") else (P, 3)
    x = [draws(*shape, seed=r).requires_grad_() for r in range(P)]
    out = group.collective(name, x)
    expected = {
        "all_to_all": lambda r: torch.stack([x[s][r] for s in range(P)]),
        "all_gather": lambda r: torch.stack(x),
        "reduce_scatter": lambda r: sum(x[s][r] for s in range(P)),
        "shift": lambda r: x[(r - 1) % P],
    }[name]
    for r in range(P):
        torch.testing.assert_close(out[r], expected(r))
    y = [draws(*o.shape, seed=50 + r) for r, o in enumerate(out)]
    torch.autograd.backward(out, y)
    ours = sum((a.detach() * a.grad).sum() for a in x)
    torch.testing.assert_close(ours, sum((o.detach() * b).sum() for o, b in zip(out, y, strict=True)))
    assert torch.autograd.gradcheck(lambda *t: tuple(uly.Simulated(P).collective(name, t)), x)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("layout", ["dense", "in order", "zigzag"])
def test_ring_attention_in_any_layout_and_with_more_ranks_than_heads(layout, ranks):
    tokens = torch.arange(TOKENS)
    if layout == "zigzag":  # rank r has pieces r and 2P - 1 - r
        pairs = tokens.view(2, ranks, -1)
        tokens = torch.cat([pairs[0], pairs[1].flip(0)], 1).flatten()
    q, k, v = (draws(3, TOKENS, HEADS, DIM)[:, tokens]).requires_grad_()
    group, upstream = uly.Simulated(ranks), draws(TOKENS, HEADS, DIM, seed=9)
    order = None if layout == "dense" else tokens.view(ranks, -1)
    out = torch.cat(uly.ring(group, *(pieces(x, group) for x in (q, k, v)), order))
    ours = torch.autograd.grad((out * upstream).sum(), (q, k, v))
    back = tokens.argsort()
    expected = oracle(q[back], k[back], v[back], layout != "dense")[tokens]
    theirs = torch.autograd.grad((expected * upstream).sum(), (q, k, v))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(ours, theirs)
    n = TOKENS // ranks * HEADS * DIM * 8
    assert {group.sent["forward", r] for r in range(ranks)} == {2 * n * (ranks - 1)}
    assert {group.sent["backward", r] for r in range(ranks)} == {(4 * (ranks - 1) + 2) * n * (ranks > 1)}


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_grouped_queries_with_fewer_key_heads_than_ranks(kv_heads):
    group, q = uly.Simulated(4), draws(TOKENS, HEADS, DIM)
    k, v = draws(2, TOKENS, kv_heads, DIM, seed=1)
    out = uly.ulysses(group, *(pieces(x, group) for x in (q, k, v)))
    torch.testing.assert_close(torch.cat(out), oracle(q, k, v))
    sent = max(kv_heads, 4)  # heads of k and of v on the way
    assert group.sent["forward", 0] == (2 * HEADS + 2 * sent) * DIM * TOKENS // 4 * 3 // 4 * 8


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_counted_bytes_equal_the_closed_forms(ranks):
    x, weights, upstream = problem()
    share = TOKENS * WIDTH * (ranks - 1) * 8 // ranks  # N h (P - 1) / P elements of 8 bytes
    zero = weights.numel() * (ranks - 1) * 8 // ranks
    expected = {
        "ulysses": (4 * share // ranks + zero, 4 * share // ranks + zero),
        "megatron": (4 * share, 6 * share),  # backward gathers two inputs again
        "ring": (2 * share + zero, 4 * share + 2 * TOKENS * WIDTH * 8 // ranks * (ranks > 1) + zero),
    }
    for scheme, (forward, backward) in expected.items():
        group = uly.Simulated(ranks)
        layer_step(group, scheme, x, weights, upstream, False)
        assert [group.sent["forward", r] for r in range(ranks)] == [forward] * ranks
        assert [group.sent["backward", r] for r in range(ranks)] == [backward] * ranks
        if ranks == 1:
            assert sum(group.sent.values()) == sum(group.messages.values()) == 0


@pytest.mark.parametrize("scheme", ["ulysses", "megatron", "ring"])
def test_a_rank_alone_counts_the_same_and_needs_the_same_memory_without_contents(scheme):
    x, weights, upstream = problem()
    together, alone = uly.Simulated(4), [uly.Simulated(4, [r]) for r in range(4)]
    everyone = layer_step(together, scheme, x, weights, upstream, True)
    for rank, group in enumerate(alone):
        assert layer_step(group, scheme, x, weights, upstream, True)[3:] == ([everyone[3][rank]], [everyone[4][rank]])
    assert together.messages["forward", 2] == alone[2].messages["forward", 2] > 0
    peaks = []
    for device in ("cpu", "meta"):
        tensors = [t.to(device) for t in (x, weights, upstream)]
        with LiveBytes() as meter:
            layer_step(uly.Simulated(4, [0]), scheme, *tensors, causal=scheme != "ring")
        peaks.append(meter.peak)
    assert peaks[0] == peaks[1] > 0


def wire():
    """Bytes that the operating system has received for this process by TCP; None where it does not tell."""
    total = None
    for fd in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):
            if os.readlink(fd).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(fd.name))) as s:
                    if s.family in (socket.AF_INET, socket.AF_INET6) and s.type == socket.SOCK_STREAM:
                        info = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                        if len(info) >= 208:
                            total = (total or 0) + struct.unpack_from("Q", info, 128)[0]  # tcpi_bytes_received
    return total


def everything(group, x, weights, upstream):
    """What one process has to say; several questions for one start of the processes."""
    report = {s: layer_step(uly.Distributed(), s, x, weights, upstream, True) for s in ("ulysses", "megatron", "ring")}
    native = draws(group.size, 3, seed=group.ranks[0])
    want, summed = torch.empty_like(native), torch.empty(3, dtype=F64)
    dist.all_to_all_single(want, native)
    report["all_to_all"] = torch.equal(group.run("all_to_all", [native], "forward")[0], want)
    gathered = [torch.empty_like(native) for _ in range(group.size)]
    dist.all_gather(gathered, native)
    report["all_gather"] = torch.equal(group.run("all_gather", [native], "forward")[0], torch.stack(gathered))
    dist.reduce_scatter(summed, list(native.unbind()))
    report["reduce_scatter"] = torch.allclose(group.run("reduce_scatter", [native], "forward")[0], summed)
    heads, before, counted = draws(4096, HEADS, 8), wire(), group.sent["forward", group.ranks[0]]
    dist.barrier()  # nobody sends before everyone has looked
    uly.ulysses(group, *([heads], [heads], [heads]), lambda q, k, v: v)
    report["wire"] = (wire() or 0) - (before or 0), group.sent["forward", group.ranks[0]] - counted
    dist.barrier()
    with LiveBytes() as meter:
        layer_step(uly.Distributed(), "ulysses", x, weights, upstream, True)
    return report | {"peak": meter.peak, "process": os.getpid()}


def no_processes():
    """Why this machine cannot run real processes, or an empty string."""
    if "fork" not in multiprocessing.get_all_start_methods():
        return "this system cannot fork"
    if not (dist.is_available() and dist.is_gloo_available()):
        return "this build of torch has no gloo"
    return "a forked process cannot use autograd beside an accelerator" if torch.accelerator.is_available() else ""


forked = pytest.mark.skipif(bool(no_processes()), reason=no_processes() or "it can")


@forked
@pytest.mark.parametrize("ranks", [2, 4])
def test_real_processes_agree_with_the_simulation(ranks):
    x, weights, upstream = problem()
    reports = uly.in_processes(ranks, everything, x, weights, upstream, timeout=60)
    assert len({r["process"] for r in reports} | {os.getpid()}) == ranks + 1
    for scheme in ("ulysses", "megatron", "ring"):
        found = [torch.cat([r[scheme][i] for r in reports]) for i in range(3)]
        for ours, theirs in zip(found, reference(x, weights, upstream, True), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
        simulated = layer_step(uly.Simulated(ranks), scheme, x, weights, upstream, True)
        assert [[n for r in reports for n in r[scheme][i]] for i in (3, 4)] == list(simulated[3:])
    assert all(r[name] for r in reports for name in ("all_to_all", "all_gather", "reduce_scatter"))
    with LiveBytes() as meter:
        layer_step(uly.Simulated(ranks, [0]), "ulysses", x, weights, upstream, True)
    assert all(abs(r["peak"] / meter.peak - 1) < 0.05 for r in reports)
    for received, counted in (r["wire"] for r in reports):
        assert counted == 4 * 4096 * HEADS * 8 * 8 * (ranks - 1) // ranks
        if received:  # Linux tells: what each of the others counted for us, and a little that gloo writes on envelopes
            assert counted <= received < 1.01 * counted


def hang(group):
    if group.ranks == [1]:
        time.sleep(600)
    dist.barrier()


def fail(group):
    if group.ranks == [1]:
        raise ArithmeticError("rank 1 has a reason")
    time.sleep(600)  # rank 0 has none, and must not find one when rank 1 hangs up


@forked
def test_a_process_that_hangs_or_fails_is_an_error_and_nothing_stays_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before, began = set(multiprocessing.active_children()), time.monotonic()
    with pytest.raises(TimeoutError, match="not done within 1"):
        uly.in_processes(2, hang, timeout=1)
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="rank 1 has a reason"):
        uly.in_processes(2, fail, timeout=60)
    assert time.monotonic() - began < 30
    assert set(multiprocessing.active_children()) <= before
    assert not list(tmp_path.iterdir())


def test_more_ranks_than_heads_and_other_bad_input_is_named():
    group, x = uly.Simulated(16), draws(TOKENS, HEADS, DIM)
    with pytest.raises(ValueError, match="heads must be a multiple of 16"):
        uly.ulysses(group, *(pieces(x, group) for _ in range(3)))
    with pytest.raises(ValueError, match="heads of k"):
        uly.ulysses(uly.Simulated(4), *(pieces(t, uly.Simulated(4)) for t in (x, x[:, :3], x[:, :3])))
    with pytest.raises(ValueError, match="heads of q"):
        uly.attend(x, x[:, :3], x[:, :3])
    with pytest.raises(ValueError, match="tokens must be a multiple of 16"):
        uly.tokens_for_heads(group, [x[:30, :1]] * 16)
    with pytest.raises(ValueError, match="one for each rank here"):
        group.all_gather([x])
    for name in ("all_to_all", "reduce_scatter"):  # a 17th slice would have been lost without a word
        with pytest.raises(ValueError, match="16 slices on axis 0"):
            group.collective(name, [x[:17]] * 16)
    with pytest.raises(ValueError, match="k must have the shape of q"):
        uly.ring(group, pieces(x, group), pieces(x[:, :2], group), pieces(x[:, :2], group))
    with pytest.raises(ValueError, match="order must have shape"):
        uly.ring(group, *(pieces(x, group) for _ in range(3)), torch.arange(TOKENS).view(2, -1))
    with pytest.raises(ValueError, match="size"):
        uly.Simulated(0)
    with pytest.raises(ValueError, match="ranks"):
        uly.Simulated(2, [2])
    with pytest.raises(ValueError, match="size"):
        uly.in_processes(0, hang)
