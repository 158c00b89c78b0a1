"""Whole models to measure: dense with the gate and up experts that a GloBE checkpoint stands for, and patched."""

import copy
import ctypes
import gc
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from shapes import MODELS
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import globe_kernels
from globe_fit import ExpertSource, FitConfig, VarProConfig, fit, save_fit
from globe_fit.cli.demo import shipped_model
from globe_fit.data.model import load_model, token_windows
from globe_fit.result import LayerFactors, reconstruct
from globe_kernels.format.checkpoint import BaseModel, Code, GlobeCheckpoint, GlobeConfig, writing_checkpoint
from globe_kernels.format.names import BANK_NAME, FAMILIES
from globe_kernels.model.discovery import routed_experts
from globe_kernels.model.targets import globe_modules, is_patched, remove_bank
from globe_kernels.strategies import DENSE, STRATEGIES
from globe_kernels.strategies.base import Palettes
from globe_kernels.strategies.budget import palettes_of, resident, strategies_of
from globe_kernels.strategies.cached import pool_bytes

SHIPPED = "tiny_moe"
_SUPPORT = 12  # atoms of one expert
_FIT_STEPS = 10
_VOCABULARY = 1024
_FEW_SLOTS = "A layer of this checkpoint uses"  # a warning about bank_first, which is measured here


@dataclass(frozen=True)
class Subject:
    """A dense model in fp32 and the checkpoint that its gate and up experts are reconstructed from."""

    name: str
    dense: Any
    path: Path
    tokens: torch.Tensor  # (N,) to run it on, on its device
    is_text: bool

    @property
    def config(self) -> GlobeConfig:
        return GlobeCheckpoint(self.path).config

    @property
    def palettes(self) -> Palettes:
        return palettes_of(GlobeCheckpoint(self.path))

    @property
    def choices(self) -> int:
        return self.dense.config.num_experts_per_tok

    @property
    def shape(self) -> dict[str, int]:
        """Sizes that every row gives."""
        base, palettes = self.config.base, self.palettes
        return {
            "hidden": base.hidden_size,
            "intermediate": base.intermediate_size,
            "experts": max(base.num_experts.values()),
            "choices": self.choices,
            "rank": self.config.rank,
            "palette": int(max(used for own in palettes.values() for used in own.values())),
            "layers": len(base.num_experts),
        }


@dataclass(frozen=True)
class Variant:
    """A subject with its dense experts, or run by a strategy."""

    name: str
    strategy: str  # dense, or as globe_kernels.patch takes it
    cache_bytes: int | None = None


def variants(config: GlobeConfig, item_size: int, shares: list[float]) -> list[Variant]:
    """List dense, every strategy, strategies with a pool of each percentage of all bases, and auto."""
    found = [Variant(DENSE.name, DENSE.name)]
    for name in strategies_of(config):
        if STRATEGIES[name].takes_pool:
            found += [Variant(f"{name}_{share:g}%", name, cache_of(config, share, item_size)) for share in shares]
        else:
            found.append(Variant(name, name))
    return [*found, Variant("auto", "auto")]


def cache_of(config: GlobeConfig, share: float, item_size: int) -> int:
    """Return the bytes of a cache of `share` percent of all bases, at least one."""
    return pool_bytes(config, max(1, round(share / 100 * config.base.total_experts)), item_size)


def shipped(directory: Path, rank: int | None, palette: int | None, device: str) -> Subject:
    """Fit the model that ships with the project, in a few steps."""
    source = ExpertSource(shipped_model())
    settings = FitConfig(
        ratio=0.625, rank=rank, support=_SUPPORT, palette=palette or 16, varpro=VarProConfig(steps=_FIT_STEPS)
    )
    save_fit(fit(source, settings), source, directory)
    dense = load_model(shipped_model(), device, torch.float32)
    windows = token_windows(shipped_model(), shipped_model() / "heldout.txt")
    return _reconstructed(SHIPPED, dense, directory, windows.flatten().to(device), is_text=True)


