"""Run the whole pipeline on the small corpus that ships with the package."""

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
from ..pipeline.store.reader import TargetStore
from ..pipeline.training.distillation_options import TrainConfig
from .extract_targets import extract_targets
from .finetune import finetune
from .options import DemoConfig, ReportConfig
from .report import report
from .train_student import train_student

CORPUS = CONF / "demo_corpus"
PRESET = "demo"
RECORD = "demo.yaml"


def demo(config: DemoConfig, console: Console) -> dict[str, Any]:
    """Extract targets, train a student, finetune it and a network from scratch, and report.

    Finished parts are kept. The unlabelled corpus is the train side of the labels, so that the
    student never sees a test clip.

    Returns:
        The results of all stages.

    Raises:
        TeacherError: The extra `demo` is not installed.
        DistInitError: A stage failed.
    """
    started = time.monotonic()
    out, runs = config.out, config.out / "runs"
    if not (CORPUS / "labels.csv").is_file():
        raise UsageError(f"{CORPUS}: the demo corpus is missing; reinstall distinit")
    store = out / "targets.zarr"
    _check_out(out, store)
    write_config(out / RECORD, "demo", config)

    console.info("1/5 extract-targets: run a frozen image model once over the unlabelled clips")
    extraction = load_config(
        ExtractConfig,
        "extract-targets",
        preset=PRESET,
        options={"sources": [f"demo={CORPUS / 'unlabelled.txt'}"], **config.extract, "out": store},
    )
    extracted = extract_targets(extraction, console)

    console.info("2/5 train-student: train a video network on the stored targets, without labels")
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
    inits = {"distinit": str(runs / "student"), "scratch": "scratch"}
    for number, (name, init) in enumerate(inits.items(), start=3):
        console.info(
            f"{number}/5 finetune: train on the labels, {'from the student' if number == 3 else 'from scratch'}"
        )
        # Without a student, the network must be given.
        network = {"student": training.student.model_dump()} if init == "scratch" else {}
        results[name] = finetune(_finetuning(config, runs / name, init, network), console)

    console.info("5/5 report")
    reported = report(ReportConfig(folders=[str(runs)], out=str(out / "report")), console)
    seconds = time.monotonic() - started
    _show_next_steps(config, results, reported, seconds, console)
    return {
        "out": str(out),
        "store": str(store),
        "report": reported["report"],
        "seconds": round(seconds, 1),
        "extract_targets": extracted,
        "train_student": student,
        "finetune": results,
        "differences": reported["differences"],
    }


def _check_out(out: Path, store: Path) -> None:
    """Check that the folder is that of a demo, since clips of the demo are added to its store.

    Version 0.1 wrote its record last, so that the store of an interrupted demo is recognised by its
    corpus.
    """
    is_demo_store = False
    if store.exists():
        with contextlib.suppress(StoreError):
            corpora = {corpus["name"] for corpus in TargetStore.open(store).index.corpora}
            is_demo_store = corpora <= {"demo"}
    check_output_dir(out, "demo", () if is_demo_store else (store.name,), record=RECORD)


def _finetuning(
    config: DemoConfig, run: Path, init: str, network: dict[str, Any]
) -> FinetuneConfig:
    """Return the config of a finetuning; both initialisations have equal settings."""
    return load_config(
        FinetuneConfig,
        "finetune",
        preset=PRESET,
        options={
            "dataset": f"csv:{CORPUS / 'labels.csv'}",
            **config.finetune,
            "init": init,
            **network,
            "out": str(run),
            "resume": "auto",
        },
    )


def _show_next_steps(
    config: DemoConfig,
    results: dict[str, Any],
    reported: dict[str, Any],
    seconds: float,
    console: Console,
) -> None:
    """Show the paths of the results, the limits of the numbers, and commands to try next."""
    num_tested = next(iter(results.values()))["test_videos"]
    out = shlex.quote(str(config.out))
    lines = [
        f"{seconds / 60:.1f} minutes. With {num_tested} test clips and one seed, the demo shows that everything runs,",
        "but not which initialisation is better. Both had the same short schedule; scratch requires a longer one.",
        "",
        f"  report   {reported['report']}",
        f"  store    {config.out / 'targets.zarr'}",
        f"  student  {config.out / 'runs' / 'student' / 'student.safetensors'}",
        "",
        "Inspect the store:",
        f"  distinit targets info {out}/targets.zarr",
        "With your own videos, no labels needed, then with your labels (a csv of path,label,split1):",
        "  distinit extract-targets VIDEOS/ --out targets.zarr --teacher efficientnet_lite0 --dry-run",
        "  distinit extract-targets VIDEOS/ --out targets.zarr --teacher efficientnet_lite0",
        "  distinit train-student --store targets.zarr --out runs/student",
        "  distinit finetune --init runs/student --dataset csv:labels.csv --out runs/ours",
        "  distinit report runs --out report",
    ]
    console.table(Text("\n".join(lines)))
