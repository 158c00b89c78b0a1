"""Adam (Kingma and Ba, 2015) with moments in bf16, which the bank of a large model leaves no room for in fp32.

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   x <- x - rate (m / c1) / sqrt(v / c2)

c1, c2 make up for the zeros that m and v begin with. Nothing is added to the square root, so that a step does not
depend on the scale of g: the gradient of an entry falls with the number of entries. Each moment moves by more than its
rounding at a step: 1 - b is larger than the 0.4 % of bf16.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

_CHUNK = {"cpu": 2**16, "cuda": 2**24}  # entries of the temporaries in fp32: within the cache, few launches


@dataclass
class Moments:
    """The moments of one parameter, in its shape, and what is left of the zeros that they begin with: b1^t, b2^t."""

    first: torch.Tensor
    second: torch.Tensor
    left: tuple[float, float] = (1.0, 1.0)

    @classmethod
    def of(cls, parameter: torch.Tensor) -> "Moments":
        """Return the moments before the first step."""
        first, second = (torch.zeros_like(parameter, dtype=torch.bfloat16) for _ in range(2))
        return cls(first, second)

    @torch.no_grad()
    def step(self, parameter: torch.Tensor, gradient: torch.Tensor, rate: float, betas: tuple[float, float]) -> None:
        """Take a step of `parameter` fp32 against `gradient`; `rate` is the change of an entry whose gradient stays."""
        self.left = (self.left[0] * betas[0], self.left[1] * betas[1])
        whole = (1 - self.left[0], 1 - self.left[1])
        for x, g, first, second in zip(*map(_chunks, (parameter, gradient, self.first, self.second)), strict=True):
            m = first.float().lerp_(g, 1 - betas[0])
            v = second.float().lerp_(g.square(), 1 - betas[1])
            first.copy_(m)
            second.copy_(v)
            # an entry that never had a gradient stays
            moved = m.div_(v.div(whole[1]).sqrt_()).masked_fill_(v == 0, 0.0)
            x.sub_(moved, alpha=rate / whole[0])

    @torch.no_grad()
    def rescale(self, scale: torch.Tensor | float) -> None:
        """Follow a parameter that was multiplied by `scale`: its gradient is divided by it."""
        self.first.div_(scale)
        self.second.div_(scale**2)


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    return iter(tensor.detach().view(-1).split(_CHUNK[tensor.device.type]))
