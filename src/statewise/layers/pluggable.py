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
    _plugins_loaded = False

    @classmethod
    def register(cls, name: str, *, replace: bool = False) -> Callable[[LayerClass], LayerClass]:
        """Class decorator: make a layer available under `name`.

        `replace=True` takes over a name that exists; without it a second claim raises `PluginError` naming both.
        """

        def decorate(layer: LayerClass) -> LayerClass:
            holder = cls._classes.get(name)
            if holder is not None and not replace and _path(holder) != _path(layer):
                raise PluginError(f"layer name '{name}' is claimed by both {_path(holder)} and {_path(layer)}")
            for method in ("state_spec", "forward"):
                if not callable(getattr(layer, method, None)):
                    raise PluginError(f"layer '{name}' ({_path(layer)}) has no method {method}()")
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
    def names(cls) -> list[str]:
        cls._load_plugins()
        return sorted(cls._classes)

    @classmethod
    def _load_plugins(cls) -> None:
        if cls._plugins_loaded:
            return
        cls._plugins_loaded = True
        for entry in entry_points(group=GROUP):
            try:
                entry.load()
            except PluginError:
                raise
            except Exception as error:
                raise PluginError(f"plug-in '{entry.name}' ({entry.value}) could not be loaded: {error}") from error


def _path(layer: type) -> str:
    return f"{layer.__module__}.{layer.__qualname__}"
