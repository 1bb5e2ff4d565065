"""Packages of the extras in pyproject.toml, imported where an option requires them."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import DistInitError, UsageError


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
