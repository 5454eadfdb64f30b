"""The ledger: what a paper claims, what we measured, and a verdict by rule.

A page measures (`exact`, `compare`, `within`, `trend`, `size`, `not_tested`), the ledger decides. The claims themselves
were written into the catalogue before the experiment was; a page can only refer to them by id. No function here takes a
verdict as an argument.

Each measurement also knows whether it stands *near* its threshold. A verdict that does can flip on another processor,
where sums are added in another order; such a flip is reported and not counted as a failure. Any other flip is one.
"""

import html
import math
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real

import numpy as np
from IPython.display import display
from numpy.typing import ArrayLike

from paperbook.catalog import CatalogError, ClaimText, Paper, load_catalog
from paperlab.stats import Interval, mean_interval, paired_interval, spearman_trend

MIME = "application/vnd.paperlab.claims+json"
SUPPORTED, CONTRADICTED, INCONCLUSIVE, NOT_TESTED = "supported", "contradicted", "inconclusive", "not tested"
VERDICTS = (SUPPORTED, CONTRADICTED, INCONCLUSIVE, NOT_TESTED)
MIN_REPLICATES = 3
ALPHA = 0.05
NEAR = 0.2  # of an interval's half-width (of a factor, for p-values and tolerances): closer than this may flip

RULES = {
    "exact": "A statement of mathematics: the observed error is at most the stated tolerance.",
    "compare": "Ours against a baseline, paired over replicates: the 95% Student interval of the differences lies"
    " wholly on the claimed side of 0 (of −margin, where the claim is “no worse than”).",
    "within": "Equivalence: the 95% Student interval of the paired differences lies wholly inside ±margin; wholly"
    " outside it contradicts.",
    "trend": "A monotone relation over a sweep: Spearman's rank correlation has the claimed sign with a one-sided"
    " permutation p below 0.05; the opposite sign with p below 0.05 contradicts.",
    "size": "An effect beside the paper's number: same sign, 0 excluded, and the 95% interval meets half to double the"
    " paper's effect; the opposite sign with 0 excluded contradicts.",
    "not_tested": "Out of reach here, with the reason.",
}


@dataclass(frozen=True)
class Measurement:
    """One measured quantity and the verdict that its rule gives.

    ``ours`` is for people; ``estimate``, ``low``, ``high`` are the interval where there is one; ``near`` says that the
    verdict stands close enough to its threshold to flip on another processor.
    """

    kind: str
    label: str
    verdict: str
    ours: str
    paper: str = ""
    n: int = 0
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    near: bool = False


def _number(**named: float) -> None:
    for name, value in named.items():
        if not isinstance(value, Real | np.generic) and getattr(value, "ndim", 1) != 0:
            raise ValueError(f"{name} must be one number, got {type(value).__name__}")
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}: find out where it comes from before it becomes a verdict")


def _replicates(label: str, **named: ArrayLike) -> list[np.ndarray]:
    arrays = []
    for name, values in named.items():
        x = np.asarray(values, dtype=float)
        if x.ndim != 1:
            raise ValueError(f"{label}: {name} must be a list with one number a replicate, got shape {x.shape}")
        if len(x) < MIN_REPLICATES:
            raise ValueError(f"{label}: {name} has {len(x)} replicates; run at least {MIN_REPLICATES} seeds")
        if not np.isfinite(x).all():
            raise ValueError(
                f"{label}: {name} has a value that is not finite at replicate {int(np.argmin(np.isfinite(x)))}"
            )
        arrays.append(x)
    if len({len(x) for x in arrays}) > 1:
        sizes = ", ".join(f"{name} {len(x)}" for name, x in zip(named, arrays, strict=True))
        raise ValueError(f"{label}: replicates must be paired one to one, got {sizes}")
    return arrays


def _difference(label: str, ours: ArrayLike, baseline: ArrayLike) -> Interval:
    if np.ndim(baseline) == 0:
        _number(baseline=baseline)
        (a,) = _replicates(label, ours=ours)
        return mean_interval(a - float(baseline))
    return paired_interval(*_replicates(label, ours=ours, baseline=baseline))


