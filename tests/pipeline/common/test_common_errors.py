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


def test_third_party_errors_begin_with_the_prefix() -> None:
    for error in (ValueError("one\ntwo"), KeyError(), RuntimeError("one")):
        with (
            pytest.raises(TeacherError, match="prefix") as failed,
            third_party("prefix", TeacherError),
        ):
            raise error
        assert "\n" not in str(failed.value)
        assert failed.value.__cause__ is error
    with pytest.raises(StoreError), third_party("prefix", TeacherError):
        raise StoreError("ours")
    with pytest.raises(KeyboardInterrupt), third_party("prefix", TeacherError):
        raise KeyboardInterrupt
