"""The whole pipeline on the small corpus that ships with the package."""

from __future__ import annotations

import contextlib
import shlex
import time
from pathlib import Path
from typing import Any

from rich.text import Text

from ..pipeline.common.config import CONF, load_config, write_config
from ..pipeline.common.console import Console
from ..pipeline.common.errors import StoreError, UsageError
from ..pipeline.common.run_dir import check_output_dir
from ..pipeline.evaluation.finetune_options import FinetuneConfig
from ..pipeline.extraction.extract_options import ExtractConfig
from ..pipeline.reporting.report_options import ReportOptions
from ..pipeline.store.reader import TargetStore
from ..pipeline.training.distillation_options import TrainConfig
from .demo_options import DemoConfig
from .extract_targets import extract_targets
from .finetune import finetune
from .report import report
from .train_student import train_student

CORPUS = CONF / "demo_corpus"
PRESET = "demo"
RECORD = "demo.yaml"


def demo(config: DemoConfig, console: Console) -> dict[str, Any]:
    """Extract, distil, finetune from the student and from scratch, report.

    What is done already is kept. The student never sees a test clip: the unlabelled corpus is the
    training side alone.

    Raises:
        TeacherError: The extra `demo` is not installed.
        DistInitError: As its stages.
    """
    began = time.monotonic()
    out, runs = config.out, config.out / "runs"
    if not (CORPUS / "labels.csv").is_file():
        raise UsageError(f"the demo corpus is not there: {CORPUS}; install distinit again")
    store = out / "targets.zarr"
    _require_own(out, store)
    write_config(out / RECORD, "demo", config)

    console.say("1/5 extract-targets: a frozen image model looks at the unlabelled clips, once")
    extraction = load_config(
        ExtractConfig,
        "extract-targets",
        preset=PRESET,
        options={"sources": [f"demo={CORPUS / 'unlabelled.txt'}"], **config.extract, "out": store},
    )
    extracted = extract_targets(extraction, console)

    console.say("2/5 train-student: a video network learns to predict what was stored, no labels")
    training = load_config(
        TrainConfig,
        "train-student",
        preset=PRESET,
        options={
            "video_roots": {"demo": str(CORPUS)},
            **config.train,
            "store": str(store),
            "out": str(runs / "student"),
            "resume": "auto",
        },
    )
    student = train_student(training, console)

    results = {}
    starts = {"distinit": str(runs / "student"), "scratch": "scratch"}
    for number, (name, init) in enumerate(starts.items(), start=3):
        console.say(
            f"{number}/5 finetune: on the labels, {'from the student' if number == 3 else 'from scratch'}"
        )
        results[name] = finetune(_finetuning(config, runs / name, init), console)

    console.say("5/5 report")
    made = report(ReportOptions(folders=[str(runs)], out=str(out / "report")), console)
    seconds = time.monotonic() - began
    _farewell(config, results, made, seconds, console)
    return {
        "out": str(out),
        "store": str(store),
        "report": made["report"],
        "seconds": round(seconds, 1),
        "extract_targets": extracted,
        "train_student": student,
        "finetune": results,
        "differences": made["differences"],
    }


def _require_own(out: Path, store: Path) -> None:
    """Check that the folder is one of the demo: its store would grow by the demo's clips.

    Version 0.1 wrote its record last: the store of an interrupted demo is known by its corpus.

    Raises:
        UsageError: It is not.
    """
    own_store = False
    if store.exists():
        with contextlib.suppress(StoreError):
            own_store = {corpus["name"] for corpus in TargetStore.open(store).index.corpora} <= {
                "demo"
            }
    check_output_dir(out, "demo", () if own_store else (store.name,), record=RECORD)


def _finetuning(config: DemoConfig, run: Path, init: str) -> FinetuneConfig:
    """Return the same settings for any initialisation."""
    return load_config(
        FinetuneConfig,
        "finetune",
        preset=PRESET,
        options={
            "dataset": f"csv:{CORPUS / 'labels.csv'}",
            **config.finetune,
            "init": init,
            # From scratch the network has to be named; from a student it is the student's.
            **({"student": _student(config)} if init == "scratch" else {}),
            "out": str(run),
            "resume": "auto",
        },
    )


def _student(config: DemoConfig) -> dict[str, Any]:
    options = {**config.train, "store": "-", "out": "-"}
    return load_config(
        TrainConfig, "train-student", preset=PRESET, options=options
    ).student.model_dump()


def _farewell(
    config: DemoConfig,
    results: dict[str, Any],
    made: dict[str, Any],
    seconds: float,
    console: Console,
) -> None:
    """Where things lie, what the numbers are worth, and what to type next."""
    tested = next(iter(results.values()))["test_videos"]
    out = shlex.quote(str(config.out))
    lines = [
        f"{seconds / 60:.1f} minutes. {tested} test clips and one seed are few: the demo shows that everything runs,",
        "not which start is better. Both starts had the same short schedule; scratch deserves its own, longer one.",
        "",
        f"  report   {made['report']}",
        f"  store    {config.out / 'targets.zarr'}",
        f"  student  {config.out / 'runs' / 'student' / 'student.safetensors'}",
        "",
        "Look into the store:",
        f"  distinit targets info {out}/targets.zarr",
        "With your own videos, no labels needed, then with your labels (a csv of path,label,split1):",
        "  distinit extract-targets VIDEOS/ --out targets.zarr --teacher efficientnet_lite0 --dry-run",
        "  distinit extract-targets VIDEOS/ --out targets.zarr --teacher efficientnet_lite0",
        "  distinit train-student --store targets.zarr --out runs/student",
        "  distinit finetune --init runs/student --dataset csv:labels.csv --out runs/ours",
        "  distinit report runs --out report",
    ]
    console.table(Text("\n".join(lines)))