def _close(interval: Interval, *thresholds: float) -> bool:
    """Does an end of the interval stand within a fifth of its half-width of a threshold?"""
    ends = (interval.low, interval.high)
    return any(abs(end - t) <= NEAR * interval.half_width for end in ends for t in thresholds)


def exact(label: str, *, observed: float, tolerance: float) -> Measurement:
    """A statement of mathematics: supported if ``observed`` (an error, a violation) is at most ``tolerance``.

    Raises:
        ValueError: a number that is not finite, or a negative tolerance.
    """
    _number(observed=observed, tolerance=tolerance)
    if tolerance < 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    verdict = SUPPORTED if observed <= tolerance else CONTRADICTED
    near = bool(0 < tolerance / 2 < observed < tolerance * 2)  # not NumPy's: it must go into JSON
    return Measurement("exact", label, verdict, f"{observed:.3g} (allowed {tolerance:.3g})", n=1,
                       estimate=float(observed), near=near)  # fmt: skip


def compare(
    label: str,
    ours: ArrayLike,
    baseline: ArrayLike,
    *,
    better: str,
    margin: float = 0.0,
    unit: str = "",
    paper: str = "",
) -> Measurement:
    """Ours against a baseline, replicate by replicate; the baseline may be a constant.

    With a ``margin`` the claim is "no worse than": the difference may be as low as ``-margin`` on the better side.

    Raises:
        ValueError: ``better`` is not "higher" or "lower"; under 3 replicates; unpaired; not finite; negative margin.
    """
    if better not in ("higher", "lower"):
        raise ValueError(f'better must be "higher" or "lower", got {better!r}')
    _number(margin=margin)
    if margin < 0:
        raise ValueError(f"margin must be at least 0, got {margin}")
    gap = _difference(label, ours, baseline)
    threshold = -margin if better == "higher" else margin
    above, below = gap.low > threshold, gap.high < threshold
    wanted, opposite = (above, below) if better == "higher" else (below, above)
    verdict = SUPPORTED if wanted else CONTRADICTED if opposite else INCONCLUSIVE
    return _from_interval("compare", label, verdict, gap, unit, paper, _close(gap, threshold), "difference ")


def within(
    label: str,
    ours: ArrayLike,
    baseline: ArrayLike,
    *,
    margin: float,
    unit: str = "",
    paper: str = "",
) -> Measurement:
    """Equivalence: ours and the baseline differ by less than ``margin`` either way.

    Raises:
        ValueError: ``margin`` is not positive; under 3 replicates; unpaired; not finite.
    """
    _number(margin=margin)
    if margin <= 0:
        raise ValueError(f"margin must be positive, got {margin}")
    gap = _difference(label, ours, baseline)
    inside, outside = -margin < gap.low and gap.high < margin, gap.low > margin or gap.high < -margin
    verdict = SUPPORTED if inside else CONTRADICTED if outside else INCONCLUSIVE
    return _from_interval("within", label, verdict, gap, unit, paper, _close(gap, margin, -margin), "difference ")


def size(label: str, values: ArrayLike, *, paper: float, unit: str = "") -> Measurement:
    """An effect with its interval beside the paper's number.

    An interval that still holds 0 supports nothing, however wide it is; that is stricter than meeting half to double.

    Raises:
        ValueError: the paper's effect is 0; under 3 replicates; a value that is not finite.
    """
    _number(paper=paper)
    if paper == 0:
        raise ValueError("paper must be an effect other than 0; use `within` for the claim that nothing changes")
    (x,) = _replicates(label, values=values)
    effect = mean_interval(x)
    low, high, reference = (effect.low, effect.high, paper) if paper > 0 else (-effect.high, -effect.low, -paper)
    meets = low > 0 and low <= 2 * reference and high >= reference / 2
    verdict = SUPPORTED if meets else CONTRADICTED if high < 0 else INCONCLUSIVE
    near = _close(Interval(0, low, high, effect.n), 0.0, reference / 2, 2 * reference)
    return _from_interval("size", label, verdict, effect, unit, f"{paper:g}{_unit(unit)}", near)


