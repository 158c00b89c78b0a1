import pytest
import torch


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch):
    """What an op allocates and does not write is NaN, so that no test passes on left-over zeros."""
    for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty"), (torch, "empty_like")):
        original = getattr(owner, name)

        def poisoned(*args, _original=original, **kwargs):
            tensor = _original(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() and not tensor.is_meta else tensor

        monkeypatch.setattr(owner, name, poisoned)
