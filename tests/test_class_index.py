"""Classes whose labels look like indices, and targets that are not a class."""

from typing import Any

import numpy as np
import pytest
import torch

from vitscope.errors import CallError
from vitscope.validation import require_class_index

NUMBERS = ("1", "10", "2")  # in the order in which folders of classes are sorted
WORDS = ("tabby, tabby cat", "Crane", "crane", "tabby", " padded ", "7, seven")


@pytest.mark.parametrize(
    ("target", "labels", "index"),
    [
        ("1", NUMBERS, 0),
        ("10", NUMBERS, 1),
        ("2", NUMBERS, 2),
        (" 10 ", NUMBERS, 1),
        ("0", NUMBERS, 0),  # not a label, so an index
        (1, NUMBERS, 1),
        (2, NUMBERS, 2),
        (np.int64(1), NUMBERS, 1),
        ("Crane", WORDS, 1),
        ("crane", WORDS, 2),
        ("CRANE", WORDS, 1),
        ("tabby", WORDS, 3),
        ("tabby cat", WORDS, 0),
        ("tabby, tabby cat", WORDS, 0),
        ("padded", WORDS, 4),
        ("seven", WORDS, 5),
        ("3", None, 3),
        ("٣", None, 3),
        (torch.tensor(2, device="cpu"), None, 2),
    ],
    ids=str,
)
def test_an_exact_label_takes_precedence_over_an_index(target: Any, labels: Any, index: int) -> None:
    assert require_class_index(target, labels, 6 if labels is None else len(labels)) == index


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (["cat", "dog"], "target is ['cat', 'dog']: one class for all images is expected"),
        (("cat",), "target is ('cat',): one class for all images is expected"),
        ([0, 1], "target is [0, 1]: one class for all images is expected"),
        ({"cat": 1}, "one class for all images is expected"),
        (np.array([0, 1]), "one class for all images is expected"),
        (torch.tensor([0, 1], device="cpu"), "one class for all images is expected"),
        ("7", "target 7 does not exist: the model has classes 0 to 2"),
        ("9" * 6000, "does not exist: the model has classes 0 to 2"),
        (10**6000, "does not exist: the model has classes 0 to 2"),
        (1.5, "target is 1.5, a whole number is expected"),
        (True, "target is True, a whole number is expected"),
        ("dog", "is not a label of this model"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_a_target_that_is_not_a_class_is_refused_in_one_line(target: Any, message: str) -> None:
    with pytest.raises(CallError) as caught:
        require_class_index(target, NUMBERS, 3)
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert len(text) < 250


CATS = (
    "tabby, tabby cat",
    "tiger cat",
    "Egyptian cat",
    "cougar, catamount",
    "crate",
    "coast",
    "night_CAT",
    "lynx, cat_bear",
)


@pytest.mark.parametrize(
    ("target", "labels", "listed"),
    [
        ("cat", CATS, "tabby cat, tiger cat, Egyptian cat, night_CAT, cat_bear: pass a label"),
        ("Cat ", CATS, "tabby cat, tiger cat, Egyptian cat, night_CAT, cat_bear: pass a label"),
        ("tiger", CATS, "a word of tiger cat: pass a label"),
        ("egyptian", CATS, "a word of Egyptian cat: pass a label"),
        ("c.t", CATS, "did you mean"),
        ("", CATS, "the nearest labels are"),
        ("cats", CATS, "did you mean"),
        ("dog", [f"dog {index}" for index in range(25)], "dog 19 and 5 more: pass a label"),
    ],
)
def test_a_part_of_labels_is_refused_with_all_labels_that_contain_it_as_a_word(
    target: str, labels: Any, listed: str
) -> None:
    with pytest.raises(CallError) as caught:
        require_class_index(target, labels, len(labels))
    assert listed in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_label_or_synonym_takes_precedence_over_labels_that_contain_it() -> None:
    assert require_class_index("cat", (*CATS, "cat"), 9) == 8
    assert require_class_index("cat", (*CATS, "house animal, Cat"), 9) == 8
