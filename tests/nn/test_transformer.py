"""The transformer against torch's own layers, complex numbers, loops, and surgery on its weights."""

import copy
import math

import jaxtyping
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paperlab.devices import generator
from paperlab.nn import transformer
from paperlab.nn.hooks import hook_points
from paperlab.nn.transformer import KVCache, Transformer, TransformerConfig, balance_loss, generate, pick

VOCAB, LAYERS, WIDTH, HEADS, CONTEXT, HIDDEN = 11, 3, 24, 3, 8, 20
BATCH, TOKENS = 2, 7


def build(seed=0, **options):
    config = TransformerConfig(VOCAB, LAYERS, WIDTH, HEADS, CONTEXT, HIDDEN, **options)
    model = Transformer(config, generator=generator(seed)).double()
    with torch.no_grad():  # larger weights than at the start: every mechanism must show in the output
        for p in model.parameters():
            p.mul_(10) if p.ndim > 1 else p.uniform_(0.5, 1.5, generator=generator(1))
    return model


def draw(tokens=TOKENS, batch=BATCH):
    return torch.randint(VOCAB, (batch, tokens), generator=generator(2))


def mlp_of(model, layer):
    return model.blocks[layer].mlp


# --- the forward pass ---------------------------------------------------------------------------------------------


def torch_model(model, x, mask=None, padding=None):
    """The same weights in `nn.TransformerEncoderLayer`, which knows no rotary positions."""
    config = model.config
    h = F.embedding(x, model.embedding.weight)
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, HIDDEN, 0.0, getattr(F, config.activation), batch_first=True, norm_first=True, bias=False
        ).double()
        layer.norm1, layer.norm2 = block.norm_attn, block.norm_mlp
        with torch.no_grad():
            layer.self_attn.in_proj_weight.copy_(torch.cat([getattr(block.attn, f"W_{n}").weight for n in "qkv"]))
            layer.self_attn.out_proj.weight.copy_(block.attn.W_o.weight)
            layer.linear1.weight.copy_(block.mlp.W_in.weight)
            layer.linear2.weight.copy_(block.mlp.W_out.weight)
        h = layer(h, src_mask=mask, src_key_padding_mask=padding)
    rms = h.square().mean(-1, keepdim=True).add(1e-6).sqrt()
    return (h / rms * model.norm_final.weight) @ model.embedding.weight.T


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("causal", [True, False])
def test_forward_is_torchs_encoder_layer(activation, causal):
    model, x = build(rotary=0.0, activation=activation, causal=causal), draw()
    mask = nn.Transformer.generate_square_subsequent_mask(TOKENS, dtype=torch.float64) if causal else None
    torch.testing.assert_close(model(x), torch_model(model, x, mask))


def test_attention_bias_and_padding_are_torchs():
    model, x = build(rotary=0.0, causal=False), draw()
    bias = torch.randn(TOKENS, TOKENS, dtype=torch.float64, generator=generator(3))
    padding = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    padding[0, :2], padding[1, 5:] = True, True
    ours = model(x, attention_bias=bias, padding=padding)
    minus = torch.zeros(BATCH, TOKENS, dtype=torch.float64).masked_fill(padding, -math.inf)
    torch.testing.assert_close(ours[~padding], torch_model(model, x, bias, minus)[~padding])


def test_the_readout_stands_between_the_final_state_and_the_embedding():
    model, x = build(readout=True), draw()
    expected = model.states(x) @ model.W_readout.weight.T @ model.embedding.weight.T
    torch.testing.assert_close(model(x), expected)
    plain = Transformer(model.config, generator=generator(0))
    assert plain.embedding.weight.std().item() == pytest.approx(WIDTH**-0.5, rel=0.2)


def test_bias_of_each_head_and_sequence():
    # A bias that hides key 2 from head 1 of sequence 0 must act there as -inf does, and nowhere else.
    model, x = build(), draw()
    bias = torch.zeros(BATCH, HEADS, TOKENS, TOKENS, dtype=torch.float64)
    bias[0, 1, 3:, 2] = -1e9
    logits, seen = model.run_with_cache(x, "blocks.0.attn.pattern", attention_bias=bias)
    pattern = seen["blocks.0.attn.pattern"]
    assert pattern[0, 1, 3:, 2].max() == 0
    assert (pattern[1, :, 3:, 2] > 0).all()
    torch.testing.assert_close(logits, model(x, attention_bias=bias))
    torch.testing.assert_close(logits[1], model(x)[1])
    one_head = bias[0, 1].expand(HEADS, -1, -1)
    torch.testing.assert_close(model(x, attention_bias=one_head), model(x, attention_bias=bias[0, 1]))


