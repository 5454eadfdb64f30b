"""What every test shares: shapes checked at run time, one thread, and the GPU mark."""

import signal

import pytest
import torch
from jaxtyping import install_import_hook

import paperlab.typecheck  # noqa: F401  (the hook finds it as an attribute of the package)

install_import_hook("paperlab", "paperlab.typecheck.check")  # before any test imports the library
torch.set_num_threads(1)
# A shell's background job ignores Ctrl-C, and so would the programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU say why they do not run."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
