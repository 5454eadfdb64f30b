"""Characters and windows, against the text itself."""

import pytest
import torch

from paperlab.data import corpus
from paperlab.data.characters import Characters, manual, windows


def test_round_trip_in_the_order_of_unicode():
    text = "beide 'Äpfel'"
    letters = Characters(text)
    assert letters.decode(letters.encode(text)) == text
    assert list(letters.alphabet) == sorted(set(text))
    assert letters.encode("db").tolist() == [letters.alphabet.index("d"), letters.alphabet.index("b")]


def test_windows_are_stretches_of_the_row_from_end_to_end():
    row = torch.arange(10)
    drawn = windows(row, (400, 2), 4, torch.Generator().manual_seed(0))
    assert drawn.shape == (400, 2, 4)
    assert (drawn.diff(dim=-1) == 1).all()
    assert set(drawn[..., 0].flatten().tolist()) == set(range(7))
    assert windows(row, (), 10).tolist() == list(range(10))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="text"):
        Characters("")
    with pytest.raises(ValueError, match="text .*'xz'"):
        Characters("abc").encode("azxz")
    with pytest.raises(ValueError, match="length"):
        windows(torch.arange(3), (2,), 4)
    with pytest.raises(ValueError, match="length"):
        windows(torch.arange(3), (2,), 0)


def test_the_manual_is_all_there_and_held_out_by_topic():
    letters, train, held = manual()
    texts = [text for _, text in corpus.manual()]
    assert len(train) + len(held) == sum(map(len, texts))
    end = letters.decode(held)
    assert all(text in end for text in texts if text not in letters.decode(train))
    assert 0.02 < len(held) / len(train) < 0.3
