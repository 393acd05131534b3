"""Sixty-four clients at once against python -m serve, and broken ones among them: every answer is
the one that its request gets alone, the memory stays flat, and nobody waits for a broken client.

    python tests/stress/serve.py                        # five minutes
    python tests/stress/serve.py --seconds 60 --clients 16

Before the load each of 48 different requests is answered alone; then each client sends them in an
order of its own, one behind the other, a third of them as a stream. Meanwhile connections are
killed in the middle of a text, left half open, filled with garbage, and fed a byte at a time.
Printed: requests, wrong answers, refusals for a full queue, latency, tokens/s, memory at the begin,
in the middle and at the end. The last line is a JSON document; the exit code is 1 if an answer was
wrong or a request failed. The server and its clients share the machine, so the figures are for both
together. It serves the starter model, which needs onnxruntime.
"""
import json
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[2] / "benchmarks")]

from harness import ROOT, arguments  # noqa: E402

PROMPTS = ("भारत में आज मौसम", "mai kal bazaar gaya tha", "yaar mujhe", "मुझे एक", "")


def requests():
    """48 bodies: several lengths, modes, numbers of texts."""
    bodies = []
    for seed in range(48):
        body = dict(prompt=PROMPTS[seed % 5], max_tokens=8 + 4 * (seed % 7), seed=seed)
        if seed % 3 == 0:
            body |= dict(block_size=1)
        if seed % 8 == 0:
            body |= dict(n=3)
        if seed % 11 == 0:
            body |= dict(mode="full")
        bodies.append(body)
    return bodies


def ask(port, body, stream=False):
    """-> (status, texts)."""
    connection = HTTPConnection("127.0.0.1", port, timeout=120)
    data = json.dumps(body | dict(stream=stream)).encode()
    connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
    response = connection.getresponse()
    found = response.read().decode()
    connection.close()
    if response.status != 200:
        return response.status, found
    if not stream:
        return 200, [choice["text"] for choice in json.loads(found)["choices"]]
    texts = [""] * body.get("n", 1)
    for event in found.split("\n\n")[:-2]:
        [choice] = json.loads(event.removeprefix("data: "))["choices"]
        texts[choice["index"]] += choice["text"]
    return 200, texts


class Load:
    """The clients, and what they found."""

    def __init__(self, port, end):
        self.port = port
        self.end = end
        self.bodies = requests()
        self.right = [ask(port, body)[1] for body in self.bodies]
        self.latencies = []
        self.wrong = 0
        self.full = 0
        self.failed = []
        self.lock = threading.Lock()

    def client(self, number):
        """Requests in an order of its own, until the end."""
        chance = random.Random(number)
        while time.monotonic() < self.end:
            which = chance.randrange(len(self.bodies))
            started = time.monotonic()
            try:
                status, found = ask(self.port, self.bodies[which], chance.random() < 1 / 3)
            except OSError as error:
                with self.lock:
                    self.failed.append(repr(error))
                continue
            seconds = time.monotonic() - started
            with self.lock:
                if status == 429:
                    self.full += 1
                elif status != 200:
                    self.failed.append(found)
                else:
                    self.latencies.append(seconds)
                    self.wrong += found != self.right[which]
            if status == 429:
                time.sleep(chance.random())

    def rude(self):
        """Clients that nobody wants, one behind the other."""
        address = ("127.0.0.1", self.port)
        data = json.dumps(dict(prompt=PROMPTS[0], max_tokens=400, mode="full")).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
            f"\r\nContent-Length: {len(data)}\r\n\r\n"
        ).encode()
        chance = random.Random(0)
        open_ones = []
        while time.monotonic() < self.end:
            for sent in (b"", head[:40], head + data[:9], chance.randbytes(5000), head + data):
                client = socket.create_connection(address)
                try:
                    client.sendall(sent)
                except OSError:
                    pass
                open_ones.append(client)
            for client in open_ones:        # a byte more for each
                try:
                    client.send(b"x")
                except OSError:
                    pass
            for client in open_ones[:-40]:
                client.close()
            open_ones = open_ones[-40:]
            time.sleep(0.5)
        for client in open_ones:
            client.close()


def metrics(port):
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return {line.split()[0]: float(line.split()[1]) for line in lines if line[0] != "#"}


def main():
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="of the server's model")
    parser.add_argument("--parallel", type=int, default=16, help="texts that are written at once")
    args = parser.parse_args()
    server = subprocess.Popen(
        [sys.executable, "-m", "serve", "--ckpt", str(ROOT / "exports/starter"), "--port", "0",
         "--queue", "72", "--threads", str(args.threads), "--parallel", str(args.parallel),
         "--quiet"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )
    try:
        port = int(server.stdout.readline().split("127.0.0.1:")[1].split("/")[0])
        load = Load(port, 0)
        began = time.monotonic()
        load.end = began + args.seconds
        before = metrics(port)
        threads = [threading.Thread(target=load.client, args=(i,)) for i in range(args.clients)]
        threads.append(threading.Thread(target=load.rude))
        for thread in threads:
            thread.start()
        memory = []
        for share in (0.1, 0.5, 1):
            time.sleep(max(0, began + share * args.seconds - time.monotonic()))
            memory.append(round(metrics(port)["aria_memory_bytes"] / 1e6, 1))
        for thread in threads:
            thread.join()
        after = metrics(port)
    finally:
        server.terminate()
        code = server.wait(30)
    seconds = time.monotonic() - began
    cuts = statistics.quantiles(load.latencies, n=20)
    found = {
        "clients": args.clients,
        "seconds": round(seconds, 1),
        "answers": len(load.latencies),
        "wrong": load.wrong,
        "failed": len(load.failed),
        "queue_full": load.full,
        "p50_s": round(statistics.median(load.latencies), 3),
        "p95_s": round(cuts[-1], 3),
        "tokens_per_s": round((after["aria_tokens_total"] - before["aria_tokens_total"]) / seconds),
        "cancelled": int(after["aria_cancelled_total"]),
        "memory_mb": memory,
        "exit_code": code,
    }
    for text in load.failed[:5]:
        print(text)
    print(json.dumps(found))
    return int(bool(load.wrong or load.failed or code))


if __name__ == "__main__":
    sys.exit(main())
