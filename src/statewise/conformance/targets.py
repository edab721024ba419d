"""From what a user types to layer classes: a registered name, `module:Class`, or `all`."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from statewise.errors import PluginError, StatewiseError
from statewise.layers.pluggable import PluggableLayer


def layers_named(target: str) -> dict[str, Any]:
    """Classes by the name to show. Raises `PluginError` for what cannot be found, or not be imported."""
    if ":" in target:
        return {target: _load(target)}
    names = PluggableLayer.names() if target == "all" else (target,)
    return {name: PluggableLayer.get(name) for name in names}


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    if not all([*module.split("."), *name.split(".")]):
        raise PluginError(f"'{target}' is not of the form module:Class")
    # A file in the working directory counts, as with `python -m`; the installed command leaves it out of the path.
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    failed = f"module '{module}' could not be imported"
    try:
        found: Any = import_module(module)
    except StatewiseError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise PluginError(f"there is no module '{error.name}' to take '{name}' from") from None
        raise PluginError(f"{failed}: {error}") from error
    except SystemExit as error:
        raise PluginError(f"{failed}: it ends the program with sys.exit({error.code!r})") from error
    except Exception as error:
        raise PluginError(f"{failed}: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise PluginError(f"module '{module}' has no class '{name}'")
        found = getattr(found, part)
    if not isinstance(found, type):
        raise PluginError(f"'{name}' in module '{module}' is no class: found {type(found).__name__}")
    return found
