import time

import pytest

from paperlab.timing import race


def test_race_interleaves_and_counts():
    order = []
    taken = race({name: lambda times, name=name: order.append(name) for name in "abc"}, rounds=3, seconds=0.0)
    assert {name: len(v) for name, v in taken.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(order[-18:]) == "aabbcc" + "bbccaa" + "ccaabb"
    asleep = race({"a": lambda times: time.sleep(0.01)}, rounds=3, seconds=0.0)
    assert asleep["a"].max() < 0.005  # the clock stands still while the thread does not run
    with pytest.raises(ValueError, match="rounds"):
        race({"a": lambda times: None}, rounds=2)
    with pytest.raises(ValueError, match="jobs"):
        race({}, rounds=3)
