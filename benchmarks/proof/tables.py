"""Print the figures of the proofs as Markdown tables, for docs/results.md.

    python benchmarks/proof/tables.py OUT/results.json
    python benchmarks/proof/tables.py OUT/diagnostics.json
    python benchmarks/proof/tables.py predictions/har7-60-epochs.csv [MORE.csv …] [ROW]

The last form computes accuracies, and gains of ROW (default the first) over the others, from saved
predictions. motion.py and others write such files into OUT/predictions, and those of
docs/results.md are in predictions/ next to this script. If rows of several files have the same
name, the name of the file is added.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import folds
from measuring import table


def main() -> None:
    files = [Path(word) for word in sys.argv[1:] if word.endswith(".csv")]
    if files:
        return print(
            of_videos(
                together(files), *[word for word in sys.argv[1:] if not word.endswith(".csv")]
            )
        )
    results = json.loads(Path(sys.argv[1]).read_text())
    if "filters vary in time" in results:
        print(motion(results))
    elif all("accuracy" in of_set for of_set in results.values()):  # diagnostics.json
        for name, of_set in results.items():
            print(f"\n{name}\n\n{rows(of_set)}")
    else:  # results.json of some or all of the measures
        for name, sets in results.items():
            print(f"\n{name}\n\n{real(sets)}")


def together(files: list[Path]) -> dict[str, folds.Pooled]:
    """Read the rows of several csv files of predictions.

    Raises:
        SystemExit: The files have different videos.
    """
    each = {file: folds.read_predictions(file) for file in files}
    names = [row for rows in each.values() for row in rows]
    pooled_rows = {
        row if names.count(row) == 1 else f"{row} ({file.stem})": p
        for file, rows in each.items()
        for row, p in rows.items()
    }
    videos = next(iter(pooled_rows.values())).videos
    for file, rows in each.items():
        if any(p.videos != videos for p in rows.values()):
            raise SystemExit(f"{file}: its videos are not those of {files[0]}")
    return pooled_rows


def of_videos(pooled_rows: dict[str, folds.Pooled], row: str | None = None) -> str:
    """Return the rows of a csv of predictions."""
    row = row or next(iter(pooled_rows))
    if row not in pooled_rows:
        raise SystemExit(f"{row}: not one of {', '.join(pooled_rows)}")
    lines = []
    for name, each in pooled_rows.items():
        seeds = ", ".join(f"{100 * value:.1f}" for value in each.by_seed)
        change = percent(folds.gain(pooled_rows[row], each), sign=True) if name != row else ""
        lines.append(
            [name, percent(folds.interval(each.right.mean(axis=0), each.groups)), seeds, change]
        )
    return table(["row", "top 1, % [95 %]", "each seed", f"gain of {row} [95 %]"], lines)


def real(sets: dict[str, Any]) -> str:
    """Tabulate data sets × initialisations: top 1 with its interval, seeds, and DistInit's gain."""
    lines = []
    for name, results in sets.items():
        for start, accuracy in results["accuracy"].items():
            seeds = ", ".join(f"{100 * value:.1f}" for value in results["by seed"][start])
            gain = results.get("gain", {}).get(start)
            lines.append(
                [name, start, percent(accuracy), seeds, percent(gain, sign=True) if gain else ""]
            )
    return table(
        ["data set", "start", "top 1, % [95 %]", "each seed", "gain of DistInit [95 %]"], lines
    )


def rows(results: dict[str, Any]) -> str:
    """Tabulate rows with one change, of diagnostics.py and motion.py, with finetuning's rates."""
    lines, rates = [], results.get("rates", {})
    for row, accuracy in results["accuracy"].items():
        gain, seconds = results["gain"].get(row), results["seconds of stage two"].get(row)
        change = percent(gain, sign=True) if gain else ""
        took = f"{fmean(seconds):.0f}" if seconds else ""
        lines.append(
            [
                row,
                _explained(results, row),
                percent(accuracy),
                change,
                str(rates.get(row, "")),
                took,
            ]
        )
    return table(
        ["row", "explained, %", "top 1, % [95 %]", "change [95 %]", "rate", "stage two, s"], lines
    )


def motion(results: dict[str, Any]) -> str:
    """Tabulate initialisation × order of frames, and the variation of first filters over time."""
    lines = []
    for start, accuracy in results["accuracy"].items():
        vary = results["filters vary in time"][start]
        cells = [percent(accuracy[frames]) for frames in ("ordered", "shuffled", "frozen")]
        parts = results["what is right"][start]
        cells += [
            f"{100 * parts[part]:.0f}" if part in parts else "" for part in ("object", "motion")
        ]
        lines.append([start, _explained(results, start), *cells, f"{fmean(vary):.3f}"])
    head = [
        "start",
        "explained, %",
        "top 1, % [95 %]",
        "frames shuffled",
        "frames frozen",
        "object right",
        "motion right",
    ]
    text = table([*head, "filters vary in time"], lines)
    gains = [[name, percent(gain, sign=True)] for name, gain in results["gain"].items()]
    text = f"{text}\n\n{table(['gain', 'points [95 %]'], gains)}"
    return text + (f"\n\n{rows(results['varied'])}" if "varied" in results else "")


def _explained(results: dict[str, Any], row: str) -> str:
    """Return the explained fraction of each student of a row in per cent; "" without students."""
    return ", ".join(f"{100 * value:.0f}" for value in results["explained_fraction"].get(row, []))


def percent(values: Sequence[float], *, sign: bool = False) -> str:
    """Format a mean and the ends of its interval in per cent."""
    mean, low, high = (100 * value for value in values)
    return (
        f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]" if sign else f"{mean:.1f} [{low:.1f}, {high:.1f}]"
    )


if __name__ == "__main__":
    main()
