"""Predict the bytes and the times of a model that runs as GloBE, from config.json alone: no weight is read.

The bytes come from globe_kernels.strategies.budget, the times from the cost model in globe_kernels.strategies.cost:
predictions, not measurements. They assume uniform routing and, without a checkpoint, random codes.
"""

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path

from globe_fit.config import FitConfig
from globe_fit.data.outline import Outline
from globe_fit.data.source import read_config
from globe_fit.plan.presets import verdict, with_preset
from globe_fit.sizes import resolve_sizes
from globe_kernels.errors import RequestError
from globe_kernels.format.checkpoint import BaseModel, GlobeCheckpoint, GlobeConfig
from globe_kernels.format.directories import not_a_model
from globe_kernels.format.files import read_json
from globe_kernels.format.names import CONFIG_NAME
from globe_kernels.strategies import DENSE, STRATEGIES
from globe_kernels.strategies.budget import (
    AUTO,
    Choice,
    Palettes,
    atoms_on_devices,
    choose_residents,
    expected_palettes,
    layer_sizes,
    palettes_of,
    resident,
    strategies_of,
    workspace,
)
from globe_kernels.strategies.composed import break_even_rank
from globe_kernels.strategies.cost import Machine, predict

TOKENS = (1, 8, 64, 512, 4096)  # of a call, in the tables
CURVE_TOKENS = tuple(2**power for power in range(15))  # in the plot
CONTEXT = 4096
_WITHOUT_KV = ("linear_attention", "conv", "moe")  # layers, as transformers calls them, that keep nothing per token


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a dense model that a plan needs."""

    base: BaseModel
    top_k: int  # K
    outside_values: int  # weights that are not routed experts
    kv_values: int  # of the KV cache, per token
    item_size: int = 2  # bytes of a weight, on disk and in memory


def read_model(path: Path) -> ModelSizes:
    """Read the sizes of a model directory or of its config.json. Raises RequestError for a model without experts."""
    if not path.exists() or path.suffix == ".gguf":
        raise not_a_model(path)
    read_config(path) if path.is_dir() else read_json(path, "give the config.json of a model")
    outline = Outline.read(path)
    experts = {each.name for each in outline.experts.values()}
    outside = (p.numel() for name, p in outline.model.named_parameters() if name.rpartition(".")[0] not in experts)
    kv_values = _kv_values(outline)
    return ModelSizes(outline.base, outline.top_k, sum(outside), kv_values, outline.dtype.itemsize)


def _kv_values(outline: Outline) -> int:
    """Count the values per token, as if no window bounded them."""
    layers = outline.layer_configs
    kinds = getattr(outline.model.config.get_text_config(), "layer_types", None) or [None] * len(layers)
    return sum(_kv_values_of(layer) for layer, kind in zip(layers, kinds, strict=True) if kind not in _WITHOUT_KV)


def _kv_values_of(layer) -> int:
    """Count keys and values of every head, or the latent of a layer that has a latent."""
    if latent := getattr(layer, "kv_lora_rank", None):
        return latent + layer.qk_rope_head_dim
    head = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
    return 2 * layer.num_key_value_heads * head


def open_planned(path: Path, base: Path | None) -> tuple[ModelSizes, GlobeCheckpoint | None]:
    """Read the model at `path`; for a GloBE checkpoint the model at `base`, on which it was fitted, and the checkpoint.

    Raises RequestError when `base` is missing or is another model.
    """
    if not (path / CONFIG_NAME).is_file():
        return read_model(path), None
    if base is None:
        raise RequestError(f"{path} is a GloBE checkpoint without the rest of its model; give --base MODEL_DIR.")
    checkpoint, model = GlobeCheckpoint(path, verify=False), read_model(base)
    fitted = checkpoint.config.base
    for name, found in (
        ("model_type", model.base.model_type),
        ("hidden_size", model.base.hidden_size),
        ("MoE layers", sorted(model.base.num_experts)),
    ):
        layers = sorted({*fitted.num_experts, *fitted.left_dense})
        expected = layers if name == "MoE layers" else getattr(fitted, name)
        if found != expected:
            raise RequestError(
                f"{path} was fitted on {fitted.name} with {name} {expected} and {base} has {found}; give the model on "
                "which it was fitted."
            )
    return model, checkpoint


def points(
    base: BaseModel, settings: dict, lists: dict[str, list], choose: Callable[[FitConfig], FitConfig] = lambda c: c
) -> list[GlobeConfig]:
    """Resolve the sizes of every combination of `lists`, each once; `choose` may choose sizes that are not given.

    Raises RequestError for sizes out of range.
    """
    combinations = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    configs = [FitConfig.from_options(None, settings | values) for values in combinations]
    found = [resolve_sizes(base, choose(config)) for config in configs]
    return [sizes for number, sizes in enumerate(found) if sizes not in found[:number]]


class Planner:
    """Makes the plans for a model on a machine."""

    def __init__(self, model: ModelSizes, machine: Machine, budget: int | None, cache_bytes: int | None):
        """`budget` limits the bytes of the experts on the device; None: the bytes of the dense experts."""
        self.model, self.machine = model, machine
        self._budget, self._cache_bytes = budget, cache_bytes

    def plan(self, sizes: GlobeConfig, palettes: Palettes | None = None) -> dict:
        """Predict the figures of a checkpoint of these sizes, by default with expected palettes; JSON types only."""
        known = palettes or expected_palettes(sizes)
        top_k, item = self.model.top_k, self.model.item_size
        kinds = Counter(layer_sizes(sizes, layer, top_k, item, known) for layer in sizes.base.num_experts)
        ((usual, _),) = kinds.most_common(1)
        dense = self._strategy(sizes, Choice((DENSE.name,), 0), kinds, known)
        cards = ceil((self._outside() + dense["peak"]) / self._memory())
        atoms = atoms_on_devices(sizes, known, cards)
        strategies = {DENSE.name: dense}
        for name in (*strategies_of(sizes), AUTO):
            is_bounded = name == AUTO or STRATEGIES[name].takes_pool
            budget, wanted = (self._budget, self._cache_bytes) if is_bounded else (None, None)
            try:
                choice = choose_residents(
                    sizes, usual, self.machine, budget, name, cache_bytes=wanted, palettes=known, bank_atoms=atoms
                )
            except RequestError as error:
                strategies[name] = {"refused": str(error)}
                continue
            strategies[name] = self._strategy(sizes, choice, kinds, known, atoms)
        limit = self._budget or dense["resident"]
        for figures in strategies.values():
            if "refused" not in figures:
                figures |= self._serving(cards, figures["peak"]) | {"fits": figures["resident"] <= limit}
        down = dense["parts"]["down"]
        return {
            "rank": sizes.rank,
            "atoms": sizes.num_atoms,
            "support": sizes.support,
            "palette": sizes.palette,
            "phi": sizes.phi,
            "scope": sizes.scope,
            "ratio": sizes.tensor_bytes / sizes.base.dense_bytes,
            "mean_palette": usual.palette,
            "palettes_known": palettes is not None,
            "break_even_rank": break_even_rank(sizes.base.intermediate_size, sizes.base.hidden_size),
            "why_not_composed": next((why for s in STRATEGIES.values() if (why := s.wastes(sizes))), None),
            "sizes": self._sizes(sizes, down, strategies),
            "bytes_on_disk": {"dense": self._dense(sizes) + down, "globe": sizes.tensor_bytes + down},
            "budget": limit,
            "cards": cards,
            "strategies": strategies,
        }

    def _sizes(self, sizes: GlobeConfig, down: int, strategies: dict[str, dict]) -> dict:
        """Add the other weights of the model to the bytes of the experts: dense, and as GloBE by auto."""
        rest, dense, globe = self._outside(), strategies[DENSE.name], strategies[AUTO]
        gate_up = {"dense": self._dense(sizes), "globe": sizes.tensor_bytes}
        running = {
            name: None
            if "refused" in globe
            else {"dense": self._outside() + dense[name], "globe": self._outside() + globe[name]}
            for name in ("resident", "peak")
        }
        held = dict.fromkeys(name for _, name in globe.get("switch_points", ()))
        return {
            "gate_up": gate_up,
            "model": {name: size + down + rest for name, size in gate_up.items()},
            **running,
            "strategies": list(held),
        }

    def _memory(self) -> float:
        return self.machine.memory_gb * 1e9

    def _dense(self, sizes: GlobeConfig) -> int:
        """Return the bytes of gate and up of the dense model on disk."""
        base = sizes.base
        return 2 * base.total_experts * base.intermediate_size * base.hidden_size * self.model.item_size

    def _outside(self) -> int:
        return self.model.outside_values * self.model.item_size

    def _serving(self, cards: int, peak: int) -> dict:
        """Count the tokens of the KV cache beside the model on `cards` cards, as if they were one memory."""
        room = cards * self._memory() - self._outside() - peak
        tokens = max(0, int(room / (max(1, self.model.kv_values) * self.model.item_size)))
        return {"kv_tokens": tokens, "batch": tokens // CONTEXT}

    def _strategy(
        self, sizes: GlobeConfig, choice: Choice, kinds: Counter, palettes: Palettes, bank_atoms: int | None = None
    ) -> dict:
        item, layers = self.model.item_size, kinds.total()
        held = resident(
            sizes,
            choice.strategies,
            item_size=item,
            cache_bytes=choice.cache_bytes,
            palettes=palettes,
            bank_atoms=bank_atoms,
        )
        pool = choice.pool(sizes, item)
        ((usual, _),) = kinds.most_common(1)
        strategies = {name: DENSE if name == DENSE.name else STRATEGIES[name] for name in choice.strategies}
        policy = choice.policy(sizes, usual, self.machine)

        def us(tokens: int) -> float:
            strategy = strategies[policy.strategy(tokens)]
            return sum(n * predict(strategy, kind, tokens, self.machine, pool).us for kind, n in kinds.items()) / layers

        calls = (TOKENS[-1], self.model.top_k, item, palettes)
        on_gpu = self.machine.references is None
        temporary = workspace(sizes, policy.strategy, *calls, on_gpu=on_gpu)
        in_memory = held.total if on_gpu else held.total + held.host  # a CPU has one memory
        return {
            "resident": in_memory,
            "parts": held.parts,
            "host": held.host,
            "peak": in_memory + temporary,
            "us_per_layer": {str(tokens): us(tokens) for tokens in CURVE_TOKENS},
            "tokens_per_s": {str(tokens): 1e6 * tokens / (layers * us(tokens)) for tokens in TOKENS},
            "path": {str(tokens): policy.strategy(tokens) for tokens in TOKENS},
            "switch_points": [list(point) for point in policy.points],
        }

    def describe(self) -> dict:
        """Describe the model and the machine of all points; JSON types only."""
        model = self.model
        return {
            "model": model.base.name,
            "model_type": model.base.model_type,
            "layers": len(model.base.num_experts),
            "experts": max(model.base.num_experts.values()),
            "choices": model.top_k,  # the keys of --json stay: scripts read them
            "shape": [model.base.intermediate_size, model.base.hidden_size],
            "outside_bytes": self._outside(),
            "kv_bytes_per_token": model.kv_values * model.item_size,
            "item_size": model.item_size,
            "machine": asdict(self.machine),
        }


def plan_all(
    path: Path,
    base: Path | None,
    machine: Machine,
    settings: dict,
    lists: dict[str, list],
    budget: int | None = None,
    cache_bytes: int | None = None,
    preset: str | None = None,
) -> dict:
    """Predict the figures of `globe plan`. Raises RequestError when no point has a strategy within a given budget."""
    model, checkpoint = open_planned(path, base)
    if checkpoint is not None and (lists or preset or any(settings.values())):
        raise RequestError(f"{path} is a GloBE checkpoint, which fixes its sizes; give no sizes, or plan for {base}.")
    if checkpoint is None:
        planner = Planner(model, machine, budget, cache_bytes)
        choose = (lambda config: config) if preset is None else partial(with_preset, planner, preset)
        plans = [planner.plan(sizes) for sizes in points(model.base, settings, lists, choose)]
    else:
        planner = Planner(replace(model, base=checkpoint.config.base), machine, budget, cache_bytes)
        plans = [planner.plan(checkpoint.config, palettes_of(checkpoint))]
    for point in plans:
        point["verdict"] = verdict(planner, point)
    refused = [point["strategies"][AUTO].get("refused") for point in plans]
    if (budget or cache_bytes) and all(refused):
        raise RequestError(refused[0])
    return {**planner.describe(), "points": plans}
