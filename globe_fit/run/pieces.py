"""Write tensors of a GPU to a safetensors file a piece at a time, so that the host never holds a whole tensor."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch

_PIECE_VALUES = 2**24  # 64 MiB of float32
_NAMES = {  # in the order of the files, so that values are aligned
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.bool: "BOOL",
}


def pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in order, each piece in host memory while it is in use."""
    for part in tensor.detach().contiguous().flatten().split(_PIECE_VALUES):
        yield part.cpu().view(torch.uint8).numpy().data


def save_file(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write the file that safetensors writes.

    safetensors writes tensors of the host where they are, and copies all tensors of a GPU to the host first.
    """
    if all(tensor.device.type == "cpu" for tensor in tensors.values()):
        safetensors.torch.save_file({n: tensor.contiguous() for n, tensor in tensors.items()}, path, metadata=metadata)
    else:
        write_in_pieces(tensors, path, metadata)


def write_in_pieces(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write the file by the format: the length of the header (8 bytes), the header in JSON, the values in its order."""
    header: dict[str, dict] = {"__metadata__": metadata}
    end = 0
    places = {dtype: number for number, dtype in enumerate(_NAMES)}
    ordered = sorted(tensors.items(), key=lambda item: (places[item[1].dtype], item[0]))
    for name, tensor in ordered:
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            for piece in pieces(tensor):
                file.write(piece)
