"""`distinit finetune`, `evaluate` and `predict`: stage three. Options → config → one stage."""

from __future__ import annotations

from typing import Any

import click

from .cli_options import (
    Choices,
    config_options,
    examples,
    key_argument,
    key_flag,
    key_option,
    loop_options,
    screen_options,
    student_options,
)
from .cli_support import numbers, run_stage


@click.command(
    epilog=examples(
        "distinit finetune --init runs/student --dataset csv:labels.csv --out runs/ours",
        "distinit finetune --init scratch --preset scratch --dataset csv:labels.csv --out runs/scratch",
        "distinit finetune --init runs/student --dataset folder:/data/actions --epochs 20 --out runs/folder",
        "distinit finetune --init runs/student --dataset csv:labels.csv --videos small/ --out runs/ours",
    ),
)
@key_option(
    "--init",
    key="init",
    shown="scratch",
    metavar="INIT",
    help="scratch, a student's run folder or .safetensors, inflate:resnet18, inflate:FILE (a 2D ResNet), kinetics, "
    "kinetics:FILE, or package.module:factory.",
)
@key_option(
    "--inflation",
    key="inflation",
    shown="scaled",
    type=Choices("scaled", "replicated"),
    help="How inflate: repeats kernels over time: divided by their length, or as they are.",
)
@key_option(
    "--dataset",
    key="dataset",
    metavar="NAME",
    help="csv:FILE with columns path, label and splitN (train or test); folder:DIR with train/CLASS and test/CLASS; "
    "kinetics:FILE; hmdb51; ucf101.",
)
@key_option(
    "--root",
    key="root",
    metavar="DIR",
    help="Where the videos lie: of hmdb51, ucf101, kinetics:, csv:.",
)
@key_option(
    "--split",
    key="split",
    metavar="N|all",
    help="Which split; all: a run each, and the mean.  [default: 1]",
)
@key_flag(
    "--partial",
    key="partial",
    help="Go on where videos have no label, or labels no video (wrong in the test).",
)
@key_option(
    "--videos",
    key="videos",
    metavar="DIR",
    help="Copies by `distinit prepare`, read instead of the videos.",
)
@key_option("--out", key="out", metavar="RUN", help="The run folder to write.")
@student_options()
@key_option(
    "--dropout",
    key="dropout",
    shown=0.0,
    type=float,
    metavar="P",
    help="Of the features before the head.",
)
@key_option(
    "--freeze",
    key="freeze",
    shown="none",
    type=Choices("none", "backbone"),
    help="backbone: train the head alone.",
)
@key_option(
    "--test-clips", key="test.clips", shown=10, type=int, metavar="N", help="Clips a test video."
)
@key_option(
    "--test-crops",
    key="test.crops",
    shown=1,
    type=int,
    metavar="1|3",
    help="Crops of each test clip.",
)
@key_option(
    "--test-scores",
    key="test.scores",
    shown="softmax",
    type=Choices("softmax", "logits"),
    help="What is averaged over a video's clips.",
)
@key_flag("--verbose", key="verbose", help="Say of every tensor what it was loaded from.")
@loop_options(
    epochs=8,
    epoch_clips=40_000,
    batch_size=32,
    lr=0.002,
    momentum=0.9,
    weight_decay=5e-3,
    warmup_epochs=0,
    step_epochs=2,
    gamma=0.1,
    precision="fp32",
    device="auto",
    seed=0,
    log_every=20,
    checkpoint_every=500,
)
@config_options
@screen_options
def finetune(**given: Any) -> None:
    """Stage three: train a student on labels, from an initialisation or from scratch, and test it.

    Student, frames and size are those of the initialisation. RUN gets checkpoints, the config as
    used, model.safetensors and predictions.h5, from which every number can be computed again. A
    test video that cannot be read counts as wrong and is listed.
    """
    run_stage("finetune", "FinetuneConfig", "finetune", given)


