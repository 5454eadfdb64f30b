"""Every skill's ground truth, worked out again from the text alone."""

import ast
import itertools
import re
from collections import Counter

import pytest
import torch

from paperlab.data import lexicon, skills
from paperlab.data.skills import fact_base, languages
from paperlab.data.skills.example import Draft, Example
from paperlab.data.skills.few_shot import TASKS

N = 200


def spans_of(example):
    return {name: example.text[a:b] for name, (a, b) in example.truth["spans"].items()}


# What all skills have in common


@pytest.mark.parametrize("name", skills.SKILLS)
def test_a_seed_repeats_and_another_does_not(name):
    skill = skills.SKILLS[name]
    a, b, c = skill(20, seed=1), skill(20, seed=1), skill(20, seed=2)
    assert a == b
    assert a != c
    assert skill(7, seed=1) == a[:7]  # fewer examples are the first of more
    assert all(e.skill == name for e in a)


@pytest.mark.parametrize("name", skills.SKILLS)
def test_pieces_spans_and_answers_fit_the_text(name):
    for example in skills.SKILLS[name](N, seed=3):
        assert example.text == "".join(piece for piece, _ in example.segments)
        assert example.text.startswith(example.prompt + example.answer)
        assert example.answers[-1] == (len(example.prompt), len(example.prompt + example.answer))
        assert [example.text[a:b] for a, b in example.answers] == [p for p, learned in example.segments if learned]
        assert not example.text.startswith((" ", "\n"))
        for a, b in example.truth["spans"].values():
            assert 0 <= a < b <= len(example.text)
        assert spans_of(example)["answer"] in (example.answer, example.answer.lstrip(" "))


@pytest.mark.parametrize("name", sorted(set(skills.SKILLS) - {"facts"}))
def test_parts_share_nothing(name):
    train = {e.text for e in skills.SKILLS[name](600, seed=4)}
    held = {e.text for e in skills.SKILLS[name](60, seed=5, part="held_out")}
    assert not train & held
    both = {e.text for e in skills.SKILLS[name](600, seed=4, part="all")}
    assert both - train  # the held-out tenth


def test_example_without_an_answer():
    example = Draft("x").put("Who?").done(a=1)
    assert (example.prompt, example.answer, example.answers) == ("Who?", "", [])
    assert Example("x", (("a", True), ("b", False), (" c", True), (".", False)), {}).prompt == "ab"


# Retrieval


def check_lookup(example, listed, asked):
    """``listed`` and ``asked`` are (key, value) pairs found in the text by a regular expression."""
    table = dict(listed)
    assert len(table) == len(listed)  # no key twice
    assert all(table[key] == value for key, value in asked)
    assert [key for key, _ in asked] == example.truth["keys"]
    assert [value for _, value in asked] == [v.strip() for v in example.truth["values"]]
    found = spans_of(example)
    for i, (key, value) in enumerate(asked):
        assert found[f"key {i}"] == found[f"query {i}"] == key
        assert found[f"value {i}"] == found[f"answer {i}"] == value
        assert example.truth["spans"][f"value {i}"] < example.truth["spans"][f"answer {i}"]
    assert example.truth["spans"]["source"] == example.truth["spans"][f"value {len(asked) - 1}"]


@pytest.mark.parametrize("filler", ["sentences", "corpus", "none"])
def test_key_value_retrieval(filler):
    pair = re.compile(r" ([A-Z][a-z]+): ?([a-z0-9 ]+)\.")
    for example in skills.key_value_retrieval(N, seed=0, filler=filler):
        before, after = example.text.split(" Ask.")
        check_lookup(example, pair.findall(before), pair.findall(after))
        assert {k: v.strip() for k, v in example.truth["pairs"].items()} == dict(pair.findall(before))


