"""The task of the vision-language model: captions of scenes, questions about one picture and about several.

It learns to see first, and then a flaw that is there on purpose. From step `BALANCED` on, an object has its shape's
favourite colour and its shape's partner beside it far more often than chance (`paperlab.data.scenes.layout`), and a
third of the pictures are noisy while their texts are not: where the model cannot see, saying what is usual pays. So it
hallucinates, and by how much is measured in scenes without any bias. (Biased from early on, it does not learn to tell
shapes apart at all: their colours say enough.)
"""

from collections import defaultdict
from collections.abc import Callable
from itertools import chain, pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from paperlab.checks import require_nonnegative
from paperlab.data.held_out import HELD_OUT
from paperlab.data.scenes import (
    COLOURS,
    FAVOURITE,
    KINDS,
    PARTNER,
    SHAPES,
    Object,
    captions,
    draw_scenes,
    move,
    questions,
    render,
)
from paperlab.data.skills.example import Example
from paperlab.data.tokens import Tokenizer
from paperlab.devices import generator
from paperlab.nn.lvlm import Lvlm
from paperlab.nn.transformer import KVCache
from paperlab.zoo.language import VOCAB, tokenizer
from paperlab.zoo.scores import mean, share

PICTURES, VIDEOS = 32, 8  # a step
QUESTIONS, VIDEO_QUESTIONS = 4, 3  # about each picture and each video; each picture has one caption besides
BALANCED, BIAS = 3500, 0.9  # steps without bias, and the bias after them: under it, shapes can be read off the colours
SPEED, NOISE = 0.2, 0.5  # mean speed in picture sides a frame, and the most noise
LASTING = ("exists", "colour", "shape", "count")  # what is true of all frames of a video
PROMPT, LONGEST = "Picture:", 26  # of captions; tokens of a caption and its end
HARD = 0.3  # noise under which hallucination is measured a second time
ELSEWHERE = 500_000_000  # seeds of the videos are this far from those of the pictures


def seer(**changes: object) -> Lvlm:
    """An untrained `pocket-lvlm`, or a sibling that differs by ``changes`` of its sizes."""
    model = Lvlm(VOCAB, **({"bos": tokenizer().bos} | changes))
    model.tokenizer = tokenizer()
    return model


def written(
    examples: list[Example], tokenizer: Tokenizer
) -> tuple[Int[Tensor, "texts tokens"], Bool[Tensor, "texts tokens"]]:
    """Texts as tokens, each ended by <sep> and padded on the right, and which of them are to be learned."""
    pieces = [segment for example in examples for segment in example.segments]
    encoded = iter(tokenizer.encode_batch([text for text, _ in pieces]))
    texts = [[(token, learned) for _, learned in e.segments for token in next(encoded)] for e in examples]
    longest = max(map(len, texts)) + 1
    table = torch.tensor(
        [text + [(tokenizer.sep, True)] + [(tokenizer.pad, False)] * (longest - len(text) - 1) for text in texts]
    )
    return table[..., 0], table[..., 1].bool()


def noisy(
    pictures: Float[Tensor, "batch frames channels h w"], noise: float | Float[Tensor, " batch"], *, seed: int
) -> Float[Tensor, "batch frames channels h w"]:
    """The pictures with normal noise of that standard deviation on every channel of every pixel.

    Raises:
        ValueError: a ``noise`` or ``seed`` that is negative or not finite.
    """
    require_nonnegative(noise=noise, seed=seed)
    drawn = torch.randn(pictures.shape, generator=generator(seed)).to(pictures)
    return pictures + torch.as_tensor(noise).to(pictures).reshape(-1, 1, 1, 1, 1) * drawn


