"""The server as a browser, and as something worse, meets it."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from lora_gpt2.errors import UserError
from lora_gpt2.playground import server
from lora_gpt2.playground.models import CHOICES
from tests.conftest import ROOT

JSON = {"Content-Type": "application/json"}
ASKED = {"input": "red cat", "adapter": "adapter", "decoding": {"beam_size": 2, "eval_len": 8}}


def answer(address: str, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    text = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, text, headers)
    response = connection.getresponse()
    return response.status, response.read().decode()


def test_the_page_loads_nothing_from_elsewhere(address):
    status, page = answer(address, "GET", "/")
    assert status == 200
    assert "//" not in page
    for file in ("/page.js", "/page.css"):
        status, text = answer(address, "GET", file)
        assert status == 200
        assert "http" not in text
    connection = http.client.HTTPConnection(urlsplit(address).netloc)
    connection.request("GET", "/")
    sent = connection.getresponse().headers
    assert "default-src 'none'" in sent["Content-Security-Policy"]
    assert sent["Server"] is None


def test_it_answers(address):
    status, told = answer(address, "POST", "/decode", ASKED, **JSON)
    assert status == 200
    assert len(json.loads(told)["outputs"]) == 2
    status, told = answer(address, "GET", "/about")
    assert json.loads(told)["adapters"][0] == "adapter"
    status, told = answer(address, "GET", "/openapi.json")
    assert json.loads(told)["paths"].keys() == {"/about", "/decode"}


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (400, {**JSON, "Host": "attacker.example"}),
        (403, {**JSON, "Origin": "http://attacker.example"}),
        (403, {**JSON, "Origin": "null"}),
        (403, {**JSON, "Origin": "http://["}),
        (415, {"Content-Type": "text/plain"}),
        (415, {}),
    ],
)
def test_other_sites_cannot_ask(address, status, headers):
    assert answer(address, "POST", "/decode", ASKED, **headers)[0] == status


def test_its_own_page_can_ask(address):
    assert answer(address, "POST", "/decode", ASKED, **JSON, Origin=address)[0] == 200


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, b"{"),
        (400, b"\xff"),
        (400, b"[" * 60_000),
        (413, b" " * 70_000),
        (422, b"null"),
        (422, b'{"input": "\\ud800", "adapter": "adapter"}'),
        (422, {**ASKED, "decoding": {"beam_size": 0}}),
        (422, {**ASKED, "adapter": "../../etc/passwd"}),
    ],
)
def test_what_is_no_question_is_refused(address, status, body):
    found, told = answer(address, "POST", "/decode", body, **JSON)
    assert found == status
    assert json.loads(told)["error"]


@pytest.mark.parametrize("path", ["/../pyproject.toml", "/%2e%2e/pyproject.toml", "//etc/passwd", "/page.py"])
def test_there_are_no_other_files(address, path):
    assert answer(address, "GET", path)[0] == 404


def test_a_slow_question_is_refused(address, monkeypatch):
    monkeypatch.setattr(server, "_SECONDS", 0.2)
    with socket.create_connection((urlsplit(address).hostname, urlsplit(address).port)) as slow:
        slow.sendall(b"POST /decode HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        slow.sendall(b"Content-Length: 100\r\n\r\n{")
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


def test_who_hangs_up_is_no_fault_of_ours():
    async def stream():
        yield b"{"
        raise ClientDisconnect

    with pytest.raises(HTTPException, match="was not sent to its end"):
        anyio.run(server._body, SimpleNamespace(stream=stream))


def test_an_answer_that_takes_too_long_is_given_up(address, playground, monkeypatch):
    monkeypatch.setattr(playground, "seconds", 0)
    status, told = answer(address, "POST", "/decode", ASKED, **JSON)
    assert (status, "took longer" in told) == (503, True)


def test_a_crowd_is_answered_one_by_one_and_the_rest_asked_to_come_back(address, playground, monkeypatch):
    running, most, found, all_told = [], [], [], threading.Event()

    def slow(asked):
        running.append(asked)
        most.append(len(running))
        all_told.wait(60)
        running.pop()
        return {}

    monkeypatch.setattr(playground, "decode", slow)
    with ThreadPoolExecutor(20) as crowd:
        asked = [crowd.submit(answer, address, "POST", "/decode", ASKED, **JSON) for _ in range(20)]
        for one in as_completed(asked):
            found.append(one.result()[0])
            if found.count(503) == 12:
                all_told.set()
    assert max(most) == 1
    assert found.count(200) == len(most) == 8
    assert found.count(503) == 12
    assert answer(address, "POST", "/decode", ASKED, **JSON)[0] == 200, "and then it is free again"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=9), below, max_size=3),
    max_leaves=8,
)
questions = st.fixed_dictionaries(
    {},
    optional={
        "input": values,
        "adapter": values | st.just("adapter"),
        "decoding": values | st.dictionaries(st.sampled_from(sorted(CHOICES)), values, max_size=3),
    },
)


@given(values | questions, st.binary(max_size=40))
def test_whatever_is_asked_gets_a_plain_answer(address, asked, raw):
    """A property of every question: answered, or refused in one line that shows no file and no code."""
    for body in (json.dumps(asked).encode(), raw):
        status, told = answer(address, "POST", "/decode", body, **JSON)
        assert status in (200, 400, 422, 503)
        if status != 200:
            error = json.loads(told)["error"]
            assert error
            assert "Traceback" not in error
            assert str(ROOT) not in error


def test_a_fault_inside_tells_nothing_of_it(address, playground, monkeypatch):
    monkeypatch.setattr(playground, "decode", lambda asked: 1 / 0)
    status, told = answer(address, "POST", "/decode", ASKED, **JSON)
    assert (status, told) == (500, '{"error":"an error inside the server"}')


def test_a_taken_port_is_named(address, playground):
    with pytest.raises(UserError, match="cannot be had"):
        server.serve(playground, urlsplit(address).port or 0, print)


def test_the_command_serves_until_it_is_interrupted(run):
    command = [sys.executable, "-m", "lora_gpt2.cli", "serve", str(run / "adapter"), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("http://127.0.0.1:"), process.stderr and process.stderr.read()
    assert answer(line.split()[0], "POST", "/decode", ASKED, **JSON)[0] == 200
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert "Traceback" not in said