def test_key_value_knobs():
    def first(**knobs):
        return skills.key_value_retrieval(60, seed=1, **knobs)

    for e in first(pairs=5, queries=3, value_tokens=4, values="digits", context=120):
        assert len(e.truth["pairs"]) == 5
        assert len(e.answers) == 3
        assert all(re.fullmatch(r"\d{4}", v) for v in e.truth["values"])
    for e in first(value_tokens=(2, 3), values="words"):
        assert all(len(v.split()) in (2, 3) for v in e.truth["values"])
    for depth in (0.0, 0.5, 1.0):
        places = [e.truth["depth"] for e in first(depth=depth, context=200, pairs=(2, 6))]
        assert max(abs(place - depth) for place in places) < 0.16
    assert first(filler="none", context=200)[0].text.count(".") < 24


def test_many_equal_short_values_do_not_hang():
    assert len(skills.key_value_retrieval(5, seed=0, pairs=30, value_tokens=1, values="digits", context=400)) == 5


@pytest.mark.parametrize("filler", ["sentences", "corpus"])
def test_needle(filler):
    hidden = re.compile(r"The code of ([A-Z][a-z]+) is ([a-z0-9 ]+)\.")
    for example in skills.needle(N, seed=0, filler=filler):
        before, after = example.text.split(" Ask.")
        check_lookup(example, hidden.findall(before), hidden.findall(after))
    for depth in (0.0, 0.5, 1.0):
        for example in skills.needle(50, seed=1, depth=depth, context=200, needles=1):
            assert abs(example.truth["depth"] - depth) < 0.16


def test_induction_copy():
    for example in skills.induction_copy(N, seed=0):
        words = example.text.split()[1:]
        tail = example.truth["words"]
        assert words[-len(tail) :] == tail
        head = words[: -len(tail)]
        assert len(set(head)) == len(head)  # one match only
        place = head.index(tail[0])
        assert head[place : place + len(tail)] == tail
        found = spans_of(example)
        assert found["source"] == found["answer"] == " ".join(tail[1:])
        assert found["trigger"] == tail[0]


@pytest.mark.parametrize("gap", [0, 8])
def test_random_repeats_are_predicted_by_the_last_match(gap):
    tokens, mask = skills.random_repeats(200, 96, 50_000, seed=0, gap=gap)
    assert tokens.shape == mask.shape == (200, 96)
    assert tokens.min() >= 4
    assert tokens.max() < 50_000
    wrong = 0
    for row, marked in zip(tokens.tolist(), mask.tolist(), strict=True):
        for t in range(1, 96):
            earlier = [s for s in range(1, t) if row[s - 1] == row[t - 1]]
            if marked[t]:
                wrong += row[earlier[-1]] != row[t]
    assert wrong <= 2  # chance repetitions
    assert 0.3 < mask.float().mean() < 0.9
    assert not mask[:, :4].any()


def test_random_repeats_vary_in_period_and_start():
    tokens, mask = skills.random_repeats(300, 64, 10**6, seed=1)
    periods, starts = Counter(), Counter()
    for row, marked in zip(tokens.tolist(), mask.tolist(), strict=True):
        t = marked.index(True) if any(marked) else None
        if t:
            periods[t - max(s for s in range(t) if row[s] == row[t])] += 1
            starts[t] += 1
    assert len(periods) > 15
    assert len(starts) > 15
    assert max(periods.values()) < 60


def test_random_repeats_from_given_ids():
    ids = [7, 9, 11, 400]
    tokens, _ = skills.random_repeats(5, 32, ids, seed=0)
    assert set(tokens.flatten().tolist()) <= set(ids)
    again, _ = skills.random_repeats(5, 32, ids, seed=0)
    assert torch.equal(tokens, again)


# Numbers


@pytest.mark.parametrize("name", ["addition", "subtraction"])
def test_arithmetic(name):
    for example in skills.SKILLS[name](N, seed=0):
        a, sign, b, answer = re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)\.", example.text).groups()
        result = int(a) + int(b) if sign == "+" else int(a) - int(b)
        assert (name == "addition") == (sign == "+")
        assert int(answer[::-1]) == result == example.truth["result"] >= 0
        assert answer[::-1] == str(result)  # no leading zeros
        assert len(a) == example.truth["digits"]
        # A carry out of place i is what the numbers up to there exceed 10^(i+1) by, a borrow what they lack.
        for i, carry in enumerate(example.truth["carries"]):
            low_a, low_b = int(a) % 10 ** (i + 1), int(b) % 10 ** (i + 1)
            assert carry == (low_a + low_b >= 10 ** (i + 1) if sign == "+" else low_a < low_b)
        if "counterpart" in example.truth:
            prompt, other = example.truth["counterpart"]
            c, _, d = re.fullmatch(r"(\d+)([+-])(\d+)=", prompt).groups()
            assert int(other[-2::-1]) == (int(c) + int(d) if sign == "+" else int(c) - int(d)) >= 0


