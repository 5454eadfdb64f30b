"""The painting task and its scores: against closed forms, and painters whose scores are known before they paint."""

import base64
from collections import Counter

import pytest
import torch
from torch import nn

from paperlab.data.scenes import draw_scenes, render
from paperlab.nn.denoiser import Denoiser
from paperlab.nn.diffusion import from_picture
from paperlab.zoo import painting
from paperlab.zoo.language import sentences, tokenizer

TINY = {"width": 8, "layers": 1, "heads": 2, "reader_layers": 1, "patch": 4}


class Stub(Denoiser):
    """A denoiser that answers by a function and remembers what it was asked."""

    def __init__(self, answer):
        nn.Module.__init__(self)
        self.weight, self.pad = nn.Parameter(torch.zeros(())), tokenizer().pad
        self.answer, self.captions = answer, []

    def read(self, captions):
        return torch.zeros(*captions.shape, 1)

    def forward(self, x, t, captions, *, words=None):
        self.captions += [tuple(row[row != self.pad].tolist()) for row in captions]
        return self.answer(x, t)


def test_every_word_of_a_caption_is_one_token():
    found = sentences(["a big red circle on the left and an orange bar.", "", "a red circle.", " a red circle."])
    assert found.shape == (4, 13)
    assert found[:, 0].tolist() == [tokenizer().bos] * 4
    assert (found[1, 1:] == tokenizer().pad).all()
    assert torch.equal(found[2], found[3])
    words = [tokenizer().decode([i]) for i in found[2, 1:5].tolist()]
    assert [word.strip() for word in words] == ["a", "red", "circle", "."]


def test_who_always_answers_zero_loses_the_mean_square_of_the_velocity():
    # E v² = E alpha² + E sigma² x0²; over even times both factors are 1/2.
    task, stub = painting.PaintingTask(torch.device("cpu")), Stub(lambda x, t: 0 * x)
    found = torch.stack([task.loss(stub, step) for step in range(8)]).mean()
    scenes = draw_scenes(1000, seed=10**9, objects=(1, 2), scale=painting.SCALE)
    expected = 0.5 + 0.5 * (2 * render(scenes, 16) - 1).square().mean()
    torch.testing.assert_close(found, expected, rtol=0.04, atol=0)
    count = Counter(stub.captions)
    assert count[(tokenizer().bos,)] / 512 == pytest.approx(painting.UNREAD, abs=0.04)  # shown without a caption
    assert max(map(len, count)) > 12  # long templates occur as well


def test_a_step_repeats_and_another_differs():
    torch.manual_seed(0)
    task, model = painting.PaintingTask(torch.device("cpu")), painting.painter(**TINY)
    nn.init.normal_(model.pixels.weight)
    assert torch.equal(task.loss(model, 7), task.loss(model, 7))
    assert not torch.equal(task.loss(model, 7), task.loss(model, 8))
    task.loss(model, 7).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_who_knows_the_picture_paints_it():
    picture = render(draw_scenes(1, seed=0, scale=painting.SCALE), 16)
    stub = Stub(lambda x, t: from_picture(x, (2 * picture - 1).expand_as(x), t))
    found = painting.paint(stub, ["a red circle.", "a blue bar."], seed=0, steps=3, eta=0.5)
    torch.testing.assert_close(found, picture.expand(2, -1, -1, -1), atol=1e-5, rtol=0)


def test_a_portrait_is_the_pictures_pixels():
    shade = torch.tensor([0.2, 0.4, 0.8])[:, None, None]
    told = painting.portrait(Stub(lambda x, t: from_picture(x, (2 * shade - 1).expand_as(x), t)))
    assert [(caption, guidance) for caption, guidance, _ in told["pictures"]] == [
        (caption, guidance) for guidance in (1.0, 3.0) for caption in painting.ASKED
    ]
    pixels = base64.b64decode(told["pictures"][-1][2])
    assert pixels == bytes([51, 102, 204]) * painting.SIZE**2


