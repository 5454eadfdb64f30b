"""The search against trying every number."""

import pytest

from paperlab.search import largest


@pytest.mark.parametrize("growth", [1.0, 1.5, 2.0])
def test_it_finds_what_trying_every_number_finds(growth):
    for truth in range(60):
        assert largest(lambda n, truth=truth: n <= truth, most=50, growth=growth) == min(truth, 50)


def test_a_rough_search_is_near_and_takes_fewer_trials():
    tried = {}
    for rough in (0.0, 0.02):
        seen = tried[rough] = []
        found = largest(lambda n, seen=seen: seen.append(n) or n <= 777_777, most=10**6, growth=1.5, rough=rough)
        assert 0.98 * 777_777 <= found <= 777_777
        assert max(seen) <= 10**6
    assert len(tried[0.02]) < len(tried[0.0]) < 60


@pytest.mark.parametrize(
    ("change", "name"), [({"most": 0}, "most"), ({"growth": 0.5}, "growth"), ({"rough": 2}, "rough")]
)
def test_bad_input_names_the_argument(change, name):
    with pytest.raises(ValueError, match=name):
        largest(lambda n: True, **({"most": 5} | change))