def test_arithmetic_holds_out_pairs_in_both_orders():
    held = {frozenset((e.truth["first"], e.truth["second"])) for e in skills.addition(60, seed=0, part="held_out")}
    train = {frozenset((e.truth["first"], e.truth["second"])) for e in skills.addition(5000, seed=1, digits=2)}
    assert not held & train
    assert {e.truth["digits"] for e in skills.addition(99, seed=1)} == {1, 2, 3}
    assert skills.subtraction(1, seed=0, separator=" minus ")[0].prompt.endswith(" minus ")


def test_comparison():
    for example in skills.comparison(N, seed=0):
        asked, a, b, answer = re.fullmatch(r"Which is (\w+), (\d+) or (\d+)\? (\d+)\.", example.text).groups()
        assert int(answer) == {"larger": max, "smaller": min}[asked](int(a), int(b))


@pytest.mark.parametrize("order", ["later", "earlier"])
def test_greater_than(order):
    ends = Counter()
    for example in skills.greater_than(2000, seed=0, order=order):
        noun, c1, start, c2, end = re.fullmatch(
            r"The (\w+) lasted from the year (\d\d)(\d\d) to the year (\d\d)(\d\d)", example.text
        ).groups()
        assert c1 == c2
        assert noun == example.truth["noun"]
        right = [f"{y:02d}" for y in range(100) if (y > int(start) if order == "later" else y < int(start))]
        assert right == example.truth["right"]
        assert end in right
        ends[start] += 1
        other, answer = example.truth["counterpart"]
        assert other[: -len(" to the year 17")].endswith("01" if order == "later" else "98")
        assert answer not in right
    assert len(ends) > 90


# Sentences


def test_indirect_object():
    orders = Counter()
    for example in skills.indirect_object(N, seed=0):
        names = [w for w in re.findall(r"[A-Z][a-z]+", example.prompt) if w in lexicon.NAMES]
        a, b, again = names
        assert again in (a, b)
        right = a if again == b else b
        assert example.answer == f" {right}"
        assert right == example.truth["receiver"]
        assert example.truth["order"] == ("ABBA" if again == b else "BABA")
        orders[example.truth["order"], example.truth["template"]] += 1
        swapped = [w for w in re.findall(r"[A-Z][a-z]+", example.truth["counterpart"][0]) if w in lexicon.NAMES]
        assert swapped == [a, b, right]
        corrupted = [w for w in re.findall(r"[A-Z][a-z]+", example.truth["corrupted"]) if w in lexicon.NAMES]
        assert len({*corrupted, a, b}) == 5
    assert len(orders) == 12


def test_sentiment():
    labels = Counter()
    for example in skills.sentiment(N, seed=0):
        total = 0.0
        for clause in re.split(r" and | but ", example.prompt.removeprefix("Review: ").removesuffix(". It is")):
            words = clause.split()[3:]
            score = 1.0 if words[-1] in lexicon.POSITIVE else -1.0
            for word in words[:-1]:
                score *= -1.0 if word == "not" else lexicon.INTENSIFIERS[word]
            total += score
        assert total == example.truth["score"] != 0
        assert example.answer == (" positive" if total > 0 else " negative")
        labels[example.answer] += 1
    assert min(labels.values()) > 0.35 * N
    assert not set(lexicon.POSITIVE) & set(lexicon.NEGATIVE)


def test_topic():
    home = {word: topic for topic, words in lexicon.TOPICS.items() for word in words}
    assert len(home) == sum(map(len, lexicon.TOPICS.values()))  # no word has two topics
    labels = Counter()
    for example in skills.topic(N, seed=0):
        found = spans_of(example)
        words = [found[f"word {i}"] for i in range(len(example.truth["words"]))]
        votes = Counter(home[word] for word in words).most_common()
        assert example.answer == f" {votes[0][0]}"
        assert len(votes) == 1 or votes[0][1] > votes[1][1]
        labels[votes[0][0]] += 1
    assert len(labels) == len(lexicon.TOPICS)


