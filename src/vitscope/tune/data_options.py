"""Options of a data set, declared once for Python and the command line."""

from dataclasses import dataclass
from typing import Literal, get_args

from vitscope.errors import CallError
from vitscope.validation import require_at_least, require_ratio, require_seed

Unreadable = Literal["refuse", "skip"]


@dataclass(frozen=True)
class DataOptions:
    """Options for splitting, limiting and cleaning a data set before training.

    :func:`vitscope.load_data` uses the first three; :func:`vitscope.finetune` and :func:`vitscope.compare` use all.

    Attributes:
        test_share: Share of each class that becomes the test set, if the data set has no split of its own. From 0
            to 1; the test set has at least one image of each class.
        split_seed: Random seed of the split and of the choice of images per class.
        per_class: Maximum number of training images per class, chosen at random. None uses all of them.
        unreadable: Whether to refuse or skip images that cannot be read.
        drop_duplicates: Leave out training images that are also in the test set. The test set does not change.

    Raises:
        CallError: an option has another type or is out of range.

    Examples:
        >>> DataOptions(per_class=100).test_share
        0.2
    """

    test_share: float | int = 0.2
    split_seed: int = 0
    per_class: int | None = None
    unreadable: Unreadable = "refuse"
    drop_duplicates: bool = False

    def __post_init__(self) -> None:
        require_ratio(self.test_share, "test_share")
        require_seed(self.split_seed)
        if self.per_class is not None:
            require_at_least(1, self.per_class, "per_class")
        if self.unreadable not in get_args(Unreadable):
            raise CallError(f"unreadable is {self.unreadable!r}: choose {' or '.join(get_args(Unreadable))}")
        if not isinstance(self.drop_duplicates, bool):
            raise CallError(f"drop_duplicates is {self.drop_duplicates!r}: pass True or False")


DEFAULT_OPTIONS = DataOptions()
