"""Show which model families vitscope supports, and its message for the others.

    python benchmarks/families.py [LIBRARY …] [--only TEXT]

Every family is built with random weights, then loaded and captured, and its rollout is computed. Verdicts: *rollout*
(attention, grid, readout and rollout), *attention* (maps only, with the reason), *refused* (with the one-line error),
*not built* (this version of the library cannot build it), *CRASH* (an error that vitscope did not raise on purpose,
which is a bug). Libraries that are not installed are skipped.
"""

import argparse
import importlib.util
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from family_table import Family, families

import vitscope as vs

LIBRARIES = ("timm", "transformers", "torchvision", "vit_pytorch", "open_clip")


def verdict(family: Family) -> tuple[str, str]:
    """Return the verdict on a family, and the message that explains it."""
    torch.manual_seed(0)
    try:
        module = family.build().eval()
    except Exception as error:
        return "not built", f"{type(error).__name__}: {str(error).splitlines()[0]}"
    pixels = torch.randn(1, 3, family.size, family.size, generator=torch.Generator().manual_seed(1))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", vs.VitscopeWarning)
            model = vs.load(module)
            trace = vs.capture(model, pixels)
        messages = [str(w.message) for w in caught if issubclass(w.category, vs.VitscopeWarning)]
        try:
            vs.rollout(trace)
        except vs.VitscopeError as error:
            return "attention", (messages or [str(error)])[0]
        return "rollout", " ".join(messages)
    except vs.VitscopeError as error:
        return "refused" if "\n" not in str(error) else "CRASH", str(error)
    except Exception as error:
        return "CRASH", f"{type(error).__name__}: {error}"


def main() -> None:
    """Print a row for each family, and the totals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="*", default=LIBRARIES, help="libraries; all by default")
    parser.add_argument("--only", default="", help="families whose name contains this text")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| library | family | verdict | message |\n|---|---|---|---|")
    totals: dict[str, Counter[str]] = {}
    for library in options.libraries:
        if importlib.util.find_spec(library) is None:
            continue
        for family in families(library):
            if options.only in family.name:
                kind, line = verdict(family)
                totals.setdefault(library, Counter())[kind] += 1
                print(f"| {library} | {family.name} | {kind} | {line.replace('|', '/')} |", flush=True)
    kinds = ("rollout", "attention", "refused", "CRASH", "not built")
    print(f"\n| library | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}")
    for library, counts in totals.items():
        print(f"| {library} | {' | '.join(str(counts[kind]) for kind in kinds)} |")


if __name__ == "__main__":
    main()