@pytest.mark.parametrize("causal", [True, False])
def test_fused_and_open_attention_agree(causal):
    model, x = build(causal=causal), draw()
    padding = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    padding[0, :3] = True
    bias = torch.randn(HEADS, TOKENS, TOKENS, dtype=torch.float64, generator=generator(3))
    for inputs in ({}, {"padding": padding}, {"attention_bias": bias}, {"padding": padding, "attention_bias": bias}):
        opened, _ = model.run_with_cache(x, lambda name: name.endswith("scores"), **inputs)
        torch.testing.assert_close(model(x, **inputs), opened)
    if causal:
        fused, opened = KVCache(), KVCache()
        for part in x.split([3, 1, 3], dim=1):
            torch.testing.assert_close(model(part, cache=fused), model.run_with_cache(part, cache=opened)[0])


def test_embeddings_in_place_of_tokens():
    model, x = build(), draw()
    torch.testing.assert_close(model(embeddings=model.embedding(x)), model(x))


def test_states_then_unembed_are_the_logits():
    model, x = build(), draw()
    states = model.states(x)
    torch.testing.assert_close(model.unembed(states[:, 2:4]), model(x)[:, 2:4])


# --- who sees whom --------------------------------------------------------------------------------------------------


def changed_by(model, x, position, **inputs):
    """Which outputs move when the token at one position is another."""
    other = x.clone()
    other[:, position] = (other[:, position] + 1) % VOCAB
    return (model(x, **inputs) != model(other, **inputs)).any(-1)


def test_causal_model_sees_the_past_only():
    moved = changed_by(build(), draw(), 3)
    assert not moved[:, :3].any()
    assert moved[:, 3:].all()


def test_bidirectional_model_sees_everything():
    assert changed_by(build(causal=False), draw(), 3).all()


@pytest.mark.parametrize("causal", [True, False])
def test_nobody_sees_padding(causal):
    padding = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    padding[:, 2] = True
    model, x = build(causal=causal), draw()
    moved = changed_by(model, x, 2, padding=padding)
    assert moved.nonzero()[:, 1].unique().tolist() == [2]
    assert model(x, padding=torch.ones_like(padding)).isfinite().all()


# --- positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rotary", "pairs"), [(0.5, 2), (1.0, 4), (0.3, 1)])
def test_scores_are_products_of_complex_numbers(rotary, pairs):
    model, x = build(rotary=rotary), draw()
    _, seen = model.run_with_cache(x, lambda name: name.startswith("blocks.1.attn"))
    q, k = (seen[f"blocks.1.attn.{n}"] for n in "qk")
    scores = q.new_empty(BATCH, HEADS, TOKENS, TOKENS)
    for i in range(TOKENS):
        for j in range(TOKENS):
            total = (q[:, i, :, 2 * pairs :] * k[:, j, :, 2 * pairs :]).sum(-1)
            for m in range(pairs):
                a, b = (torch.complex(t[..., m], t[..., m + pairs]) for t in (q[:, i], k[:, j]))
                total = (
                    total + (a * b.conj() * complex(math.cos(w := (i - j) * 10000 ** (-m / pairs)), math.sin(w))).real
                )
            scores[:, :, i, j] = total / math.sqrt(WIDTH / HEADS)
    torch.testing.assert_close(seen["blocks.1.attn.scores"], scores)


def test_only_differences_of_positions_matter():
    model, x = build(), draw()
    here = torch.arange(TOKENS)[None]
    torch.testing.assert_close(model(x, positions=here), model(x))
    torch.testing.assert_close(model(x, positions=here + 1000), model(x))
    torch.testing.assert_close(model(x, positions=here.expand(BATCH, -1) - 0.25), model(x))
    assert (model(x, positions=2 * here) - model(x)).abs().max() > 1e-3


