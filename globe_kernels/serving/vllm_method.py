# pyright: reportMissingImports=false
"""The routed experts of one layer of a vLLM model."""

import logging
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from globe_kernels.errors import RequestError
from globe_kernels.format.checkpoint import BaseModel
from globe_kernels.serving.experts import Experts, Share

_LOG = logging.getLogger("vllm.globe")  # which vLLM prints
_PLAIN = {MoEActivation.GELU: "gelu", MoEActivation.GELU_TANH: "gelu_pytorch_tanh"}  # as globe_kernels names them
# {activation: its alpha, limit and beta where the layer states none}. The two last differ in the layout of weights.
_SIGMOID: dict[MoEActivation, tuple[float, float | None, float]] = {
    MoEActivation.SILU: (1.0, None, 0.0),
    MoEActivation.SWIGLUOAI: (1.702, 7.0, 1.0),
    MoEActivation.SWIGLUOAI_UNINTERLEAVE: (1.0, None, 0.0),
}


def activation_spec(given: MoEActivation, layer: Any) -> str | None:
    """Return the activation of a layer as globe_kernels names it; None where globe_kernels has none like it.

    With settings vLLM computes g sigmoid(alpha g) (u + beta) from gate g and up u, which a limit bounds before:
    min(g, limit) and clamp(u, -limit, limit).
    """
    stated = layer.swiglu_alpha, layer.swiglu_limit, layer.swiglu_beta
    if given in _PLAIN and stated == (None, None, None):
        return _PLAIN[given]
    if given not in _SIGMOID:
        return None
    alpha, limit, beta = (usual if own is None else own for own, usual in zip(stated, _SIGMOID[given], strict=True))
    if (alpha, beta) == (1, 0):
        return "silu" if limit is None else f"clamped_silu(limit={limit})"
    return f"clamped_swiglu(alpha={alpha}, limit={limit})" if limit is not None and beta == 1 else None


class GlobeMoEMethod(FusedMoEMethodBase):
    """Runs the experts of a layer from GloBE factors; `layer.globe` is their GlobeMoEFFN."""

    def __init__(self, moe: FusedMoEConfig, base: BaseModel, number: int, experts: Experts):
        super().__init__(moe)
        self._base, self._number, self._experts = base, number, experts

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Check the sizes and note the share of this process; the factors are read when all layers are known.

        Raises RequestError for a model of other sizes and for settings that GloBE experts cannot follow.
        """
        moe, base = self.moe, self._base
        self._refuse_other_sizes(hidden_size)
        if layer.apply_router_weight_on_input:
            raise RequestError(
                f"Layer {self._number} weights the inputs of its experts and GloBE weights their outputs; serve the "
                "dense export of this model (globe export --dense)."
            )
        rows = base.intermediate_size // moe.tp_size
        self._experts.expect(
            self._number,
            Share(
                experts=_local_experts(layer, num_experts),
                rows=range(moe.tp_rank * rows, (moe.tp_rank + 1) * rows),
                top_k=moe.experts_per_token * num_experts / moe.num_experts,
                activation=self._activation(layer),
                dtype=params_dtype,
                adds_down_bias=moe.tp_rank == 0,
            ),
        )

    def _refuse_other_sizes(self, hidden_size: int) -> None:
        moe, base = self.moe, self._base
        found = {
            "experts": (moe.num_experts, base.num_experts[self._number]),
            "hidden size": (hidden_size, base.hidden_size),
            "intermediate size": (moe.intermediate_size, base.intermediate_size),
            "biases": (moe.has_bias, base.has_bias),
        }
        for what, (here, expected) in found.items():
            if here != expected:
                raise RequestError(
                    f"Layer {self._number} has {what} {here} in vLLM and {expected} in the export; serve the directory "
                    "as `globe export` wrote it, and leave out options that pad or add experts."
                )

    def _activation(self, layer: Any) -> str:
        if (spec := activation_spec(self.moe.activation, layer)) is None:
            raise RequestError(
                f"Layer {self._number} has the activation {self.moe.activation.value} (alpha {layer.swiglu_alpha}, "
                f"limit {layer.swiglu_limit}, beta {layer.swiglu_beta}), which GloBE does not run in vLLM; serve the "
                "dense export of this model (globe export --dense)."
            )
        return spec

    def process_weights_after_loading(self, layer: Any) -> None:
        """Read the factors; with the last layer of the process also the bank, and arrange all layers."""
        layer.globe, bank = self._experts.load(self._number, torch.device(self.moe.device))
        if bank is not None:
            layer.globe_bank = bank  # registered once, for those who count parameters
            _LOG.info("GloBE runs the experts of this process by %s.", " and ".join(bank.arrangement.strategies))

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """Describe no quantised weights: vLLM's own kernels never run these experts."""
        return None

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute (T, D) from x (T, D), topk_weights and topk_ids (T, K): this process's part of the sum."""
        if layer.expert_map is not None:
            # -1: on another process; vLLM gives -1 for the rows that fill up a batch
            topk_ids = torch.where(topk_ids < 0, -1, layer.expert_map[topk_ids.long()])
        return layer.globe(x, topk_ids, topk_weights)


def _local_experts(layer: Any, count: int) -> tuple[int, ...]:
    """Return the ids of the experts of this process, in the order of its local ids."""
    if layer.expert_map is None:
        return tuple(range(count))
    places = layer.expert_map.tolist()
    return tuple(sorted((expert for expert, place in enumerate(places) if place >= 0), key=places.__getitem__))
