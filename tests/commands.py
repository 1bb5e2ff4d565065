"""A command line for tests of errors that any command can raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import click


def command_that_raises(
    error: BaseException, before: Callable[[BaseException], None] | None = None
) -> click.Group:
    """Return a command line whose command `go` calls `before` with an error, then raises it."""

    @click.group()
    def group() -> None:
        pass

    @group.command()
    @click.option("--debug", is_flag=True)
    @click.option("--number", type=int)
    def go(debug: bool, number: int | None) -> NoReturn:
        if before is not None:
            before(error)
        raise error

    return group
