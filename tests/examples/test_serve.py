"""The example of a server, asked by a real HTTP client."""

from __future__ import annotations

import copy
import gc
import json
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import serve
import torch
import uvicorn
from transformers import StoppingCriteria

import kvprune
from kvprune.policies import KVzip, SnapKV

from ..evaluation.test_explain import bytes_tokenizer
from ..support.models import tiny_model

SYSTEM = "You are a lighthouse keeper. You answer ships in few words, and know the tides by heart. "
LONGEST = 12


class Running:
    """A server in a thread, on a free port."""

    def __init__(self, policies: list[Any], longest: int = LONGEST) -> None:
        self.model: Any = tiny_model(vocab_size=256)
        self.tokenizer = bytes_tokenizer()
        self.policies = policies
        cache = kvprune.ComposedCache(policies)
        self.server = serve.Server(self.model, self.tokenizer, SYSTEM, cache, 2, longest)
        config = uvicorn.Config(self.server.app, port=0, log_level="error")
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.uvicorn.run)
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)
        port = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def end(self) -> None:
        """Stops the server, and waits for its threads."""
        self.client.close()
        self.uvicorn.should_exit = True
        self.thread.join(30)
        self.server.pool.shutdown()

    def begun(self) -> str:
        """The name of a new conversation."""
        answer = self.client.post("/conversations")
        assert answer.status_code == 201
        return str(answer.json()["conversation"])

    def asked(self, name: str, text: str) -> str:
        """The whole answer to a text."""
        with self.client.stream("POST", f"/conversations/{name}", json={"text": text}) as answer:
            assert answer.status_code == 200
            lines = [line for line in answer.iter_lines() if line]
        assert lines[-2] == "event: done"
        pieces = zip(lines[::2], lines[1::2], strict=True)
        told = [json.loads(data[6:]) for kind, data in pieces if kind == "event: message"]
        return "".join(piece["text"] for piece in told)

    def expected(self, texts: list[str]) -> list[str]:
        """The answers that `generate` gives by itself, in a conversation of these texts."""
        ids = self.tokenizer(SYSTEM, return_tensors="pt").input_ids
        cache = kvprune.ComposedCache(self.policies)
        kvprune.read(self.model, cache, ids)
        answers = []
        for text in texts:
            ids = torch.cat([ids, self.tokenizer(text, return_tensors="pt").input_ids], 1)
            more = {"max_new_tokens": self.server.longest, "do_sample": False}
            mask = torch.ones_like(ids)  # in this tokenizer padding is a letter, too
            told = self.model.generate(ids, attention_mask=mask, cache=cache, **more)
            new = told[0, ids.shape[1] :]
            answers.append(self.tokenizer.decode(new, skip_special_tokens=True))
            ids = told
        return answers


@pytest.fixture(params=[[KVzip(0.5)], [SnapKV(40)]], ids=repr)
def running(request) -> Iterator[Running]:
    """A server, with one policy or another."""
    server = Running(request.param)
    yield server
    server.end()


def test_several_users_at_once(running):
    """Each has the answers of a conversation by itself, whatever the others ask meanwhile."""
    texts = [["Ahoy!", " And you?"], ["What tide?"], ["Fog ahead.", " Still?", " Now?"], ["Ahoy!"]]
    expected = [running.expected(each) for each in texts]

    def talk(mine: list[str]) -> list[str]:
        name = running.begun()
        return [running.asked(name, text) for text in mine]

    with ThreadPoolExecutor(len(texts)) as users:
        assert list(users.map(talk, texts)) == expected


def test_the_system_prompt_stays(running):
    """It was read once, and no conversation changes it."""
    lead = copy.deepcopy(running.server.lead)
    running.asked(running.begun(), "Ahoy!")
    now = running.server.lead
    assert now.seen == lead.seen and now.nbytes == lead.nbytes
    for layer in range(len(lead)):
        assert torch.equal(now.columns(layer), lead.columns(layer))


def test_what_is_asked_wrongly(running):
    """Says what was expected."""
    client, name = running.client, running.begun()
    for method, path, body, status in (
        ("POST", "/conversations/none", {"text": "a"}, 404),
        ("DELETE", "/conversations/none", None, 404),
        ("POST", f"/conversations/{name}", {"words": "a"}, 422),
        ("POST", f"/conversations/{name}", {"text": ""}, 422),
        ("POST", f"/conversations/{name}", {"text": "a" * 600}, 413),
    ):
        assert client.request(method, path, json=body).status_code == status
    assert running.asked(name, "Ahoy!") == running.expected(["Ahoy!"])[0]


