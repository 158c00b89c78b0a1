import torch

from globe_fit.data.stream import FamilyWeights
from globe_fit.linalg import truncated_svd
from globe_fit.measure.baselines.svd import equal_byte_rank, svd_errors
from globe_fit.sizes import globe_bytes
from globe_kernels.format.checkpoint import BaseModel
from globe_kernels.testing import assert_close


def test_errors_are_those_of_the_truncated_factors(noise):
    weights = FamilyWeights.measure(noise, "gate", "cpu")
    ranks = (0, 2, 5)
    for rank, error in zip(ranks, svd_errors(weights, ranks), strict=True):
        lost = energy = 0.0
        for experts in noise.weights.values():
            left, right = truncated_svd(experts, rank)
            lost += (experts - left @ right).square().sum().item()
            energy += experts.square().sum().item()
        assert abs(error - lost / energy) < 1e-5


def test_truncated_svd_is_the_best_of_its_rank(noise):
    experts = noise.weights[0]
    u, s, v = torch.linalg.svd(experts.double(), full_matrices=False)
    best = u[..., :3] * s[:, None, :3] @ v[:, :3]
    left, right = truncated_svd(experts, 3)
    assert_close(left @ right, best, rms=1e-5, peak=1e-5)


def test_equal_bytes_means_that_one_more_rank_does_not_fit():
    base = BaseModel("planned", "qwen3_moe", 2048, 768, dict.fromkeys(range(48), 128))
    num_bytes = globe_bytes(base, 768, 1536, 12)
    rank = equal_byte_rank(base, num_bytes)
    per_rank = 2 * 6144 * (768 + 2048) * 2
    assert rank * per_rank <= num_bytes < (rank + 1) * per_rank
