"""The stages: one module per command, `stage(options, console)`.

From Python each is a function of the package (`distinit.extract_targets`, …), see
pipeline/common/stage_function.py.
"""

from __future__ import annotations

# Command → module:name of its options model and of its stage, both below `distinit`. The modules of
# the models load no torch.
STAGES = {
    "demo": ("stages.demo_options:DemoConfig", "stages.demo:demo"),
    "prepare": ("pipeline.prepared.prepare_options:PrepareConfig", "stages.prepare:prepare"),
    "extract-targets": (
        "pipeline.extraction.extract_options:ExtractConfig",
        "stages.extract_targets:extract_targets",
    ),
    "train-student": (
        "pipeline.training.distillation_options:TrainConfig",
        "stages.train_student:train_student",
    ),
    "finetune": ("pipeline.evaluation.finetune_options:FinetuneConfig", "stages.finetune:finetune"),
    "evaluate": (
        "pipeline.evaluation.evaluation_options:EvaluateConfig",
        "stages.evaluate:evaluate",
    ),
    "predict": ("pipeline.evaluation.evaluation_options:PredictConfig", "stages.predict:predict"),
    "ablate": ("pipeline.ablation.ablate_options:AblateConfig", "stages.ablate:ablate"),
    "report": ("pipeline.reporting.report_options:ReportOptions", "stages.report:report"),
    "targets-info": (
        "pipeline.store.store_options:InfoOptions",
        "stages.targets_info:targets_info",
    ),
    "targets-browse": (
        "pipeline.store.store_options:BrowseOptions",
        "stages.targets_browse:targets_browse",
    ),
    "targets-probe": (
        "pipeline.evaluation.probe_options:ProbeOptions",
        "stages.targets_probe:targets_probe",
    ),
    "targets-compare": (
        "pipeline.evaluation.compare_options:CompareOptions",
        "stages.targets_compare:targets_compare",
    ),
    "targets-verify": (
        "pipeline.store.store_options:VerifyOptions",
        "stages.targets_verify:targets_verify",
    ),
    "targets-merge": (
        "pipeline.store.store_options:MergeOptions",
        "stages.targets_merge:targets_merge",
    ),
    "targets-export": (
        "pipeline.store.store_options:ExportOptions",
        "stages.targets_export:targets_export",
    ),
}
FUNCTIONS = {name.replace("-", "_"): name for name in STAGES if not name.startswith("targets-")}