class Waiting(StoppingCriteria):
    """Waits a little behind each token, so that an answer takes seconds on any machine."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        time.sleep(0.02)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.fixture
def slow_answers(monkeypatch):
    """A server whose answers have 300 tokens, and take six seconds or more."""
    running = Running([SnapKV(40)], longest=300)
    right = running.model.generate

    def slowly(*given: Any, stopping_criteria: Any, **more: Any) -> Any:
        return right(*given, stopping_criteria=[*stopping_criteria, Waiting()], **more)

    monkeypatch.setattr(running.model, "generate", slowly)
    return running


def test_a_client_that_goes_away(slow_answers):
    """Its answer ends; its conversation goes on from there."""
    running = slow_answers
    try:
        name = running.begun()
        path, body = f"/conversations/{name}", {"text": "Ahoy!"}
        with running.client.stream("POST", path, json=body) as answer:
            next(answer.iter_lines())
            assert running.client.post(path, json=body).status_code == 409
        conversation = running.server.conversations[name]
        before = time.monotonic()
        while conversation.busy and time.monotonic() < before + 30:
            time.sleep(0.01)
        assert not conversation.busy
        read = conversation.ids.shape[1]
        assert read < len(SYSTEM) + 300 and conversation.cache.seen == read - 1
        running.server.longest = 4
        assert running.client.delete(path).status_code == 204
        state = running.client.get("/").json()
        assert state["conversations"] == state["bytes"]["conversations"] == 0
    finally:
        running.end()


def test_a_conversation_that_is_ended_in_the_midst_of_an_answer(slow_answers):
    """The answer ends, and nothing of the conversation is left."""
    running = slow_answers
    try:
        name = running.begun()
        path, cache = f"/conversations/{name}", running.server.conversations[name].cache
        gone = weakref.ref(cache)
        with running.client.stream("POST", path, json={"text": "Ahoy!"}) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert running.client.delete(path).status_code == 204
            rest = [line for line in lines if line.startswith("data")]
        assert len(rest) < 300 and cache.seen < len(SYSTEM) + 300
        del cache
        before = time.monotonic()
        while gone() is not None and time.monotonic() < before + 30:
            gc.collect()
            time.sleep(0.01)
        assert gone() is None and running.client.get("/").json()["conversations"] == 0
    finally:
        running.end()


def test_an_error_in_an_answer(running, monkeypatch):
    """Says so, and the conversation can be gone on with, from its beginning."""
    name = running.begun()
    running.asked(name, "Ahoy!")
    path, right = f"/conversations/{name}", running.model.generate

    def fails(*given: Any, **more: Any) -> Any:
        right(*given, **{**more, "max_new_tokens": 2})
        raise MemoryError("no room")

    monkeypatch.setattr(running.model, "generate", fails)
    answer = running.client.post(path, json={"text": " And you?"})
    assert "event: error" in answer.text and "no room. The conversation begins anew" in answer.text
    monkeypatch.undo()
    assert running.asked(name, "Ahoy!") == running.expected(["Ahoy!"])[0]


@pytest.mark.slow
def test_nothing_leaks():
    """Bytes, threads and conversations after two hundred are those after a few."""
    running = Running([KVzip(0.5)], longest=4)
    try:
        threads, held, caches = [], set(), []
        for number in range(200):
            name = running.begun()
            caches.append(weakref.ref(running.server.conversations[name].cache))
            running.asked(name, f"Ship {number:03}?")
            held.add(running.client.get("/").json()["bytes"]["conversations"])
            running.client.delete(f"/conversations/{name}")
            threads.append(threading.active_count())
        assert len(held) == 1
        # The pool has as many threads as answers at once, made when they are first needed.
        assert max(threads) <= threads[0] + 1 and len(running.server.conversations) == 0
        assert running.client.get("/").json()["bytes"]["conversations"] == 0
        # What the server counts is what it knows of: a cache might be held elsewhere.
        gc.collect()
        assert [number for number, cache in enumerate(caches) if cache() is not None] == []
    finally:
        running.end()
