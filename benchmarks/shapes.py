"""Layer shapes of real models."""

from dataclasses import dataclass

from globe_kernels.strategies.composed import break_even_rank


@dataclass(frozen=True)
class LayerShape:
    """The routed experts of one layer."""

    hidden: int  # D
    intermediate: int  # P
    experts: int  # E
    choices: int  # K, by the name of the column that recorded rows have

    @property
    def break_even_rank(self) -> int:
        return break_even_rank(self.intermediate, self.hidden)

    def gate_up_values(self, rank: int | None) -> int:
        """Values of gate and up of one expert: dense, or adapter and composed basis of `rank`."""
        if rank is None:
            return 2 * self.intermediate * self.hidden
        return 2 * rank * (self.intermediate + self.hidden)

    def flops(self, tokens: int, rank: int | None, palette: int | None = None) -> float:
        """Floating point operations of all experts for `tokens` tokens; with `palette` nothing is composed."""
        atoms, expert = self._values(rank, palette)
        mixed = 0 if palette is None else self.choices * 2 * palette * (rank or 0)
        return 2.0 * tokens * (atoms + mixed + self.choices * expert)

    def weight_bytes(self, active: int, rank: int | None, item_size: int, palette: int | None = None) -> int:
        """Return the bytes of the weights of `active` experts, each read once; with `palette` nothing is composed."""
        atoms, expert = self._values(rank, palette)
        return (atoms + active * expert) * item_size

    def _values(self, rank: int | None, palette: int | None) -> tuple[int, int]:
        """Values of weights that meet every token, and those of one expert."""
        expert = self.gate_up_values(rank) + self.hidden * self.intermediate
        if rank is None or palette is None:
            return 0, expert
        bases = 2 * rank * self.hidden
        return palette * bases, expert - bases


MODELS = {
    "qwen3-30b-a3b": LayerShape(2048, 768, 128, 8),
    "qwen3-235b-a22b": LayerShape(4096, 1536, 128, 8),
    "mixtral-8x7b": LayerShape(4096, 14336, 8, 2),
    "deepseek-v2-lite": LayerShape(2048, 1408, 64, 6),
    "olmoe": LayerShape(2048, 1024, 64, 8),
    # for a CPU: the proportions of Qwen3-30B-A3B, a fraction of its experts
    "qwen3-small": LayerShape(1024, 384, 16, 4),
}
