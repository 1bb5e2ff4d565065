"""A plan of ablations: from a short YAML file to cells, and from cells to the runs they share.

    title: Which frames of a clip make its target
    base:                                # sections as in any config file; `preset` names one to
      start from train-student: {preset: paper}
      finetune: {preset: hmdb51}
    axes:                                # several axes are multiplied
      picks:                             # values with names, each a set of keys: what belongs
          together is listed
        center: {train-student.targets.picks: center}
        random: {train-student.targets.picks: random}
      train-student.targets.tau: [1, 2]  # or a key and its values
    seeds: [0, 1, 2]
    datasets: [hmdb51]
    splits: [1]

`finetune.init` is `student`, the cell's own, unless a value of an axis says `scratch` or names a
file: then no student is trained, and the network and its clips are nevertheless those of the
section train-student.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from ..common.config import CONF, merge, nested, read_yaml
from ..common.errors import UsageError
from ..common.settings import Options
from ..reporting.published_results import PaperNumbers

PLANS = CONF / "ablations"
SECTIONS = ("train-student", "finetune")
STUDENT = "student"  # the value of finetune.init that means the cell's own

Keys = dict[str, Any]
"""Dotted key, its section first → value."""


class Plan(Options):
    """A plan as its file has it; see the module."""

    title: str
    paper: PaperNumbers | None = None
    base: dict[str, dict[str, Any]] = {}
    axes: dict[str, list[Any] | dict[str, Keys]] = Field(min_length=1)
    seeds: list[int] = Field([0], min_length=1)
    datasets: list[str] = []
    splits: list[int] = Field([1], min_length=1)

    @model_validator(mode="after")
    def _known_sections(self) -> Plan:
        keys = [f"{section}." for section in self.base]
        for name, values in self.axes.items():
            if not values:
                raise ValueError(f"axis {name!r} has no values")
            if isinstance(values, dict):
                keys += [key for value in values.values() for key in value]
            else:
                keys.append(name)
        for key in keys:
            if key.partition(".")[0] not in SECTIONS or "." not in key:
                sections = " or ".join(SECTIONS)
                raise ValueError(
                    f"{key!r}: a key begins with its section, {sections}, as in finetune.init"
                )
        return self

    def combinations(self) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
        """Names of the axes' values, and the sections they make, base included."""
        choices = []
        for name, values in self.axes.items():
            named = (
                values.items()
                if isinstance(values, dict)
                else [(_name(v), {name: v}) for v in values]
            )
            choices.append([(name, label, keys) for label, keys in named])
        for combination in itertools.product(*choices):
            sections: dict[str, Any] = {
                section: dict(self.base.get(section, {})) for section in SECTIONS
            }
            for _, _, keys in combination:
                for key, value in keys.items():
                    sections = merge(sections, nested(key, value))
            yield {axis: label for axis, label, _ in combination}, sections


@dataclass(frozen=True)
class Cell:
    """One run of stage three, and what leads to it; `sections` are those of the plan, seeds and
    data set not yet in."""

    axes: dict[str, str]
    sections: dict[str, Any]
    seed: int
    dataset: str
    split: int

    @property
    def row(self) -> str:
        """What the cell is called, whatever its seed, data set and split."""
        return " · ".join(self.axes.values())

    @property
    def needs_student(self) -> bool:
        """Whether stage three begins from a student that the cell trains."""
        return bool(self.sections["finetune"].get("init", STUDENT) == STUDENT)


def read_plan(where: str, base: Mapping[str, Any]) -> Plan:
    """The plan in a file, or one that ships with the package by its name; `base` is laid over the
    plan's.

    Raises UsageError, one line: what is wrong with it.
    """
    path = Path(where)
    shipped = PLANS / f"{where}.yaml"
    if not path.exists() and re.fullmatch(r"[\w-]+", where):
        if not shipped.exists():
            raise UsageError(
                f"{where}: no such plan; a file, or one of: {', '.join(shipped_plans())}"
            )
        path = shipped
    content = read_yaml(path, "plan")
    if isinstance(content.get("base", {}), dict):
        content["base"] = merge(content.get("base", {}), base)
    try:
        return Plan.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"{path}: {place or 'plan'}: {first['msg'].removeprefix('Value error, ')}"
        ) from None


def shipped_plans() -> list[str]:
    """Names of the plans that ship with the package."""
    return sorted(path.stem for path in PLANS.glob("*.yaml"))


def cells(plan: Plan, *, datasets: list[str], seeds: list[int], splits: list[int]) -> list[Cell]:
    """All cells: rows first, then data sets, splits and seeds. UsageError for a row that stands
    there twice."""
    found = []
    for axes, sections in plan.combinations():
        for dataset, split, seed in itertools.product(datasets, splits, seeds):
            found.append(Cell(axes, sections, seed, dataset, split))
    places = [(c.row, c.dataset, c.split, c.seed) for c in found]
    for place in places:
        if places.count(place) > 1:
            raise UsageError(
                f"the plan has {place[0]!r} twice for {place[1]}, split {place[2]}, seed {place[3]}"
            )
    return found


def _name(value: Any) -> str:
    return "none" if value is None else str(value)
