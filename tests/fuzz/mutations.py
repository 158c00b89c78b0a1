"""Damage one file of a directory: its bytes, its JSON values, its tensors, or the file as such.

A mutation is drawn from a `random.Random`, so a case can be made again from its number alone.
"""

import json
import os
import struct
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

_DEEP = 10_000
_DEEP_MARK = "the deep value goes here"
# Files that a case may name: beside its own directory, and of kinds that nobody should open.
OUTSIDE = "outside"
CANARY = "canary.safetensors"
FIFO, FOLDER, LINK, LOOP = "odd-fifo", "odd-folder", "odd-link", "odd-loop"
SYSTEM_FILE = "/etc/hostname"


def plant(directory: Path) -> None:
    """Put files of odd kinds into a directory, and files beside it that nobody may read."""
    outside = directory.parent / OUTSIDE
    outside.mkdir(exist_ok=True)
    for name in (CANARY, "config.json"):
        (outside / name).write_text("{}")
    os.mkfifo(directory / FIFO)
    (directory / FOLDER).mkdir()
    (directory / LINK).symlink_to(outside / CANARY)
    (directory / LOOP).symlink_to(LOOP)


def _odd_values(directory: Path) -> list[Any]:
    numbers = [0, -1, 1, 2, 3, 7, 2**16, 10**6, 2**31, 2**31 - 1, 2**40, 2**63, -(2**63), 2**64, 10**400, 1e309, -1e309]
    floats = [float("nan"), 0.5, -0.5, 1e-320, 1e300, -0.0]
    texts = ["", "x", "é\u202e\x1b[31m", "\ud800", "a\nb", "\0", "x" * 300, "y" * 100_000, "0", "-1", "nan", "None"]
    classes = ["AutoConfig", "pipeline", "logging", "LlamaForCausalLM", "kernels-community/flash-attn"]
    names = [*classes, "float32", "torch.float32", "int8", "float8_e4m3fn", "silu", "gelu", "layer", "full_attention"]
    outside = directory.parent / OUTSIDE
    paths = [f"../{OUTSIDE}/{CANARY}", str(outside / CANARY), SYSTEM_FILE, "a\0b", FIFO, FOLDER, LINK, LOOP, ".", ".."]
    paths += [f"{LINK}/x", "config.json", "model.safetensors", "Org/name", "https://example.com/x"]
    others = [None, True, False, [], {}, [None], {"": None}, [[]], [0] * 50, {str(i): i for i in range(50)}, _DEEP_MARK]
    return [*numbers, *floats, *texts, *names, *paths, *others]


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """List the paths to all values inside a JSON value, its own path () first."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += _places(inner, (*path, key))
    return found


def _at(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


def mutate_json(random: Random, data: Any, odd: list[Any]) -> Any:
    """Return `data` with one to three changed values or keys."""
    data = json.loads(json.dumps(data))
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = _places(data)
        # keys near the top decide more than the hundredth number of a list
        depth = random.choice((1, 2, 3, 9))
        path = random.choice([place for place in places if len(place) <= depth])
        if not path:
            if random.random() < 0.05:
                return deepcopy(random.choice(odd))
            continue
        owner, key = _at(data, path[:-1]), path[-1]
        kind = random.randrange(12)
        if kind <= 4:
            owner[key] = deepcopy(random.choice(odd))
        elif kind == 5:
            del owner[key]
        elif kind == 6 and isinstance(owner[key], (int, float)) and not isinstance(owner[key], bool):
            number = owner[key]
            owner[key] = random.choice(
                (number + 1, number - 1, -number, 2 * number, number // 3, str(number), [number])
            )
        elif kind == 7 and isinstance(owner, dict):
            name = random.choice(odd)
            owner[name if isinstance(name, str) else str(key) + random.choice(("_", " ", "x"))] = owner.pop(key)
        elif kind == 8:
            other = random.choice([place for place in places if place] or [path])
            owner[key] = json.loads(json.dumps(_try_at(data, other)))
        elif kind == 9:
            owner[key] = random.choice(([owner[key]], {"x": owner[key]}, [owner[key]] * 3))
        elif kind == 10 and isinstance(owner, dict):
            extra = random.choice(_EXTRA_KEYS)
            owner[extra] = deepcopy(random.choice(odd))
        elif isinstance(owner[key], str) and owner[key]:
            text, place = owner[key], random.randrange(len(owner[key]))
            owner[key] = text[:place] + random.choice(("", "x", "/", "..", "\0", "\n", text)) + text[place + 1 :]
        else:
            owner[key] = deepcopy(random.choice(odd))
    return data


# Keys that transformers gives a meaning to, wherever they stand.
_EXTRA_KEYS = (
    *("num_labels", "id2label", "label2id", "attn_implementation", "experts_implementation", "dtype", "torch_dtype"),
    *(
        "auto_map",
        "architectures",
        "model_type",
        "quantization_config",
        "text_config",
        "transformers_weights",
        "weights",
    ),
    *(
        "num_hidden_layers",
        "layer_types",
        "head_dim",
        "rope_scaling",
        "rope_parameters",
        "sub_configs",
        "attribute_map",
    ),
    *("tie_word_embeddings", "pad_token_id", "vocab_size", "is_encoder_decoder", "palette", "left_dense", "has_bias"),
    *("tokenizer_class", "num_experts_per_tok", "problem_type", "output_attentions", "return_dict", "name_or_path"),
    *("__class__", "__dict__", "use_cache", "files", "fingerprint", "base", "done", "identity", "status", "families"),
)


def _try_at(data: Any, path: tuple) -> Any:
    try:
        return _at(data, path)
    except (KeyError, IndexError, TypeError):
        return None


def to_text(random: Random, data: Any) -> str:
    """Write JSON, at times with a key twice, and with the deep value where its mark stands."""
    text = json.dumps(data)
    if random.random() < 0.03 and isinstance(data, dict) and data:
        key = random.choice(list(data))
        text = text[:-1] + f", {json.dumps(key)}: {json.dumps(random.choice((None, 1, 'x', [], data[key])))}}}"
    depth = random.choice((50, 150, 500, 900, _DEEP))
    deep = random.choice(("[" * depth + "]" * depth, '{"a":' * depth + "0" + "}" * depth))
    return text.replace(json.dumps(_DEEP_MARK), deep, 1)


def mutate_bytes(random: Random, data: bytes) -> bytes:
    """Cut, flip, insert, repeat or drop bytes."""
    if not data:
        return random.randbytes(8)
    place = random.randrange(len(data))
    kind = random.randrange(7)
    if kind <= 1:
        return data[:place]
    if kind == 2:
        changed = bytearray(data)
        for _ in range(random.choice((1, 1, 4, 64))):
            changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
        return bytes(changed)
    if kind == 3:
        return data[:place] + random.randbytes(random.choice((1, 4, 100))) + data[place:]
    length = random.choice((1, 8, 100))
    if kind == 4:
        return data[:place] + data[place + length :]
    if kind == 5:
        return data[: place + length] + data[place:]
    return data[:place] + random.choice((b"\0" * 8, b"\xff" * 8, b"\x80", b"nan", b"1e999", b"{", b'"')) + data[place:]


def mutate_text(random: Random, text: str) -> str:
    """Change words and lines of a text."""
    lines = text.splitlines()
    place = random.randrange(len(lines))
    kind = random.randrange(6)
    if kind == 0:
        del lines[place]
    elif kind == 1:
        lines.insert(random.randrange(len(lines)), lines[place])
    elif kind == 2:
        other = random.randrange(len(lines))
        lines[place], lines[other] = lines[other], lines[place]
    else:
        words = lines[place].split(" ")
        new = ("nan", "inf", "-1", "0", "1e309", str(2**70), "[]", "{}", '"x"', "true", "[" * 2000, "'''", "1979-05-27")
        words[random.randrange(len(words))] = random.choice(new)
        lines[place] = " ".join(words)
    return "\n".join(lines) + "\n"


@dataclass
class _Tensor:
    name: str
    dtype: str
    shape: list
    data: bytes


_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "X")
_ITEM = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
_SPECIAL = {
    "F32": [struct.pack("<f", value) for value in (float("nan"), float("inf"), 3e38, -1e-40)],
    "BF16": [b"\xc0\x7f", b"\x80\x7f", b"\x7f\x7f", b"\x80\xff"],
    "F16": [b"\x00\x7e", b"\x00\x7c", b"\xff\x7b"],
    "I32": [struct.pack("<i", value) for value in (-1, 2**31 - 1, -(2**31), 3, 1000)],
}


def _parse(data: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _build(header: str, body: bytes) -> bytes:
    encoded = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded + body


def _pack(tensors: list[_Tensor], metadata: dict | None) -> tuple[dict, bytes]:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    start = 0
    for tensor in tensors:
        stop = start + len(tensor.data)
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, stop]}
        start = stop
    return header, b"".join(tensor.data for tensor in tensors)


def mutate_safetensors(random: Random, data: bytes, odd: list[Any]) -> bytes:
    """Change the header, the tensors or the length of a safetensors file."""
    header, body = _parse(data)
    metadata = header.pop("__metadata__", None)
    tensors = []
    for name, facts in header.items():
        start, stop = facts["data_offsets"]
        tensors.append(_Tensor(name, facts["dtype"], facts["shape"], body[start:stop]))
    kind = random.randrange(10)
    if kind == 0:
        length = random.choice((0, 1, 2**60, 2**63, 2**64 - 1, 10**8, len(data), len(data) - 8, 100))
        return struct.pack("<Q", length) + data[8:]
    if kind == 1:
        whole, body = _pack(tensors, metadata)
        return _build(to_text(random, mutate_json(random, whole, odd)), body)
    if kind == 2:
        whole, body = _pack(tensors, metadata)
        facts = whole[random.choice(tensors).name]
        size = len(body)
        facts[random.choice(("shape", "data_offsets", "dtype"))] = random.choice(
            (
                [2**40, 2**40],
                [-1, 4],
                [],
                [0],
                [1],
                [size, size],
                [0, size],
                [0, size + 1],
                [size, 0],
                [-1, 0],
                [2**63, 2**64],
            )
        )
        return _build(json.dumps(whole), body)
    if kind == 3:  # a key of the header twice
        whole, body = _pack(tensors, metadata)
        name = random.choice(tensors).name
        text = json.dumps(whole)
        return _build(text[:-1] + f", {json.dumps(name)}: {json.dumps(whole[random.choice(tensors).name])}}}", body)
    # consistent files from here on: the library reads them, and their content is wrong
    tensor = random.choice(tensors)
    if kind == 4:
        tensors.remove(tensor)
    elif kind == 5:
        other = random.choice(tensors)
        tensor.name, other.name = other.name, tensor.name
        if random.random() < 0.3:
            tensor.name = random.choice(
                (f"{tensor.name}x", "", "\x1b[2J", "é" * 300, tensor.name.replace("0", "99", 1))
            )
    elif kind == 6:
        tensor.dtype = random.choice(_DTYPES)
        item = _ITEM.get(tensor.dtype, 1)
        tensor.shape = random.choice(([len(tensor.data) // item], [1, len(tensor.data) // item], [len(tensor.data)]))
        if random.random() < 0.4:  # the same shape in the other dtype
            facts = header[tensor.name]
            count = 1
            for size in facts["shape"]:
                count *= size
            tensor.shape, tensor.data = facts["shape"], random.randbytes(count * item)
    elif kind == 7:
        shape = list(tensor.shape)
        item = len(tensor.data)
        for size in shape:
            item //= max(size, 1)
        if shape:
            place = random.randrange(len(shape))
            shape[place] = random.choice((0, 1, shape[place] + 1, 2 * shape[place], shape[place] - 1))
        shape = random.choice((shape, shape[::-1], [*shape, 1], [1, *shape], shape[1:], [0]))
        count = item
        for size in shape:
            count *= max(size, 0)
        tensor.shape, tensor.data = shape, (tensor.data * 4 + b"\0" * count)[:count]
    elif kind == 8:
        special = random.choice(_SPECIAL.get(tensor.dtype, [b"\xff", b"\x7f", b"\x00"]))
        changed = bytearray(tensor.data)
        for _ in range(random.choice((1, 1, 100))):
            place = random.randrange(max(1, len(changed) // len(special))) * len(special)
            changed[place : place + len(special)] = special
        tensor.data = bytes(changed)
    elif kind == 9:
        metadata = random.choice((None, {}, {"x": "y"}, {key: "x" for key in metadata or ()}))
    return _build(json.dumps(_pack(tensors, metadata)[0]), _pack(tensors, metadata)[1])


def _mutate_content(random: Random, path: Path, data: bytes) -> bytes:
    odd = _odd_values(path.parent)
    if random.random() < 0.25:
        return mutate_bytes(random, data)
    if path.suffix == ".safetensors":
        return mutate_safetensors(random, data, odd)
    if path.suffix == ".jsonl":
        lines = data.decode().splitlines()
        if random.random() < 0.2:
            return mutate_text(random, data.decode()).encode()
        place = random.randrange(len(lines))
        lines[place] = to_text(random, mutate_json(random, json.loads(lines[place]), odd))
        return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")
    if path.suffix == ".json":
        return to_text(random, mutate_json(random, json.loads(data), odd)).encode("utf-8", "surrogatepass")
    return mutate_text(random, data.decode()).encode()


def _replace_file(random: Random, path: Path, data: bytes) -> str:
    outside = path.parent.parent / OUTSIDE
    path.unlink()
    kind = random.choice(
        ("gone", "folder", "fifo", "loop", "dangling", "outside", "sibling", "empty", "noise", "denied")
    )
    siblings = sorted(other.name for other in path.parent.iterdir() if other.is_file() and not other.is_symlink())
    made: dict[str, Callable[[], object]] = {
        "gone": lambda: None,
        "folder": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "loop": lambda: path.symlink_to(path.name),
        "dangling": lambda: path.symlink_to("nothing"),
        "outside": lambda: path.symlink_to(outside / CANARY),
        "sibling": lambda: path.symlink_to(random.choice(siblings or ["nothing"])),
        "empty": path.touch,
        "noise": lambda: path.write_bytes(random.randbytes(200)),
        "denied": lambda: (path.write_bytes(data), path.chmod(0)),
    }
    kind = random.choice(list(made))
    made[kind]()
    return kind


def mutate(random: Random, path: Path, *, is_given: bool = False) -> str:
    """Damage the file `path`; returns a word for the damage.

    `is_given`: a person names the file, which may then be a pipe or a link to anywhere.
    """
    data = path.read_bytes()
    if random.random() < 0.06 and not is_given:
        return _replace_file(random, path, data)
    path.write_bytes(_mutate_content(random, path, data))
    return "content"