def test_order_matters_only_with_positions():
    x = draw()
    shuffled = torch.cat([x[:, :-1].flip(1), x[:, -1:]], dim=1)
    for rotary, same in ((0.0, True), (0.5, False)):
        # One layer: the last token sees the same set of tokens.
        model = build(rotary=rotary)
        model.blocks = model.blocks[:1]
        assert torch.allclose(model(x)[:, -1], model(shuffled)[:, -1]) == same


def test_longer_than_the_context_extends_the_table():
    model, x = build(), draw(3 * CONTEXT)
    far = torch.arange(3 * CONTEXT)[None]
    torch.testing.assert_close(model(x), model(x, positions=far))
    with torch.inference_mode():
        model(draw(10 * CONTEXT))
    model(x).sum().backward()  # the table is no tensor of inference mode
    assert not [name for name in model.state_dict() if "rotary" in name]


def test_table_is_exact_in_double_precision():
    table = build().rotary
    angle = (CONTEXT - 1) * 10000**-0.5
    assert table.cos[-1, 1].item() == pytest.approx(math.cos(angle), abs=1e-15)


# --- looking and editing --------------------------------------------------------------------------------------------


def documented():
    """The table in the module's docstring: name -> axes."""
    rows = {}
    for line in transformer.__doc__.splitlines():
        if line.startswith("``"):
            name, axes = line.split("``")[1], line.split("``", 2)[2][:40].split("  ")
            rows[name] = next(a for a in axes if a.strip()).split()
    return rows


@pytest.mark.parametrize("experts", [0, 4])
def test_every_hook_point_has_the_documented_shape(experts):
    model = build(experts=experts)
    sizes = {"batch": BATCH, "tokens": TOKENS, "query": TOKENS, "key": TOKENS, "width": WIDTH, "heads": HEADS}
    sizes |= {"head_dim": WIDTH // HEADS, "hidden": HIDDEN, "experts": experts}
    _, seen = model.run_with_cache(draw())
    table = documented()
    assert len(table) == 16
    expected = {}
    for name, axes in table.items():
        for layer in range(LAYERS) if "N" in name else [0]:
            mixture = experts and layer % 2
            if name.endswith("router") and not mixture:
                continue
            shape = [sizes[a] for a in (table["blocks.N.mlp.pre"] if axes[0] == "as" else axes)]
            if mixture and name.endswith(("mlp.pre", "mlp.act")):
                shape.insert(2, 2)
            expected[name.replace("N", str(layer))] = tuple(shape)
    assert {name: tuple(value.shape) for name, value in seen.items()} == expected
    assert set(hook_points(model)) == set(expected)
    blocks = [[n.split(".", 2)[2] for n in seen if n.startswith(f"blocks.{layer}.")] for layer in range(LAYERS)]
    order = [n.split(".", 2)[2] for n in table if "N" in n]
    assert all(names == [n for n in order if n in names] for names in blocks)  # they fire in the table's order


def test_the_residual_stream_adds_up():
    model, x = build(), draw()
    _, seen = model.run_with_cache(x)
    total = model.embedding(x)
    for layer in range(LAYERS):
        total = total + seen[f"blocks.{layer}.attn.out"] + seen[f"blocks.{layer}.mlp.out"]
    torch.testing.assert_close(seen[f"blocks.{LAYERS - 1}.resid_post"], total)
    pattern = seen["blocks.1.attn.pattern"]
    torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]))
    assert pattern.triu(1).abs().max() == 0
    mixed = torch.einsum("bhqk,bkhd->bqhd", pattern, seen["blocks.1.attn.v"])
    torch.testing.assert_close(seen["blocks.1.attn.heads"], mixed)


def test_editing_is_surgery():
    model, x = build(), draw()
    cut = copy.deepcopy(model)
    with torch.no_grad():
        cut.blocks[1].attn.W_v.weight[8:16] *= 3  # head 1
        cut.blocks[2].mlp.W_out.weight[:, 5] = 0  # neuron 5
        cut.blocks[0].attn.W_o.weight *= -1

    def at(index, factor):
        def edit(value):
            value = value.clone()
            value[(..., *index)] *= factor
            return value

        return edit

    edits = {
        "blocks.1.attn.v": at((1, slice(None)), 3),
        "blocks.2.mlp.act": at((5,), 0),
        "blocks.0.attn.out": lambda out: -out,
    }
    before = model(x)
    torch.testing.assert_close(model.run_with_edits(x, edits), cut(x))
    assert torch.equal(model(x), before)  # nothing stays behind


