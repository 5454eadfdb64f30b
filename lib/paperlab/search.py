"""How much fits? The largest number for which something still holds, found by few trials."""

from collections.abc import Callable

from paperlab.checks import require_at_least, require_between


def largest(holds: Callable[[int], bool], *, most: int, growth: float = 2.0, rough: float = 0.0) -> int:
    """The largest n for which ``holds(n)``, which is true up to some n and false beyond it; 0 if never.

    n grows by the factor ``growth``, up to ``most``, until that fails; then the range is bisected, to 1 or to ``rough``
    times n, whichever is more. Where ``holds`` is a matter of chance, it held at the answer and not just above.

    Raises:
        ValueError: ``most`` below 1, ``growth`` outside 1 to 10, or ``rough`` outside 0 to 1.
    """
    require_at_least(1, most=most)
    require_between(1, 10, growth=growth)
    require_between(0, 1, rough=rough)
    good, bad = 0, 1
    while bad <= most and holds(bad):
        good, bad = bad, max(bad + 1, int(bad * growth))
    bad = min(bad, most + 1)
    while bad - good > max(1, int(rough * good + 1e-9)):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good
