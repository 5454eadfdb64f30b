"""The tokenizer loses nothing, keeps its borders, and knows the lexicon."""

import random

import pytest

from paperlab.data import corpus, lexicon, skills, tokens
from paperlab.data.tokens import SPECIALS, Tokenizer, train_bpe


@pytest.fixture(scope="module")
def tok():
    texts = [d.text for d in corpus.split(corpus.english())[0] if d.name.startswith("topics/")]
    return train_bpe([*texts, *(d.text for d in corpus.python()[::25])])


def test_sizes_and_special_tokens(tok):
    assert tok.size == 2048
    assert [tok.token_id(name) for name in SPECIALS] == [0, 1, 2, 3] == [tok.pad, tok.bos, tok.mask, tok.sep]


def test_special_tokens_in_a_text_are_text(tok):
    ids = tok.encode("a <pad> b<mask>")
    assert min(ids) > 3
    assert tok.decode(ids) == "a <pad> b<mask>"
    assert tok.decode([tok.bos, *tok.encode("Then"), tok.pad]) == "Then"


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n  x\t\t= '½ € 漢字 😀'\r\n    ", "don't  12 345\n\n\n        if x:", "\x00\x7f"]
)
def test_every_text_comes_back(tok, text):
    assert tok.decode(tok.encode(text)) == text


def test_corpora_come_back_and_batches_agree(tok):
    texts = [d.text for d in corpus.split(corpus.python())[1][:5] + corpus.split(corpus.english())[1][:5]]
    batch = tok.encode_batch(texts)
    assert [tok.decode(ids) for ids in batch] == texts
    assert batch == [tok.encode(text) for text in texts]


def test_digits_are_single_tokens(tok):
    for text in ("1234567890", " 12", "x12y34", "3.14159", "(1)", "²½"):
        digits = [tok.token_id(d) for d in text if d in "0123456789"]
        assert [i for i in tok.encode(text) if tok.decode([i]).strip().isdigit() and i < 2048][: len(digits)] == digits
    assert tok.encode("1234") == [tok.token_id(d) for d in "1234"]


def test_no_entry_joins_what_must_stay_apart(tok):
    """Over the whole vocabulary: digits and line breaks alone, a space only in front, or nothing but spaces."""
    for token in tok.inner.get_vocab():
        if token in SPECIALS:
            continue
        text = token.replace("Ġ", " ").replace("Ċ", "\n")
        if any(c in "0123456789\n" for c in text):
            assert len(text) == 1, repr(token)
        if text.strip(" "):
            assert " " not in text[1:], repr(token)


def test_lexicon_words_are_single_tokens(tok):
    words = lexicon.words()
    assert len(words) == len(set(words))
    assert [word for word in words if len(tok.encode(" " + word)) != 1] == []


@pytest.mark.parametrize("name", skills.SKILLS)
def test_pieces_encode_apart_as_together(tok, name):
    for example in skills.SKILLS[name](300, seed=3):
        apart = [i for piece, _ in example.segments for i in tok.encode(piece)]
        assert apart == tok.encode(example.text)
        assert tok.encode(example.prompt) + tok.encode(example.answer) == tok.encode(example.prompt + example.answer)


@pytest.mark.parametrize("name", skills.SKILLS)
def test_counterparts_have_as_many_tokens_and_another_answer(tok, name):
    for example in skills.SKILLS[name](300, seed=4):
        if "counterpart" in example.truth:
            prompt, answer = example.truth["counterpart"]
            assert len(tok.encode(prompt)) == len(tok.encode(example.prompt))
            assert prompt != example.prompt
            assert answer != example.answer
        if "corrupted" in example.truth:
            assert len(tok.encode(example.truth["corrupted"])) == len(tok.encode(example.prompt))


def test_lengths_follow_the_knob(tok):
    for skill in (skills.key_value_retrieval, skills.needle):
        for filler, slack in (("sentences", 12), ("corpus", 70)):
            for example in skill(100, seed=5, context=200, filler=filler):
                before = len(tok.encode(example.text[: example.text.index(" Ask.")]))
                assert abs(before - 200) < slack
    lengths = [len(tok.encode(e.text)) for f in skills.SKILLS.values() for e in f(300, seed=6)]
    assert max(lengths) < 256


def test_offsets_and_positions(tok):
    text = "When Mary and John went"
    offsets = tok.offsets(text)
    assert "".join(text[a:b] for a, b in offsets) == text
    start = text.index("John")
    (place,) = tok.positions(text, (start, start + 4))
    assert tok.encode(text)[place] == tok.token_id(" John")


def test_saved_and_loaded(tok, tmp_path):
    tok.save(tmp_path / "tokens.json")
    again = Tokenizer.load(tmp_path / "tokens.json")
    text = corpus.python()[3].text + "<sep>"
    assert again.encode(text) == tok.encode(text)


def test_training_repeats_exactly():
    texts = [d.text for d in corpus.english()[:40]]
    a, b = (train_bpe(texts, 700, words=["zebra"], weight=500) for _ in range(2))
    assert a.inner.to_str() == b.inner.to_str()
    assert a.token_id(" zebra")


def test_merges_shorten_text(tok):
    text = corpus.split(corpus.english())[1][0].text
    assert len(tok.encode(text)) < len(text.encode()) / 2
    assert len(train_bpe(["ab" * 50], 260, words=[]).encode("ab")) == 2  # no room for a merge
    assert len(train_bpe(["ab " * 50], 261, words=[]).encode("ab")) == 1  # room for one


def test_random_bytes_of_text_come_back(tok):
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice("ab Z19\n\t'_.(é漢") for _ in range(30))
        assert tok.decode(tok.encode(text)) == text


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda t, p: t.token_id("Mary had a little lamb"), "token must be a single token"),
        (lambda t, p: train_bpe([]), "texts must not be empty"),
        (lambda t, p: train_bpe(["a"], 100), "size must be at least 260"),
        (lambda t, p: train_bpe(["a"], weight=-1), "weight must be at least 0"),
        (lambda t, p: Tokenizer.load(p), "path must name a tokenizer"),
    ],
)
def test_bad_input(tok, tmp_path, call, words):
    path = tmp_path / "broken.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=words):
        call(tok, path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        tokens.Tokenizer.load(tmp_path / "none.json")