def test_editing_the_pattern_moves_attention():
    # Everybody attends to the first token: the heads return its value.
    model, x = build(), draw()
    first = {"blocks.0.attn.pattern": lambda p: torch.zeros_like(p).index_fill(-1, torch.tensor(0), 1.0)}
    _, seen = model.run_with_cache(x, ["blocks.0.attn.heads", "blocks.0.attn.v"], edits=first)
    torch.testing.assert_close(*torch.broadcast_tensors(seen["blocks.0.attn.heads"], seen["blocks.0.attn.v"][:, :1]))
    # Editing scores cannot let anybody see the future.
    edits = {f"blocks.{n}.attn.scores": lambda s: s * 0 + 50 * torch.arange(TOKENS) for n in range(LAYERS)}
    other = torch.cat([x[:, :-1], (x[:, -1:] + 1) % VOCAB], dim=1)
    a, b = model.run_with_edits(x, edits), model.run_with_edits(other, edits)
    torch.testing.assert_close(a[:, :-1], b[:, :-1])


def test_patching_the_whole_stream_carries_the_run_over():
    model, x, y = build(), draw(), draw().flip(1)
    name = "blocks.1.resid_post"
    logits, seen = model.run_with_cache(y, name)
    assert list(seen) == [name]
    torch.testing.assert_close(model.run_with_edits(x, {name: lambda _: seen[name]}), logits)


def test_gradient_of_an_activation():
    model, x = build(), draw()
    logits, seen = model.run_with_cache(x, "blocks.1.resid_mid")
    (slope,) = torch.autograd.grad(logits[0, -1, 3], seen["blocks.1.resid_mid"])
    step = 1e-6 * torch.randn(slope.shape, generator=generator(4), dtype=torch.float64)
    with torch.no_grad():
        up, down = (
            model.run_with_edits(x, {"blocks.1.resid_mid": lambda r, s=s: r + s})[0, -1, 3] for s in (step, -step)
        )
    torch.testing.assert_close((up - down) / 2, (slope * step).sum(), rtol=1e-5, atol=0)


def test_hooks_go_after_an_error():
    model, x = build(), draw()
    with pytest.raises(ZeroDivisionError):
        model.run_with_edits(x, {"embed": lambda _: 1 / 0})
    assert not any(point.watched for point in hook_points(model).values())


def test_head_mask_is_zeroing_rows_of_the_output_projection():
    model, x = build(), draw()
    mask = torch.ones(LAYERS, HEADS, dtype=torch.float64)
    mask[1, 2], mask[0, 0] = 0, 0.5
    cut = copy.deepcopy(model)
    with torch.no_grad():  # torch keeps matrices transposed: a head's rows are columns of the weight
        cut.blocks[1].attn.W_o.weight[:, 16:24] = 0
        cut.blocks[0].attn.W_o.weight[:, :8] *= 0.5
    torch.testing.assert_close(model(x, head_mask=mask), cut(x))
    mask.requires_grad_()
    model(x, head_mask=mask).square().sum().backward()
    assert (mask.grad != 0).all()


@pytest.mark.parametrize("experts", [0, 4])
def test_layer_mask_skips_blocks(experts):
    model, x = build(experts=experts), draw()
    short = copy.deepcopy(model)
    short.blocks = nn.ModuleList([model.blocks[0], model.blocks[2]])
    mask = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(model(x, layer_mask=mask), short(x))


# --- experts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_experts_against_a_loop_over_tokens(top_k):
    model, x = build(experts=4, top_k=top_k), draw()
    _, seen = model.run_with_cache(x)
    mlp, block = mlp_of(model, 1), model.blocks[1]
    assert not hasattr(mlp_of(model, 0), "W_router")
    for b in range(BATCH):
        for t in range(TOKENS):
            h = block.norm_mlp(seen["blocks.1.resid_mid"][b, t])
            p = (mlp.W_router.weight @ h).softmax(0)
            best = sorted(range(4), key=lambda e: -p[e].item())[:top_k]
            out = sum(p[e] * (mlp.W_out[e] @ F.gelu(mlp.W_in[e] @ h)) for e in best) / sum(p[e] for e in best)
            torch.testing.assert_close(seen["blocks.1.mlp.out"][b, t], out)
            torch.testing.assert_close(seen["blocks.1.mlp.pre"][b, t, -1], mlp.W_in[best[-1]] @ h)
    torch.testing.assert_close(model(x), model.run_with_cache(x)[0])  # with and without anybody looking


