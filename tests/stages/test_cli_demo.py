"""Run the demo as a command on a few of its clips, and run it again when it is finished."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from distinit.pipeline.common.config import CONF
from distinit.stages.demo import CORPUS
from distinit.tests import warm

pytestmark = pytest.mark.slow

pytest.importorskip("efficientnet_lite_pytorch", reason="the extra `demo` is not installed")


def rows() -> list[dict[str, str]]:
    with open(CORPUS / "labels.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_corpus_is_complete_small_and_split_by_source() -> None:
    clips = rows()
    files = {path.relative_to(CORPUS).as_posix() for path in CORPUS.rglob("*.mp4")}
    assert {row["path"] for row in clips} == files
    assert 80 <= len(clips) <= 120
    assert sum((CORPUS / name).stat().st_size for name in files) < 5_000_000
    for split in ("split1", "split2", "split3"):
        train = {row["source"] for row in clips if row[split] == "train"}
        test = {row["source"] for row in clips if row[split] == "test"}
        assert train.isdisjoint(test)
        assert {row["label"] for row in clips if row[split] == "test"} == {
            row["label"] for row in clips
        }
    assert all([row["split1"], row["split2"], row["split3"]].count("test") == 1 for row in clips)
    unlabelled = (CORPUS / "unlabelled.txt").read_text().splitlines()
    assert unlabelled == [row["path"] for row in clips if row["split1"] == "train"]
    assert "Apache License" in (CORPUS / "NOTICE").read_text()
    assert (CONF / "demo.yaml").is_file()


def run(folder: Path, *settings: str) -> dict[str, Any]:
    options = [text for setting in settings for text in ("--set", setting)]
    process = warm.run("demo", "--out", "out", "--json", *options, cwd=folder)
    assert process.returncode == 0, process.stderr
    result: dict[str, Any] = json.loads(process.stdout)
    return result


def test_the_demo_runs_and_keeps_finished_stages(tmp_path: Path) -> None:
    """Run all stages with real weights on one clip per class and side; any accuracy will do."""
    clips = {(row["label"], row["split1"]): row for row in rows()}.values()
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split1"])
        writer.writerows([str(CORPUS / row["path"]), row["label"], row["split1"]] for row in clips)
    loop = "{batch_size: 4, epochs: 1, epoch_clips: 4, warmup_epochs: 0, step_epochs: 1}"
    settings = (
        f"extract.sources=[demo={CORPUS / 'Walking'}]",
        "extract.sampling.every=16",
        f"train.loop={loop}",
        "train.video_roots={}",
        f"finetune.loop={loop}",
        "finetune.test.clips=1",
        "finetune.test.crops=1",
        f"finetune.dataset=csv:{tmp_path / 'labels.csv'}",
    )
    first = run(tmp_path, *settings)
    assert first["extract_targets"]["ok"] == 16
    assert set(first["finetune"]) == {"distinit", "scratch"}
    assert first["finetune"]["distinit"]["tensors_loaded"] > 200
    assert first["finetune"]["scratch"]["tensors_loaded"] == 0
    assert first["finetune"]["scratch"]["test_videos"] == 7
    assert (tmp_path / first["report"]).read_text().startswith("<!")
    assert (tmp_path / "out" / "demo.yaml").is_file()

    second = run(tmp_path, *settings)
    assert second["extract_targets"]["new_rows"] == 0
    assert second["train_student"]["already_finished"]
    assert all(result["already_finished"] for result in second["finetune"].values())
    for name, result in second["finetune"].items():
        assert result["metrics"] == first["finetune"][name]["metrics"]
