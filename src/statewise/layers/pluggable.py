"""The registry of token-mixing layers. Packages add to it through the entry-point group `statewise.plugins`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, ClassVar, TypeVar

from statewise.config import EngineConfig
from statewise.errors import CheckpointError, PluginError, StatewiseError
from statewise.layers.mixer import Capabilities, TokenMixer

GROUP = "statewise.plugins"
BUILT_IN = (
    "statewise.layers.attention.gqa",
    "statewise.layers.attention.mla",
    "statewise.layers.linear_attention.bailing",
    "statewise.layers.linear_attention.kda",
    "statewise.layers.linear_attention.minimax",
)
"""The modules whose layers are known before any plug-in's."""

LayerClass = TypeVar("LayerClass", bound=type)


@dataclass(frozen=True)
class Claim:
    """One class under one name: as its holder, or in place of the holder."""

    layer: type
    replace: bool


class PluggableLayer:
    """Names to classes. A model asks for its layers by name, so that a package can add or replace one.

    A name has at most one holder and at most one replacement. Both claims are kept, so it does not matter which of
    the two modules was imported first.
    """

    _claims: ClassVar[dict[str, list[Claim]]] = {}
    _complete = False  # built-in layers and plug-ins are loaded

    @classmethod
    def register(cls, name: str, *, replace: bool = False) -> Callable[[LayerClass], LayerClass]:
        """Class decorator: make a layer available under `name`.

        `replace=True` takes the place of the layer that holds the name; without it the class becomes its holder.
        Raises `PluginError` for a second claim of either kind, naming both classes, and for what is not a layer.
        """

        def decorate(layer: LayerClass) -> LayerClass:
            _check_layer(name, layer)
            # The same class again is its module executed once more; the newer object counts.
            others = [claim for claim in cls._claims.get(name, []) if _path(claim.layer) != _path(layer)]
            for claim in others:
                if claim.replace == replace:
                    both = f"both {described(claim.layer)} and {described(layer)}"
                    raise PluginError(
                        f"layer '{name}' is replaced by {both}: only one of them can be installed"
                        if replace
                        else f"layer name '{name}' is claimed by {both}: one of them needs another name or replace=True"
                    )
            cls._claims[name] = [*others, Claim(layer, replace)]
            return layer

        return decorate

    @classmethod
    def get(cls, name: str) -> Any:
        """The class to use under `name`. Raises `PluginError` that lists the known names."""
        cls._load()
        if name not in cls._claims:
            raise PluginError(f"no layer is registered as '{name}'; known: {', '.join(cls.names())}")
        return cls._chosen(name).layer

    @classmethod
    def make(cls, name: str, config: Any, engine_config: EngineConfig, prefix: str) -> TokenMixer:
        """The layer `name` of a model with `config`, without weights.

        Raises `PluginError`, besides the cases of `get`, when the layer cannot be made from this configuration: most
        often it looks for a field that this kind of model does not have.
        """
        layer = cls.get(name)
        try:
            mixer: TokenMixer = layer(config, engine_config, prefix)
        except StatewiseError:
            raise
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            if isinstance(error, AttributeError) and error.obj is config:
                cause = f"it reads '{error.name}', which the configuration of this architecture does not have"
            raise PluginError(f"layer '{name}' ({described(layer)}) at {prefix} cannot be made: {cause}") from error
        return mixer

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """All registered names, the plug-ins' included."""
        cls._load()
        return tuple(sorted(cls._claims))

    @classmethod
    def origin(cls, name: str) -> str:
        """Where the layer under `name` comes from: `built in`, or the distribution, and what it takes the place of."""
        layer = cls.get(name)
        replaced = [claim.layer for claim in cls._claims[name] if claim.layer is not layer]
        return provider(layer) + "".join(f", in place of {_path(other)}" for other in replaced)

    @classmethod
    def name_of(cls, layer: type) -> str:
        """The first name that a class is registered under; the class's own if there is none."""
        for name, claims in cls._claims.items():
            if any(claim.layer is layer for claim in claims):
                return name
        return layer.__name__

    @classmethod
    def _chosen(cls, name: str) -> Claim:
        """The replacement if there is one, otherwise the holder."""
        return max(cls._claims[name], key=lambda claim: claim.replace)

    @classmethod
    def _load(cls) -> None:
        """Make the built-in layers known, then those of the installed plug-ins."""
        if not cls._complete:
            cls._complete = True  # at once: a plug-in may ask for a layer while it is loaded
            try:
                for module in BUILT_IN:
                    import_module(module)
                for entry in entry_points(group=GROUP):
                    cls._load_entry(entry)
            except BaseException:
                cls._complete = False
                raise
        for name, claims in cls._claims.items():
            if all(claim.replace for claim in claims):
                held = ", ".join(sorted(cls._claims.keys() - {name}))
                raise PluginError(
                    f"{described(claims[0].layer)} replaces the layer '{name}', which does not exist; known: {held}"
                )

    @classmethod
    def _load_entry(cls, entry: EntryPoint) -> None:
        """An entry point is a module that registers layers, or a layer; one without a name gets the entry point's."""
        plugin = f"plug-in '{entry.name}' ({entry.value}{_distribution(entry)})"
        try:
            found = entry.load()
        except PluginError:
            raise
        except (Exception, SystemExit) as error:
            malformed = EntryPoint.pattern.match(entry.value) is None
            cause = "it must be of the form module or module:Class" if malformed else f"{type(error).__name__}: {error}"
            raise PluginError(f"{plugin} could not be loaded: {cause}") from error
        registered = [claim.layer for claims in cls._claims.values() for claim in claims]
        if isinstance(found, ModuleType):
            if not any(_shared_prefix(layer.__module__, found.__name__) for layer in registered):
                raise PluginError(f"{plugin} registers no layer")
        elif not (isinstance(found, type) and issubclass(found, TokenMixer)):
            kind = found.__name__ if isinstance(found, type) else type(found).__name__
            raise PluginError(f"{plugin} is neither a layer nor a module that registers one: found {kind}")
        elif found not in registered:
            cls.register(entry.name)(found)


