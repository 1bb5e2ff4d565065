"""Compare readers of picks from a warm local store: this package, zarr-python and h5py.

    python benchmarks/read_pick.py

A store of random logits (1000 classes, float16, shards of 16384 rows) is written to a temporary
folder, and the same rows as HDF5. As in a loader, picks are 1 or 8 neighbouring cached frames at a
random position. All files are in the page cache. The table has wall time per row, as medians of
rounds in which all take turns.

Goal: under 0.1 ms per row.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import zarr
from measuring import in_turn, machine, medians, table

from distinit.pipeline.store import layout as fmt
from distinit.pipeline.store.encoding import Codec
from distinit.pipeline.store.shards import ShardedRows
from distinit.pipeline.store.staging import stage_array

SHARD_ROWS = 16384
Read = Callable[[np.ndarray], np.ndarray]


def write(folder: Path, rows: int, classes: int, encoding: str) -> list[str]:
    """Write the arrays of a teacher's logits as extraction does; return their names."""
    specs = [s for s in fmt.teacher_specs("t", classes, encoding) if not s.path.endswith("entropy")]
    zarr.open_group(folder, mode="a")
    for spec in specs:
        fmt.create_array(folder, spec, rows, SHARD_ROWS)
    random = np.random.default_rng(0)
    for shard in range(rows // SHARD_ROWS):
        logits = random.normal(0, 2, (SHARD_ROWS, classes)).astype(np.float32)
        values = Codec("logits", encoding, classes).encode(logits)
        for spec in specs:
            part = values[spec.name]
            for file in stage_array(folder / f"staging-{shard}", spec, shard, part, SHARD_ROWS):
                final = folder / file.final
                final.parent.mkdir(parents=True, exist_ok=True)
                Path(file.staged).rename(final)
    return [spec.name for spec in specs]


def contenders(folder: Path, classes: int, rows: int) -> dict[str, Read]:
    """Return readers from rows [n] to float32 logits [n, K]."""
    readers: dict[str, Read] = {}
    for encoding in ("float16", "int8"):
        place, names = (
            folder / encoding / "teachers/t",
            write(folder / encoding, rows, classes, encoding),
        )
        arrays = {
            n: ShardedRows(place / n, json.loads((place / n / "zarr.json").read_bytes()))
            for n in names
        }
        codec = Codec("logits", encoding, classes)
        readers[f"distinit, {encoding}"] = lambda at, arrays=arrays, codec=codec: codec.decode(
            {n: a.read(at) for n, a in arrays.items()}
        )
    plain = zarr.open_array(folder / "float16/teachers/t/logits", mode="r")
    readers["zarr-python"] = lambda at: np.asarray(plain[int(at[0]) : int(at[-1]) + 1]).astype(
        np.float32
    )
    with h5py.File(folder / "rows.h5", "w") as file:
        data = file.create_dataset(
            "logits", (rows, classes), "f2", chunks=(fmt.VALUES_CHUNK, classes), fletcher32=True
        )
        for first in range(0, rows, SHARD_ROWS):
            data[first : first + SHARD_ROWS] = plain[first : first + SHARD_ROWS]
    opened = h5py.File(folder / "rows.h5", "r")["logits"]
    readers["h5py, chunks of 16 with a checksum"] = lambda at: opened[
        int(at[0]) : int(at[-1]) + 1
    ].astype(np.float32)
    return readers


def main() -> None:
    """Print the machine and a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, default=8 * SHARD_ROWS, help=f"a multiple of {SHARD_ROWS}"
    )
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--picks", type=int, default=300, help="per round")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    lines: dict[str, list[object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        readers = contenders(Path(folder), args.classes, args.rows)
        random = np.random.default_rng(1)
        for length in (1, 8):
            picks = random.integers(0, args.rows - length, args.picks)[:, None] + np.arange(length)
            expected = [readers["distinit, float16"](rows) for rows in picks[:5]]
            exact = [read for name, read in readers.items() if "int8" not in name]
            if any(
                (read(rows) != e).any()
                for read in exact
                for rows, e in zip(picks[:5], expected, strict=True)
            ):
                raise SystemExit("the readers do not agree")

            def measure(read: Read, picks: np.ndarray = picks) -> Callable[[], float]:
                def run() -> float:
                    began = time.perf_counter()
                    for rows in picks:
                        read(rows)
                    return 1000 * (time.perf_counter() - began) / picks.size

                return run

            for name, value in medians(
                in_turn({n: measure(r) for n, r in readers.items()}, args.rounds)
            ).items():
                lines.setdefault(name, [name]).append(f"{value:.3f}")
    print(machine())
    print(table(["reader", "ms per row, 1 row", "ms per row, 8 rows at once"], lines.values()))


if __name__ == "__main__":
    main()
