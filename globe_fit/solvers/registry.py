"""Make a solver by the name in the settings of a fit."""

from globe_fit.config import FitConfig
from globe_fit.data.stream import FamilyWeights
from globe_fit.solvers.alternating import Alternating
from globe_fit.solvers.base import BankState, Solver
from globe_fit.solvers.varpro import VarPro
from globe_kernels.format.checkpoint import GlobeConfig


def make_solver(weights: FamilyWeights, state: BankState, sizes: GlobeConfig, config: FitConfig) -> Solver:
    """Return the solver that `config` names; it improves `state` in place."""
    if config.solver == "varpro":
        return VarPro(weights, state, sizes, config.varpro)
    return Alternating(weights, state, sizes, config.alternating)
