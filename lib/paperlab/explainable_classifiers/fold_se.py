"""FOLD-SE: default rules with exceptions, few enough to read however much data there is.

"Birds fly, unless they are penguins" is how people state a rule: a default, and what breaks it. FOLD-SE learns such
rules from tables. It changes the older FOLD-R++ in two ways, another impurity and the pruning of the long tail, so that
the rule set stays small as the data grow.

Wang and Gupta (2022), https://arxiv.org/abs/2208.07912, sections 3 and 4.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
from jaxtyping import Bool, Float, Int

from paperlab.checks import require_between, require_nonempty, require_one_of, require_positive
from paperlab.data.tables import Table

Mask = Bool[np.ndarray, " rows"]
Counts = Int[np.ndarray, "*literals"]
Scores = Float[np.ndarray, "*literals"]
Order = Int[np.ndarray, "numeric_columns _"]
WORST = np.inf


def magic_gini(tp: Counts, fn: Counts, tn: Counts, fp: Counts) -> Scores:
    r"""FOLD-SE's impurity of a literal, to be minimised; infinite for a literal that does not favour the positives.

    $$GI = \frac2N \Big[ \frac{tp \cdot fp}{tp + fp} + \frac{tn \cdot fn}{tn + fn} \Big],
    \qquad \text{valid iff } tp \cdot tn > fp \cdot fn.$$

    ``tp`` and ``fp`` count the positives and negatives that satisfy the literal, ``fn`` and ``tn`` those that do not:
    whole numbers, so that an empty side is 0 / 1.
    """
    impurity = tp * fp / np.maximum(tp + fp, 1) + tn * fn / np.maximum(tn + fn, 1)
    return np.where(tp * tn > fp * fn, 2 * impurity / (tp + fn + tn + fp), WORST)


@cache
def _n_log_n(below: int) -> Float[np.ndarray, " below"]:
    """$n \\log_2 n$ of the whole numbers below a limit: a logarithm for each literal is what entropy would cost."""
    n = np.arange(below)
    return n * np.log2(np.maximum(n, 1))  # 0 log 0 = 0


def information_gain(tp: Counts, fn: Counts, tn: Counts, fp: Counts) -> Scores:
    r"""FOLD-R++'s heuristic as an impurity, the entropy that is left after the split, with $h(n) = n \log_2 n$:

    $$\frac1N \big[ h(tp + fp) - h(tp) - h(fp) + h(tn + fn) - h(tn) - h(fn) \big].$$

    A literal is valid iff $tp + tn \ge fp + fn$, and infinite otherwise. One that no positive satisfies, or that shuts
    out no negative, is of no use to either method and is infinite, too.
    """
    rows = tp + fn + tn + fp
    h = _n_log_n(1 << int(rows.max(initial=0)).bit_length())
    left = h[tp + fp] - (h[tp] + h[fp]) + (h[tn + fn] - (h[tn] + h[fn]))
    return np.where((tp + tn >= fp + fn) & (tn > 0) & (tp > 0), left / rows, WORST)


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
        tests = [literal.holds(table) for literal in self.body] + [~rule.fires(table) for rule in self.exceptions]
        return np.all([np.ones(len(table), bool), *tests], axis=0)

    @property
    def literals(self) -> list[Literal]:
        """All literals, those of exceptions included."""
        return [*self.body, *(literal for rule in self.exceptions for literal in rule.literals)]


class _Counter:
    """Counts of positives and negatives for every literal at once, by prefix sums over columns sorted only once."""

    def __init__(self, table: Table, heuristic: Callable) -> None:
        self.table, self.heuristic = table, heuristic
        self.columns = np.flatnonzero(~np.isnan(table.numbers).all(0))
        self.values = table.numbers.T[self.columns]
        self.order = np.argsort(self.values, axis=1, kind="stable")  # what is not a number comes last
        self.words = [(j, word) for j, words in enumerate(table.categories) for word in words]
        first = np.cumsum([0, *map(len, table.categories)])[:-1]
        codes = np.where(table.codes < 0, len(self.words), table.codes + first)  # one code a word of the table
        self.codes = codes[:, [len(words) > 0 for words in table.categories]]
        self.visits = int(self.order.size * np.ceil(np.log2(len(table))))  # cells looked at: the cost, without a clock

    def among(self, order: Order, rows: Mask) -> Order:
        """The sorted order of these rows alone; sorting is never repeated."""
        self.visits += order.size
        return order[rows[order]].reshape(len(order), -1)

    def holds(self, literal: Literal) -> Mask:
        """Which rows of the table satisfy the literal."""
        self.visits += len(self.table)
        return literal.holds(self.table)

    def best(self, positive: Mask, negative: Mask, order: Order, used: frozenset[Literal]) -> Literal | None:
        """The valid literal with the least impurity, or None; ties go to thresholds, and there to the first column."""
        p, n = positive.sum(), negative.sum()
        self.visits += int(p + n) * len(self.table.names)
        values = np.take_along_axis(self.values, order, 1)
        is_threshold = ~np.isnan(values)
        is_threshold[:, :-1] &= values[:, :-1] != values[:, 1:]  # the last of each run of equal numbers
        column, rank = is_threshold.nonzero()
        tp = np.cumsum(positive[order], 1)[is_threshold]  # prefix sums: the positives up to each threshold
        fp = rank + 1 - tp
        top = (np.cumsum(is_threshold.sum(1)) - 1)[column]  # a column's last threshold has counted all its numbers
        words = len(self.words)
        tp_word, fp_word = (np.bincount(self.codes[r].ravel(), minlength=words + 1)[:-1] for r in (positive, negative))
        tp = np.concatenate([tp, tp[top] - tp, tp_word, p - tp_word])  # one block each for <=, >, == and !=
        fp = np.concatenate([fp, fp[top] - fp, fp_word, n - fp_word])
        scores = self.heuristic(tp, p - tp, n - fp, fp)

        def literal(place: int) -> Literal:
            if place < 2 * len(column):
                op, k = divmod(place, len(column))
                return Literal(int(self.columns[column[k]]), ("<=", ">")[op], float(values[column[k], rank[k]]))
            op, k = divmod(place - 2 * len(column), words)
            return Literal(self.words[k][0], ("==", "!=")[op], self.words[k][1])

        while scores.size and scores[place := int(scores.argmin())] < WORST:
            if (found := literal(place)) not in used:
                return found
            scores[place] = WORST
        return None


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
        self.names, self.count, self.capped = table.names, 0, False
        self.counter = _Counter(table, HEURISTICS[self.heuristic])
        self.least = max(self.tail * len(table), 1)
        if len(classes) == 2:
            positive = str(classes[sizes.argmin()]) if positive is None else positive
            require_one_of([str(c) for c in classes], positive=positive)
            is_positive = table.labels == positive
            (self.default,) = (str(c) for c in classes if c != positive)
            found = self._rule_set(is_positive, ~is_positive, frozenset(), self.counter.order)
            self.rules = [replace(rule, head=positive) for rule in found]
        else:
            self._decision_list(table, classes)
        self.visits = self.counter.visits
        return self

    def _decision_list(self, table: Table, classes: np.ndarray) -> None:
        is_class = {str(c): table.labels == c for c in classes}
        self.default = max(is_class, key=lambda c: is_class[c].sum())
        left, self.rules = np.ones(len(table), bool), []
        while left.any():
            target = max(is_class, key=lambda c: (left & is_class[c]).sum())
            sides = left & is_class[target], left & ~is_class[target]
            found = self._rule_set(*sides, frozenset(), self.counter.order, most=1)
            if not found:
                self.default = target
                break
            self.rules.append(replace(found[0], head=target))
            left &= ~found[0].fires(table)

    def _rule_set(
        self, positive: Mask, negative: Mask, used: frozenset, order: Order, most: float = np.inf
    ) -> list[Rule]:
        """Algorithm 1: rules until no positive is left, none is covered, or a rule falls into the tail."""
        rules: list[Rule] = []
        while positive.any() and len(rules) < most:
            if self.count >= self.max_rules:
                self.capped = True
                break
            self.count += 1
            order = self.counter.among(order, positive | negative)
            rule = self._rule(positive, negative, used, order)
            covered = rule.fires(self.counter.table) & positive if rule.body else np.zeros_like(positive)
            self.counter.visits += len(rule.literals) * len(positive)
            if covered.sum() < self.least:
                self.count -= 1
                break
            rules.append(rule)
            positive = positive & ~covered
        return rules

    def _rule(self, positive: Mask, negative: Mask, used: frozenset, order: Order) -> Rule:
        """Algorithm 2: sharpen the default literal by literal, then turn what is still wrong into exceptions."""
        body: list[Literal] = []
        while negative.any() and (literal := self.counter.best(positive, negative, order, used)):
            body.append(literal)
            used = used | {literal}
            holds = self.counter.holds(literal)
            positive, negative = positive & holds, negative & holds
            order = self.counter.among(order, positive | negative)
            if 0 < negative.sum() <= self.ratio * positive.sum():
                return Rule(tuple(body), tuple(self._rule_set(negative, positive, used, order)))
        return Rule(tuple(body))

    def predict(self, table: Table) -> np.ndarray:
        """The label of the first rule that fires, else the default."""
        labels = np.full(len(table), self.default, dtype=object)
        for rule in reversed(self.rules):  # an earlier rule overwrites a later one
            labels[rule.fires(table)] = rule.head
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
