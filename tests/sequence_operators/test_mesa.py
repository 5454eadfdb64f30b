"""mesa: against something independent (a closed form, a limit, an invariance, a library)."""

import pytest


def test_against_an_oracle():
    pytest.fail("TODO: compare paperlab with something that shares no code with it")
