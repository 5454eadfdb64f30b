"""Random directions."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def unit_vectors(*shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Float[Tensor, "..."]:
    """Random directions, uniform on the unit sphere of the last axis."""
    x = torch.randn(*shape, generator=generator, device=generator.device, dtype=dtype)
    return F.normalize(x, dim=-1)