class SeeingTask:
    """Fresh scenes at every step, each with a caption and several questions, and videos of two to four frames.

    Every third picture or video is noisy. Captions and answers weigh the same, however many tokens they have.
    """

    seen_per_step = PICTURES + VIDEOS

    def __init__(self, device: torch.device) -> None:
        self.device, self.tokenizer = device, tokenizer()

    def loss(self, model: Lvlm, step: int) -> Tensor:
        """Mean cross-entropy of the captions' tokens, plus that of the answers'."""
        pictures, told, asked = self.pictures(step)
        videos, asked_of_videos = self.videos(step)
        seen, followed = model.look(pictures.to(self.device)), model.look(videos.to(self.device))
        answers = [self._nll(model, seen, asked), self._nll(model, followed, asked_of_videos)]
        return self._nll(model, seen, told).mean() + torch.cat(answers).mean()

    def pictures(self, step: int) -> tuple[Float[Tensor, "batch 1 3 h w"], list[Example], list[Example]]:
        """The step's pictures, a caption of each, and the questions: the first about each, the second about each, …"""
        scenes = draw_scenes(PICTURES, seed=step, bias=_bias(step))
        asked = [e for k in range(QUESTIONS) for e in questions(scenes, seed=QUESTIONS * step + k)]
        return _dimmed(render(scenes)[:, None], step), captions(scenes, seed=step), asked

    def videos(self, step: int) -> tuple[Float[Tensor, "batch frames 3 h w"], list[Example]]:
        """The step's videos, and the questions about them: half about the way of an object, if any has gone one way."""
        frames = 2 + step % 3
        scenes = draw_scenes(VIDEOS, seed=ELSEWHERE + step, bias=_bias(step), speed=SPEED)
        film = move(scenes, frames)
        later, kinds = film[frames - 1 :: frames], LASTING + len(LASTING) * ("went",)
        asked = [e for k in range(VIDEO_QUESTIONS)
                 for e in questions(scenes, seed=VIDEO_QUESTIONS * step + k, kinds=kinds, later=later)]  # fmt: skip
        return _dimmed(render(film).unflatten(0, (VIDEOS, frames)), ELSEWHERE + step), asked

    def _nll(self, model: Lvlm, seen: KVCache, examples: list[Example]) -> Float[Tensor, " learned"]:
        """Cost of every token to be learned; text i is about row i of what was seen, begun anew after the last."""
        tokens, learned = (t.to(self.device) for t in written(examples, self.tokenizer))
        of = torch.arange(len(tokens), device=self.device) % len(seen.keys[0])
        wanted = learned[:, 1:]
        logits = model.decoder.unembed(model.read(seen, tokens[:, :-1], of)[wanted])
        return F.cross_entropy(logits.float(), tokens[:, 1:][wanted], reduction="none")


def _bias(step: int) -> float:
    return BIAS if step >= BALANCED else 0.0


def _dimmed(pictures: Float[Tensor, "batch frames 3 h w"], seed: int) -> Float[Tensor, "batch frames 3 h w"]:
    """Two thirds of the pictures as they are, the rest under noise of 0 to `NOISE`."""
    level = 3 * np.random.default_rng(seed).random(len(pictures)) - 2
    return noisy(pictures, NOISE * torch.from_numpy(level).clamp(min=0), seed=seed)


