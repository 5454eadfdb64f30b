"""Tables with numbers and categories side by side, as they come: real ones, and one made by rules that are known.

A column may hold numbers, words, or both ("unknown" in a column of ages). Nothing is one-hot encoded.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import sklearn.datasets
from jaxtyping import Bool, Float, Int

from paperlab.checks import require_at_least, require_between, require_one_of

REAL_TABLES = (
    "breast_cancer", "wine", "iris", "diabetes", "fair", "anes96", "randhie", "star98", "modechoice", "grunfeld"
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Rows with mixed columns and one label each.

    ``numbers`` holds NaN where a cell is a category, ``codes`` holds -1 where it is a number; ``categories[j]`` names
    the codes of column j.
    """

    numbers: Float[np.ndarray, "rows columns"]
    codes: Int[np.ndarray, "rows columns"]
    names: tuple[str, ...]
    categories: tuple[tuple[str, ...], ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: np.ndarray) -> "Table":
        """The table of these rows (a mask or indices)."""
        return Table(self.numbers[index], self.codes[index], self.names, self.categories, self.labels[index])

    def one_hot(self) -> Float[np.ndarray, "rows features"]:
        """For methods that need numbers: numeric columns as they are (0 where not a number), one column a category."""
        blocks = [np.nan_to_num(self.numbers[:, ~np.isnan(self.numbers).all(0)])]
        for j, words in enumerate(self.categories):
            blocks += [(self.codes[:, j] == k)[:, None].astype(float) for k in range(len(words))]
        return np.hstack(blocks)


def as_table(columns: dict[str, list], labels: list) -> Table:
    """A table from columns of numbers and words.

    Raises:
        ValueError: columns or labels of different lengths, or no rows.
    """
    lengths = {len(column) for column in columns.values()} | {len(labels)}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"columns and labels must have one length above 0, got {sorted(lengths)}")
    rows = len(labels)
    numbers, codes, categories = np.full((rows, len(columns)), np.nan), np.full((rows, len(columns)), -1), []
    for j, column in enumerate(columns.values()):
        words = sorted({cell for cell in column if isinstance(cell, str)})
        categories.append(tuple(words))
        if not words:
            numbers[:, j] = column
            continue
        code = {word: k for k, word in enumerate(words)}
        codes[:, j] = [code[cell] if isinstance(cell, str) else -1 for cell in column]
        numbers[:, j] = [np.nan if isinstance(cell, str) else cell for cell in column]
    return Table(numbers, codes, tuple(columns), tuple(categories), np.asarray(labels))


def _as_frame(name: str) -> tuple[dict[str, list], list]:
    """Columns and labels of a statsmodels table."""
    import statsmodels.api as sm

    frame = getattr(sm.datasets, name).load_pandas().data
    if name == "modechoice":  # four rows a traveller, one for each way to go: one row, with the costs of all four
        ways = ("air", "train", "bus", "car")
        blocks = {way: frame.iloc[k::4].reset_index(drop=True) for k, way in enumerate(ways)}
        costs = {f"{cost}_{way}": f[cost] for way, f in blocks.items() for cost in ("ttme", "invc", "invt", "gc")}
        columns = costs | {column: blocks["air"][column] for column in ("hinc", "psize")}
        chosen = np.stack([f["choice"] for f in blocks.values()], 1).argmax(1)
        return {column: values.tolist() for column, values in columns.items()}, [ways[k] for k in chosen]
    if name == "fair":
        jobs = ("student", "farming or unskilled", "white collar", "teacher or nurse", "managerial", "professional")
        for column in ("occupation", "occupation_husb"):
            frame[column] = [jobs[int(code) - 1] for code in frame[column]]
    if name == "star98":
        frame["above"] = frame["NABOVE"] / (frame["NABOVE"] + frame["NBELOW"])
        frame = frame.drop(columns=["NABOVE", "NBELOW", *(c for c in frame.columns if "_" in c)])
    label = {"fair": "affairs", "anes96": "vote", "randhie": "mdvis", "star98": "above", "grunfeld": "invest"}[name]
    target = frame.pop(label)
    words = {"fair": ("none", "affair"), "anes96": ("Clinton", "Dole"), "randhie": ("no visit", "visit")}
    cut = 0 if name in words else target.median()
    frame = frame.drop(columns="logpopul", errors="ignore")
    return frame.to_dict("list"), np.where(target > cut, *words.get(name, ("low", "high"))[::-1]).tolist()


