"""The files of a model beside its weights that an export takes over, and the dtype that its configuration states."""

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from globe_kernels.format.names import BESIDE_WEIGHTS, LICENCES

_WEIGHTS = ("*.safetensors*", "*.bin*", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx*", "*.npz")


def files_beside(model_dir: Path) -> Iterator[Path]:
    """Yield the files that an export copies, relative to the directory of the base."""
    for path in sorted(model_dir.iterdir()):
        wanted = any(fnmatch(path.name.lower(), pattern) for pattern in BESIDE_WEIGHTS)
        if path.is_dir() and (wanted or any(path.glob("*.py"))):
            inside = sorted(path.rglob("*"))
        else:
            inside = [path] if wanted else []
        for file in inside:
            name = file.relative_to(model_dir)
            is_hidden = any(part.startswith((".", "__pycache__")) for part in name.parts)
            is_weight = any(fnmatch(file.name.lower(), pattern) for pattern in _WEIGHTS)
            if file.is_file() and not is_hidden and not is_weight:
                yield name


def files_of_a_model(directory: Path) -> Iterator[str]:
    """Yield the files in `directory` itself by which a model runs otherwise: its tokenizer, templates and code."""
    for name in files_beside(directory):
        if len(name.parts) == 1 and not any(fnmatch(name.name.lower(), pattern) for pattern in (*LICENCES, "assets")):
            yield name.name


def state_dtype(config: dict, name: str, *, change: bool) -> None:
    """State the dtype `name` in a configuration and its parts, where there is none, or everywhere (`change`).

    transformers reads `dtype`, then `torch_dtype`; without both it takes the dtype of any tensor in the first file.
    """
    stated = [key for key in ("dtype", "torch_dtype") if config.get(key) is not None]
    for key in stated if change else ():
        value = config[key]
        config[key] = dict.fromkeys(value, name) if isinstance(value, dict) else name
    if not stated:
        config["dtype"] = name
    for part in config.values():
        if isinstance(part, dict) and "model_type" in part:
            state_dtype(part, name, change=change)
