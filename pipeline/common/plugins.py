"""Code that is imported by name: a user's own function, and packages of the extras.

A function has the form `package.module:factory`: of a teacher, a student, an initialisation.
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
    """Whether a name has the form `package.module:factory`."""
    return _FORM.fullmatch(name) is not None


def call_factory(
    name: str,
    who: str,
    options: Mapping[str, Any] | None = None,
    *,
    offered: Mapping[str, Any] | None = None,
    error: type[UsageError] = UsageError,
) -> object:
    """Call the function of that name and return its result.

    The module is looked for in the working folder, too.

    Args:
        name: `package.module:factory`.
        who: Begins the message, as in `--init a:b`.
        options: Arguments that the function is called with.
        offered: Arguments that it is called with where it has a parameter of that name.
        error: Class of the errors.

    Raises:
        error: No such module or function, or it fails; an error of distinit's own passes as it is.
    """
    module_name, _, function_name = name.partition(":")
    with _working_folder_on_path(), third_party(who, error):
        factory = getattr(importlib.import_module(module_name), function_name, None)
        if not callable(factory):
            raise error(f"{who}: module {module_name!r} has no function {function_name!r}")
        places = inspect.signature(factory).parameters if offered else ()
        extra = {key: value for key, value in (offered or {}).items() if key in places}
        return factory(**(options or {}), **extra)


@contextmanager
def _working_folder_on_path() -> Iterator[None]:
    """Put the working folder on the path of modules.

    A console script does not have it there, and a user's module often is in it.
    """
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        yield
    finally:
        if added:
            sys.path.remove(here)


def import_extra(
    module: str, extra: str, option: str, kind: type[DistInitError] = UsageError
) -> Any:
    """Import a module of a package that distinit installs only with an extra.

    Args:
        module: The module, which is also the name of the package in the message.
        extra: Name of the extra.
        option: What requires the package, as the option with its value.
        kind: Class of the error.

    Raises:
        DistInitError: Of this kind; the package is missing, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        why = "" if error.name == package else f" (importing it: {' '.join(str(error).split())})"
        raise kind(f'{option} requires {package}{why}: pip install "distinit[{extra}]"') from None
