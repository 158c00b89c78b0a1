"""Draw the figures of README.md and docs/, as SVG beside this script.

python docs/figures/draw.py            writes method.svg, fit.svg and strategies.svg
"""

from pathlib import Path

from drawing import ATOMS, Drawing

HERE = Path(__file__).parent
# Atoms of four experts in each of three layers, as places in the bank.
_CODES = (
    ((0, 1, 4), (0, 2, 1), (1, 0, 6), (2, 1, 7)),
    ((3, 0, 2), (3, 4, 5), (4, 3, 1), (2, 3, 7)),
    ((6, 5, 0), (5, 7, 6), (7, 6, 3), (6, 7, 4)),
)
_ROWS = ((92, "layer 1"), (140, "layer 2"), (208, "layer L"))


def method() -> Drawing:
    """The experts of all layers before and after, and the formula of one expert."""
    picture = Drawing(
        900,
        460,
        "Dense experts each keep a weight matrix; GloBE experts keep an adapter and a few codes over one shared bank.",
    )
    picture.text(28, 38, "Dense", "ink title")
    picture.text(28, 62, "Each expert stores its own gate and up matrix.", "soft")
    picture.text(474, 38, "GloBE", "ink title")
    picture.text(474, 62, "Each expert stores an adapter and a few codes.", "soft")
    for (top, label), codes in zip(_ROWS, _CODES, strict=True):
        picture.text(28, top + 22, label, "soft small")
        for number in range(4):
            picture.box(90 + 66 * number, top, 54, 34, "dense")
        picture.text(90 + 66 * 4, top + 22, "…", "soft")
        for number, atoms in enumerate(codes):
            left = 474 + 52 * number
            picture.box(left, top, 12, 34, "adapter")
            for place, atom in enumerate(atoms):
                picture.box(left + 16, top + 12 * place, 16, 10, ATOMS[atom])
        picture.text(474 + 52 * 4, top + 22, "…", "soft")
    picture.text(194, 194, "⋮", "soft")
    picture.text(560, 194, "⋮", "soft")
    picture.text(411, 140, "globe fit", "ink small", "middle")
    picture.arrow((374, 150), (448, 150))

    picture.text(722, 92, "One bank of atoms,", "ink")
    picture.text(722, 111, "for all layers", "ink")
    for number, colour in enumerate(ATOMS):
        picture.box(722 + 76 * (number % 2), 124 + 30 * (number // 2), 68, 22, colour)

    middle = 336
    picture.text(28, 292, "One expert i", "ink title")
    picture.box(28, middle - 30, 108, 68, "dense")
    picture.text(82, middle + 11, "W{i}", "ink formula", "middle")
    picture.text(152, middle + 11, "≈", "ink formula")
    picture.box(188, middle - 30, 30, 68, "adapter")
    picture.text(232, middle + 11, "φ (", "ink formula")
    left = 276
    for sign, atom in (("0.9", 3), ("− 0.4", 4), ("+ 0.2", 5)):
        picture.text(left, middle + 11, sign, "ink formula")
        left += 14 * len(sign) + 2
        picture.box(left, middle - 11, 108, 30, ATOMS[atom])
        left += 120
    picture.text(left, middle + 11, ")", "ink formula")
    picture.text(28, 404, "weight, p × d", "soft small")
    picture.text(164, 404, "adapter A{i}, p × r", "soft small")
    picture.text(300, 404, "codes α{ij} times atoms B{j}, r × d: 12 atoms by default", "soft small")
    picture.text(
        28,
        436,
        "p: intermediate size. d: hidden size. r: rank. φ: identity, silu or tanh. The down matrix stays dense.",
        "soft small",
    )
    return picture


def fit() -> Drawing:
    """One step of variable projection."""
    picture = Drawing(900, 250, "One step: read a block of experts, compose, solve the adapters, add the gradients.")
    picture.text(28, 38, "One step of the fit", "ink title")
    stages = (
        ("Read", "a block of experts W{i}", "from disk"),
        ("Compose", "the basis φ(Σ α{ij} B{j})", "of each expert"),
        ("Solve", "the best adapter A{i}", "by least squares"),
        ("Add", "the squared error and", "its gradient in α and B"),
    )
    for number, (verb, *rest) in enumerate(stages):
        left = 28 + 216 * number
        picture.box(left, 66, 190, 84, "stage", radius=8)
        picture.text(left + 14, 92, verb, "ink title")
        for line, words in enumerate(rest):
            picture.text(left + 14, 114 + 20 * line, words, "soft small")
        if number:
            picture.arrow((left - 26, 108), (left - 3, 108))
    picture.arrow((771, 150), (771, 182), (123, 182), (123, 153))
    picture.text(447, 174, "next block, until all experts are read", "soft small", "middle")
    picture.text(
        28,
        222,
        "Then Adam moves the bank B and the codes α. The adapters have no state: each step solves them again.",
        "ink small",
    )
    return picture


def strategies() -> Drawing:
    """What each strategy holds on the device for two layers of three experts."""
    picture = Drawing(900, 300, "Composed holds all bases, cached a few, scratch those of a layer, bank_first none.")
    picture.text(28, 38, "What each strategy holds for gate and up", "ink title")
    columns = (
        ("composed", "every composed basis", 6, False),
        ("cached", "the bank, a pool of bases", 2, True),
        ("scratch", "the bank, one layer's bases", 3, True),
        ("bank_first", "the bank, no basis", 0, True),
    )
    for number, (name, holds, bases, has_bank) in enumerate(columns):
        left = 28 + 216 * number
        picture.text(left, 72, name, "ink")
        picture.text(left, 92, holds, "soft small")
        for row in range(2):
            for expert in range(3):
                picture.box(left + 62 * expert, 110 + 48 * row, 10, 34, "adapter")
        for basis in range(bases):
            place = basis if name != "cached" else (1, 5)[basis]
            x, y = left + 14 + 62 * (place % 3), 110 + 48 * (place // 3)
            for stripe, atom in enumerate(_CODES[place // 3][place % 3]):
                picture.box(x, y + 8 + 6 * stripe, 38, 6, ATOMS[atom], radius=0)
        if has_bank:
            for atom, colour in enumerate(ATOMS):
                picture.box(left + 46 * (atom % 4), 214 + 20 * (atom // 4), 40, 14, colour)
    picture.text(
        28,
        280,
        "Grey: adapters, two layers of three experts. Striped: composed bases. Coloured: the atoms of the bank.",
        "soft small",
    )
    return picture


def main() -> None:
    for drawing in (method, fit, strategies):
        drawing().write(HERE / f"{drawing.__name__}.svg")


if __name__ == "__main__":
    main()
