"""Sessions over HTTP, with nothing but httpx: talk, name a place, fork, rewind, keep, and carry away.

    statewise serve demo                        # in another terminal
    python examples/http_sessions.py [--url http://127.0.0.1:8000] [--api-key KEY] [--file talk.state]

A session is a conversation whose memory the server keeps: a request sends what is new and nothing else. The memory of
a linear model has a fixed size, so a fork costs nothing and a file of it stays small however long the talk was.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import httpx

NOTE = "Remember this:\nThe code of the green lamp is 4821."
CHANGE = "Correction: the code of the green lamp is 1357."
QUESTION = "What is the code of the green lamp?"


class Server:
    """The few calls that this example needs."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(base_url=url, headers=headers, timeout=120)

    def call(self, method: str, path: str, **request: Any) -> httpx.Response:
        """Raises `SystemExit` with what the server says where it refuses."""
        response = self._client.request(method, path, **request)
        if response.is_error:
            raise SystemExit(f"{method} {path}: {response.status_code}, {response.json()['error']['message']}")
        return response

    def create(self) -> dict[str, Any]:
        """An empty session. It may begin with `messages`, `text` or `token_ids`, whose memory is then computed."""
        return self._session("POST", "/v1/sessions", json={})

    def say(self, session: dict[str, Any], text: str) -> str:
        """One turn. Only the new message is sent; the answer becomes part of the session."""
        body = {"session_id": session["id"], "messages": [{"role": "user", "content": text}], "temperature": 0}
        answer = self.call("POST", "/v1/chat/completions", json=body).json()
        return str(answer["choices"][0]["message"]["content"])

    def show(self, session: dict[str, Any]) -> dict[str, Any]:
        return self._session("GET", f"/v1/sessions/{session['id']}")

    def change(self, session: dict[str, Any], action: str, **arguments: Any) -> dict[str, Any]:
        """`rewind`, `checkpoint` or `pin`; gives the session as it is then."""
        return self._session("POST", f"/v1/sessions/{session['id']}/{action}", json=arguments)

    def fork(self, session: dict[str, Any], n: int) -> list[dict[str, Any]]:
        forks: list[dict[str, Any]] = self.call("POST", f"/v1/sessions/{session['id']}/fork", json={"n": n}).json()[
            "data"
        ]
        return forks

    def export(self, session: dict[str, Any], file: Path) -> None:
        """Write the session to a file, piece by piece."""
        with self._client.stream("GET", f"/v1/sessions/{session['id']}/export") as response, file.open("wb") as out:
            response.raise_for_status()
            for piece in response.iter_bytes():
                out.write(piece)

    def take_in(self, file: Path) -> dict[str, Any]:
        """A session from a file. Nothing is computed."""
        binary = {"Content-Type": "application/octet-stream"}
        return self._session("POST", "/v1/sessions/import", content=file.read_bytes(), headers=binary)

    def delete(self, *sessions: dict[str, Any]) -> None:
        for session in sessions:
            self.call("DELETE", f"/v1/sessions/{session['id']}")

    def _session(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        session: dict[str, Any] = self.call(method, path, **request).json()
        return session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key")
    parser.add_argument("--file", type=Path, default=Path("talk.state"))
    options = parser.parse_args()
    server = Server(options.url, options.api_key)

    talk = server.create()
    print(f"created:  {server.say(talk, NOTE)}")
    talk = server.change(talk, "checkpoint", name="noted")
    print(f"named:    {talk['num_tokens']} tokens, {talk['bytes']} bytes, 'noted' at {talk['checkpoints']['noted']}")

    left, right = server.fork(talk, 2)
    print(f"left:     {server.say(left, QUESTION)}")
    print(f"right:    {server.say(right, CHANGE)}")
    print(f"right:    {server.say(right, QUESTION)}")
    print(f"original: {server.show(talk)['num_tokens']} tokens, as before")

    back = server.change(right, "rewind", to="noted")
    print(f"rewound:  {back['num_tokens']} tokens")
    print(f"right:    {server.say(right, QUESTION)}")

    server.change(right, "pin", ttl=600)
    server.export(right, options.file)
    again = server.take_in(options.file)
    print(f"carried:  {options.file.stat().st_size} bytes in {options.file.name}, {again['num_tokens']} tokens")
    print(f"again:    {server.say(again, 'What is 27 + 45?')}")
    server.delete(talk, left, right, again)


if __name__ == "__main__":
    main()
