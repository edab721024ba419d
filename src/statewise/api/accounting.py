"""What a block costs, counted up: sequences that fit into an amount of memory, checkpoints that can be kept."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

RESERVE_PART = 10  # unless it is given, the reserve is the memory divided by this
LENGTHS = tuple(256 * 4**step for step in range(12))  # tokens of the sequences that are compared
UNIFORM_MIXES = (1024, 8192, 32768)  # tokens
CHAT_MIX = ((70, 2048), (25, 16384), (5, 1 << 62))  # percent of the sequences, tokens (at most the context)
TURNS, TURN_TOKENS = 8, 500  # of a conversation that is kept frozen


@dataclass(frozen=True)
class Costs:
    """Bytes on one rank, from which everything else follows. Blocks count as in the pools, with their alignment."""

    weight_bytes: int
    record_bytes: int
    page_bytes: int
    full_attention_page_bytes: int  # of the model that this one is compared with
    page_size: int = 64  # tokens per page

    def pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def sequence(self, tokens: int) -> int:
        """A sequence of `tokens` tokens; also a checkpoint of it that shares nothing."""
        return self.record_bytes + self.pages(tokens) * self.page_bytes

    def full_attention(self, tokens: int) -> int:
        """A sequence of the model that this one is compared with."""
        return self.pages(tokens) * self.full_attention_page_bytes

    def next_checkpoint(self, before: int, tokens: int) -> int:
        """A checkpoint at `tokens` tokens of a conversation that has one at `before`.

        Full pages are shared; one that was partly filled has been copied before it was written on.
        """
        return self.record_bytes + (self.pages(tokens) - before // self.page_size) * self.page_bytes

    def conversation(self, turns: int, turn_tokens: int) -> int:
        """A frozen conversation with a checkpoint at the end of every turn."""
        return sum(self.next_checkpoint(turn * turn_tokens, (turn + 1) * turn_tokens) for turn in range(turns))

    @property
    def cheaper_from(self) -> int | None:
        """The shortest sequence, in tokens, that takes less than in the comparison model; None: there is none."""
        saved = self.full_attention_page_bytes - self.page_bytes
        return self.record_bytes // saved * self.page_size + 1 if saved > 0 else None


@dataclass(frozen=True)
class Budget:
    """How the memory is shared out, in bytes."""

    total_bytes: int
    weight_bytes: int
    reserve_bytes: int  # for activations, workspaces of kernels, the runtime
    room_bytes: int  # for sequences and checkpoints
    missing_bytes: int  # for weights, reserve and the smallest sequence
    smallest_bytes: int  # the least memory that holds weights, reserve and one sequence of the whole context


@dataclass(frozen=True)
class SequenceCost:
    """A sequence of `tokens` tokens."""

    tokens: int
    bytes: int  # also of a checkpoint of it
    full_attention_bytes: int
    next_checkpoint_bytes: int  # another checkpoint of the conversation, one turn later


@dataclass(frozen=True)
class Share:
    """A part of a mix."""

    percent: int
    tokens: int


@dataclass(frozen=True)
class Mix:
    """How many sequences of a distribution of lengths fit at once."""

    name: str
    shares: list[Share]
    mean_bytes: int  # rounded down
    sequences: int
    cached_tokens: int
    full_attention_sequences: int  # of the comparison model, in the same room


@dataclass(frozen=True)
class Frozen:
    """How many conversations can be kept as checkpoints and nothing else."""

    turns: int
    turn_tokens: int
    every_turn_bytes: int  # a checkpoint of every turn
    every_turn_conversations: int
    last_turn_bytes: int  # the last checkpoint only
    last_turn_conversations: int


def share_out(costs: Costs, memory: int, context: int, reserve: int | None = None) -> Budget:
    """Weights and reserve first; what is left is room for sequences."""
    weights, longest = costs.weight_bytes, costs.sequence(context)
    if reserve is None:
        reserve = memory // RESERVE_PART
        # The least m with m - m // part >= needed.
        smallest = max(weights + longest - 1, 0) * RESERVE_PART // (RESERVE_PART - 1) + 1
    else:
        smallest = weights + longest + reserve
    room = memory - weights - reserve
    return Budget(memory, weights, reserve, max(room, 0), max(costs.sequence(1) - room, 0), smallest)


def compare(costs: Costs, context: int) -> list[SequenceCost]:
    """Sequences of growing length up to the context, at most eight."""
    lengths = [length for length in LENGTHS if length < context]
    if len(lengths) < 4:
        lengths = sorted({context >> step for step in range(1, 5)} - {0})
    return [
        SequenceCost(
            tokens,
            costs.sequence(tokens),
            costs.full_attention(tokens),
            costs.next_checkpoint(tokens, tokens + TURN_TOKENS),
        )
        for tokens in [*lengths[-7:], context]
    ]


def mixes(costs: Costs, room: int, context: int) -> list[Mix]:
    """Several distributions of lengths: all alike, and a chat mix where the context leaves it different lengths."""
    uniform = [length for length in UNIFORM_MIXES if length < context] + [context]
    kinds = [(f"all {length:,} tokens", [Share(100, length)]) for length in uniform]
    percents: Counter[int] = Counter()
    for percent, tokens in CHAT_MIX:
        percents[min(tokens, context)] += percent
    if len(percents) > 1:
        kinds.append(("chat mix", [Share(percent, tokens) for tokens, percent in percents.items()]))
    return [_mix(costs, room, name, shares) for name, shares in kinds]


def _mix(costs: Costs, room: int, name: str, shares: list[Share]) -> Mix:
    """As many sequences as the room holds at their mean size."""
    hundred = sum(share.percent * costs.sequence(share.tokens) for share in shares)
    full = sum(share.percent * costs.full_attention(share.tokens) for share in shares)
    tokens = sum(share.percent * share.tokens for share in shares)
    count = _how_many(100 * room, hundred)
    return Mix(name, shares, hundred // 100, count, count * tokens // 100, _how_many(100 * room, full))


def frozen(costs: Costs, room: int, max_length: int) -> Frozen:
    """Conversations of eight turns of 500 tokens, shorter where the model's limit asks for it."""
    turn_tokens = max(min(TURN_TOKENS, max_length // TURNS), 1)
    every, last = costs.conversation(TURNS, turn_tokens), costs.sequence(TURNS * turn_tokens)
    return Frozen(TURNS, turn_tokens, every, _how_many(room, every), last, _how_many(room, last))


def _how_many(room: int, size: int) -> int:
    return room // size if size else 0
