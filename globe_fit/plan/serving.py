"""What a model would take and how fast its experts would be as GloBE, from config.json alone: no weight is read.

Bytes are those of globe_kernels.strategies.budget, times those of the cost model in globe_kernels.strategies.cost: predictions, not
measurements. Routing is taken for uniform, and unless a checkpoint says better, codes for random.
"""

import itertools
from collections import Counter
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from globe_fit.config import FitConfig
from globe_fit.data.source import configured_base, read_config
from globe_fit.sizes import resolve_sizes
from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format.architectures import architecture_of
from globe_kernels.format.checkpoint import CONFIG_NAME, BaseModel, GlobeCheckpoint, GlobeConfig
from globe_kernels.format.files import read_json
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
from globe_kernels.strategies.composed import Composed, break_even_rank
from globe_kernels.strategies.cost import Machine, Policy, predict, switch_points

TOKENS = (1, 8, 64, 512, 4096)  # of a call, in the tables
CURVE_TOKENS = tuple(2**power for power in range(15))  # in the plot
CONTEXT = 4096
_STORED_BYTES = 2  # bf16, on disk and of what lies around the experts


@dataclass(frozen=True)
class ModelSizes:
    """What a plan needs to know of the dense model."""

    base: BaseModel
    choices: int  # K
    outside_values: int  # weights that are not routed experts
    kv_values: int  # of the KV cache, per token


def read_model(path: Path) -> ModelSizes:
    """Of a model directory or its config.json. Raises RequestError when it is no Mixture-of-Experts model."""
    if not path.exists():
        raise RequestError(f"{path} does not exist; give a model's directory or its config.json.")
    where = path / "config.json" if path.is_dir() else path
    config = read_config(path) if path.is_dir() else read_json(path, "give a model's config.json")
    base = configured_base(config, where)
    if not base.num_experts:
        raise RequestError(f"By {where} no layer has routed experts; give a Mixture-of-Experts model.")
    # how the weights are quantized is of no matter here, and would want its libraries
    wanted = {name: value for name, value in config.items() if name != "quantization_config"}
    try:
        full = AutoConfig.for_model(**wanted)
        with torch.device("meta"):
            live = AutoModelForCausalLM.from_config(full)
        choices = architecture_of(base.model_type).top_k(config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GlobeError(f"transformers cannot build the model of {where} ({error}); download it again.") from error
    experts = {path for _, path in architecture_of(base.model_type).live_experts(live)}
    outside = (p.numel() for name, p in live.named_parameters() if name.rpartition(".")[0] not in experts)
    return ModelSizes(base, choices, sum(outside), _kv_values(full))


def _kv_values(config) -> int:
    """Per token: keys and values of every head, or where there is one the latent that stands for them."""
    if latent := getattr(config, "kv_lora_rank", None):
        return config.num_hidden_layers * (latent + config.qk_rope_head_dim)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head


def open_planned(path: Path, base: Path | None) -> tuple[ModelSizes, GlobeCheckpoint | None]:
    """The model at `path`; where that is a GloBE checkpoint, the model `base` it was fitted on, and the checkpoint.

    Raises RequestError when they do not belong together.
    """
    if not (path / CONFIG_NAME).is_file():
        return read_model(path), None
    if base is None:
        raise RequestError(f"{path} is a GloBE checkpoint without the rest of its model; give --base MODEL_DIR.")
    checkpoint, model = GlobeCheckpoint(path), read_model(base)
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
                f"{path} was fitted on {fitted.name} with {name} {expected} and {base} has {found}; give the model "
                "that it was fitted on."
            )
    return model, checkpoint


def points(base: BaseModel, settings: dict, lists: dict[str, list]) -> list[GlobeConfig]:
    """The sizes of every combination of `lists`, each once. Raises RequestError for one that cannot be had."""
    combinations = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    found = [resolve_sizes(base, FitConfig.from_options(None, settings | one)) for one in combinations]
    return [sizes for place, sizes in enumerate(found) if sizes not in found[:place]]


