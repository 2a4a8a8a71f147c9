"""Indices of tar shards, made by all cores, so that training begins at once.

    python -m tools.index shards/*.tar
    python -m tools.index "s3://bucket/{00000..00999}.tar"

train.py makes those that are missing itself. Here shards that have changed are indexed again, too.
"""

import sys
from collections import Counter

from util import UserError, distributed, settings
from util.images import IMAGE_SUFFIXES, counted
from util.shards import CACHE, expand, index_all


def main(argv: list[str] | None = None) -> None:
    """Indexes the shards that the command line (or `argv`) names."""
    cfg = settings.parse(argv, sys.modules[__name__], positional="SHARDS")
    with distributed.session(__file__) as ranks:
        shards = list(dict.fromkeys(path for pattern in cfg.SHARDS for path in expand(pattern)))
        indices = index_all(shards, IMAGE_SUFFIXES, CACHE, ranks, renew=True)
        ignored = sum((Counter(index.ignored) for index in indices), Counter())
        images = sum(index.count for index in indices)
        if not images:
            raise UserError(f"None of {len(shards)} shards, such as {shards[0]}, holds a file of "
                            f"{', '.join(IMAGE_SUFFIXES)}; choose others.")
        if ranks.is_main:
            print(f"{images:,} images in {len(shards):,} shards; left out: "
                  f"{counted(ignored) or 'nothing'}")


if __name__ == "__main__":
    main()
