"""Refuse quantised checkpoints that GloBE cannot read, by the name of their format and with the way out."""

from collections.abc import Iterable

from globe_kernels.errors import RequestError

# quant_method of config.json whose tensors the readers know; the tensors decide which format each weight has
_READ = ("fp8", "mxfp8", "mxfp4", "compressed-tensors", "modelopt", "fbgemm_fp8")
_ORIGINAL = "download the unquantised model that it was made from, and fit that"
# format -> (ends of the names of its tensors, the way out)
_REFUSED = {
    "bitsandbytes": (
        (".absmax", ".SCB"),
        "load it in transformers where bitsandbytes is installed, call model.dequantize() and save it with "
        "save_pretrained(DIRECTORY, save_original_format=False), or, for better weights, "
        "give the unquantised model that it was made from",
    ),
    "gptq": ((".g_idx",), _ORIGINAL),
    "awq": ((".qzeros",), _ORIGINAL),
    "compressed-tensors in the order of activations (actorder)": ((".weight_g_idx",), _ORIGINAL),
}


def require_readable(names: Iterable[str], config: dict) -> None:
    """Raises RequestError when the tensors or `quantization_config` are of a format that GloBE does not read."""
    method = config.get("quant_method")
    for name in names:
        for known, (endings, _) in _REFUSED.items():
            if name.endswith(endings):
                raise _refusal(method if method in _REFUSED else known)
    if method is not None and method not in _READ:
        raise _refusal(str(method))


def _refusal(method: str) -> RequestError:
    _, way_out = _REFUSED.get(method, ((), _ORIGINAL))
    return RequestError(f"The checkpoint is quantised by {method}, which GloBE does not read; {way_out}.")
