"""The verdict rules, tested as statistics: how often are they wrong when nothing is there, or much is?"""

import json
import math

import numpy as np
import pytest

from paperbook import Ledger, compare, exact, not_tested, size, trend, within
from paperbook.claims import CONTRADICTED, INCONCLUSIVE, MIME, NOT_TESTED, SUPPORTED, Measurement, combine, is_near

TRIALS = 2000


def verdicts_of(rule, trials=TRIALS):
    rng = np.random.default_rng(0)
    return [rule(rng).verdict for _ in range(trials)]


def share(verdicts, *wanted):
    return sum(v in wanted for v in verdicts) / len(verdicts)


# Three standard errors of a share of 5% in 2,000 trials are 1.5 points.
@pytest.mark.parametrize("n", [3, 10])
def test_compare_without_an_effect_decides_in_one_of_twenty(n):
    found = verdicts_of(lambda rng: compare("x", rng.normal(size=n), rng.normal(size=n), better="higher"))
    assert 0.035 <= share(found, SUPPORTED, CONTRADICTED) <= 0.065
    assert abs(share(found, SUPPORTED) - share(found, CONTRADICTED)) < 0.02


@pytest.mark.parametrize(("n", "effect"), [(3, 20.0), (10, 2.5)])
def test_compare_with_a_large_effect_nearly_always_finds_it(n, effect):
    for better, sign in {"higher": 1, "lower": -1}.items():
        found = verdicts_of(
            lambda rng, b=better, s=sign: compare("x", rng.normal(s * effect, 1, n), rng.normal(size=n), better=b), 300
        )
        assert share(found, SUPPORTED) > 0.97
        assert share(found, CONTRADICTED) == 0


def test_compare_uses_the_pairs():
    base = np.array([0.0, 10.0, 20.0, 30.0])  # replicates differ wildly, the gain is the same in each
    assert compare("x", base + [1.0, 1.1, 0.9, 1.0], base, better="higher").verdict == SUPPORTED
    assert compare("x", base + [1.0, 1.1, 0.9, 1.0], base[::-1], better="higher").verdict == INCONCLUSIVE


def test_compare_agrees_with_scipys_paired_t_test():
    from scipy.stats import ttest_rel

    rng = np.random.default_rng(1)
    for _ in range(200):
        a, b = rng.normal(0.6, 1, 6), rng.normal(size=6)
        assert (compare("x", a, b, better="higher").verdict != INCONCLUSIVE) == (ttest_rel(a, b).pvalue < 0.05)


def test_margin_makes_it_no_worse_than():
    ours, theirs = [0.90, 0.91, 0.905], [0.905, 0.914, 0.911]
    assert compare("x", ours, theirs, better="higher").verdict == CONTRADICTED
    assert compare("x", ours, theirs, better="higher", margin=0.02).verdict == SUPPORTED
    assert compare("x", theirs, ours, better="lower", margin=0.02).verdict == SUPPORTED


def test_compare_with_a_constant():
    assert compare("slope", [0.1, 0.12, 0.11], 0.2, better="lower").verdict == SUPPORTED


def test_within_is_equivalence():
    rng = np.random.default_rng(0)
    same = rng.normal(size=20)
    assert within("x", same, same + rng.normal(0, 0.01, 20), margin=0.05).verdict == SUPPORTED
    assert within("x", same + 1, same + rng.normal(0, 0.01, 20), margin=0.05).verdict == CONTRADICTED
    assert within("x", rng.normal(size=3), rng.normal(size=3), margin=0.05).verdict == INCONCLUSIVE
    # At the edge of the margin equivalence is claimed in at most 2.5% of trials.
    edge = verdicts_of(lambda rng: within("x", rng.normal(1.0, 0.2, 5), 0.0, margin=1.0))
    assert share(edge, SUPPORTED) <= 0.04


@pytest.mark.parametrize(
    ("values", "paper", "verdict"),
    [
        ([1.6, 1.7, 1.8], 1.7, SUPPORTED),
        ([-1.6, -1.7, -1.8], -1.7, SUPPORTED),
        ([-1.6, -1.7, -1.8], 1.7, CONTRADICTED),
        ([0.2, 0.21, 0.19], 1.7, INCONCLUSIVE),  # right direction, far too small
        ([9.0, 9.1, 8.9], 1.7, INCONCLUSIVE),  # far too large
        ([-3.0, 2.0, 5.0], 1.7, INCONCLUSIVE),  # meets the range, but 0 as well
    ],
)
def test_size(values, paper, verdict):
    assert size("x", values, paper=paper).verdict == verdict


def test_size_shows_both_numbers():
    m = size("gain", [1.6, 1.7, 1.8], paper=1.5, unit="points")
    assert "1.7" in m.ours
    assert m.paper == "1.5 points"


def test_trend_without_an_effect():
    found = verdicts_of(lambda rng: trend("x", range(6), rng.normal(size=6), direction="rising"), 600)
    assert share(found, SUPPORTED) <= 0.08  # 5% and three standard errors
    assert share(found, CONTRADICTED) <= 0.08


def test_trend_directions():
    x = np.arange(7)
    assert trend("x", x, np.exp(x), direction="rising").verdict == SUPPORTED
    assert trend("x", x, -np.exp(x), direction="rising").verdict == CONTRADICTED
    assert trend("x", x, [0, 1, 0, 1, 0, 1, 0], direction="rising").verdict == INCONCLUSIVE
    assert trend("x", x, np.ones(7), direction="rising").verdict == INCONCLUSIVE
    with pytest.raises(ValueError, match="at least 5"):
        trend("x", range(4), range(4), direction="rising")


