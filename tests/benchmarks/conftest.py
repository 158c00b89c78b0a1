from tests.kernels.conftest import poison_empty

__all__ = ["poison_empty"]
