"""A small HTTP server: one compressed system prompt, conversations that go on from copies of it.

    pip install 'kvprune[examples]'
    python examples/serve.py --model NAME_OR_PATH --system system.txt --policies "kvzip(0.5)"

    POST   /conversations                     begins one: {"conversation": "..."}
    POST   /conversations/{id}  {"text": ..}  an answer, token by token, as server-sent events
    DELETE /conversations/{id}                forgets it, and stops an answer that is under way
    GET    /                                  how many there are, and the bytes of their caches

The system prompt is read once, at the start. Each conversation has a copy of its cache: what is
shared by nature (weights, policies) is shared, keys and values are its own. A client that goes away
in the middle of an answer stops it; its conversation stays as far as it came. Answers of several
conversations run at once, as many as `--at-once` says; the others wait.

A server for one machine and a few people: there is no batching of requests. What it shows is how
caches are held, copied, and let go.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import TextStreamer

import kvprune
from kvprune.evaluation.specs import cache_of


@dataclass
class Conversation:
    """One user's: all token ids so far `[1, n]`, what the cache holds of them, and its bytes."""

    ids: torch.Tensor
    cache: kvprune.ComposedCache
    held: int
    busy: bool = False
    stop: threading.Event = field(default_factory=threading.Event)


class _Stop(StoppingCriteria):
    """Ends a generation once an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = self._event.is_set()
        return torch.full((input_ids.shape[0],), done, device=input_ids.device)


class _Sending(TextStreamer):
    """Hands each piece of text to a function, as soon as it is whole words."""

    def __init__(self, tokenizer: Any, send: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._send = send

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with each piece."""
        if text:
            self._send(text)


class Server:
    """A model with a system prompt that was read once, and the conversations behind it.

    Args:
        model: attached.
        tokenizer: the model's.
        system: the system prompt.
        cache: an empty one, whose policies compress it.
        at_once: the most answers that are generated at the same time.
        longest: the most tokens of an answer.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        system: str,
        cache: kvprune.ComposedCache,
        at_once: int = 2,
        longest: int = 256,
    ) -> None:
        self.model, self.tokenizer, self.longest = model, tokenizer, longest
        self.ids = tokenizer(system, return_tensors="pt").input_ids.to(model.device)
        kvprune.read(model, cache, self.ids)
        self.lead = cache
        self.conversations: dict[str, Conversation] = {}
        self.pool = ThreadPoolExecutor(at_once, "answer")
        self.app = Starlette(
            routes=[
                Route("/", self.state, methods=["GET"]),
                Route("/conversations", self.begin, methods=["POST"]),
                Route("/conversations/{name}", self.answer, methods=["POST"]),
                Route("/conversations/{name}", self.end, methods=["DELETE"]),
            ]
        )

    async def state(self, request: Request) -> Response:
        """How many conversations there are, and the bytes of their caches."""
        found = list(self.conversations.values())
        held = {"system": self.lead.nbytes, "conversations": sum(c.held for c in found)}
        return JSONResponse({"conversations": len(found), "bytes": held})

    async def begin(self, request: Request) -> Response:
        """A conversation behind a copy of the system prompt's cache."""
        name = uuid.uuid4().hex
        cache = copy.deepcopy(self.lead)
        self.conversations[name] = Conversation(self.ids, cache, cache.nbytes)
        return JSONResponse({"conversation": name}, status_code=201)

    async def end(self, request: Request) -> Response:
        """Forgets a conversation."""
        self._found(request).stop.set()
        del self.conversations[request.path_params["name"]]
        return Response(status_code=204)

    async def answer(self, request: Request) -> Response:
        """Streams an answer to a text."""
        conversation = self._found(request)
        try:
            text = (await request.json())["text"]
            assert isinstance(text, str) and text
        except Exception as error:
            raise HTTPException(422, 'expected JSON as {"text": "..."}') from error
        if conversation.busy:
            raise HTTPException(409, "expected one question at a time: an answer is under way")
        new = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        ids = torch.cat([conversation.ids, new.to(self.model.device)], 1)
        most = getattr(self.model.config, "max_position_embeddings", 0)
        if most and ids.shape[1] + self.longest > most:
            raise HTTPException(413, f"expected a conversation of at most {most} tokens in all")
        # It may have been forgotten meanwhile.
        self._found(request)
        conversation.busy, conversation.stop = True, threading.Event()
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()

        def send(piece: str | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        self.pool.submit(self._generate, conversation, ids, send)
        return StreamingResponse(_events(conversation.stop, pieces), media_type="text/event-stream")

    def _found(self, request: Request) -> Conversation:
        try:
            return self.conversations[request.path_params["name"]]
        except KeyError:
            raise HTTPException(404, "no such conversation") from None

    def _generate(
        self, conversation: Conversation, ids: torch.Tensor, send: Callable[[str | None], None]
    ) -> None:
        """Runs in a thread of the pool; None is sent at the end, however it comes."""
        stop = conversation.stop
        try:
            if not stop.is_set():
                conversation.ids = self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    cache=conversation.cache,
                    max_new_tokens=self.longest,
                    do_sample=False,
                    streamer=_Sending(self.tokenizer, lambda text: send(_event({"text": text}))),
                    stopping_criteria=StoppingCriteriaList([_Stop(stop)]),
                )
            send(_event({}, "done"))
        except Exception as error:
            # What the cache has read of this turn is not known: the conversation begins anew.
            conversation.ids, conversation.cache = self.ids, copy.deepcopy(self.lead)
            said = f"{error}. The conversation begins anew, behind the system prompt"
            send(_event({"error": said}, "error"))
        finally:
            conversation.held = conversation.cache.nbytes
            conversation.busy = False
            send(None)


def _event(data: dict[str, str], kind: str = "message") -> str:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"


async def _events(stop: threading.Event, pieces: asyncio.Queue[str | None]) -> AsyncIterator[str]:
    """The events of an answer; where the client goes away, its thread ends at the next token."""
    try:
        while (piece := await pieces.get()) is not None:
            yield piece
    finally:
        stop.set()


def main() -> None:
    """Reads the system prompt, and serves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--system", required=True, help="a file with the system prompt")
    parser.add_argument("--policies", default="kvzip(0.5)", help="as `kvprune compare` takes them")
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--longest", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--port", type=int, default=8000)
    asked = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    model = kvprune.attach(AutoModelForCausalLM.from_pretrained(asked.model))
    with open(asked.system, encoding="utf-8") as file:
        system = file.read()
    named = cache_of(asked.policies)
    policies = [policy.for_tokenizer(tokenizer) for policy in named.policies]
    cache = kvprune.ComposedCache(policies, store=named.store)
    server = Server(model, tokenizer, system, cache, asked.at_once, asked.longest)
    uvicorn.run(server.app, port=asked.port)


if __name__ == "__main__":
    main()
