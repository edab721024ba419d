"""The registry of token-mixing layers. Packages add to it through the entry-point group `statewise.plugins`."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, ClassVar, TypeVar

from statewise.errors import PluginError

GROUP = "statewise.plugins"
LayerClass = TypeVar("LayerClass", bound=type)


class PluggableLayer:
    """Names to classes. A model asks for its layers by name, so that a package can add or replace one."""

    _classes: ClassVar[dict[str, type]] = {}
    _replaced: ClassVar[set[str]] = set()
    _plugins_loaded = False

    @classmethod
    def register(cls, name: str, *, replace: bool = False) -> Callable[[LayerClass], LayerClass]:
        """Class decorator: make a layer available under `name`.

        `replace=True` takes over a name that exists; without it a second claim raises `PluginError` naming both.
        """

        def decorate(layer: LayerClass) -> LayerClass:
            for method in ("state_spec", "forward"):
                if not _defines(layer, method):
                    raise PluginError(f"layer '{name}' ({_path(layer)}) has no method {method}()")
            holder = cls._classes.get(name)
            if holder is not None and _path(holder) != _path(layer) and not replace:
                if name in cls._replaced:  # the plain claim of the class that was replaced, imported later
                    return layer
                raise PluginError(f"layer name '{name}' is claimed by both {_path(holder)} and {_path(layer)}")
            if replace:
                cls._replaced.add(name)
            cls._classes[name] = layer
            return layer

        return decorate

    @classmethod
    def get(cls, name: str) -> Any:
        """The class registered under `name`. Raises `PluginError` that lists the known names."""
        cls._load_plugins()
        if name not in cls._classes:
            raise PluginError(f"no layer is registered as '{name}'; known: {', '.join(sorted(cls._classes))}")
        return cls._classes[name]

    @classmethod
    def _load_plugins(cls) -> None:
        if cls._plugins_loaded:
            return
        for entry in entry_points(group=GROUP):
            try:
                entry.load()
            except PluginError:
                raise
            except Exception as error:
                raise PluginError(f"plug-in '{entry.name}' ({entry.value}) could not be loaded: {error}") from error
        cls._plugins_loaded = True


def _path(layer: type) -> str:
    return f"{layer.__module__}.{layer.__qualname__}"


def _defines(layer: type, method: str) -> bool:
    """Whether the class or a base of it gives a method a body; the declarations of the base classes do not count."""
    found = getattr(layer, method, None)
    declared = getattr(found, "__isabstractmethod__", False) or getattr(found, "__module__", "").startswith("torch.")
    return callable(found) and not declared