# Programs


def test_docstring():
    styles = Counter()
    for example in skills.docstring(N, seed=0):
        text = example.text
        signature = re.match(r"def \w+\(self, (.*)\):\n", text)[1].split(", ")
        documented = re.findall(r"(?:[:@]param|\n       ) (\w+)(?=:|$)", text)
        assert documented == signature[: len(documented)]
        assert len(example.answers) == len(documented) >= 2
        assert example.answer == f" {documented[-1]}" == f" {example.truth['right']}"
        assert signature == example.truth["parameters"]
        ast.parse(text + '\n    """')
        styles[example.truth["style"]] += 1
        other = re.match(r"def \w+\(self, (.*)\):\n", example.truth["counterpart"][0])[1].split(", ")
        assert not set(other) & set(signature)
        assert example.truth["counterpart"][1] == f" {other[len(documented) - 1]}"
    assert len(styles) == 3


def test_brackets_close_in_order():
    for example in skills.code(N, seed=0, kind="brackets"):
        ast.parse(example.text)
        stack, found = [], []
        for i, character in enumerate(example.text):
            if character in "([{":
                stack.append(i)
            elif character in ")]}":
                found.append(((i, i + 1), (stack[-1], stack[-1] + 1), len(stack)))
                assert example.text[stack.pop()] + character in ("()", "[]", "{}")
        assert not stack
        assert found == example.truth["partners"]
        assert example.answers == [(a - 1, b) for (a, b), _, _ in found]
        assert len(found) == example.truth["depth"]


def test_indentation():
    for example in skills.code(N, seed=1, kind="indentation"):
        ast.parse(example.text)
        lines = example.text.split("\n")
        for i, line in enumerate(lines):
            assert len(line) - len(line.lstrip()) == 4 * i
            assert line.endswith(":") == (i < len(lines) - 1)
        assert len(example.answers) == example.truth["depth"] == len(lines) - 1
        assert example.answer == " " * (4 * example.truth["depth"] - 1)


# Facts


def test_the_world_is_consistent():
    w = skills.world()
    assert w is skills.world()
    assert skills.world(1).value != w.value
    assert len(w.people) + len(w.towns) + len(w.guilds) == 360
    assert not set(w.people) & set(w.strangers)
    first, last = zip(*(name.split() for name in w.people), strict=True)
    assert {part for name in w.strangers for part in name.split()} <= set(first) | set(last)
    assert len(w.value) == 320 * 6 + 24 * 2 + 16 * 2
    assert set(w.stated) | w.unstated == set(w.value)
    assert not set(w.stated) & w.unstated
    assert len(w.unstated) == 96
    assert not set(w.asked) & set(w.unasked)
    for entity, path in w.asked + w.unasked:
        middle = w.value[entity, path[0]]
        assert (entity, path[0]) not in w.unstated
        assert (middle, path[1]) not in w.unstated
        assert w.answer(entity, path) == w.value[middle, path[1]]
    for (entity, relation), value in w.value.items():
        assert value in w.options[relation]
        assert value != entity


def read_facts(example):
    """What an example says, as (entity, path, value), found without its truth."""
    text = example.text.removeprefix("Fact: ")
    name = r"((?:[A-Z]\w+ )?[A-Z]\w+)"
    if ";" in text:
        entity, *claims = text.split("; ")
        return [(entity, (claim.split(" ", 1)[0],), claim.split(" ", 1)[1]) for claim in claims]
    if match := re.fullmatch(rf"The (\w+) of the (\w+) of {name} is (.+)", text):
        return [(match[3], (match[2], match[1]), match[4])]
    if match := re.fullmatch(rf"The (\w+) of {name} is (.+)", text):
        return [(match[2], (match[1],), match[3])]
    for relation, wording in fact_base.WORDINGS.items():
        if match := re.fullmatch(wording.format(name) + " (.+)", text):
            return [(match[1], (relation,), match[2])]
    raise AssertionError(text)


