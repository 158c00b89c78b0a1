"""The plots of `globe sweep` and `globe plan`: a colour means one thing, and no text lies on another text."""

from itertools import combinations, product

import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text

from globe_fit.cli.plots import plan_figure, sweep
from globe_fit.plan.serving import plan_all
from globe_kernels.strategies.cost import machine_named


def overlapping(figure) -> list[tuple[str, str]]:
    figure.draw_without_rendering()
    texts = {text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()}
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        beyond = [tick for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high]  # they are not drawn
        texts -= {label for tick in beyond for label in (tick.label1, tick.label2)}
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    return [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.overlaps(other)]


def rows(ratios, ranks, supports, palettes) -> list[dict]:
    found = []
    for ratio, rank, support, palette in product(ratios, ranks, supports, palettes):
        error = 0.1 / ratio * (1 - rank / 200) * (1 - support / 200) * (1.05 if palette else 1)
        size = {"r": rank, "target_support": support, "palette": palette, "ratio": ratio + support / 4000}
        by_family = {"relative_error": error, "svd_equal_bytes": 0.15 / ratio}
        found.append(size | {name: {"gate": value, "up": 1.02 * value} for name, value in by_family.items()})
    return found


def test_a_sweep_has_a_colour_per_rank_and_labels_apart():
    figure = sweep(rows((0.5, 0.625, 0.75), (32, 48, 64), (6, 12), (None, 17)))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["rank 32", "rank 48", "rank 64", "SVD, equal bytes"]
    for axes in figure.axes:
        colours = {line.get_label(): line.get_color() for line in axes.get_lines()}
        assert len({*colours.values()}) == len(colours) == 4
        assert {text.get_text() for text in axes.texts} == {"s6", "s12", "s6 u17", "s12 u17"}
        assert axes.get_xlabel() == "bytes of gate and up over dense" and axes.get_yscale() == "log"
    assert not overlapping(figure)


@pytest.mark.parametrize("ratios", [(0.6,), (0.5, 0.6)])
def test_a_sweep_over_ratios_alone_needs_no_labels(ratios):
    figure = sweep(rows(ratios, (32,), (12,), (None,)))
    assert not any(axes.texts for axes in figure.axes)
    assert not overlapping(figure)


@pytest.mark.parametrize("ranks", [[8], [8, 12, 16]])
def test_a_plan_has_a_colour_per_strategy_and_says_what_is_faster(save_tiny, ranks):
    lists = {"rank": ranks, "atoms": [8], "support": [4]}
    found = plan_all(save_tiny("qwen3_moe"), None, machine_named("h100"), {}, lists)
    figure = plan_figure(found)
    assert not overlapping(figure)
    colours: dict[str, set[str]] = {}
    for times, held in zip(figure.axes[::2], figure.axes[1::2], strict=True):
        assert [text.get_text() for text in times.texts] == ["slower than dense", "dense", "faster than dense"]
        for line in times.get_lines():
            colours.setdefault(str(line.get_label()), set()).add(to_hex(line.get_color()))
        experts = held.containers[1::3]  # of three bars: the rest of the model, the experts, the temporaries
        for name, (bar,) in zip((text.get_text() for text in held.get_yticklabels()), experts, strict=True):
            colours[name].add(to_hex(bar.get_facecolor()))
    assert len(colours) > 3 and all(len(seen) == 1 for seen in colours.values())
    assert len(set.union(*colours.values())) == len(colours)
