"""The encoder's task (which token stood here?) on the decoders' rows, and what it has learned from it.

Devlin et al., 2018, https://arxiv.org/abs/1810.04805. There 15% of all tokens are chosen; here 20%, and half of every
answer, because an answer is what most of a row's tokens are about.
"""

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperlab.data import corpus, lexicon, skills
from paperlab.data.held_out import HELD_OUT
from paperlab.nn.transformer import Transformer
from paperlab.zoo.examine import last_run
from paperlab.zoo.language import ANSWER, CONTEXT, VOCAB, Mixture, encode, padded
from paperlab.zoo.scores import mean, share

CHOSEN, CHOSEN_IN_ANSWERS = 0.2, 0.5
REPLACED, KEPT = 0.1, 0.1  # of the chosen: exchanged for a random token, left as they are; the rest become <mask>


class MaskedTask:
    """Cross-entropy of the chosen tokens, given all others."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.mixture = device, Mixture()
        self.seen_per_step = self.mixture.rows(0)[0][:, :CONTEXT].numel()

    def loss(self, model: Transformer, step: int) -> Tensor:
        """Mean over the step's chosen tokens."""
        tokens, weights = (t[:, :CONTEXT] for t in self.mixture.rows(step))
        rng = np.random.default_rng((3, step))
        chance = np.where(weights.numpy() == ANSWER, CHOSEN_IN_ANSWERS, CHOSEN)
        chosen = torch.from_numpy(rng.random(tokens.shape) < chance) & (tokens >= 4)  # never a special token
        shown = hide(tokens, chosen, self.mixture.tokenizer.mask, rng).to(self.device)
        states = model.states(shown)
        chosen = chosen.to(self.device)
        return F.cross_entropy(model.unembed(states[chosen]).float(), tokens.to(self.device)[chosen])


def hide(
    tokens: Int[Tensor, "rows tokens"], chosen: Bool[Tensor, "rows tokens"], mask: int, rng: np.random.Generator
) -> Int[Tensor, "rows tokens"]:
    """The tokens with most of the chosen replaced by ``mask``, one in ten by a random token; one in ten stays."""
    fate = torch.from_numpy(rng.random(tokens.shape))
    other = torch.from_numpy(rng.integers(4, VOCAB, tokens.shape))
    shown = torch.where(chosen & (fate >= REPLACED + KEPT), mask, tokens)
    return torch.where(chosen & (fate < REPLACED), other, shown)