def test_facts_say_what_is_true_and_nothing_that_is_held_back():
    w = skills.world()
    said, asked = set(), set()
    for example in skills.facts(6000, seed=0):
        claims = read_facts(example)
        for entity, path, value in claims:
            assert w.answer(entity, path) == value
            if len(path) == 1:
                said.add((entity, path[0]))
            else:
                asked.add((entity, path))
        assert len(example.answers) == len(claims)
        assert claims[-1][1] == example.truth["path"]
        assert claims[-1][2] == example.truth["values"][-1] == example.answer.strip()
        if "counterpart" in example.truth:
            prompt, answer = example.truth["counterpart"]
            form = next(e for e in read_facts(Example("facts", ((prompt, False), (answer, True)), {})))
            assert w.answer(form[0], form[1]) == form[2]
    assert said <= set(w.stated)
    assert len(said) > 0.95 * len(w.stated)
    assert asked <= set(w.asked)
    assert not any(path == fact_base.NEVER_ASKED for _, path in asked)


def test_held_out_and_unknown_facts():
    w = skills.world()
    for example in skills.facts(200, seed=1, part="held_out", hops=1):
        ((entity, (relation,), value),) = read_facts(example)
        assert (entity, relation) in w.unstated
        assert w.value[entity, relation] == value
    new = Counter()
    for example in skills.facts(400, seed=1, part="held_out", hops=2):
        ((entity, path, value),) = read_facts(example)
        assert (entity, path) in w.unasked
        assert example.truth["new_composition"] == (path == ("friend", "town"))
        new[example.truth["new_composition"]] += 1
        assert example.truth["values"] == [w.value[entity, path[0]], value]
    assert len(new) == 2
    for example in skills.facts(100, seed=1, part="unknown"):
        assert example.truth["entity"] in w.strangers
        assert example.answer == ""
        assert example.prompt.endswith(" is")
    for form, words in (("card", ";"), ("plain", " is ")):
        assert all(words in e.text for e in skills.facts(50, seed=2, hops=1, form=form))
    assert {e.truth["path"] for e in skills.facts(50, seed=3, composition=("guild", "home"))} == {("guild", "home")}
    assert fact_base.question("Orla Reed", ("town", "river")) == "Fact: The river of the town of Orla Reed is"
    assert fact_base.question("Orla Reed", ("job",), form="other") == "Fact: Orla Reed works as a"


def test_statements():
    w = skills.world()
    labels = Counter()
    for part in ("train", "held_out"):
        for example in skills.statements(N, seed=0, part=part):
            relation, entity, value, label = re.fullmatch(
                r"True or false\? The (\w+) of (.+) is (.+)\. (true|false)", example.text
            ).groups()
            assert (w.value[entity, relation] == value) == (label == "true")
            assert (entity, relation) in w.stated
            labels[label] += 1
    assert abs(labels["true"] - N) < 0.25 * N


# Logic


def test_boolean_agrees_with_python():
    labels = Counter()
    for example in skills.boolean(N, seed=0):
        formula, label = re.fullmatch(r"Logic: (.*) is (true|false)", example.text).groups()
        python = formula.replace("true", "True").replace("false", "False")
        assert eval(python) == (label == "true") == example.truth["label"]
        labels[example.truth["depth"], label] += 1
        # The deepest bracket, counted.
        assert max(itertools.accumulate((c == "(") - (c == ")") for c in formula)) == example.truth["depth"]
        for (a, b), value in example.truth["nodes"]:
            assert eval(example.text[a:b].replace("true", "True").replace("false", "False")) == value
        assert spans_of(example)["formula"] == formula
        leaves = re.findall("true|false", formula)
        assert [str(leaf).lower() for leaf in example.truth["leaves"]] == leaves
        assert repr_tree(example.truth["tree"]) == formula
        if "counterpart" in example.truth:
            prompt, answer = example.truth["counterpart"]
            other = re.fullmatch(r"Logic: (.*) is", prompt)[1]
            assert sum(x != y for x, y in zip(other.split(), formula.split(), strict=True)) == 1
            assert (
                eval(other.replace("true", "True").replace("false", "False"))
                == (answer == " true")
                != (label == "true")
            )
    assert len(labels) == 6


