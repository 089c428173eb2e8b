"""TokenServer and TokenEngine over real HTTP: what is sent, what comes back, what dies, what is refused."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
import torch
from tiny_models import tiny_lm

from agro_lightning.models.config import PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.rollout import (
    BatchedDecoding,
    Generation,
    RolloutEngine,
    Sampling,
    TokenEngine,
    TokenServer,
)
from agro_lightning.rollout.engines.token_engine import TOKEN_VARIABLE

PROMPTS = [[1, 5, 9, 33], [1, 50], [1, 12, 13, 14, 15], [1, 7]]
SAMPLING = Sampling(max_new_tokens=6, temperature=0.7)


def make_policy() -> Policy:
    lm = tiny_lm("llama")
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return Policy(PolicySettings(packing="plain"), lm=lm.eval(), temperature=0.7)


@pytest.fixture(scope="module")
def policy():
    return make_policy()


@pytest.fixture
def own(policy, quickstart_tokenizer):
    engine = BatchedDecoding()
    engine.attach(policy, quickstart_tokenizer)
    return engine


@pytest.fixture
def server(own):
    with TokenServer(own, policy_version=4, max_model_len=128) as server:
        yield server


@pytest.fixture
def connect(policy, quickstart_tokenizer):
    """Makes a TokenEngine to some servers, and closes it at the end."""
    made = []

    def connect(*servers, url=None, token=None, **options) -> TokenEngine:
        url = url or [server.url for server in servers]
        made.append(TokenEngine(url, token=servers[0].token if token is None else token, **options))
        made[-1].attach(policy, quickstart_tokenizer)
        return made[-1]

    yield connect
    for engine in made:
        engine.close()


def post(server, body, **headers):
    headers = {"Authorization": f"Bearer {server.token}", **headers}
    content = body if isinstance(body, bytes) else json.dumps(body)
    return httpx.post(server.url + "/inference/v1/generate", content=content, headers=headers)


def asking(**params):
    return {"token_ids": [1, 5, 9], "sampling_params": {"max_tokens": 4, "seed": 0, **params}}


def test_tokens_and_logprobs_are_those_of_the_policy(policy, server, connect):
    engine = connect(server)
    rows = engine.generate(PROMPTS, SAMPLING, n=8, seed=3)
    assert [len(row) for row in rows] == [8] * 4
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert len({one.completion_ids for one in row}) > 2
        for one in row:
            assert one.finish_reason == ("stop" if one.completion_ids[-1] == 2 else "length")
            with torch.no_grad():
                logits = policy.base(torch.tensor([[*prompt, *one.completion_ids]])).logits[0] / 0.7
            logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            expected = logprobs.gather(-1, torch.tensor(one.completion_ids)[:, None])[:, 0].tolist()
            assert one.behavior_logprobs == pytest.approx(expected, abs=1e-4)
    assert engine.generate(PROMPTS, SAMPLING, n=8, seed=3) == rows
    assert engine.generate(PROMPTS, SAMPLING, n=8, seed=4) != rows
    alone = connect(server, parallel_requests=1)
    assert alone.generate(PROMPTS, SAMPLING, n=8, seed=3) == rows  # whatever else is in flight
    assert alone.take_counts() == {}


def test_greedy_answers_are_the_engines_own(own, server, connect):
    greedy = Sampling(max_new_tokens=6, temperature=0.0)
    engine = connect(server)
    answers, expected = (each.generate(PROMPTS, greedy, n=1, seed=0) for each in (engine, own))
    assert [row[0].completion_ids for row in answers] == [row[0].completion_ids for row in expected]
    assert {row[0].behavior_logprobs for row in answers} == {None}


def test_the_engine_says_whose_weights_it_got(server, connect):
    engine = connect(server)
    assert engine.update_weights(9) == 4
    server.update_weights(7)
    assert engine.update_weights(9) == 7
    assert post(server, asking()).json()["choices"][0]["weight_versions"][0]["version"] == "7"


class Slow(RolloutEngine):
    """Answers with its name as the only token, after a while; fails on the prompts it is told."""

    def __init__(self, name=0, seconds=0.0, error=None):
        self.name, self.seconds, self.error, self.calls = name, seconds, error, 0

    def attach(self, policy, tokenizer): ...

    def update_weights(self, policy_version): ...

    def generate(self, prompts, sampling, *, n, seed):
        self.calls += 1
        time.sleep(self.seconds)
        if self.error is not None and prompts[0][-1] == 13:
            raise self.error
        one = Generation(completion_ids=(self.name,), finish_reason="length", behavior_logprobs=(-0.5,))
        return [[one] * n for _ in prompts]

    def close(self): ...


def test_several_servers_share_the_load(connect):
    engines = [Slow(3, 0.02), Slow(4, 0.02)]
    with TokenServer(engines[0], token="t") as first, TokenServer(engines[1], token="t") as second:
        engine = connect(first, second)
        rows = engine.generate([[1]] * 20, SAMPLING, n=1, seed=0)
    assert {row[0].completion_ids for row in rows} == {(3,), (4,)}
    assert min(each.calls for each in engines) >= 5


def test_a_server_that_dies_is_left_out_counted_and_tried_again(server, connect, quickstart_tokenizer):
    twin = BatchedDecoding()
    twin.attach(make_policy(), quickstart_tokenizer)
    dies = TokenServer(twin, token=server.token, policy_version=4)
    engine = connect(server, dies, retry_after_s=0.3)
    expected = engine.generate(PROMPTS * 3, SAMPLING, n=2, seed=1)
    port = int(dies.url.rsplit(":")[-1])
    dies.close()
    assert engine.generate(PROMPTS * 3, SAMPLING, n=2, seed=1) == expected  # nothing is lost, the seeds stay
    counts = engine.take_counts()
    assert counts.pop("server_retries") >= 1 and counts == {"server_deaths": 1.0}
    back = Slow(3)
    with TokenServer(back, token=server.token, port=port):
        time.sleep(0.4)
        engine.generate(PROMPTS * 3, SAMPLING, n=2, seed=1)
    assert back.calls
    server.close()
    engine.patience_s = 0.5
    with pytest.raises(RuntimeError, match=r"no server has answered for 0.5 s: http.*no answer.*; http"):
        engine.generate(PROMPTS, SAMPLING, n=2, seed=1)


def test_a_server_process_that_is_killed_within_a_request_loses_nothing(connect):
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from test_token_server import Slow\n"
        "from agro_lightning.rollout import TokenServer\n"
        "server = TokenServer(Slow(3, seconds=30.0), token='t')\n"
        "print(server.url, flush=True)\n"
        "server.wait(0.05)\n"
    )
    command = [sys.executable, "-c", code, os.path.dirname(__file__)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().strip()
            with TokenServer(Slow(4), token="t") as lives:
                engine = connect(url=[url, lives.url], token="t")
                threading.Timer(0.5, process.kill).start()
                rows = engine.generate([[1]] * 8, SAMPLING, n=2, seed=0)
        finally:
            process.kill()
    assert [one.completion_ids for row in rows for one in row] == [(4,)] * 16
    counts = engine.take_counts()
    assert counts["server_deaths"] == 1 and counts["server_retries"] >= 1


def test_what_cannot_be_generated_is_an_error_and_counted(connect):
    for error, retries in ((ValueError("no"), {}), (OSError("no"), {"server_retries": 3.0})):
        with TokenServer(Slow(3, error=error)) as server:
            engine = connect(server)
            good, bad = engine.generate([[1], [13]], SAMPLING, n=2, seed=0)
        assert [one.finish_reason for one in (*good, *bad)] == ["length", "length", "error", "error"]
        kind = "failed" if retries else "refused"
        assert engine.take_counts() == {f"generation_failures/{kind}": 2.0, **retries}
    with TokenServer(Slow(3), max_model_len=8) as short:
        engine = connect(short)
        fits, long = engine.generate([[1, 2], [1, 2, 3]], SAMPLING, n=1, seed=0)
    assert (fits[0].finish_reason, long[0].finish_reason) == ("length", "error")
    with TokenServer(Slow(64)) as foreign:  # a token that the policy does not have
        engine = connect(foreign)
        assert engine.generate([[1]], SAMPLING, n=1, seed=0)[0][0].finish_reason == "error"


def test_bad_settings_and_absent_servers_are_named(server, connect, monkeypatch):
    with pytest.raises(ValueError, match="http://127.0.0.1:8000"):
        TokenEngine("localhost:8000")
    with pytest.raises(ValueError, match="positive"):
        TokenEngine(server.url, retry_after_s=0)
    with pytest.raises(RuntimeError, match="attach"):
        TokenEngine(server.url).generate([[1]], SAMPLING, n=1, seed=0)
    with pytest.raises(RuntimeError, match=r"no server answers: .*401.*Authorization"):
        connect(url=server.url, token="wrong")
    monkeypatch.setenv(TOKEN_VARIABLE, server.token)
    connect(server, url=server.url + "/", token="")
    engine = connect(server)
    with pytest.raises(ValueError, match="vocabulary"):
        engine.generate([[64]], SAMPLING, n=1, seed=0)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        ([1], 400, "the body must be a JSON object"),
        ({"token_ids": [1]}, 400, "sampling_params must be"),
        (asking() | {"token_ids": []}, 400, "empty"),
        (asking() | {"token_ids": "a b"}, 400, "list of token ids"),
        (asking() | {"token_ids": [True]}, 400, "list of token ids"),
        (asking() | {"token_ids": [-1]}, 400, "list of token ids"),
        (asking() | {"token_ids": [64]}, 400, "vocabulary"),
        (asking() | {"token_ids": [1] * 128}, 400, "128 tokens"),
        (asking() | {"stream": True}, 400, "stream"),
        (asking() | {"model": "other"}, 404, "policy"),
        ({"token_ids": [1], "sampling_params": {}}, 400, "max_tokens must be an integer"),
        (asking(max_tokens=0), 400, "at least 1"),
        (asking(n=0), 400, "n is 0"),
        (asking(temperature="hot"), 400, "temperature must be a number"),
        (asking(temperature=-1), 400, "temperature"),
        (asking(temperature=10**400), 400, "too large"),
        (asking(top_p=0), 400, "top_p"),
        (asking(seed=1.5), 400, "seed"),
        (asking(stop=["end"]), 400, "stop"),
        (asking(presence_penalty=0.5), 400, "presence_penalty"),
        (asking(surprise=1), 400, "surprise"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(server, body, status, message):
    answer = post(server, body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert message in error["message"] and error["code"] == status
    assert post(server, asking(min_p=0, top_k=-1, skip_special_tokens=False)).status_code == 200


def test_the_door_is_closed_to_others(own, server):
    with pytest.raises(ValueError, match="remote=True"):
        TokenServer(own, host="0.0.0.0")
    with pytest.raises(ValueError, match="remote=True"):
        TokenServer(own, host="example.org")
    with pytest.raises(ValueError, match="empty"):
        TokenServer(own, token="")
    TokenServer(own, host="0.0.0.0", remote=True).close()
    for headers in ({"Authorization": "Bearer wrong"}, {"Authorization": server.token}):
        answer = post(server, asking(), **headers)
        assert answer.status_code == 401 and "Bearer" in answer.json()["error"]["message"]
    assert httpx.get(server.url + "/v1/models").status_code == 401
    assert httpx.get(server.url + "/health").json() == {}
    with TokenServer(own) as other:
        assert other.token != server.token


def test_bodies_and_the_queue_are_bounded(own):
    with TokenServer(own, max_body_bytes=1000) as small:
        answer = post(small, asking() | {"token_ids": [1] * 1000})
        assert answer.status_code == 413 and "1000" in answer.json()["error"]["message"]
        with socket.create_connection(("127.0.0.1", int(small.url.rsplit(":")[-1]))) as raw:
            raw.sendall(b"POST /inference/v1/generate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
            assert b" 411 " in raw.recv(1000)
        with socket.create_connection(("127.0.0.1", int(small.url.rsplit(":")[-1]))) as raw:
            raw.sendall(b"\x00\x01 nonsense\r\n\r\n")
            assert b'"error"' in raw.recv(1000)
        for method, path, status in (("GET", "/inference/v1/generate", 405), ("GET", "/etc/passwd", 404)):
            headers = {"Authorization": f"Bearer {small.token}"}
            assert httpx.request(method, small.url + path, headers=headers).status_code == status
    with TokenServer(Slow(3, seconds=0.5), max_requests=2) as busy:
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(post(busy, asking()))) for _ in range(6)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert sorted({answer.status_code for answer in answers}) == [200, 503]
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert "waiting already" in refused.json()["error"]["message"] and refused.headers["Retry-After"]


def test_a_client_that_leaves_is_not_generated_for():
    engine = Slow(3, seconds=0.4)
    with TokenServer(engine) as server:
        first = threading.Thread(target=lambda: post(server, asking()))
        first.start()
        time.sleep(0.15)
        gone = http.client.HTTPConnection("127.0.0.1", int(server.url.rsplit(":")[-1]))
        headers = {"Authorization": f"Bearer {server.token}"}
        gone.request("POST", "/inference/v1/generate", json.dumps(asking()), headers)
        time.sleep(0.1)
        gone.close()
        first.join()
        time.sleep(0.2)
        assert engine.calls == 1
        assert post(server, asking()).status_code == 200


def test_closing_ends_waiting_requests_and_leaves_the_engine(own):
    engine = Slow(3, seconds=0.4)
    server = TokenServer(engine)
    statuses = []
    threads = [
        threading.Thread(target=lambda: statuses.append(post(server, asking()).status_code)) for _ in "123"
    ]
    [thread.start() for thread in threads]
    time.sleep(0.2)
    server.close()
    server.close()
    [thread.join() for thread in threads]
    assert sorted(statuses) == [200, 503, 503] and engine.calls == 1
    with pytest.raises(httpx.ConnectError):
        post(server, asking())
    forgotten = TokenServer(own)
    url = forgotten.url
    del forgotten
    with pytest.raises(httpx.HTTPError):
        httpx.get(url + "/health")


def test_a_server_ends_with_its_owner():
    """A process that serves ends when its parent is killed; a forked child does not keep the port."""
    serve = (
        "import os, sys, time\n"
        f"sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from test_token_server import Slow\n"
        "from agro_lightning.rollout import TokenServer\n"
        "server = TokenServer(Slow(3))\n"
        "print(os.getpid(), server.url, flush=True)\n"
        "server.wait(0.05)\n"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {serve!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        child, url = process.stdout.readline().split()
        assert httpx.get(url + "/health").status_code == 200
        process.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            httpx.get(url + "/health")
        except httpx.TransportError:
            break
        time.sleep(0.05)
    else:
        os.kill(int(child), signal.SIGKILL)
        pytest.fail("the server outlived the process that started it")
    with TokenServer(Slow(3)) as server:
        forked = os.fork()
        if not forked:
            time.sleep(20)
            os._exit(0)
    try:
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url + "/health")
    finally:
        os.kill(forked, signal.SIGKILL)
        os.waitpid(forked, 0)


class SGLangLike(BaseHTTPRequestHandler):
    """SGLang's wire format, as its documentation gives it: lists of ids in, log-prob tuples out."""

    def do_GET(self):
        models = {"data": [{"id": "served", "owned_by": "sglang", "max_model_len": 64}]}
        answers = {"/v1/models": models, "/get_model_info": {"weight_version": "5"}}
        self.answer(answers.get(self.path))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/generate" and body["return_logprob"]
        self.answer(
            [self.one(*pair) for pair in zip(body["input_ids"], body["sampling_params"], strict=True)]
        )

    def one(self, prompt, params):
        ids = [params["sampling_seed"] % 60 + 3, 2]
        drawn = [[-0.25, ids[0], None], [-0.5, ids[1], None]]
        reason = {"type": "abort"} if prompt[-1] == 13 else {"type": "stop", "matched": 2}
        return {"output_ids": ids, "meta_info": {"finish_reason": reason, "output_token_logprobs": drawn}}

    def answer(self, body):
        data = json.dumps(body).encode()
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args): ...


def test_sglangs_own_route_is_spoken(connect):
    http_server = ThreadingHTTPServer(("127.0.0.1", 0), SGLangLike)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    try:
        engine = connect(url=f"http://127.0.0.1:{http_server.server_port}", token="")
        assert engine.update_weights(9) == 5
        good, bad = engine.generate([[1, 5], [1, 13]], SAMPLING, n=2, seed=0)
    finally:
        http_server.shutdown()
        http_server.server_close()
    first = Generation(completion_ids=(3, 2), finish_reason="stop", behavior_logprobs=(-0.25, -0.5))
    assert good == [
        first,
        Generation(completion_ids=(4, 2), finish_reason="stop", behavior_logprobs=(-0.25, -0.5)),
    ]
    assert [one.finish_reason for one in bad] == ["error", "error"]
