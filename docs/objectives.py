"""The picture of the objectives as an SVG: `python docs/objectives.py PICTURE.svg`.

It shows which rows see what, and what is predicted from where.
"""

import sys
from pathlib import Path

SIDE, CELL = 6, 20  # patches a side, pixels a patch
CONTEXT, TARGET, OTHER, FADED = "#1f6fb4", "#d9541e", "#e4e4e4", "#a9c9e4"
BLOCK = {(row, column) for row in (1, 2, 3) for column in (3, 4)}
SEEN = {(row, column) for row in range(SIDE) for column in range(SIDE) if column < 5} - BLOCK
DRAWN = {place for place in SEEN if (5 * place[0] + 3 * place[1]) % 4 == 0}  # a quarter, as if at random


def text(x: float, y: float, words: str, style: str = "") -> str:
    """Return a line of text that begins at (x, y)."""
    return f'<text x="{x}" y="{y}" {style}>{words}</text>'


def grid(x: float, y: float, colours: dict[tuple[int, int], str]) -> str:
    """Return an image's patches at (x, y), each in its colour; those without one are left out."""
    return "".join(
        f'<rect x="{x + CELL * column}" y="{y + CELL * row}" width="{CELL - 2}" height="{CELL - 2}" fill="{colour}"/>'
        for (row, column), colour in colours.items()
    )


def arrow(x: float, y: float, to_x: float, to_y: float, style: str = "") -> str:
    """Return an arrow between two points."""
    return f'<path d="M{x} {y}L{to_x} {to_y}" stroke="#444" stroke-width="1.5" marker-end="url(#head)" {style}/>'


def network(x: float, y: float, name: str, taps: str = "") -> str:
    """Return a network of four blocks and a norm, left to right; `taps` names what leaves after each block."""
    parts = [text(x, y - 8, name, 'font-weight="bold"')]
    for block in range(5):
        fill, width = ("#fff", 26) if block < 4 else ("#ccc", 10)
        parts.append(f'<rect x="{x + 34 * block}" y="{y}" width="{width}" height="60" fill="{fill}" stroke="#444"/>')
        if taps and block < 4:
            parts.append(arrow(x + 34 * block + 30, y + 60, x + 34 * block + 30, y + 82, 'stroke-dasharray="4 3"'))
    return "".join([*parts, text(x, y + 98, taps, 'fill="#555"')])


def svg() -> str:
    """Return the picture: the target's way above, the context's below, and the loss between them on the right."""
    whole = {(row, column): OTHER for row in range(SIDE) for column in range(SIDE)}
    shown = whole | dict.fromkeys(SEEN, CONTEXT) | dict.fromkeys(BLOCK, TARGET)
    context = dict.fromkeys(SEEN, CONTEXT)
    starved = dict.fromkeys(SEEN, FADED) | dict.fromkeys(DRAWN, CONTEXT)
    masked = dict.fromkeys(BLOCK, TARGET)
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1010 400" font-family="sans-serif" font-size="13">',
        '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
        '<path d="M0 0L6 3L0 6z" fill="#444"/></marker></defs><rect width="1010" height="400" fill="#fff"/>',
        grid(20, 140, shown),
        text(20, 130, "an image", 'font-weight="bold"'),
        text(20, 280, "context", f'fill="{CONTEXT}"'),
        text(80, 280, "target block", f'fill="{TARGET}"'),
        arrow(145, 160, 185, 100),
        grid(195, 40, shown),
        text(195, 30, "the whole image"),
        arrow(318, 85, 345, 85),
        network(350, 55, "the average, or meta.teacher", "loss.target_layers: blocks"),
        arrow(505, 85, 600, 85),
        grid(610, 40, masked | dict.fromkeys(SEEN, FADED)),
        text(610, 30, "targets, by loss.normalize"),
        arrow(145, 230, 185, 300),
        grid(195, 240, context),
        text(195, 230, "the context alone"),
        arrow(318, 305, 345, 305),
        network(350, 275, "encoder"),
        arrow(430, 258, 430, 160, 'stroke-dasharray="4 3"'),
        text(438, 212, "optimization.ema", 'fill="#555"'),
        arrow(491, 335, 491, 352, 'stroke-dasharray="4 3"'),
        text(350, 368, "mean of the context:", 'fill="#555"'),
        text(350, 386, "loss.projector, loss.regularizer", 'fill="#555"'),
        arrow(505, 305, 530, 305),
        grid(540, 240, starved | masked),
        text(540, 230, "predictor sees all of it, or meta.predictor_context"),
        text(540, 378, "(dark: one draw of a quarter, meta.predictor_repeats)", 'fill="#555"'),
        arrow(665, 305, 715, 305),
        f'<rect x="720" y="275" width="60" height="60" fill="#fff" stroke="#444"/>{text(723, 310, "predictor")}',
        arrow(780, 295, 838, 270),
        arrow(735, 100, 838, 170),
        '<rect x="840" y="170" width="160" height="100" fill="none" stroke="#444"/>',
        text(850, 190, "loss", 'font-weight="bold"'),
        text(850, 212, "target block: 1", f'fill="{TARGET}"'),
        text(850, 232, "context: visible_weight", f'fill="{CONTEXT}"'),
        text(850, 250, "/ root of the distance", f'fill="{CONTEXT}"'),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    Path(sys.argv[1]).write_text(svg())
