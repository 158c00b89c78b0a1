"""The module that stands where the routed experts of a transformers model stood."""

import torch
from torch import nn

from globe_kernels.bank import GlobeBank
from globe_kernels.checkpoint import Code, GlobeConfig
from globe_kernels.families import FAMILIES, architecture_of
from globe_kernels.functional import moe_ffn
from globe_kernels.ops.compose_layer import compose_layer, layer_code
from globe_kernels.ops.moe_ffn import ExpertWeights


class GlobeMoEFFN(nn.Module):
    """The routed experts of one layer, from GloBE factors.

    Parameters and buffers (E experts, P intermediate size, R rank, C support, D hidden size):
    `{gate,up}_adapter` (E, P, R), `{gate,up}_code_index` (E, C) int32, `{gate,up}_code_value` (E, C)
    float32, `down_proj` (E, D, P), of architectures with biases also `{gate,up}_bias` (E, P) and `down_bias` (E, D);
    and, once `compose` ran, `basis` (E, 2R, D), gate rows first, which `state_dict` leaves out: it is made from the
    codes and the bank.
    """

    gate_adapter: nn.Parameter
    up_adapter: nn.Parameter
    down_proj: nn.Parameter
    gate_bias: nn.Parameter | None
    up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None
    basis: torch.Tensor | None

    def __init__(self, config: GlobeConfig, layer: int, activation: str, dtype: torch.dtype, device=None):
        """An empty module for layer id `layer` of the model that `config` describes."""
        super().__init__()
        self.num_experts = config.base.num_experts[layer]
        self.hidden_dim = config.base.hidden_size
        self.intermediate_dim = config.base.intermediate_size
        self.layer = layer
        self.phi = config.phi
        self.activation = activation
        for name, (shape, stored) in config.layer_shapes(layer).items():
            if name.endswith("_adapter"):
                adapter = torch.empty(shape, dtype=dtype, device=device)
                self.register_parameter(name, nn.Parameter(adapter, requires_grad=False))
            else:
                # buffers keep their dtype when a model is loaded or cast: codes stay int32 and float32
                self.register_buffer(name, torch.empty(shape, dtype=stored, device=device))
        dense = {"down_proj": (self.num_experts, self.hidden_dim, self.intermediate_dim)}
        biases = {f"{family}_bias": (self.num_experts, self.intermediate_dim) for family in FAMILIES}
        biases["down_bias"] = (self.num_experts, self.hidden_dim)
        if architecture_of(config.base.model_type).has_bias:
            dense |= biases
        else:
            for name in biases:
                self.register_parameter(name, None)
        for name, shape in dense.items():
            values = torch.empty(shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(values, requires_grad=False))
        self.register_buffer("basis", None, persistent=False)

    def code(self, family: str) -> Code:
        return Code(getattr(self, f"{family}_code_index"), getattr(self, f"{family}_code_value"))

    @torch.no_grad()
    def compose(self, bank: GlobeBank) -> None:
        """Compose the basis of every expert from the bank, in the dtype and on the device of the adapters."""
        adapter, composed = self.gate_adapter, []
        for family in FAMILIES:
            atoms, code = bank.atoms(family), self.code(family)
            dense = layer_code(code.index.to(atoms.device), code.value.to(atoms.device))
            basis = compose_layer(*dense, atoms, self.phi, adapter.dtype)
            composed.append(basis.to(adapter.device))
        self.basis = torch.cat(composed, dim=1)

    def _apply(self, fn, recurse=True):
        # .to(dtype), .half() and the like cast every floating buffer; codes are float32 by contract
        values = {f"{family}_code_value": self.code(family).value for family in FAMILIES}
        super()._apply(fn, recurse)
        for name, value in values.items():
            moved = getattr(self, name)
            setattr(self, name, moved.float() if value.is_meta or moved.is_meta else value.to(moved.device))
        return self

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states (T, D), top_k_index (T, K), top_k_weights (T, K) -> (T, D)"""
        if self.basis is None:
            raise RuntimeError("GlobeMoEFFN has no composed bases yet; call compose(bank) after loading its weights.")
        weights = ExpertWeights(
            self.basis,
            self.gate_adapter,
            self.up_adapter,
            self.down_proj,
            self.gate_bias,
            self.up_bias,
            self.down_bias,
        )
        return moe_ffn(hidden_states, top_k_index, top_k_weights, weights, self.activation)

    def extra_repr(self) -> str:
        num_experts, inner, rank = self.gate_adapter.shape
        return f"experts={num_experts}, hidden={self.hidden_dim}, intermediate={inner}, rank={rank}, phi={self.phi}"
