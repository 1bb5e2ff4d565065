"""Measure the bytes that the logits of a frame would take at a given divergence.

    python benchmarks/logit_bytes.py STORE [--teacher NAME]

STORE holds logits as float16. Each row rounds them in another way: `int8` as in a store (256 steps
from a row's smallest to its largest logit), `uniform` steps of one size for all rows, and
`weighted` steps of size s / √(p + ε), larger for classes with a small probability p, because a
class adds p · error² / 2 to the divergence. Bytes are the entropy of the symbols, the lower bound
for an entropy coder with one table or with a table per class; tables are fitted on the rows
themselves. zlib is a real coder, applied to one row. KL is the divergence of the softmax of the
rounded logits from that of the logits, in nats.
"""

from __future__ import annotations

import argparse
import zlib

import numpy as np
from measuring import machine, table
from numpy.typing import NDArray
from scipy.special import log_softmax

from distinit.pipeline.store.encoding import divergence
from distinit.pipeline.store.reader import TargetStore

Array = NDArray[np.float64]
STEPS = (0.03, 0.05, 0.06, 0.1)
WEIGHTED = (0.0015, 0.002, 0.003)
EPSILON = 0.1  # in units of 1/K


def entropy_bytes(symbols: NDArray[np.int64]) -> float:
    """Return the bytes per row of symbols [N, K], coded with one table."""
    counts = np.unique(symbols, return_counts=True)[1]
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum() * symbols.shape[1] / 8)


def by_class(symbols: NDArray[np.int64]) -> float:
    """Return the bytes per row, coded with one table per class."""
    return sum(entropy_bytes(symbols[:, [k]]) for k in range(symbols.shape[1]))


def zlib_bytes(symbols: NDArray[np.int64]) -> float:
    """Return the mean bytes of rows that are compressed alone; every 50th row is taken."""
    bytes_ = np.clip(symbols - np.median(symbols), -128, 127).astype(np.int8)
    return float(np.mean([len(zlib.compress(row.tobytes(), 9)) for row in bytes_[::50]]))


def weighted(values: Array, step: float) -> tuple[NDArray[np.int64], Array]:
    """Round log-probabilities [N, K] in steps that grow as the probability falls."""
    grid = np.linspace(-40, 0, 400_001)
    density = np.sqrt(np.exp(grid) + EPSILON / values.shape[1])
    scale = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * (grid[1] - grid[0]))])
    symbols = np.round(np.interp(values, grid, scale) / step).astype(np.int64)
    return symbols, np.interp(symbols * step, scale, grid)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store")
    parser.add_argument("--teacher")
    args = parser.parse_args()
    store = TargetStore.open(args.store)
    teacher = args.teacher or next(n for n, t in store.teachers.items() if t.output == "logits")
    rows = np.concatenate([store.frames(int(video))[2] for video in store.usable()])
    logits = store.logits(teacher, rows).astype(np.float64)
    values = log_softmax(logits, axis=1)
    low, scale = logits.min(1, keepdims=True), np.ptp(logits, axis=1, keepdims=True) / 255
    kept = np.round((logits - low) / scale).astype(np.int64)
    ways = {"int8": (kept, low + kept * scale)}
    for step in STEPS:
        symbols = np.round(logits / step).astype(np.int64)
        ways[f"uniform {step:g}"] = (symbols, symbols * step)
    ways |= {f"weighted {step:g}": weighted(values, step) for step in WEIGHTED}
    lines = []
    for name, (symbols, back) in ways.items():
        kl = divergence(logits.astype(np.float32), back.astype(np.float32))
        lines.append(
            [name, f"{kl.mean():.1e}", f"{np.quantile(kl, 0.99):.1e}", f"{entropy_bytes(symbols):.0f}",
             f"{by_class(symbols):.0f}", f"{zlib_bytes(symbols):.0f}"]
        )  # fmt: skip
    print(machine())
    print(f"\n{len(rows)} rows of {logits.shape[1]} logits, {teacher}\n")
    print(table(["steps", "KL", "99 %", "bytes, one table", "a table per class", "zlib"], lines))


if __name__ == "__main__":
    main()
