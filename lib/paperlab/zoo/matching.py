"""Which caption belongs to which picture: scenes of one to three objects, their captions, and what a model that has
learned to match them can do without being told any task.

*False negatives.* Of 128 scenes a third show one object of 44 kinds, so that many captions of a batch are true of other
pictures of it, word for word or in another wording. A caption is no negative of a picture that it is true of: such
pairs are left out of the loss (`true_of`), whereas captions of the same objects that say something false about where
they stand or how big they are remain negatives, the hardest of the batch.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from paperlab.checks import require_nonempty, require_same_length
from paperlab.data import scenes as world
from paperlab.data.held_out import HELD_OUT
from paperlab.data.scenes import COLOURS, DIRECTIONS, SHAPES, SIZES, Object, Scenes
from paperlab.data.scenes.wording import OPPOSITE, RELATIONS, with_article
from paperlab.data.skills.example import Example
from paperlab.nn.clip import Clip, contrastive_loss
from paperlab.zoo.language import VOCAB, sentences, tokenizer
from paperlab.zoo.scores import mean, share

BATCH = 128
UNSEEN = (("orange", "cross"), ("green", "ring"), ("pink", "square"), ("white", "triangle"))  # never drawn in training
CANDIDATES = 100  # of a retrieval
Kind = tuple[str, str]  # colour and shape: no two objects of a scene agree in both


def clip(**changes: int) -> Clip:
    """An untrained `pocket-clip`, or a sibling that differs by ``changes`` of its sizes."""
    model = Clip(VOCAB, end=tokenizer().sep, **changes)
    model.tokenizer = tokenizer()
    return model


def as_tokens(texts: Sequence[str], device: torch.device | str = "cpu") -> Int[Tensor, "texts tokens"]:
    """The texts as the text tower reads them: ``<bos> a red circle. <sep> <pad> …``, as long as the longest.

    Raises:
        ValueError: no text.
    """
    return sentences(texts, ended=True).to(device)


def true_of(scenes: Scenes, captions: Sequence[Example]) -> Bool[Tensor, "scenes captions"]:
    """Entry (i, j): is caption j, which was made for scene j, true of scene i as well?

    It is if scene i holds exactly the objects that it names (of captions all name all), and if what it says of their
    sizes, their places or the relation of two of them, if anything, is so in scene i.

    Raises:
        ValueError: not as many captions as scenes.
    """
    require_same_length(scenes=scenes, captions=captions)
    things = [{(thing.colour, thing.shape): thing for thing in row} for row in scenes.objects()]
    ways = world.relations(scenes).tolist()
    alike: dict[frozenset[Kind], list[int]] = defaultdict(list)
    for i, row in enumerate(things):
        alike[frozenset(row)].append(i)
    found = torch.zeros(len(scenes), len(scenes), dtype=torch.bool)
    for j, caption in enumerate(captions):
        for i in alike[frozenset(things[j])]:
            found[i, j] = _holds(caption.truth, things[j], things[i], ways[i])
    return found


def _holds(truth: dict, told: dict[Kind, Object], seen: dict[Kind, Object], ways: list[list[int]]) -> bool:
    """Whether what a caption of the scene ``told`` says is so in a scene of the same objects, ``seen``."""
    kinds, order = list(told), list(seen)  # from the back to the front, as the caption's truth counts them
    if truth["template"] == "sizes" and any(told[kind].size != seen[kind].size for kind in kinds):
        return False
    if any(seen[kinds[k]].place != place for k, place in truth["places"].items()):
        return False
    if truth["relation"] is None:
        return True
    a, way, b = truth["relation"]
    return ways[order.index(kinds[a])][order.index(kinds[b])] == DIRECTIONS.index(way)


class MatchingTask:
    """Fresh scenes and captions at every step; the symmetric loss without the pairs that are true by chance."""

    seen_per_step = BATCH

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def loss(self, model: Clip, step: int) -> Tensor:
        """Mean loss of the step's pairs, from pictures to captions and back."""
        scenes = world.draw_scenes(BATCH, seed=step, without=UNSEEN)
        captions = world.captions(scenes, seed=step)
        logits = model(world.render(scenes).to(self.device), as_tokens([c.answer for c in captions], self.device))
        return contrastive_loss(logits, true_of(scenes, captions).to(self.device))


