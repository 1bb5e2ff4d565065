"""The README.md of an exported student: its clips, its outputs, and the numbers of its run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..common.tables import markdown_text
from ..evaluation.metrics import MEASURES
from .accuracy_tables import percent
from .runs import Run


def model_card(about: Mapping[str, Any], run: Run | None) -> str:
    """Return the card as Markdown, with the front matter that the hub reads.

    Args:
        about: The content of config.json.
        run: The run of the student; None for a file without a run, whose card has no numbers.
    """
    clip, heads = about["clip"], about["heads"]
    task = "video-classification" if "label" in heads else "feature-extraction"
    kind, dtype = (
        ("RGB", "uint8") if clip["channels"] == 3 else ("optical flow in pixels", "float32")
    )
    shape = f"{clip['channels']}, {clip['frames']}, {clip['size']}, {clip['size']}"
    lines = [
        "---",
        "library_name: distinit",
        f"pipeline_tag: {task}",
        "tags: [video, distinit]",
        "---",
        "",
        "# A video student of distinit",
        "",
        f"{about['description']}, for clips of {clip['frames']} frames of {clip['size']}x{clip['size']} pixels.",
        "",
        "```python",
        "import distinit",
        "import torch",
        "",
        'student = distinit.load_student("hf://ORG/NAME")  # or this folder',
        f"clips = torch.zeros(1, {shape}, dtype=torch.{dtype})  # {kind}",
        "outputs = student(distinit.normalize_clip(clips))  # of each head",
        "```",
        "",
        "Loading runs no code of the repository: the weights are safetensors, and the network is distinit's.",
        "",
        "## Outputs",
        "",
        *(
            f"- `{markdown_text(name)}`: {head['outputs']} outputs"
            + (f" ({_class_list(head['classes'])})" if head["classes"] else "")
            for name, head in heads.items()
        ),
        "",
        "## Results",
        "",
        *_results(run),
    ]
    return "\n".join(lines) + "\n"


def _class_list(classes: list[str], max_names: int = 20) -> str:
    shown = ", ".join(markdown_text(name) for name in classes[:max_names])
    return shown + (f" and {len(classes) - max_names} more" if len(classes) > max_names else "")


def _results(run: Run | None) -> list[str]:
    if run is None:
        return ["Exported from a file without its run: no results are known."]
    if run.metrics is None:
        fraction = run.explained_fraction
        if fraction is None:
            return ["The run recorded no results."]
        clips = (
            "held-out clips" if run.result.get("explained_by") == "held-out" else "training clips"
        )
        return [
            f"Distilled from the stored outputs of teachers: explained fraction {100 * fraction:.1f} % on {clips} "
            "(0 %: the best constant predictor, 100 %: the lower bound)."
        ]
    metrics = run.metrics
    protocol, intervals = metrics["protocol"], metrics["intervals"]
    lines = [
        f"On the test side of split {markdown_text(run.split)} of {markdown_text(run.dataset)}: "
        f"{metrics['videos']} videos ({len(metrics['failed'])} unreadable, counted as wrong), "
        f"{protocol['clips']} clips x {protocol['crops']} crops per video; initialisation: "
        f"{markdown_text(run.init)}.",
        "",
        "| accuracy | % [95 % interval] |",
        "|---|---:|",
        *(
            f"| {name} | {percent(metrics[key])} |"
            for key, name in MEASURES.items()
            if key in metrics
        ),
        "",
        f"The intervals are of a bootstrap over {intervals['units']} {intervals['resampled']}; they do not cover the "
        "seed of the training. The numbers are computed from the run's saved predictions.",
    ]
    if run.test_videos_seen:
        lines += [
            "",
            f"**{run.test_videos_seen} of the test videos were seen by the student that the training started from**, "
            "without their labels: these are not accuracies of unseen videos.",
        ]
    return lines
