"""What the service defends itself against: a test for each."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import psutil
import pytest
from services import Service, httpx, service

from llama.server.connections import Connection
from llama.server.limits import STALL_SECONDS

# In the place of 10 seconds and more, and of 64 MiB.
LIMITS = {"HEAD_SECONDS": 1, "BODY_SECONDS": 1, "STALL_SECONDS": 2, "BODIES_BYTES": 7 << 20}
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def served() -> Iterator[Service]:
    with service(limits=LIMITS) as running:
        yield running


def connect(running: Service, data: str = "") -> socket.socket:
    one = socket.create_connection(("127.0.0.1", running.port), timeout=20)
    one.sendall(data.encode())
    return one


def answer_of(one: socket.socket) -> str:
    """All that comes until the other side ends it."""
    parts = []
    try:
        while part := one.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts).decode(errors="replace")


def memory(running: Service) -> int:
    return psutil.Process(running.process.pid).memory_info().rss


def test_a_body_that_says_it_is_too_large_is_not_read(served: Service) -> None:
    with connect(served, f"{HEAD}Content-Length: {1 << 40}\r\n\r\n") as one:
        answer = answer_of(one)
    assert answer.startswith("HTTP/1.1 413 ") and "more than 4194304 bytes" in answer


def test_a_body_that_does_not_say_so_is_read_up_to_the_limit(served: Service) -> None:
    before = memory(served)
    sent = 0
    with connect(served, f"{HEAD}Transfer-Encoding: chunked\r\n\r\n") as one:
        part = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        try:
            for _ in range(4000):
                one.sendall(part)
                sent += 0x10000
        except OSError:
            pass
    assert sent < 100e6, "262 MB would have been taken"
    assert memory(served) - before < 60e6
    assert served.complete("Mia")


def test_bodies_that_are_read_at_once_have_one_limit(served: Service) -> None:
    """What a client sends more is not kept; who is done makes room."""
    size = 4_000_000
    with connect(served, f"{HEAD}Content-Length: {size + 1}\r\n\r\n{' ' * size}"):
        time.sleep(0.3)  # until it is read; after a second it is given up
        answer = served.post("completions", b" " * size)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert "too many bodies" in answer.text
    assert served.post("completions", b" " * size).status_code == 400


@pytest.mark.parametrize("size", [5_000_000, 30_000_000])
def test_a_client_that_sends_too_much_is_told_so(served: Service, size: int) -> None:
    """It looks for an answer when it has sent all."""
    answer = served.post("completions", b" " * size)
    assert answer.status_code == 413 and "more than 4194304 bytes" in answer.json()["error"]["message"]


def test_a_head_that_is_too_large(served: Service) -> None:
    with connect(served, f"{HEAD}X: {'a' * 40_000}\r\n") as one:
        assert answer_of(one).startswith("HTTP/1.1 400 ")


def test_a_head_that_does_not_come(served: Service) -> None:
    """Not even a line a second keeps it open."""
    begun = time.monotonic()
    with connect(served, HEAD) as slow, connect(served) as silent:
        try:
            while time.monotonic() < begun + 10:
                slow.sendall(b"X: y\r\n")
                time.sleep(0.3)
        except OSError:
            pass
        assert answer_of(silent) == ""
    assert time.monotonic() - begun < 8


def test_a_body_that_does_not_come(served: Service) -> None:
    with connect(served, f"{HEAD}Content-Length: 1000\r\n\r\n{{") as one:
        assert answer_of(one).startswith("HTTP/1.1 408 ")


def test_a_stream_that_nobody_reads(served: Service) -> None:
    """It is dropped with its requests; until then it holds no more than its completion."""
    before, made = memory(served), served.metric("completion_tokens_total")
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "stream": True, "min_gen_len": 1600, "n": 8,
                       "max_tokens": 1600, "temperature": 1, "logprobs": True, "top_logprobs": 20})  # fmt: skip
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect(("127.0.0.1", served.port))
        one.sendall(f"{HEAD.replace('comp', 'chat/comp')}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        served.wait_for("requests_running", 8)
        served.wait_for("requests_running", 0, seconds=30)
        assert served.metric("completion_tokens_total") - made < 12_800, "they ran to their ends"
        assert memory(served) - before < 150e6


class Transport:
    """What `Connection` asks of a connection that is written to: so many bytes wait for its reader."""

    waits = 0

    def get_write_buffer_size(self) -> int:
        return self.waits

    def is_closing(self) -> bool:
        return True


def test_a_slow_reader_is_no_stalled_one(monkeypatch: pytest.MonkeyPatch) -> None:
    one = object.__new__(Connection)
    one.transport = Transport()
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for one.transport.waits in (9000, 8000, 7000, 6000):
        assert one.look() == STALL_SECONDS
        now += STALL_SECONDS - 1
    assert one.look() == 1
    now += 2
    assert one.look() == -1, "nothing was taken"


@pytest.mark.parametrize("path", [
    "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/models/../../../etc/passwd", "/v1//completions",
    "/v1/models/%00", "//etc/passwd", "/page.html", "/llama/server/app.py", "/v1/completions/",
])  # fmt: skip
def test_no_path_leads_elsewhere(served: Service, path: str) -> None:
    with connect(served, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n") as one:
        answer = answer_of(one)
    assert answer.startswith("HTTP/1.1 404 ") and "root:" not in answer


def test_a_thousand_connections_do_not_keep_others_out() -> None:
    """Neither those whose head does not come nor those whose body does not."""
    with service("--max_seq_len", "128") as running, ExitStack() as stack:
        for number in range(1000):
            data = "GET /" if number < 400 else f"{HEAD}Content-Length: 1000\r\n\r\n{{"
            stack.enter_context(connect(running, data))
        for _ in range(3):
            with httpx.Client(base_url=running.url, timeout=30) as client:
                body = {"prompt": "Mia", "max_tokens": 3}
                assert client.post("/v1/completions", json=body).status_code == 200
        process = psutil.Process(running.process.pid)
        assert len([one for one in process.net_connections("tcp") if one.status == "ESTABLISHED"]) <= 512


KEY = "right-key"


@pytest.fixture(scope="module")
def locked() -> Iterator[Service]:
    flags = ["--max_seq_len", "128", "--max_prompt_tokens", "20", "--max_completion_tokens", "10"]
    with service("--host", "0.0.0.0", *flags, LLAMA_API_KEY=KEY) as running:
        yield running


@pytest.mark.parametrize("given", [
    None, "", "Bearer", "Bearer wrong", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY,
    "Bearer schlüssel",
])  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/nowhere", "/v1/chat/completions"])
def test_without_the_key_nothing_is_said(locked: Service, given: str | None, path: str) -> None:
    headers = {} if given is None else {"Authorization": given.encode()}
    answer = httpx.get(f"http://127.0.0.1:{locked.port}{path}", headers=headers)
    assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert KEY not in answer.text


def test_a_request_keeps_to_the_limits_of_the_options(locked: Service) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = locked.post("completions", {"prompt": "dog " * 20}, headers=headers)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    answer = locked.post("completions", {"prompt": "dog", "max_tokens": 11}, headers=headers)
    assert answer.status_code == 400 and "max_tokens=11 is more than the 10 tokens" in answer.text
    answer = locked.post("completions", {"prompt": "dog", "min_gen_len": 10}, headers=headers).json()
    assert answer["usage"]["completion_tokens"] == 10 and answer["choices"][0]["finish_reason"] == "length"


def test_with_the_key_it_answers_by_any_name(locked: Service) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Host": "my.service.example"}
    assert httpx.get(f"http://127.0.0.1:{locked.port}/v1/models", headers=headers).status_code == 200
    assert httpx.get(f"http://127.0.0.1:{locked.port}/health").status_code == 200
    headers["Host"] = "[odd"
    assert httpx.get(f"http://127.0.0.1:{locked.port}/nowhere", headers=headers).status_code == 404
    assert KEY not in locked.log.read_text()


@pytest.mark.parametrize(("host", "status"), [
    ("localhost", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("LOCALHOST:1", 200), ("192.168.1.7", 200),
    ("evil.example", 403), ("localhost.evil.example", 403), ("127.0.0.1.evil.example:80", 403), ("", 403),
    ("localhost@evil.example", 403), ("evil.example/localhost", 403), ("0x7f.1", 403),
])  # fmt: skip
def test_a_name_that_others_make_lead_here_is_refused(served: Service, host: str, status: int) -> None:
    """DNS rebinding: a page's own name becomes this machine's address."""
    assert served.http.get("/v1/models", headers={"Host": host}).status_code == status


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost", "http://127.0.0.1:1", ""])
def test_a_page_from_elsewhere_is_refused(served: Service, origin: str) -> None:
    answer = served.post("completions", {"prompt": "a"}, headers={"Origin": origin, "Content-Type": "text/plain"})
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(("path", "site", "status"), [
    ("/v1/models", "cross-site", 403), ("/metrics", "same-site", 403), ("/health", "cross-site", 403),
    ("/v1/models", "same-origin", 200), ("/v1/models", "none", 200), ("/", "cross-site", 200),
])  # fmt: skip
def test_what_a_page_asks_without_an_origin(served: Service, path: str, site: str, status: int) -> None:
    """As an image's address, say; a link may lead to the page."""
    answer = served.http.get(path, headers={"Sec-Fetch-Site": site})
    assert answer.status_code == status
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"


def test_the_services_own_page_is_not(served: Service) -> None:
    answer = served.post("completions", {"prompt": "a", "max_tokens": 1}, headers={"Origin": served.url})
    assert answer.status_code == 200
