"""Flip one bit at a time in every kind of file of a folder, which a reader or a check must detect.

Example:
    from distinit.tests.flips import flips

    for flip in flips(store, tmp_path / "copy", seed=0):
        assert verify(flip.path), flip
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path


@dataclass(frozen=True)
class Flip:
    """A copy with one bit flipped.

    path: The copy, a file or a folder like the original. file: The flipped file, relative to the
    copy ("" if the copy is a file). kind: The pattern of the file. byte, bit: The position in it.
    """

    path: Path
    file: str
    kind: str
    byte: int
    bit: int


def kind_of(name: str) -> str:
    """Return the kind of a file: its path with `*` in place of each number.

    All shards of an array have the same kind.
    """
    return re.sub(r"\d+", "*", name)


def files_by_kind(root: Path, kinds: Sequence[str] | None = None) -> dict[str, list[Path]]:
    """Return the files below a folder (or a file itself) that hold any bytes, by kind.

    Args:
        root: The folder or file.
        kinds: Patterns of `fnmatch` for relative paths. The first match is the kind; a file without
            a match is skipped. None: every file, by `kind_of`.
    """
    paths_by_kind: dict[str, list[Path]] = {}
    for path in [root] if root.is_file() else sorted(root.rglob("*")):
        if path.is_symlink() or not path.is_file() or not path.stat().st_size:
            continue
        name = path.relative_to(root).as_posix() if path != root else root.name
        kind = (
            kind_of(name)
            if kinds is None
            else next((each for each in kinds if fnmatchcase(name, each)), None)
        )
        if kind is not None:
            paths_by_kind.setdefault(kind, []).append(path)
    return paths_by_kind


def positions(
    sizes: Mapping[Path, int], count: int, rng: random.Random
) -> Iterator[tuple[Path, int, int]]:
    """Yield up to `count` different bits of files: in the first and last byte, then random ones."""
    bits = 8 * sum(sizes.values())
    first, last = rng.randrange(8), bits - 1 - rng.randrange(8)
    chosen = dict.fromkeys([first, last])
    chosen |= dict.fromkeys(rng.sample(range(bits), min(count + 2, bits)))
    for position in list(chosen)[:count]:
        for path, size in sizes.items():
            if position < 8 * size:
                yield path, *divmod(position, 8)
                break
            position -= 8 * size


def flips(
    original: Path, copy: Path, seed: int, *, per_kind: int = 30, kinds: Sequence[str] | None = None
) -> Iterator[Flip]:
    """Copy a file or a folder once, then flip one bit of the copy at a time, `per_kind` of each
    kind of file.

    The flipped file is restored after each, and files that appeared meanwhile are removed; the copy
    stays. The same seed gives the same bits. `kinds` is that of `files_by_kind`.
    """
    copy_of = shutil.copyfile if original.is_file() else shutil.copytree
    copy_of(original, copy)
    before = set(copy.rglob("*"))
    for kind, paths in files_by_kind(original, kinds).items():
        sizes = {path: path.stat().st_size for path in paths}
        for source, byte, bit in positions(sizes, per_kind, random.Random(f"{seed} {kind}")):
            name = "" if source == original else source.relative_to(original).as_posix()
            target = copy / name
            with target.open("r+b") as file:
                file.seek(byte)
                value = file.read(1)[0]
                file.seek(byte)
                file.write(bytes([value ^ (1 << bit)]))
            yield Flip(copy, name, kind, byte, bit)
            shutil.copyfile(source, target)
            for extra in sorted(set(copy.rglob("*")) - before, reverse=True):
                shutil.rmtree(
                    extra
                ) if extra.is_dir() and not extra.is_symlink() else extra.unlink()
