"""FOLD-SE against brute force, scikit-learn's split, a planted program and a small logic interpreter."""

import re

import numpy as np
import pytest
from sklearn.tree import DecisionTreeClassifier

from paperlab.data.tables import as_table, default_rules, load_table, planted_rule
from paperlab.explainable_classifiers.fold_se import (
    FoldSE,
    Literal,
    Rule,
    _Counter,
    information_gain,
    justify,
    magic_gini,
    program,
)


def counts(*values):
    """Four counts as the arrays that a heuristic takes."""
    return [np.array([value]) for value in values]


def all_literals(table):
    for j, words in enumerate(table.categories):
        for op in ("<=", ">"):
            for value in np.unique(table.numbers[:, j][~np.isnan(table.numbers[:, j])]):
                yield Literal(j, op, float(value))
        for op in ("==", "!="):
            for word in words:
                yield Literal(j, op, word)


@pytest.mark.parametrize("heuristic", [magic_gini, information_gain])
@pytest.mark.parametrize("seed", range(4))
def test_prefix_sums_find_what_brute_force_finds(heuristic, seed):
    table = default_rules(60, 0.1, seed)
    rng = np.random.default_rng(seed)
    rows = rng.random(60) < 0.7
    positive, negative = rows & (table.labels == "yes"), rows & (table.labels == "no")
    counter = _Counter(table, heuristic)
    found = counter.best(positive, negative, counter.among(counter.order, rows), frozenset())

    def impurity(literal):
        holds = literal.holds(table)
        tp, fp = (positive & holds).sum(), (negative & holds).sum()
        return heuristic(*counts(tp, positive.sum() - tp, negative.sum() - fp, fp)).item()

    assert impurity(found) == pytest.approx(min(impurity(literal) for literal in all_literals(table)))


def test_a_literal_that_is_used_is_not_taken_again():
    table = default_rules(80, 0.1, 0)
    positive, counter = table.labels == "yes", _Counter(table, magic_gini)
    taken = []
    while literal := counter.best(positive, ~positive, counter.order, frozenset(taken)):
        taken.append(literal)
    assert len(taken) == len(set(taken))
    holds = [literal.holds(table) for literal in all_literals(table)]
    tp, fp = (np.array([(h & side).sum() for h in holds]) for side in (positive, ~positive))
    valid = np.isfinite(magic_gini(tp, positive.sum() - tp, (~positive).sum() - fp, fp))
    assert len(taken) == valid.sum()  # every valid literal, once each


def test_cells_are_counted_as_by_hand():
    table = as_table({"x": [1.0, 2, 3, 4, 5, 6, 7, 8]}, list("aaabbbbb"))
    # sorting 8 log2 8, two filters of the order, one search, one literal on all rows, one rule on all rows
    assert FoldSE().fit(table).visits == 24 + 8 + 8 + 8 + 8 + 8


@pytest.mark.parametrize("name", ["breast_cancer", "iris"])
def test_first_split_is_that_of_a_gini_stump(name):
    table = load_table(name)
    positive = table.labels == np.unique(table.labels)[0]
    counter = _Counter(table, magic_gini)
    literal = counter.best(positive, ~positive, counter.order, frozenset())
    stump = DecisionTreeClassifier(max_depth=1, criterion="gini", random_state=0).fit(table.numbers, positive)
    left = stump.apply(table.numbers) == 1
    ours = literal.holds(table)
    holds = lambda side: (side & positive).sum() * (side & ~positive).sum() / side.sum()  # noqa: E731
    assert holds(ours) + holds(~ours) == pytest.approx(holds(left) + holds(~left))
    assert (ours == left).all() or (ours == ~left).all()


def test_gini_is_the_weighted_impurity_of_the_two_sides():
    tp, fn, tn, fp = 30, 10, 50, 5
    gini = lambda a, b: 1 - (a / (a + b)) ** 2 - (b / (a + b)) ** 2  # noqa: E731
    expected = (35 * gini(tp, fp) + 60 * gini(tn, fn)) / 95
    assert magic_gini(*counts(tp, fn, tn, fp)).item() == pytest.approx(expected)


def test_information_gain_is_the_entropy_that_is_left():
    from scipy.stats import entropy

    tp, fn, tn, fp = 30, 10, 50, 5
    expected = (35 * entropy([tp, fp], base=2) + 60 * entropy([tn, fn], base=2)) / 95
    assert information_gain(*counts(tp, fn, tn, fp)).item() == pytest.approx(expected)


def test_a_literal_that_favours_the_negatives_is_never_taken():
    mostly_negative = counts(5, 95, 10, 90)
    assert np.isinf(magic_gini(*mostly_negative)).all()
    assert np.isinf(information_gain(*mostly_negative)).all()


def test_the_planted_program_is_recovered():
    table, fresh = default_rules(4000, 0.0, 0), default_rules(4000, 0.0, 1)
    model = FoldSE().fit(table)
    assert (model.predict(table) == table.labels).mean() > 0.999
    assert (model.predict(fresh) == fresh.labels).mean() > 0.995
    used = {table.names[literal.column] for literal in model.literals}
    assert used == {"size", "colour", "age", "shape", "weight"}  # none of the distractors
    assert any(inner.exceptions for rule in model.rules for inner in rule.exceptions)  # an exception of an exception