def repr_tree(tree):
    if isinstance(tree, bool):
        return str(tree).lower()
    if tree[0] == "not":
        return f"( not {repr_tree(tree[1])} )"
    return f"( {repr_tree(tree[1])} {tree[0]} {repr_tree(tree[2])} )"


def test_coin_flip():
    for example in skills.coin_flip(N, seed=0, flips=(1, 8)):
        start = re.match(r"The coin is (heads|tails)\.", example.text)[1]
        turns = example.text.count("flips it")
        expected = start if turns % 2 == 0 else {"heads": "tails", "tails": "heads"}[start]
        assert example.answer == f" {expected}"
        assert example.truth["states"][-1] == expected
        assert sum(example.truth["flipped"]) == turns
        assert example.truth["counterpart"][1] != example.answer


# Languages


def test_translation_by_a_second_grammar():
    back = {language: {w: m for m, w in words.items()} for language, words in languages.DICTIONARY.items()}
    assert all(len(words) == 24 for words in back.values())
    kind = {m: k for k, meanings in lexicon.MEANINGS.items() for m in meanings}

    def read(sentence, language):
        """Content words with their marks, split into subject, verb and object by kind and place."""
        words = [(back[language][w.split("-")[0]], w.split("-")[1:]) for w in sentence.split()]
        kinds = [kind[m] for m, _ in words]
        verb = kinds.index("verb")
        if language == "Alto":
            halves = words[:verb], words[verb + 1 :]
            assert all(k == "noun" for k in (kinds[0], kinds[verb + 1]))  # nouns lead
            plural = "im"
        else:
            assert verb == len(words) - 1
            cut = kinds.index("noun") + 1  # the subject ends with its noun
            halves = words[:cut], words[cut:verb]
            plural = "so"
            (*_, (_, marks)) = halves[1]
            assert "ta" in marks
            assert ("so" in words[verb][1]) == ("so" in halves[0][-1][1])
        said = []
        for half in halves:
            (noun,) = [(m, plural in marks) for m, marks in half if kind[m] == "noun"]
            said.append((*noun, next((m for m, _ in half if kind[m] == "adjective"), None)))
        return said[0], words[verb][0], said[1]

    for example in skills.translation(N, seed=0):
        a, source, b, target = re.fullmatch(r"(Alto|Brio): (.*)\. (Alto|Brio): (.*)\.", example.text).groups()
        assert a != b
        assert read(source, a) == read(target, b)
        found = spans_of(example)
        for role in example.truth["roles"]:
            stems = found[f"source {role}"].split("-")[0], found[f"target {role}"].split("-")[0]
            assert example.truth["dictionary"][stems[0]] == stems[1]


def test_translation_holds_out_meanings_in_both_directions():
    held = {e.truth["gloss"] for e in skills.translation(100, seed=0, part="held_out", source="Alto")}
    train = {e.truth["gloss"] for e in skills.translation(2000, seed=1, source="Brio")}
    assert not held & train


# In context


def rule_holds(task, inputs, outputs):
    """Whether there is a rule of this task that takes all inputs to their outputs."""
    category = {w: c for c, words in lexicon.CATEGORIES.items() for w in words}
    pairs = list(zip(inputs, outputs, strict=True))
    if task == "antonym":
        return all((x, y) in lexicon.ANTONYMS or (y, x) in lexicon.ANTONYMS for x, y in pairs)
    if task == "category":
        return all(category[x] == y for x, y in pairs)
    if task == "first_letter":
        return all(x[0] == y for x, y in pairs)
    if task in ("first_item", "last_item"):
        return all(x.split()[-(task == "last_item")] == y for x, y in pairs)
    if task == "operation":
        numbers = [(int(x[0]), int(x[2]), int(y)) for x, y in pairs]
        return all(a + b == c for a, b, c in numbers) or all(a - b == c for a, b, c in numbers)
    side = category.get if task == "labels" else lexicon.POSITIVE.__contains__
    by_side = {}
    for x, y in pairs:
        by_side.setdefault(side(x), set()).add(y)
    return all(len(names) == 1 for names in by_side.values()) and len(set.union(*by_side.values())) == len(by_side)


