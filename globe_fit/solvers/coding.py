"""Find the codes of many experts at once: entmax, non-negative and masked least squares, matching pursuit.

Symbols: E experts, M atoms, S atoms of a support. The least-squares problems are given by their normal equations,

    minimise  a^T gram a - 2 cross^T a,    gram_jk = <B_j, B_k>,  cross_ij = <X_i, B_j>

so that neither targets nor atoms are held here.
"""

import math
from importlib.util import find_spec

import torch

from globe_fit.linalg import solve_spd
from globe_fit.solvers.base import support_index
from globe_kernels.errors import RequestError

_SWEEPS = 200
_PROJECTIONS = 300
_SETTLED = 1e-6  # of the largest code: smaller changes end the descent


def require_entmax() -> None:
    """Require the package entmax; raise RequestError without it."""
    if find_spec("entmax") is None:
        raise RequestError(
            'Codes on the simplex need the package entmax; install it (pip install "globe-moe[fit]"), or give '
            "coding.method least_squares and coding.initial nnls."
        )


def entmax(scores: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return argmax_p p^T z + H_alpha(p) on the simplex for scores z (E, M), differentiable; 0 where z is -inf.

    p_j = max((alpha - 1) z_j - tau, 0)^(1 / (alpha - 1)), with tau so that p sums to 1; alpha 2 is sparsemax, towards 1
    softmax (Martins and Astudillo, 2016; Peters, Niculae and Martins, 2019).
    """
    from entmax import entmax15, entmax_bisect, sparsemax  # of the extra "fit"

    # the bisection of the package loses its threshold in the rounding of large scores; p does not depend on the shift
    shifted = scores - scores.detach().amax(1, keepdim=True)
    if alpha == 2.0:
        return sparsemax(shifted, dim=1)
    return entmax15(shifted, dim=1) if alpha == 1.5 else entmax_bisect(shifted, alpha, dim=1)


def entmax_scores(codes: torch.Tensor, slack: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return scores z (E, M) with entmax(z) = codes / sum; where a code is 0, z falls with its slack (E, M) >= 0.

    With equal scores, all unused atoms would join at once when the temperature rises.
    """
    share = codes / codes.sum(1, keepdim=True).clamp_min(1e-12)
    slack = slack * (codes == 0)
    return share.pow(alpha - 1) / (alpha - 1) - slack / slack.mean(1, keepdim=True).clamp_min(1e-12)


def next_temperature(temperature: float, median_support: float, target: int, eta: float) -> float:
    """Return T exp(-eta (median / target - 1)), from 1e-4 to 1e4.

    A larger T gives a larger support of entmax(z / T), so the minus sign is stable. The bounds keep T finite where the
    support does not answer.
    """
    return min(max(temperature * math.exp(-eta * (median_support / target - 1)), 1e-4), 1e4)


def non_negative(
    gram: torch.Tensor, cross: torch.Tensor, allowed: torch.Tensor, l1: torch.Tensor | float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes (E, M) >= 0, zero where not allowed, and their slack (E, M): the gradient, 0 on the support.

    Coordinate descent, all experts at once (Franc, Hlavac and Navara, 2005); `l1` adds 2 l1 sum_j a_j.
    """
    codes = torch.zeros_like(cross)
    gradient = l1 - cross
    curvature = gram.diagonal()
    for _ in range(_SWEEPS):
        moved = torch.zeros((), device=cross.device)
        for atom in curvature.nonzero()[:, 0].tolist():
            old = codes[:, atom]
            new = (old - gradient[:, atom] / curvature[atom]).clamp_min(0) * allowed[:, atom]
            change = new - old
            gradient.addmm_(change[:, None], gram[atom, None])
            codes[:, atom] = new
            moved = torch.maximum(moved, change.abs().max())
        if moved <= _SETTLED * codes.max():
            break
    return codes, gradient.clamp_min(0) * (codes == 0)


def on_simplex(gram: torch.Tensor, cross: torch.Tensor, allowed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes (E, M) on the simplex, zero where not allowed, and their slack (E, M).

    The slack is the gradient less the gradient on the support. Accelerated projected gradient (Beck and Teboulle,
    2009); sparsemax is the projection.
    """
    step = 1 / torch.linalg.eigvalsh(gram)[-1].clamp_min(1e-30)
    codes = ahead = allowed / allowed.sum(1, keepdim=True)
    momentum = 1.0
    for _ in range(_PROJECTIONS):
        moved = (ahead - step * (ahead @ gram - cross)).masked_fill(~allowed, -torch.inf)
        new = entmax(moved, 2.0)
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = new + (momentum - 1) / following * (new - codes)
        momentum, codes = following, new
    gradient = codes @ gram - cross
    level = (gradient * codes).sum(1, keepdim=True)
    return codes, (gradient - level).clamp_min(0) * (codes == 0)


def matching_pursuit(gram: torch.Tensor, cross: torch.Tensor, allowed: torch.Tensor, support: int) -> torch.Tensor:
    """Return codes (E, M) with at most `support` atoms, by orthogonal matching pursuit (Pati et al., 1993)."""
    chosen = torch.zeros_like(allowed)
    codes = torch.zeros_like(cross)
    norm = gram.diagonal().clamp_min(1e-30).sqrt()
    for size in range(1, support + 1):
        residual = (cross - codes @ gram).abs() / norm
        best = residual.masked_fill(~allowed | chosen, -1).argmax(1, keepdim=True)
        chosen.scatter_(1, best, True)
        index, valid = support_index(chosen & allowed, size)
        codes = masked_least_squares(
            gram[index[:, :, None], index[:, None, :]], cross.gather(1, index), codes, index, valid
        )[0]
    return codes


def masked_least_squares(
    gram: torch.Tensor, cross: torch.Tensor, codes: torch.Tensor, index: torch.Tensor, valid: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Return codes (E, M) that minimise each objective on its support, and how often the ridge was raised.

    `index` and `valid` (E, S) are of `support_index`; `gram` (E, S, S) and `cross` (E, S) are restricted to the
    support; `codes` (E, M) are the codes before. The ridge acts on the change of the codes: no ridge, however large,
    can raise the objective.
    """
    before = codes.gather(1, index) * valid
    gram = gram * valid[:, :, None] * valid[:, None, :]
    left = cross * valid - (gram @ before[:, :, None])[:, :, 0]
    change, raised = solve_spd(gram, left[:, :, None])
    values = (before + change[:, :, 0]) * valid
    return torch.zeros_like(codes).scatter_(1, index, values), raised