@click.command(
    epilog=examples(
        "distinit evaluate runs/ours",
        "distinit evaluate runs/ours --dataset csv:others.csv --split 2 --out runs/ours-on-others",
        "distinit evaluate runs/ours --test-clips 5 --test-crops 3 --out runs/ours-15-views",
        "distinit evaluate runs/rgb runs/flow --fuse --weights 1,1.5 --out runs/both",
        "distinit evaluate runs/ours runs/scratch --compare",
    ),
)
@key_argument("runs", key="runs", nargs=-1, metavar="RUN...")
@key_flag("--fuse", key="fuse", help="Late fusion of the runs' saved predictions, into --out.")
@key_option(
    "--weights",
    key="weights",
    metavar="W,W",
    convert=numbers,
    help="Of each fused run.  [default: equal]",
)
@key_flag(
    "--compare",
    key="compare",
    help="What the first run gains over the second, by class, with p-values.",
)
@key_option(
    "--dataset", key="dataset", metavar="NAME", help="As for finetune.  [default: the run's]"
)
@key_option("--root", key="root", metavar="DIR", help="Where the videos lie.  [default: the run's]")
@key_option("--split", key="split", metavar="N|all", help="Which split.  [default: the run's]")
@key_flag(
    "--partial", key="partial", help="Go on where videos have no label, or labels no video (wrong)."
)
@key_option(
    "--videos",
    key="videos",
    metavar="DIR",
    help="Copies by `distinit prepare`.  [default: the run's]",
)
@key_option(
    "--out", key="out", metavar="DIR", help="The folder to write.  [default: the run's own]"
)
@key_option(
    "--device", key="device", shown="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N."
)
@key_option(
    "--gpus",
    key="gpus",
    shown=1,
    type=int,
    metavar="N",
    help="Processes on this machine, one a GPU.",
)
@key_option(
    "--test-clips",
    key="test.clips",
    type=int,
    metavar="N",
    help="Clips a video.  [default: the run's]",
)
@key_option(
    "--test-crops",
    key="test.crops",
    type=int,
    metavar="1|3",
    help="Crops of each.  [default: the run's]",
)
@key_option(
    "--test-scores",
    key="test.scores",
    type=Choices("softmax", "logits"),
    help="What is averaged over a video's clips.  [default: the run's]",
)
@key_option(
    "--test-frames",
    key="test.frames",
    type=Choices("ordered", "shuffled", "frozen"),
    help="What of motion is left in a clip.  [default: the run's]",
)
@config_options
@screen_options
def evaluate(**given: Any) -> None:
    """Test a finetuned run again, or fuse or compare the predictions of several.

    A RUN is a folder of finetune, or its model.safetensors (with --dataset and --out). 10 uniform
    clips a video and the mean of the softmax, as it was trained to be tested, unless options say
    otherwise. --fuse and --compare take runs or predictions.h5 files of the same test videos;
    nothing is decoded again.
    """
    run_stage("evaluate", "EvaluateConfig", "evaluate", given)


@click.command(
    epilog=examples(
        "distinit predict runs/ours holiday.mp4 clips/*.mp4",
        "distinit predict runs/ours clips/ --top 3 --json > classes.json",
    ),
)
@key_argument("model", key="model", metavar="MODEL")
@key_argument("sources", key="sources", nargs=-1, metavar="VIDEO...")
@key_option("--top", key="top", shown=5, type=int, metavar="N", help="Classes shown of each video.")
@key_option(
    "--test-clips", key="test.clips", shown=10, type=int, metavar="N", help="Clips of a video."
)
@key_option(
    "--test-crops", key="test.crops", shown=1, type=int, metavar="1|3", help="Crops of each clip."
)
@key_option(
    "--device", key="device", shown="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N."
)
@config_options
@screen_options
def predict(**given: Any) -> None:
    """The classes of your own videos, by a finetuned MODEL: a run folder or its model.safetensors.

    A VIDEO is a file, a folder, a quoted glob or a list. Exits with 1 where one cannot be read; it
    is listed with the reason, and the others are shown all the same.
    """
    run_stage("predict", "PredictConfig", "predict", given)
