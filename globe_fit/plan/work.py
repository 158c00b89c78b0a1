"""Count the work of a step of the variable projection: floating point operations and bytes moved, of one family.

For n experts (P, D), atoms (M, R, D) and a support C; of several ranks D are the columns of a rank, W all columns:

    stage               operations              values moved, in fp32
    read                2 n P D                 5 n P D, and n P D as they are stored
    mixture             2 n C R D               n (C + 1) R D
    metric *            2 n (P + R) D W         n (P + R) (D + W)
    gram                2 n R R D               n (R D + R R)
    cross               2 n P R D               n (P D + R D + P R)
    solve               n (R^3 / 3 + 2 R R P)   n (3 R R + 3 P R)
    residual            2 n P R D + 3 n P D     n (P R + R D + 7 P D)
    gradient            2 n P R D + 2 n P D     n (P R + R D + 4 P D)
    metric gradient *   2 n R D W               n R (D + W)
    mixture gradient    4 n C R D               n C R D + 3 M R D
    optimiser           12 M R D                M R D times 16 bytes, and twice the states of Adam

    * of a calibrated fit

Every tensor counts as often as a stage reads or writes it, as if no cache kept it between two stages. C counts the
atoms of an expert after the support is fixed; before, in 2 % of the steps, an expert mixes more. Stages of `_ROUNDED`
round their factors to TF32 on a GPU, the others multiply in fp32.
"""

from dataclasses import asdict, dataclass

from globe_fit.plan.fitting import ADAM_BYTES, FitPlan, estimate
from globe_kernels.format.checkpoint import GlobeConfig
from globe_kernels.format.names import FAMILIES
from globe_kernels.strategies.cost import Machine

_ROUNDED = ("residual", "gradient", "metric gradient")
_TF32_SHARE = 0.5  # of the rate of bf16, on every card that has both


@dataclass(frozen=True)
class Work:
    """The work of a stage of a step, over all experts of a family."""

    flops: float
    bytes: float


def step_work(
    sizes: GlobeConfig, *, calibrated: bool = False, ranks: int = 1, stored_bytes: int = 0
) -> dict[str, Work]:
    """Return {stage: work} of a step of a family, of the rank that has most columns.

    `stored_bytes` are the bytes of the experts of a family as they are stored.
    """
    base, rank, atoms, support = sizes.base, sizes.rank, sizes.num_atoms, sizes.support
    experts, inner, width = base.total_experts, base.intermediate_size, base.hidden_size
    columns = -(-width // ranks)
    weights, bases, bank = experts * inner * columns, experts * rank * columns, atoms * rank * columns
    gram, adapters = experts * rank**2, experts * inner * rank
    product = 2 * inner * bases  # of adapters and bases, and of the same size

    def stage(flops: float, values: float, others: float = 0) -> Work:
        return Work(flops, 4 * values + others)

    work = {
        "read": stage(2 * weights, 5 * weights, stored_bytes * columns / width),
        "mixture": stage(2 * support * bases, (support + 1) * bases),
        "metric": stage(2 * (weights + bases) * width, experts * (inner + rank) * (columns + width)),
        "gram": stage(2 * rank * bases, bases + gram),
        "cross": stage(product, weights + bases + adapters),
        "solve": stage(gram * (rank / 3 + 2 * inner), 3 * gram + 3 * adapters),
        "residual": stage(product + 3 * weights, adapters + bases + 7 * weights),
        "gradient": stage(product + 2 * weights, adapters + bases + 4 * weights),
        "metric gradient": stage(2 * bases * width, experts * rank * (columns + width)),
        "mixture gradient": stage(4 * support * bases, support * bases + 3 * bank),
        "optimiser": stage(12 * bank, 4 * bank, 2 * ADAM_BYTES * bank),
    }
    return {name: of_stage for name, of_stage in work.items() if calibrated or "metric" not in name}


def step_seconds(work: dict[str, Work], machine: Machine) -> float:
    """Predict the seconds of a step at the peak rates of a machine: a real step takes longer.

    A stage takes the longer of its bytes and its operations; on a CPU, where a thread reads and then multiplies, both.
    """
    seconds = 0.0
    for name, of_stage in work.items():
        copying = of_stage.bytes / (1e9 * machine.copy_gb_per_s)
        multiplying = of_stage.flops / (1e12 * _rate(name, machine))
        seconds += max(copying, multiplying) if machine.references is None else copying + multiplying
    return seconds


def on_machine(plan: FitPlan, machine: Machine) -> dict:
    """Predict the bytes of a fit on a machine that need not be here, and the work of a step; JSON types only.

    The work of the alternating solver is not counted.
    """
    sizes, calibrated, ranks = plan.sizes, plan.calibrated, plan.ranks.world
    stored_bytes = plan.source.stored_bytes(FAMILIES[0])
    memory = 1e9 * machine.memory_gb
    is_gpu = machine.references is None
    needs = estimate(
        sizes,
        ranks,
        calibrated=calibrated,
        device="cuda" if is_gpu else "cpu",
        stored_bytes=stored_bytes,
        memory_bytes=memory,
        solver=plan.config.solver,
    )
    least = needs.device_bytes - needs.kept_bytes
    figures = {
        "machine": machine.name,
        "memory_bytes": int(memory),
        "device_bytes": needs.device_bytes,
        "kept_bytes": needs.kept_bytes,
        "host_bytes": needs.host_bytes,
        "fits": (least if is_gpu else least + needs.host_bytes) <= memory,
        "work": None,
        "step_seconds": None,
    }
    if plan.config.solver == "varpro":
        work = step_work(sizes, calibrated=calibrated, ranks=ranks, stored_bytes=stored_bytes)
        figures["work"] = {name: asdict(of_stage) for name, of_stage in work.items()}
        figures["step_seconds"] = step_seconds(work, machine)
    return figures


def _rate(stage: str, machine: Machine) -> float:
    """Return the TFLOP/s of a stage."""
    if machine.fp32_tflop_per_s is None:
        return machine.matmul_tflop_per_s
    return _TF32_SHARE * machine.matmul_tflop_per_s if stage in _ROUNDED else machine.fp32_tflop_per_s