def test_an_expert_that_nobody_chose_gets_no_gradient():
    model, x = build(experts=4), draw()

    def never_three(router):
        return router.index_fill(-1, torch.tensor(3), -1e9)

    model.run_with_edits(x, {"blocks.1.mlp.router": never_three}).square().sum().backward()
    slopes = mlp_of(model, 1).W_in.grad.abs().amax((1, 2))
    assert slopes[3] == 0
    assert (slopes[:3] > 0).all()


def test_editing_an_experts_neuron_is_surgery():
    model, x = build(experts=4), draw()
    cut = copy.deepcopy(model)
    with torch.no_grad():
        cut.blocks[1].mlp.W_out[:, :, 5] = 0
    keep = torch.ones(HIDDEN, dtype=torch.float64).index_fill(0, torch.tensor(5), 0)
    torch.testing.assert_close(model.run_with_edits(x, {"blocks.1.mlp.act": lambda a: a * keep}), cut(x))


def test_balance_loss_in_its_limits():
    even = 50 * torch.eye(4, dtype=torch.float64).repeat(3, 1)
    one = 50 * torch.eye(4, dtype=torch.float64)[[2] * 6]
    torch.testing.assert_close(balance_loss(even, 1).item(), 1.0)
    torch.testing.assert_close(balance_loss(one, 1).item(), 4.0)
    torch.testing.assert_close(balance_loss(torch.cat([even, one]), 1, torch.arange(18) < 12).item(), 1.0)
    pair = torch.tensor([[50.0, 50, 0, 0]]).double().repeat(5, 1)
    torch.testing.assert_close(balance_loss(pair, 2).item(), 2.0)


def test_balance_loss_evens_the_load_out():
    model, x = build(experts=4), draw(8, 16)
    router = mlp_of(model, 1).W_router.weight

    def load():
        _, seen = model.run_with_cache(x, "blocks.1.mlp.router")
        return seen["blocks.1.mlp.router"].topk(2).indices.flatten().bincount(minlength=4).double()

    before, optimizer = load().std(), torch.optim.Adam([router], lr=0.02)
    for _ in range(100):
        _, balance = model.states_and_balance(x)
        optimizer.zero_grad()
        balance.backward()
        optimizer.step()
    torch.testing.assert_close(model.states_and_balance(x)[0], model.states(x))
    assert load().std() < before / 3
    padding = torch.zeros_like(x, dtype=torch.bool)
    padding[:, :4] = True
    _, seen = model.run_with_cache(x, "blocks.1.mlp.router", padding=padding)
    expected = balance_loss(seen["blocks.1.mlp.router"][:, 4:], 2)
    torch.testing.assert_close(model.states_and_balance(x, padding=padding)[1], expected)


# --- generating -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [0, 4])
def test_cached_logits_are_uncached_ones(experts):
    model, x = build(experts=experts), draw(12)
    cache = KVCache()
    parts = [model(part, cache=cache) for part in x.split([5, 1, 4, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(x))
    assert len(cache) == 12
    cache.crop(6)
    torch.testing.assert_close(model(x[:, 6:9], cache=cache), model(x)[:, 6:9])


def test_greedy_generation_is_repeated_argmax():
    model, x = build(), draw()
    expected = x
    for _ in range(6):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate(model, x, steps=6), expected)
    assert torch.equal(generate(model, x, steps=0), x)


def test_left_padded_prompts_go_on_as_each_alone():
    model, x = build(), draw(12, 8)
    padding = torch.arange(TOKENS) < torch.arange(8)[:, None] % TOKENS  # 0, 1, 2, … tokens of padding
    cache, together = KVCache(), generate(model, x[:, :TOKENS], steps=8, padding=padding)
    model(x[:, :TOKENS], cache=cache, padding=padding)
    logits = [model(part, cache=cache) for part in x[:, TOKENS:].split([1, 4], dim=1)]
    for row in range(8):
        alone = x[row : row + 1, row % TOKENS :]
        torch.testing.assert_close(torch.cat(logits, dim=1)[row], model(alone)[0, -5:])
        expected = generate(model, alone[:, : TOKENS - row % TOKENS], steps=8)
        assert torch.equal(together[row, row % TOKENS :], expected[0])


def test_samples_follow_the_nucleus():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(20_000, 1)

    def shares(**options):
        options = {"temperature": 1.0, "top_p": 1.0, "generator": generator(0)} | options
        return (pick(logits, **options).bincount(minlength=4) / len(logits)).tolist()

    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.015)
    assert shares(top_p=0.6) == pytest.approx([0.625, 0.375, 0, 0], abs=0.015)
    assert shares(top_p=0.4) == [1, 0, 0, 0]
    squared = [p * p for p in (0.5, 0.3, 0.15, 0.05)]
    assert shares(temperature=0.5) == pytest.approx([p / sum(squared) for p in squared], abs=0.015)
    assert shares(temperature=0.0) == [1, 0, 0, 0]