def trend(label: str, x: ArrayLike, y: ArrayLike, *, direction: str, paper: str = "") -> Measurement:
    """A monotone relation over a sweep, by rank correlation; ``y`` may be (points,) or (replicates, points).

    Raises:
        ValueError: fewer than 5 points, a value that is not finite, or an unknown direction.
    """
    opposite = {"rising": "falling", "falling": "rising"}
    try:
        found = spearman_trend(x, y, direction)
        against = spearman_trend(x, y, opposite[direction])
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None
    verdict = SUPPORTED if found.p < ALPHA else CONTRADICTED if against.p < ALPHA else INCONCLUSIVE
    near = any(ALPHA / (1 + 2 * NEAR) < p < ALPHA * (1 + 2 * NEAR) for p in (found.p, against.p))
    return Measurement("trend", label, verdict, f"ρ = {found.rho:.2f}, p = {found.p:.2g}", paper=paper, n=found.n,
                       estimate=found.rho, near=near)  # fmt: skip


def not_tested(reason: str) -> Measurement:
    """Out of reach here; the reason is shown in the ledger.

    Raises:
        ValueError: no reason is given.
    """
    if not reason.strip():
        raise ValueError("reason must say why the claim is not tested")
    return Measurement("not_tested", reason, NOT_TESTED, "")


def _unit(unit: str) -> str:
    return f" {unit}" if unit else ""


def _from_interval(
    kind: str, label: str, verdict: str, interval: Interval, unit: str, paper: str, near: bool, what: str = ""
) -> Measurement:
    ours = f"{what}{interval:.3g}{_unit(unit)}"
    return Measurement(
        kind, label, verdict, ours, paper, interval.n, interval.estimate, interval.low, interval.high, near
    )


def combine(measurements: Sequence[Measurement]) -> str:
    """The verdict of a claim that takes several measurements: all must support it, one that contradicts is enough."""
    verdicts = {m.verdict for m in measurements}
    if CONTRADICTED in verdicts:
        return CONTRADICTED
    if verdicts == {NOT_TESTED}:
        return NOT_TESTED
    return SUPPORTED if verdicts == {SUPPORTED} else INCONCLUSIVE


def is_near(measurements: Sequence[Measurement]) -> bool:
    """Would the claim's verdict change if the measurements that stand near their thresholds came out otherwise?"""
    settled = combine(measurements)
    return any(
        combine([replace(m, verdict=other) if m.near else m for m in measurements]) != settled
        for other in (SUPPORTED, INCONCLUSIVE, CONTRADICTED)
    )