def resolve(asked: tuple[str, ...], replacements: Mapping[str, str]) -> tuple[str, ...]:
    """The registered name of each layer's mixer, with the choices of config.json's `replace_layers` made.

    `asked` are the names that the architecture asks for, layer by layer; `replacements` maps some of them to the
    names to use instead. Raises `CheckpointError` for a name that the model does not ask for, `PluginError` for a
    target that is not registered.
    """
    where = "config.json: 'replace_layers'"
    for name, target in replacements.items():
        if name not in asked:
            known = ", ".join(dict.fromkeys(asked))
            raise CheckpointError(f"{where} names '{name}', which is not a layer of this model; its layers are {known}")
        if target not in PluggableLayer.names():
            known = ", ".join(PluggableLayer.names())
            raise PluginError(f"{where}: no layer is registered as '{target}'; known: {known}")
    return tuple(replacements.get(name, name) for name in asked)


def provider(layer: type) -> str:
    """`built in`, or the distribution whose entry point leads to the class, with its version."""
    if layer.__module__.startswith("statewise."):
        return "built in"
    entries = [entry for entry in entry_points(group=GROUP) if _shared_prefix(entry.module, layer.__module__)]
    if not entries:
        return f"registered by {layer.__module__}"
    nearest = max(entries, key=lambda entry: _shared_prefix(entry.module, layer.__module__))
    return _distribution(nearest).removeprefix(", ") or f"entry point '{nearest.name}'"


def _distribution(entry: EntryPoint) -> str:
    return "" if entry.dist is None else f", {entry.dist.name} {entry.dist.version}"


def _shared_prefix(one: str, other: str) -> int:
    """How many leading parts two dotted names have in common."""
    count = 0
    for left, right in zip(one.split("."), other.split("."), strict=False):
        if left != right:
            break
        count += 1
    return count


def _check_layer(name: str, layer: type) -> None:
    """Raise `PluginError` unless the class says all that the engine needs to know of a layer."""
    said = f"layer '{name}' ({described(layer)})"
    if not (isinstance(layer, type) and issubclass(layer, TokenMixer)):
        raise PluginError(f"{said} must derive from LinearAttention or TokenMixer")
    for method in ("state_spec", "forward"):
        if not _defines(layer, method):
            raise PluginError(f"{said} has no method {method}()")
    if getattr(layer, "scope", None) not in ("record", "page"):
        raise PluginError(f"{said} must have the scope 'record' or 'page'")
    if not isinstance(getattr(layer, "state_kind", None), str):
        raise PluginError(f"{said} has no state_kind, a word for the kind of its state")
    if not isinstance(getattr(layer, "capabilities", None), Capabilities):
        raise PluginError(f"{said} has no capabilities: Capabilities({{'cpu': 'what serves it there'}})")


def described(layer: type) -> str:
    """A class in a message, with where it comes from."""
    return f"{_path(layer)} ({provider(layer)})" if isinstance(layer, type) else repr(layer)


def _path(layer: type) -> str:
    return f"{layer.__module__}.{layer.__qualname__}"


def _defines(layer: type, method: str) -> bool:
    """Whether the class or a base of it gives a method a body; the declarations of the base classes do not count."""
    found = getattr(layer, method, None)
    declared = getattr(found, "__isabstractmethod__", False) or getattr(found, "__module__", "").startswith("torch.")
    return callable(found) and not declared
