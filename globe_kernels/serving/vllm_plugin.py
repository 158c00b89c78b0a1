# pyright: reportMissingImports=false
"""The entry point of group `vllm.general_plugins`."""

from packaging.version import Version

from globe_kernels.errors import warn
from globe_kernels.format.names import QUANT_METHOD

_OLDEST = "0.30"  # from which quantization methods rename the tensors of a checkpoint


def register() -> None:
    """Let vLLM know the quantization method "globe"; vLLM may call this several times in a process.

    A vLLM that GloBE does not fit gets a GlobeWarning alone: it serves other models still.
    """
    import vllm

    try:
        if Version(vllm.__version__) < Version(_OLDEST):
            raise ImportError(f"it is older than {_OLDEST}")
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

        from globe_kernels.serving.vllm_config import GlobeQuantization

        if QUANT_METHOD not in QUANTIZATION_METHODS:
            register_quantization_config(QUANT_METHOD)(GlobeQuantization)
    except Exception as error:  # vLLM calls this for every model
        warn(
            f"vLLM {vllm.__version__} cannot serve GloBE exports ({type(error).__name__}: {error}); install vllm "
            f"{_OLDEST} or a newer version that this GloBE knows, or serve the dense export (globe export --dense)."
        )
