# pyright: reportMissingImports=false
"""The entry point of group `vllm.general_plugins`."""

from globe_kernels.format.names import QUANT_METHOD


def register() -> None:
    """Let vLLM know the quantization method "globe"; vLLM may call this several times in a process."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    from globe_kernels.serving.vllm_config import GlobeQuantization

    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(GlobeQuantization)
