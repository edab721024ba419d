"""Which checkpoint goes first when a memory is full."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from statewise.memory.eviction import GreedyDual

SIZE = 1000  # bytes of a checkpoint, where it does not matter
STEPS = st.lists(
    st.tuples(st.sampled_from(["used", "superseded", "evict"]), st.integers(0, 7), st.integers(0, 5000)), max_size=60
)


def lowest(policy: GreedyDual, held: set[str]) -> str:
    return min(sorted(held), key=policy.order)


def test_what_saves_most_per_byte_stays() -> None:
    policy = GreedyDual()
    values = {"short": (100, SIZE), "long": (4000, SIZE), "long and large": (4000, 50 * SIZE), "nothing": (0, SIZE)}
    for name, (tokens, nbytes) in values.items():
        policy.used(name, tokens, nbytes)
    assert sorted(values, key=policy.order) == ["nothing", "long and large", "short", "long"]


def test_what_was_not_used_for_long_goes_however_dear_it_was() -> None:
    policy = GreedyDual()
    policy.used("dear", 1000, SIZE)
    held, evicted = {"dear"}, []
    for number in range(60):  # a memory of three, and each newcomer is worth a tenth
        policy.used(f"cheap {number}", 100, SIZE)
        held.add(f"cheap {number}")
        if len(held) > 3:
            evicted.append(lowest(policy, held))
            held.discard(evicted[-1])
            policy.evicted(evicted[-1])
    assert 10 < evicted.index("dear") < 40


def test_a_use_makes_it_young_again() -> None:
    policy = GreedyDual()
    for name in ("a", "b", "c"):
        policy.used(name, 100, SIZE)
    policy.evicted("a")
    policy.used("b", 100, SIZE)
    assert policy.order("b") > policy.order("c")


def test_what_its_only_continuation_left_behind_goes_first_until_it_is_used() -> None:
    policy = GreedyDual()
    policy.used("cheap", 1, SIZE)
    policy.used("left", 4000, SIZE)
    policy.superseded("left")
    assert policy.order("left") < policy.order("cheap")
    policy.used("left", 4000, SIZE)
    assert policy.order("left") > policy.order("cheap")


@given(steps=STEPS)
def test_the_clock_only_goes_forward_and_nobody_is_remembered_who_has_gone(steps: list[tuple[str, int, int]]) -> None:
    """Evicting the lowest each time: nothing that comes later is ranked below what went before, and what saves
    nothing is never ranked above what saves something, if both were used last at the same time."""
    policy, held, clock = GreedyDual(), set[str](), 0.0
    for act, number, tokens in steps:
        name = f"checkpoint {number}"
        if act == "used":
            policy.used(name, tokens, SIZE)
            held.add(name)
            assert policy.order(name) == clock + tokens / SIZE
        elif act == "superseded" and name in held:
            policy.superseded(name)
            assert policy.order(name) == min(map(policy.order, held)) == clock
        elif act == "evict" and held:
            going = lowest(policy, held)
            assert policy.order(going) >= clock
            clock = policy.order(going)
            policy.evicted(going)
            held.discard(going)
    assert policy._priorities.keys() == held
