"""Make conf/demo_corpus: small copies of a fixed share of a labelled folder of clips.

    python benchmarks/make_demo_corpus.py FOLDER [--train 11] [--test 5]

FOLDER holds `labels.csv` with columns path, label, source, split1, split2, split3 (clips of one
`source` are on one side only; every clip is tested in one split). The demo uses split1. For each
class and side of split1, the clips whose path has the smallest SHA-256 are taken: a fixed choice
that does not depend on clips or results. Copies have a short side of 128 and keep every frame.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
from collections import defaultdict
from pathlib import Path

from distinit.pipeline.video.encode import transcode

OUT = Path(__file__).resolve().parent.parent / "conf" / "demo_corpus"


def choose(rows: list[dict[str, str]], train: int, test: int) -> list[dict[str, str]]:
    """Return the rows to copy, in the order of the list."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        groups[row["label"], row["split1"]].append(row)
    chosen: set[str] = set()
    for (_, side), group in groups.items():
        group.sort(key=lambda row: hashlib.sha256(row["path"].encode()).digest())
        chosen |= {row["path"] for row in group[: train if side == "train" else test]}
    return [row for row in rows if row["path"] in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=11, help="training clips per class")
    parser.add_argument("--test", type=int, default=5, help="test clips per class")
    parser.add_argument(
        "--crf", type=int, default=29, help="quality: a lower number is better and larger"
    )
    args = parser.parse_args()

    with open(args.folder / "labels.csv", newline="") as file:
        rows = choose(list(csv.DictReader(file)), args.train, args.test)
    for row in rows:
        copy = OUT / row["path"]
        copy.parent.mkdir(parents=True, exist_ok=True)
        # The encoding does not depend on the machine. The demo reads random clips, so there are
        # many key frames.
        source = str(args.folder / row["path"])
        transcode(
            source, str(copy), short_side=128, gop=12, crf=args.crf, extra={"preset": "veryslow"}
        )
    with open(OUT / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        columns = ["path", "label", "source", "split1", "split2", "split3"]
        writer.writerow(columns)
        writer.writerows([row[column] for column in columns] for row in rows)
    # Stage one of the demo sees only the training side, without labels.
    unlabelled = [row["path"] for row in rows if row["split1"] == "train"]
    (OUT / "unlabelled.txt").write_text("".join(f"{path}\n" for path in unlabelled))
    size = sum((OUT / row["path"]).stat().st_size for row in rows)
    sides = [row["split1"] for row in rows]
    print(
        f"{len(rows)} clips ({sides.count('train')} train, {sides.count('test')} test), {size / 1e6:.2f} MB"
    )


if __name__ == "__main__":
    main()
