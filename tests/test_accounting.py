"""The arithmetic of a plan, for any bytes: nothing fits that does not, and nothing is left that would."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from statewise.api.accounting import Costs, compare, frozen, mixes, share_out


def test_mixes_of_a_context() -> None:
    costs = Costs(0, record_bytes=10, page_bytes=64, full_attention_page_bytes=640)

    def lengths(context: int) -> dict[str, list[tuple[int, int]]]:
        return {mix.name: [(s.percent, s.tokens) for s in mix.shares] for mix in mixes(costs, 10**6, context)}

    assert lengths(131072) == {
        "all 1,024 tokens": [(100, 1024)],
        "all 8,192 tokens": [(100, 8192)],
        "all 32,768 tokens": [(100, 32768)],
        "all 131,072 tokens": [(100, 131072)],
        "chat mix": [(70, 2048), (25, 16384), (5, 131072)],
    }
    assert lengths(8192)["chat mix"] == [(70, 2048), (30, 8192)]
    assert lengths(500) == {"all 500 tokens": [(100, 500)]}


@st.composite
def any_costs(draw: st.DrawFn) -> Costs:
    page = draw(st.integers(0, 10**8))
    return Costs(
        weight_bytes=draw(st.integers(0, 10**12)),
        record_bytes=draw(st.integers(0 if page else 1, 10**9)),
        page_bytes=page,
        full_attention_page_bytes=page + draw(st.integers(0, 10**8)),
        page_size=draw(st.sampled_from([1, 16, 64, 100])),
    )


TOKENS = st.integers(1, 1 << 24)
MEMORY = st.integers(1, 10**13)


@given(any_costs(), MEMORY, TOKENS)
def test_as_many_sequences_as_fit_and_not_one_more(costs: Costs, room: int, context: int) -> None:
    found = mixes(costs, room, context)
    assert len({mix.name for mix in found}) == len(found)
    for mix in found:
        assert sum(share.percent for share in mix.shares) == 100
        sizes = [(share.percent, costs.sequence(share.tokens)) for share in mix.shares]
        hundred = sum(percent * size for percent, size in sizes)
        assert mix.sequences * hundred <= 100 * room < (mix.sequences + 1) * hundred
        assert mix.cached_tokens == mix.sequences * sum(s.percent * s.tokens for s in mix.shares) // 100
        assert max(share.tokens for share in mix.shares) <= context


@given(any_costs(), MEMORY, MEMORY, TOKENS)
def test_more_memory_never_holds_less(costs: Costs, memory: int, more: int, context: int) -> None:
    less, greater = (share_out(costs, amount, context) for amount in (memory, memory + more))
    assert less.room_bytes <= greater.room_bytes
    assert less.missing_bytes >= greater.missing_bytes
    assert less.smallest_bytes == greater.smallest_bytes
    pairs = zip(mixes(costs, less.room_bytes, context), mixes(costs, greater.room_bytes, context), strict=True)
    assert all(a.sequences <= b.sequences and a.cached_tokens <= b.cached_tokens for a, b in pairs)
    kept = [frozen(costs, budget.room_bytes, context) for budget in (less, greater)]
    assert kept[0].every_turn_conversations <= kept[1].every_turn_conversations
    assert all(each.every_turn_conversations <= each.last_turn_conversations for each in kept)


@given(any_costs(), TOKENS)
def test_longer_sequences_cost_no_less(costs: Costs, context: int) -> None:
    rows = compare(costs, context)
    assert 1 <= len(rows) <= 8
    assert rows[-1].tokens == context
    if context >= 16:
        assert len(rows) >= 5
    for row, longer in pairwise(rows):
        assert row.tokens < longer.tokens
        assert row.bytes <= longer.bytes
        assert row.full_attention_bytes <= longer.full_attention_bytes
    assert all(row.next_checkpoint_bytes >= costs.record_bytes + costs.page_bytes for row in rows)


@given(any_costs(), TOKENS)
def test_where_the_model_becomes_cheaper(costs: Costs, tokens: int) -> None:
    start = costs.cheaper_from
    for count in (tokens, *([start - 1, start] if start else [])):
        if count:
            assert (costs.sequence(count) < costs.full_attention(count)) == (start is not None and count >= start)


@given(any_costs(), TOKENS, st.none() | st.integers(0, 10**11))
def test_the_smallest_memory_holds_one_sequence_and_one_byte_less_does_not(
    costs: Costs, context: int, reserve: int | None
) -> None:
    smallest = share_out(costs, 1, context, reserve).smallest_bytes
    assert share_out(costs, smallest, context, reserve).room_bytes >= costs.sequence(context)
    assert share_out(costs, smallest - 1, context, reserve).room_bytes < costs.sequence(context)


@given(any_costs(), MEMORY, st.integers(0, 10**11))
def test_what_is_missing_is_exactly_what_lacks(costs: Costs, memory: int, reserve: int) -> None:
    budget = share_out(costs, memory, 1, reserve)
    assert (budget.missing_bytes == 0) == (budget.room_bytes >= costs.sequence(1))
    assert share_out(costs, memory + budget.missing_bytes, 1, reserve).missing_bytes == 0
    if budget.missing_bytes:
        assert share_out(costs, memory + budget.missing_bytes - 1, 1, reserve).missing_bytes == 1


@given(any_costs(), st.integers(1, 9), st.integers(1, 300))
def test_checkpoints_of_a_conversation_share_their_full_pages(costs: Costs, turns: int, turn_tokens: int) -> None:
    """Against a conversation played token by token, in which a frozen page is copied before it is written on."""
    pages: list[int] = []  # the live sequence's, each by the number of its block
    blocks, frozen_pages = 0, set[int]()
    for token in range(turns * turn_tokens):
        if token % costs.page_size == 0:
            pages.append(blocks)
            blocks += 1
        elif pages[-1] in frozen_pages:
            pages[-1] = blocks
            blocks += 1
        if (token + 1) % turn_tokens == 0:
            frozen_pages |= set(pages)
    expected = turns * costs.record_bytes + len(frozen_pages) * costs.page_bytes
    assert costs.conversation(turns, turn_tokens) == expected
