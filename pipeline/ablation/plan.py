"""Plans of ablations: from a short YAML file to cells.

    title: Which frames of a clip make its target
    base:                                # sections as in a config file; `preset` is the default
      train-student: {preset: paper}
      finetune: {preset: hmdb51}
    axes:                                # several axes are multiplied
      picks:                             # named values, each with all keys that it sets
        center: {train-student.targets.picks: center}
        random: {train-student.targets.picks: random}
      train-student.targets.tau: [1, 2]  # or a key and its values
    seeds: [0, 1, 2]
    datasets: [hmdb51]
    splits: [1]

`finetune.init` is by default `student`, the student of the cell. If a value of an axis sets it to
`scratch` or a file, no student is trained; network and clips are still those of the section
train-student.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
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
STUDENT = "student"  # the value of finetune.init for the student of the cell

Keys = dict[str, Any]
"""Map from a dotted key, which begins with its section, to a value."""


class Plan(Options):
    """The content of a plan file; the docstring of the module has an example."""

    title: str
    paper: PaperNumbers | None = None
    base: dict[str, dict[str, Any]] = {}
    axes: dict[str, list[Any] | dict[str, Keys]] = Field(min_length=1)
    seeds: list[int] = Field([0], min_length=1)
    datasets: list[str] = []
    splits: list[int] = Field([1], min_length=1)

    @model_validator(mode="after")
    def _check_sections(self) -> Plan:
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
        """Yield the name of a value per axis, and the resulting sections, for every combination."""
        choices = []
        for name, values in self.axes.items():
            named_values = (
                values.items()
                if isinstance(values, dict)
                else [(_value_name(value), {name: value}) for value in values]
            )
            choices.append([(name, label, keys) for label, keys in named_values])
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
    """A finetuning with its training, if any; `sections` have neither seed nor data set."""

    axes: dict[str, str]
    sections: dict[str, Any]
    seed: int
    dataset: str
    split: int

    @property
    def row(self) -> str:
        """Name of the cell without seed, data set and split."""
        return " · ".join(self.axes.values())

    @property
    def needs_student(self) -> bool:
        """Whether finetuning starts from a student that the cell trains."""
        return bool(self.sections["finetune"].get("init", STUDENT) == STUDENT)


def read_plan(source: str, base: Mapping[str, Any]) -> Plan:
    """Read a plan.

    Args:
        source: A file, or the name of a plan that ships with the package.
        base: Sections that are merged over the base of the plan.

    Raises:
        UsageError: The plan does not exist, or its content is invalid.
    """
    path = Path(source)
    shipped = PLANS / f"{source}.yaml"
    if not path.exists() and re.fullmatch(r"[\w-]+", source):
        if not shipped.exists():
            raise UsageError(
                f"{source}: no such plan, expected a file or one of: {', '.join(shipped_plans())}"
            )
        path = shipped
    content = read_yaml(path, "plan")
    if isinstance(content.get("base", {}), dict):
        content["base"] = merge(content.get("base", {}), base)
    try:
        return Plan.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"{path}: {location or 'plan'}: {first['msg'].removeprefix('Value error, ')}"
        ) from None


def shipped_plans() -> list[str]:
    """List the names of the plans that ship with the package."""
    return sorted(path.stem for path in PLANS.glob("*.yaml"))


def list_cells(
    plan: Plan, *, datasets: list[str], seeds: list[int], splits: list[int]
) -> list[Cell]:
    """Return all cells of a plan, ordered by row, data set, split and seed.

    Raises:
        UsageError: Two cells have the same name.
    """
    cells = [
        Cell(axes, sections, seed, dataset, split)
        for axes, sections in plan.combinations()
        for dataset, split, seed in itertools.product(datasets, splits, seeds)
    ]
    counts = Counter((c.row, c.dataset, c.split, c.seed) for c in cells)
    for (row, dataset, split, seed), count in counts.items():
        if count > 1:
            raise UsageError(
                f"the plan has {row!r} twice for {dataset}, split {split}, seed {seed}"
            )
    return cells


def _value_name(value: Any) -> str:
    return "none" if value is None else str(value)
