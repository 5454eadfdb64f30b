"""How much memory a computation needs at once."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Context that meters the tensors made inside: after it, ``peak`` is the most bytes of them alive at once.

    A storage counts once, however many views it has, from the operation that made it until nothing holds it. What a
    kernel allocates for itself and frees before it returns is not seen. On every device alike, and exact, where the
    memory of the process is neither; operations take some microseconds longer, so clock them outside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and meter what it returns."""
        for tensor in tree_leaves((args, kwargs)):  # an operation may return its argument: that is nothing new
            if isinstance(tensor, Tensor):
                self._watch(tensor, new=False)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._watch(tensor, new=True)
        return out

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to skip it, torch imports its compiler at the first operation, which takes two seconds."""
        return False

    def _watch(self, tensor: Tensor, new: bool) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self._alive:
            size = storage.nbytes() if new else 0
            self._alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._let_go, key, size).atexit = False

    def _let_go(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size
