"""Check the weights of an export while transformers loads it, which fills gaps with random values and warns at most."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from globe_kernels.errors import GlobeError
from globe_kernels.format.checkpoint import exported_bank_key, require_finite
from globe_kernels.format.names import BANK_NAME, FAMILIES
from globe_kernels.format.verification import Verification, verifies
from globe_kernels.model.parallel import here
from globe_kernels.model.renaming import Renaming
from globe_kernels.model.targets import globe_modules


def require_finite_factors(module: nn.Module, where: str, names: Iterable[str]) -> None:
    """Raise GlobeError for factors that have NaN or infinity, but for factors that a device map leaves on disk."""
    for name in names:
        if not (tensor := getattr(module, name)).is_meta:
            require_finite(here(tensor), f"{where}.{name}")


def check_exported_files(files: list[str], model: Any) -> None:
    """Check the tensors of experts and bank: transformers neither stops at a missing tensor nor checks shapes here.

    Raises GlobeError for a damaged file and for a tensor that is missing or of another shape. The experts of a base
    that keeps them one by one are merged by transformers.
    """
    renaming = Renaming(model)
    found: dict[str, tuple[int, ...]] = {}
    pieces: dict[str, list[tuple[int, ...]]] = {}
    floats = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for file in files:
        for key, (shape, dtype) in _headers_in(Path(file)).items():
            live = renaming.live(key)
            if live.key in floats and not dtype.startswith(("F", "BF")):
                raise GlobeError(
                    f"{key} is stored as {dtype} in {file} and holds fractions; export the checkpoint again."
                )
            if len(shape) == 2 and live.converter is not None:
                pieces.setdefault(live.key, []).append(shape)
            else:
                found[live.key] = shape
    bank = getattr(model, BANK_NAME)
    expected = {exported_bank_key(family): tuple(getattr(bank, family).shape) for family in FAMILIES}
    for path, module in globe_modules(model).items():
        expected |= {f"{path}.{name}": tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for key, shapes in pieces.items():
        # transformers merges the experts that it finds, however many there are
        if (shape := expected.pop(key, None)) and shapes != [shape[1:]] * shape[0]:
            raise GlobeError(
                f"{key} is in {len(shapes)} matrices in the model's safetensors files, from {min(shapes)} to "
                f"{max(shapes)}, and config.json says {shape}; export the checkpoint again."
            )
    for key, shape in expected.items():
        if (actual := found.get(key)) != shape:
            raise GlobeError(
                f"{key} is {actual or 'missing'} in the model's safetensors files and config.json says {shape}; "
                "export the checkpoint again."
            )


def verification(files: list[str], recorded: dict[str, str]) -> Verification | None:
    """Begin to compare the files of an export with their recorded sha256, which older exports do not have.

    Returns None where nothing is compared. Raises GlobeError when other files are loaded than the export has.
    """
    loaded = {Path(file).name for file in files}
    if recorded and (other := loaded ^ recorded.keys()):
        raise GlobeError(
            f"config.json records the files {', '.join(sorted(recorded))} and the weights are in "
            f"{', '.join(sorted(loaded))}: {min(other)} is of another export; export the checkpoint again."
        )
    if not recorded or not verifies():
        return None
    found = Verification(Path(files[0]).parent, recorded, "export the checkpoint again")
    found.begin()
    return found


def _headers_in(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return {key: (shape, name of the dtype in safetensors)} of a file."""
    try:
        if file.exists() and not file.is_file():  # a pipe would wait for a writer
            raise OSError("it is no file")
        with safe_open(file, framework="pt") as handle:
            slices = {key: handle.get_slice(key) for key in list(handle.keys())}
            return {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: torch cannot map the file
        if file.exists():
            raise GlobeError(f"{file} is truncated or damaged ({error}); export the checkpoint again.") from error
        raise GlobeError(
            f"{file} is gone: another export took its place while this export was loaded, or somebody removed the "
            "file; load the directory again."
        ) from error


def require_all_weights(model: Any) -> None:
    """Refuse a model with weights that no file held: transformers gives them random values, and warns at most.

    The new head of a task that the export was not made for is no such weight. A tensor on the meta device is on disk.
    """
    body, head = f"{model.base_model_prefix}.", model.get_output_embeddings()
    heads = set() if head is None else set(head.parameters())
    is_body = getattr(model, model.base_model_prefix, None) is None
    own = {*model.parameters(), *model.buffers()}  # the state_dict may hold a quantizer's tensors in their place
    for name, tensor in model.state_dict(keep_vars=True).items():
        belongs = is_body or name.startswith(body) or tensor in heads
        if belongs and tensor in own and not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False):
            raise GlobeError(
                f"{name} is missing in the model's safetensors files, and transformers gave it random values; restore "
                "the files or export the checkpoint again."
            )
