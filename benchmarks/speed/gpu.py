"""Measure extraction, training and the proof on a GPU, in steps that an interruption cannot lose.

    python benchmarks/speed/gpu.py --videos FOLDER --out OUT [--device cuda] [--minutes 15]
        [--steps resnet50 train8 ...] [--resume OUT]
        [--har7 FOLDER --har7-store STORE --har7-copies COPIES --inflate-from resnet18.pth]

FOLDER holds videos of any kind. Each step runs in a process of its own with a time limit (8 minutes
at most), the most valuable first, and leaves OUT/STEP.json with its result or its error, and
OUT/STEP.log. `--resume OUT` continues: finished steps are skipped, failed ones are tried again. No
step starts when `--minutes` are over. `har7` is the comparison of real_videos.py at the paper's
size; it uses the remaining time and resumes in OUT/proof.

Files to carry to a machine without a network: the videos, and for `har7` a store by
EfficientNet-Lite0, copies by `distinit prepare --short-side 128`, and ResNet-18's weights for the
start `inflated`. The other teachers have random weights, which suffice to measure speed. `--small`
tests the script itself on a CPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SPEED = Path(__file__).resolve().parent
BENCHMARKS = SPEED.parent
TEACHERS = {"resnet50": "torchvision.models:resnet50", "vit": "torchvision.models:vit_b_16"}


@dataclass(frozen=True)
class Step:
    """A command with its time limit.

    writes: File with its result; None if the exit status is the result.
    """

    name: str
    command: list[str]
    limit_s: float = 480
    writes: Path | None = None
    needs: list[Path] = field(default_factory=list)


def steps(args: argparse.Namespace) -> list[Step]:
    """Return all steps, the most valuable first."""
    out, small = args.out, args.small
    store, copies = out / "speed.zarr", out / "copies"
    side = ["64x85", "56"] if small else ["128x171", "112"]
    width = ["--width", "0.125"] if small else []
    loaders = str(1 if small else max(1, min(14, (os.cpu_count() or 2) - 2)))
    precision = "fp32" if args.device == "cpu" else "bf16"
    training = [
        "--store",
        store,
        "--copies",
        copies,
        "--size",
        side[1],
        *width,
        "--workers",
        loaders,
    ]
    training += ["--device", args.device]
    short = ["--steps", "2", "--rounds", "1"] if small else ["--steps", "20", "--rounds", "2"]

    def script(
        name: str, limit_s: float, file: str, *words: Any, needs: tuple[Path, ...] = ()
    ) -> Step:
        report = out / f"{name}.rows.json"
        command = [sys.executable, str(BENCHMARKS / file), *map(str, words), "--json", str(report)]
        return Step(name, command, limit_s, report, list(needs))

    def distinit(name: str, limit_s: float, *words: Any) -> Step:
        return Step(name, [sys.executable, "-m", "distinit", *map(str, words)], limit_s)

    def extraction(name: str) -> Step:
        words = [
            "--precision",
            precision,
            "--every",
            8 if small else 1,
            "--batch-size",
            4 if small else 64,
        ]
        words += ["--seconds", 1, "--rounds", 1] if small else ["--seconds", 6, "--names", 8]
        engine = ["--engine", "torch" if small else "compile"]
        teacher = ["--teacher", TEACHERS[name], "--device", args.device]
        return script(name, 240, "extraction_throughput.py", args.videos, *teacher, *engine, *words)

    def train(frames: int, batches: list[int]) -> Step:
        settings = ["fp32-last"] if args.device == "cpu" else ["bf16-last", "bf16-last-compiled"]
        sizes = ["--batch-sizes", *([2] if small else batches), "--settings", *settings]
        words = [*training, *short, "--frames", 8 if small else frames, *sizes]
        return script(f"train{frames}", 420, "training_steps.py", *words, needs=(store, copies))

    return [
        extraction("resnet50"),
        distinit("copies", 120, "prepare", args.videos, "--out", copies, "--size", side[0], "--gop", "8"),
        distinit(
            "store", 120, "extract-targets", args.videos, "--out", store, "--teacher", TEACHERS["resnet50"],
            "--every", 16 if small else 4, "--device", args.device, "--precision", precision,
        ),
        train(8, [24, 64, 128]),
        extraction("vit"),
        train(32, [24, 64]),
        script("nvdec", 90, "speed/nvdec.py", args.videos, "--videos", 2 if small else 16),
        script(
            "online", 150, "offline_online.py", args.videos, *training[:-2], *short, "--batch-size",
            2 if small else 64, "--frames", 8, "--teacher", TEACHERS["resnet50"], "--every", 16 if small else 4,
            "--device", args.device, "--precision", precision, needs=(store, copies),
        ),
        script(
            "ddp", 120, "speed/ddp.py", *training[:-4], "--device", args.device, "--batch-size", 2 if small else 64,
            needs=(store, copies),
        ),
        *([har7(args, precision, loaders)] if args.har7 else []),
    ]  # fmt: skip


def har7(args: argparse.Namespace, precision: str, loaders: str) -> Step:
    """Return the comparison of scratch, inflated and DistInit at the paper's size."""
    width, size, *resize = (0.125, 56, 64, 85) if args.small else (1, 112, 128, 171)
    clips = "--clips 64 --epochs 1 --batch-size 4" if args.small else "--clips 50000"
    files = ["--out", args.out / "proof", "--store", args.har7_store, "--copies", args.har7_copies]
    words = [args.har7, *files, "--seeds", *args.seeds, "--width", width, "--size", size]
    words += ["--resize", *resize, "--device", args.device, "--precision", precision]
    words += ["--loaders", 0 if args.small else loaders, "--workers", 1, *clips.split()]
    words += [
        "--preset",
        "paper",
        "--student",
        "r3d_18",
        "--rates",
        "0.02",
        "--lr",
        "0.1",
        "--only",
        "finetuned",
    ]
    words += ["--starts", "DistInit", "scratch", *(["inflated"] if args.inflate_from else [])]
    words += ["--inflate-from", args.inflate_from] if args.inflate_from else []
    command = [sys.executable, str(BENCHMARKS / "proof" / "real_videos.py"), *map(str, words)]
    return Step("har7", command, 480, args.out / "proof" / "results.json")


