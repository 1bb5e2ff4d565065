"""`distinit ablate`: options → config → the stage."""

from __future__ import annotations

from typing import Any

import click

from .cli_options import (
    config_options,
    examples,
    key_argument,
    key_flag,
    key_option,
    screen_options,
)
from .cli_support import pairs, run_stage


@click.command(
    epilog=examples(
        "distinit ablate table2-picks --targets targets.zarr --dataset hmdb51=/data/hmdb51 --out ablations/picks",
        "distinit ablate plan.yaml --targets targets.zarr --dataset csv:labels.csv --split 1 --split 2 --out abl",
        "distinit ablate table3-loss --targets t.zarr --dataset csv:labels.csv --out abl --dry-run",
        "distinit ablate table2-picks --targets t.zarr --dataset csv:labels.csv --out small --seed 0 "
        "--set base.train-student.student.width=0.25 --set base.train-student.loop.epochs=4",
    ),
)
@key_argument("plan", key="plan", metavar="PLAN")
@key_option(
    "--targets",
    key="store",
    metavar="STORE",
    help="The target store of extract-targets: a folder or a URL.",
)
@key_option(
    "--out", key="out", metavar="DIR", help="The folder of all runs: made, or gone on with."
)
@key_option(
    "--dataset",
    key="datasets",
    multiple=True,
    metavar="KIND[:PATH][=ROOT]",
    help="What to finetune on, as `finetune --dataset`; after = its --root. Repeatable.  [default: the plan's]",
)
@key_option(
    "--split",
    key="splits",
    type=int,
    multiple=True,
    metavar="N",
    help="Repeatable.  [default: the plan's]",
)
@key_option(
    "--seed",
    key="seeds",
    type=int,
    multiple=True,
    metavar="N",
    help="Repeatable.  [default: the plan's]",
)
@key_option(
    "--videos",
    key="moved",
    multiple=True,
    metavar="CORPUS=DIR",
    convert=pairs,
    help="Where a corpus of the store lies now. Repeatable.",
)
@key_option(
    "--workers",
    key="workers",
    type=int,
    metavar="N",
    help="N runs side by side, a GPU each where there are.",
)
@key_option(
    "--scheduler",
    key="scheduler",
    metavar="ADDRESS",
    help="Runs on an existing dask.distributed cluster.",
)
@key_flag(
    "--dry-run",
    key="dry_run",
    help="List the cells, which are done, and the hours left; run nothing.",
)
@config_options
@screen_options
def ablate(**given: Any) -> None:
    """A grid of stages two and three over one store: what changes if …? No teacher is loaded.

    PLAN is a YAML file of a base, axes, seeds, data sets and splits (docs/ablate.md), or one that
    ships with the package. Equal runs are shared, what is done is kept, and the same command goes
    on where it was stopped. `distinit report DIR` makes the tables.
    """
    run_stage("ablate", "AblateConfig", "ablate", given)