class Ledger:
    """The claims of one paper, each measured once.

    ``claim`` records, ``table`` shows and emits the data, ``verdicts`` prints what must be the same on every machine.
    """

    def __init__(self, slug: str) -> None:
        paper: Paper = load_catalog().paper(slug)
        if not paper.claims:
            raise CatalogError(f"{slug} has no claims yet: write them into book/catalog/{paper.part}.yml first")
        self.paper = paper
        self._texts: dict[str, ClaimText] = {claim.id: claim for claim in paper.claims}
        self._measured: dict[str, tuple[Measurement, ...]] = {}
        self._machine: set[str] = set()

    def claim(self, claim_id: str, *measurements: Measurement, machine: bool = False) -> None:
        """Record what was measured for a claim; ``machine=True`` where wall-clock time decides.

        Raises:
            ValueError: the id is not in the catalogue or was recorded before; no measurement; a kind of measurement
                that the catalogue does not foresee for this claim.
        """
        if claim_id not in self._texts:
            raise ValueError(
                f"{claim_id} is not a claim of {self.paper.slug}: the catalogue has {', '.join(self._texts)}"
            )
        if claim_id in self._measured:
            raise ValueError(f"{claim_id} is recorded twice: give all its measurements in one call")
        if not measurements:
            raise ValueError(f"{claim_id} needs a measurement, or not_tested(reason)")
        foreseen = {*self._texts[claim_id].kinds, "not_tested"}
        strange = [m.kind for m in measurements if m.kind not in foreseen]
        if strange:
            raise ValueError(f"{claim_id} was announced in the catalogue as {', '.join(self._texts[claim_id].kinds)};"
                             f" {', '.join(strange)} was not foreseen")  # fmt: skip
        self._measured[claim_id] = measurements
        if machine:
            self._machine.add(claim_id)

    def verdict(self, claim_id: str) -> str:
        """The verdict of a recorded claim, for prose that is computed.

        Raises:
            ValueError: the claim is not recorded yet.
        """
        if claim_id not in self._measured:
            raise ValueError(f"{claim_id} is not recorded yet")
        return combine(self._measured[claim_id])

    def _complete(self) -> None:
        absent = [claim_id for claim_id in self._texts if claim_id not in self._measured]
        if absent:
            raise ValueError(f"the ledger lacks {', '.join(absent)}: measure them, or say not_tested(reason)")

    def data(self) -> dict:
        """Everything the ledger page needs, as plain JSON."""
        self._complete()
        rows = []
        for claim_id, text in self._texts.items():
            measured = self._measured[claim_id]
            rows.append({
                "id": claim_id, "text": text.text, "paper": text.paper, "verdict": combine(measured),
                "near": is_near(measured), "machine": claim_id in self._machine,
                "measurements": [asdict(m) for m in measured],
            })  # fmt: skip
        return {"slug": self.paper.slug, "processor": platform.machine(), "claims": rows}

    def table(self) -> None:
        """Show the ledger and emit its data."""
        data = self.data()
        display({"text/html": _table_html(data), MIME: data, "text/plain": _table_text(data)}, raw=True)

    def verdicts(self) -> None:
        """Print claim ids and verdicts, and nothing that differs between machines."""
        self._complete()
        for claim_id in self._texts:
            print(claim_id, "depends on the machine" if claim_id in self._machine else self.verdict(claim_id))


def rich(text: str) -> str:
    """Text of the catalogue as HTML: `$…$` marked for MathJax, backticks as code."""
    mark = r'<span class="math notranslate nohighlight">\\(\1\\)</span>'
    text = re.sub(r"\$([^$]+)\$", mark, html.escape(text, quote=False))
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


def _table_text(data: dict) -> str:
    return "\n".join(f"{row['id']} {row['verdict']}: {row['text']}" for row in data["claims"])


def _table_html(data: dict) -> str:
    def measured(m: dict) -> str:
        count = f' <span class="n">n = {m["n"]}</span>' if m["n"] > 1 else ""
        beside = f' <span class="beside">(paper: {rich(m["paper"])})</span>' if m["paper"] else ""
        return f"<li>{rich(m['label'])}: {html.escape(m['ours'])}{beside}{count}</li>" if m["ours"] else (
            f"<li>{rich(m['label'])}</li>")  # fmt: skip

    rows = "".join(
        f'<tr id="claim-{row["id"]}"><th scope="row">{row["id"]}</th><td>{rich(row["text"])}</td>'
        f"<td>{rich(row['paper']) or '–'}</td>"
        f'<td><ul class="measured">{"".join(measured(m) for m in row["measurements"])}</ul></td>'
        f'<td><span class="verdict {row["verdict"].replace(" ", "-")}">{row["verdict"]}</span>'
        f"{' <small>on this machine</small>' if row['machine'] else ''}"
        f"{' <small>near its threshold</small>' if row['near'] else ''}</td></tr>"
        for row in data["claims"]
    )
    return (
        '<div class="paperlab-ledger"><table><caption>Each verdict follows from its rule; intervals are 95% Student '
        'intervals over n replicates.</caption><thead><tr><th scope="col">Claim</th><th scope="col">What the paper says'
        '</th><th scope="col">Paper</th><th scope="col">Measured here</th><th scope="col">Verdict</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
