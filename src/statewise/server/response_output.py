"""The output items of a response, and the events that tell of them as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from statewise.server.answers import Content, Part, Reasoning, ToolCallArguments, ToolCallBegin
from statewise.server.replies import new_id

Event = tuple[str, dict[str, Any]]
"""The name of an event, and its fields but `type` and `sequence_number`."""


class Output:
    """Takes the parts of one answer; an item is what comes between two changes of their kind."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self.reasoning_tokens = 0
        self._open: str | None = None  # the type of the last item, until it is done
        self._logprobs: list[Any] = []  # of tokens whose text has not come out yet

    def take(self, parts: Sequence[Part], tokens: int = 0, logprobs: Sequence[Any] = ()) -> list[Event]:
        """`tokens` is how many the parts were made of, `logprobs` what is known of them in the form of the API."""
        events: list[Event] = []
        self._logprobs += logprobs
        for part in parts:
            if not isinstance(part, Content):
                self._logprobs = []  # the API has no place for those of thoughts and calls
            if isinstance(part, ToolCallBegin):
                events += self._begin_call(part)
            elif isinstance(part, ToolCallArguments):
                events.append(self._more("response.function_call_arguments.delta", part.text))
                self.items[-1]["arguments"] += part.text
            else:
                kind = "reasoning" if isinstance(part, Reasoning) else "message"
                if self._open != kind:
                    events += self.close() + self._begin_text(kind)
                events.append(self._text(part, self._logprobs if isinstance(part, Content) else ()))
                self._logprobs = []
        if self._open == "reasoning":
            self.reasoning_tokens += tokens
        return events

    def close(self, status: str = "completed") -> list[Event]:
        """The last item is done."""
        kind, self._open = self._open, None
        if kind is None:
            return []
        item, events = self.items[-1], []
        item["status"] = status
        if kind == "function_call":
            events.append(self._event("response.function_call_arguments.done", arguments=item["arguments"]))
        else:
            part = item["content"][0]
            name = "response.reasoning_text.done" if kind == "reasoning" else "response.output_text.done"
            more = {} if kind == "reasoning" else {"logprobs": part.get("logprobs", [])}
            events.append(self._event(name, content_index=0, text=part["text"], **more))
            events.append(self._event("response.content_part.done", content_index=0, part=part))
        events.append(("response.output_item.done", {"output_index": len(self.items) - 1, "item": item}))
        return events

    def _begin_text(self, kind: str) -> list[Event]:
        if kind == "reasoning":
            item: dict[str, Any] = {"id": new_id("rs"), "type": kind, "summary": [], "content": []}
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        else:
            item = {"id": new_id("msg"), "type": kind, "role": "assistant", "content": []}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        added = self._begin(kind, item)
        item["content"].append(part)
        return [added, self._event("response.content_part.added", content_index=0, part=dict(part))]

    def _begin_call(self, part: ToolCallBegin) -> list[Event]:
        events = self.close()
        item = {"id": new_id("fc"), "type": "function_call", "call_id": part.id, "name": part.name, "arguments": ""}
        return [*events, self._begin("function_call", item)]

    def _begin(self, kind: str, item: dict[str, Any]) -> Event:
        self._open = kind
        item["status"] = "in_progress"
        self.items.append(item)
        copy = {**item, "content": []} if "content" in item else dict(item)
        return "response.output_item.added", {"output_index": len(self.items) - 1, "item": copy}

    def _text(self, part: Content | Reasoning, logprobs: Sequence[Any]) -> Event:
        held = self.items[-1]["content"][0]
        held["text"] += part.text
        if isinstance(part, Reasoning):
            return self._more("response.reasoning_text.delta", part.text, content_index=0)
        held["logprobs"] += logprobs
        return self._more("response.output_text.delta", part.text, content_index=0, logprobs=list(logprobs))

    def _more(self, name: str, delta: str, **fields: Any) -> Event:
        return self._event(name, delta=delta, **fields)

    def _event(self, name: str, **fields: Any) -> Event:
        return name, {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}
