r"""A byte-level tokenizer of two thousand entries whose boundaries can be relied on.

Text is first cut into pieces by `PIECES`: a word with the space before it, one digit, one line break, a run of
punctuation, indentation but for its last space. Byte-pair merges stay inside a piece, so that a prompt and an answer
that meet at a piece's border encode to the same tokens apart and together; digits are never merged into numbers.

Sennrich, Haddow and Birch (2016), https://arxiv.org/abs/1508.07909; bytes as the alphabet as in GPT-2.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from paperlab.checks import require_at_least, require_nonempty
from paperlab.data import lexicon

SPECIALS = ("<pad>", "<bos>", "<mask>", "<sep>")
PIECES = (
    r"(?<=\p{L})'(?:s|d|m|t|ll|ve|re)(?!\p{L})"  # contractions
    r"|\p{N}|\n"  # one digit, one line break
    r"| ?[\p{L}\p{M}]+| ?[^\s\p{L}\p{M}\p{N}]+"  # a word or a run of punctuation, with its space
    r"|[^\S\n]+(?=\s|\z)|[^\S\n]"  # indentation but for the space that belongs to what follows; a lone blank
)


class Tokenizer:
    """Text to token ids and back. Special tokens in a text are text: they enter by `token_id` only."""

    def __init__(self, inner: tokenizers.Tokenizer):
        self.inner = inner
        inner.encode_special_tokens = True
        self.pad, self.bos, self.mask, self.sep = (inner.token_to_id(name) for name in SPECIALS)

    @property
    def size(self) -> int:
        """How many tokens there are, the special ones included; ids are 0 to size − 1."""
        return self.inner.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The ids of a text; no special token is added."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, in parallel."""
        return [e.ids for e in self.inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; special tokens are left out."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=True)

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Where each token stands in the text: first character and the one after the last, spaces included.

        A character of several bytes may belong to several tokens.
        """
        return self.inner.encode(text, add_special_tokens=False).offsets

    def positions(self, text: str, span: tuple[int, int]) -> list[int]:
        """Indices of the tokens that touch the characters ``span[0]`` to ``span[1] − 1``."""
        return [i for i, (start, end) in enumerate(self.offsets(text)) if start < span[1] and end > span[0]]

    def token_id(self, token: str) -> int:
        """The id of a special token's name or of a text that is a single token, such as ``" Mary"``.

        Raises:
            ValueError: ``token`` is not one token.
        """
        if token in SPECIALS:
            return self.inner.token_to_id(token)
        ids = self.encode(token)
        if len(ids) != 1:
            raise ValueError(f"token must be a single token, got {token!r}, which is {len(ids)}")
        return ids[0]

    def save(self, path: str | Path) -> None:
        """Write a JSON file in the format of the library ``tokenizers``."""
        self.inner.save(str(path), pretty=False)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no tokenizer, or lacks the special tokens.
        """
        text = Path(path).read_text(encoding="utf-8")
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare exceptions
            raise ValueError(f"path must name a tokenizer's file, got {path}: {error}") from error
        if missing := [name for name in SPECIALS if inner.token_to_id(name) is None]:
            raise ValueError(f"path must name a tokenizer with {', '.join(missing)}, got {path}")
        return cls(inner)


def train_bpe(
    texts: Sequence[str], size: int = 2048, *, words: Sequence[str] | None = None, weight: int = 2000
) -> Tokenizer:
    """A tokenizer of ``size`` entries fitted to ``texts``, deterministic.

    Args:
        texts: what shall be short when encoded.
        size: entries with the 4 special tokens and the 256 bytes; fewer when the texts allow no more merges.
        words: words that become single tokens behind a space; by default those of `paperlab.data.lexicon`.
        weight: how often each of ``words`` is counted beside the texts. Should exceed the count of the last merge.

    Raises:
        ValueError: no texts, ``size`` below 260 or a negative ``weight``.
    """
    require_nonempty(texts=texts)
    require_at_least(len(SPECIALS) + 256, size=size)
    require_at_least(0, weight=weight)
    words = lexicon.words() if words is None else words
    inner = tokenizers.Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([cut, to_bytes])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    often = (" " + word for word in words)
    repeated = ("".join([piece] * weight) for piece in often)

    def everything() -> Iterable[str]:
        yield from texts
        yield from repeated

    inner.train_from_iterator(everything(), trainer)
    return Tokenizer(inner)
