"""A third-party error becomes one line."""

from __future__ import annotations

import pytest

from distinit.pipeline.common.errors import (
    StoreError,
    TeacherError,
    first_line,
    in_one_line,
    third_party,
)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n\n  several\twords \n more"), "several words"),
        (ValueError(""), "ValueError"),
        (KeyError("key"), "'key'"),
        (OSError("x" * 5000), "x" * 200),
    ],
)
def test_the_first_line_of_an_error(error: Exception, line: str) -> None:
    assert first_line(error) == line
    name = type(error).__name__
    assert in_one_line(error) == (name if line == name else f"{name}: {line}")


def test_whatever_third_party_code_raises_names_who_failed() -> None:
    for error in (ValueError("one\ntwo"), KeyError(), RuntimeError("one")):
        with pytest.raises(TeacherError, match="who") as failed, third_party("who", TeacherError):
            raise error
        assert "\n" not in str(failed.value)
        assert failed.value.__cause__ is error
    with pytest.raises(StoreError), third_party("who", TeacherError):
        raise StoreError("ours")
    with pytest.raises(KeyboardInterrupt), third_party("who", TeacherError):
        raise KeyboardInterrupt
