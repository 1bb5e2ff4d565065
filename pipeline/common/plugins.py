"""Import code by name: a user's own function, or a package of the extras.

A function is named `package.module:factory`. It makes a teacher, a student or an initialisation.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .errors import DistInitError, UsageError, third_party

_FORM = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_factory(name: str) -> bool:
    """Return whether a name has the form `package.module:factory`."""
    return _FORM.fullmatch(name) is not None


def call_factory(
    name: str,
    prefix: str,
    options: Mapping[str, Any] | None = None,
    *,
    offered: Mapping[str, Any] | None = None,
    error: type[UsageError] = UsageError,
) -> object:
    """Call the function of that name and return its result.

    The module may be in the working folder.

    Args:
        name: `package.module:factory`.
        prefix: Begins the message, as in `--init a:b`.
        options: Arguments of the call.
        offered: Further arguments, each for a function that has a parameter of that name.
        error: Class of the errors.

    Raises:
        error: No such module or function, or it fails. A DistInitError passes unchanged.
    """
    module_name, _, function_name = name.partition(":")
    with _working_folder_on_path(), third_party(prefix, error):
        factory = getattr(importlib.import_module(module_name), function_name, None)
        if not callable(factory):
            raise error(f"{prefix}: module {module_name!r} has no function {function_name!r}")
        parameters = inspect.signature(factory).parameters if offered else ()
        extra = {key: value for key, value in (offered or {}).items() if key in parameters}
        return factory(**(options or {}), **extra)


@contextmanager
def _working_folder_on_path() -> Iterator[None]:
    """Add the working folder to `sys.path` during the block.

    A console script does not have it there, and a user's module is often in it.
    """
    folder = os.getcwd()
    added = folder not in sys.path
    if added:
        sys.path.append(folder)
    try:
        yield
    finally:
        if added:
            sys.path.remove(folder)


def import_extra(
    module: str, extra: str, option: str, kind: type[DistInitError] = UsageError
) -> Any:
    """Import a module of a package that distinit installs only with an extra.

    Args:
        module: The module, which is also the name of the package in the message.
        extra: Name of the extra.
        option: The option that requires the package, with its value.
        kind: Class of the error.

    Raises:
        kind: The package is missing, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        reason = "" if error.name == package else f" (importing it: {' '.join(str(error).split())})"
        raise kind(
            f'{option} requires {package}{reason}: pip install "distinit[{extra}]"'
        ) from None
