"""API keys: only those that are listed get through, and each has a tenant of its own."""

from __future__ import annotations

import hmac
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statewise.errors import ConfigError
from statewise.server.keys import ApiKey, KeyGuard, KeyRing, load_keys, salt_of
from tests.server.probes import asked

KEYS = ["alice: sk-alice-0123456789", "bob: sk-bob-0123456789ab", "sk-anonymous-0123456"]
SECRETS = [entry.split()[-1].encode() for entry in KEYS]


async def whoami(scope: Any, receive: Any, send: Any) -> None:
    state = scope["state"]
    body = f"{state['key_name']} {state['tenant']}".encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


GUARD = KeyGuard(whoami, load_keys(KEYS))


@given(st.binary(max_size=64), st.sampled_from([b"authorization", b"x-api-key"]), st.booleans())
def test_a_wrong_key_never_gets_through(key: bytes, header: bytes, bearer: bool) -> None:
    value = b"Bearer " + key if bearer else key
    if key.strip() not in SECRETS:
        assert asked(GUARD, headers=[(header, value)]).status == 401


@given(st.sampled_from(SECRETS), st.integers(0, 30), st.sampled_from([b"", b"x", b"\0", b"\xff", b"-"]))
def test_a_key_that_is_nearly_right_is_wrong(key: bytes, place: int, change: bytes) -> None:
    near = key[:place] + change + key[place + 1 :]
    expected = 200 if near in SECRETS else 401
    assert asked(GUARD, headers=[(b"authorization", b"Bearer " + near)]).status == expected


@pytest.mark.parametrize("presented", [*SECRETS, b"wrong", b""])
def test_every_key_is_compared_in_constant_time(presented: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    assert (load_keys(KEYS).find(presented) is None) == (presented not in SECRETS)
    assert len(compared) == len(KEYS)
    assert {len(digest) for pair in compared for digest in pair} == {32}


def test_each_key_has_a_name_and_a_tenant_of_its_own() -> None:
    answers = [asked(GUARD, headers=[(b"x-api-key", key)]).body.decode().split() for key in SECRETS]
    names, tenants = zip(*answers)
    assert names == ("alice", "bob", "key-3")
    assert len(set(tenants)) == 3
    assert not any(key.decode() in tenant for tenant in tenants for key in SECRETS)
    again = KeyGuard(whoami, load_keys(KEYS[::-1]))
    assert asked(again, headers=[(b"x-api-key", SECRETS[0])]).body.decode().split()[1] == tenants[0]


def test_a_key_is_not_kept() -> None:
    ring = load_keys(KEYS)
    assert not any(key in repr(vars(ring)).encode() for key in SECRETS)
    assert not any(key[3:] in repr(vars(ring)).encode() for key in SECRETS)


def test_without_keys_everybody_is_nobody() -> None:
    guard = KeyGuard(whoami, KeyRing())
    assert asked(guard, headers=[(b"x-api-key", b"anything")]).body == b"None None"
    # What a client or a server had put there does not survive.
    assert asked(guard, headers=[], state={"tenant": "other", "key_name": "other"}).body == b"None None"


def test_the_open_paths_are_a_setting() -> None:
    guard = KeyGuard(whoami, load_keys(KEYS), open_paths=["/page"])
    assert [asked(guard, path=path, headers=[]).status for path in ("/page", "/health", "/")] == [200, 401, 401]
    assert asked(guard, path="/page", headers=[]).body == b"None None"
    assert asked(guard, path="/below/page", headers=[], root_path="/below").status == 200
    assert asked(guard, path="/page", headers=[], root_path="/below").status == 401


def test_a_refusal_says_how_to_come_in() -> None:
    answer = asked(GUARD, headers=[])
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.error == {
        "message": "Invalid API Key",
        "type": "authentication_error",
        "param": None,
        "code": "invalid_api_key",
    }


def test_a_file_of_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbf# who may\r\n\r\nalice: sk-alice-0123456789\r\n  sk-anonymous-#123456  \r\n")
    file.chmod(0o600)
    ring = load_keys(["sk-from-the-command-line"], file)
    assert len(ring) == 3
    found = [ring.find(key) for key in (b"sk-alice-0123456789", b"sk-anonymous-#123456", b"sk-from-the-command-line")]
    assert [key.name if key else None for key in found] == ["alice", "line-4", "key-1"]
    assert not caplog.records
    file.chmod(0o644)
    load_keys(file=file)
    assert "chmod 600" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no API key"),
        (b"# nothing\n\n", "holds no API key"),
        (b"alice:\n", "line 1"),
        (b"alice:sk-secret-0123456789\n", "name: key"),
        (b"\nal ice: sk-secret-0123456789\n", "line 2"),
        (b"sk-secret-0123456789 # mine\n", "spaces"),
        ("sk-sécret-0123456789\n".encode(), "ASCII"),
        (b"sk-secret-0123456789\xff\n", "UTF-8"),
        (b"sk-secret-" + b"0" * 300, "256"),
        (b"sk-secret-0123456789\nbob: sk-secret-0123456789\n", "twice"),
        (b"\n" * (1 << 20) + b"sk-secret-0123456789", "too large"),
        (b"".join(b"sk-secret-%020d\n" % number for number in range(1001)), "at most 1000"),
    ],
)
def test_a_bad_file_stops_the_start(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as refused:
        load_keys(file=file)
    assert "secret" not in str(refused.value).replace(str(file), "")


def test_a_file_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    for file in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_keys(file=file)


def test_an_empty_key_does_not_open_the_server() -> None:
    for entry in ("", "  ", "alice: "):
        with pytest.raises(ConfigError, match="API key 1"):
            load_keys([entry])


def test_a_short_key_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    load_keys(["token"])
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "token" not in caplog.text


@given(st.none() | st.text(max_size=40), st.none() | st.text(max_size=40))
def test_a_salt_never_leads_to_another_tenant(mine: str | None, theirs: str | None) -> None:
    one, other = ApiKey.of("key-one-0123456", "a").tenant, ApiKey.of("key-two-0123456", "b").tenant
    assert salt_of(one, mine) != salt_of(other, theirs)
    assert salt_of(one, mine) == salt_of(one, mine)
    assert (salt_of(one, mine) == salt_of(one, theirs)) == ((mine or "") == (theirs or ""))
    assert salt_of(None, mine) == mine
