"""Libraries that only some commands need, and that are installed on demand."""

from __future__ import annotations

import importlib
from types import ModuleType

from apq.errors import UserError


def extra(module: str, group: str) -> ModuleType:
    """Import a module of an optional group of dependencies. UserError says how to install the group.

    >>> extra("json", "export").__name__
    'json'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"this needs {module.split('.')[0]}: pip install -e '.[{group}]' ({error})") from error
