"""Write the generated pages, blocks and pictures of the documents.

python -m docs.make                  # all
python -m docs.make --check          # writes nothing; exit code 1 if something is stale
python -m docs.make docs/reference/flags.md README.md
python -m docs.make --pictures       # the pictures, too, that are not stale
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.rows import ROOT
from docs.make import generated, pictures


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns 0, or 1 with --check where something is stale."""
    parser = argparse.ArgumentParser(prog="python -m docs.make", description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", help="pages or pictures from the root of the tree (default: all)")
    parser.add_argument("--check", action="store_true", help="write nothing, name what is stale")
    parser.add_argument("--pictures", action="store_true", help="draw every picture, stale or not")
    args = parser.parse_args(argv)
    known = [*generated.all_paths(), *pictures.PICTURES]
    if unknown := set(args.paths) - set(known):
        parser.error(f"{', '.join(sorted(unknown))} is not generated; what is: {', '.join(known)}")
    found = []
    for path in args.paths or known:
        if path in pictures.PICTURES:
            if args.pictures or pictures.is_stale(path):
                found.append(path)
                if not args.check:
                    pictures.draw(path)
        elif generated.is_stale(path):
            found.append(path)
            if not args.check:
                (ROOT / path).write_text(generated.made(path), encoding="utf-8")
    for path in found:
        print(f"{path} {'is stale' if args.check else 'written'}")
    if args.check and found:
        print(f"renew with: {generated.COMMAND}")
    return int(args.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
