"""Sizes for a purpose: what a preset chooses, and the sentence about the speed of a checkpoint."""

from dataclasses import replace
from pathlib import Path

import pytest

from globe_fit import FitConfig
from globe_fit.plan.presets import TOKENS, speeds, verdict, with_preset
from globe_fit.plan.serving import Planner, read_model
from globe_fit.sizes import resolve_sizes
from globe_kernels import RequestError
from globe_kernels.strategies.cost import machine_named

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))


def planner_of(name: str, machine: str = "h100") -> Planner:
    return Planner(read_model(CONFIGS / f"{name}.json"), machine_named(machine), None, None)


@pytest.mark.parametrize("machine", ["h100", "cpu"])
@pytest.mark.parametrize("name", NAMES)
def test_fast_is_faster_than_dense_and_the_next_rank_is_not(name, machine):
    planner = planner_of(name, machine)
    base = planner.model.base
    config = with_preset(planner, "fast", FitConfig())
    sizes = resolve_sizes(base, config)
    assert sizes.palette == 32 and sizes.num_atoms <= min(base.total_experts, 32 * len(base.num_experts))
    found = speeds(planner.plan(sizes))
    assert tuple(found) == TOKENS == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    assert min(found.values()) >= 1.1
    assert sizes.rank % 16 == 0
    usual = resolve_sizes(base, FitConfig())
    assert sizes.rank <= usual.rank and sizes.tensor_bytes <= usual.tensor_bytes
    if sizes.rank + 16 <= usual.rank:
        larger = resolve_sizes(base, replace(config, rank=sizes.rank + 16))
        assert min(speeds(planner.plan(larger)).values()) < 1.1


def test_the_table_of_the_documents():
    """docs/fitting.md has the figures of every configuration."""
    rows = {}
    for line in (Path(__file__).parents[3] / "docs" / "fitting.md").read_text(encoding="utf-8").splitlines():
        if (cells := [cell.strip() for cell in line.strip("|").split("|")])[0].lower() in NAMES:
            rows[cells[0].lower()] = cells[1:]
    assert sorted(rows) == NAMES
    for name, (usual, sizes, fast) in rows.items():
        planner = planner_of(name)
        slow = speeds(planner.plan(resolve_sizes(planner.model.base, FitConfig()))).values()
        assert usual.removesuffix(" of dense") == f"{min(slow):.2f} to {max(slow):.2f}"
        chosen = resolve_sizes(planner.model.base, with_preset(planner, "fast", FitConfig()))
        planned = planner.plan(chosen)
        assert sizes.startswith(f"rank {chosen.rank}, {chosen.num_atoms} atoms: {planned['ratio']:.2f}")
        quick = speeds(planned).values()
        assert fast == f"{min(quick):.2f} to {max(quick):.2f}"


def test_small_has_the_default_sizes():
    planner = planner_of("qwen3-30b-a3b")
    assert with_preset(planner, "small", FitConfig(support=8)) == FitConfig(support=8)


def test_the_settings_beside_the_sizes_stay():
    planner = planner_of("qwen3-30b-a3b")
    config = with_preset(planner, "fast", FitConfig(support=40, seed=3, phi="tanh"))
    assert (config.support, config.seed, config.phi, config.palette) == (40, 3, "tanh", 40)
    assert min(speeds(planner.plan(resolve_sizes(planner.model.base, config))).values()) >= 1.1


def test_the_verdict():
    planner = planner_of("qwen3-30b-a3b")

    def sentence(config: FitConfig) -> str:
        return verdict(planner, planner.plan(resolve_sizes(planner.model.base, config)))

    usual = sentence(FitConfig())
    slow = speeds(planner.plan(resolve_sizes(planner.model.base, FitConfig())))
    fast = with_preset(planner, "fast", FitConfig())
    quick = speeds(planner.plan(resolve_sizes(planner.model.base, fast)))
    assert usual == (
        f"Predicted on h100: {min(slow.values()):.2f} to {max(slow.values()):.2f} times the speed of dense experts in "
        f"calls of 1 to 512 tokens, the least at {min(slow, key=slow.__getitem__)}; --preset fast (rank {fast.rank}, "
        f"{fast.atoms} atoms, palette 32, ratio 0.31, a larger error) is predicted at {min(quick.values()):.2f} to "
        f"{max(quick.values()):.2f}."
    )
    assert max(slow.values()) < 1 < min(quick.values())
    assert "preset" not in sentence(fast) and sentence(fast).startswith("Predicted on h100: 1.1")


@pytest.mark.parametrize(
    ("preset", "config", "expected"),
    [
        ("quick", FitConfig(), "preset is 'quick'; expected small or fast."),
        ("fast", FitConfig(rank=64), "The preset fast chooses rank, atoms, palette and rank is given too; give the"),
        ("small", FitConfig(ratio=0.5), "The preset small chooses rank, atoms, palette and ratio is given too"),
    ],
)
def test_presets_that_are_refused(preset, config, expected):
    with pytest.raises(RequestError) as error:
        with_preset(planner_of("qwen3-30b-a3b"), preset, config)
    assert expected in str(error.value)


def test_a_model_without_fast_sizes(save_tiny):
    planner = Planner(read_model(save_tiny("qwen3_moe")), machine_named("h100"), None, None)
    with pytest.raises(RequestError, match="No rank of .* is predicted to run faster than dense on h100; leave the"):
        with_preset(planner, "fast", FitConfig(support=4))
    planned = planner.plan(resolve_sizes(planner.model.base, FitConfig(ratio=0.8, support=4)))
    assert verdict(planner, planned).endswith("; no sizes are predicted to be faster than dense.")
