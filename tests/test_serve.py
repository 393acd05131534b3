"""The server with real sockets: what clients of OpenAI's API get, who is refused, and that a broken
client harms nobody else.
"""
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from types import SimpleNamespace

import numpy as np
import pytest
from browser import a_page
from conftest import call, only_this_machine

import config
import serve
from common.console import UserError
from common.files import ROOT
from sampling import decode, exported, together
from sampling.settings import Settings
from serving import answers, paths, requests, server, steps, worker
from serving.errors import Refused
from serving.metrics import Metrics
from text.tokenizer import opens_cluster

pytest.importorskip("onnxruntime", reason="the starter model, which the tests serve, is exported")

STARTER = ROOT / "exports/starter"
PROMPT = "भारत में आज मौसम"
SECRET_WORD = "qwertzgeheim"
LONG = dict(prompt=PROMPT, max_tokens=400, mode="full", sampler="random", ignore_eos=True, seed=1)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Instead of conftest's: this machine may be connected to, and nothing else."""
    only_this_machine(monkeypatch)


class Running:
    """python -m serve in a process of its own."""

    def __init__(self, folder, *words):
        self.log = folder / "stderr"
        command = [sys.executable, "-m", "serve", "--ckpt", str(STARTER), "--port", "0"]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*command, "--threads", "1", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=log,
                text=True,
            )
        line = self.process.stdout.readline()
        assert "http://127.0.0.1:" in line, self.log.read_text()
        self.port = int(line.split("127.0.0.1:")[1].split("/")[0])

    def stop(self):
        self.process.terminate()
        self.process.stdout.close()
        return self.process.wait(20)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    found = Running(tmp_path_factory.mktemp("serve"))
    yield found
    assert found.stop() == 0
    log = found.log.read_text()
    assert " 200 after " in log and "Traceback" not in log
    assert SECRET_WORD not in log, "a prompt was printed"


@pytest.fixture(scope="module")
def model():
    """The starter model in this process: (writer, tokenizer, saved)."""
    args = SimpleNamespace(device="auto", threads=1)
    return exported.load(STARTER, args)


def served_of(model, **limits):
    limits = dict(max_length=2048, max_work=10**6) | limits
    return requests.Served("starter", *model, **limits)


def ask(port, method, path, body=None, headers=None, timeout=60):
    """One request -> (status, headers, bytes)."""
    connection = HTTPConnection("127.0.0.1", port, timeout=timeout)
    data = body
    if isinstance(body, dict):
        data = json.dumps(body).encode()
    if data is not None:
        headers = {"Content-Type": "application/json"} | (headers or {})
    connection.request(method, path, data, headers or {})
    response = connection.getresponse()
    found = response.status, response.headers, response.read()
    connection.close()
    return found


def post(port, path, **body):
    status, _, data = ask(port, "POST", path, body)
    return status, json.loads(data)


def complete(port, **body):
    status, answer = post(port, "/v1/completions", **body)
    assert status == 200, answer
    return answer


def events(port, path, **body):
    """The events of a stream: [(name, object)]."""
    status, headers, data = ask(port, "POST", path, body)
    assert status == 200 and headers["Content-Type"].startswith("text/event-stream"), data
    found = []
    for event in data.decode().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in event.splitlines())
        if lines and lines["data"] != "[DONE]":
            found.append((lines.get("event"), json.loads(lines["data"])))
    assert data.endswith(b"data: [DONE]\n\n") == (path != "/steps")
    return found


def metric(port, name):
    _, _, data = ask(port, "GET", "/metrics")
    return float(dict(line.rsplit(" ", 1) for line in data.decode().splitlines())[name])


# ---- the API -------------------------------------------------------------------------------------

