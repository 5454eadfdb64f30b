"""Examining a language model: is the answer right, token for token?"""

import numpy as np
import torch
from torch.nn import functional as F

from paperlab.data import corpus, skills
from paperlab.data.held_out import HELD_OUT
from paperlab.ngrams import KneserNey
from paperlab.nn.hooks import recorded
from paperlab.nn.transformer import Transformer
from paperlab.zoo.language import CONTEXT, VOCAB, Mixture, encode, padded
from paperlab.zoo.scores import mean, share


@torch.no_grad()
def exact(model: Transformer, examples: list[skills.Example], *, batch: int = 64) -> np.ndarray:
    """For each example: is every token of its last answer the likeliest one, given all before it?

    That is whether greedy decoding would give the answer, found with one pass.
    """
    ids, marks = encode(examples, model.tokenizer)
    right = np.zeros(len(ids), dtype=bool)
    order = np.argsort([len(i) for i in ids])  # rows of like lengths together: little padding
    for rows in np.array_split(order, max(1, len(ids) // batch)):
        tokens, _ = padded([ids[r][:CONTEXT] for r in rows], model.tokenizer.pad)
        found = model.states(tokens[:, :-1])
        for k, r in enumerate(rows):
            last = last_run(marks[r] > 0)
            guess = model.unembed(found[k, last.start - 1 : last.stop - 1]).argmax(-1)
            right[r] = bool((guess == tokens[k, last.start : last.stop]).all())
    return right


@torch.no_grad()
def ended(model: Transformer, examples: list[skills.Example]) -> list[bool]:
    """For each example that ends with its answer: is the likeliest token after it <bos>, where another text begins?"""
    ids = [i for i, marks in zip(*encode(examples, model.tokenizer), strict=True) if marks[-1] > 0]
    tokens, padding = padded([i[:CONTEXT] for i in ids], model.tokenizer.pad)
    last = model.states(tokens)[torch.arange(len(ids)), (~padding).sum(1) - 1]
    return (model.unembed(last).argmax(-1) == model.tokenizer.bos).tolist()


def last_run(marked: np.ndarray) -> slice:
    """The last run of marked tokens: where the last answer stands."""
    stop = int(np.flatnonzero(marked)[-1]) + 1
    start = stop
    while start and marked[start - 1]:
        start -= 1
    return slice(start, stop)


@torch.no_grad()
def bits_per_byte(model: Transformer, text: str) -> float:
    """Mean cost of a text in windows of the model's context, each window after the first half of the one before it."""
    ids = torch.tensor(model.tokenizer.encode(text))
    half, total = CONTEXT // 2, 0.0
    for start in range(0, len(ids), half):
        begin = max(0, start - half)
        window = torch.cat([torch.tensor([model.tokenizer.bos]), ids[begin : start + half]])[None]
        nll = F.cross_entropy(model(window[:, :-1])[0], window[0, 1:], reduction="none")
        total += nll[start - begin :].sum().item()
    return total / np.log(2) / len(text.encode())


@torch.no_grad()
def year_difference(model: Transformer, examples: list[skills.Example]) -> np.ndarray:
    """Probability of the years that are right less that of those that are wrong, of each `greater_than` example."""
    ids, marks = encode(examples, model.tokenizer)
    digits = torch.tensor([model.tokenizer.token_id(str(d)) for d in range(10)])
    found = []
    for tokens, mark, example in zip(ids, marks, examples, strict=True):
        start = last_run(mark > 0).start
        prompt = torch.from_numpy(tokens[:start])
        tens = model(prompt[None])[0, -1].softmax(-1)[digits]
        branches = torch.cat([prompt.expand(10, -1), digits[:, None]], dim=1)
        units = model(branches)[:, -1].softmax(-1)[:, digits]
        years = (tens[:, None] * units).flatten()
        right = torch.zeros(100, dtype=torch.bool)
        right[[int(year) for year in example.truth["right"]]] = True
        found.append((years[right].sum() - years[~right].sum()).item())
    return np.array(found)


@torch.no_grad()
def induction(model: Transformer, *, rows: int = 64) -> np.ndarray:
    """Is the predicted token right, wherever a segment of random tokens comes back? One answer a place."""
    tokens, repeated = skills.random_repeats(rows, CONTEXT, VOCAB, seed=HELD_OUT)
    guess = model(tokens[:, :-1]).argmax(-1)
    return (guess == tokens[:, 1:])[repeated[:, 1:]].numpy()


@torch.no_grad()
def at_rest(model: Transformer, texts: list[str]) -> list[float]:
    """For each text the share of feed-forward units that are exactly 0, over its first tokens and all layers."""
    found = []
    for text in texts:
        tokens = torch.tensor([[model.tokenizer.bos, *model.tokenizer.encode(text)][:CONTEXT]])
        with recorded(model, lambda name: name.endswith("mlp.act")) as seen:
            model.states(tokens)
        found.append(torch.stack(list(seen.values())).eq(0).double().mean().item())
    return found


def scores(model: Transformer, _build: object, *, n: int = 500) -> dict[str, dict]:
    """Every skill on what was held out of it, and the cost of held-out text beside that of a Kneser–Ney 5-gram."""

    def asked(skill: str, bar: float | None = None, **knobs: object) -> dict:
        knobs = {"part": "held_out"} | knobs
        return share(exact(model, skills.SKILLS[skill](n, seed=HELD_OUT, **knobs)), bar)

    far = {"context": (195, 205), "value_tokens": (4, 4)}
    old, new = _two_hops(n)
    found = {
        "key-value retrieval, 4 tokens, 200 back": asked("key_value_retrieval", 0.95, **far, pairs=(8, 10)),
        "needle, 4 tokens in 200": asked("needle", **far),
        "induction on random tokens": share(induction(model), 0.95),
        "induction copying of words": asked("induction_copy"),
        "addition, 2 digits": asked("addition", 0.9, digits=(2, 2)),
        "addition, 3 digits": asked("addition", 0.6, digits=(3, 3)),
        "subtraction, 2 digits": asked("subtraction", digits=(2, 2)),
        "indirect object": asked("indirect_object", 0.9),
        "greater than, probability difference": mean(year_difference(model, skills.greater_than(
            200, seed=HELD_OUT, part="held_out")), 0.8),
        "docstring argument": asked("docstring", 0.9),
        "facts, 1 hop": asked("facts", 0.95, part="train", hops=1, form="plain"),
        "facts, 2 hops, trained kinds, questions never asked": share(exact(model, old)),
        "facts, 2 hops, asked in training": asked("facts", 0.95, part="train", hops=2),
        "facts, 2 hops, kinds never asked": share(exact(model, new)),
        "statements, true or false": asked("statements"),
        "sentiment": asked("sentiment", 0.95),
        "topic": asked("topic"),
        "boolean": asked("boolean", 0.9),
        "coin flip": asked("coin_flip"),
        "comparison": asked("comparison"),
        "code": asked("code"),
        "translation": asked("translation"),
        "in context, 0 shots": asked("in_context", shots=(0, 0)),
        "in context, 8 shots": asked("in_context", shots=(8, 8)),
        "answers that end where they should": share(
            ended(model, [e for make in skills.SKILLS.values() for e in make(30, seed=HELD_OUT)])),
    }  # fmt: skip
    if model.config.activation == "relu":
        found["English, feed-forward units at zero"] = mean(at_rest(model, _held_out(corpus.english())))
    return found | _text(model)


def _two_hops(n: int) -> tuple[list[skills.Example], list[skills.Example]]:
    """Two-hop questions that were never asked: of kinds that were, and of kinds that never were."""
    held = skills.facts(8 * n, seed=HELD_OUT, part="held_out", hops=2)
    kinds = [[e for e in held if e.truth["new_composition"] == new][:n] for new in (False, True)]
    return kinds[0], kinds[1]


def _held_out(documents: list[corpus.Document]) -> list[str]:
    return [document.text[:4000] for document in corpus.split(documents)[1] if len(document.text) > 400][:40]


def _text(model: Transformer) -> dict[str, dict]:
    """Bits per byte of held-out English and Python, and how many fewer than a 5-gram's of the same training text."""
    mixture = Mixture()
    rival = KneserNey(np.concatenate([mixture.english, mixture.python]).astype(np.int64), vocab=VOCAB)
    found = {}
    for name, documents in (("English", corpus.english()), ("Python", corpus.python())):
        ours, theirs = [], []
        for text in _held_out(documents):
            ids = np.array([model.tokenizer.bos] * 4 + model.tokenizer.encode(text))
            ours.append(bits_per_byte(model, text))
            theirs.append(-rival.log_probabilities(ids).sum() / np.log(2) / len(text.encode()))
        found[f"{name}, bits per byte"] = mean(ours)
        found[f"{name}, 5-gram, bits per byte"] = mean(theirs)
        found[f"{name}, bits per byte less than 5-gram"] = mean(np.subtract(theirs, ours), 0.0)
    return found