def class_vectors(model: Clip, prompts: Sequence[Sequence[str]]) -> Float[Tensor, "classes dim"]:
    """One unit vector a class: the direction of the mean of its prompts' vectors (section 3.1.4 of the paper).

    Raises:
        ValueError: no class, or one without a prompt.
    """
    require_nonempty(prompts=prompts)
    for texts in prompts:
        require_nonempty(prompts=texts)
    device = model.log_scale.device
    return F.normalize(torch.stack([model.embed_texts(as_tokens(texts, device)).mean(0) for texts in prompts]), dim=-1)


def told(kinds: Sequence[Kind]) -> str:
    """The caption that lists objects: ``a red circle and a blue square.``"""
    names = [f"{with_article(colour)} {shape}" for colour, shape in kinds]
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) + "."


def retrieval_pool(seed: int) -> tuple[Scenes, list[Example]]:
    """`CANDIDATES` scenes of which no two hold the same objects, so that one caption is true of each picture.

    They are drawn as in training, one to three objects with pairs of `UNSEEN` left out, and a scene is kept if no scene
    before it holds the same colours and shapes: about one in nine is not. Each has one caption, of a random template.
    """
    scenes = world.draw_scenes(2 * CANDIDATES, seed=seed, without=UNSEEN)
    first: dict[frozenset, int] = {}
    for i, kinds in enumerate(_kinds(scenes)):
        first.setdefault(frozenset(kinds), i)
    scenes = scenes[list(first.values())[:CANDIDATES]]
    return scenes, world.captions(scenes, seed=seed)