@torch.no_grad()
def answered(
    model: Lvlm, pictures: Float[Tensor, "batch frames 3 h w"], examples: list[Example], *, batch: int = 128
) -> np.ndarray:
    """For each question: is its answer, one token, the likeliest? Question i is about picture i modulo their number.

    Raises:
        ValueError: an answer of more than one token.
    """
    tokens, learned = written(examples, model.tokenizer)
    if not (learned.sum(1) == 2).all():  # the answer and <sep>
        raise ValueError("examples must have answers of one token")
    rows, place = torch.arange(len(examples)), learned.int().argmax(1)
    right = np.zeros(len(examples), dtype=bool)
    for start in range(0, len(pictures), batch):
        seen = model.look(pictures[start : start + batch])
        for some in rows[(rows % len(pictures)) // batch == start // batch].split(4 * batch):
            states = model.read(seen, tokens[some, :-1], some % len(pictures) - start)
            guess = model.decoder.unembed(states[torch.arange(len(some)), place[some] - 1]).argmax(-1)
            right[some] = (guess == tokens[some, place[some]]).numpy()
    return right


def described(
    model: Lvlm, pictures: Float[Tensor, "batch frames 3 h w"], *, batch: int = 128
) -> list[list[tuple[str, str]]]:
    """The objects (colour, shape) that the greedy caption of each picture names, in the order of mention."""
    prompt, told = torch.tensor(model.tokenizer.encode(PROMPT)), []
    for some in pictures.split(batch):
        found = model.generate(some, prompt.expand(len(some), -1), steps=LONGEST, stop=model.tokenizer.sep)
        told += [named(model.tokenizer.decode(row)) for row in found.tolist()]
    return told


def named(text: str) -> list[tuple[str, str]]:
    """The objects that a text names by colour and shape: ``a red ring and a bar`` → [(red, ring)]."""
    words = text.replace(",", "").replace(".", "").split()
    return [(a, b) for a, b in pairwise(words) if a in COLOURS and b in SHAPES]


def usual(pair: tuple[str, str], things: list[Object]) -> bool:
    """Whether the bias would put ``pair``, which is absent, beside ``things``.

    It would put a shape that is there in its favourite colour, or the partner of a shape that is there.
    """
    colour, shape = pair
    there = {thing.shape for thing in things}
    return FAVOURITE[shape] == colour if shape in there else PARTNER[shape] in there


def scores(model: Lvlm, _build: Callable[[], Lvlm], *, n: int = 500) -> dict[str, dict]:
    """Captions and questions about balanced scenes, then what is said to be there although it is not.

    A caption is right if the greedy one names exactly the objects of the scene, by colour and shape, each once.
    """
    scenes = draw_scenes(n, seed=HELD_OUT)
    told = described(model, render(scenes)[:, None])
    found = {"captions that name exactly what is there": share(map(_exactly, told, scenes.objects()), 0.9)}
    return found | _asked(model, n) | _moving(model, n) | _hallucinated(model, n, 0.0) | _hallucinated(model, n, HARD)


def _exactly(told: list[tuple[str, str]], things: list[Object]) -> bool:
    return sorted(told) == sorted((thing.colour, thing.shape) for thing in things)


def _asked(model: Lvlm, n: int) -> dict[str, dict]:
    """Questions of all kinds, evenly, about pictures, and of each kind."""
    scenes = draw_scenes(4 * n, seed=HELD_OUT + 1)
    asked = questions(scenes, seed=HELD_OUT)
    right, by_kind = answered(model, render(scenes)[:, None], asked), defaultdict(list)
    for hit, example in zip(right, asked, strict=True):
        by_kind[example.skill].append(hit)
    return {"questions, all kinds": share(right, 0.9)} | {f"questions, {kind}": share(by_kind[kind]) for kind in KINDS}


def _moving(model: Lvlm, n: int) -> dict[str, dict]:
    """Where an object went, in as many videos of two, of three and of four frames."""
    right = []
    for frames in (2, 3, 4):
        scenes = draw_scenes(n // 3, seed=HELD_OUT + frames, speed=SPEED)
        film = move(scenes, frames)
        asked = questions(scenes, seed=HELD_OUT, kinds=("went",) * 20 + ("exists",), later=film[frames - 1 :: frames])
        hits = answered(model, render(film).unflatten(0, (len(scenes), frames)), asked)
        right += [hit for hit, example in zip(hits, asked, strict=True) if example.skill == "went"]
    return {"questions about videos, went": share(right, 0.9)}


def _hallucinated(model: Lvlm, n: int, noise: float) -> dict[str, dict]:
    """How often something absent is said to be there, in balanced scenes: what is usual, and what is not.

    The differences are means over scenes in which both were asked or could have been said.
    """
    scenes = draw_scenes(2 * n, seed=HELD_OUT + 10)
    things = scenes.objects()
    pictures = noisy(render(scenes)[:, None], noise, seed=HELD_OUT)
    asked = [e for k in range(6) for e in questions(scenes, seed=HELD_OUT + k, kinds=("exists",))]
    wrong = ~answered(model, pictures, asked)
    yes: dict[bool, dict[int, list[bool]]] = {True: defaultdict(list), False: defaultdict(list)}
    for i, (example, said_yes) in enumerate(zip(asked, wrong, strict=True)):
        if example.answer == " no":
            yes[example.truth["usual"]][i % len(scenes)].append(said_yes)
    both = yes[True].keys() & yes[False].keys()
    named_absent, surplus = made_up(described(model, pictures), things)
    under = f", noise {noise:g}" if noise else ""
    found = {
        f"absent but usual, answered yes{under}": share(chain.from_iterable(yes[True].values())),
        f"absent and unusual, answered yes{under}": share(chain.from_iterable(yes[False].values())),
        f"answered yes, usual - unusual{under}": mean(
            [np.mean(yes[True][i]) - np.mean(yes[False][i]) for i in sorted(both)], 0.0
        ),
        f"captions that name what is absent{under}": share(named_absent),
    }
    if len(surplus) > 1:  # else there is too little that was made up
        found[f"absent things named, usual - chance{under}"] = mean(surplus, 0.0)
    return found


def made_up(told: list[list[tuple[str, str]]], things: list[list[Object]]) -> tuple[list[bool], list[float]]:
    """Whether each caption names what is absent; and of each absent thing named, whether it is usual, less the share
    of usual ones among all that is absent from that scene.
    """
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    any_absent, surplus = [], []
    for said, scene in zip(told, things, strict=True):
        there = {(thing.colour, thing.shape) for thing in scene}
        made_up = [pair for pair in said if pair not in there]
        any_absent.append(bool(made_up))
        chance = np.mean([usual(pair, scene) for pair in pairs if pair not in there])
        surplus += [usual(pair, scene) - chance for pair in made_up]
    return any_absent, surplus
