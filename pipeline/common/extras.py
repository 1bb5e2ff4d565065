"""Packages of the extras in pyproject.toml, imported where an option requires them."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import UsageError


def import_extra(module: str, extra: str, option: str) -> Any:
    """Import a module of a package that distinit installs only with an extra.

    Args:
        module: The module, which is also the name of the package in the message.
        extra: Name of the extra.
        option: The option with its value that requires the package.

    Raises:
        UsageError: The package is missing, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        why = "" if error.name == package else f" (importing it: {' '.join(str(error).split())})"
        raise UsageError(
            f'{option} requires {package}{why}: pip install "distinit[{extra}]"'
        ) from None
