"""The edited images of a composition that tell its story: the key steps and the largest changes of every test."""

from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest

from vitscope.compositing.result import Composition

# The nouns of what is left out, by test.
NOUNS = {"size": "sizes", "location": "places", "split": "splits", "controls": "controls", "free": "images of your own"}


def key_images(result: Composition, indices: Sequence[int], count: int) -> list[int]:
    """Return the most telling images, in their order.

    These are the original, then in turn for each test of each object: of the sizes the largest change, the smallest and
    the largest; of the places the one with the highest output and that with the lowest; of the splits the image without
    the object and the largest changes; and so on, until ``count`` images are chosen. Images of the user's own come
    first.

    Args:
        result: the composition.
        indices: the images to choose from; the first is the original.
        count: number of images, including the original.
    """
    if len(indices) <= count:
        return list(indices)
    groups: dict[tuple[str, str | None], list[int]] = {}
    own = []
    for index in indices[1:]:
        image = result.edited_images[index]
        if image.test == "free":
            own.append(index)
        else:
            groups.setdefault((image.test, image.subject), []).append(index)
    ranked = [_by_priority(result, test, group) for (test, _), group in groups.items()]
    rounds = [[index for index in step if index is not None] for step in zip_longest(*ranked)]
    chosen = [indices[0], *own, *(index for step in rounds for index in _by_change(result, step))][:count]
    return [index for index in indices if index in chosen]


def left_out(result: Composition, indices: Sequence[int], shown: Sequence[int]) -> str:
    """Return how many of the images are not shown, by test, as "4 sizes, 2 places"; empty if all are."""
    counts = Counter(result.edited_images[index].test for index in indices if index not in shown)
    return ", ".join(f"{counts[test]} {_noun(test, counts[test])}" for test in NOUNS if counts[test])


def _noun(test: str, count: int) -> str:
    return NOUNS[test] if count != 1 else NOUNS[test].replace("images", "image").removesuffix("s")


def _by_priority(result: Composition, test: str, group: Sequence[int]) -> list[int]:
    """Return the images of one test of one object, the most telling first."""
    ranked = _by_change(result, group)
    first: list[int] = []
    if test == "size":
        scales = sorted(group, key=lambda index: result.edited_images[index].show[-1].scale)
        first = [ranked[0], scales[0], scales[-1]]
    elif test == "location":  # sorted by the output, see on_plate
        first = [group[0], group[-1]]
    elif test == "split":
        subject = result.edited_images[group[0]].subject
        first = [
            index
            for index in ranked
            if subject is not None and subject not in [placement.name for placement in result.edited_images[index].show]
        ]
    return list(dict.fromkeys([*first, *ranked]))


def _by_change(result: Composition, indices: Sequence[int]) -> list[int]:
    """Return the images by the largest change of a class that is named with them, largest first."""
    changes = {index: max(abs(ranked.change) for ranked in result.ranking(index).classes) for index in indices}
    return sorted(indices, key=lambda index: -changes[index])
