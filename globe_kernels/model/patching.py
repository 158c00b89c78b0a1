"""Put GloBE experts into a live transformers model, and take them out again: plan, check, then touch."""

import importlib.util
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format.checkpoint import GlobeCheckpoint, GlobeConfig
from globe_kernels.format.directories import holds_checkpoint
from globe_kernels.format.hub import local_directory
from globe_kernels.format.layout import GATE_UP
from globe_kernels.format.names import BANK_NAME, CONFIG_NAME, FAMILIES
from globe_kernels.model.arrange import arrange, by_device, plan_arrangement
from globe_kernels.model.bank import GlobeBank
from globe_kernels.model.discovery import DenseExperts, top_k_of
from globe_kernels.model.experts import GlobeMoEFFN
from globe_kernels.model.owners import model_in, refuse_keepers, refuse_left_over, refuse_unfit
from globe_kernels.model.parallel import here
from globe_kernels.model.targets import (
    globe_experts,
    globe_modules,
    install_bank,
    is_patched,
    plan_replacement,
    remove_bank,
)
from globe_kernels.ops.compose_basis import compose_basis_ref
from globe_kernels.strategies import DENSE
from globe_kernels.strategies.budget import workspace
from globe_kernels.table import Table, bytes_table
from globe_kernels.units import format_bytes, parse_bytes

PEAK_TOKENS = 4096
_DENSE_NAME = "_globe_dense_experts"


