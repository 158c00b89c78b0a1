# pyright: reportMissingImports=false
"""The entry point of group `vllm.general_plugins`."""

from packaging.version import Version

from globe_kernels.errors import warn
from globe_kernels.format.names import QUANT_METHOD

_OLDEST = "0.30"  # from which quantization methods rename the tensors of a checkpoint


def register() -> None:
    """Let vLLM know the quantization method "globe"; vLLM may call this several times in a process.

    An older vLLM gets a GlobeWarning alone: it serves other models still.
    """
    import vllm

    if Version(vllm.__version__) < Version(_OLDEST):
        warn(
            f"vLLM {vllm.__version__} cannot serve GloBE exports; install vllm {_OLDEST} or newer, or serve the dense "
            "export (globe export --dense)."
        )
        return
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    from globe_kernels.serving.vllm_config import GlobeQuantization

    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(GlobeQuantization)
