"""Name the experts of each Mixture-of-Experts architecture: on disk, in config.json, in the live model.

One registry entry per architecture; no other file of the product names an architecture.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from globe_kernels.errors import RequestError
from globe_kernels.format.names import FAMILIES

# Spellings of the number of routed experts, over all architectures and versions of config.json.
_NUM_EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")

# The live path in transformers 5: the same for every architecture below.
_LIVE = re.compile(r"(?:^|\.)layers\.(?P<layer>\d+)\.mlp\.experts$")


@dataclass(frozen=True)
class ExpertKey:
    """One tensor of routed experts on disk. `expert` is None for a fused (E, ...) tensor."""

    layer: int
    expert: int | None
    matrix: str  # "gate", "up", "down", and of fused tensors "gate_up", "gate_up_bias" or "down_bias"


@dataclass(frozen=True)
class Architecture:
    """One architecture: the names of its expert matrices on disk and its keys in config.json."""

    model_type: str
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    router: str = "gate"
    block: str = "mlp"
    intermediate_key: str = "moe_intermediate_size"
    has_bias: bool = False  # gate, up and down of every expert have one
    transposed: bool = False  # fused weights have the input dimension first
    interleaved: bool = False  # the fused outputs are g0, u0, g1, u1, ... instead of gate first
    activation: str | None = None  # None: hidden_act of the configuration names it

    def parse_key(self, key: str) -> ExpertKey | None:
        """Return the routed-expert tensor that `key` names in a checkpoint; None for any other tensor."""
        match = re.fullmatch(
            rf"(?:model\.)?layers\.(\d+)\.(?:mlp|{self.block})\.experts\."
            rf"(?:(\d+)\.({self.gate}|{self.up}|{self.down})\.weight|((?:gate_up_proj|down_proj)(?:_bias)?))",
            key,
        )
        if match is None:
            return None
        layer, expert, name, fused = match.groups()
        if fused:
            return ExpertKey(int(layer), None, fused.replace("_proj", ""))
        matrix = {self.gate: "gate", self.up: "up", self.down: "down"}[name]
        return ExpertKey(int(layer), int(expert), matrix)

    def router_key(self, expert_key: str) -> str:
        """Return the key of the router's weights (E, D), which stand beside an expert tensor on disk."""
        return f"{expert_key.partition('.experts.')[0]}.{self.router}.weight"

    def live_key(self, key: str) -> str:
        """Return `key` as the live base model names it: transformers renames blocks and the prefix when it saves."""
        return key.replace(f".{self.block}.experts.", ".mlp.experts.").removeprefix("model.")

    def fused_shapes(self, num_experts: int, inner: int, width: int) -> dict[str, tuple[int, ...]]:
        """Return {name: shape} of one layer's experts, in a live module and in a fused checkpoint."""
        shapes: dict[str, tuple[int, ...]] = {
            "gate_up_proj": (num_experts, 2 * inner, width),
            "down_proj": (num_experts, width, inner),
        }
        if self.transposed:
            shapes = {name: (num_experts, columns, rows) for name, (_, rows, columns) in shapes.items()}
        if self.has_bias:
            shapes |= {"gate_up_proj_bias": (num_experts, 2 * inner), "down_proj_bias": (num_experts, width)}
        return shapes

    def canonical(self, weights: torch.Tensor) -> torch.Tensor:
        """View fused weights with the output dimension first: (E, 2P, D) or (E, D, P)."""
        return weights.mT if self.transposed else weights

    def part(self, fused: torch.Tensor, family: str) -> torch.Tensor:
        """View one family of `gate_up_proj`, (E, P, D), or of its bias, (E, P)."""
        rows = self.canonical(fused) if fused.ndim == 3 else fused
        place = FAMILIES.index(family)
        return rows[:, place::2] if self.interleaved else rows.chunk(2, dim=1)[place]

    def kept(self, name: str, fused: torch.Tensor) -> dict[str, torch.Tensor]:
        """View the fused tensor `name`, which is not compressed, as {parameter of GlobeMoEFFN: view}."""
        if name == "gate_up_proj_bias":
            return {f"{family}_bias": self.part(fused, family) for family in FAMILIES}
        return {"down_bias": fused} if name == "down_proj_bias" else {"down_proj": self.canonical(fused)}

    def num_experts(self, config: dict) -> int:
        for key in _NUM_EXPERTS_KEYS:
            if config.get(key) is not None:
                return int(config[key])
        raise RequestError(
            f"config.json has none of {', '.join(_NUM_EXPERTS_KEYS)}, so this {self.model_type} model has no "
            "routed experts; pass the directory of a Mixture-of-Experts model."
        )

    def top_k(self, config: dict) -> int:
        """Return K, the experts per token."""
        return int(config["num_experts_per_tok"])

    def intermediate_size(self, config: dict) -> int:
        return int(config[self.intermediate_key])

    def moe_layers(self, config: dict) -> list[int]:
        """List the ids of the layers that hold routed experts, by the rules of the configuration."""
        dense = set(config.get("mlp_only_layers") or ())
        step = config.get("decoder_sparse_step") or 1
        first = config.get("first_k_dense_replace") or 0
        frequency = config.get("moe_layer_freq") or 1
        if isinstance(frequency, list):  # one flag per layer
            dense |= {layer for layer, flag in enumerate(frequency) if not flag}
            frequency = 1
        return [
            layer
            for layer in range(int(config["num_hidden_layers"]))
            if layer >= first and layer not in dense and (layer + 1) % step == 0 and layer % frequency == 0
        ]

    def live_experts(self, model) -> Iterator[tuple[int, str]]:
        """Yield (layer id, module name) of every routed-experts module of a live transformers model."""
        for path, _ in model.named_modules():
            match = _LIVE.search(path)
            if match:
                yield int(match["layer"]), path


ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (
        Architecture("qwen2_moe"),
        Architecture("qwen3_moe"),
        Architecture("olmoe", intermediate_key="intermediate_size"),
        Architecture(
            "mixtral",
            gate="w1",
            up="w3",
            down="w2",
            block="block_sparse_moe",
            intermediate_key="intermediate_size",
        ),
        Architecture("deepseek_v2"),
        Architecture("deepseek_v3"),
        Architecture("glm4_moe"),
        Architecture(
            "gpt_oss",
            router="router",
            intermediate_key="intermediate_size",
            has_bias=True,
            transposed=True,
            interleaved=True,
            activation="clamped_swiglu",
        ),
    )
}


def architecture_of(model_type: str | None) -> Architecture:
    """Return the registry entry of a `model_type`. Raises RequestError for a model that GloBE cannot take apart."""
    architecture = ARCHITECTURES.get(model_type or "")
    if architecture is None:
        raise RequestError(
            f"model_type {model_type!r} is not a Mixture-of-Experts architecture that GloBE knows; "
            f"expected one of {', '.join(sorted(ARCHITECTURES))}."
        )
    return architecture