def test_sampling_repeats_with_its_seed():
    model, x = build(), draw(batch=16)
    a, b, c = (generate(model, x, steps=8, temperature=2.0, generator=generator(s)) for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_sequence_stays_stopped():
    model, x = build(), draw(batch=16)
    free = generate(model, x, steps=8, temperature=2.0, generator=generator(0))
    stopped = generate(model, x, steps=8, temperature=2.0, generator=generator(0), stop=4)
    ends = 0
    for a, b in zip(free[:, TOKENS:].tolist(), stopped[:, TOKENS:].tolist(), strict=True):
        if 4 in a:
            ends, first = ends + 1, a.index(4)
            assert b == a[:first] + [4] * (8 - first)
        else:
            assert b == a
    assert ends > 0


# --- precision, devices, training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [0, 4])
def test_bfloat16_autocast_is_close(experts):
    torch.manual_seed(0)
    model, x = Transformer(TransformerConfig(VOCAB, 2, WIDTH, HEADS, CONTEXT, HIDDEN, experts=experts)), draw()
    padding = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    padding[0, :2] = True
    for inputs in ({}, {"padding": padding}, {"attention_bias": torch.randn(TOKENS, TOKENS)}):
        for names in ((), None):
            with torch.autocast("cpu", torch.bfloat16):
                half, _ = model.run_with_cache(x, names, **inputs)
            half.float().square().sum().backward()
            torch.testing.assert_close(half.float(), model(x, **inputs), rtol=0.05, atol=0.02)
    assert model.to(torch.bfloat16)(x).dtype == torch.bfloat16


def test_weights_at_the_start():
    config = TransformerConfig(500, 8, 64, 4, 16, 128, experts=4)
    model = Transformer(config, generator=generator(0))
    for name, p in model.named_parameters():
        std = 0.02 / 4 if name.endswith(("W_o.weight", "W_out.weight", "W_out")) else 0.02
        assert (p == 1).all() if p.ndim == 1 else p.std().item() == pytest.approx(std, rel=0.1), name
    again = Transformer(config, generator=generator(0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    copy.deepcopy(model)(torch.zeros(1, 2, dtype=torch.long))


@pytest.mark.parametrize("experts", [0, 4])
def test_it_learns_to_look_back(experts):
    # The second half repeats the first: predictable at an offset of 6, and from nothing but the context.
    g = generator(0)
    model = Transformer(TransformerConfig(VOCAB, 2, 32, 2, 12, 64, experts=experts), generator=g)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(250):
        x = torch.randint(VOCAB, (32, 6), generator=g).repeat(1, 2)
        loss = F.cross_entropy(model.unembed(model.states(x)[:, 5:-1]).flatten(0, 1), x[:, 6:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.2  # without looking back, log 11 = 2.4


@pytest.mark.gpu
def test_gpu_agrees_with_cpu():
    x = draw(3 * CONTEXT)
    for experts in (0, 4):
        model = build(experts=experts)
        here, there = model(x), copy.deepcopy(model).cuda()
        torch.testing.assert_close(there(x.cuda()).cpu(), here)
        torch.testing.assert_close(there.run_with_cache(x.cuda())[0].cpu(), here)
        assert torch.equal(generate(there, x.cuda(), steps=4).cpu(), generate(model, x, steps=4))


# --- bad input ------------------------------------------------------------------------------------------------------

SIZES = {"vocab": VOCAB, "layers": LAYERS, "width": WIDTH, "heads": HEADS, "context": CONTEXT, "hidden": HIDDEN}


@pytest.mark.parametrize(
    ("change", "name"),
    [({size: 0}, size) for size in SIZES]
    + [
        ({"width": 25}, "width"),
        ({"width": 9}, "width"),  # heads of odd dimension
        ({"activation": "swish"}, "activation"),
        ({"rotary": 1.5}, "rotary"),
        ({"rotary": math.nan}, "rotary"),
        ({"experts": -1}, "experts"),
        ({"experts": 4, "top_k": 5}, "top_k"),
        ({"experts": 4, "top_k": 0}, "top_k"),
    ],
)
def test_bad_sizes_name_the_argument(change, name):
    with pytest.raises(ValueError, match=name):
        TransformerConfig(**SIZES | change)


def of_batch_three():
    cache = KVCache()
    build()(draw(batch=3), cache=cache)
    return cache


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda m, x: m(), "tokens and embeddings"),
        (lambda m, x: m(x, embeddings=m.embedding(x)), "tokens and embeddings"),
        (lambda m, x: m(x + VOCAB), "tokens"),
        (lambda m, x: m(x - VOCAB), "tokens"),
        (lambda m, x: m(x[:, :0]), "tokens"),
        (lambda m, x: m(embeddings=torch.zeros(1, 2, WIDTH + 1)), "embeddings"),
        (lambda m, x: m(x, attention_bias=torch.zeros(TOKENS, TOKENS + 1)), "attention_bias"),
        (lambda m, x: m(x, attention_bias=torch.zeros(HEADS + 1, TOKENS, TOKENS)), "attention_bias"),
        (lambda m, x: m(x, head_mask=torch.ones(LAYERS, HEADS + 1)), "head_mask"),
        (lambda m, x: m(x, layer_mask=torch.ones(LAYERS - 1)), "layer_mask"),
        (lambda m, x: m(x, padding=torch.zeros(BATCH, TOKENS - 1, dtype=torch.bool)), "padding"),
        (lambda m, x: m(x, positions=torch.zeros(1, TOKENS + 1)), "positions"),
        (lambda m, x: m(x, cache=of_batch_three()), "cache"),
        (lambda m, x: build(causal=False)(x, cache=KVCache()), "cache"),
        (lambda m, x: of_batch_three().crop(TOKENS + 1), "length"),
        (lambda m, x: m.states_and_balance(x), "experts"),
        (lambda m, x: m.run_with_edits(x, {"embed": lambda e: e[:1]}), r"edits\['embed'\]"),
        (lambda m, x: m.run_with_edits(x, {"final": lambda e: None}), r"edits\['final'\]"),
        (lambda m, x: balance_loss(torch.zeros(3, 4), 5), "top_k"),
        (lambda m, x: balance_loss(torch.zeros(3, 4), 1, torch.zeros(3, dtype=torch.bool)), "router"),
        (lambda m, x: generate(build(causal=False), x, steps=1), "model"),
        (lambda m, x: generate(m, x, steps=-1), "steps"),
        (lambda m, x: generate(m, x, steps=1, temperature=-1.0), "temperature"),
        (lambda m, x: generate(m, x, steps=1, top_p=0.0), "top_p"),
        (lambda m, x: generate(m, x, steps=1, stop=VOCAB), "stop"),
        (lambda m, x: generate(m, x, steps=1, padding=torch.ones(BATCH, TOKENS, dtype=torch.bool)), "padding"),
    ],
)
def test_bad_input_names_the_argument(call, name, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # a reader's run has no check of the shapes
    model, x = build(), draw()
    with pytest.raises(ValueError, match=name):
        call(model, x)


def test_an_unknown_name_is_answered_with_near_ones():
    model, x = build(), draw()
    for call in (model.run_with_cache, lambda x, n: model.run_with_edits(x, {n[0]: lambda v: v})):
        with pytest.raises(ValueError, match=r"'blocks\.1\.attn\.patern'.*blocks\.1\.attn\.pattern"):
            call(x, ["blocks.1.attn.patern"])
