"""Find the quantisation that config.json of a model names."""

from typing import Any, TypedDict

from globe_kernels.format.typed import Size, checked


class _Scheme(TypedDict, total=False):
    type: str | None
    num_bits: Any  # modelopt has [exponent, mantissa] beside numbers
    group_size: int | None  # below 1: none
    symmetric: bool | None
    block_structure: tuple[Size, Size] | None


class _Group(TypedDict, total=False):
    weights: _Scheme | None


class _Quantization(TypedDict, total=False):
    quant_method: str | None
    weight_block_size: tuple[Size, Size] | None
    config_groups: dict[str, _Group] | None


def quantization_of(config: dict) -> dict:
    """Return `quantization_config`, which a model of several parts may have in its `text_config`; {} without one.

    Raises GlobeError for a value of a type that no format has.
    """
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and (found := part.get("quantization_config")):
            return checked(_Quantization, found, "quantization_config in config.json", "download it again")
    return {}


def without_quantization(config: dict) -> dict:
    """Return the config.json of the same model without quantisation."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(plain.get("text_config"), dict):
        plain["text_config"] = without_quantization(plain["text_config"])
    return plain
