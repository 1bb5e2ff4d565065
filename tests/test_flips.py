"""The helper for flipped bits: one bit at a time, in every kind of file, restored afterwards."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from distinit.tests.flips import flips


def made(folder: Path) -> Path:
    for name, content in {
        "c/0": bytes(100),
        "c/1": bytes(range(50)),
        "node/000000/zarr.json": b"{}",
        "empty": b"",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_one_bit_of_each_kind_at_a_time(tmp_path: Path) -> None:
    """Each flip differs by one bit in the file that it names; all are different; the copy is
    restored."""
    original = made(tmp_path / "original")
    expected = contents(original)
    seen: list[tuple[str, int, int]] = []
    for flip in flips(original, tmp_path / "copy", seed=1):
        now = contents(flip.path)
        (flip.path / "made meanwhile").write_text("by what is tested")
        changed = [name for name in expected if now[name] != expected[name]]
        assert changed == [flip.file]
        assert now[flip.file][flip.byte] ^ expected[flip.file][flip.byte] == 1 << flip.bit
        seen.append((flip.file, flip.byte, flip.bit))
    assert contents(tmp_path / "copy") == expected
    assert len(set(seen)) == len(seen)
    assert Counter(name.split("/")[0] for name, _, _ in seen) == {"c": 30, "node": 16}
    again = [(f.file, f.byte, f.bit) for f in flips(original, tmp_path / "again", seed=1)]
    assert again == seen


def test_one_file_and_chosen_kinds(tmp_path: Path) -> None:
    """A file is its own kind; patterns choose among the files of a folder."""
    original = made(tmp_path / "original")
    alone = list(flips(original / "c" / "1", tmp_path / "one", seed=0, per_kind=40))
    assert len(alone) == 40
    assert {f.file for f in alone} == {""}
    chosen = list(flips(original, tmp_path / "copy", seed=0, kinds=["*.json"]))
    assert {(f.file, f.kind) for f in chosen} == {("node/000000/zarr.json", "*.json")}
