"""What the engine asks of every kind of layer before it starts: a sound declaration, and a trial that keeps to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from statewise.config import EngineConfig
from statewise.errors import BlockError, ConfigError, PluginError, StatewiseError
from statewise.layers.mixer import TokenMixer
from statewise.layers.pluggable import PluggableLayer
from statewise.memory.blocks import ALIGNMENT, BlockPool, BlockSpec, Field, Shard, StateSpec
from statewise.ops.batch import Piece, build_batch

PROMPT = 3  # tokens of the trial's prefill; one decode step follows
CANARY = 0x3C  # the byte that fills the pool beforehand; repeated, a small finite number in every dtype
GUARD, LAYER = 0, 1  # numbers of the layers in the trial's blocks
LONGEST_CAUSE = 300  # characters of a layer's own message in ours


def check_capabilities(mixers: Sequence[TokenMixer], config: EngineConfig) -> None:
    """Raise `ConfigError` for a layer that cannot run on the device or in the dtype that was asked for."""
    for mixer in mixers:
        able = mixer.capabilities
        if config.device.type not in able.kernels:
            raise ConfigError(f"{mixer.prefix} ({mixer.state_kind}) has no kernels for device '{config.device.type}'")
        if config.dtype not in able.dtypes:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in able.dtypes)
            raise ConfigError(f"{mixer.prefix} ({mixer.state_kind}) runs in {known} only")


def check_specs(mixers: Sequence[TokenMixer], config: EngineConfig) -> None:
    """Raise `PluginError` unless every layer declares fields that can be laid out and cut for the ranks.

    Needs no weights. The message names the layer and the field.
    """
    for mixer in mixers:
        spec = _declared(mixer)
        for name, field in spec.items():
            problem = _problem(field, config)
            if problem:
                raise PluginError(f"{_named(mixer)}: field '{name}' of its state {problem}")
        _check_constant(mixer, spec)


def probe_layers(mixers: Sequence[TokenMixer], config: EngineConfig) -> None:
    """Run every class of layer once, with its loaded weights, on a small pool of its own.

    A prompt of `PROMPT` tokens and one decode step of one sequence. Raises `PluginError` that names the layer and
    the field when a forward pass does not accept the state as declared, gives rows of another shape or dtype, leaves
    a field unwritten, or writes anything but its sequence's fields.
    """
    check_specs(mixers, config)
    check_capabilities(mixers, config)
    seen: list[tuple[type[TokenMixer], StateSpec]] = []
    for mixer in mixers:
        kind = (type(mixer), mixer.state_spec())
        if kind not in seen:
            seen.append(kind)
            _probe(mixer, config)
            _check_constant(mixer, kind[1])


# The declaration


def _declared(mixer: TokenMixer) -> StateSpec:
    try:
        spec: Any = mixer.state_spec()
    except StatewiseError:
        raise
    except Exception as error:
        raise PluginError(f"{_named(mixer)}: state_spec() failed with {type(error).__name__}: {error}") from error
    if not isinstance(spec, StateSpec):
        raise PluginError(f"{_named(mixer)}: state_spec() must give a StateSpec, found {type(spec).__name__}")
    return spec


def _problem(field: Any, config: EngineConfig) -> str:
    """What is wrong with a declared field; empty if nothing is."""
    if not isinstance(field, Field):
        return f"must be a Field, found {type(field).__name__}"
    axes: Any = field.shape
    if not isinstance(axes, tuple) or not axes or not all(type(axis) is int and axis > 0 for axis in axes):
        return f"must have a shape of positive integers, found {axes!r}"
    dtype: Any = field.dtype
    if not isinstance(dtype, torch.dtype):
        return f"must have a torch dtype, found {dtype!r}"
    if field.order is not None and sorted(field.order) != list(range(len(axes))):
        return f"must have an order of its {len(axes)} axes, found {field.order!r}"
    if field.shard is not None and (not isinstance(field.shard, Shard) or not 0 <= field.shard.axis < len(axes)):
        return f"must be cut along one of its {len(axes)} axes, found {field.shard!r}"
    size = config.ranks.size
    try:
        for rank in range(size):
            field.per_rank(rank, size)
    except (BlockError, ValueError) as error:
        return f"cannot be cut for {size} rank{'s' if size > 1 else ''}: {error}"
    return ""


def _check_constant(mixer: TokenMixer, spec: StateSpec) -> None:
    again = _declared(mixer)
    for name in sorted(spec.keys() | again.keys()):
        if spec.get(name) != again.get(name):
            raise PluginError(f"{_named(mixer)}: state_spec() gives another field '{name}' at every call")


# The trial


class _Fields(dict[str, Tensor]):
    """The state as a layer gets it; remembers what was asked for."""

    def __init__(self, fields: dict[str, Tensor]) -> None:
        super().__init__(fields)
        self.asked: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        self.asked.append(name)
        return super().__getitem__(name)


@torch.inference_mode()
def _probe(mixer: TokenMixer, config: EngineConfig) -> None:
    length = max(2, min(PROMPT + 1, config.max_length or PROMPT + 1))
    spec = mixer.state_spec().per_rank(config.ranks.rank, config.ranks.size)
    count = 1
    if mixer.scope == "page":
        spec, count = spec.per_page(config.page_size), -(-length // config.page_size)
    # Guards stand for other layers on both sides, every other block for another sequence.
    guard = StateSpec(guard=Field((ALIGNMENT,), torch.uint8))
    pool = BlockPool("trial", BlockSpec({GUARD: guard, LAYER: spec, LAYER + 1: guard}), 2 * count + 1, config.device)
    pool.arena.fill_(CANARY)
    own = list(range(1, 2 * count, 2))
    fields = _Fields(pool.state(LAYER))
    width: int = mixer.config.hidden_size
    rows = torch.randn(length, width, generator=torch.Generator().manual_seed(0)).to(config.device, config.dtype)
    for begin, end in ((0, length - 1), (length - 1, length)):
        piece = Piece([0] * (end - begin), begin, own[0], own if mixer.scope == "page" else ())
        batch = build_batch([piece], config.page_size, config.device)
        what = "a decode step" if begin else f"a prefill of {end} tokens"
        try:
            mixed = mixer(rows[begin:end], batch, fields)
        except StatewiseError:
            raise
        except Exception as error:
            raise PluginError(f"{_named(mixer)}: {what} {_cause(error, fields, spec)}") from error
        _check_output(mixer, what, mixed, rows[begin:end])
    _check_stray_writes(mixer, pool, own)
    _check_all_written(mixer, pool, own, length, config.page_size)


def _cause(error: Exception, fields: _Fields, spec: StateSpec) -> str:
    """Why a forward pass failed, and which of its fields it had touched by then."""
    if isinstance(error, KeyError) and error.args and error.args[0] in fields.asked and error.args[0] not in fields:
        return f"uses the field '{error.args[0]}', which state_spec() does not declare ({', '.join(fields) or 'none'})"
    text = " ".join(str(error).split())
    cause = f"failed with {type(error).__name__}: {text[:LONGEST_CAUSE]}"
    asked = [name for name in dict.fromkeys(fields.asked) if name in fields]
    if not asked:
        return f"{cause} (before it used its state)"
    shapes = ", ".join(f"'{name}' {_shape(spec[name], 'blocks')}" for name in asked)
    return f"on the declared field{'s' if len(asked) > 1 else ''} {shapes} {cause}"


def _shape(tensor: Field | Tensor, *before: str) -> str:
    """[blocks, 4, 8] float32"""
    return f"[{', '.join([*before, *map(str, tensor.shape)])}] {str(tensor.dtype).removeprefix('torch.')}"


def _check_output(mixer: TokenMixer, what: str, mixed: object, rows: Tensor) -> None:
    found = _shape(mixed) if isinstance(mixed, Tensor) else type(mixed).__name__
    if found != _shape(rows):
        raise PluginError(f"{_named(mixer)}: {what} must give rows {_shape(rows)}, found {found}")


def _check_stray_writes(mixer: TokenMixer, pool: BlockPool, own: list[int]) -> None:
    """Of the pool, only the layer's fields in the sequence's blocks may have changed."""
    stray = pool.arena != CANARY
    for _, begin, end in _places(pool):
        stray[own, begin:end] = False
    if not stray.any():
        return
    block, byte = torch.nonzero(stray)[0].tolist()
    name = next((name for name, begin, _ in reversed(list(_places(pool))) if begin <= byte), None)
    name = name or next(name for name, _, _ in _places(pool))
    if block in own:
        raise PluginError(f"{_named(mixer)}: it writes beyond its field '{name}', over what other layers keep")
    raise PluginError(f"{_named(mixer)}: it writes the field '{name}' of a block that belongs to another sequence")


def _places(pool: BlockPool) -> Iterator[tuple[str, int, int]]:
    """The layer's fields with the half-open range of bytes of each in a block, in order."""
    for name, field in pool.spec.layers[LAYER].items():
        begin = pool.spec.offsets[LAYER, name]
        yield name, begin, begin + field.nbytes


def _check_all_written(mixer: TokenMixer, pool: BlockPool, own: list[int], length: int, page_size: int) -> None:
    """A new sequence finds what another one left in its block, so a layer has to write all that it keeps."""
    for name, field in pool.state(LAYER).items():
        if mixer.scope == "record":
            entries = [field[own[0]]]
        else:
            entries = [field[own[at // page_size], at % page_size] for at in range(length)]
        if not all(bool((entry.contiguous().view(torch.uint8) != CANARY).any()) for entry in entries):
            where = "for every token of a page" if mixer.scope == "page" else "in place"
            raise PluginError(
                f"{_named(mixer)}: the field '{name}' is declared by state_spec() but not written; forward() must "
                f"write state['{name}'] {where}"
            )


def _named(mixer: TokenMixer) -> str:
    layer = type(mixer)
    return f"layer '{PluggableLayer.name_of(layer)}' ({layer.__module__}.{layer.__qualname__}) at {mixer.prefix}"