@cache
def load_table(name: str) -> Table:
    """A real table.

    From scikit-learn `breast_cancer`, `wine`, `iris`, `diabetes`; from statsmodels `fair` (6,366 answers on affairs),
    `anes96` (voters), `randhie` (20,190 insured people: any visit to a doctor?), `star98` (school districts),
    `modechoice` (210 travellers, four ways to go) and `grunfeld` (eleven firms over twenty years).

    Where the target is a number it is cut in two: counts at "any or none", the rest at the median ("low", "high").
    Columns computed from other columns of the same table (products, a logarithm) are left out.

    Raises:
        ValueError: an unknown name.
    """
    require_one_of(REAL_TABLES, name=name)
    if name not in ("breast_cancer", "wine", "iris", "diabetes"):
        return as_table(*_as_frame(name))
    bunch = getattr(sklearn.datasets, f"load_{name}")(**({"scaled": False} if name == "diabetes" else {}))
    names = [feature.removesuffix(" (cm)").replace(" ", "_").replace("/", "_") for feature in bunch.feature_names]
    columns = {column: bunch.data[:, j].tolist() for j, column in enumerate(names)}
    if name == "diabetes":
        return as_table(columns, np.where(bunch.target > np.median(bunch.target), "high", "low").tolist())
    return as_table(columns, [str(bunch.target_names[k]) for k in bunch.target])


def planted_rule(table: Table) -> Bool[np.ndarray, " rows"]:
    """The truth behind `default_rules`: two defaults, one of them with an exception that has an exception.

    Positive are rows with ``size > 0.4`` and ``colour = red``, unless ``age <= 0.3``, unless then ``shape = round``;
    and rows with ``weight <= 0.15`` and ``age > 0.3``. An age that is the word "unknown" is neither small nor large.
    """
    column = {name: j for j, name in enumerate(table.names)}
    number = {name: table.numbers[:, j] for name, j in column.items()}

    def is_word(name: str, word: str) -> np.ndarray:
        return table.codes[:, column[name]] == table.categories[column[name]].index(word)

    young = number["age"] <= 0.3
    first = (number["size"] > 0.4) & is_word("colour", "red") & ~(young & ~is_word("shape", "round"))
    second = (number["weight"] <= 0.15) & (number["age"] > 0.3)
    return first | second


def default_rules(rows: int, noise: float, seed: int) -> Table:
    """A table of eight columns (five numeric, two categorical, one mixed) labelled by `planted_rule`.

    A share ``noise`` of the labels, drawn at random, is flipped.

    Raises:
        ValueError: fewer than 20 rows, or noise outside 0 to 0.5.
    """
    require_at_least(20, rows=rows)
    require_between(0, 0.5, noise=noise)
    rng = np.random.default_rng(seed)
    numeric = ("size", "weight", "height", "price", "speed")
    columns: dict[str, list] = {name: rng.random(rows).tolist() for name in numeric}
    columns["colour"] = rng.choice(["red", "green", "blue"], rows).tolist()
    columns["shape"] = rng.choice(["round", "square", "long", "flat"], rows).tolist()
    ages, missing = rng.random(rows), rng.random(rows) < 0.1
    columns["age"] = ["unknown" if gone else age for age, gone in zip(ages, missing, strict=True)]
    table = as_table(columns, ["no"] * rows)
    flipped = planted_rule(table) ^ (rng.random(rows) < noise)
    return replace(table, labels=np.where(flipped, "yes", "no"))