def run_step(step: Step, out: Path, limit_s: float) -> dict[str, Any]:
    """Run a step in a process group that ends with its time limit; return its record."""
    record: dict[str, Any] = {"step": step.name, "command": step.command, "status": "done"}
    began = time.monotonic()
    if missing := [str(path) for path in step.needs if not path.exists()]:
        return record | {"status": "failed", "error": f"missing: {', '.join(missing)}"}
    path = os.pathsep.join([str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(out / f"{step.name}.log", "ab") as log:
        process = subprocess.Popen(
            step.command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, "PYTHONPATH": path}
        )  # fmt: skip
        try:
            status = process.wait(limit_s)
            if status:
                record |= {
                    "status": "failed",
                    "error": f"exit status {status}: {_last_line(log.name)}",
                }
        except subprocess.TimeoutExpired:
            record |= {"status": "timeout", "error": f"not done within {limit_s:.0f} s"}
        finally:
            _end(process)
    record["seconds"] = round(time.monotonic() - began, 1)
    # A step that was ended may have written a part of its result.
    if step.writes is not None and step.writes.exists():
        record["result"] = json.loads(step.writes.read_text())
    return record


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the remaining processes of a step: by SIGTERM, so that they can save, then by SIGKILL."""
    for number, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _last_line(log: str) -> str:
    lines = [line for line in Path(log).read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no output"


def device_record(device: str) -> dict[str, Any]:
    """Describe the machine: the device, the cores, versions, and installed GPU decoders."""
    import torch

    decoders = {name: importlib.util.find_spec(name) is not None for name in ("torchcodec", "av")}
    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    return {
        "device": name,
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "decoders": decoders,
    }


def main() -> int:
    """Run the steps; return 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", type=Path, metavar="OUT", help="continue in this folder")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=15, help="no step starts after these")
    parser.add_argument("--steps", nargs="+", metavar="STEP", help="default: all")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--har7", type=Path)
    parser.add_argument("--har7-store", type=Path)
    parser.add_argument("--har7-copies", type=Path)
    parser.add_argument("--inflate-from", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    if (args.out is None) == (args.resume is None):
        parser.error("one of --out and --resume is required")
    args.out = (args.out or args.resume).resolve()
    args.out.mkdir(parents=True, exist_ok=args.resume is not None)
    args.videos = args.videos.resolve()
    steps_by_name = {step.name: step for step in steps(args)}
    for name in args.steps or ():
        if name not in steps_by_name:
            parser.error(f"--steps {name}: expected {', '.join(steps_by_name)}")
    (args.out / "device.json").write_text(json.dumps(device_record(args.device), indent=1))
    ends = time.monotonic() + 60 * args.minutes
    failed = 0
    for step in [steps_by_name[name] for name in args.steps or steps_by_name]:
        file = args.out / f"{step.name}.json"
        if file.exists() and json.loads(file.read_text())["status"] == "done":
            print(f"{step.name}: done before", flush=True)
            continue
        seconds_left = ends - time.monotonic()
        if seconds_left < 20:
            print(f"{step.name}: no time left", flush=True)
            continue
        record = run_step(step, args.out, min(step.limit_s, seconds_left))
        file.write_text(json.dumps(record, indent=1))
        failed += record["status"] != "done"
        print(f"{step.name}: {record['status']} {record.get('error', '')}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
