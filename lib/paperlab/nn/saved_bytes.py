"""How much a training step makes autograd remember."""

import weakref

import torch
from torch import Tensor

from paperlab.checks import require_nonempty


class _Kept:
    """A saved tensor that can be watched by a weak reference."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Context that meters what is kept for the backward pass: after it, ``peak`` is the most bytes alive at once.

    A storage that several operations save counts once, and until the last of them lets go of it. The storages of
    ``ignore`` (parameters, which are alive anyway) do not count.

    Raises:
        ValueError: ``ignore`` is empty: a model without parameters saves nothing worth counting.
    """

    def __init__(self, ignore: list[Tensor]) -> None:
        require_nonempty(ignore=ignore)
        self.now, self.peak = 0, 0
        self._users: dict[int, int] = {}
        self._ignored = {p.untyped_storage().data_ptr() for p in ignore}
        super().__init__(self._keep, lambda kept: kept.tensor)

    def __enter__(self) -> "SavedBytes":
        super().__enter__()
        return self

    def _keep(self, tensor: Tensor) -> _Kept:
        kept, storage = _Kept(tensor), tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self._ignored:
            self._users[address] = self._users.get(address, 0) + 1
            self.now += size if self._users[address] == 1 else 0
            self.peak = max(self.peak, self.now)
            weakref.finalize(kept, self._let_go, address, size)
        return kept

    def _let_go(self, address: int, size: int) -> None:
        self._users[address] -= 1
        if not self._users[address]:
            del self._users[address]
            self.now -= size
