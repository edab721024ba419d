"""What is served and how it is: `/v1/models`, `/health`, `/ready`, `/version`, `/tokenize`, `/detokenize`,
`/tokenizer_info`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from statewise import __version__
from statewise.errors import RequestError
from statewise.server.protocol import DetokenizeRequest, TokenizeRequest, as_spoken
from statewise.server.replies import json_response
from statewise.server.service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter()
    engine, settings = service.engine, service.settings

    def card() -> dict[str, Any]:
        return {
            "id": settings.model_name,
            "object": "model",
            "created": service.started,
            "owned_by": "statewise",
            "max_model_len": engine.info.max_length if engine.info else None,
        }

    @routes.get("/v1/models")
    async def models() -> Response:
        """The one model that is served."""
        return json_response({"object": "list", "data": [card()]})

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_model(name)
        return json_response(card())

    @routes.get("/health")
    async def health() -> Response:
        """Whether the engine lives. 503: it does not, and will not by itself."""
        alive = engine.phase in ("loading", "ready")
        return json_response({"status": engine.phase}, 200 if alive else 503)

    @routes.get("/ready")
    async def ready() -> Response:
        """Whether requests are served: the model is loaded, the step loop beats, and the server is not ending."""
        serving = engine.beating and not service.draining
        return json_response({"ready": serving, "engine": engine.phase}, 200 if serving else 503)

    @routes.get("/version")
    async def version() -> Response:
        return json_response({"version": __version__})

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a text or of a conversation."""
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("prompt", "send one of prompt and messages")
        if body.messages is not None:
            conversation = as_spoken(body.messages)
            ids = await service.text.encode_chat(conversation, add_generation_prompt=body.add_generation_prompt)
        else:
            ids = await service.text.encode(body.prompt or "", body.add_special_tokens)
        limit = engine.info.max_length if engine.info else None
        return json_response({"tokens": ids, "count": len(ids), "max_model_len": limit})

    @routes.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        """The chat template and the special tokens, for clients that render prompts themselves."""
        tokenizer = service.text.tokenizer
        return json_response(
            {
                **{f"{role}_token": None for role in ("bos", "eos", "pad", "unk")},
                **tokenizer.named_tokens,
                "chat_template": tokenizer.template_source() or None,
                "model_max_length": engine.info.max_length if engine.info else None,
                "vocab_size": tokenizer.vocab_size,
            }
        )

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        limit = engine.info.max_length if engine.info else len(body.tokens)
        if len(body.tokens) > limit:
            raise RequestError("tokens", f"tokens has {len(body.tokens)} ids, at most {limit} are taken")
        ids = service.text.checked(body.tokens)
        return json_response({"prompt": service.text.decode(ids, body.skip_special_tokens)})

    return routes
