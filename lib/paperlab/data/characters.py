"""A text as a row of characters, for language models that must learn something within a hundred steps."""

import torch
from jaxtyping import Int
from torch import Tensor

from paperlab.checks import require_at_least, require_nonempty
from paperlab.data import corpus


class Characters:
    """The characters of ``text``, numbered in their order in Unicode.

    Raises:
        ValueError: an empty text.
    """

    def __init__(self, text: str) -> None:
        require_nonempty(text=text)
        self.alphabet = "".join(sorted(set(text)))
        self._number = {character: i for i, character in enumerate(self.alphabet)}

    def encode(self, text: str) -> Int[Tensor, " tokens"]:
        """The number of each character.

        Raises:
            ValueError: a character that is not in the alphabet.
        """
        if unknown := sorted(set(text) - self._number.keys()):
            raise ValueError(f"text must consist of the alphabet's characters, got {''.join(unknown)!r}")
        return torch.tensor([self._number[character] for character in text])

    def decode(self, tokens: Int[Tensor, " tokens"]) -> str:
        """The text again."""
        return "".join(self.alphabet[i] for i in tokens.tolist())


def windows(
    row: Int[Tensor, " row"], shape: tuple[int, ...], length: int, generator: torch.Generator | None = None
) -> Int[Tensor, "*shape length"]:
    """Stretches of ``length`` neighbours of ``row``, as many as ``shape`` says, beginning anywhere with equal chance.

    Raises:
        ValueError: a ``length`` below 1 or more than the row has.
    """
    require_at_least(1, length=length)
    require_at_least(length, **{"length of row": len(row)})
    begin = torch.randint(len(row) - length + 1, (*shape, 1), generator=generator)
    return row[begin + torch.arange(length)]


def manual() -> tuple[Characters, Int[Tensor, " train"], Int[Tensor, " held"]]:
    """CPython's manual as characters: the alphabet, the topics to train on, and the topics held out, each in a row."""
    documents = corpus.manual()
    letters = Characters("".join(text for _, text in documents))
    train, held = (letters.encode("".join(text for _, text in part)) for part in corpus.split(documents))
    return letters, train, held
