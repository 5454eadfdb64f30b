"""The two towers and their loss against loops, closed forms and what must not matter; the task's captions against their
own wording; and the scores of models of which it is known what they can do.
"""

import itertools
import math
import re

import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity
from torch import nn

from paperlab.data import scenes as world
from paperlab.data.scenes import COLOURS, SHAPES, captions, draw_scenes
from paperlab.nn.clip import Clip, contrastive_loss
from paperlab.nn.hooks import recorded
from paperlab.zoo import matching
from paperlab.zoo.language import tokenizer
from paperlab.zoo.matching import UNSEEN, MatchingTask, as_tokens, class_vectors, retrieval_pool, told, true_of

SIZES = {"size": 16, "dim": 6, "width": 8, "heads": 2, "image_layers": 1, "text_layers": 2}


def small(**changes):
    torch.manual_seed(0)
    net = Clip(10, end=9, **(SIZES | changes)).eval()
    with torch.no_grad():
        for p in net.text.parameters():
            p.mul_(5)  # so that attention is not even
    return net


def by_loops(logits, ignored):
    """The loss written out."""
    n, total = len(logits), 0.0
    for i in range(n):
        for line, out in ((logits[i], ignored[i]), (logits[:, i], ignored[:, i])):
            kept = [math.exp(line[j]) for j in range(n) if j == i or not out[j]]
            total -= math.log(math.exp(line[i]) / sum(kept))
    return total / (2 * n)


def test_the_loss_by_loops():
    torch.manual_seed(0)
    logits, ignored = 3 * torch.randn(5, 5, dtype=torch.float64), torch.rand(5, 5) < 0.4
    none = torch.zeros_like(ignored)
    assert contrastive_loss(logits).item() == pytest.approx(by_loops(logits, none))
    assert contrastive_loss(logits, ignored).item() == pytest.approx(by_loops(logits, ignored))


def test_limits_of_the_loss():
    assert contrastive_loss(torch.zeros(7, 7)).item() == pytest.approx(math.log(7))  # nothing known
    assert contrastive_loss(100 * torch.eye(7)).item() == pytest.approx(0)
    assert contrastive_loss(torch.randn(7, 7), torch.ones(7, 7, dtype=torch.bool)).item() == 0  # nobody else asked
    torch.manual_seed(0)
    logits = torch.randn(6, 6)
    assert contrastive_loss(logits).item() == pytest.approx(contrastive_loss(logits.mT).item())


def test_an_ignored_pair_is_not_pushed_apart():
    logits = torch.zeros(3, 3, requires_grad=True)
    ignored = torch.zeros(3, 3, dtype=torch.bool)
    ignored[0, 2] = True
    (slope,) = torch.autograd.grad(contrastive_loss(logits, ignored), logits)
    assert slope[0, 2] == 0
    assert slope[2, 0] > 0
    assert (slope.diagonal() < 0).all()


