"""Find the quantisation that config.json of a model names."""


def quantization_of(config: dict) -> dict:
    """Return `quantization_config`, which a model of several parts may have in its `text_config`; {} without one."""
    return config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config") or {}


def without_quantization(config: dict) -> dict:
    """Return the config.json of the same model without quantisation."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(plain.get("text_config"), dict):
        plain["text_config"] = without_quantization(plain["text_config"])
    return plain