def test_the_official_client(running):
    """The package openai as it is: answers, streams, n, stop, seed, the shapes of errors."""
    openai = pytest.importorskip("openai", reason="the official client is not installed here")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key="none")
    [named] = client.models.list().data
    assert client.models.retrieve(named.id).id == named.id == "starter"

    def write(**more):
        return client.completions.create(
            model="starter", prompt=PROMPT, max_tokens=24, **{"seed": 3, **more}
        )
    first = write()
    assert first.choices[0].text == write().choices[0].text != write(seed=4).choices[0].text
    assert first.usage.prompt_tokens == 4 and first.usage.completion_tokens <= 24
    assert write(seed=None).choices[0].finish_reason in ("stop", "length")

    two = write(n=2)
    assert [choice.index for choice in two.choices] == [0, 1]
    assert [choice.text for choice in two.choices] == [
        first.choices[0].text, write(seed=4).choices[0].text
    ]

    streamed = {0: "", 1: ""}
    reasons = {}
    stream = write(n=2, stream=True, stream_options={"include_usage": True})
    for chunk in stream:
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert list(streamed.values()) == [choice.text for choice in two.choices]
    assert list(reasons.values()) == [choice.finish_reason for choice in two.choices]
    assert chunk.usage == two.usage

    word = first.choices[0].text.split()[2]
    cut = write(stop=[word, "never"])
    assert cut.choices[0].text == first.choices[0].text.split(word)[0]
    assert cut.choices[0].finish_reason == "stop"
    assert "".join(c.choices[0].text for c in write(stop=word, stream=True)) == cut.choices[0].text
    assert write(echo=True).choices[0].text == PROMPT + first.choices[0].text

    with pytest.raises(openai.BadRequestError) as error:
        write(temperature=-1)
    assert error.value.param == "temperature" and "at least 0" in error.value.message
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="gpt", prompt="a")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="did you mean block_size"):
        write(extra_body={"blocksize": 8})
    with pytest.raises(openai.BadRequestError, match="logprobs is not supported"):
        write(logprobs=2)


@pytest.mark.parametrize(
    "more",
    [
        {},
        dict(block_size=1),
        dict(mode="block", block_size=8, sampler="confidence", steps=4),
        dict(mode="full", sampler="ancestral", steps=20),
        dict(sampler="speculate"),
        dict(guidance_scale=2.0, block_size=32),
    ],
    ids=str,
)
def test_an_answer_is_what_the_decode_loop_writes(running, model, more):
    """In one piece, as a stream, and by the loop itself."""
    body = dict(prompt=PROMPT, max_tokens=24, temperature=0.9, seed=11, n=2) | more
    answer = complete(running.port, **body)
    texts = [choice["text"] for choice in answer["choices"]]

    request = requests.completion(body, served_of(model))
    writer, tokenizer, _ = model
    result = decode.generate(writer, request.job.prompts, request.settings, [11, 12])
    assert texts == [tokenizer.written(ids) for ids in result.rows]
    assert answer["usage"]["completion_tokens"] == sum(map(len, result.full_rows))

    streamed = ["", ""]
    for _, event in events(running.port, "/v1/completions", stream=True, **body):
        [choice] = event["choices"]
        streamed[choice["index"]] += choice["text"]
    assert streamed == texts


def test_several_prompts_are_written_as_each_alone(running):
    prompts = [PROMPT, "mai kal", ""]
    answer = complete(running.port, prompt=prompts, max_tokens=12, seed=5)
    for number, prompt in enumerate(prompts):
        alone = complete(running.port, prompt=prompt, max_tokens=12, seed=5 + number)
        assert answer["choices"][number]["text"] == alone["choices"][0]["text"]
    assert answer["usage"]["prompt_tokens"] == 4 + 2


def test_gaps_are_filled_and_the_rest_stays(running):
    text = "मैं कल ____ गया था और ____ खाए।"
    status, answer = post(running.port, "/v1/infill", text=text, n=2, seed=1)
    assert status == 200 and len(answer["choices"]) == 2
    before, middle, after = text.split("____")
    for choice in answer["choices"]:
        assert choice["text"] == before + choice["gaps"][0] + middle + choice["gaps"][1] + after
        assert all(choice["gaps"])
    status, answer = post(running.port, "/v1/infill", text="no gap")
    assert (status, answer["error"]["param"]) == (400, "text")
    assert not answer["error"]["message"].count("no gap in it")


@pytest.mark.parametrize(
    "body",
    [
        dict(prompt=PROMPT, max_tokens=70, mode="block_frozen"),
        dict(prompt=PROMPT, max_tokens=20, mode="full"),
        dict(prompt=PROMPT, max_tokens=20, block_size=1, ignore_eos=True),
        dict(text="मैं कल ____ गया था और ________ खाए।"),
    ],
    ids=str,
)
def test_the_steps_add_up_to_the_text(running, body):
    """What the page is sent: masks that become words, each position in exactly one part."""
    (begins, start), *between, (ends, done) = events(running.port, "/steps", seed=2, **body)
    assert (begins, ends) == ("start", "done")
    parts = {part["at"]: part for part in start["parts"]}
    assert any("text" not in part for part in parts.values())
    for name, step in between:
        assert name == "step"
        for new in step["parts"]:
            places = range(new["at"], new["at"] + new["n"])
            old = [p for p in parts if p < places.stop and p + parts[p]["n"] > places.start]
            for place in old:
                del parts[place]
            parts[new["at"]] = new
        ordered = sorted(parts.values(), key=lambda part: part["at"])
        for one, following in zip(ordered, ordered[1:], strict=False):
            assert one["at"] + one["n"] == following["at"], "a position is in two parts or in none"
    assert len(between) >= done["forwards"] > 0
    written = ""
    for part in ordered:
        if part.get("end"):
            break
        written += part["text"]                # a mask before the end would have none
        assert part.get("p", 0) <= 1
        assert not part["text"] or opens_cluster(part["text"], 0)
    text = done["text"]
    assert text == (start.get("prompt", "") + written)
    assert any("p" in part for part in ordered)