def test_the_noise_of_a_caption_does_not_depend_on_its_company():
    torch.manual_seed(0)
    model = painting.painter(**TINY).eval()
    nn.init.normal_(model.pixels.weight)
    texts = ["a red circle.", "a blue square and a green ring.", "a pink cross."]
    together = painting.paint(model, texts, seed=3, steps=2)
    torch.testing.assert_close(painting.paint(model, texts, seed=3, steps=2, batch=1), together, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(painting.paint(model, texts[:1], seed=3, steps=2), together[:1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(painting.paint(model, texts, seed=4, steps=2), together)
    assert not torch.allclose(painting.paint(model, texts, seed=3, steps=2, against="a ring."), together)


def test_pairs_are_the_objects():
    scenes = draw_scenes(50, seed=0)
    for row, things in zip(painting.pairs(scenes), scenes.objects(), strict=True):
        named = {painting.named(k).partition(" ")[2] for k in row.nonzero()[:, 0].tolist()}
        assert named == {f"{thing.colour} {thing.shape}." for thing in things}


def test_articles():
    assert painting.named(1) == "an orange circle."
    assert painting.named(47) == "a white bar."


def test_what_is_shown_are_the_likeliest_pairs():
    pictures = torch.randn(6, 3, 16, 16)
    reader = nn.Sequential(nn.Flatten(), nn.Linear(768, 48, bias=False))
    nn.init.normal_(reader[1].weight, std=0.07)
    logits = reader(pictures)
    for k in (1, 2):
        found = painting.shown(reader, pictures, k)
        least = logits.topk(k).values[:, -1:]
        assert torch.equal(found, (logits >= least) & (logits.exp() > 0.1 * logits.exp().sum(1, keepdim=True)))
    assert found.any()
    assert not painting.shown(reader, 0 * pictures, 2).any()  # nobody knows


def test_the_middle_of_a_picture_is_where_its_object_is():
    scenes = draw_scenes(400, seed=0, objects=(1, 1), scale=painting.SCALE)
    found = painting.middles(render(scenes, 16))
    assert (found - scenes.centre[:, 0]).norm(dim=1).max() < 1 / 16  # less than a pixel
    torch.testing.assert_close(painting.middles(torch.full((2, 3, 8, 8), 0.3)), torch.full((2, 2), 0.5))


def test_spread_is_the_standard_deviation_of_the_places():
    scenes = draw_scenes(600, seed=1, objects=(1, 1), scale=painting.SCALE)
    pictures = render(scenes, 16)
    found = painting.spread(pictures[None])
    assert found.item() == pytest.approx(scenes.centre[:, 0].var(0).mean().sqrt().item(), rel=0.05)
    assert painting.spread(pictures[:1].expand(5, -1, -1, -1)[None]).item() == 0


class Memory(nn.Module):
    """A reader that knows every picture which was rendered, and nothing else."""

    def __init__(self):
        super().__init__()
        self.known = {}

    def render(self, scenes, size):
        pictures = render(scenes, size)
        for picture, there in zip(pictures, painting.pairs(scenes), strict=True):
            self.known[picture.numpy().tobytes()] = 10 * there.float()
        return pictures

    def forward(self, pictures):
        return torch.stack([self.known[picture.numpy().tobytes()] for picture in pictures])


@pytest.mark.parametrize(("keeps", "one", "both", "either"), [(2, 1.0, 1.0, 1.0), (1, 1.0, 0.0, 1.0)])
def test_scores_of_a_painter_that_keeps_so_many_objects(monkeypatch, keeps, one, both, either):
    memory = Memory()

    def paint(model, texts, *, seed, **knobs):
        asked = [[word for word in text.strip(" .").split() if word not in ("a", "an", "and")] for text in texts]
        k = min(keeps, len(asked[0]) // 2)
        scenes = draw_scenes(len(texts), seed=seed, objects=(k, k), scale=painting.SCALE)
        for i, words in enumerate(asked):
            for j in range(k):
                scenes.colour[i, j] = painting.COLOURS.index(words[2 * j])
                scenes.shape[i, j] = painting.SHAPES.index(words[2 * j + 1])
        return memory.render(scenes, 16)

    monkeypatch.setattr(painting, "render", memory.render)
    monkeypatch.setattr(painting, "paint", paint)
    monkeypatch.setattr(painting, "train_reader", lambda: memory)
    monkeypatch.setattr(painting, "SEEDS", 2)
    found = painting.scores(painting.painter(**TINY), painting.painter)
    values = {name: score["value"] for name, score in found.items()}
    assert all(values[name] == 1.0 for name in values if name.startswith("reader"))
    assert all(values[name] == one for name in values if name.startswith("1 object"))
    assert values["2 objects, both, guidance 3"] == both
    assert values["2 objects, at least one, guidance 1"] == either
    assert values["spread of places over that of real scenes, guidance 3"] == pytest.approx(1, abs=0.2)
    assert [score["bar"] for score in found.values() if "bar" in score] == [0.8]


def test_the_reader_is_trained_alike_every_time():
    found = [painting.train_reader(steps=1).state_dict() for _ in range(2)]
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: sentences([]), "texts"),
        (lambda: painting.paint(painting.painter(**TINY), ["a"], seed=0, batch=0), "batch"),
        (lambda: painting.paint(painting.painter(**TINY), ["a"], seed=0, steps=0), "steps"),
        (lambda: painting.paint(painting.painter(**TINY), ["a"], seed=-1), "seed"),
        (lambda: painting.paint(painting.painter(**TINY), ["a"], seed=0, eta=2.0), "eta"),
        (lambda: painting.shown(nn.Flatten(), torch.zeros(1, 3, 16, 16), 0), "objects"),
        (lambda: painting.spread(torch.zeros(2, 1, 3, 16, 16)), "k must"),
    ],
)
def test_bad_input_names_the_argument(call, name):
    with pytest.raises(ValueError, match=name):
        call()