def test_logits_are_cosines_times_the_scale():
    net = small()
    images, tokens = torch.rand(3, 3, 16, 16), torch.tensor([[1, 2, 9, 0], [3, 4, 5, 9]])
    u, v = net.image.body.unembed(net.image_states(images)[:, 0]), net.project(net.text_states(tokens))
    ends = torch.stack([v[0, 2], v[1, 3]])
    expected = cosine_similarity(u.detach(), ends.detach()) / 0.07
    torch.testing.assert_close(net(images, tokens), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert net.embed_images(images).norm(dim=-1).tolist() == pytest.approx([1.0] * 3)


def test_the_scale_stops_at_a_hundred():
    net = small()
    for log_scale, expected in ((math.log(20), 20.0), (9.0, 100.0)):
        nn.init.constant_(net.log_scale, log_scale)
        assert net.scale.item() == pytest.approx(expected, rel=1e-4)


def test_what_stands_after_the_end_does_not_matter_and_what_stands_before_it_does():
    net = small()
    texts = torch.tensor([[1, 2, 3, 9, 0, 0], [1, 2, 3, 9, 9, 7], [1, 4, 3, 9, 0, 0]])
    a, b, c = net.embed_texts(texts)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(a, net.embed_texts(texts[:1, :4])[0])
    assert (a - c).abs().max() > 1e-2


def test_embeddings_take_the_place_of_tokens():
    net, texts = small(), torch.tensor([[1, 2, 9, 0], [1, 2, 3, 9]])
    given = net.text.embedding(texts).detach().requires_grad_()
    found = net.embed_texts(embeddings=given, ends=torch.tensor([2, 3]))
    torch.testing.assert_close(found, net.embed_texts(texts))
    (slope,) = torch.autograd.grad(found.sum(), given)  # a prompt can be learned, up to the end of its text
    assert slope[0, 2].abs().max() > 0
    assert (slope[0, 3] == 0).all()


def test_a_patch_lies_where_its_pixels_lie():
    net = small(size=32)
    for name, weight in net.image.named_parameters():
        if "W_o" in name:  # W_o and W_out: patches no longer speak with each other
            nn.init.zeros_(weight)
    images = torch.rand(1, 3, 32, 32).repeat(2, 1, 1, 1)
    images[1, :, 9, 21] += 1  # row 2 and column 5 of the patches, away from their edges
    a, b = net.embed_patches(images)
    assert a.shape == (8, 8, 6)
    changed = (a - b).abs().amax(-1) > 1e-6
    assert changed.nonzero().tolist() == [[2, 5]]


def test_pictures_do_not_see_each_other():
    net, images = small(), torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(net.embed_images(images)[2:3], net.embed_images(images[2:3]))


def test_both_towers_can_be_looked_into():
    net, images, tokens = small(), torch.rand(2, 3, 16, 16), torch.tensor([[1, 2, 9]])
    with recorded(net, ["image.body.blocks.0.attn.pattern", "text.blocks.1.attn.pattern"]) as seen:
        net(images, tokens)
    pictured, written = seen.values()
    assert pictured.shape == (2, 2, 17, 17)
    assert written.shape == (1, 2, 3, 3)
    assert (written.triu(1) == 0).all()  # causal


def test_pairs_that_share_nothing_can_be_learned():
    torch.manual_seed(0)
    net = Clip(10, end=9, **SIZES)
    images = torch.rand(6, 3, 16, 16)
    tokens = torch.tensor([[a, b, 9] for a, b in itertools.combinations(range(4), 2)])
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(80):
        loss = contrastive_loss(net(images, tokens))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.4  # log 6 = 1.8 at the start
    assert net(images, tokens).argmax(1).tolist() == list(range(6))


def test_tokens_are_the_text_between_its_marks():
    texts = ["a red circle.", " a big pink ring and a small blue bar."]
    rows = as_tokens(texts)
    made = tokenizer()
    assert rows[:, 0].tolist() == [made.bos] * 2
    assert [made.decode(row) for row in rows.tolist()] == [" a red circle.", texts[1]]
    assert rows[1, -1] == made.sep
    assert rows[0].tolist().count(made.sep) == 1
    assert rows[0, -1] == made.pad


def claims(text):
    """What a caption says, read off its words alone: kinds with size and place, and the relation of the first two."""
    number = r"an? (?:(big|small) )?(\w+) (\w+)(?: (on the left|on the right|at the top|at the bottom))?"
    things = {(colour, shape): (size, place) for size, colour, shape, place in re.findall(number, text)}
    relation = re.search(r" (left of|right of|above|below) ", text)
    return things, relation and relation[1]


def is_so(text, scene):
    """Whether a caption is true of a scene's objects, from their centres."""
    told_of, relation = claims(text)
    seen = {(thing.colour, thing.shape): thing for thing in scene}
    if set(told_of) != set(seen):
        return False

    def lies(x, y, where):
        ahead = {"left": -x, "right": x, "top": -y, "bottom": y, "above": -y, "below": y}[where.split()[-1]]
        across = abs(y) if where.split()[-1] in ("left", "right") else abs(x)
        return ahead >= across + 0.1

    for kind, (size, place) in told_of.items():
        x, y = seen[kind].centre
        if (size and size != seen[kind].size) or (place and not lies(x - 0.5, y - 0.5, place)):
            return False
    if relation:
        (x, y), (z, w) = (seen[kind].centre for kind in list(told_of)[:2])
        return lies(x - z, y - w, relation.split()[0])
    return True


def test_a_caption_is_true_where_its_words_are():
    scenes = draw_scenes(60, seed=0, objects=(1, 2), shapes=SHAPES[:2], colours=COLOURS[:1])
    told_of = captions(scenes, seed=0)
    found = true_of(scenes, told_of)
    expected = torch.tensor([[is_so(caption.answer, things) for caption in told_of] for things in scenes.objects()])
    assert torch.equal(found, expected)
    assert found.diagonal().all()
    rest = found & ~torch.eye(60, dtype=torch.bool)
    same = torch.tensor([[a.answer == b.answer for a in told_of] for b in told_of])
    assert (rest & same).any()
    assert (rest & ~same).any()  # also in another wording


def test_the_task_ignores_what_is_true_by_chance(monkeypatch):
    caught = {}
    monkeypatch.setattr(matching, "contrastive_loss", lambda logits, ignored: caught.update(i=ignored) or logits.sum())
    read = []

    def forward(images, tokens):
        read.extend(tokenizer().decode(row) for row in tokens.tolist())
        return images.new_zeros(len(images), len(tokens))

    model = small()
    model.forward = forward
    MatchingTask(torch.device("cpu")).loss(model, 3)
    doubles = [(i, j) for i, j in itertools.permutations(range(128), 2) if read[i] == read[j]]
    assert doubles
    assert all(caught["i"][i, j] for i, j in doubles)
    assert all(f"{colour} {shape}" not in text for colour, shape in UNSEEN for text in read)
    assert all(word in " ".join(read) for word in (*COLOURS, *SHAPES))


def test_the_loss_depends_on_the_step_alone(monkeypatch):
    monkeypatch.setattr(matching, "BATCH", 12)
    torch.manual_seed(0)
    model = matching.clip(width=16, dim=8, heads=2, image_layers=1, text_layers=1)
    one, two = (MatchingTask(torch.device("cpu")) for _ in range(2))
    with torch.no_grad():
        first = one.loss(model, 0)
        assert one.loss(model, 5) != first
        torch.rand(3)
        assert two.loss(model, 0) == first
    assert 0 < first < math.log(12) + 1


def test_told_is_worded_as_a_caption():
    scenes = draw_scenes(40, seed=0)
    for things, caption in zip(scenes.objects(), captions(scenes, seed=0, templates=["list"]), strict=True):
        kinds = [(things[k].colour, things[k].shape) for k in caption.truth["objects"]]
        assert caption.answer == " " + told(kinds)


def test_one_caption_of_a_pool_is_true_of_each_picture():
    scenes, told_of = retrieval_pool(7)
    assert torch.equal(true_of(scenes, told_of), torch.eye(100, dtype=torch.bool))
    assert {len(things) for things in scenes.objects()} == {1, 2, 3}


def test_a_class_is_the_mean_direction_of_its_prompts():
    model = matching.clip(width=16, dim=8, heads=2, image_layers=1, text_layers=1)
    texts = ["a red circle.", "a red square."]
    a, b = model.embed_texts(as_tokens(texts)).detach()
    found = class_vectors(model, [texts, texts[:1]]).detach()
    torch.testing.assert_close(found, torch.stack([(a + b) / (a + b).norm(), a]))


class Known(Clip):
    """Knows what is in a picture (which holds it in its pixels) and in a text: by kinds or by their parts."""

    bound = True

    def features(self, kinds):
        """Counts of the kinds (shape, colour), or of colours and of shapes."""
        return nn.functional.normalize(kinds.flatten(1) if self.bound else torch.cat([kinds.sum(1), kinds.sum(2)], 1))

    def embed_images(self, images):
        return self.features(images[:, 0, : len(SHAPES), : len(COLOURS)])

    def embed_texts(self, tokens):
        kinds = torch.zeros(len(tokens), len(SHAPES), len(COLOURS))
        for row, ids in zip(kinds, tokens.tolist(), strict=True):
            for colour, shape in claims(tokenizer().decode(ids))[0]:
                row[SHAPES.index(shape), COLOURS.index(colour)] = 1
        return self.features(kinds)


def pictured(scenes):
    found = torch.zeros(len(scenes), 3, 32, 32)
    i, j = scenes.present.nonzero(as_tuple=True)
    found[i, 0, scenes.shape[i, j], scenes.colour[i, j]] = 1
    return found


@pytest.mark.parametrize("bound", [True, False])
def test_scores_of_models_that_know_the_objects(bound, monkeypatch):
    monkeypatch.setattr(world, "render", pictured)
    monkeypatch.setattr(Known, "bound", bound)
    model = Known(matching.VOCAB, end=tokenizer().sep, width=8, heads=2, dim=14, image_layers=1, text_layers=1)
    monkeypatch.setattr(
        Known, "embed_patches", lambda self, images: torch.zeros(len(images), 8, 8, 48 if bound else 14)
    )
    found = {name: score["value"] for name, score in matching.scores(model, Known, n=200).items()}
    sure = ["colour, zero-shot", "shape, zero-shot", "colour and shape, zero-shot", "one colour wrong"]
    assert [found[name] for name in sure] == [1.0] * 4
    assert found["pairs never shown, colour and shape"] == 1.0
    assert found["colours swapped"] == (1.0 if bound else 0.0)  # a bag of words sees no difference
    assert found["left or right"] == found["big or small"] == 0.0
    assert (found["caption of a picture, first of 100"] == 1.0) == bound
    if bound:
        assert found["list of the right length, 1 to 3"] == 1.0
    assert found["distance of the mean picture from the mean caption"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: small(size=18), "size"),
        (lambda: small(dim=0), "dim"),
        (lambda: Clip(10, end=10), "end"),
        (lambda: small().embed_texts(torch.tensor([[9, 1], [1, 2]])), "tokens"),
        (lambda: small().embed_texts(embeddings=torch.zeros(1, 2, 8)), "ends"),
        (lambda: small().embed_texts(embeddings=torch.zeros(1, 2, 8), ends=torch.tensor([2])), "ends"),
        (lambda: small().embed_texts(torch.tensor([[10, 9]])), "tokens"),
        (lambda: contrastive_loss(torch.zeros(0, 0)), "logits"),
        (lambda: as_tokens([]), "texts"),
        (lambda: class_vectors(small(), []), "prompts"),
        (lambda: class_vectors(small(), [["a red circle."], []]), "prompts"),
        (lambda: true_of(draw_scenes(2, seed=0), captions(draw_scenes(3, seed=0), seed=0)), "captions"),
    ],
)
def test_bad_input_names_the_argument(call, name):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.gpu
def test_gpu_agrees_with_cpu():
    net, images, tokens = small(), torch.rand(2, 3, 16, 16), torch.tensor([[1, 2, 9]])
    expected = net(images, tokens)
    torch.testing.assert_close(net.cuda()(images.cuda(), tokens.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)
