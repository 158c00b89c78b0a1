"""The module that stands where the routed experts of a transformers model stood."""

import torch
from torch import nn

from globe_kernels.errors import RequestError
from globe_kernels.format.checkpoint import Code, GlobeConfig
from globe_kernels.format.names import FAMILIES
from globe_kernels.model.bank import DeviceBank
from globe_kernels.model.calls import Calls
from globe_kernels.model.parallel import called_shape, is_split
from globe_kernels.ops.moe_ffn import FromRank
from globe_kernels.strategies import STRATEGIES
from globe_kernels.strategies.base import LayerSizes, Pool, Routed
from globe_kernels.strategies.budget import layer_sizes
from globe_kernels.strategies.cost import Machine, Policy, machine_for, switch_points


class GlobeMoEFFN(nn.Module):
    """The routed experts of one layer, from GloBE factors.

    Parameters and buffers (E experts, P intermediate size, R rank, C support, D hidden size):
    `{gate,up}_adapter` (E, P, R), `{gate,up}_code_index` (E, C) int32, `{gate,up}_code_value` (E, C)
    float32, `down_proj` (E, D, P), of models with biases also `{gate,up}_bias` (E, P) and `down_bias` (E, D).

    `hold` says by which strategies calls may run. Each strategy makes the tensors that it needs beside the weights;
    they are buffers that `state_dict` leaves out.

    Where several processes share the experts, `num_experts` and `intermediate_dim` are the sizes of a call here.
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
    palettes: dict[str, int]  # {family: U, its distinct atoms}

    def __init__(
        self,
        config: GlobeConfig,
        layer: int,
        activation: str,
        dtype: torch.dtype,
        device=None,
        *,
        has_bias: bool = False,
    ):
        """Make an empty module for layer id `layer` of the model that `config` describes."""
        super().__init__()
        self.num_experts = config.base.num_experts[layer]
        self.hidden_dim = config.base.hidden_size
        self.intermediate_dim = config.base.intermediate_size
        self.layer = layer
        self.phi = config.phi
        self.activation = activation
        self._shared: tuple[DeviceBank, ...] = ()  # a tuple: a module would be registered, and saved, once per layer
        self.strategies: tuple[str, ...] = ()  # by which calls may run
        self._top_k = 0.0  # K
        self._kept: dict[str, bool] = {}  # {name of a buffer that a strategy made: whether its dtype stays}
        self.palettes = dict.fromkeys(FAMILIES, 0)
        self._policy: Policy | None = None
        self._own: slice | None = None  # the experts of this process among those of the codes; None: all
        self._adds_down_bias = True
        self.calls = Calls()  # of this layer alone, until a model has it
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
        if has_bias:
            dense |= biases
        else:
            for name in biases:
                self.register_parameter(name, None)
        for name, shape in dense.items():
            values = torch.empty(shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(values, requires_grad=False))

    def take_share(self, experts: range, rows: int, *, is_first: bool) -> None:
        """Run these experts, and so many rows of each, from now on; `is_first`: add the bias of down."""
        everything = experts == range(self.gate_code_index.shape[0])
        self._own = None if everything else slice(experts.start, experts.stop)
        self.num_experts, self.intermediate_dim, self._adds_down_bias = len(experts), rows, is_first

    def code(self, family: str) -> Code:
        """Return the codes over all atoms of the bank."""
        index, value = getattr(self, f"{family}_code_index"), getattr(self, f"{family}_code_value")
        return Code(index, value) if self._own is None else Code(index[self._own], value[self._own])

    @property
    def device_bank(self) -> DeviceBank:
        """The tensors that the layers on this device share."""
        if not self._shared:
            raise RuntimeError(
                "GlobeMoEFFN is not arranged; call globe_kernels.set_strategy(model, ...), or without a model "
                "hold(device_bank, strategies, top_k)."
            )
        return self._shared[0]

    @property
    def device(self) -> torch.device:
        """The device of calls. accelerate moves offloaded weights there before a call; codes stay there."""
        return self.gate_code_index.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and of composed bases."""
        return self.gate_adapter.dtype

    @property
    def from_rank(self) -> FromRank:
        """The weights that every strategy multiplies with after the basis."""
        weights = FromRank(*(getattr(self, name) for name in FromRank._fields))
        return weights if self._adds_down_bias else weights._replace(down_bias=None)

    def keep(self, name: str, tensor: torch.Tensor, *, keeps_dtype: bool = False) -> None:
        """Hold a tensor that a strategy made. With `keeps_dtype` a cast of the model leaves its dtype alone."""
        self.register_buffer(name, tensor, persistent=False)
        self._kept[name] = keeps_dtype

    def keeps(self, name: str) -> bool:
        """Return whether `keep` was given a tensor of this name."""
        return name in self._kept

    def kept(self, name: str) -> torch.Tensor:
        """Return a tensor that `keep` was given."""
        return getattr(self, name)

    def forget(self) -> None:
        """Drop the tensors that strategies made: no call can run until `hold` is called again."""
        self._shared, self.strategies, self._policy = (), (), None
        for name in self._kept:
            delattr(self, name)
        self._kept = {}

    @torch.no_grad()
    def hold(self, device_bank: DeviceBank, strategies: tuple[str, ...], top_k: float) -> None:
        """Make the tensors that `strategies` need, on the device of the module and in its dtype, and drop all others.

        `top_k`: experts per token, on which the times of the strategies depend.
        """
        self.forget()
        self._shared, self.strategies, self._top_k = (device_bank,), strategies, top_k
        self._refuse_misfits()
        self.palettes = {family: self.code(family).palette for family in FAMILIES}
        for name in strategies:
            STRATEGIES[name].hold(self)
        self._choose()

    def _refuse_misfits(self) -> None:
        """Raise RequestError when the weights do not fit each other: a kernel would read outside some of them."""
        config = self.device_bank.config
        num_experts, inner, width, rank = self.num_experts, self.intermediate_dim, self.hidden_dim, config.rank
        expected: dict[str, tuple[int, ...]] = {"down_proj": (num_experts, width, inner)}
        for family in FAMILIES:
            expected[f"{family}_adapter"] = (num_experts, inner, rank)
            expected[f"{family}_bias"] = (num_experts, inner)
        expected["down_bias"] = (num_experts, width)
        found = {name: called_shape(self, name) for name in expected if getattr(self, name) is not None}
        for family in FAMILIES:
            for part, tensor in vars(self.code(family)).items():
                name = f"{family}_code_{part}"
                found[name], expected[name] = tuple(tensor.shape), (num_experts, config.support)
        for name, shape in found.items():
            if shape != expected[name]:
                raise RequestError(
                    f"{name} of layer {self.layer} is {shape} on this process and the other weights of the layer "
                    f"expect {expected[name]}; put back a tensor of that shape, or load the model again."
                )

    def _choose(self) -> None:
        strategies = [STRATEGIES[name] for name in self.strategies]
        self._policy = Policy(switch_points(strategies, self.sizes(), self.machine, self.pool))

    def strategy(self, tokens: int) -> str:
        """Return the name of the strategy of a call with `tokens` tokens."""
        assert self._policy is not None, "hold chooses"
        return self._policy.strategy(tokens)

    def composes_ahead(self, tokens: int) -> bool:
        """Whether a call with `tokens` tokens takes its bases from the buffers of the device."""
        return STRATEGIES[self.strategy(tokens)].takes_buffers

    @property
    def machine(self) -> Machine:
        """The machine that the times of the strategies are predicted for."""
        return machine_for(self.device)

    @property
    def pool(self) -> Pool | None:
        """The cache, as the cost model takes it."""
        cache = self.device_bank.cache
        return None if cache is None else Pool(cache.owner.numel(), cache.slot_of.numel())

    @property
    def basis_shape(self) -> tuple[int, int, int]:
        """(E, 2R, D)"""
        return self.num_experts, 2 * self.gate_adapter.shape[2], self.hidden_dim

    @property
    def share_of_experts(self) -> float:
        """The part of the experts of the layer that this process has; it gets as large a part of the routed rows."""
        return self.num_experts / self.gate_code_index.shape[0]

    def sizes(self) -> LayerSizes:
        """Return the sizes that the times of the strategies depend on."""
        item_size, top_k = self.gate_adapter.element_size(), self._top_k * self.share_of_experts
        return layer_sizes(self.device_bank.config, self.layer, top_k, item_size, {self.layer: self.palettes})

    def _apply(self, fn, recurse=True):
        # .to(dtype), .half() and the like cast every floating buffer; codes are float32 by contract
        names = [f"{family}_code_value" for family in FAMILIES]
        names += [name for name, keeps_dtype in self._kept.items() if keeps_dtype]
        values = {name: getattr(self, name) for name in names}
        super()._apply(fn, recurse)
        for name, value in values.items():
            moved = getattr(self, name)
            setattr(self, name, moved.to(value.dtype) if value.is_meta or moved.is_meta else value.to(moved.device))
        if self.strategies:
            self._choose()  # for the device that the module is on now
        return self

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute (T, D) from hidden_states (T, D), top_k_index (T, K), top_k_weights (T, K)."""
        self.calls.arrive(self)
        bank = self.device_bank
        if torch.is_grad_enabled():
            self._check_frozen()
        if any(map(is_split, (hidden_states, *self._parameters.values()))):
            raise RequestError(
                f"Layer {self.layer} is called with a DTensor, which no kernel can read; load the export with "
                "from_pretrained(..., distributed_config=...), which splits GloBE experts, and call the whole model."
            )
        strategy = STRATEGIES[self.strategy(hidden_states.shape[0])]
        if not strategy.holds_bases:
            self._refuse_atoms(bank, hidden_states.device)
        return strategy.run(self, Routed(hidden_states, top_k_index, top_k_weights))

    def _refuse_atoms(self, bank: DeviceBank, device: torch.device) -> None:
        """Raise RequestError when a kernel would read atoms of another device or size, whatever is at the address."""
        shape = None if bank.holds_copies else bank.config.bank_shape()
        for atoms in (bank.gate, bank.up):
            if atoms.device != device:
                raise RequestError(
                    f"Layer {self.layer} runs on {device} and its atoms are on {atoms.device}; after layers were moved "
                    "one by one call globe_kernels.set_strategy(model, ...) again, and for nn.DataParallel use the "
                    "strategy composed."
                )
            if is_split(atoms) or shape not in (None, atoms.shape):
                raise RequestError(
                    f"The bank is {type(atoms).__name__} {tuple(atoms.shape)} and the codes of layer {self.layer} are "
                    f"over {shape}; put back atoms of that shape, and call the whole model where FSDP has split it."
                )

    def _check_frozen(self) -> None:
        """Raise RequestError when a factor requires a gradient: it would get none, or from some strategies alone."""
        atoms = {f"atoms of {family}": self.device_bank.atoms(family) for family in FAMILIES}
        factors = self.from_rank._asdict() | atoms
        trained = [name for name, tensor in factors.items() if tensor is not None and tensor.requires_grad]
        if trained:
            raise RequestError(
                f"Layer {self.layer} has factors that require a gradient ({', '.join(trained)}) and GloBE trains the "
                "layers around frozen experts alone; call requires_grad_(False) on them, give PEFT the names of other "
                'layers in place of "all-linear", or train the dense model and fit it again.'
            )

    def extra_repr(self) -> str:
        sizes = f"experts={self.num_experts}, hidden={self.hidden_dim}, intermediate={self.intermediate_dim}"
        return f"{sizes}, rank={self.gate_adapter.shape[2]}, phi={self.phi}"