def test_exact():
    assert exact("x", observed=1e-9, tolerance=1e-8).verdict == SUPPORTED
    assert exact("x", observed=1e-7, tolerance=1e-8).verdict == CONTRADICTED
    assert exact("x", observed=0, tolerance=0).verdict == SUPPORTED


def test_near_is_said_at_the_threshold_and_nowhere_else():
    assert compare("x", [0.0, 1.0, 2.0], -1.5, better="higher").near  # 1 ± 2.48 + 1.5: just over 0
    assert not compare("x", [9.0, 9.1, 9.2], 0.0, better="higher").near
    assert exact("x", observed=0.9e-8, tolerance=1e-8).near
    assert not exact("x", observed=1e-12, tolerance=1e-8).near


def measurement(verdict, near=False):
    return Measurement("exact", "x", verdict, "1", near=near)


def test_several_measurements():
    s, c, i, n = (measurement(v) for v in (SUPPORTED, CONTRADICTED, INCONCLUSIVE, NOT_TESTED))
    assert combine([s, s]) == SUPPORTED
    assert combine([s, c, i]) == CONTRADICTED
    assert combine([s, i]) == INCONCLUSIVE
    assert combine([s, n]) == INCONCLUSIVE  # a claim of which half is untested is not supported
    assert combine([n, n]) == NOT_TESTED


def test_a_near_measurement_matters_only_if_it_decides():
    near = measurement(SUPPORTED, near=True)
    assert is_near([near, measurement(SUPPORTED)])
    assert not is_near([near, measurement(CONTRADICTED)])
    assert not is_near([measurement(SUPPORTED)])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: compare("x", [1, 2, math.nan], [1, 2, 3], better="higher"), "ours .* not finite at replicate 2"),
        (lambda: compare("x", [1, 2], [1, 2], better="higher"), "at least 3 seeds"),
        (lambda: compare("x", [1, 2, 3], [1, 2, 3, 4], better="higher"), "paired one to one, got ours 3, baseline 4"),
        (lambda: compare("x", [1, 2, 3], math.inf, better="higher"), "baseline is inf"),
        (lambda: compare("x", [1, 2, 3], 0, better="bigger"), "better must be"),
        (lambda: compare("x", [1, 2, 3], 0, better="higher", margin=-1), "margin"),
        (lambda: compare("x", [[1, 2, 3]], 0, better="higher"), "one number a replicate"),
        (lambda: within("x", [1, 2, 3], 0, margin=0), "margin must be positive"),
        (lambda: size("x", [1, 2, 3], paper=0), "paper must be an effect other than 0"),
        (lambda: exact("x", observed=math.nan, tolerance=1), "observed is nan"),
        (lambda: exact("x", observed=1, tolerance=-1), "tolerance"),
        (lambda: trend("x", range(6), range(6), direction="up"), "direction"),
        (lambda: not_tested(" "), "reason"),
    ],
)
def test_bad_input_says_what_to_do(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.fixture
def ledger(tiny_book, monkeypatch):
    monkeypatch.chdir(tiny_book)
    return Ledger("alpha")


def test_ledger_refuses_what_was_not_announced(ledger):
    ok = exact("x", observed=0, tolerance=1)
    ledger.claim("C1", ok)
    with pytest.raises(ValueError, match="C1 is recorded twice"):
        ledger.claim("C1", ok)
    with pytest.raises(ValueError, match="C9 is not a claim of alpha: the catalogue has C1, C2"):
        ledger.claim("C9", ok)
    with pytest.raises(ValueError, match="C2 was announced in the catalogue as compare, trend; exact was not foreseen"):
        ledger.claim("C2", ok)
    with pytest.raises(ValueError, match="needs a measurement"):
        ledger.claim("C2")
    with pytest.raises(ValueError, match="ledger lacks C2"):
        ledger.table()
    with pytest.raises(ValueError, match="C2 is not recorded"):
        ledger.verdict("C2")


def test_ledger_without_claims_or_paper(tiny_book, monkeypatch):
    monkeypatch.chdir(tiny_book)
    with pytest.raises(ValueError, match="beta has no claims yet"):
        Ledger("beta")
    with pytest.raises(ValueError, match="did you mean alpha"):
        Ledger("alhpa")


def test_ledger_prints_verdicts_only_and_emits_its_data(ledger, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr("paperbook.claims.display", lambda data, **_: shown.append(data))
    ledger.claim("C1", exact("error <b>", observed=1e-9, tolerance=1e-6))
    ledger.claim("C2", compare("speed", [2.0, 2.1, 2.2], 1.0, better="higher"), machine=True)
    ledger.table()
    ledger.verdicts()
    assert capsys.readouterr().out == "C1 supported\nC2 depends on the machine\n"
    (bundle,) = shown
    rows = json.loads(json.dumps(bundle[MIME]))["claims"]
    assert [row["verdict"] for row in rows] == ["supported", "supported"]
    assert rows[1]["measurements"][0]["n"] == 3
    assert "error &lt;b&gt;" in bundle["text/html"]
    assert r"\(x^2\)" in bundle["text/html"]  # mathematics of the catalogue is marked for MathJax