@dataclass(frozen=True, repr=False)
class PatchReport:
    """The outcome of `patch`.

    `replaced` and `skipped` are names of modules, `strategies` the names of the strategies by which calls may run.
    Bytes are those of the experts of the replaced layers (gate, up, down and biases). Before: the dense experts. After:
    the tensors on the devices of the model, bank, bases and cache included. Peak: these and the predicted temporaries
    of calls with up to PEAK_TOKENS tokens; before: of the dense experts. On disk: the checkpoint, which has no down.
    Rest: all other tensors of the model, so the whole model held bytes_before + bytes_rest and holds bytes_after +
    bytes_rest. Prints as a table, and shows as HTML in a notebook.
    """

    replaced: tuple[str, ...]
    skipped: tuple[str, ...]
    strategies: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    bytes_peak: int
    bytes_on_disk: int
    bytes_peak_before: int
    bytes_rest: int

    def _table(self) -> Table:
        rest, resident, peak = self.bytes_rest, "in memory", f"at the peak, T = {PEAK_TOKENS}, predicted"
        sizes = {
            f"experts {resident}": (self.bytes_before, self.bytes_after),
            f"experts {peak}": (self.bytes_peak_before, self.bytes_peak),
            f"whole model {resident}": (self.bytes_before + rest, self.bytes_after + rest),
            f"whole model {peak}": (self.bytes_peak_before + rest, self.bytes_peak + rest),
        }
        title = (
            f"GloBE experts in {len(self.replaced)} layers, which run by {' or '.join(self.strategies)}; the "
            f"checkpoint takes {format_bytes(self.bytes_on_disk)} on disk"
        )
        if self.skipped:
            title += f"; {len(self.skipped)} modules of experts stay as they are"
        return bytes_table(title, sizes)

    def __str__(self) -> str:
        return str(self._table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()

    @property
    def paths(self) -> tuple[str, ...]:
        """The earlier name of `strategies`."""
        return self.strategies


def patch(
    model: nn.Module,
    path: str | Path | None = None,
    *,
    strategy: str = "auto",
    memory_budget: int | str | None = None,
    cache_bytes: int | str | None = None,
    keep_dense: bool = False,
    verify: bool = True,
) -> PatchReport:
    """Replace the routed experts of `model`, in place, by the GloBE checkpoint in `path`, a directory or a Hub id.

    `model` is a transformers model, or a module that holds one: of torch.compile, of PEFT, or your own. Without `path`,
    take the checkpoint in the directory or the repository that the model was loaded from. `strategy` is a name of
    globe_kernels.strategies, or "auto": at every number of tokens the strategy that is predicted to be the fastest, of
    all strategies whose tensors fit into `memory_budget` (bytes, or "20GB"; of all experts, down included).
    `cache_bytes` is the size of the pool of composed bases. `keep_dense` keeps the dense experts for `unpatch`.
    `verify`: compare the sha256 of the checkpoint's files, at 1 to 2 GB/s; GLOBE_VERIFY=0 turns this off everywhere.

    Everything is read, checked and built before the model is touched: a failed call leaves the model as it was, and for
    a moment dense and GloBE experts are both in memory. Where both do not fit, export the checkpoint and load it with
    from_pretrained. Waits for the calls of other threads. Raises GlobeError.
    """
    bounds = tuple(None if size is None else parse_bytes(size) for size in (memory_budget, cache_bytes))
    around, model = model, model_in(model)
    refuse_keepers(around, model)
    if is_patched(model):
        raise RequestError("This model already runs on GloBE experts; call globe_kernels.unpatch(model) first.")
    checkpoint = GlobeCheckpoint(_checkpoint_path(model) if path is None else path, verify=verify)
    targets = plan_replacement(model, checkpoint.config)
    for target in targets:
        refuse_unfit(target.name, target.module)
        _check_shapes(target, checkpoint.config)
    refuse_left_over(model)
    _refuse_other_weights(targets[0], checkpoint)
    bank, modules = _build(targets, checkpoint)
    arrange(bank, modules, plan_arrangement(bank, modules, top_k_of(model, targets[0]), strategy, *bounds))

    before = sum(_module_bytes(target.module) for target in targets)
    rest = _module_bytes(model) - before
    with model.register_forward_pre_hook(bank.calls.arrive), bank.calls.change([model]):
        for target, module in zip(targets, modules, strict=True):
            model.set_submodule(target.name, module)
        install_bank(model, bank)
        if keep_dense:
            # a plain tuple: the dense experts follow the model neither to a device nor into its state_dict
            setattr(model, _DENSE_NAME, targets)
        _set_quantizer(model, checkpoint.config)
    replaced = tuple(target.name for target in targets)
    skipped = tuple(name for name, _ in model.named_modules() if name.endswith("experts") and name not in replaced)
    after = resident_bytes(model)
    peak, peak_before = after + peak_workspace(model), before + peak_workspace(model, DENSE.name)
    strategies = modules[0].strategies
    return PatchReport(replaced, skipped, strategies, before, after, peak, checkpoint.bytes_on_disk, peak_before, rest)


def unpatch(model: nn.Module) -> None:
    """Put back the dense experts that `patch(..., keep_dense=True)` kept; waits for the calls of other threads."""
    model = model_in(model)
    if not is_patched(model):
        raise RequestError("This model does not run on GloBE experts, so there is nothing to undo.")
    dense = getattr(model, _DENSE_NAME, None)
    if dense is None:
        raise RequestError(
            "The dense experts were not kept; patch with keep_dense=True to be able to undo it, or load the dense "
            "model again."
        )
    with getattr(model, BANK_NAME).calls.change([model]):
        for target in dense:
            globe = model.get_submodule(target.name)
            assert isinstance(globe, GlobeMoEFFN)
            model.set_submodule(target.name, target.module.to(globe.device, globe.down_proj.dtype))
        remove_bank(model)
        delattr(model, _DENSE_NAME)
        _set_quantizer(model, None)


def resident_bytes(model: nn.Module) -> int:
    """Count the bytes that the GloBE experts hold on their devices; on a CPU a bank in host memory counts."""
    modules = list(globe_modules(model).values())
    devices, parts = by_device(modules), (*modules, getattr(model, BANK_NAME))
    return sum(here(tensor).nbytes for part in parts for tensor in _tensors(part) if tensor.device in devices)


def peak_workspace(model: nn.Module, strategy: str | None = None) -> int:
    """Predict the bytes of the largest temporaries of one layer, over calls with up to PEAK_TOKENS tokens.

    `strategy`: a name, "dense" for the dense experts; by default the strategy that each call takes.
    """
    modules = list(globe_modules(model).values())
    adapter, palettes = modules[0].gate_adapter, {module.layer: module.palettes for module in modules}
    return workspace(
        getattr(model, BANK_NAME).config,
        modules[0].strategy if strategy is None else lambda _: strategy,
        PEAK_TOKENS,
        getattr(model, BANK_NAME).arrangement.top_k,
        adapter.element_size(),
        palettes,
        on_gpu=modules[0].device.type == "cuda",
    )


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _module_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in _tensors(module))


