"""What the GloBE experts of a model hold on its device, so that they can run as they were asked to."""

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from globe_kernels.errors import RequestError
from globe_kernels.format.architectures import FAMILIES
from globe_kernels.model.bank import Arrangement, GlobeBank, Place
from globe_kernels.model.cache import BasisCache
from globe_kernels.model.experts import GlobeMoEFFN
from globe_kernels.model.scratch import Scratch
from globe_kernels.strategies.budget import choose_residents, layer_sizes, pool_slots
from globe_kernels.strategies.cost import DENSE, LayerSizes, Machine, machine_for, predict

_SLOW = 1.5  # times the dense experts: a warning


def plan_arrangement(
    bank: GlobeBank,
    modules: Sequence[GlobeMoEFFN],
    choices: int,
    strategy: str,
    memory_budget: int | None = None,
    cache_bytes: int | None = None,
) -> Arrangement:
    """The arrangement for a strategy, within bounds in bytes on what the experts hold and on the pool of the cache.

    Changes nothing. Raises RequestError when that cannot be had.
    """
    config, first, devices = bank.config, modules[0], by_device(modules)
    if "meta" in {device.type for device in devices}:
        raise RequestError(
            "The codes of some experts are offloaded; load the model with offload_buffers=False, which is the default."
        )
    if bank.gate.is_meta:
        raise RequestError("The bank is offloaded; load the model with globe_bank on a device of its device_map.")
    item_size, machine = first.gate_adapter.element_size(), machine_for(first.device)
    palettes = {one.layer: {f: one.code(f).index.unique().numel() for f in FAMILIES} for one in modules}
    sizes = layer_sizes(config, first.layer, choices, item_size, palettes)
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
    arrangement = Arrangement(strategy, choice.paths, choice.cache_bytes, choices)
    if choice.cache_bytes:
        _slots(bank, arrangement, modules)
    if strategy == "bank_first":
        _warn_of_large_palettes(sizes, machine)
    return arrangement


def by_device(modules: Sequence[GlobeMoEFFN]) -> dict[torch.device, list[GlobeMoEFFN]]:
    """The modules by the device that their calls run on."""
    devices: dict[torch.device, list[GlobeMoEFFN]] = {}
    for module in modules:
        devices.setdefault(module.device, []).append(module)
    return devices


def _used(modules: Sequence[GlobeMoEFFN]) -> dict[str, torch.Tensor]:
    """By family the ids of the atoms that these layers use, ascending."""
    return {family: torch.cat([m.code(family).index.flatten().cpu() for m in modules]).unique() for family in FAMILIES}


def _copies(devices: dict[torch.device, list[GlobeMoEFFN]]) -> int | None:
    """Atoms of both families on all devices; None for one, which has the bank."""
    if len(devices) == 1:
        return None
    return sum(len(ids) for own in devices.values() for ids in _used(own).values())


def _slots(bank: GlobeBank, arrangement: Arrangement, modules: Sequence[GlobeMoEFFN]) -> dict[torch.device, int]:
    """Of the cache of each device, in proportion to its experts. Raises RequestError when one would have none."""
    slots = pool_slots(bank.config, arrangement.cache_bytes, modules[0].gate_adapter.element_size())
    total, devices = sum(_num_experts(modules).values()), by_device(modules)
    shares = {device: slots * sum(_num_experts(own).values()) // total for device, own in devices.items()}
    if not all(shares.values()):
        raise RequestError(
            f"A cache of {arrangement.cache_bytes} bytes has {slots} slots for layers on {len(devices)} devices; give "
            "more, at least one slot for each."
        )
    return shares


def _num_experts(modules: Sequence[GlobeMoEFFN]) -> dict[int, int]:
    return {module.layer: module.num_experts for module in modules}


def _warn_of_large_palettes(sizes: LayerSizes, machine: Machine) -> None:
    """Where a layer uses so many atoms that no number of tokens makes bank_first pay."""
    ratios = {tokens: _ratio_to_dense(sizes, tokens, machine) for tokens in (2**power for power in range(13))}
    tokens = min(ratios, key=ratios.__getitem__)
    if ratios[tokens] > _SLOW:
        warnings.warn(
            f"A layer of this checkpoint uses {sizes.palette:.0f} atoms per family, and bank_first multiplies every "
            f"token with all of them: by the cost model at least {ratios[tokens]:.1f} times as long as the dense "
            f"experts, at {tokens} tokens; fit with --palette, or use another strategy.",
            stacklevel=4,
        )


def _ratio_to_dense(sizes: LayerSizes, tokens: int, machine: Machine) -> float:
    bank_first, dense = (predict(path, sizes, tokens, machine).us for path in ("bank_first", DENSE))
    return bank_first / dense


def arrange(bank: GlobeBank, modules: Sequence[GlobeMoEFFN], arrangement: Arrangement) -> None:
    """Hold what `arrangement` needs, and nothing else; also on a model that runs otherwise so far.

    What was held before is let go first: two pools may not fit. So where memory runs out under way the model holds
    nothing and says so, and can be arranged again.
    """
    _let_go(bank, modules)
    bank.arrangement = arrangement
    try:
        _hold(bank, modules, arrangement)
    except BaseException:
        _let_go(bank, modules)
        raise


def _let_go(bank: GlobeBank, modules: Sequence[GlobeMoEFFN]) -> None:
    bank.places = nn.ModuleList()
    for module in modules:
        module.forget()


def _hold(bank: GlobeBank, modules: Sequence[GlobeMoEFFN], arrangement: Arrangement) -> None:
    paths, devices = arrangement.paths, by_device(modules)
    if paths == ("composed",):
        for device, own in devices.items():
            is_there = bank.gate.device == device
            # in the dtype of the bank: a basis is rounded once
            place = Place(bank) if is_there else Place(bank, _used(own), device, bank.gate.dtype)
            for module in own:
                module.run_from(place, paths, arrangement.choices)
            place.release()
        bank.park()
        return
    dtype = modules[0].gate_adapter.dtype
    if len(devices) == 1:
        bank.unpark(modules[0].device, dtype)
    else:
        bank.park()
    slots = _slots(bank, arrangement, modules) if arrangement.cache_bytes else {}
    for device, own in devices.items():
        place = Place(bank) if len(devices) == 1 else Place(bank, _used(own), device, dtype)
        bank.places.append(place)
        if slots:
            rank, width = own[0].gate_adapter.shape[2], own[0].hidden_dim
            place.cache = BasisCache(_num_experts(own), slots[device], rank, width, dtype, device)
        if "scratch" in paths:
            place.scratch = Scratch(own)
        for module in own:
            module.run_from(place, paths, arrangement.choices)
