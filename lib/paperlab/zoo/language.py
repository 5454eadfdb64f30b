"""The language mixture: English, Python, repeated random tokens and skills with an exact answer, in rows of one length.

Every decoder and encoder of the zoo reads the same rows in the same order. What they are depends on the step alone; the
texts that are held out (by file) and the seeds from `paperlab.data.held_out.HELD_OUT` on are never trained on.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from paperlab.checks import require_nonempty
from paperlab.data import corpus, skills
from paperlab.data.tokens import Tokenizer, train_bpe
from paperlab.nn.transformer import Transformer, TransformerConfig

VOCAB, CONTEXT, ROWS = 2048, 256, 16
BLOCK = 32  # steps whose skill rows are made together: a generator is quicker for many examples at once
TOKENIZER = Path(__file__).parent / "weights" / "tokenizer.json"

TEXT, CODE, REPEATS = 0.12, 0.18, 0.2  # shares of the rows; the rest are skills
SHORT, LONGER = 16, 16  # repeated segments have at most 16 tokens at first, one more every 16 steps, to half a row
BALANCE = 0.01  # weight of the experts' balance loss, as in Fedus et al. (2021)
ANSWER = 2.0  # weight of an answer's token; what stands before it is not learned
ENDING = 1.0  # weight of the token after an answer: where an answer ends is learned too

# How often an example of each skill is drawn, in proportion; long ones are dear, hard ones need many.
SHARES = {
    "key_value_retrieval": 7, "needle": 3, "induction_copy": 3, "addition": 28, "subtraction": 18,
    "indirect_object": 8, "greater_than": 8, "docstring": 8, "facts": 80, "statements": 12, "sentiment": 5, "topic": 4,
    "boolean": 24, "translation": 9, "in_context": 12, "coin_flip": 10, "code": 6, "comparison": 6,
}  # fmt: skip


def make_tokenizer() -> Tokenizer:
    """The zoo's tokenizer, trained anew on as much Python as English, and on a little of every skill."""
    english, _ = corpus.split(corpus.english())
    python, _ = corpus.split(corpus.python())
    budget = sum(len(document.text) for document in english)
    order = np.random.default_rng(0).permutation(len(python))
    sizes = np.cumsum([len(python[i].text) for i in order])
    some = [python[i].text for i in order[: int(np.searchsorted(sizes, budget))]]
    told = [example.text for make in skills.SKILLS.values() for example in make(300, seed=0)]
    return train_bpe([document.text for document in english] + some + told, VOCAB)


@cache
def tokenizer() -> Tokenizer:
    """The tokenizer that all language models of the zoo share.

    Raises:
        FileNotFoundError: its file is missing; ``python -m paperlab.zoo tokenizer`` makes it.
    """
    return Tokenizer.load(TOKENIZER)


def sentences(texts: Sequence[str], *, ended: bool = False) -> Int[Tensor, "texts tokens"]:
    """Texts as rows of tokens: ``<bos> a red circle. <pad> …``, with ``ended`` a <sep> after the text; "" stays empty.

    Raises:
        ValueError: no text.
    """
    require_nonempty(texts=texts)
    made = tokenizer()
    encoded = made.encode_batch([" " + text.strip() if text.strip() else "" for text in texts])
    return padded([[made.bos, *ids, *[made.sep] * ended] for ids in encoded], made.pad)[0]


def padded(ids: Sequence[Sequence[int] | np.ndarray], pad: int) -> tuple[Int[Tensor, "n most"], Bool[Tensor, "n most"]]:
    """Rows of equal length, padded on the right, and True where there is only padding."""
    rows = pad_sequence([torch.as_tensor(i) for i in ids], batch_first=True, padding_value=-1)
    return rows.where(rows >= 0, pad), rows < 0


def decoder(**changes: object) -> Transformer:
    """An untrained `pocket-gpt`, or a sibling that differs by ``changes`` of its configuration."""
    sizes = {"vocab": VOCAB, "layers": 6, "width": 128, "heads": 4, "context": CONTEXT, "hidden": 512, "readout": True}
    model = Transformer(TransformerConfig(**(sizes | changes)))
    model.tokenizer = tokenizer()
    return model


@cache
def streams() -> tuple[np.ndarray, np.ndarray]:
    """The tokens of the training part of the English and of the Python corpus, every document begun by <bos>."""
    found = []
    for documents in (corpus.english(), corpus.python()):
        encoded = tokenizer().encode_batch([document.text for document in corpus.split(documents)[0]])
        found.append(np.concatenate([np.array([tokenizer().bos, *ids], dtype=np.int32) for ids in encoded]))
    return found[0], found[1]


