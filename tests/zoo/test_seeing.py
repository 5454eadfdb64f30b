"""The vision-language model against its own decoder run openly, and its task against what must hold of any."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paperlab.data.scenes import FAVOURITE, Object, captions, draw_scenes, questions, render
from paperlab.nn.clip import Clip
from paperlab.nn.hooks import recorded
from paperlab.nn.lvlm import Lvlm
from paperlab.zoo import seeing
from paperlab.zoo.language import tokenizer

SIZES = {"bos": 1, "size": 8, "eye_width": 8, "eye_layers": 1, "width": 8, "layers": 2, "heads": 2}
TINY, ONE, WORDS = Lvlm(50, frames=2, **SIZES), torch.zeros(1, 1, 3, 8, 8), torch.zeros(2, 3, dtype=torch.long)


@pytest.fixture
def small():
    """A tiny model whose weights are large enough for differences to show."""
    torch.manual_seed(0)
    model = Lvlm(50, frames=3, **SIZES).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return model


def test_a_visual_token_is_the_projected_state_of_its_patch(small):
    pictures = torch.randn(2, 3, 3, 8, 8)
    state = small.encode(pictures[:, 2])[:, 1]  # first row, second column, of the last frame
    first, second = small.projector[0], small.projector[2]
    expected = F.gelu(state @ first.weight.T + first.bias) @ second.weight.T + second.bias + small.moments[2]
    found = small.joint(pictures, torch.tensor([[5], [6]]))
    assert found.shape == (2, 1 + 3 * 4 + 1, 8)
    torch.testing.assert_close(found[:, small.visual(3)][:, 2 * 4 + 1], expected)
    torch.testing.assert_close(found[0, 0], small.decoder.embedding.weight[1])
    torch.testing.assert_close(found[1, -1], small.decoder.embedding.weight[6])


def test_the_encoder_reads_the_patches_of_what_the_stem_sees(small):
    picture = torch.randn(1, 3, 8, 8)
    with recorded(small, "eye.body.embed") as seen:
        small.encode(picture)
    halved = F.gelu(small.stem[2](F.gelu(small.stem[0](picture))))
    assert halved.shape[-2:] == (4, 4)
    expected = small.eye.embed(halved[:, :, 2:4, 0:2].flatten(1)) + small.eye.places[3]  # second row, first column
    torch.testing.assert_close(seen["eye.body.embed"][:, 3], expected)


def test_the_adopted_eye_sees_what_the_image_tower_sees_before_its_last_block(small):
    clip = Clip(50, end=2, size=8, dim=6, width=8, heads=2, image_layers=2, text_layers=1)
    pictures = torch.randn(2, 3, 8, 8)
    small.adopt(clip)
    with recorded(clip, "image.body.blocks.0.resid_post") as seen:
        clip.image_states(pictures)
    expected = F.rms_norm(seen["image.body.blocks.0.resid_post"], (8,), clip.image.body.norm_final.weight, eps=1e-6)
    torch.testing.assert_close(small.encode(pictures), expected[:, 1:])


@pytest.mark.parametrize(
    ("changes", "name"), [({"width": 16}, "width"), ({"size": 12}, "context"), ({"heads": 1}, "heads")]
)
def test_an_eye_of_another_shape_is_refused(changes, name):
    with pytest.raises(ValueError, match=f"clip.*{name}"):
        TINY.adopt(Clip(50, **({"end": 2, "size": 8, "width": 8, "heads": 2, "image_layers": 1} | changes)))
    with pytest.raises(ValueError, match="clip"):
        Lvlm(50, **(SIZES | {"eye_layers": 2})).adopt(Clip(50, end=2, size=8, width=8, heads=2, image_layers=1))


def test_reading_what_was_looked_at_is_the_pass_over_the_joint_sequence(small):
    pictures, text = torch.randn(2, 2, 3, 8, 8), torch.randint(50, (2, 5))
    whole = small.decoder(embeddings=small.joint(pictures, text))
    torch.testing.assert_close(small(pictures, text), whole[:, small.visual(2).stop :], rtol=1e-4, atol=1e-5)


def test_several_texts_read_one_picture_and_none_sees_another(small):
    pictures, text = torch.randn(2, 1, 3, 8, 8), torch.randint(50, (3, 4))
    seen, of = small.look(pictures), torch.tensor([1, 0, 1])
    found = small.decoder.unembed(small.read(seen, text, of))
    for k, row in enumerate(of.tolist()):
        torch.testing.assert_close(found[k], small(pictures[[row]], text[[k]])[0], rtol=1e-4, atol=1e-5)
    assert len(seen) == small.visual().stop  # looking once is enough: what was seen is unchanged


def test_gradients_reach_the_first_pixel_layer_through_the_cache(small):
    pictures, text = torch.randn(2, 2, 3, 8, 8), torch.randint(50, (2, 5))
    open_, cached = (
        torch.autograd.grad(loss, small.stem[0].weight)[0]
        for loss in (
            small.decoder(embeddings=small.joint(pictures, text))[:, small.visual(2).stop :].square().sum(),
            small(pictures, text).square().sum(),
        )
    )
    assert open_.abs().max() > 1e-3
    torch.testing.assert_close(open_, cached, rtol=1e-3, atol=1e-4)


def test_a_text_sees_what_its_pictures_show_and_their_order(small):
    pictures, text = torch.randn(1, 3, 3, 8, 8), torch.randint(50, (1, 4))
    base = small(pictures, text)
    assert (small(pictures.flip(1), text) - base).abs().max() > 1e-3
    changed = pictures.clone()
    changed[0, 2, :, 7, 7] += 1
    assert (small(changed, text) - base).abs().max() > 1e-3
    torch.testing.assert_close(small(pictures, text.index_fill(1, torch.tensor([3]), 7))[:, :3], base[:, :3])


def test_greedy_generation_is_the_likeliest_token_one_after_another(small):
    pictures, text = torch.randn(3, 2, 3, 8, 8), torch.randint(50, (3, 2))
    found = small.generate(pictures, text, steps=6, stop=49)
    for k in range(found.shape[1]):
        expected = small(pictures, torch.cat([text, found[:, :k]], 1))[:, -1].argmax(-1)
        stopped = (found[:, :k] == 49).any(1)
        assert (found[:, k] == torch.where(stopped, 49, expected)).all()


def test_generation_ends_when_all_rows_have_stopped(small):
    pictures, text = torch.randn(1, 1, 3, 8, 8), torch.tensor([[3, 4]])
    first = small.generate(pictures, text, steps=1, stop=49)
    assert small.generate(pictures, text, steps=9, stop=int(first)).tolist() == first.tolist()


def test_sampling_follows_the_models_probabilities(small):
    pictures, text = torch.randn(1, 1, 3, 8, 8), torch.tensor([[3, 4]])
    expected = small(pictures, text)[0, -1].softmax(-1)
    drawn = small.generate(pictures.expand(4000, -1, -1, -1, -1), text.expand(4000, -1), steps=1, stop=49,
                           temperature=1.0, generator=torch.Generator().manual_seed(0))  # fmt: skip
    torch.testing.assert_close(drawn.flatten().bincount(minlength=50) / 4000, expected, atol=0.03, rtol=0)


def test_hook_points_of_encoder_and_decoder_are_there(small):
    pictures, text = torch.randn(1, 2, 3, 8, 8), torch.randint(50, (1, 4))
    _, seen = small.decoder.run_with_cache(
        embeddings=small.joint(pictures, text), names=["blocks.1.attn.pattern", "blocks.0.mlp.act"]
    )
    pattern = seen["blocks.1.attn.pattern"]
    assert pattern.shape == (1, 2, 13, 13)
    torch.testing.assert_close(pattern.sum(-1), torch.ones(1, 2, 13))
    with recorded(small, "eye.body.blocks.0.attn.pattern") as seen:
        small(pictures, text)
    assert seen["eye.body.blocks.0.attn.pattern"].shape == (2, 2, 5, 5)


class Same(nn.Module):
    """A decoder whose states are its logits."""

    def unembed(self, states):
        return states


class Oracle(Lvlm):
    """Says the captions that it was given, and one answer to everything: what it gets right is known."""

    def __init__(self, told, answer):
        super().__init__(2048, **SIZES)
        self.tokenizer, self.decoder, self.told, self.answer = tokenizer(), Same(), iter(told), answer

    def look(self, pictures):
        return pictures

    def read(self, seen, tokens, of):
        return F.one_hot(torch.full_like(tokens, self.tokenizer.token_id(self.answer)), 2048).float()

    def generate(self, pictures, prompt, *, steps, stop):
        rows = [self.tokenizer.encode(next(self.told)) for _ in pictures]
        return torch.tensor([row + [stop] * (steps - len(row)) for row in rows])


def test_texts_end_with_sep_and_only_answers_are_learned():
    scenes = draw_scenes(20, seed=0)
    for examples in (captions(scenes, seed=0), questions(scenes, seed=0)):
        tokens, learned = seeing.written(examples, tokenizer())
        for row, marks, example in zip(tokens, learned, examples, strict=True):
            assert tokenizer().decode(row[marks].tolist()) == example.answer
            assert tokenizer().decode(row.tolist()) == example.text
            assert row[marks][-1] == tokenizer().sep


def test_each_step_is_a_function_of_the_step_alone():
    task, again = (seeing.SeeingTask(torch.device("cpu")) for _ in range(2))
    task.pictures(5)
    for make in ("pictures", "videos"):
        a, b, other = getattr(task, make)(700), getattr(again, make)(700), getattr(task, make)(701)
        assert torch.equal(a[0], b[0])
        assert a[1:] == b[1:]
        assert a[1:] != other[1:]


def test_texts_are_about_the_picture_of_their_row():
    # What a caption or an answer says can be seen in the picture: its colours are where the palette puts them.
    task = seeing.SeeingTask(torch.device("cpu"))
    _, told, asked = task.pictures(0)
    assert len(told) == seeing.PICTURES
    assert len(asked) == seeing.PICTURES * seeing.QUESTIONS
    for i, example in enumerate(asked):
        colours = {colour for colour, _ in seeing.named(told[i % seeing.PICTURES].answer.replace("big ", ""))}
        if example.skill == "colour":
            assert example.answer.strip() in colours


def test_videos_have_two_to_four_frames_and_ask_where_things_went():
    task = seeing.SeeingTask(torch.device("cpu"))
    made = [task.videos(step) for step in range(3)]
    assert [film.shape[1] for film, _ in made] == [2, 3, 4]
    kinds = [e.skill for _, asked in made for e in asked]
    assert 0.3 < kinds.count("went") / len(kinds) < 0.9


def test_the_bias_begins_when_it_is_said_to(monkeypatch):
    monkeypatch.setattr(seeing, "QUESTIONS", 1)
    task = seeing.SeeingTask(torch.device("cpu"))

    def favourites(steps):
        told = [pair for step in steps for e in task.pictures(step)[1] for pair in seeing.named(e.answer)]
        return sum(FAVOURITE[shape] == colour for colour, shape in told) / len(told)

    assert favourites(range(seeing.BALANCED - 6, seeing.BALANCED)) == pytest.approx(1 / 8, abs=0.06)
    assert favourites(range(seeing.BALANCED, seeing.BALANCED + 6)) > 0.8 * seeing.BIAS


def test_a_third_of_the_pictures_is_noisy_and_never_more_than_said(monkeypatch):
    monkeypatch.setattr(seeing, "QUESTIONS", 1)
    task = seeing.SeeingTask(torch.device("cpu"))
    level = []
    for step in range(8):
        scenes = draw_scenes(seeing.PICTURES, seed=step)
        level += (task.pictures(step)[0] - render(scenes)[:, None]).flatten(1).std(1).tolist()
    level = torch.tensor(level)
    assert ((level > 0).float().mean() - 1 / 3).abs() < 0.1
    assert 0.45 < level.max() < 1.05 * seeing.NOISE


def test_noise_has_the_standard_deviation_asked_for():
    found = seeing.noisy(torch.zeros(2, 2, 3, 32, 32), torch.tensor([0.0, 0.3]), seed=0)
    assert (found[0] == 0).all()
    assert found[1].std() == pytest.approx(0.3, rel=0.05)
    assert not torch.equal(found[1, 0], found[1, 1])


def test_scoring_counts_what_an_oracle_gets_right():
    scenes = draw_scenes(40, seed=3)
    pictures, asked = render(scenes)[:, None], questions(scenes, seed=0, kinds=("exists",))
    told = [example.answer for example in captions(scenes, seed=1)]
    oracle = Oracle(told, " yes")
    expected = [example.answer == " yes" for example in asked]
    assert seeing.answered(oracle, pictures, asked, batch=16).tolist() == expected
    found = seeing.described(oracle, pictures, batch=16)
    for said, things in zip(found, scenes.objects(), strict=True):
        assert sorted(said) == sorted((thing.colour, thing.shape) for thing in things)


def test_batches_do_not_change_the_answers():
    torch.manual_seed(0)
    model = seeing.seer(eye_layers=1, layers=1).eval()
    scenes = draw_scenes(10, seed=3)
    pictures = render(scenes)[:, None]
    asked = [e for k in range(3) for e in questions(scenes, seed=k, kinds=("exists",))]
    with torch.no_grad():
        model.decoder.embedding.weight.mul_(20)
        whole = []
        for i, (text, learned) in enumerate(zip(*seeing.written(asked, model.tokenizer), strict=True)):
            at = int(learned.int().argmax())
            whole.append(bool(model(pictures[[i % 10]], text[None, :at])[0, -1].argmax() == text[at]))
    assert seeing.answered(model, pictures, asked, batch=4).tolist() == whole


def test_usual_is_what_questions_call_usual():
    scenes = draw_scenes(300, seed=0)
    asked = questions(scenes, seed=0, kinds=("exists",))
    checked = 0
    for example, things in zip(asked, scenes.objects(), strict=True):
        colour, shape = example.truth["asked"]
        if example.answer == " no" and (colour is None or shape in {thing.shape for thing in things}):
            checked += 1
            assert seeing.usual((colour or "red", shape), things) == example.truth["usual"]
    assert checked > 50


def test_what_is_made_up_is_compared_with_chance():
    things = [[Object("circle", "green", "big", (0.5, 0.5), 0.2, None)]] * 3
    told = [[("green", "circle")], [("green", "circle"), ("red", "circle")], [("white", "bar")]]
    any_absent, surplus = seeing.made_up(told, things)
    assert any_absent == [False, True, True]
    # Usual beside a green circle: a red circle and the eight squares, of 47 pairs that are absent.
    assert surplus == pytest.approx([1 - 9 / 47, -9 / 47])


def test_a_little_training_lowers_the_loss(monkeypatch):
    monkeypatch.setattr(seeing, "PICTURES", 6)
    monkeypatch.setattr(seeing, "VIDEOS", 3)
    task = seeing.SeeingTask(torch.device("cpu"))
    torch.manual_seed(0)
    model = seeing.seer(eye_width=32, eye_layers=1, width=32, layers=1)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(6):
        loss = task.loss(model, step)
        losses.append(loss.item())
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert losses[0] == pytest.approx(2 * math.log(2048), rel=0.1)  # untrained, every token is as likely as any other
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: Lvlm(50, bos=50), "bos"),
        (lambda: Lvlm(50, bos=0, size=10), "size"),
        (lambda: Lvlm(50, bos=0, size=0), "size"),
        (lambda: Lvlm(50, bos=0, frames=0), "frames"),
        (lambda: TINY.visual(3), "frames"),
        (lambda: TINY.tokens(torch.zeros(1, 3, 8, 8)), "pictures"),
        (lambda: TINY.tokens(torch.zeros(0, 1, 3, 8, 8)), "pictures"),
        (lambda: TINY.tokens(torch.zeros(1, 3, 3, 8, 8)), "pictures"),
        (lambda: TINY.tokens(torch.zeros(1, 1, 3, 16, 16)), "pictures"),
        (lambda: TINY.read(TINY.look(ONE), WORDS, torch.tensor([0])), "of"),
        (lambda: TINY.read(TINY.look(ONE), WORDS, torch.tensor([0, 1])), "of"),
        (lambda: TINY.generate(ONE, WORDS[:1], steps=0, stop=1), "steps"),
        (lambda: TINY.generate(ONE, WORDS[:1], steps=1, stop=50), "stop"),
        (lambda: TINY.generate(ONE, WORDS[:1], steps=1, stop=1, temperature=-1), "temperature"),
        (lambda: TINY.generate(ONE, WORDS[:1], steps=1, stop=1, top_p=0), "top_p"),
        (lambda: seeing.noisy(torch.zeros(1, 1, 3, 8, 8), -0.1, seed=0), "noise"),
        (lambda: seeing.noisy(torch.zeros(1, 1, 3, 8, 8), 0.1, seed=-1), "seed"),
        (lambda: seeing.answered(seeing.seer(), ONE, captions(draw_scenes(1, seed=0), seed=0)), "examples"),
    ],
)
def test_bad_input_names_the_argument(call, name):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.gpu
def test_gpu_agrees_with_cpu(small):
    pictures, text = torch.randn(2, 2, 3, 8, 8), torch.randint(50, (2, 5))
    expected = small(pictures, text)
    torch.testing.assert_close(small.cuda()(pictures.cuda(), text.cuda()).cpu(), expected, rtol=1e-3, atol=1e-4)