@torch.no_grad()
def filled_in(model: nn.Module, examples: list[skills.Example], *, batch: int = 64) -> np.ndarray:
    """For each example: is every token of its last answer the likeliest one, with the whole answer masked?"""
    ids, marks = encode(examples, model.tokenizer)
    right = np.zeros(len(ids), dtype=bool)
    order = np.argsort([len(i) for i in ids])  # rows of like lengths together: little padding
    for rows in np.array_split(order, max(1, len(ids) // batch)):
        tokens, padding = padded([ids[r][:CONTEXT] for r in rows], model.tokenizer.pad)
        answers = [last_run(marks[r] > 0) for r in rows]
        shown = tokens.clone()
        for k, answer in enumerate(answers):
            shown[k, answer] = model.tokenizer.mask
        guess = model(shown, padding=padding).argmax(-1)
        right[rows] = [bool((guess[k, a] == tokens[k, a]).all()) for k, a in enumerate(answers)]
    return right


def scores(model: Transformer, _build: object, *, n: int = 500) -> dict[str, dict]:
    """Masked tokens of held-out text beside what counts can do, answers filled in, and a probe for the topic."""
    found = {}
    for name, documents in (("English", corpus.english()), ("Python", corpus.python())):
        found |= {f"{name}, {what}": score for what, score in _text(model, documents).items()}
    for skill, knobs in (
        ("key_value_retrieval", {}), ("induction_copy", {}), ("addition", {"digits": (2, 2)}), ("indirect_object", {}),
        ("facts", {"part": "train", "hops": 1, "form": "plain"}), ("sentiment", {}), ("boolean", {}),
        ("translation", {}), ("in_context", {"shots": (8, 8)}),
    ):  # fmt: skip
        examples = skills.SKILLS[skill](n, seed=HELD_OUT, **({"part": "held_out"} | knobs))
        found[f"{skill.replace('_', ' ')}, answer filled in"] = share(filled_in(model, examples))
    return found | _topic_probe(model)


@torch.no_grad()
def _text(model: Transformer, documents: list[corpus.Document], windows: int = 60) -> dict[str, dict]:
    """Share of masked tokens found in windows of held-out text: by the model, as the most frequent token, and as the
    most frequent one after the token before, which is shown to the counts even where it is masked.
    """
    train, held = corpus.split(documents)
    tokenizer, rng = model.tokenizer, np.random.default_rng(HELD_OUT)
    seen = np.concatenate([[tokenizer.bos, *i] for i in tokenizer.encode_batch([d.text for d in train])])
    pairs, counts = np.unique(seen[:-1].astype(np.int64) * VOCAB + seen[1:], return_counts=True)
    most = np.bincount(seen).argmax()
    after = np.full(VOCAB, most)
    rising = np.argsort(counts, kind="stable")
    after[pairs[rising] // VOCAB] = pairs[rising] % VOCAB  # the last that is written is the most frequent
    texts = [ids for ids in tokenizer.encode_batch([d.text for d in held]) if len(ids) >= CONTEXT]
    ours, unigram, bigram = [], [], []
    for ids in (texts[i % len(texts)] for i in range(windows)):
        start = rng.integers(len(ids) - CONTEXT + 1)
        tokens = torch.tensor([tokenizer.bos, *ids[start : start + CONTEXT - 1]])
        chosen = torch.from_numpy(rng.random(CONTEXT) < 0.15)
        chosen[0] = False
        guess = model(tokens.masked_fill(chosen, tokenizer.mask)[None])[0].argmax(-1)
        target, before = tokens[chosen].numpy(), tokens[:-1][chosen[1:]].numpy()
        ours.append((guess[chosen].numpy() == target).mean())
        unigram.append((target == most).mean())
        bigram.append((target == after[before]).mean())
    return {
        "masked tokens found": mean(ours),
        "masked tokens found - unigram": mean(np.subtract(ours, unigram), 0.0),
        "masked tokens found - bigram": mean(np.subtract(ours, bigram), 0.0),
    }


@torch.no_grad()
def _topic_probe(model: Transformer, shots: int = 8, draws: int = 20) -> dict[str, dict]:
    """Accuracy of a logistic regression that has seen a few texts a topic: on mean states, beside word counts."""
    from sklearn.linear_model import LogisticRegression  # here: who only loads a model should not wait for it

    tokenizer, topics = model.tokenizer, list(lexicon.TOPICS)
    ours, words = [], []
    held = skills.topic(400, seed=HELD_OUT, part="held_out")
    pool = skills.topic(4000, seed=HELD_OUT + 1, part="train")
    by_topic = {t: [e for e in pool if e.truth["topic"] == t] for t in topics}
    for draw in range(draws):
        train = [e for t in topics for e in by_topic[t][draw * shots : (draw + 1) * shots]]
        examples = train + held
        ids = [np.array(i) for i in tokenizer.encode_batch([e.prompt for e in examples])]
        tokens, padding = padded(ids, tokenizer.pad)
        states = model.states(tokens, padding=padding).masked_fill(padding[..., None], 0).sum(1)
        means = (states / (~padding).sum(1, keepdim=True)).numpy()
        counts = np.stack([np.bincount(i, minlength=VOCAB) for i in ids])
        labels = [e.truth["topic"] for e in examples]
        for features, found in ((means, ours), (counts, words)):
            probe = LogisticRegression(max_iter=1000).fit(features[: len(train)], labels[: len(train)])
            found.append(probe.score(features[len(train) :], labels[len(train) :]))
    return {
        f"topic, probe with {shots} texts each": mean(ours),
        f"topic, probe with {shots} texts each - bag of words": mean(np.subtract(ours, words), 0.0),
    }