def test_a_growing_text_never_takes_back_a_letter(model):
    """Random tokens, bytes of letters among them, in random blocks, with texts to stop at."""
    _, tokenizer, _ = model
    chance = random.Random(0)
    for case in range(300):
        ids = [chance.randrange(4, tokenizer.vocab_size) for _ in range(12)]
        ids += [chance.randrange(4, 260) for _ in range(4)]
        chance.shuffle(ids)
        if case % 3 == 0:
            ids.insert(chance.randrange(len(ids)), tokenizer.eos_id)
        whole = ids[:ids.index(tokenizer.eos_id)] if tokenizer.eos_id in ids else ids
        final = tokenizer.written(whole)
        stops = ()
        if case % 2 and len(final) > 6:
            at = chance.randrange(len(final) - 3)
            stops = (final[at:at + 3], "never")
            final = final[:final.index(stops[0])]
        request = SimpleNamespace(
            settings=Settings(20, 1, eos_id=tokenizer.eos_id), stops=stops, echo=False
        )
        text = answers.GrowingText(request, tokenizer, "")
        pieces = []
        while ids:
            size = chance.randrange(1, 5)
            pieces.append(text.add(ids[:size]))
            ids = ids[size:]
        pieces.append(text.finish())
        assert "".join(pieces) == final == text.text
        shown = ""
        for piece in pieces:
            assert not piece or not shown or opens_cluster(shown + piece, len(shown)), "cut letter"
            shown += piece
        ended = bool(stops) or case % 3 == 0
        assert text.reason == ("stop" if ended else "length")


def test_a_part_waits_for_the_rest_of_its_letter(model):
    """A vowel sign whose letter is still a mask is not shown."""
    _, tokenizer, _ = model
    mask = tokenizer.vocab_size
    sign = next(i for i in range(4, mask) if tokenizer.decode([i]) == "ि")
    request = SimpleNamespace(
        settings=Settings(20, 1, eos_id=tokenizer.eos_id), gapped=None,
        job=SimpleNamespace(prompts=[[2]]),
    )
    shown = steps.Shown(request, tokenizer, mask, framed=False)
    alone = shown.parts_of(1, [mask, sign], [1, 0.5])
    assert alone == [{"at": 1, "n": 1}, {"at": 2, "n": 1, "text": "", "p": 0.5}]
    letter = tokenizer.encode("म")
    both = shown.parts_of(1, [*letter, sign], [0.9] * len(letter) + [0.5])
    assert both == [{"at": 1, "n": len(letter) + 1, "text": tokenizer.decode([*letter, sign]),
                     "p": 0.5}]


