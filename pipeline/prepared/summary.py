"""What a run of `distinit prepare` says at its end."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from ..common.console import Console
from ..video.pool.protocol import INTERNAL
from .status import Row


class Tally:
    """What is known of the copies so far; a few numbers a video."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.ok = self.frames = self.source_bytes = self.copy_bytes = 0
        self.seconds = 0.0
        self.measured: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, row: Row) -> None:
        """Count a row of status.csv."""
        if row["status"] != "ok":
            self.reasons[str(row["reason"])] += 1
            return
        self.ok += 1
        self.frames += int(row["frames"])
        self.seconds += float(row["seconds"])
        self.source_bytes += int(row["source_bytes"])
        self.copy_bytes += int(row["copy_bytes"])
        for name in ("psnr", "ssim", "clipped"):
            if row.get(name):
                self.measured[name].append(float(row[name]))


def summary(
    out: Path, videos: int, new: int, seconds: float, tally: Tally, console: Console
) -> dict[str, Any]:
    """Return what --json prints of a run, and print the same as text."""
    failed = sum(tally.reasons.values())
    if failed:
        console.say(f"{failed} videos failed; {out / 'status.csv'} lists them:")
        for reason, count in tally.reasons.most_common(10):
            console.say(f"  {count:6d}  {reason}")
    result: dict[str, Any] = {
        "out": str(out),
        "complete": tally.ok > 0
        and not any(reason.startswith(INTERNAL) for reason in tally.reasons),
        "videos": videos,
        "ok": tally.ok,
        "failed": failed,
        "failures": dict(tally.reasons.most_common(100)),
        "new": new,
        "seconds": round(seconds, 2),
        "frames": tally.frames,
        "video_seconds": round(tally.seconds, 2),
        "source_bytes": tally.source_bytes,
        "copy_bytes": tally.copy_bytes,
        "bytes_per_second": round(tally.copy_bytes / tally.seconds) if tally.seconds else None,
    }
    for name in ("psnr", "ssim"):
        if column := tally.measured[name]:
            result[name] = {
                "mean": float(np.mean(column)),
                "worst_5_percent": float(np.quantile(column, 0.05)),
            }
    if column := tally.measured["clipped"]:
        result["clipped"] = {
            "mean": float(np.mean(column)),
            "worst_5_percent": float(np.quantile(column, 0.95)),
        }
    if not new:
        console.say("nothing to do: every video has its copy or a reason why not")
    if tally.ok:
        factor = tally.source_bytes / max(1, tally.copy_bytes)
        shown = f"{factor:.1f} times smaller" if factor >= 1 else f"{1 / factor:.1f} times larger"
        console.say(
            f"{tally.ok} done, {tally.copy_bytes / 1e6:.1f} MB for {tally.source_bytes / 1e6:.1f} MB of sources "
            f"({shown}, {tally.copy_bytes / max(tally.seconds, 1e-9) / 1e3:.1f} kB a second)"
        )
    if "psnr" in result and "ssim" in result:
        console.say(
            f"against the scaled source: PSNR {result['psnr']['mean']:.1f} dB, SSIM {result['ssim']['mean']:.3f}; "
            f"the worst 5 % of the videos below {result['psnr']['worst_5_percent']:.1f} dB, "
            f"{result['ssim']['worst_5_percent']:.3f}"
        )
    if "clipped" in result:
        console.say(
            f"beyond the bound: {result['clipped']['mean']:.3%} of the values; "
            f"above {result['clipped']['worst_5_percent']:.3%} in the worst 5 % of the videos"
        )
    return result
