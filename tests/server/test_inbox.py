"""Between the engine and a client: nothing is lost or mixed, and a client that does not read fills no memory."""

from __future__ import annotations

import asyncio
import random

import pytest

from statewise.engine.request import RequestMetrics, TokenLogprob
from statewise.engine.sampling_params import SamplingParams
from statewise.errors import RequestError
from statewise.server import messages
from statewise.server.channel import ChannelError, Decoder, Encoder
from statewise.server.engine_client import EngineClient
from statewise.server.generation import Generation
from statewise.server.inbox import MAX_UNREAD


class Deaf(EngineClient):
    """A client of no engine at all, which notes what it would say."""

    def __init__(self) -> None:
        super().__init__("demo", {})
        self.said: list[object] = []

    def _tell(self, message: object) -> bool:
        self.said.append(message)
        return True


def piece(number: int, text: str, index: int = 0, logprobs: int = 0) -> messages.Piece:
    one = TokenLogprob(5, -0.5, 1, dict.fromkeys(range(logprobs), -1.0))
    return messages.Piece(number, index, text, [5], None, None, [one] if logprobs else None)


def test_pieces_of_many_prompts_and_choices_arrive_in_order() -> None:
    async def run() -> None:
        engine, chosen = Deaf(), random.Random(0)
        generations = [Generation(engine, [[1]] * 3, SamplingParams(n=2, max_tokens=9)) for _ in range(4)]
        left = {(number, index): 50 for number in range(1, 13) for index in range(2)}
        texts = [[""] * 6 for _ in generations]

        async def read(at: int) -> None:
            async for pieces in generations[at].batches():
                for one in pieces:
                    texts[at][one.index] += one.text
                await asyncio.sleep(chosen.choice((0, 0, 0.001)))

        readers = [asyncio.create_task(read(at)) for at in range(4)]
        while left:
            step = [key for key in left if chosen.random() < 0.5]
            engine._take(messages.Step([piece(number, f"{50 - left[number, i]},", i) for number, i in step]))
            for key in step:
                left[key] -= 1
                if not left[key]:
                    del left[key]
                    if (key[0], 1 - key[1]) not in left:
                        engine._take(messages.Finished(key[0], RequestMetrics(1, 100), None, None, None))
            await asyncio.sleep(0)
        await asyncio.gather(*readers)
        assert texts == [["".join(f"{number}," for number in range(50))] * 6] * 4
        assert not engine.streams and not any(isinstance(message, messages.Abort) for message in engine.said)

    asyncio.run(run())


@pytest.mark.parametrize(("logprobs", "most"), [(0, MAX_UNREAD), (20, MAX_UNREAD // 20)])
def test_an_answer_that_nobody_reads_ends_within_bounds(logprobs: int, most: int) -> None:
    async def run() -> None:
        engine = Deaf()
        slow, other = (Generation(engine, [[1]] * 2, SamplingParams(max_tokens=9)) for _ in range(2))
        for taken in range(MAX_UNREAD + 2):
            if engine.streams < 4:
                break
            engine._take(messages.Step([piece(1, "a", logprobs=logprobs), piece(3, "b")]))
            if taken % 100 == 0:
                await other._inbox.fetch()
        assert taken <= most + 1
        engine._take(messages.Step([piece(2, "a")]))  # the other prompt of the same request has nobody, either
        assert engine.streams == 2
        aborted = [message.ids for message in engine.said if isinstance(message, messages.Abort)]
        assert aborted == [[1], [2]]
        with pytest.raises(RequestError, match="not read"):
            await slow.complete()
        assert {one.text for one in await other._inbox.fetch()} == {"b"}

    asyncio.run(run())


def test_frames_may_come_in_any_pieces() -> None:
    said = [messages.Step([piece(number, "a" * number)]) for number in range(30)] + [messages.Done(7)]
    content, chosen = Encoder().frames(said), random.Random(1)
    for longest in (1, 3, 40, 5000):
        decoder, found, at = Decoder(messages.FromEngine), [], 0
        while at < len(content):
            size = chosen.randint(1, longest)
            found += decoder.feed(content[at : at + size])
            at += size
        assert found == said
    for wrong in (b"\xff\xff\xff\xff", b"\x01\x00\x00\x00\xc1"):
        with pytest.raises(ChannelError):
            list(Decoder(messages.FromEngine).feed(wrong))