@torch.no_grad()
def scores(model: Clip, _build: object, *, n: int = 1000) -> dict[str, dict]:
    """What the model can do on held-out scenes, each drawn ``n`` times at most.

    Attributes of single objects are recognised by captions as prompts, those of a colour averaged over the shapes and
    the other way round. Where one of two captions is preferred, they differ in one respect only, and chance is 0.5.
    """
    images, captions, gaps, kept = [], [], [], max(2, n // CANDIDATES)
    for pool in range(kept):
        scenes, told_of = retrieval_pool(HELD_OUT + pool)
        u, v = _seen(model, scenes), _read(model, [caption.answer for caption in told_of])
        own = torch.arange(CANDIDATES, device=u.device)
        images += ((u @ v.mT).argmax(1) == own).tolist()
        captions += ((v @ u.mT).argmax(1) == own).tolist()
        gaps.append((u.mean(0) - v.mean(0)).norm().item())
    return {
        **_attributes(model, n),
        "caption of a picture, first of 100": share(images, 0.8),
        "picture of a caption, first of 100": share(captions),
        **_preferences(model, n),
        "list of the right length, 1 to 3": share(_counted(model, n)),
        **_pointing(model, n),
        "distance of the mean picture from the mean caption": mean(gaps),
    }


def _attributes(model: Clip, n: int) -> dict[str, dict]:
    """Zero-shot classification of scenes of one object."""
    kinds = [[(colour, shape) for shape in SHAPES] for colour in COLOURS]
    by_colour = class_vectors(model, [[told([kind]) for kind in row] for row in kinds])
    by_shape = class_vectors(model, [[told([kind]) for kind in column] for column in zip(*kinds, strict=True)])
    by_both = class_vectors(model, [[told([kind])] for row in kinds for kind in row])
    known = world.draw_scenes(n, seed=HELD_OUT, objects=(1, 1), without=UNSEEN)
    pairs = set(UNSEEN)
    other = world.draw_scenes(10 * n, seed=HELD_OUT + 1, objects=(1, 1))
    other = other[[i for i, (kind,) in enumerate(_kinds(other)) if kind in pairs]]

    def right(scenes: Scenes, vectors: Tensor, labels: Tensor) -> list[bool]:
        return ((_seen(model, scenes) @ vectors.mT).argmax(1).cpu() == labels).tolist()

    def both(scenes: Scenes) -> Tensor:
        return scenes.colour[:, 0] * len(SHAPES) + scenes.shape[:, 0]

    return {
        "colour, zero-shot": share(right(known, by_colour, known.colour[:, 0]), 0.9),
        "shape, zero-shot": share(right(known, by_shape, known.shape[:, 0]), 0.9),
        "colour and shape, zero-shot": share(right(known, by_both, both(known))),
        "pairs never shown, colour": share(right(other, by_colour, other.colour[:, 0])),
        "pairs never shown, shape": share(right(other, by_shape, other.shape[:, 0])),
        "pairs never shown, colour and shape": share(right(other, by_both, both(other))),
    }


def _preferences(model: Clip, n: int) -> dict[str, dict]:
    """How often the true one of two captions is nearer to the picture."""
    scenes = world.draw_scenes(n, seed=HELD_OUT + 2, objects=(2, 2), without=UNSEEN)
    ways = world.relations(scenes)[:, 0, 1].tolist()
    swapped, wrong, sides = [], [], []
    for i, ((c, s), (d, t)) in enumerate(_kinds(scenes)):
        true = told([(c, s), (d, t)])
        other = [(d, s), (c, t)]
        if c != d and s != t and not set(other) & set(UNSEEN):
            swapped.append((i, true, told(other)))
            third = next(x for x in COLOURS[i % 8 :] + COLOURS if x not in (c, d) and (x, s) not in UNSEEN)
            wrong.append((i, true, told([(third, s), (d, t)])))
        way = DIRECTIONS[ways[i]] if ways[i] >= 0 else None
        if way in ("left", "right"):
            a, b = (f"{with_article(colour)} {shape}" for colour, shape in ((c, s), (d, t)))
            sides.append((i, *(f"{a} {RELATIONS[said]} {b}." for said in (way, OPPOSITE[way]))))
    single = world.draw_scenes(n, seed=HELD_OUT + 3, objects=(1, 1), without=UNSEEN)
    sizes = [
        (i, *(f"a {size} {thing.colour} {thing.shape}." for size in (thing.size, SIZES[thing.size == SIZES[0]])))
        for i, (thing,) in enumerate(single.objects())
    ]
    return {
        "one colour wrong": share(_prefers(model, scenes, wrong)),
        "colours swapped": share(_prefers(model, scenes, swapped)),
        "left or right": share(_prefers(model, scenes, sides)),
        "big or small": share(_prefers(model, single, sizes)),
    }


def _prefers(model: Clip, scenes: Scenes, asked: list[tuple[int, str, str]]) -> list[bool]:
    """Of (scene, true caption, false caption): is the true one strictly nearer to the picture?"""
    rows, true, false = zip(*asked, strict=True)
    u = _seen(model, scenes[list(rows)])
    return ((u * _read(model, true)).sum(1) > (u * _read(model, false)).sum(1)).tolist()


def _counted(model: Clip, n: int) -> list[bool]:
    """Three captions list one, two, three objects, first those that are there: is the one of their number nearest?"""
    scenes = world.draw_scenes(n, seed=HELD_OUT + 4, without=UNSEEN)
    absent = _kinds(world.draw_scenes(n, seed=HELD_OUT + 5, objects=(3, 3), without=UNSEEN))
    texts, counts = [], []
    for there, others in zip(_kinds(scenes), absent, strict=True):
        row = there + [kind for kind in others if kind not in there]
        texts += [told(row[:k]) for k in (1, 2, 3)]
        counts.append(len(there))
    near = torch.einsum("id,ikd->ik", _seen(model, scenes), _read(model, texts).unflatten(0, (-1, 3)))
    return [guess + 1 == count for guess, count in zip(near.argmax(1).tolist(), counts, strict=True)]


def _pointing(model: Clip, n: int) -> dict[str, dict]:
    """Is the patch that is most like an object's caption one that shows the object? By chance: its share of patches."""
    scenes = world.draw_scenes(n, seed=HELD_OUT + 6, objects=(2, 3), without=UNSEEN)
    u = model.embed_patches(world.render(scenes).to(model.log_scale.device)).flatten(1, 2)
    shows = F.max_pool2d(world.masks(scenes).float(), 4).flatten(2) > 0  # (n, most, patches)
    rows, objects = scenes.present.nonzero(as_tuple=True)
    v = _read(model, [told([kind]) for kinds in _kinds(scenes) for kind in kinds])
    best = torch.einsum("opd,od->op", u[rows], v).argmax(1).cpu()
    return {
        "nearest patch shows the object": share(shows[rows, objects, best].tolist()),
        "any patch shows the object": mean(shows[rows, objects].float().mean(1).tolist()),
    }


def _kinds(scenes: Scenes) -> list[list[Kind]]:
    return [[(thing.colour, thing.shape) for thing in things] for things in scenes.objects()]


def _seen(model: Clip, scenes: Scenes) -> Float[Tensor, "n dim"]:
    pictures = world.render(scenes).to(model.log_scale.device)
    return torch.cat([model.embed_images(part) for part in pictures.split(BATCH)])


def _read(model: Clip, texts: Sequence[str]) -> Float[Tensor, "n dim"]:
    tokens = as_tokens(texts, model.log_scale.device)
    return torch.cat([model.embed_texts(part) for part in tokens.split(BATCH)])
