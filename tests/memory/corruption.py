"""Damaged and forged snapshot files, generated from a sound one: the same ones on every run."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any

Change = Callable[[dict[str, Any]], Any]
Table = dict[str, Any]


def digest(content: bytes) -> str:
    return blake2b(content, digest_size=32).hexdigest()


def taken_apart(raw: bytes) -> tuple[Table, bytes]:
    """The header's table and the bytes behind it."""
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def sealed(table: Table, data: bytes) -> bytes:
    """A file whose header has a valid seal, whatever it says."""
    metadata = table.get("__metadata__")
    if isinstance(metadata, dict):
        metadata.pop("seal", None)
        text = json.dumps(table, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
        metadata["seal"] = digest(text.encode("utf-8", "surrogatepass"))
    return framed(json.dumps(table).encode(), data)


def framed(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def forged(raw: bytes, change: Change) -> bytes:
    table, data = taken_apart(raw)
    change(table)
    return sealed(table, data)


def metadata(key: str, value: Any) -> Change:
    return lambda table: table["__metadata__"].update({key: value})


def inner(key: str, change: Callable[[Any], Any]) -> Change:
    """A change inside of a metadata value, which is JSON itself."""

    def apply(table: Table) -> None:
        value = json.loads(table["__metadata__"][key])
        changed = change(value)
        table["__metadata__"][key] = json.dumps(value if changed is None else changed)

    return apply


def rewritten(raw: bytes, name: str, **row: Any) -> bytes:
    return forged(raw, lambda table: table[name].update(row))


def with_tensor(raw: bytes, name: str, content: bytes, dtype: str, shape: list[int]) -> bytes:
    """A tensor more, or another one of that name at the end, with its right digest."""
    table, data = taken_apart(raw)
    if name in table:
        raw = without(raw, name)
        table, data = taken_apart(raw)
    table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
    inner("digests", lambda digests: digests.update({name: digest(content)}))(table)
    return sealed(table, data + content)


def without(raw: bytes, name: str) -> bytes:
    """The file without a tensor, the others moved together."""
    table, data = taken_apart(raw)
    begin, end = table.pop(name)["data_offsets"]
    for row in (row for key, row in table.items() if key != "__metadata__" and row["data_offsets"][0] >= end):
        row["data_offsets"] = [offset - (end - begin) for offset in row["data_offsets"]]
    inner("digests", lambda digests: digests.pop(name) and None)(table)
    return sealed(table, data[:begin] + data[end:])


def damaged(raw: bytes) -> Iterator[tuple[str, bytes]]:
    """Files that nobody meant: cut short, with a flipped bit, too long, of other kinds."""
    chance = random.Random(11)
    head = 8 + int.from_bytes(raw[:8], "little")
    cuts = [*range(10), head - 1, head, head + 1, len(raw) - 1]
    cuts += [chance.randrange(head) for _ in range(12)] + [chance.randrange(head, len(raw)) for _ in range(14)]
    for length in cuts:
        yield f"cut to {length}", raw[:length]
    places = [*range(8), head - 1, head, len(raw) - 1]
    places += [chance.randrange(8, head) for _ in range(35)] + [chance.randrange(head, len(raw)) for _ in range(24)]
    for place in places:
        flipped = bytearray(raw)
        flipped[place] ^= 1 << chance.randrange(8)
        yield f"bit of byte {place}", bytes(flipped)
    for length in (
        0,
        1,
        head - 9,
        head,
        len(raw) - 8,
        len(raw),
        1 << 20,
        (1 << 20) + 1,
        1 << 31,
        1 << 62,
        (1 << 64) - 1,
    ):
        yield f"header of {length}", length.to_bytes(8, "little") + raw[8:]
    for extra in (1, 8, 4096):
        yield f"{extra} bytes more", raw + bytes(extra)
    yield "zeros", bytes(len(raw))
    yield "backwards", raw[::-1]
    yield "twice", raw + raw
    yield "data swapped", raw[:head] + raw[head + 64 : head + 128] + raw[head : head + 64] + raw[head + 128 :]
    yield "text", b"{}" * 50
    for text in (
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"a":' * 10_000,
        b"{} {}",
        b'{"a":NaN}',
        b"1" * 9999,
    ):
        yield f"header {text[:8]!r}", framed(text, raw[head:])


def transcripts(tokens: int) -> Iterator[tuple[str, bytes, str]]:
    """Transcripts that no session of so many tokens can have, and what the refusal says."""
    sound = {"turns": [1, tokens], "checkpoints": {"a": 1}, "messages": [{"role": "user", "content": "x"}]}

    def altered(**changes: Any) -> bytes:
        return json.dumps(sound | changes).encode()

    for content in (b"", b"[]", b"{", b"null", b"\xff", b"[" * 100_000, b'{"turns":' * 10_000):
        yield f"transcript {content[:8]!r}", content, "its transcript cannot be read"
    yield "constants", altered(messages=[{"x": float("nan")}]), "its transcript cannot be read"
    yield "key twice", altered()[:-1] + b',"turns":[]}', "its transcript cannot be read"
    yield "an endless number", altered()[:-1] + b',"x":' + b"1" * 5000 + b"}", "its transcript cannot be read"
    yield "another key", altered(more=1), "not one of turns, checkpoints and messages"
    yield "no messages", b'{"turns":[],"checkpoints":{}}', "not one of turns, checkpoints and messages"
    yield "commas", b"[" + b"," * (1 << 21), "more than 1572864 texts and separators"
    yield "strings", b'{"x":' + b'""' * (1 << 21), "more than 1572864 texts and separators"

    for turns in ([tokens + 1], [-1], [2, 1], [True], [1.0], ["1"], [None], [[1]], [10**40]):
        yield f"turns {str(turns)[:9]}", altered(turns=turns), "its turns do not rise from 0"
    for turns in (None, 3, {"1": 1}):
        yield f"turns {turns}", altered(turns=turns), "its turns are not a list"
    yield "turns without end", altered(turns=[0] * ((1 << 20) + 1)), "its turns are not a list of at most 1048576"
    for at in (tokens + 1, -1, True, 1.5, "1", None, 10**40):
        yield f"checkpoint at {str(at)[:9]}", altered(checkpoints={"a": at}), "a named checkpoint does not lie within"
    yield "listed checkpoints", altered(checkpoints=[["a", 1]]), "a named checkpoint does not lie within"
    for name in ("", "x" * 257, "\x1b[2J", "\ud800"):
        yield f"name {name[:4]!r}", altered(checkpoints={name: 1}), "the name of a checkpoint is not 1 to 256"

    for messages in (None, {}, "text"):
        yield f"messages {messages}", altered(messages=messages), "the messages in its transcript are not a list"
    for messages in ([None], ["text"], [[]], [{"role": "user"}, 3]):
        yield f"messages {str(messages)[:9]}", altered(messages=messages), "is not an object"
    yield "surrogates", altered(messages=[{"x": "\ud800"}]), "is not valid Unicode text"
    yield "key of surrogates", altered(messages=[{"\ud800": "x"}]), "is not valid Unicode text"
    nested: Any = 1
    for _ in range(32):
        nested = [nested]
    for value in (nested, 1 << 64, -(1 << 70)):
        yield f"message of {str(value)[:9]}", altered(messages=[{"x": value}]), "holds more than text"
    yield "infinity", altered(messages=[{"x": 777}]).replace(b"777", b"1e999"), "holds more than text"


def forgeries(raw: bytes) -> Iterator[tuple[str, bytes, str]]:
    """Files with a valid seal that lie, and what the refusal says."""
    table, data = taken_apart(raw)
    conv, key = "record.0.conv", "pages.2.key"
    tokens = table["tokens"]["shape"][0]
    begin, end = table[conv]["data_offsets"]
    channels, taps = table[conv]["shape"]

    yield "no metadata", forged(raw, lambda t: t.pop("__metadata__")), "is not a snapshot"
    yield "another format", forged(raw, metadata("format", "pt")), "is not a snapshot"
    for version in ("2", "999999999"):
        newer = rf"has format version {version}, newer than 1, .*: update it"
        yield f"version {version}", forged(raw, metadata("version", version)), newer
    for version in ("", "0", "-1", "1.0", "x", "9" * 5000):
        yield f"version {version[:4]!r}", forged(raw, metadata("version", version)), "has no format version"
    for field in ("identity", "layout", "digests", "name", "created"):
        lacking = forged(raw, lambda t, field=field: t["__metadata__"].pop(field))
        yield f"no {field}", lacking, "the fields of its header"
    yield "strange metadata", forged(raw, metadata("more", "x")), "the fields of its header"
    yield "name of 257", forged(raw, metadata("name", "x" * 257)), "its name is not"
    yield "name with escapes", forged(raw, metadata("name", "\x1b[2J")), "its name is not"
    yield "time with surrogates", forged(raw, metadata("created", "\ud800")), "its time is not"

    other = "0" * 64
    for part in ("config", "weights", "tokenizer"):
        changed = forged(raw, inner("identity", lambda i, part=part: i.update({part: other})))
        yield f"other {part}", changed, f"is of another model, judging by its {part}"
    yield "no tokenizer", forged(raw, inner("identity", lambda i: i.update(tokenizer=None))), "judging by its tokenizer"
    yield "no config", forged(raw, inner("identity", lambda i: i.update(config=None))), "digest of its config"
    yield "short digest", forged(raw, inner("identity", lambda i: i.update(weights="ab"))), "digest of its weights"
    yield "listed identity", forged(raw, inner("identity", lambda i: [i])), "its identity cannot be read"
    yield "half an identity", forged(raw, inner("identity", lambda i: i.pop("weights") and None)), "of which model"

    yield "shape", rewritten(raw, conv, shape=[channels // 2, taps * 2]), f"{conv} is F32"
    yield "flat", rewritten(raw, conv, shape=[channels * taps]), f"{conv} is F32"
    yield "dtype", rewritten(raw, conv, dtype="I32"), f"{conv} is I32"
    yield "narrow", rewritten(raw, conv, dtype="BF16"), "does not have the bytes"
    yield "unknown dtype", rewritten(raw, conv, dtype="F31"), "is not that of a tensor"
    yield "dtype of lists", rewritten(raw, conv, dtype=[]), "is not that of a tensor"
    for shape in ([-1, 4], [2.0], ["4"], [True, 96], [10**30], 7, None, [1] * 9, [[4]], {"a": 1}):
        yield f"shape {str(shape)[:9]}", rewritten(raw, conv, shape=shape), "is malformed|is damaged"
    yield "huge shape", rewritten(raw, conv, shape=[1 << 31, 1 << 31, 0]), "out of bounds"
    for offsets in (
        [end, begin],
        [0],
        [],
        [begin, end, end],
        [begin - 1, end - 1],
        [begin, 1 << 70],
        [begin, -1],
        "ab",
    ):
        yield f"offsets {str(offsets)[:14]}", rewritten(raw, conv, data_offsets=offsets), "is malformed"
    swapped = {"data_offsets": table["record.1.conv"]["data_offsets"]}
    yield "the place of another", rewritten(raw, conv, **swapped), "one after the other"
    yield "a hole", sealed(json.loads(json.dumps(table)), data + bytes(4)), "is too long"
    yield "extra key", rewritten(raw, conv, more=1), "is not that of a tensor"
    yield "no row", forged(raw, lambda t: t.update({conv: []})), "is not that of a tensor"
    yield "key twice", framed(json.dumps(table).encode()[:-1] + b', "tokens": {}}', data), "cannot be read"

    for name in (conv, key, "record.3.recurrent"):
        yield f"without {name}", without(raw, name), f"{name} is missing"
    yield "without tokens", without(raw, "tokens"), "no list of at most"
    yield "one more", with_tensor(raw, "record.9.conv", bytes(8), "F32", [2]), "its layout does not have"
    yield "a rude one", with_tensor(raw, "\x1b[2J", bytes(8), "F32", [2]), "its layout does not have"
    yield "wrong hidden", with_tensor(raw, "hidden", bytes(20), "F32", [5]), "hidden row of 5, here it has 6"
    yield "hidden ids", with_tensor(raw, "hidden", bytes(24), "I32", [6]), "one row of floats"
    yield "hidden rows", with_tensor(raw, "hidden", bytes(24), "F32", [1, 6]), "one row of floats"

    for name, content, reason in transcripts(tokens):
        yield name, with_tensor(raw, "transcript", content, "U8", [len(content)]), reason
    for dtype, shape in (("I8", [4]), ("U8", [2, 2]), ("U8", [])):
        strange = with_tensor(raw, "transcript", bytes(4 if shape else 1), dtype, shape)
        yield f"transcript {dtype} {shape}", strange, "expected at most 16777216 bytes"
    altered = inner("digests", lambda d: d.update(transcript=other))
    yield "other transcript", forged(raw, altered), "bytes of transcript"

    fewer = b"".join(n.to_bytes(4, "little") for n in range(tokens - 1))
    yield "a token less", with_tensor(raw, "tokens", fewer, "I32", [tokens - 1]), f"{key.rsplit('.', 1)[0]}.* is F32"
    yield "no tokens", with_tensor(raw, "tokens", b"", "I32", [0]), "is F32"
    yield "wide tokens", with_tensor(raw, "tokens", bytes(8 * tokens), "I64", [tokens]), "no list of at most"
    yield "negative ids", with_tensor(raw, "tokens", b"\xff" * 4 * tokens, "I32", [tokens]), "outside of the vocabulary"
    beyond = (5000).to_bytes(4, "little") * tokens
    yield "ids beyond", with_tensor(raw, "tokens", beyond, "I32", [tokens]), "outside of the vocabulary"
    yield "other ids", forged(raw, inner("digests", lambda d: d.update(tokens=digest(beyond)))), "bytes of tokens"
    yield "other digest", forged(raw, inner("digests", lambda d: d.update({conv: other}))), f"bytes of {conv}"
    yield "digest of None", forged(raw, inner("digests", lambda d: d.update({conv: None}))), "no valid place or digest"
    yield "a digest less", forged(raw, inner("digests", lambda d: d.pop(conv) and None)), "no valid place or digest"
    yield "a digest more", forged(raw, inner("digests", lambda d: d.update(x=other))), "not those of its tensors"

    for name, change in {
        "a field less": lambda fields: fields.pop() and None,
        "a field twice": lambda fields: fields.append(fields[0]),
        "no shape": lambda fields: fields[0].pop("shape") and None,
        "dtype of lists": lambda fields: fields[0].update(dtype=[]),
        "a number": lambda fields: fields.append(3),
        "a path": lambda fields: fields[0]["tensors"].append("record.0.../x"),
        "rude segments": lambda fields: fields[0].update(axis=0, segments=[["\x1b", channels]]),
        "an axis too many": lambda fields: fields[0].update(axis=7, segments=[["q", 1]]),
        "short segments": lambda fields: fields[0].update(axis=0, segments=[["q", 1]]),
    }.items():
        lying = forged(raw, inner("layout", lambda layout, change=change: change(layout["fields"])))
        yield f"layout: {name}", lying, "is malformed"
    yield "no layout", forged(raw, inner("layout", lambda layout: layout.clear())), "its layout does not have"
    halves = [["q", channels // 2], ["k", channels // 2]]
    renamed = forged(raw, inner("layout", lambda layout: layout["fields"][0].update(segments=halves)))
    yield "layout: other segments", renamed, rf"has another field layout: {conv} .* here it is F32 .* of q 8, k 8, v 16"