@pytest.mark.parametrize(
    "path, body, param",
    [
        ("/v1/completions", dict(prompt=7), "prompt"),
        ("/v1/completions", dict(prompt=[1, 2]), "prompt"),
        ("/v1/completions", dict(prompt=PROMPT, n=17), "n"),
        ("/v1/completions", dict(prompt=PROMPT, n=True), "n"),
        ("/v1/completions", dict(prompt=PROMPT, max_tokens=5000), "max_tokens"),
        ("/v1/completions", dict(prompt=PROMPT, max_tokens=1500, mode="full"), "max_tokens"),
        ("/v1/completions", dict(prompt=PROMPT, max_tokens=0), "max_tokens"),
        ("/v1/completions", dict(prompt=PROMPT, temperature="hot"), "temperature"),
        ("/v1/completions", dict(prompt=PROMPT, top_p=2), "top_p"),
        ("/v1/completions", dict(prompt=PROMPT, stop=""), "stop"),
        ("/v1/completions", dict(prompt=PROMPT, stop=["a"] * 5), "stop"),
        ("/v1/completions", dict(prompt=PROMPT, stream="yes"), "stream"),
        ("/v1/completions", dict(prompt=PROMPT, suffix="b"), "suffix"),
        ("/v1/completions", dict(prompt=PROMPT, mode="frozen"), "mode"),
        ("/v1/completions", dict(prompt=PROMPT, seed=2**63), "seed"),
        ("/v1/completions", dict(prompt=PROMPT, nonsense=1), "nonsense"),
        ("/v1/completions", dict(prompt=PROMPT, mode="full", sampler="speculate"), None),
        ("/v1/completions", dict(prompt=PROMPT, sampler="threshold", remask=0.5), None),
        ("/v1/infill", dict(text=3), "text"),
        ("/v1/infill", dict(text="a ____", max_tokens=3), "max_tokens"),
        ("/v1/infill", dict(text="a " + "____ " * 1200), None),
        ("/v1/transliterate", dict(text="mai kal"), None),      # a model that continues texts
        ("/steps", dict(prompt=["a", "b"]), "prompt"),
        ("/steps", dict(text="a ____", n=2), "n"),
    ],
    ids=str,
)
def test_what_cannot_be_had_is_refused_by_name(running, path, body, param):
    status, answer = post(running.port, path, **body)
    assert status == 400 and answer["error"]["type"] == "invalid_request_error", answer
    assert param is None or answer["error"]["param"] == param, answer


# ---- who may ask ---------------------------------------------------------------------------------

