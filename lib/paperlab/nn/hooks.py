"""Looking into a running network, and changing what it computes, without rewriting it.

A network passes an intermediate through a `HookPoint`; that alone makes it readable (`recorded`) and editable
(`edited`) by name, the name being the module's path. Both are contexts: outside of them the network is as it was, also
after an error.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

Edit = Callable[[Tensor], Tensor]
Names = str | Iterable[str] | Callable[[str], bool] | None


class HookPoint(nn.Module):
    """The identity, with a name: torch's own forward hooks see, and may replace, what passes through."""

    @property
    def watched(self) -> bool:
        """Whether anybody looks or edits here, so that the value must be computed at all."""
        return bool(self._forward_hooks or self._forward_pre_hooks)

    def forward(self, x: Tensor) -> Tensor:
        """The value, as it came."""
        return x


def hook_points(model: nn.Module) -> dict[str, HookPoint]:
    """All hook points by name, in the order in which the model declares them."""
    return {name: module for name, module in model.named_modules() if isinstance(module, HookPoint)}


def select(model: nn.Module, names: Names) -> dict[str, HookPoint]:
    """The hook points that ``names`` asks for: one name, several, those for which a predicate holds, or None for all.

    Raises:
        ValueError: a name that is no hook point; the message lists near ones.
    """
    points = hook_points(model)
    if names is None:
        return points
    if callable(names):
        return {name: point for name, point in points.items() if names(name)}
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in points:
            near = difflib.get_close_matches(str(name), points, n=4, cutoff=0.5) or list(points)[:4]
            raise ValueError(f"names must be hook points; there is no {name!r}, but for example {', '.join(near)}")
    return {name: points[name] for name in names}


@contextmanager
def recorded(model: nn.Module, names: Names = None) -> Iterator[dict[str, Tensor]]:
    """Context in which the named hook points write what they see, the last time, into the dictionary that it yields.

    The tensors keep their graph: gradients with respect to an activation are ``torch.autograd.grad(y, seen[name])``.
    Within `edited`, what is seen is the edited value.

    Raises:
        ValueError: an unknown name.
    """
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, point in select(model, names).items():

            def look(module: nn.Module, args: tuple, value: Tensor, name: str = name) -> None:
                seen[name] = value

            stack.callback(point.register_forward_hook(look).remove)
        yield seen


@contextmanager
def edited(model: nn.Module, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Context in which the value at each named hook point is replaced by what its function makes of it.

    Raises:
        ValueError: an unknown name; or, when the model runs, an edit that returns no tensor of the same shape.
    """
    with ExitStack() as stack:
        for name, point in select(model, list(edits)).items():

            def replace(module: nn.Module, args: tuple, value: Tensor, name: str = name) -> Tensor:
                new = edits[name](value)
                if not isinstance(new, Tensor) or new.shape != value.shape:
                    got = f"shape {tuple(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
                    raise ValueError(f"edits[{name!r}] must return a tensor of shape {tuple(value.shape)}, got {got}")
                return new

            stack.callback(point.register_forward_hook(replace).remove)
        yield
