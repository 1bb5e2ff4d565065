"""Export a student as ONNX, torch.export, TorchScript or a folder for the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..pipeline.common.console import Console
from ..pipeline.common.errors import UsageError
from ..pipeline.common.files import replacing, write_page, write_whole
from ..pipeline.common.run_dir import CONFIG, MODEL_FILE, recorded_sections
from ..pipeline.evaluation.own_videos import claim_file
from ..pipeline.reporting.model_card import model_card
from ..pipeline.reporting.run_folders import read_run
from ..pipeline.reporting.runs import KINDS, Run
from ..pipeline.students.graphs import (
    CLIPS,
    PROBES,
    largest_difference,
    make_graph,
    output_names,
    probe_clips,
    require_onnx,
    run_graph,
    student_outputs,
)
from ..pipeline.students.student import Student
from ..pipeline.students.student_files import load_student, save_student
from ..pipeline.students.student_options import ENDINGS, GraphConfig

FORMAT, FORMAT_VERSION = "distinit-export", 1
CONFIG_JSON, CARD = "config.json", "README.md"


def export(config: GraphConfig, console: Console) -> dict[str, Any]:
    """Write a student in another form, and compare the exported model with the student.

    The exported file is run on random clips. If its outputs differ, nothing is left at `out` except
    the model file of `hub`.

    Returns:
        Paths, and the largest difference between an output and that of the student.

    Raises:
        CheckpointError: There is no student, it cannot be exported, or the outputs differ.
        UsageError: `out` cannot be written, or a package is missing.
    """
    if config.to == "onnx":
        require_onnx()
    student = load_student(config.model, factory=config.factory)
    endings = {ENDINGS[config.to]: ""} if config.to in ENDINGS else {}
    out = claim_file(config.out, endings, "export", config, second_ending=".json")
    about = _description(student, config)
    probe = probe_clips(student, PROBES)
    expected = student_outputs(student, probe)
    if config.to == "hub":
        run = _run_of(config.model)
        save_student(out / MODEL_FILE, student, _public_meta(student))
        outputs = student_outputs(load_student(out / MODEL_FILE, factory=config.factory), probe)
        difference = largest_difference(outputs, expected, config.tolerance)
        write_page(out / CARD, model_card(about, run))
        record = out / CONFIG_JSON
    else:
        content = make_graph(student, config.to)
        with replacing(out) as partial:
            partial.write_bytes(content)
            outputs = run_graph(partial.read_bytes(), config.to, probe)
            difference = largest_difference(outputs, expected, config.tolerance)
        record = out.with_name(f"{out.name}.json")
    about["verified"] = {"probe": list(probe.shape), "largest_difference": difference}
    write_whole(record, json.dumps(about, indent=1).encode(), UsageError)
    console.info(f"{config.to}: {out}; the largest difference from the student is {difference:.2g}")
    if config.to == "hub":
        console.info(f"next: hf upload ORG/NAME {out}; distinit.load_student('hf://ORG/NAME')")
    return {"out": str(out), "to": config.to, "about": str(record), **about["verified"]}


def _description(student: Student, config: GraphConfig) -> dict[str, Any]:
    """Return the metadata that a program needs to use the export, as plain data."""
    meta, rgb = student.meta.completed(student.options.channels), student.options.channels == 3
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "distinit": __version__,
        "torch": torch.__version__,
        "to": config.to,
        "description": student.options.describe(),
        "student": student.options.model_dump(mode="json"),
        "heads": {
            name: {"outputs": count, "classes": meta.classes.get(name)}
            for name, count in student.classes.items()
        },
        "clip": {
            "channels": student.options.channels,
            "frames": meta.clip_length,
            "size": meta.clip_size,
            "resize": meta.resize,
            "mean": meta.mean,
            "std": meta.std,
        },
        "inputs": {CLIPS: "uint8 [B, 3, T, H, W]" if rgb else "float32 [B, 2, T, H, W]"},
        "outputs": output_names(student),
    }


def _public_meta(student: Student) -> Any:
    """Return the metadata without the paths of this machine."""
    extra = {
        key: value for key, value in student.meta.extra.items() if key not in ("dataset", "init")
    }
    return student.meta.model_copy(update={"extra": extra})


def _run_of(model: str) -> Run | None:
    """Return the run of a run folder, None for a file."""
    folder = Path(model)
    is_run = folder.is_dir() and recorded_sections(folder / CONFIG) & set(KINDS)
    return read_run(folder, folder.resolve().name) if is_run else None