def raw(port, data, timeout=20):
    """Bytes of our own making -> the bytes that come back until the connection ends."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as client:
        client.sendall(data)
        found = b""
        while chunk := client.recv(65536):
            found += chunk
    return found


@pytest.mark.parametrize(
    "method, path, headers, status",
    [
        ("GET", "/health", {"Host": "evil.example"}, 403),
        ("GET", "/health", {"Host": "127.0.0.1.evil.example:80"}, 403),
        ("GET", "/health", {"Host": "LOCALHOST:1"}, 200),
        ("GET", "/health", {"Host": "[::1]"}, 200),
        ("GET", "/health", {"Host": "[oops"}, 403),
        ("GET", "/health", {"Origin": "http://evil.example"}, 403),
        ("GET", "/health", {"Origin": "null"}, 403),
        ("GET", "/health", {"Host": "localhost", "Origin": "http://localhost"}, 200),
        ("POST", "/v1/completions", {"Origin": "http://evil.example"}, 403),
        ("POST", "/v1/completions", {"Content-Type": "text/plain"}, 415),
        ("POST", "/v1/completions", {"Content-Length": "999999999"}, 413),
        ("POST", "/v1/completions", {"Content-Length": "-1"}, 400),
        ("POST", "/health", {}, 405),
        ("GET", "/v1/completions", {}, 405),
        ("GET", "/nothing", {}, 404),
        ("GET", "/page.html", {}, 404),
        ("GET", "/../serve.py", {}, 404),
        ("GET", "//etc/passwd", {}, 404),
        ("GET", "/%2e%2e/config.py", {}, 404),
    ],
    ids=str,
)
def test_who_may_ask_for_what(running, method, path, headers, status):
    lines = {"Host": "127.0.0.1", "Content-Type": "application/json", "Content-Length": "2"}
    head = "".join(f"{name}: {value}\r\n" for name, value in (lines | headers).items())
    answer = raw(running.port, f"{method} {path} HTTP/1.1\r\n{head}\r\n{{}}".encode())
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer
    assert b"Access-Control" not in answer and b"evil" not in answer
    assert answer.split(b"\r\n\r\n")[1].startswith(b"{")


def test_two_hosts_two_lengths_and_chunks_are_refused(running):
    head = b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nHost: localhost\r\n"
    for more, status in (
        (b"Host: localhost\r\nContent-Length: 2\r\n", b"400"),
        (b"Content-Length: 2\r\nContent-Length: 2\r\n", b"411"),
        (b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n", b"411"),
        (b"", b"411"),
    ):
        assert raw(running.port, head + more + b"\r\n{}").split(b" ", 2)[1] == status
    deep = b"[" * 100_000
    asked = head + b"Content-Length: 100000\r\n\r\n" + deep
    assert raw(running.port, asked).split(b" ", 2)[1] == b"400"


def test_the_page_runs_its_own_script_and_nothing_else(running):
    status, headers, data = ask(running.port, "GET", "/")
    parts = headers["Content-Security-Policy"].split(";")
    policy = dict(part.strip().split(" ", 1) for part in parts)
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert all(policy[name].startswith("'sha256-") for name in ("script-src", "style-src"))
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    text = data.decode()
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text and "style=" not in text and " on" + "click" not in text


def test_a_token_is_needed_where_there_is_one(tmp_path):
    secret = tmp_path / "token"
    secret.write_text("correct horse battery\nmore\n")
    running = Running(tmp_path, "--token_file", str(secret))
    try:
        for sent, status in (
            ({}, 401),
            ({"Authorization": "Bearer wrong"}, 401),
            ({"Authorization": "Bearer correct horse battery"}, 200),
        ):
            assert ask(running.port, "GET", "/v1/models", headers=sent)[0] == status
        assert ask(running.port, "GET", "/metrics")[0] == 401
        assert ask(running.port, "GET", "/")[0] == 200          # the page asks for the token
        assert ask(running.port, "GET", "/health")[0] == 200
    finally:
        assert running.stop() == 0
    assert "correct horse" not in running.log.read_text()


# ---- the page ------------------------------------------------------------------------------------

@pytest.fixture
def browser_page(running):
    """The page in a real Chromium; it may say nothing to the console and ask for nothing outside.
    """
    home = f"http://127.0.0.1:{running.port}/"
    with a_page(locale="en-GB") as (page, trouble):
        page.on(
            "request", lambda request: request.url.startswith((home, "data:"))
            or trouble.append(request.url)
        )
        page.goto(home)
        page.wait_for_selector("#model:not(:empty)")
        yield page
    assert not [line for line in trouble if "400 (Bad Request)" not in line]


def finished(page):
    page.wait_for_selector("#copy:enabled")
    wait_until(lambda: page.evaluate("!drawing"))


def test_the_page_writes_replays_and_fills_gaps(browser_page, running):
    page = browser_page
    # type, and write by keyboard
    page.fill("#prompt", PROMPT)
    page.fill("#seed", "4")
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    finished(page)
    settings = dict(mode="block_frozen", block_size=64, sampler="threshold", threshold=0.9)
    right = complete(running.port, prompt=PROMPT, seed=4, max_tokens=127, **settings)
    text = PROMPT + right["choices"][0]["text"]
    shown = page.inner_text("#out").split("■")[0].rstrip()
    assert shown == text
    assert page.evaluate("run.text") == text
    assert f"{right['aria']['forwards']} forwards" in page.inner_text("#numbers")
    assert page.locator("#out .mask").count() == 0 < page.locator("#out .c4").count()

    # the time slider, by keyboard
    last = int(page.get_attribute("#time", "max"))
    page.focus("#time")
    page.keyboard.press("Home")
    wait_until(lambda: page.evaluate("!drawing"))
    assert page.inner_text("#when") == f"0 / {last}"
    assert page.locator("#out .mask").count() == 64
    page.keyboard.press("ArrowRight")
    masks = page.locator("#out .mask").count()
    assert masks < 64 and masks + page.evaluate("run.numbers[1].tokens") == 64

    # gaps; Hindi; a link that gives the same again
    page.fill("#prompt", "मैं कल ____ गया था और ____ खाए।")
    page.click("#language")
    assert page.inner_text("#write") == "लिखो" and page.get_attribute("html", "lang") == "hi"
    assert page.is_disabled("#threshold") and page.is_disabled("#length")
    page.click("#write")
    finished(page)
    _, filled = post(running.port, "/v1/infill", text="मैं कल ____ गया था और ____ खाए।", seed=4)
    assert page.evaluate("run.text") == filled["choices"][0]["text"] == page.inner_text("#out")
    page.click("#share")
    link = page.url
    assert "seed=4" in link and "#text=" in link
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_selector("#model:not(:empty)")
    page.click("#write")
    finished(page)
    assert page.evaluate("run.text") == filled["choices"][0]["text"]

    # a phone, in the dark
    page.set_viewport_size({"width": 390, "height": 800})
    page.emulate_media(color_scheme="dark")
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(wide) == 0


def test_the_page_stops_and_shows_errors(browser_page, running):
    page = browser_page
    before = metric(running.port, "aria_cancelled_total")
    # 512 forwards, whatever this machine's rounding makes of the text
    page.route("**/steps", lambda route: route.continue_(
        post_data=json.dumps(route.request.post_data_json | {"ignore_eos": True})
    ))
    page.evaluate("at('length').value = at('steps').max = at('steps').value = 512; showValues()")
    page.check("[value=full]")
    page.fill("#prompt", "<img src=x onerror=alert(1)> " + PROMPT)
    page.click("#write")
    try:
        # the server moves in glimpses: a busy machine would press the key after the last forward
        while page.evaluate("run.shots.length") < 4:
            running.process.send_signal(signal.SIGCONT)
            time.sleep(0.01)
            running.process.send_signal(signal.SIGSTOP)
        page.keyboard.press("Escape")
        finished(page)
        assert page.inner_text("#told") == "stopped"
    finally:
        running.process.send_signal(signal.SIGCONT)
    wait_until(lambda: metric(running.port, "aria_cancelled_total") == before + 1)
    page.unroute("**/steps")
    assert page.locator("#out img").count() == 0
    assert page.locator("#out .mask").count() > 0

    page.evaluate("at('length').value = 1024; at('steps').value = 0; showValues()")
    page.click("#write")
    page.wait_for_selector("#error:not(:empty)")
    assert "positions in the network" in page.inner_text("#error")
    assert page.is_enabled("#write")


# ---- broken clients ------------------------------------------------------------------------------

def head_of(body):
    data = json.dumps(body).encode()
    return (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    ).encode(), data


def wait_until(holds, seconds=20):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)


def test_a_client_that_goes_away_costs_no_more_forwards(running):
    """The model stops within a forward or two of the end of the connection, not 400 later."""
    before = metric(running.port, "aria_cancelled_total")
    forwards = metric(running.port, "aria_forwards_total")
    client = socket.create_connection(("127.0.0.1", running.port))
    client.sendall(b"".join(head_of(LONG | dict(prompt=SECRET_WORD))))
    wait_until(lambda: metric(running.port, "aria_busy") == 1)
    client.close()
    started = time.monotonic()
    wait_until(lambda: metric(running.port, "aria_cancelled_total") == before + 1)
    assert time.monotonic() - started < 2
    assert metric(running.port, "aria_forwards_total") - forwards < 350
    assert metric(running.port, "aria_busy") == 0


def test_others_go_on_beside_broken_clients(running):
    """Killed, half open, garbage, and one that sends a byte now and then: the rest is answered as
    ever.
    """
    right = complete(running.port, prompt=PROMPT, max_tokens=16, seed=9)["choices"]
    address = ("127.0.0.1", running.port)
    head, data = head_of(LONG)
    silent = [socket.create_connection(address) for _ in range(20)]
    loris = socket.create_connection(address)
    half = socket.create_connection(address)
    half.sendall(head + data[:5])
    for seed in range(10):
        killed = socket.create_connection(address)
        killed.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")     # a reset
        killed.sendall(b"".join(head_of(LONG | dict(stream=True, seed=seed))))
        killed.close()
        loris.sendall(head[seed:seed + 1])
        garbage = random.Random(seed).randbytes(3000)
        answer = raw(running.port, garbage + b"\r\n\r\n")
        assert not answer or b" 400 " in answer or b" 414 " in answer or b" 50" in answer, answer
        found = complete(running.port, prompt=PROMPT, max_tokens=16, seed=9)["choices"]
        assert found == right
    for client in (*silent, loris, half):
        client.close()
    assert running.process.poll() is None


def test_a_request_has_an_end_however_slowly_it_comes():
    """A byte at a time is no way to keep a thread for ever."""
    ours, theirs = socket.socketpair()
    reader = server.UntilDeadline(ours, 0.3)
    stop = threading.Event()

    def drip():
        while not stop.wait(0.05):
            theirs.send(b"x")
    thread = threading.Thread(target=drip)
    thread.start()
    started = time.monotonic()
    buffer = bytearray(10)
    with pytest.raises(TimeoutError):
        while True:
            reader.readinto(buffer)
    stop.set()
    thread.join()
    assert 0.25 < time.monotonic() - started < 2
    ours.close()
    theirs.close()


# ---- the queue -----------------------------------------------------------------------------------

@pytest.fixture
def here(model):
    """A server in this process whose model begins when `begin` is called: (port, worker, begin)."""
    metrics = Metrics()
    served = served_of(model)
    owner = worker.Worker(served.model, 3, 16, metrics)
    listener = server.listen("127.0.0.1", 0, paths.Client)
    listener.offer(served, owner, metrics, None)
    threads = [threading.Thread(target=listener.serve_forever), threading.Thread(target=owner.run)]
    threads[0].start()
    yield listener.server_address[1], owner, threads[1].start
    owner.close()
    listener.shutdown()
    listener.server_close()
    for thread in threads:
        if thread.ident:
            thread.join(20)


def test_a_full_queue_is_a_429_and_nothing_is_lost(here):
    port, owner, begin = here
    with ThreadPoolExecutor(8) as pool:
        body = dict(prompt=PROMPT, max_tokens=4, block_size=1)
        waiting = [pool.submit(complete, port, seed=seed, **body) for seed in range(3)]
        wait_until(lambda: len(owner.waiting) == 3)
        status, headers, data = ask(port, "POST", "/v1/completions", dict(prompt="a"))
        assert status == 429 and headers["Retry-After"] == "1"
        assert json.loads(data)["error"]["type"] == "rate_limit_error"

        # one that waits and goes away leaves its place
        leaver = socket.create_connection(("127.0.0.1", port))
        owner.most_waiting = 4
        leaver.sendall(b"".join(head_of(dict(prompt="a"))))
        wait_until(lambda: len(owner.waiting) == 4)
        leaver.close()
        wait_until(lambda: len(owner.waiting) == 3)
        begin()
        texts = [future.result()["choices"][0]["text"] for future in waiting]
        alone = [complete(port, seed=seed, **body)["choices"][0]["text"] for seed in range(3)]
    assert texts == alone


def test_requests_that_wait_are_written_together_as_each_alone(here):
    """One batch, of at most 16 rows, whose texts are the same. Greedy, too, where a tie would show.
    """
    port, owner, begin = here
    owner.most_waiting = 64
    bodies = [dict(prompt=PROMPT, max_tokens=40, seed=seed, n=1 + seed % 3) for seed in range(12)]
    bodies += [dict(prompt="मुझे एक", max_tokens=40, seed=seed) for seed in range(2)]
    bodies.append(dict(prompt=PROMPT, max_tokens=40, temperature=0))
    bodies.append(dict(prompt=PROMPT, stop="ा", seed=5))
    with ThreadPoolExecutor(len(bodies)) as pool:
        waiting = [pool.submit(complete, port, **body) for body in bodies]
        wait_until(lambda: len(owner.waiting) == len(bodies))
        begin()
        together = [future.result() for future in waiting]
    forwards = owner.metrics.counts["forwards", ""]
    alone = [complete(port, **body) for body in bodies]
    for one, other in zip(together, alone, strict=True):
        assert one["choices"] == other["choices"] and one["usage"] == other["usage"]
    ends_by_itself = slice(0, 15)
    assert [answer["aria"]["forwards"] for answer in together[ends_by_itself]] == [
        answer["aria"]["forwards"] for answer in alone[ends_by_itself]
    ]
    assert forwards < 0.5 * (owner.metrics.counts["forwards", ""] - forwards), "no batch was made"


def test_who_leaves_a_batch_holds_up_nobody(model):
    """One of three goes away after six tokens; the others are what they are alone."""
    bodies = [dict(prompt=PROMPT, max_tokens=60, seed=seed, ignore_eos=True) for seed in range(3)]

    def jobs():
        return [requests.completion(body, served_of(model)).job for body in bodies]
    alone = [job.write(model[0]).rows for job in jobs()]

    owner = worker.Worker(model[0], 3, 16, Metrics())
    together = jobs()
    for job in together:
        assert owner.shares(job)
        owner.take_in(job)
    for _ in range(5):
        owner.one_token_each()
    owner.cancel(together[1])
    while owner.batch.texts:
        owner.one_token_each()
    ends = [last_event(job) for job in together]
    assert [ends[0].result.rows, ends[2].result.rows] == [alone[0], alone[2]]
    assert ends[1].error.status == 503 and owner.metrics.counts["cancelled", ""] == 1
    assert [job.forwards for job in together] == [60, 6, 60]
    assert owner.metrics.counts["forwards", ""] == 3 + 59


def last_event(job):
    """What the client gets at the end."""
    event = None
    while not job.events.empty():
        event = job.events.get()
    return event


def test_who_cannot_share_lets_nobody_past(model):
    """The queue keeps its order: behind a text in blocks, those from left to right wait."""
    owner = worker.Worker(model[0], 9, 16, Metrics())
    bodies = [dict(seed=1), dict(seed=2, n=2), dict(sampler="threshold"), dict(seed=3)]
    jobs = [
        requests.completion(dict(prompt=PROMPT, max_tokens=8) | body, served_of(model)).job
        for body in bodies
    ]
    for job in jobs:
        owner.submit(job)
    assert [owner.shares(job) for job in jobs] == [True, True, False, True]
    owner.write_together(owner.next_job())
    assert [job.events.empty() for job in jobs] == [False, False, True, True]
    assert list(owner.waiting) == jobs[2:]


def test_whoever_waits_is_told_that_the_server_stops(here):
    port, owner, _ = here
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post, port, "/v1/completions", prompt="a")
        wait_until(lambda: owner.waiting)
        owner.close()
        status, answer = waiting.result()
    assert status == 503 and answer["error"]["type"] == "server_error"
    assert post(port, "/v1/completions", prompt="a")[0] == 503


@pytest.mark.parametrize("block", [1, 32])
def test_a_failure_of_the_model_is_one_clients_answer(here, monkeypatch, capsys, block):
    """Written beside others, and alone."""
    port, owner, begin = here
    begin()
    whole = decode.begin

    def fails(model, group, prompts, settings, seeds, *rest):
        if seeds == [1]:
            raise ValueError(SECRET_WORD)
        if seeds == [2]:
            raise UserError("--guidance_scale 9 is too large")
        return whole(model, group, prompts, settings, seeds, *rest)
    monkeypatch.setattr(decode, "begin", fails)
    body = dict(prompt="a", block_size=block)
    status, answer = post(port, "/v1/completions", seed=1, **body)
    assert status == 500 and SECRET_WORD not in json.dumps(answer)
    status, answer = post(port, "/v1/completions", seed=2, stream=True, **body)
    assert status == 400 and answer["error"]["message"] == "guidance_scale 9 is too large"
    assert post(port, "/v1/completions", seed=3, max_tokens=2, **body)[0] == 200
    assert SECRET_WORD not in capsys.readouterr().err


def test_damage_ends_one_of_those_that_are_written_together(here, monkeypatch):
    """One text's logits are no numbers at its fifth token: the others are what they are alone."""
    port, owner, begin = here
    bodies = [
        dict(prompt=PROMPT, max_tokens=12, seed=seed, temperature=0.9, top_k=40 + seed)
        for seed in range(3)
    ]
    choose = together.Text.choose

    def damaged(text, logits):
        if text.settings.top_k == 41 and text.canvas.forwards[0] == 4:
            logits = logits * np.nan
        choose(text, logits)
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(post, port, "/v1/completions", **body) for body in bodies]
        wait_until(lambda: len(owner.waiting) == 3)
        monkeypatch.setattr(together.Text, "choose", damaged)
        begin()
        answers = [future.result() for future in answers]
    monkeypatch.undo()
    assert answers[1][0] == 400 and "NaN" in answers[1][1]["error"]["message"]
    for number in (0, 2):
        alone = complete(port, **bodies[number])
        assert answers[number][1]["choices"] == alone["choices"]
    assert not owner.batch.texts