def test_the_positive_class_may_be_chosen():
    table = default_rules(1000, 0.0, 0)
    model = FoldSE().fit(table, positive="no")
    assert {rule.head for rule in model.rules} == {"no"}
    assert model.default == "yes"


def interpret(text, table):
    """Negation as failure over the printed program, one row at a time, sharing nothing with `Rule.fires`."""
    clauses = [line[:-1].split(" :- ") for line in text.splitlines() if " :- " in line]
    default = re.search(r"label\(X, '(.+?)'\) otherwise", text)[1]

    def cell(i, name):
        j = table.names.index(name)
        return table.categories[j][table.codes[i, j]] if table.codes[i, j] >= 0 else float(table.numbers[i, j])

    def goal(g, i):
        if g.startswith("not "):
            return not goal(g[4:], i)
        if match := re.fullmatch(r"(ab\d+)\(X\)", g):
            return any(body(b, i) for head, b in clauses if head == f"{match[1]}(X)")
        name, op, value = re.fullmatch(r"(\w+)\(X\) (=<|>|=) (.+)", g).groups()
        have = cell(i, name)
        if op == "=":
            return have == value.strip("'")
        if isinstance(have, str):
            return False
        # numbers are printed with four digits: the test's data have no more
        return have <= float(value) if op == "=<" else have > float(value)

    def body(text, i):
        return all(goal(g, i) for g in re.split(r", (?=not |\w+\(X\))", text))

    out = []
    for i in range(len(table)):
        heads = (re.search(r"'(.+)'", head)[1] for head, b in clauses if head.startswith("label") and body(b, i))
        out.append(next(heads, default))
    return np.array(out)


def rounded(table):
    columns = {}
    for j, name in enumerate(table.names):
        columns[name] = [table.categories[j][code] if code >= 0 else float(f"{x:.2g}")
                         for x, code in zip(table.numbers[:, j], table.codes[:, j], strict=True)]  # fmt: skip
    return as_table(columns, table.labels.tolist())


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_printed_program_predicts_what_the_model_predicts(noise):
    table = rounded(default_rules(400, noise, 3))
    model = FoldSE(tail=0.0).fit(table)
    assert (interpret(program(model), table) == model.predict(table)).all()


def test_the_printed_program_of_three_classes():
    table = load_table("iris")
    model = FoldSE().fit(table)
    assert (interpret(program(model), table) == model.predict(table)).all()
    assert (model.predict(table) == table.labels).mean() > 0.93


def test_numbers_and_words_are_never_equal_nor_ordered():
    table = as_table({"age": [3.0, "old"]}, ["a", "b"])
    holds = {op: Literal(0, op, 3.0 if op in "<=>" else "old").holds(table).tolist() for op in ("<=", ">", "==", "!=")}
    assert holds == {"<=": [True, False], ">": [False, False], "==": [False, True], "!=": [True, False]}


def test_exceptions_break_defaults_and_their_own_exceptions_mend_them():
    table = as_table(
        {"bird": ["yes"] * 3, "penguin": ["no", "yes", "yes"], "jet_pack": ["no", "no", "yes"]}, list("abc")
    )
    rescued = Rule((Literal(2, "==", "yes"),))
    flies = Rule((Literal(0, "==", "yes"),), (Rule((Literal(1, "==", "yes"),), (rescued,)),))
    assert flies.fires(table).tolist() == [True, False, True]
    assert len(flies.literals) == 3


def test_the_tail_is_cut():
    table = default_rules(2000, 0.1, 0)
    long, short = FoldSE(tail=0.0).fit(table), FoldSE(tail=0.01).fit(table)
    assert len(short.literals) < len(long.literals) / 5
    positive = table.labels == "yes"
    assert all((rule.fires(table) & positive).sum() >= 0.01 * 2000 for rule in short.rules[:1])
    assert (short.predict(table) == np.where(planted_rule(table), "yes", "no")).mean() > 0.95


def test_a_justification_tells_the_prediction():
    table = default_rules(500, 0.0, 2)
    model = FoldSE().fit(table)
    for i in range(40):
        row = table.rows(np.array([i]))
        last = [line for line in justify(model, row).splitlines() if not line.startswith(" ")][-1]
        assert last.startswith("✓")
        assert last.endswith(model.predict(row)[0])


def test_a_cap_is_reported_when_it_is_hit():
    table = default_rules(1000, 0.1, 0)
    capped = FoldSE(tail=0.0, max_rules=5).fit(table)
    assert capped.capped
    size = lambda rule: 1 + sum(map(size, rule.exceptions))  # noqa: E731
    assert sum(map(size, capped.rules)) <= 5
    assert not FoldSE().fit(table).capped


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda t: FoldSE(ratio=0.0), "ratio must be positive"),
        (lambda t: FoldSE(tail=-0.1), "tail must be between"),
        (lambda t: FoldSE(tail=2.0), "tail must be between"),
        (lambda t: FoldSE(heuristic="gini"), "heuristic must be one of"),
        (lambda t: FoldSE(max_rules=0), "max_rules must be positive"),
        (lambda t: FoldSE().fit(t, positive="maybe"), "positive must be one of"),
        (lambda t: FoldSE().fit(t.rows(t.labels == "no")), "at least two classes"),
        (lambda t: FoldSE().fit(t.rows(np.zeros(len(t), bool))), "table must not be empty"),
        (lambda t: justify(FoldSE().fit(t), t), "exactly one row"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call(default_rules(100, 0.0, 0))
