"""Arrange a live model: decide which strategies its GloBE experts may run by, and hold the tensors that these need."""

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from globe_kernels.errors import RequestError
from globe_kernels.format.names import FAMILIES
from globe_kernels.model.bank import Arrangement, DeviceBank, GlobeBank
from globe_kernels.model.cache import BasisCache
from globe_kernels.model.experts import GlobeMoEFFN
from globe_kernels.model.parallel import is_split
from globe_kernels.model.scratch import ScratchBuffers
from globe_kernels.strategies import STRATEGIES
from globe_kernels.strategies.budget import AUTO, choose_residents, layer_sizes
from globe_kernels.strategies.cached import pool_slots
from globe_kernels.strategies.cost import machine_for
from globe_kernels.strategies.scratch import compose_into


def plan_arrangement(
    bank: GlobeBank,
    modules: Sequence[GlobeMoEFFN],
    top_k: float,
    strategy: str,
    memory_budget: int | None = None,
    cache_bytes: int | None = None,
) -> Arrangement:
    """Choose the arrangement for a strategy, within bytes for all experts and for the pool of the cache.

    Changes nothing. Raises RequestError when the bytes do not suffice, or when codes or bank are offloaded.
    """
    config, first, devices = bank.config, modules[0], by_device(modules)
    if "meta" in {device.type for device in devices}:
        raise RequestError(
            "The codes of some experts are offloaded; load the model with offload_buffers=False, which is the default."
        )
    if bank.gate.is_meta:
        raise RequestError("The bank is offloaded; load the model with globe_bank on a device of its device_map.")
    for atoms in (bank.gate, bank.up):
        if atoms.shape != config.bank_shape():
            raise RequestError(
                f"The bank is {tuple(atoms.shape)} and the codes are over {config.bank_shape()}; put back atoms of "
                "that shape, or load the model again."
            )
    item_size, machine = first.gate_adapter.element_size(), machine_for(first.device)
    palettes = {module.layer: {family: module.code(family).palette for family in FAMILIES} for module in modules}
    sizes = layer_sizes(config, first.layer, top_k * first.share_of_experts, item_size, palettes)
    choice = choose_residents(
        config,
        sizes,
        machine,
        memory_budget,
        strategy,
        cache_bytes=cache_bytes,
        palettes=palettes,
        bank_atoms=_copies(devices),
    )
    arrangement = Arrangement(strategy, choice.strategies, choice.cache_bytes, top_k)
    if choice.cache_bytes:
        _slots(bank, arrangement, modules)
    if strategy != AUTO and (sentence := STRATEGIES[strategy].warning(sizes, machine)) is not None:
        warnings.warn(sentence, stacklevel=3)
    return arrangement


def by_device(modules: Sequence[GlobeMoEFFN]) -> dict[torch.device, list[GlobeMoEFFN]]:
    """Group the modules by the device that their calls run on."""
    devices: dict[torch.device, list[GlobeMoEFFN]] = {}
    for module in modules:
        devices.setdefault(module.device, []).append(module)
    return devices


def _used(modules: Sequence[GlobeMoEFFN]) -> dict[str, torch.Tensor]:
    """{family: ascending ids of the atoms that these layers use}"""
    return {
        family: torch.cat([module.code(family).index.flatten().cpu() for module in modules]).unique()
        for family in FAMILIES
    }


def _copies(devices: dict[torch.device, list[GlobeMoEFFN]]) -> int | None:
    """Count the atoms of both families on all devices; None for one device, which has the bank."""
    if len(devices) == 1:
        return None
    return sum(len(ids) for modules in devices.values() for ids in _used(modules).values())


def _slots(bank: GlobeBank, arrangement: Arrangement, modules: Sequence[GlobeMoEFFN]) -> dict[torch.device, int]:
    """Share the slots of the cache over the devices, in proportion to their experts.

    Raises RequestError when a device would have no slot.
    """
    slots = pool_slots(bank.config, arrangement.cache_bytes, modules[0].gate_adapter.element_size())
    total, devices = sum(_num_experts(modules).values()), by_device(modules)
    shares = {device: slots * sum(_num_experts(here).values()) // total for device, here in devices.items()}
    if not all(shares.values()):
        raise RequestError(
            f"A cache of {arrangement.cache_bytes} bytes has {slots} slots for layers on {len(devices)} devices; give "
            "more, at least one slot for each."
        )
    return shares


def _num_experts(modules: Sequence[GlobeMoEFFN]) -> dict[int, int]:
    return {module.layer: module.num_experts for module in modules}


# a later call changes the tensors: an inference tensor allows that in inference mode alone
@torch.inference_mode(False)
def arrange(bank: GlobeBank, modules: Sequence[GlobeMoEFFN], arrangement: Arrangement) -> None:
    """Hold the tensors that `arrangement` needs, and no others; replace any earlier arrangement.

    No call may run meanwhile. The tensors of the earlier arrangement go first: two pools may not fit. Where memory runs
    out under way the model holds nothing, says so when it is called, and can be arranged again.
    """
    _let_go(bank, modules)
    bank.arrangement = arrangement
    for module in modules:
        module.calls = bank.calls
    try:
        _hold(bank, modules, arrangement)
    except BaseException:
        _let_go(bank, modules)
        raise


def _let_go(bank: GlobeBank, modules: Sequence[GlobeMoEFFN]) -> None:
    for device in by_device(modules):
        if device.type == "cuda":
            # their memory may be given away only when calls on all streams are done with it
            torch.cuda.synchronize(device)
    bank.device_banks = nn.ModuleList()
    for module in modules:
        module.forget()


def _hold(bank: GlobeBank, modules: Sequence[GlobeMoEFFN], arrangement: Arrangement) -> None:
    strategies = [STRATEGIES[name] for name in arrangement.strategies]
    devices = by_device(modules)
    if all(strategy.holds_bases for strategy in strategies):
        _hold_bases(bank, devices, arrangement)
        return
    dtype = modules[0].gate_adapter.dtype
    if len(devices) == 1:
        bank.unpark(modules[0].device, dtype)
    else:
        bank.park()
    slots = _slots(bank, arrangement, modules) if arrangement.cache_bytes else {}
    for device, here in devices.items():
        device_bank = DeviceBank(bank) if len(devices) == 1 else DeviceBank(bank, _used(here), device, dtype)
        bank.device_banks.append(device_bank)
        if slots:
            rank, width = here[0].gate_adapter.shape[2], here[0].hidden_dim
            device_bank.cache = BasisCache(_num_experts(here), slots[device], rank, width, dtype, device)
        if any(strategy.takes_buffers for strategy in strategies):
            device_bank.scratch = ScratchBuffers(here, compose_into)
        for module in here:
            module.hold(device_bank, arrangement.strategies, arrangement.top_k)


def _hold_bases(bank: GlobeBank, devices: dict[torch.device, list[GlobeMoEFFN]], arrangement: Arrangement) -> None:
    """Compose every basis, free the copied atoms, and park the bank."""
    for device, here in devices.items():
        is_there = bank.gate.device == device and not is_split(bank.gate)
        # in the dtype of the bank: a basis is rounded once
        device_bank = DeviceBank(bank) if is_there else DeviceBank(bank, _used(here), device, bank.gate.dtype)
        for module in here:
            module.hold(device_bank, arrangement.strategies, arrangement.top_k)
        device_bank.release()
    bank.park()
