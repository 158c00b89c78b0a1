"""The module that stands where the routed experts of a transformers model stood."""

import torch
from torch import nn

from globe_kernels.errors import RequestError
from globe_kernels.format.architectures import FAMILIES, architecture_of
from globe_kernels.format.checkpoint import Code, GlobeConfig
from globe_kernels.functional import moe_ffn, moe_ffn_bank_first, moe_ffn_cached
from globe_kernels.model.bank import Place
from globe_kernels.ops.compose_layer import LayerCode, compose_bases, compose_bases_into, layer_code
from globe_kernels.ops.compose_slots import Mixtures
from globe_kernels.ops.moe_ffn import ExpertWeights, FromRank
from globe_kernels.ops.moe_ffn_bank_first import BankFirstWeights
from globe_kernels.ops.moe_ffn_cached import CachedWeights
from globe_kernels.strategies.budget import layer_sizes
from globe_kernels.strategies.cost import LayerSizes, Machine, Policy, Pool, machine_for, switch_points

_BY_PALETTE = frozenset(("bank_first", "scratch"))  # paths that take the codes of a layer as a matrix


class GlobeMoEFFN(nn.Module):
    """The routed experts of one layer, from GloBE factors.

    Parameters and buffers (E experts, P intermediate size, R rank, C support, D hidden size):
    `{gate,up}_adapter` (E, P, R), `{gate,up}_code_index` (E, C) int32, `{gate,up}_code_value` (E, C)
    float32, `down_proj` (E, D, P), of architectures with biases also `{gate,up}_bias` (E, P) and `down_bias` (E, D).

    `run_from` says by which paths (globe_kernels.strategies.cost) calls may run, and makes what these hold beside that, which
    `state_dict` leaves out: `basis` (E, 2R, D), gate rows first, and of each family a LayerCode and, where a device
    holds copies of atoms, `local_index` (E, C) int32 among them.
    """

    gate_adapter: nn.Parameter
    up_adapter: nn.Parameter
    down_proj: nn.Parameter
    gate_bias: nn.Parameter | None
    up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None
    gate_code_index: torch.Tensor
    gate_code_value: torch.Tensor
    up_code_index: torch.Tensor
    up_code_value: torch.Tensor
    gate_local_index: torch.Tensor | None
    up_local_index: torch.Tensor | None
    basis: torch.Tensor | None
    palettes: dict[str, int]  # U by family, distinct atoms

    def __init__(self, config: GlobeConfig, layer: int, activation: str, dtype: torch.dtype, device=None):
        """An empty module for layer id `layer` of the model that `config` describes."""
        super().__init__()
        self.num_experts = config.base.num_experts[layer]
        self.hidden_dim = config.base.hidden_size
        self.intermediate_dim = config.base.intermediate_size
        self.layer = layer
        self.phi = config.phi
        self.activation = activation
        self._shared: tuple[Place, ...] = ()  # a tuple: a module would be registered, and saved, once per layer
        self.paths: tuple[str, ...] = ()  # by which calls may run
        self._choices = 0  # K
        self.palettes = dict.fromkeys(FAMILIES, 0)
        self._policy: Policy | None = None
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
        for family in FAMILIES:
            for part in LayerCode._fields:
                self.register_buffer(f"{family}_{part}", None, persistent=False)
            self.register_buffer(f"{family}_local_index", None, persistent=False)

    def code(self, family: str) -> Code:
        return Code(getattr(self, f"{family}_code_index"), getattr(self, f"{family}_code_value"))

    def layer_code(self, family: str) -> LayerCode:
        """What `bank_first` and `scratch` hold of the codes."""
        return LayerCode(*(getattr(self, f"{family}_{part}") for part in LayerCode._fields))

    @property
    def place(self) -> Place:
        """What the layers on this device share."""
        if not self._shared:
            raise RuntimeError(
                "GlobeMoEFFN is not arranged; call globe_kernels.set_strategy(model, ...), or without a model "
                "run_from(place, paths, choices)."
            )
        return self._shared[0]

    @property
    def device(self) -> torch.device:
        """Where calls run: of weights that are offloaded, and come when they are called, not where these are."""
        return self.gate_code_index.device

    def forget(self) -> None:
        """Run from nothing, until `run_from` is called again."""
        self._shared, self.paths, self._policy = (), (), None
        parts = (*LayerCode._fields, "local_index")
        for name in ("basis", *(f"{family}_{part}" for family in FAMILIES for part in parts)):
            setattr(self, name, None)

    @torch.no_grad()
    def run_from(self, place: Place, paths: tuple[str, ...], choices: int) -> None:
        """Make what `paths` need from the atoms, on the device of the module and in its dtype, and drop the rest.

        `choices`: experts per token, on which the times of the paths depend.
        """
        self._shared, self.paths, self._choices = (place,), paths, choices
        own = {family: self._code_for(place, family) for family in FAMILIES}
        codes = {family: layer_code(code.index, code.value) for family, code in own.items()}
        self.basis = self._compose(codes) if "composed" in paths else None
        for family, code in codes.items():
            for part, tensor in code._asdict().items():
                setattr(self, f"{family}_{part}", tensor if _BY_PALETTE & set(paths) else None)
            local = "cached" in paths and place.holds_copies
            setattr(self, f"{family}_local_index", own[family].index if local else None)
        self.palettes = {family: code.palette.numel() for family, code in codes.items()}
        self._choose_paths()

    def _choose_paths(self) -> None:
        self._policy = Policy(switch_points(self.paths, self.sizes(), self.machine, self.pool))

    def path(self, tokens: int) -> str:
        """That of a call with `tokens` tokens."""
        assert self._policy is not None, "run_from chooses"
        return self._policy.path(tokens)

    @property
    def machine(self) -> Machine:
        """What the times of the paths are predicted for."""
        return machine_for(self.device)

    @property
    def pool(self) -> Pool | None:
        """The cache, as the cost model takes it."""
        cache = self.place.cache
        return None if cache is None else Pool(cache.owner.numel(), cache.slot_of.numel())

    def _code_for(self, place: Place, family: str) -> Code:
        """Over the atoms of `place`."""
        code = self.code(family)
        return Code(place.places_of(family, code.index), code.value)

    def _compose(self, codes: dict[str, LayerCode]) -> torch.Tensor:
        """(E, 2R, D)"""
        place, dtype = self.place, self.gate_adapter.dtype
        return compose_bases(*codes["gate"], *codes["up"], place.gate, place.up, self.phi, dtype)

    @property
    def basis_shape(self) -> tuple[int, int, int]:
        """(E, 2R, D)"""
        return self.num_experts, 2 * self.gate_adapter.shape[2], self.hidden_dim

    @torch.no_grad()
    def compose_into(self, out: torch.Tensor) -> None:
        """The bases of the layer into `out` (E, 2R, D), on the stream of the caller: what `scratch` runs from."""
        codes, place = (self.layer_code("gate"), self.layer_code("up")), self.place
        compose_bases_into(out, codes, (place.gate, place.up), self.phi)

    @property
    def _from_rank(self) -> FromRank:
        """What every path multiplies with after the basis."""
        return FromRank(*(getattr(self, name) for name in FromRank._fields))

    def cached_weights(self) -> CachedWeights:
        """What the path `cached` takes beside the pool."""
        place, local = self.place, (self.gate_local_index, self.up_local_index)
        gate, up = local if place.holds_copies else (self.gate_code_index, self.up_code_index)
        assert gate is not None and up is not None
        mixtures = Mixtures(place.gate, place.up, gate, self.gate_code_value, up, self.up_code_value)
        return CachedWeights(mixtures, self._from_rank)

    def sizes(self) -> LayerSizes:
        """What the times of the paths depend on."""
        item_size = self.gate_adapter.element_size()
        return layer_sizes(self.place.config, self.layer, self._choices, item_size, {self.layer: self.palettes})

    def _apply(self, fn, recurse=True):
        # .to(dtype), .half() and the like cast every floating buffer; codes are float32 by contract
        names = [f"{family}_{part}" for family in FAMILIES for part in ("code_value", "value", "scale")]
        values = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        super()._apply(fn, recurse)
        for name, value in values.items():
            moved = getattr(self, name)
            setattr(self, name, moved.float() if value.is_meta or moved.is_meta else value.to(moved.device))
        if self.paths:
            self._choose_paths()  # for the device it is on now
        return self

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states (T, D), top_k_index (T, K), top_k_weights (T, K) -> (T, D)"""
        place, routed = self.place, (hidden_states, top_k_index, top_k_weights)
        path = self.path(hidden_states.shape[0])
        if path != "composed" and place.gate.device != hidden_states.device:
            # a kernel would read whatever the address means on its device
            raise RequestError(
                f"Layer {self.layer} runs on {hidden_states.device} and its atoms are on {place.gate.device}; after "
                "layers were moved one by one, call globe_kernels.set_strategy(model, ...) again."
            )
        if path == "bank_first":
            gate, up = self.layer_code("gate"), self.layer_code("up")
            weights = BankFirstWeights(place.gate, place.up, *gate, *up, self._from_rank)
            return moe_ffn_bank_first(*routed, weights, self.activation)
        if path == "cached":
            cache = place.cache
            assert cache is not None
            first = cache.first_expert(self.layer)
            return moe_ffn_cached(*routed, self.cached_weights(), cache.state, first, self.phi, self.activation)

        def experts(basis: torch.Tensor) -> torch.Tensor:
            return moe_ffn(*routed, ExpertWeights(basis, self._from_rank), self.activation)

        if path == "composed":
            assert self.basis is not None
            return experts(self.basis)
        assert place.scratch is not None
        if place.scratch.can_run(hidden_states):
            return place.scratch.run(self, hidden_states, experts)
        return experts(self._compose({family: self.layer_code(family) for family in FAMILIES}))

    def extra_repr(self) -> str:
        num_experts, inner, rank = self.gate_adapter.shape
        return f"experts={num_experts}, hidden={self.hidden_dim}, intermediate={inner}, rank={rank}, phi={self.phi}"