def random(name: str, layers: int, rank: int | None, palette: int | None, directory: Path, device: str) -> Subject:
    """Make a model of random weights and random factors, in the sizes of MODELS[name], with a small vocabulary."""
    shape = MODELS[name]
    heads = max(1, shape.hidden // 128)
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=_VOCABULARY,
        hidden_size=shape.hidden,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=128,
        num_hidden_layers=layers,
        num_experts=shape.experts,
        num_experts_per_tok=shape.choices,
        moe_intermediate_size=shape.intermediate,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=0,
    )
    with torch.device(device):
        dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        tokens = torch.randint(_VOCABULARY, (2**15,))
    for experts in routed_experts(dense).values():
        # outputs of order one: the experts must matter to the logits that are compared
        nn.init.normal_(experts.module.down_proj, std=shape.intermediate**-0.5)
    used = palette or max(_SUPPORT, shape.experts // 4)
    _write_random(name, layers, rank or shape.intermediate // 2, used, directory, device)
    return _reconstructed(name, dense, directory, tokens, is_text=False)


def _write_random(name: str, layers: int, rank: int, palette: int, directory: Path, device: str) -> None:
    """Write a checkpoint whose experts mix 12 atoms at random out of `palette` per layer and family."""
    shape = MODELS[name]
    support, atoms = min(_SUPPORT, palette), max(palette, layers * shape.experts // 4)
    base = BaseModel(name, "qwen3_moe", shape.hidden, shape.intermediate, dict.fromkeys(range(layers), shape.experts))
    dtype = "float32" if device == "cpu" else "bfloat16"
    config = GlobeConfig(base, rank, atoms, support, palette=palette, dtype=dtype)

    def draw(*sizes: int) -> torch.Tensor:
        return (torch.randn(*sizes, device=device) / sizes[-1] ** 0.5).to(config.torch_dtype)

    with writing_checkpoint(directory, config, {family: draw(*config.bank_shape()) for family in FAMILIES}) as writer:
        for layer in range(layers):
            for family in FAMILIES:
                own = torch.randperm(atoms)[:palette]
                index = own[torch.rand(shape.experts, palette).topk(support).indices].int()
                code = Code(index, torch.randn(shape.experts, support) / support**0.5)
                adapter = draw(shape.experts, shape.intermediate, rank)
                writer.add_layer(layer, family, LayerFactors(adapter, code))
        writer.finish({}, [])


def _reconstructed(name: str, dense: Any, path: Path, tokens: torch.Tensor, is_text: bool) -> Subject:
    checkpoint = GlobeCheckpoint(path)
    banks = {family: checkpoint.bank(family).to(dense.device) for family in FAMILIES}

    def weights(layer: int, family: str) -> torch.Tensor:
        factors = checkpoint.layer(layer, family)
        code = Code(factors.code.index.to(dense.device), factors.code.value.to(dense.device))
        return reconstruct(LayerFactors(factors.adapter.to(dense.device), code), banks[family], "identity")

    for layer, experts in routed_experts(dense).items():
        experts.module.gate_up_proj.data.copy_(torch.cat([weights(layer, family) for family in FAMILIES], dim=1))
    return Subject(name, dense, path, tokens, is_text)


def build(subject: Subject, variant: Variant, dtype: torch.dtype) -> Any:
    """Copy the model of a variant, with nothing mapped from a file."""
    model = copy.deepcopy(subject.dense).to(dtype)
    if variant.strategy != DENSE.name:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", _FEW_SLOTS)
            globe_kernels.patch(model, subject.path, strategy=variant.strategy, cache_bytes=variant.cache_bytes)
    if model.device.type == "cpu":
        # safetensors maps its files, and what is mapped is not counted as anonymous memory
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
    return model


def planned_bytes(subject: Subject, model: Any) -> int:
    """Plan the bytes that the experts of `model` hold on its device; on a CPU with the parked bank."""
    item_size = model.dtype.itemsize
    if not is_patched(model):
        return resident(subject.config, (DENSE.name,), item_size=item_size).total
    arrangement = getattr(model, BANK_NAME).arrangement
    found = resident(
        subject.config,
        arrangement.strategies,
        item_size=item_size,
        cache_bytes=arrangement.cache_bytes,
        palettes=subject.palettes,
    )
    return found.total + (found.host if model.device.type == "cpu" else 0)


def experts_of(model: Any) -> dict[str, Any]:
    """{path: module} of the routed experts, dense or GloBE."""
    return globe_modules(model) or {dense.name: dense.module for dense in routed_experts(model).values()}


def measured_bytes(subject: Subject, variant: Variant, dtype: torch.dtype) -> tuple[int, int]:
    """Return (measured, planned): the bytes that a model loses with its experts and bank, and `planned_bytes`."""
    model = build(subject, variant, dtype)
    planned, device = planned_bytes(subject, model), model.device.type
    _touch(model)
    before = _held_bytes(device)
    if is_patched(model):
        remove_bank(model)
    for path in experts_of(model):
        model.set_submodule(path, nn.Identity())
    return before - _held_bytes(device), planned


def _touch(model: Any) -> None:
    """Write the pools of caches: memory that was never written is not resident yet."""
    for name, buffer in model.named_buffers():
        if name.endswith("cache.pool"):
            buffer.zero_()


def _held_bytes(device: str) -> int:
    """Return the bytes that torch has allocated on a GPU; on a CPU the anonymous memory of the process."""
    gc.collect()
    if device == "cuda":
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    # counted page by page: /proc/self/status may be off by what each core has not added up yet
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    # a busy machine writes pages to its swap, which the process still holds
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Anonymous:", "Swap:")))
