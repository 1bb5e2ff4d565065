"""Names of the files and folders of a run."""

from __future__ import annotations

STEP_FOLDERS = {"train-student": "students", "finetune": "finetunes"}  # in an ablation's folder