def _checkpoint_path(model: nn.Module) -> Path:
    name = getattr(getattr(model, "config", None), "name_or_path", "")
    is_there = False
    with suppress(GlobeError):  # a Hub that does not answer
        is_there = bool(name) and holds_checkpoint(local_directory(name, weights=False))
    if is_there:
        return local_directory(name)
    raise RequestError(
        f"The model's directory ({name or 'unknown'}) holds no {CONFIG_NAME}; pass the GloBE checkpoint: "
        'globe_kernels.patch(model, "out/globe").'
    )


def _check_shapes(target: DenseExperts, config: GlobeConfig) -> None:
    num_experts = config.base.num_experts[target.layer]
    expected = target.layout.shapes(num_experts, config.base.intermediate_size, config.base.hidden_size)
    for name, shape in expected.items():
        tensor = getattr(target.module, name, None)
        missing = f"missing in this {type(target.module).__name__}"
        found = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else missing
        if isinstance(tensor, torch.Tensor) and tensor.is_meta:
            raise RequestError(
                f"{target.name}.{name} is on the meta device, without values; load the model's weights first, or load "
                "an exported GloBE directory with from_pretrained."
            )
        if found != shape:
            raise RequestError(
                f"{target.name}.{name} is {found} and the checkpoint, fitted on {config.base.name}, expects {shape}; "
                "patch the model it was fitted on."
            )


def _refuse_other_weights(target: DenseExperts, checkpoint: GlobeCheckpoint) -> None:
    """Refuse factors of other weights: a least-squares fit explains some of its weights, and only adds error to others.

    One layer suffices: a relative squared error of 1 or more cannot come from the weights of the fit.
    """
    config = checkpoint.config
    weights = target.layout.part(target.module.gate_up_proj.detach(), "gate")
    factors = checkpoint.layer(target.layer, "gate")
    basis = compose_basis_ref(
        factors.code.index, factors.code.value, checkpoint.bank("gate"), config.phi, torch.float32
    )
    gate = weights.float().cpu()
    largest = gate.abs().max()
    if not torch.isfinite(largest):
        raise GlobeError(f"{target.name}.gate_up_proj holds NaN or infinity; load the model's weights again.")
    unit = torch.where(largest > 0, largest, 1.0)  # float32 may not hold the squares of the weights
    lost = ((gate - factors.adapter.float() @ basis) / unit).square().sum().item()
    energy = (gate / unit).square().sum().item()
    error = lost / energy if energy else lost  # a layer of zeros is fitted without an error
    if not error < 1.0:
        raise RequestError(
            f"The checkpoint {checkpoint.path} was fitted on other weights than this model's (relative error "
            f"{error:.2f} on layer {target.layer}, below 1 expected); patch {config.base.name}, which it was fitted on."
        )


@torch.inference_mode(False)
def _build(targets: tuple[DenseExperts, ...], checkpoint: GlobeCheckpoint) -> tuple[GlobeBank, list[GlobeMoEFFN]]:
    """Build the bank and the replacements, on the devices and in the dtypes of the experts that they replace."""
    config = checkpoint.config
    bank = GlobeBank(config, "meta")
    for family in FAMILIES:
        setattr(
            bank,
            family,
            nn.Parameter(checkpoint.bank(family).to(targets[0].module.down_proj.device), requires_grad=False),
        )
    modules = []
    for target in targets:
        down = target.module.down_proj
        module = globe_experts(config, target)
        for name, fused in target.module.named_parameters():
            for parameter, tensor in target.layout.kept(name, fused).items() if name != GATE_UP else ():
                # frozen, in the memory of the dense tensor unless GlobeMoEFFN has another layout
                setattr(module, parameter, nn.Parameter(tensor.detach().contiguous(), requires_grad=False))
        for family in FAMILIES:
            factors = checkpoint.layer(target.layer, family)
            adapter = nn.Parameter(factors.adapter.to(down.device, down.dtype), requires_grad=False)
            setattr(module, f"{family}_adapter", adapter)
            setattr(module, f"{family}_code_index", factors.code.index.to(down.device))
            setattr(module, f"{family}_code_value", factors.code.value.to(down.device))
        module.train(target.module.training)
        modules.append(module)
    return bank, modules


def _set_quantizer(model: nn.Module, config: GlobeConfig | None) -> None:
    """Let `save_pretrained` write, or no longer write, a directory that `from_pretrained` loads as GloBE."""
    if importlib.util.find_spec("transformers") is not None:
        from globe_kernels.model import quantizer  # optional, and slow to import

        quantizer.set_quantizer(model, config)