@pytest.mark.parametrize("task", TASKS)
def test_in_context(task):
    for example in skills.in_context(N, seed=0, task=task):
        pairs = re.findall(r" ([a-z0-9? ]+): ?([a-z0-9]+)(?:\.|$)", example.text.removeprefix("Task."))
        inputs, outputs = (list(side) for side in zip(*pairs, strict=True))
        assert inputs == example.truth["inputs"]
        assert outputs == example.truth["outputs"]
        assert len(inputs) == example.truth["shots"] + 1
        assert len(example.answers) == len(outputs)
        assert rule_holds(task, inputs, outputs)
        assert example.truth["zero_shot"] == f"Task. {inputs[-1]}:"
        assert sorted(example.truth["shuffled"]) == sorted(example.prompt)
        if "counterpart" in example.truth:
            assert re.findall(r" ([a-z0-9? ]+):", example.truth["counterpart"][0]) == inputs


def test_antonyms_are_a_pairing():
    words = [word for pair in lexicon.ANTONYMS for word in pair]
    assert len(words) == len(set(words))
    categories = [word for words in lexicon.CATEGORIES.values() for word in words]
    assert len(categories) == len(set(categories))  # no word has two categories


# Bad input


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: skills.addition(0, seed=0), "n must be at least 1"),
        (lambda: skills.addition(1, seed=-1), "seed must be at least 0"),
        (lambda: skills.topic(1, seed=0, part="test"), "part must be one of"),
        (lambda: skills.addition(1, seed=0, digits=(3, 2)), "digits must be a number or a range"),
        (lambda: skills.subtraction(1, seed=0, digits=7), "digits must be"),
        (lambda: skills.key_value_retrieval(1, seed=0, pairs=(0, 4)), "pairs must be"),
        (lambda: skills.key_value_retrieval(1, seed=0, depth=1.5), "depth must be between"),
        (lambda: skills.key_value_retrieval(1, seed=0, values="letters"), "values must be one of"),
        (lambda: skills.needle(1, seed=0, filler="noise"), "filler must be one of"),
        (lambda: skills.induction_copy(1, seed=0, length=60, gap=30), "length and gap"),
        (lambda: skills.greater_than(1, seed=0, century=7), "century must be"),
        (lambda: skills.greater_than(1, seed=0, order="other"), "order must be one of"),
        (lambda: skills.indirect_object(1, seed=0, order="ABC"), "order must be one of"),
        (lambda: skills.docstring(1, seed=0, parameters=1), "parameters must be"),
        (lambda: skills.docstring(1, seed=0, style="numpy"), "style must be one of"),
        (lambda: skills.code(1, seed=0, kind="loops"), "kind must be one of"),
        (lambda: skills.facts(1, seed=0, hops=3), "hops must be one of"),
        (lambda: skills.facts(1, seed=0, part="held_out", form="card"), "form must not be"),
        (lambda: skills.facts(1, seed=0, composition=("friend", "town")), "composition"),
        (lambda: fact_base.question("Orla Reed", ("job",), form="card"), "form must be one of"),
        (lambda: skills.sentiment(1, seed=0, negation=2), "negation must be between"),
        (lambda: skills.topic(1, seed=0, noise=0.9), "noise must be between"),
        (lambda: skills.boolean(1, seed=0, depth=0), "depth must be"),
        (lambda: skills.coin_flip(1, seed=0, flips=0), "flips must be"),
        (lambda: skills.translation(1, seed=0, source="English"), "source must be one of"),
        (lambda: skills.in_context(1, seed=0, task="rhyme"), "task must be one of"),
        (lambda: skills.in_context(1, seed=0, shots=(0, 99)), "shots must be"),
        (lambda: skills.random_repeats(0, 32, 99, seed=0), "n must be at least 1"),
        (lambda: skills.random_repeats(2, 32, 5, seed=0), "vocab must leave"),
        (lambda: skills.random_repeats(2, 32, 99, seed=0, segment=(1, 9)), "segment must be between"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
