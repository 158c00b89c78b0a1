"""Heal all layers of a fit, one after the other.

The dense model runs once over the text, and the routed inputs of every layer go to disk. A layer then heals by itself
(globe_fit.healing.layer): its inputs, its down experts and one dense expert at a time are in memory. A snapshot keeps
each layer that is healed.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from globe_fit.calibration.metric import Calibration, identity, run_over
from globe_fit.calibration.self_text import WINDOWS
from globe_fit.config import SELF
from globe_fit.data.model import WINDOW
from globe_fit.data.source import ExpertLayer, ExpertSource
from globe_fit.data.stream import FamilyWeights, share
from globe_fit.healing.inputs import RoutedInputs, inputs_bytes, read_inputs, record_inputs
from globe_fit.healing.layer import CHUNK, Adapters, HealedLayer, LayerExperts, heal_layer, tokens_of_step
from globe_fit.measure.diagnostics import spot_checks
from globe_fit.measure.errors import stored_errors
from globe_fit.result import FamilyFactors, FitResult
from globe_fit.run.progress import SILENT, Progress
from globe_fit.run.snapshots import HEALED, Snapshots
from globe_kernels.errors import RequestError, warn
from globe_kernels.format.checkpoint import GlobeConfig
from globe_kernels.format.names import FAMILIES
from globe_kernels.format.writing import require_room
from globe_kernels.model.discovery import activation_of
from globe_kernels.ops.compose_basis import compose_basis_ref
from globe_kernels.units import format_bytes

MOST_WINDOWS = WINDOWS  # of a text file: healing reads as many tokens as a model writes
_INPUTS = "inputs"  # name of a snapshot


def heal_fit(
    result: FitResult,
    source: ExpertSource,
    text: str | Path,
    device: str,
    *,
    snapshots: Snapshots,
    seed: int = 0,
    calibration: Calibration | None = None,
    memory_limit: float | None = None,
    progress: Progress = SILENT,
) -> FitResult:
    """Heal the layers of a fit of `source` on a text file, or on a text that the model writes (SELF).

    The adapters of `result` are overwritten. Its report gets the errors of the new adapters, in the metric of
    `calibration` too, and the figures of the healing, which the configuration gets as well. A layer that healing does
    not improve on tokens held out keeps its adapters; a layer that diverges is a GlobeWarning. One seed gives one
    result on a CPU, also after an interruption. Raises RequestError for a text that is missing or too short and for too
    little memory, GlobeError for a full disk.
    """
    facts = _recorded(source, text, device, snapshots, memory_limit, progress)
    progress.begin("heal", len(source.layers))
    layers: dict[str, dict] = {}
    for number, (layer, span) in enumerate(source.layer_spans):
        name = f"{HEALED}{layer.layer}"
        saved = snapshots.load(name)
        if saved is None:
            inputs = read_inputs(source, snapshots.directory, layer.layer, facts["inputs"][str(layer.layer)])

            def advance(done: float, number: int = number) -> None:
                progress.advance(number + done)

            healed = _heal_layer(source, result, layer, span, inputs.to(device), device, seed + layer.layer, advance)
            if healed.diverged:
                warn(
                    f"The healing of layer {layer.layer} diverged, so the layer keeps the best adapters from before; "
                    "heal on another text."
                )
            adapters, of_layer = {family: healed.adapters[family].cpu() for family in FAMILIES}, healed.facts
            snapshots.save(name, 0, adapters, of_layer)
            del inputs, healed
        else:
            adapters, of_layer = saved[0], {key: saved[1][key] for key in HealedLayer.FACTS}
        for family in FAMILIES:
            result.families[family].adapter[span] = adapters[family]
        layers[str(layer.layer)] = of_layer
        progress.advance(number + 1)
        progress.note(f"error {of_layer['before']:.5f} to {of_layer['after']:.5f}")
    healing = facts["text"] | {"seed": seed, "layers": layers}
    return _measured(result, source, device, calibration, healing)


def _recorded(
    source: ExpertSource,
    text: str | Path,
    device: str,
    snapshots: Snapshots,
    memory_limit: float | None,
    progress: Progress,
) -> dict:
    """Return the facts of the inputs on disk, once the dense model has run over the text."""
    if (saved := snapshots.load(_INPUTS)) is not None:
        return saved[1]
    progress.begin("inputs of healing", 1)
    snapshots.directory.mkdir(parents=True, exist_ok=True)

    def collector(model, source, batches, device, on_batch):  # noqa: ANN001, ANN202
        require_room(snapshots.directory, inputs_bytes(source, sum(batch.numel() for batch in batches)))
        return record_inputs(model, source, batches, device, snapshots.directory, on_batch)

    inputs, tokens = run_over(
        source,
        text,
        device,
        collector,
        most_windows=MOST_WINDOWS,
        memory_limit=memory_limit,
        snapshots=snapshots,
        on_batch=lambda done, total: progress.advance(done / total),
        say=progress.say,
    )
    digest = None if text == SELF else identity(text)
    facts = {"inputs": inputs, "text": {"text": Path(text).name, "sha256": digest, "tokens": tokens}}
    snapshots.save(_INPUTS, 0, {}, facts)
    return facts


def _heal_layer(
    source: ExpertSource,
    result: FitResult,
    layer: ExpertLayer,
    span: slice,
    inputs: RoutedInputs,
    device: str,
    seed: int,
    on_epoch: Callable[[float], None],
) -> HealedLayer:
    """Bring the parts of one layer onto the device, and heal it."""
    bases: dict[str, torch.Tensor] = {}
    for family, factors in result.families.items():
        code, bank = factors.at(span).code, factors.bank.to(device)
        bases[family] = compose_basis_ref(code.index.to(device), code.value.to(device), bank, result.config.phi)
        del bank  # before the next family

    def dense(family: str, expert: int) -> torch.Tensor:
        return source.read(layer, family, range(expert, expert + 1))[0].to(device)

    activation = activation_of(source.outline.experts[layer.layer])
    experts = LayerExperts(bases, source.read_kept(layer, device), activation, dense)
    stored: Adapters = {family: factors.adapter[span].to(device) for family, factors in result.families.items()}
    return heal_layer(experts, inputs, stored, seed, on_epoch)


def _measured(
    result: FitResult, source: ExpertSource, device: str, calibration: Calibration | None, healing: dict
) -> FitResult:
    """Return the result with the errors of its adapters as they are now, and the figures of the healing."""
    metrics = {} if calibration is None else calibration.metrics(device)
    families = {family: dict(report) for family, report in result.report["families"].items()}
    for family, report in families.items():
        weights = FamilyWeights.measure(source, family, device, metrics.get(family))
        factors: FamilyFactors = result.families[family]
        report.update(stored_errors(weights, factors, result.config.phi))
        report["spot_checks"] = spot_checks(weights, factors, result.config.phi)
    energy = sum(report["energy"] for report in families.values())
    lost = sum(report["relative_error"] * report["energy"] for report in families.values())
    report = result.report | {"families": families, "relative_error": share(lost, energy), "healing": healing}
    # through JSON, so that a configuration equals itself after it was saved and loaded
    provenance = result.config.provenance | {"healing": json.loads(json.dumps(healing))}
    return replace(result, config=replace(result.config, provenance=provenance), report=report)


def healing_tokens(most: int = MOST_WINDOWS) -> int:
    """Return the most tokens that healing reads."""
    return most * WINDOW


def healing_disk_bytes(source: ExpertSource, sizes: GlobeConfig) -> int:
    """Predict the bytes on disk of a healing, beside the checkpoint: inputs, the adapters of all layers, the text."""
    tokens = healing_tokens()
    adapters = len(FAMILIES) * sizes.base.total_experts * sizes.base.intermediate_size * sizes.rank
    return inputs_bytes(source, tokens) + adapters * sizes.torch_dtype.itemsize + 8 * tokens


def healing_bytes(source: ExpertSource, sizes: GlobeConfig) -> int:
    """Predict the bytes at the peak of the healing of the largest layer, beside the factors of the fit.

    Tokens: hidden states in bf16, targets in fp32, ids and weights. Experts: down as stored, bases and best adapters
    as stored, adapters in fp32 five times (adapters, gradient, two of Adam, a sum), one expert in fp32 with its moment.
    Rows of a step, or of a chunk without gradients: inputs, bases, gate, up and outputs in fp32, twice for gradients.
    """
    return _layer_bytes(sizes, source.outline.top_k, healing_tokens())


def _layer_bytes(sizes: GlobeConfig, top_k: int, tokens: int) -> int:
    base, stored = sizes.base, sizes.torch_dtype.itemsize
    experts, width, inner = max(base.num_experts.values()), base.hidden_size, base.intermediate_size
    families = len(FAMILIES)
    of_tokens = tokens * (width * (2 + 4) + top_k * (8 + 4) * 3)
    adapters = families * experts * inner * sizes.rank
    bases = families * experts * sizes.rank * width
    down = experts * inner * width * 2
    one = (families * inner + 2 * width) * width * 8
    row = 4 * (3 * width + families * sizes.rank + 4 * inner)
    rows = max(2 * tokens_of_step(experts, top_k) * top_k, CHUNK) * row
    return of_tokens + adapters * (5 * 4 + 2 * stored) + bases * stored + down + one + rows


def require_memory(source: ExpertSource, sizes: GlobeConfig, limit: float | None) -> None:
    """Raise RequestError when a healing needs more than `limit` bytes."""
    if limit is not None and (needed := healing_bytes(source, sizes)) > limit:
        raise RequestError(
            f"Healing needs {format_bytes(needed)} at its peak and the memory limit is {format_bytes(limit)}; raise "
            "the limit, or fit without it (--no-heal)."
        )
