"""Fonts for the characters of a figure's texts."""

from collections.abc import Iterable
from functools import cache

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font


def font_families(characters: Iterable[str]) -> tuple[list[str], frozenset[str]]:
    """Return font families that together show the characters, and the characters that no installed font has.

    The first families are matplotlib's own setting. Others follow only if it lacks characters, such as Chinese ones.
    """
    families = list(matplotlib.rcParams["font.family"])
    own_files = [font_manager.findfont(font_manager.FontProperties(weight=weight)) for weight in ("normal", "bold")]
    missing = frozenset(characters) - _characters_of_all(own_files)
    if not missing:
        return families, missing
    files: dict[str, list[str]] = {}
    for font in font_manager.fontManager.ttflist:
        # A font called "last resort" draws a box with a code for every character there is.
        if font.style == "normal" and "last resort" not in font.name.lower():
            files.setdefault(font.name, []).append(font.fname)
    for name in sorted(files):
        covered = missing & _characters_of_all(files[name])
        if covered:
            families.append(name)
            missing -= covered
        if not missing:
            break
    return families, missing


def _characters_of_all(paths: Iterable[str]) -> frozenset[str]:
    """Return the characters that every file has: the files are the weights of a family, and titles are bold."""
    return frozenset.intersection(*map(_characters_of, paths))


@cache
def _characters_of(path: str) -> frozenset[str]:
    """Return the characters that a font file has; none if it cannot be read."""
    try:
        return frozenset(map(chr, FT2Font(path).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()
