"""FOLD-SE: default rules with exceptions, few enough to read however much data there is.

"Birds fly, unless they are penguins" is how people state a rule: a default, and what breaks it. FOLD-SE learns such
rules from tables. Its two changes to the older FOLD-R++, another impurity and the pruning of the long tail, are what
keeps the rule set small as the data grow.

Wang and Gupta (2022), https://arxiv.org/abs/2208.07912, sections 3 and 4.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float

from paperlab.checks import require_between, require_nonempty, require_nonnegative, require_one_of, require_positive
from paperlab.data.tables import Table

Mask = Bool[np.ndarray, " rows"]
Counts = Float[np.ndarray, "..."]
WORST = np.inf


def magic_gini(tp: Counts, fn: Counts, tn: Counts, fp: Counts) -> Counts:
    r"""FOLD-SE's impurity of a literal, to be minimised; infinite for a literal that does not favour the positives.

    $$GI = \frac2N \Big[ \frac{tp \cdot fp}{tp + fp} + \frac{tn \cdot fn}{tn + fn} \Big],
    \qquad \text{valid iff } tp \cdot tn > fp \cdot fn.$$

    ``tp`` and ``fp`` count the positives and negatives that satisfy the literal, ``fn`` and ``tn`` those that do not:
    whole numbers, so that an empty side is 0 / 1.
    """
    impurity = tp * fp / np.maximum(tp + fp, 1) + tn * fn / np.maximum(tn + fn, 1)
    return np.where(tp * tn > fp * fn, 2 * impurity / (tp + fn + tn + fp), WORST)


def information_gain(tp: Counts, fn: Counts, tn: Counts, fp: Counts) -> Counts:
    r"""FOLD-R++'s heuristic as an impurity: the entropy left after the split; infinite unless $tp + tn \ge fp + fn$.

    A literal that shuts out no negative is of no use to either method and is infinite, too.
    """

    def entropy(a: Counts, b: Counts) -> Counts:
        total = np.maximum(a + b, 1)
        return -a * np.log2(np.maximum(a, 1) / total) - b * np.log2(np.maximum(b, 1) / total)  # 0 log 0 = 0

    left = (entropy(tp, fp) + entropy(tn, fn)) / (tp + fn + tn + fp)
    return np.where((tp + tn >= fp + fn) & (tn > 0) & (tp > 0), left, WORST)


HEURISTICS: dict[str, Callable] = {"magic_gini": magic_gini, "information_gain": information_gain}


@dataclass(frozen=True)
class Literal:
    """A test on one column: `<=` or `>` against a number, `==` or `!=` against a category.

    A number is never equal to a category and never smaller or larger than one, so against a cell of the other kind only
    `!=` is true. On numbers `<=` and `>` are complements, on mixed columns they are not.
    """

    column: int
    op: str
    value: float | str

    def holds(self, table: Table) -> Mask:
        """Which rows satisfy the literal."""
        if self.op in ("<=", ">"):
            x = table.numbers[:, self.column]
            with np.errstate(invalid="ignore"):
                return x <= self.value if self.op == "<=" else x > self.value
        words = table.categories[self.column]
        same = table.codes[:, self.column] == (words.index(self.value) if self.value in words else -2)
        return same if self.op == "==" else ~same

    def text(self, names: tuple[str, ...]) -> str:
        """As a goal of the logic program."""
        name = f"{names[self.column]}(X)"
        if self.op in ("<=", ">"):
            return f"{name} {'=<' if self.op == '<=' else '>'} {self.value:.4g}"
        return f"{'not ' if self.op == '!=' else ''}{name} = '{self.value}'"


@dataclass(frozen=True)
class Rule:
    """A default: it fires where all literals of ``body`` hold and none of the ``exceptions`` fires."""

    body: tuple[Literal, ...]
    exceptions: tuple["Rule", ...] = ()
    head: str = ""

    def fires(self, table: Table) -> Mask:
        """Which rows the rule covers."""
        covered = np.ones(len(table), bool)
        for literal in self.body:
            covered &= literal.holds(table)
        for exception in self.exceptions:
            covered &= ~exception.fires(table)
        return covered

    def walk(self) -> Iterator["Rule"]:
        """The rule and everything nested in it."""
        yield self
        for exception in self.exceptions:
            yield from exception.walk()

    @property
    def literals(self) -> list[Literal]:
        """All literals, those of exceptions included."""
        return [literal for rule in self.walk() for literal in rule.body]


class _Counter:
    """Counts of positives and negatives for every literal at once, by prefix sums over columns sorted only once."""

    def __init__(self, table: Table, heuristic: Callable) -> None:
        self.table, self.heuristic = table, heuristic
        self.columns = np.flatnonzero(~np.isnan(table.numbers).all(0))
        self.values = table.numbers.T[self.columns]
        self.order = np.argsort(self.values, axis=1, kind="stable")  # what is not a number comes last
        self.words = [(j, word) for j, words in enumerate(table.categories) for word in words]
        first = np.cumsum([0, *map(len, table.categories)])[:-1]
        self.codes = np.where(table.codes < 0, len(self.words), table.codes + first)  # one code a word of the table
        self.visits = int(self.order.size * np.ceil(np.log2(len(table))))  # cells looked at: the cost, without a clock

    def among(self, order: np.ndarray, rows: Mask) -> np.ndarray:
        """The sorted order of these rows alone; sorting is never repeated."""
        self.visits += order.size
        return order[rows[order]].reshape(len(order), -1)

    def holds(self, literal: Literal) -> Mask:
        """Which rows of the table satisfy the literal."""
        self.visits += len(self.table)
        return literal.holds(self.table)

    def best(self, positive: Mask, negative: Mask, order: np.ndarray, used: frozenset[Literal]) -> Literal | None:
        """The valid literal with the least impurity, or None; ties go to thresholds, and there to the first column."""
        p, n = positive.sum(), negative.sum()
        self.visits += int(p + n) * len(self.table.names)
        values = np.take_along_axis(self.values, order, 1)
        is_number = ~np.isnan(values)
        is_threshold = is_number.copy()  # the last of each run of equal numbers
        is_threshold[:, :-1] &= values[:, :-1] != values[:, 1:]
        tp = np.cumsum(positive[order] & is_number, 1, dtype=float)
        fp = np.cumsum(negative[order] & is_number, 1, dtype=float)
        below_or_above = np.stack([tp, tp[:, -1:] - tp]), np.stack([fp, fp[:, -1:] - fp])
        tp, fp = (np.bincount(self.codes[rows].ravel(), minlength=len(self.words) + 1)[:-1].astype(float)
                  for rows in (positive, negative))  # fmt: skip
        same_or_not = np.stack([tp, p - tp]), np.stack([fp, n - fp])
        scores = [self.heuristic(a, p - a, n - b, b) for a, b in (below_or_above, same_or_not)]
        scores[0] = np.where(is_threshold, scores[0], WORST)

        def literal(kind: int, place: int) -> Literal:
            op, *at = np.unravel_index(place, scores[kind].shape)
            if kind == 0:
                return Literal(int(self.columns[at[0]]), ("<=", ">")[op], float(values[tuple(at)]))
            return Literal(self.words[at[0]][0], ("==", "!=")[op], self.words[at[0]][1])

        found: list[tuple[float, int, Literal]] = []
        for kind, score in enumerate(scores):
            while score.size and score.flat[place := int(score.argmin())] < WORST:
                if (candidate := literal(kind, place)) not in used:
                    found.append((score.flat[place], kind, candidate))
                    break
                score.flat[place] = WORST
        return min(found, key=lambda f: f[:2])[2] if found else None


@dataclass
class FoldSE:
    """The learner. ``FoldSE()`` is FOLD-SE, ``FoldSE(heuristic="information_gain", tail=0)`` is FOLD-R++.

    Two classes give rules for one of them (``positive``, by default the rarer) and "otherwise" the other; more classes
    give an ordered list, one rule at a time for the most frequent class that remains.

    Args:
        ratio: exceptions are learned once the negatives left are at most this share of the positives.
        tail: a rule that covers fewer than this share of the training rows is dropped.
        heuristic: ``"magic_gini"`` or ``"information_gain"``.
        max_rules: stop there and set ``capped``.

    Raises:
        ValueError: a parameter out of range.
    """

    ratio: float = 0.5
    tail: float = 0.005
    heuristic: str = "magic_gini"
    max_rules: int = 1000
    rules: list[Rule] = field(default_factory=list, init=False)
    default: str = field(default="", init=False)
    capped: bool = field(default=False, init=False)
    visits: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        require_positive(ratio=self.ratio, max_rules=self.max_rules)
        require_nonnegative(tail=self.tail)
        require_between(0, 1, tail=self.tail)
        require_one_of(HEURISTICS, heuristic=self.heuristic)

    def fit(self, table: Table, positive: str | None = None) -> "FoldSE":
        """Learn rules from ``table``.

        Raises:
            ValueError: no rows, a single class, or ``positive`` not among the labels.
        """
        require_nonempty(table=table)
        classes, sizes = np.unique(table.labels, return_counts=True)
        if len(classes) < 2:
            raise ValueError(f"table must hold at least two classes, got only {classes[0]!r}")
        self.names, self.count = table.names, 0
        self.counter = _Counter(table, HEURISTICS[self.heuristic])
        self.least = max(self.tail * len(table), 1)
        self.capped = False
        if len(classes) == 2:
            positive = str(classes[sizes.argmin()]) if positive is None else positive
            require_one_of([str(c) for c in classes], positive=positive)
            is_positive = table.labels == positive
            (self.default,) = (str(c) for c in classes if c != positive)
            self.rules = [Rule(r.body, r.exceptions, positive)
                          for r in self._rule_set(is_positive, ~is_positive, frozenset())]  # fmt: skip
        else:
            self._decision_list(table, classes)
        self.visits = self.counter.visits
        return self

    def _decision_list(self, table: Table, classes: np.ndarray) -> None:
        left, self.rules = np.ones(len(table), bool), []
        self.default = str(max(classes, key=lambda c: (table.labels == c).sum()))
        while left.any() and not self.capped:
            target = max(classes, key=lambda c: (left & (table.labels == c)).sum())
            found = self._rule_set(left & (table.labels == target), left & (table.labels != target), frozenset(), 1)
            if not found:
                break
            self.rules.append(Rule(found[0].body, found[0].exceptions, str(target)))
            left &= ~found[0].fires(table)
        if left.any():
            self.default = str(max(classes, key=lambda c: (left & (table.labels == c)).sum()))

    def _rule_set(self, positive: Mask, negative: Mask, used: frozenset, most: float = np.inf) -> list[Rule]:
        """Algorithm 1: rules until no positive is left, none is covered, or a rule falls into the tail."""
        rules: list[Rule] = []
        while positive.any() and len(rules) < most:
            if self.count >= self.max_rules:
                self.capped = True
                break
            self.count += 1
            rule = self._rule(positive, negative, used)
            covered = rule.fires(self.counter.table) & positive if rule.body else np.zeros_like(positive)
            self.counter.visits += len(rule.literals) * len(positive)
            if covered.sum() < self.least:
                self.count -= 1
                break
            rules.append(rule)
            positive = positive & ~covered
        return rules

    def _rule(self, positive: Mask, negative: Mask, used: frozenset) -> Rule:
        """Algorithm 2: sharpen the default literal by literal, then turn what is still wrong into exceptions."""
        body: list[Literal] = []
        order = self.counter.among(self.counter.order, positive | negative)
        while negative.any():
            literal = self.counter.best(positive, negative, order, used)
            if literal is None:
                return Rule(tuple(body))
            body.append(literal)
            used = used | {literal}
            holds = self.counter.holds(literal)
            positive, negative = positive & holds, negative & holds
            order = self.counter.among(order, positive | negative)
            if 0 < negative.sum() <= self.ratio * positive.sum():
                return Rule(tuple(body), tuple(self._rule_set(negative, positive, used)))
        return Rule(tuple(body))

    def predict(self, table: Table) -> np.ndarray:
        """The label of the first rule that fires, else the default."""
        labels, open_rows = np.full(len(table), self.default, dtype=object), np.ones(len(table), bool)
        for rule in self.rules:
            fires = rule.fires(table) & open_rows
            labels[fires] = rule.head
            open_rows &= ~fires
        return labels.astype(str)

    @property
    def literals(self) -> list[Literal]:
        """Every literal of the program."""
        return [literal for rule in self.rules for literal in rule.literals]


def program(model: FoldSE) -> str:
    """The rules as a stratified logic program; ``abK`` names the exceptions."""
    lines: list[str] = []
    numbers = iter(range(1, 1_000_000))

    def clause(head: str, rule: Rule) -> None:
        names = {exception: f"ab{next(numbers)}" for exception in rule.exceptions}
        goals = [literal.text(model.names) for literal in rule.body] + [f"not {n}(X)" for n in names.values()]
        lines.append(f"{head} :- {', '.join(goals) or 'true'}.")
        for exception, name in names.items():
            clause(f"{name}(X)", exception)

    for rule in model.rules:
        clause(f"label(X, '{rule.head}')", rule)
    return "\n".join([*lines, f"label(X, '{model.default}') otherwise."])


def justify(model: FoldSE, row: Table) -> str:
    """The proof tree of one prediction: every literal that was tried, and every exception that did or did not hold.

    Raises:
        ValueError: ``row`` does not hold exactly one row.
    """
    if len(row) != 1:
        raise ValueError(f"row must hold exactly one row, got {len(row)}")
    lines: list[str] = []

    def tell(rule: Rule, title: str, depth: int) -> None:
        lines.append(f"{'  ' * depth}{'✓' if rule.fires(row)[0] else '✗'} {title}")
        for literal in rule.body:
            lines.append(f"{'  ' * (depth + 1)}{'✓' if literal.holds(row)[0] else '✗'} {literal.text(model.names)}")
        for k, exception in enumerate(rule.exceptions, 1):
            tell(exception, f"exception {k}", depth + 1)

    for k, rule in enumerate(model.rules, 1):
        tell(rule, f"rule {k}: {rule.head}", 0)
        if rule.fires(row)[0]:
            break
    else:
        lines.append(f"✓ otherwise: {model.default}")
    return "\n".join(lines)
