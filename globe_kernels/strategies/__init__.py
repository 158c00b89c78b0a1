"""List the strategies; one file defines one strategy. `cost` predicts their time, `budget` chooses among them."""

from globe_kernels.strategies.bank_first import BankFirst
from globe_kernels.strategies.base import Strategy
from globe_kernels.strategies.cached import Cached
from globe_kernels.strategies.composed import Composed
from globe_kernels.strategies.dense import Dense
from globe_kernels.strategies.scratch import Scratch

# One line per strategy; of strategies with equal predicted times a call takes the first.
STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Composed(),
        BankFirst(),
        Cached(),
        Scratch(),
    )
}

# The dense experts, beside which every strategy stands; no checkpoint runs by them.
DENSE = Dense()
