"""Colours and marks of figures. Red supports a class and blue opposes it, as in signed maps."""

from typing import Literal

OutlineName = Literal["mark", "plain", "supports", "opposes"]

INK, FAINT, GRID, FRAME = "#1b1b1f", "#6b6b76", "#e4e4ea", "#c8c8d0"
WHITE = "#ffffff"
SUPPORTS, OPPOSES = "#b5293c", "#2a6cad"  # the ends of the signed colour map, a little darker
MARK = "#e8001f"  # brighter than the reds of either colour map
OUTLINES: dict[OutlineName, str] = {"mark": MARK, "plain": INK, "supports": SUPPORTS, "opposes": OPPOSES}
SERIES = (
    ("#0072b2", "o"),
    ("#d55e00", "s"),
    ("#009e73", "^"),
    ("#cc79a7", "D"),
    ("#56b4e9", "v"),
    ("#e69f00", "P"),
    ("#1b1b1f", "X"),
    ("#8c6bb1", "<"),
    ("#7f7f7f", ">"),
    ("#a65628", "*"),
)  # colour and matplotlib marker; the first six are safe for colour-blind eyes (Okabe & Ito)