class Mixture:
    """The rows of the mixture, by step."""

    def __init__(self) -> None:
        self.tokenizer = tokenizer()
        self.english, self.python = streams()
        self._held: tuple[int, list[np.ndarray], list[np.ndarray]] = (-1, [], [])

    def rows(self, step: int) -> tuple[Int[Tensor, "rows tokens"], Float[Tensor, "rows tokens"]]:
        """Tokens of ``ROWS`` rows, ``CONTEXT`` + 1 long, and the weight of each as something to be learned."""
        rng = np.random.default_rng((1, step))
        kinds = rng.choice(4, ROWS, p=[TEXT, CODE, REPEATS, 1 - TEXT - CODE - REPEATS])
        tokens = np.full((ROWS, CONTEXT + 1), self.tokenizer.pad, dtype=np.int64)
        weights = np.zeros((ROWS, CONTEXT + 1), dtype=np.float32)
        for row, kind in enumerate(kinds):
            if kind < 2:
                stream = (self.english, self.python)[kind]
                start = rng.integers(len(stream) - CONTEXT - 1)
                tokens[row], weights[row] = stream[start : start + CONTEXT + 1], 1.0
            elif kind == 3:
                self._skills(step, row, tokens[row], weights[row])
        if (kinds == 2).any():
            segment = (2, min(CONTEXT // 2, SHORT + step // LONGER))
            drawn, learned = skills.random_repeats(
                int((kinds == 2).sum()), CONTEXT + 1, VOCAB, seed=step, segment=segment
            )
            tokens[kinds == 2], weights[kinds == 2] = drawn.numpy(), learned.numpy()
        return torch.from_numpy(tokens), torch.from_numpy(weights)

    def _skills(self, step: int, row: int, tokens: np.ndarray, weights: np.ndarray) -> None:
        """Fill a row with examples of skills; one that does not fit is cut off, and its rest is dropped."""
        block, place = divmod(step, BLOCK)
        if self._held[0] != block:
            self._held = (block, *self._examples(block))
        _, ids, marks = self._held
        at, k = 0, (place * ROWS + row) * len(ids) // (BLOCK * ROWS)  # rows of a block begin at different examples
        while at <= CONTEXT:
            room = CONTEXT + 1 - at
            piece, mark = ids[k % len(ids)][:room], marks[k % len(ids)][:room]
            tokens[at : at + len(piece)], weights[at : at + len(piece)] = piece, mark
            at, k = at + len(piece), k + 1
        ends = (weights[:-1] == ANSWER) & (weights[1:] == 0)
        weights[1:][ends] = ENDING

    def _examples(self, block: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Enough examples for a block's rows, shuffled: their tokens, begun by <bos>, and their weights."""
        rng = np.random.default_rng((2, block))
        total = BLOCK * ROWS * 6
        counts = rng.multinomial(total, np.array(list(SHARES.values())) / sum(SHARES.values()))
        found = [example for (name, n) in zip(SHARES, counts, strict=True) if n
                 for example in skills.SKILLS[name](int(n), seed=block)]  # fmt: skip
        rng.shuffle(found)
        return encode(found, self.tokenizer)


def encode(examples: list[skills.Example], tokenizer: Tokenizer) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Each example's tokens, begun by <bos>, and each token's weight: `ANSWER` in what is to be learned, else 0."""
    pieces = [segment for example in examples for segment in example.segments]
    encoded = iter(tokenizer.encode_batch([text for text, _ in pieces]))
    ids, marks = [], []
    for example in examples:
        tokens, weights = [tokenizer.bos], [0.0]
        for _, learned in example.segments:
            part = next(encoded)
            tokens += part
            weights += [ANSWER * learned] * len(part)
        ids.append(np.array(tokens, dtype=np.int64))
        marks.append(np.array(weights, dtype=np.float32))
    return ids, marks


class LanguageTask:
    """Next-token prediction on the mixture; only states whose next token counts are turned into logits."""

    seen_per_step = ROWS * CONTEXT

    def __init__(self, device: torch.device) -> None:
        self.device, self.mixture = device, Mixture()

    def loss(self, model: Transformer, step: int) -> Tensor:
        """Weighted mean cross-entropy, with the experts' balance loss where there are experts."""
        tokens, weights = (t.to(self.device) for t in self.mixture.rows(step))
        states, balance = model.states_and_balance(tokens[:, :-1]) if model.config.experts else (
            model.states(tokens[:, :-1]), 0.0)  # fmt: skip
        wanted = weights[:, 1:] > 0
        nll = F.cross_entropy(model.unembed(states[wanted]).float(), tokens[:, 1:][wanted], reduction="none")
        weights = weights[:, 1:][wanted]
        return (weights * nll).sum() / weights.sum() + BALANCE * balance
