"""`distinit targets …`: look into a store, check it, put stores together, write them out."""

from __future__ import annotations

from typing import Any

import click

from .cli_options import examples, screen_options
from .cli_support import call_stage, pairs


@click.group()
def targets() -> None:
    """Look into a target store."""


@targets.command(
    "info",
    epilog=examples(
        "distinit targets info targets.zarr", "distinit targets info targets.zarr --json"
    ),
)
@click.argument("store")
@click.option(
    "--failed", is_flag=True, help="List the videos that failed, with the reason of each."
)
@screen_options
def targets_info(store: str, failed: bool, **given: Any) -> None:
    """What is in a store: corpora, videos, frames, teachers, failures."""
    call_stage("targets_info", "targets_info", given, store, list_failed=failed)


@targets.command(
    "browse",
    epilog=examples(
        "distinit targets browse targets.zarr --out look",
        "distinit targets browse targets.zarr --out look --sample 30 --videos kinetics=/data/k400",
    ),
)
@click.argument("store")
@click.option("--out", required=True, metavar="DIR", help="The folder for browse.html.")
@click.option(
    "--sample",
    type=int,
    default=12,
    metavar="N",
    help="Videos shown as strips of frames.  [default: 12]",
)
@click.option(
    "--seed", type=int, default=0, metavar="S", help="Which videos those are.  [default: 0]"
)
@click.option(
    "--videos",
    multiple=True,
    metavar="CORPUS=DIR",
    help="Where a corpus of the store lies now. Repeatable.",
)
@screen_options
def targets_browse(store: str, out: str, **given: Any) -> None:
    """A page with frames, labels and entropies of sampled videos, for any browser, without network.

    Also the most and least confident frames of each teacher, how often each class comes first, and
    the videos that failed. A video that is not here is shown as missing.
    """
    moved = pairs(given["videos"], "--videos")
    call_stage("targets_browse", "targets_browse", given, store, out, sample=given["sample"], seed=given["seed"],
               moved=moved)  # fmt: skip


@targets.command(
    "verify",
    epilog=examples(
        "distinit targets verify targets.zarr",
        "distinit targets verify targets.zarr --deep 20 --videos kinetics=/data/k400",
    ),
)
@click.argument("store")
@click.option(
    "--repair", is_flag=True, help="Drop what is broken, so that extract-targets fills it again."
)
@click.option(
    "--frames",
    is_flag=True,
    help="Hold the frames of all videos against their files; no teacher is run.",
)
@click.option(
    "--deep",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Decode N random videos again and run the teachers.",
)
@click.option(
    "--seed", type=int, default=0, metavar="S", help="Which videos those are.  [default: 0]"
)
@click.option(
    "--videos",
    multiple=True,
    metavar="CORPUS=DIR",
    help="Where a corpus of the store lies now. Repeatable.",
)
@click.option(
    "--teacher-weights",
    "teacher_weights",
    multiple=True,
    metavar="NAME=FILE",
    help="Where the weights of a teacher of the store lie now. Repeatable.",
)
@click.option(
    "--allow-teacher",
    "allow_teachers",
    multiple=True,
    metavar="TEACHER",
    help="With --deep, run the code of package.module:factory or download the weights of a model that the store names. "
    "Repeatable.",
)
@click.option(
    "--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.  [default: auto]"
)
@screen_options
def targets_verify(store: str, repair: bool, **given: Any) -> None:
    """Check a store: structure, counts, checksums, finiteness, entropy against logits.

    With --frames also against the videos, with --deep against videos and teachers. Exit status 1
    and a line for each thing that is wrong.
    """
    call_stage(
        "targets_verify",
        "targets_verify",
        given,
        store,
        repair=repair,
        frames=given["frames"],
        deep=given["deep"],
        seed=given["seed"],
        moved=pairs(given["videos"], "--videos"),
        weights=pairs(given["teacher_weights"], "--teacher-weights"),
        allow_teachers=given["allow_teachers"],
        device=given["device"],
    )


@targets.command(
    "merge",
    epilog=examples(
        "distinit extract-targets clips/ --out part-1.zarr --teacher resnet50 --part 1/2",
        "distinit extract-targets clips/ --out part-2.zarr --teacher resnet50 --part 2/2",
        "distinit targets merge part-1.zarr part-2.zarr --out targets.zarr",
    ),
)
@click.argument("parts", nargs=-1, required=True, metavar="PART...")
@click.option("--out", required=True, metavar="STORE", help="The store to make, or to go on with.")
@click.option(
    "--accept-run",
    is_flag=True,
    help="Merge parts of other batch size, precision, torch or device kind.",
)
@screen_options
def targets_merge(parts: tuple[str, ...], out: str, accept_run: bool, **given: Any) -> None:
    """Put finished stores of the same teachers and sampling together into one.

    No row is computed again and no logit changes. An interrupted merge goes on with the same
    command.
    """
    call_stage("targets_merge", "targets_merge", given, parts, out, accept_run=accept_run)


@targets.command(
    "export",
    epilog=examples(
        "distinit targets export targets.zarr --out targets.h5 --teacher resnet50",
        "distinit targets export targets.zarr --out kinetics.zarr --corpus kinetics",
        "distinit targets export https://data.example.org/all.zarr --out mine.zarr --videos-from list.txt",
    ),
)
@click.argument("store")
@click.option(
    "--out", required=True, metavar="OUT", help="NAME.h5: one HDF5 file. NAME.zarr: a store."
)
@click.option(
    "--teacher", "teachers", multiple=True, metavar="NAME", help="Only this teacher. Repeatable."
)
@click.option(
    "--corpus", "corpora", multiple=True, metavar="NAME", help="Only this corpus. Repeatable."
)
@click.option(
    "--videos-from",
    "videos_from",
    metavar="LIST",
    help="Only the videos of a text file: a path in its corpus, CORPUS=PATH or an absolute path a line.",
)
@click.option(
    "--shard-rows",
    type=int,
    metavar="R",
    help="Rows of a shard of a new store.  [default: by the size, 512 to 16384]",
)
@screen_options
def targets_export(store: str, out: str, **given: Any) -> None:
    """Write a store out, or some teachers, corpora and videos of it, as one HDF5 file or as a new
    store.

    HDF5 holds the usable videos: their frames, logits and entropies. A new store also holds the
    videos that failed, with their reasons, and is one like any other.
    """
    chosen = {key: given[key] for key in ("teachers", "corpora", "videos_from", "shard_rows")}
    call_stage("targets_export", "targets_export", given, store, out, **chosen)
