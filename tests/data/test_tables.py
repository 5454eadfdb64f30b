"""Mixed tables keep numbers numbers and words words; the planted rule is what it says it is."""

import numpy as np
import pytest
import sklearn.datasets
import statsmodels.api as sm

from paperlab.data.tables import REAL_TABLES, as_table, default_rules, load_table, planted_rule


def test_real_tables_are_those_of_their_sources():
    raw = sklearn.datasets.load_breast_cancer()
    table = load_table("breast_cancer")
    assert np.array_equal(table.numbers, raw.data)
    assert (table.labels == raw.target_names[raw.target]).all()
    fair = load_table("fair")
    assert len(fair) == 6366
    assert set(fair.categories[fair.names.index("occupation")]) >= {"student", "white collar"}
    assert 0.3 < (fair.labels == "affair").mean() < 0.35


def test_targets_are_cut_where_the_documentation_says():
    raw = sklearn.datasets.load_diabetes(scaled=False)
    table = load_table("diabetes")
    assert np.array_equal(table.numbers, raw.data)
    assert ((table.labels == "high") == (raw.target > np.median(raw.target))).all()
    data = {name: getattr(sm.datasets, name).load_pandas().data for name in ("randhie", "anes96", "star98", "grunfeld")}
    assert (load_table("randhie").labels == "visit").sum() == (data["randhie"]["mdvis"] >= 1).sum()
    assert (load_table("anes96").labels == "Dole").sum() == (data["anes96"]["vote"] == 1).sum()
    for name in ("star98", "grunfeld"):
        assert abs((load_table(name).labels == "high").mean() - 0.5) < 0.01
    assert len(load_table("grunfeld").categories[load_table("grunfeld").names.index("firm")]) == 11


def test_no_table_holds_its_own_target():
    hidden = {"fair": "affairs", "anes96": "vote", "randhie": "mdvis", "star98": "NABOVE", "grunfeld": "invest"}
    for name in REAL_TABLES:
        table = load_table(name)
        assert len(table) >= 150
        assert len(table.names) >= 4
        assert not {hidden.get(name), "NBELOW", "above", "choice"} & set(table.names)
        assert not np.isnan(table.numbers[table.codes < 0]).any()


def test_a_traveller_is_one_row():
    raw = sm.datasets.modechoice.load_pandas().data
    table = load_table("modechoice")
    assert len(table) == raw["individual"].nunique()
    ways = ["air", "train", "bus", "car"]  # modes 1 to 4
    for i in (0, 17, 209):
        mine = raw[raw["individual"] == i + 1]
        assert table.labels[i] == ways[int(mine[mine["choice"] == 1]["mode"].iloc[0]) - 1]
        cost = table.numbers[i, table.names.index("invc_bus")]
        assert cost == mine[mine["mode"] == 3]["invc"].iloc[0]


def test_mixed_columns():
    table = as_table({"age": [3.0, "unknown", 5]}, ["a", "b", "a"])
    assert np.array_equal(table.numbers, [[3], [np.nan], [5]], equal_nan=True)
    assert table.codes.tolist() == [[-1], [0], [-1]]
    assert table.one_hot().tolist() == [[3, 0], [0, 1], [5, 0]]
    assert len(table.rows(np.array([True, False, True]))) == 2


def test_planted_rule_row_by_row():
    table = default_rules(500, 0.0, 0)
    word = lambda i, c: table.categories[table.names.index(c)][table.codes[i, table.names.index(c)]]  # noqa: E731
    number = lambda i, c: table.numbers[i, table.names.index(c)]  # noqa: E731
    for i in range(500):
        young = number(i, "age") <= 0.3  # False for "unknown", a NaN
        yes = word(i, "colour") == "red" and number(i, "size") > 0.4 and (not young or word(i, "shape") == "round")
        yes = yes or (number(i, "weight") <= 0.15 and number(i, "age") > 0.3)
        assert (table.labels[i] == "yes") == yes


def test_noise_flips_its_share():
    clean, noisy = default_rules(8000, 0.0, 1), default_rules(8000, 0.1, 1)
    assert np.array_equal(clean.numbers, noisy.numbers, equal_nan=True)
    assert abs((clean.labels != noisy.labels).mean() - 0.1) < 0.01
    assert ((clean.labels == "yes") == planted_rule(clean)).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: load_table("titanic"), "name must be one of"),
        (lambda: default_rules(5, 0.0, 0), "rows must be at least 20"),
        (lambda: default_rules(50, 0.9, 0), "noise must be between"),
        (lambda: as_table({"a": [1], "b": [1, 2]}, [1]), "one length above 0"),
        (lambda: as_table({"a": []}, []), "one length above 0"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
