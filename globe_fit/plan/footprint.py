"""Count the bytes of a compressed model beside its dense model: on disk, resident, and at the peak of a long call.

    gate_up    gate and up experts on disk: all that a checkpoint replaces
    model      the whole model on disk
    resident   the whole model in memory, where the experts run by `auto`
    peak       resident, and the largest temporaries of one layer in calls of up to PEAK_TOKENS tokens

Resident bytes and peak are predictions of globe_kernels.strategies.budget.
"""

from typing import Any

import torch

from globe_fit.run.reports import read_report
from globe_kernels.format.checkpoint import GlobeCheckpoint, GlobeConfig
from globe_kernels.format.names import FAMILIES
from globe_kernels.model.patching import PEAK_TOKENS
from globe_kernels.strategies import DENSE
from globe_kernels.strategies.base import Palettes
from globe_kernels.strategies.budget import choose_residents, layer_sizes, palettes_of, resident, workspace
from globe_kernels.strategies.cost import machine_for
from globe_kernels.units import format_bytes


def footprint(
    sizes: GlobeConfig, base: dict | None, *, palettes: Palettes | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Return {figure: {"dense": bytes, "globe": bytes}} of the figures above, and the `strategies` that auto holds.

    `base` has the facts about the dense model that fit_report.json records: its bytes, the bytes of all of it but gate
    and up experts, the bytes of its files, and the experts per token. The bytes of a quantised model are those of its
    values, which exports hold; `quantized` are the bytes of its files, None for other models. Without the facts only
    `gate_up` is known, and the others are None. `palettes` are expected where they are not given.
    """
    if base is None or base["top_k"] is None:
        gate_up = {"dense": sizes.base.dense_bytes, "globe": sizes.tensor_bytes}  # dense in bf16
        return {
            "gate_up": gate_up,
            "model": None,
            "resident": None,
            "peak": None,
            "strategies": None,
            "quantized": None,
        }
    whole, rest, top_k = base["bytes"], base["rest_bytes"], base["top_k"]
    on_disk = base.get("disk_bytes", whole)  # older reports lack it
    gate_up = {"dense": whole - rest, "globe": sizes.tensor_bytes}
    place, item_size = torch.device(device), running_item_size(sizes, base)
    usual = layer_sizes(sizes, next(iter(sizes.base.num_experts)), top_k, item_size, palettes)
    machine = machine_for(place)
    choice = choose_residents(sizes, usual, machine, palettes=palettes)
    held = resident(sizes, choice.strategies, item_size=item_size, cache_bytes=choice.cache_bytes, palettes=palettes)
    on_gpu = place.type == "cuda"
    in_memory = {"dense": whole, "globe": rest + held.total - held.down + (0 if on_gpu else held.host)}
    policy = choice.policy(sizes, usual, machine)
    call = (PEAK_TOKENS, top_k, item_size, palettes)
    return {
        "gate_up": gate_up,
        "model": {"dense": whole, "globe": rest + sizes.tensor_bytes},
        "resident": in_memory,
        "peak": {
            "dense": in_memory["dense"] + workspace(sizes, lambda _: DENSE.name, *call, on_gpu=on_gpu),
            "globe": in_memory["globe"] + workspace(sizes, policy.strategy, *call, on_gpu=on_gpu),
        },
        "strategies": list(choice.strategies),
        "quantized": on_disk if on_disk < whole else None,
    }


def quantized_note(sizes: dict) -> str:
    """Say of a `footprint` that its dense model is quantised on disk; "" where it is not."""
    if not sizes.get("quantized"):
        return ""
    return (
        f"The base is quantised and takes {format_bytes(sizes['quantized'])} on disk; the sizes here count the values "
        "of its weights, as exports hold them."
    )


def running_item_size(sizes: GlobeConfig, base: dict | None) -> int:
    """Return the bytes of a weight in memory: factors run in the dtype of the dense model, by the facts about it.

    Without facts, and for a model that is stored in fewer bits, this is the dtype of the checkpoint.
    """
    stored = sizes.torch_dtype.itemsize
    if base is None:
        return stored
    values = len(FAMILIES) * sizes.base.total_experts * sizes.base.intermediate_size * sizes.base.hidden_size
    return max(stored, (base["bytes"] - base["rest_bytes"]) // values)


def footprint_of(checkpoint: GlobeCheckpoint) -> dict:
    """Return the footprint of a checkpoint, whose report has the facts about its dense model."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = read_report(checkpoint).get("base")
    return footprint(checkpoint.config, facts, palettes=palettes_of(checkpoint), device=device)
