"""Which content is held out: decided by the content alone, so that it never moves between training and evaluation."""

import hashlib

HELD_OUT = 1_000_000_000  # seeds from here on are for evaluation: no training step reaches them


def is_held_out(key: str, share: float = 0.1) -> bool:
    """Whether the content that ``key`` names is held out: a hash of the key alone, the same everywhere."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64
