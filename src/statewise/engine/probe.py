"""A trial of every kind of layer before the engine starts: it must write exactly the state that it declares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from statewise.config import EngineConfig
from statewise.errors import PluginError, StatewiseError
from statewise.layers.contract import check_capabilities, check_constant, check_specs, named
from statewise.layers.mixer import TokenMixer
from statewise.memory.blocks import ALIGNMENT, BlockPool, BlockSpec, Field, StateSpec
from statewise.ops.batch import Piece, build_batch

PROMPT = 3  # tokens of the trial's prefill; one decode step follows
CANARY = 0x3C  # the byte that fills the pool beforehand; repeated, a small finite number in every dtype
GUARD, LAYER = 0, 1  # numbers of the layers in the trial's blocks
LONGEST_CAUSE = 300  # characters of a layer's own message in ours


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
            check_constant(mixer, kind[1])


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
            raise PluginError(f"{named(mixer)}: {what} {_cause(error, fields, spec)}") from error
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
        raise PluginError(f"{named(mixer)}: {what} must give rows {_shape(rows)}, found {found}")


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
        raise PluginError(f"{named(mixer)}: it writes beyond its field '{name}', over what other layers keep")
    raise PluginError(f"{named(mixer)}: it writes the field '{name}' of a block that belongs to another sequence")


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
                f"{named(mixer)}: the field '{name}' is declared by state_spec() but not written; forward() must "
                f"write state['{name}'] {where}"
            )
