"""Files of tensors that are written a piece at a time."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from globe_fit.run import pieces


def test_the_file_is_the_file_of_safetensors(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "_PIECE_VALUES", 7)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(3, 5, 4, generator=generator)
    tensors = {"bank": numbers, "adam.bank": numbers.double(), "best.bank": numbers.bfloat16(), "used": numbers > 0}
    tensors |= {
        "counters": torch.tensor([3, 1]),
        "step": torch.tensor(2.0),
        "index": numbers.int(),
        "none": torch.ones(0),
    }
    tensors["turned"] = numbers.mT
    pieces.write_in_pieces(tensors, tmp_path / "own", {"facts": '{"a": "ä"}'})
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, tmp_path / "theirs", {"facts": '{"a": "ä"}'})
    assert (tmp_path / "own").read_bytes() == (tmp_path / "theirs").read_bytes()
    pieces.save_file(tensors, tmp_path / "either", {"facts": '{"a": "ä"}'})
    assert (tmp_path / "either").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert load_file(tmp_path / "own").keys() == tensors.keys()
    assert len(list(pieces.pieces(numbers))) == pytest.approx(numbers.numel() / 7, abs=1)
