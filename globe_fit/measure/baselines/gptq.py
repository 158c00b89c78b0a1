"""Round every gate and up matrix so that its outputs err least: GPTQ (Frantar, Ashkboos, Hoefler and Alistarh, 2022).

    H = C + 0.01 mean(diag C) I        C (D, D) the moment of the inputs        U^T U = H^-1, U upper triangular

Columns are rounded one after the other. The error of column c, (w_c - q_c) / U_cc, times row c of U, is taken off the
columns after c, so that they make up for it. The grid of a group is made when the group begins.

C is the moment of the inputs of a layer (globe_fit.calibration.moments), which all experts of the layer share. Or each
expert i has its own, of the T_i tokens that are routed to it, shrunk towards the moment of the layer, because a finite
text routes few tokens to some experts:

    C_i = (sum_t x_t x_t^T + D C) / (T_i + D)
"""

from collections.abc import Sequence
from typing import Any

import torch

from globe_fit.measure.baselines.passes import watch_experts
from globe_fit.measure.baselines.rounding import CodeFormat
from globe_kernels.model.discovery import DenseExperts, routed_experts

_DAMPING = 0.01


def gptq(
    weights: torch.Tensor, moment: torch.Tensor, codes: CodeFormat, *, by_activation: bool = False
) -> torch.Tensor:
    """Return the values (E, P, D) float32 of codes for weights (E, P, D) whose inputs have the moment C.

    moment         (D, D), or (E, D, D) with a moment per expert
    by_activation  round the columns of large inputs first; groups are then of columns in this order
    """
    moments = (moment if moment.ndim == 3 else moment[None]).to(weights.device)
    of_inputs = moments.diagonal(dim1=1, dim2=2)
    order = torch.arange(of_inputs.shape[1], device=weights.device).expand_as(of_inputs)
    if by_activation:
        order = of_inputs.argsort(dim=1, descending=True, stable=True)
    moments = moments.take_along_dim(order[:, :, None], dim=1).take_along_dim(order[:, None], dim=2)
    upper = _upper_root_of_inverse(moments).float()
    values = weights.float().reshape(len(moments), -1, weights.shape[-1])
    values = values.take_along_dim(order[:, None], dim=2)
    start = 0
    for group in codes.split(values):  # views: what is written to a group changes values
        stop = start + group.shape[2]
        scale, zero = codes.grid(group)
        errors = torch.empty_like(group)
        for place in range(stop - start):
            column = group[:, :, place : place + 1]
            value = codes.nearest(column, scale, zero)
            row = upper[:, start + place, None, start + place : stop]
            errors[:, :, place : place + 1] = error = (column - value) / row[:, :, :1]
            group[:, :, place:] -= error * row
            group[:, :, place : place + 1] = value
        values[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
        start = stop
    return torch.empty_like(values).scatter_(2, order[:, None].expand_as(values), values).view_as(weights)


def _upper_root_of_inverse(moments: torch.Tensor) -> torch.Tensor:
    """Return U (B, D, D) float64 for moments C (B, D, D)."""
    hessian = moments.double()
    level = hessian.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    hessian.diagonal(dim1=1, dim2=2).add_(_DAMPING * torch.where(level > 0, level, 1.0))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def routed_moments(model: Any, batches: Sequence[torch.Tensor], device: str) -> dict[int, torch.Tensor]:
    """Run `model` over all `batches` of windows; return {layer id: C_i (E, D, D)}, float32 on the CPU."""
    sums, routed, tokens = {}, {}, sum(batch.numel() for batch in batches)
    for layer, dense in routed_experts(model).items():
        count, _, width = dense.sizes
        sums[layer] = torch.zeros(count + 1, width, width, device=device)  # the last is of all tokens
        routed[layer] = torch.zeros(count, device=device)

    def add(dense: DenseExperts, hidden: torch.Tensor, index: torch.Tensor, _: torch.Tensor) -> None:
        inputs = hidden.float()
        sums[dense.layer][-1].addmm_(inputs.mT, inputs)
        for expert in range(len(routed[dense.layer])):
            own = inputs[(index == expert).any(1)]
            sums[dense.layer][expert].addmm_(own.mT, own)
            routed[dense.layer][expert] += len(own)

    watch_experts(model, batches, device, add)
    return {
        layer: ((of_layer[:-1] + width * of_layer[-1] / tokens) / (routed[layer][:, None, None] + width)).cpu()
        for layer, of_layer in sums.items()
        for width in [of_layer.shape[-1]]
    }
