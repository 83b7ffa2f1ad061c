"""Print the request templates of the part `defense`, as rows for `requests.csv`.

    python recipes/mini/wordings.py

A defense that is fitted on few wordings refuses harmless pictures in others. The embedded model's
own training has thousands of wordings; these are drawn from them, and no held-out template is among
them. They serve the fit of defenses alone: the recipe trains on the part `fit`.
"""

import csv
import random
import sys

from contrast import CONTRAST, SHADY, WIDER, wordings

COUNT = 106
SEED = 7


def choose() -> list[str]:
    """Return wordings with `{}` for the object."""
    pool = [
        wording
        for plan in (CONTRAST, WIDER, SHADY)
        for wording in wordings(plan.openers, plan.actions)
    ]
    return random.Random(SEED).sample(sorted(set(pool)), COUNT)


def main() -> None:
    """Print the rows."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    for number, wording in enumerate(choose(), start=1):
        writer.writerow([f"defense-{number:03d}", "act", wording, wording.replace("{}", "this")])


if __name__ == "__main__":
    main()
