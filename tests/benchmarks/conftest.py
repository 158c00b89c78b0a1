from tests.fit.conftest import noise
from tests.kernels.conftest import poison_empty

__all__ = ["noise", "poison_empty"]