class Planner:
    """Plans for one model on one machine."""

    def __init__(self, model: ModelSizes, machine: Machine, budget: int | None, cache_bytes: int | None):
        """`budget` bounds what the experts hold on the device, without one it is what the dense ones hold."""
        self.model, self.machine = model, machine
        self._budget, self._cache_bytes = budget, cache_bytes

    def plan(self, config: GlobeConfig, palettes: Palettes | None = None) -> dict:
        """Figures of a checkpoint of these sizes, with expected palettes where there are none; JSON types only."""
        known = palettes or expected_palettes(config)
        choices, item = self.model.choices, self.machine.item_size
        kinds = Counter(layer_sizes(config, layer, choices, item, known) for layer in config.base.num_experts)
        ((usual, _),) = kinds.most_common(1)
        dense = self._strategy(config, Choice((DENSE.name,), 0), kinds, known)
        cards = ceil((self._outside() + dense["peak"]) / self._memory())
        atoms = atoms_on_devices(config, known, cards)
        strategies = {DENSE.name: dense}
        for name in (*strategies_of(config), AUTO):
            budget = self._budget if name in (AUTO, "cached") else None
            wanted = self._cache_bytes if name in (AUTO, "cached") else None
            try:
                choice = choose_residents(
                    config, usual, self.machine, budget, name, cache_bytes=wanted, palettes=known, bank_atoms=atoms
                )
            except RequestError as error:
                strategies[name] = {"refused": str(error)}
                continue
            strategies[name] = self._strategy(config, choice, kinds, known, atoms)
        limit = self._budget or dense["resident"]
        for figures in strategies.values():
            if "refused" not in figures:
                figures |= self._serving(cards, figures["peak"]) | {"fits": figures["resident"] <= limit}
        down = dense["parts"]["down"] // item * _STORED_BYTES
        return {
            "rank": config.rank,
            "atoms": config.num_atoms,
            "support": config.support,
            "palette": config.palette,
            "phi": config.phi,
            "scope": config.scope,
            "ratio": config.tensor_bytes / config.base.dense_bytes,
            "mean_palette": usual.palette,
            "palettes_known": palettes is not None,
            "break_even_rank": break_even_rank(config.base.intermediate_size, config.base.hidden_size),
            "why_not_composed": Composed().wastes(config),
            "bytes_on_disk": {"dense": config.base.dense_bytes + down, "globe": config.tensor_bytes + down},
            "budget": limit,
            "cards": cards,
            "strategies": strategies,
        }

    def _memory(self) -> float:
        return self.machine.memory_gb * 1e9

    def _outside(self) -> int:
        return self.model.outside_values * self.machine.item_size

    def _serving(self, cards: int, peak: int) -> dict:
        """How many tokens the KV cache holds beside the model on `cards` cards, taken for one memory."""
        room = cards * self._memory() - self._outside() - peak
        tokens = max(0, int(room / (self.model.kv_values * self.machine.item_size)))
        return {"kv_tokens": tokens, "batch": tokens // CONTEXT}

    def _strategy(
        self, config: GlobeConfig, choice: Choice, kinds: Counter, palettes: Palettes, bank_atoms: int | None = None
    ) -> dict:
        item, layers = self.machine.item_size, kinds.total()
        held = resident(
            config,
            choice.strategies,
            item_size=item,
            cache_bytes=choice.cache_bytes,
            palettes=palettes,
            bank_atoms=bank_atoms,
        )
        pool = choice.pool(config, item)
        ((usual, _),) = kinds.most_common(1)
        strategies = {name: DENSE if name == DENSE.name else STRATEGIES[name] for name in choice.strategies}
        policy = Policy(switch_points(strategies.values(), usual, self.machine, pool))

        def us(tokens: int) -> float:
            strategy = strategies[policy.strategy(tokens)]
            total = sum(n * predict(strategy, sizes, tokens, self.machine, pool).us for sizes, n in kinds.items())
            return total / layers

        calls = (TOKENS[-1], self.model.choices, item, palettes)
        temporary = workspace(config, choice.strategies, *calls, on_gpu=self.machine.references is None)
        return {
            "resident": held.total,
            "parts": held.parts,
            "host": held.host,
            "peak": held.total + temporary,
            "us_per_layer": {str(tokens): us(tokens) for tokens in CURVE_TOKENS},
            "tokens_per_s": {str(tokens): 1e6 * tokens / (layers * us(tokens)) for tokens in TOKENS},
            "path": {str(tokens): policy.strategy(tokens) for tokens in TOKENS},
            "switch_points": [list(point) for point in policy.points],
        }

    def describe(self) -> dict:
        """The model and the machine of all points; JSON types only."""
        model = self.model
        return {
            "model": model.base.name,
            "model_type": model.base.model_type,
            "layers": len(model.base.num_experts),
            "experts": max(model.base.num_experts.values()),
            "choices": model.choices,
            "shape": [model.base.intermediate_size, model.base.hidden_size],
            "outside_bytes": self._outside(),
            "kv_bytes_per_token": model.kv_values * self.machine.item_size,
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
) -> dict:
    """What `globe plan` says. Raises RequestError when no point has a way to run within a given budget."""
    model, checkpoint = open_planned(path, base)
    if checkpoint is not None and (lists or any(settings.values())):
        raise RequestError(
            f"{path} is a GloBE checkpoint and has sizes of its own; give no others, or plan for {base}."
        )
    if checkpoint is None:
        planner = Planner(model, machine, budget, cache_bytes)
        plans = [planner.plan(sizes) for sizes in points(model.base, settings, lists)]
    else:
        planner = Planner(replace(model, base=checkpoint.config.base), machine, budget, cache_bytes)
        plans = [planner.plan(checkpoint.config, palettes_of(checkpoint))]
    refused = [one["strategies"][AUTO].get("refused") for one in plans]
    if (budget or cache_bytes) and all(refused):
        raise RequestError(refused[0])
    return {**planner.describe(), "points": plans}
