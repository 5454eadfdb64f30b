"""The run-time type checker of the tests: beartype, with an int welcome where a float is asked for.

That is the numeric tower of PEP 484, which beartype leaves off by default.
"""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