def test_clients_at_once_get_what_each_gets_alone(running):
    """Sixteen at once, of different lengths and settings. tests/stress/serve.py has more of them,
    for longer.
    """
    bodies = []
    for seed in range(16):
        body = dict(prompt=PROMPT[:4 + seed], max_tokens=8 + seed % 5, seed=seed, block_size=1)
        if seed % 4 == 0:
            body |= dict(block_size=32, n=2)
        bodies.append(body)
    alone = [complete(running.port, **body)["choices"] for body in bodies]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda body: complete(running.port, **body)["choices"], bodies))
    assert together == alone


# ---- usage errors --------------------------------------------------------------------------------

def test_usage_errors_are_one_sentence(tmp_path, running, capsys):
    short = tmp_path / "short"
    short.write_text("123\n")
    for words, said in (
        (["--port", running.port], f"--port {running.port} is in use: stop what listens there"),
        (["--host", "0.0.0.0", "--port", 0], "lets other machines in: add --token_file"),
        (["--host", "0.0.0.0", "--token_file", short], "at least 16 characters"),
        (["--token_file", tmp_path / "none"], "cannot be read"),
        (["--ckpt", tmp_path / "none", "--port", 0], "there is no checkpoint"),
    ):
        if "--ckpt" not in words:
            words = ["--ckpt", STARTER, *words]
        assert call(serve.main, *words) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and said in error


def test_a_model_that_reads_left_to_right_fills_no_gaps(model):
    writer, tokenizer, saved = model
    cfg = SimpleNamespace(causal=True, framed=False, interlaced=False, model="primary")
    causal = SimpleNamespace(cfg=cfg)
    served = served_of((causal, tokenizer, saved))
    with pytest.raises(Refused, match="fills no gaps"):
        requests.infill(dict(text="a ____"), served)
    assert config.COMMANDS["serve"] is config.ServeArgs
