"""HTTP: who may ask, how a request is read, how answers go out. Standard library only.

    listener = listen(host, port, paths.Client)          # before the model is loaded
    listener.offer(served, worker, metrics, token)
    threading.Thread(target=listener.serve_forever)

serving/paths.py says what there is at each path.

A thread for each connection (http.server), one request for each connection. So the code of a
request is a straight line, and a client that is slow, broken or gone holds up its own thread alone:
it has READ_SECONDS to say what it wants and SEND_SECONDS to take what it gets. The model is
elsewhere (serving/worker.py), so the threads only read, wait and write. No text of a client is
printed or kept.
"""
import contextlib
import errno
import hmac
import io
import ipaddress
import json
import queue
import socket
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from urllib.parse import urlsplit

from common.console import UserError, say
from serving import page
from serving.errors import Refused, wrong
from serving.job import Block, Failed, Step

READ_SECONDS = 10          # for a whole request, however it comes
SEND_SECONDS = 10          # for a part of an answer
POLL_SECONDS = 0.05        # between two looks whether a client is still there
CONNECTIONS = 256          # at once; more are closed
MOST_BYTES = 128 * 1024    # of a body
DRAINED = 4 * 1024 * 1024  # bytes of a refused body that are read, so that its sender hears why
OUR_NAMES = ("localhost", "127.0.0.1", "::1")


class Gone(Exception):
    """The client closed its connection."""


def is_local(host):
    """Does this address let in this machine alone?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host, port, connection):
    """A Listener at this address, whose connections are of this class; a sentence if it cannot be
    had.
    """
    try:
        return Listener(host, port, connection)
    except socket.gaierror:
        raise UserError(f"--host {host}: no such address; 127.0.0.1 is this machine") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"--port {port} is in use: stop what listens there, or give another one, such as "
                f"--port {port % 65535 + 1}"
            ) from None
        if error.errno == errno.EACCES:
            raise UserError(f"--port {port} needs more rights: use one above 1023") from None
        raise UserError(f"--host {host}, --port {port}: {error.strerror}") from None


class Listener(ThreadingHTTPServer):
    """The socket, and what all threads share."""
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, host, port, connection):
        if ":" in host:
            self.address_family = socket.AF_INET6
        self.local = is_local(host)
        self.free = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__((host, port), connection)

    def server_bind(self):
        """Without the look-up of the machine's name that HTTPServer makes."""
        TCPServer.server_bind(self)

    def offer(self, served, worker, metrics, token):
        """What there is to serve; token: what clients have to send, None on this machine alone."""
        self.served = served
        self.worker = worker
        self.metrics = metrics
        self.token = token

    @property
    def url(self):
        host, port = self.server_address[:2]
        if ":" in host:
            host = f"[{host}]"
        return f"http://{host}:{port}/"

    def process_request(self, connection, address):
        """A thread for the connection, unless there are too many."""
        if not self.free.acquire(blocking=False):
            self.shutdown_request(connection)
            return
        super().process_request(connection, address)

    def process_request_thread(self, connection, address):
        try:
            super().process_request_thread(connection, address)
        finally:
            self.free.release()

    def handle_error(self, connection, address):
        """A client that went away is no error of ours; nothing of its request is printed."""
        say("notice: a connection broke")


class UntilDeadline(io.RawIOBase):
    """What a socket receives, until a point in time: a request that comes byte by byte ends, too.
    """

    def __init__(self, connection, seconds):
        self.connection = connection
        self.end = time.monotonic() + seconds

    def readable(self):
        return True

    def readinto(self, buffer):
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


class Connection(BaseHTTPRequestHandler):
    """One request: it is read, checked and answered. Subclasses have route(path) -> a function that
    answers; it may raise a Refused.
    """
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(UntilDeadline(self.connection, READ_SECONDS))
        self.asked = "(none)"               # the path, if it is one of ours: for the log
        self.streaming = False
        self.started = time.monotonic()

    def handle(self):
        self.close_connection = True
        with contextlib.suppress(Gone, ConnectionError, TimeoutError):
            self.handle_one_request()

    def version_string(self):
        return "Aria"

    def log_message(self, format, *args):
        """Nothing of http.server's own log, which quotes the client."""

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def answer(self):
        """Find the path's function and call it; a Refused is an answer, too."""
        try:
            path = self.path.split("?")[0]
            self.check_sender(path)
            self.route(path)()
        except Refused as refused:
            self.refuse(refused)
        finally:
            self.close_connection = True

    # ---- who may ask ---------------------------------------------------------------------------

    def check_sender(self, path):
        """Host and Origin: no page of another site reaches this server through the browser of its
        user. Then the token.
        """
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1:
            raise wrong("one Host is needed")
        host = hosts[0]
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            name = None
        if self.server.local and name not in OUR_NAMES:
            raise Refused(403, "this server answers to localhost only", code="host")
        origin = self.headers.get("Origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise Refused(403, "another site's page may not ask here", code="origin")
        token = self.server.token
        if token and path not in ("/", "/health"):
            sent = self.headers.get("Authorization", "")
            right = f"Bearer {token}"
            if not hmac.compare_digest(sent.encode("utf-8", "replace"), right.encode()):
                raise Refused(401, "send the server's token as API key", code="invalid_api_key")

    def body(self):
        """The JSON of a POST."""
        kind = self.headers.get("Content-Type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, "send JSON, as Content-Type: application/json")
        lengths = self.headers.get_all("Content-Length") or []
        if "Transfer-Encoding" in self.headers or len(lengths) != 1:
            raise Refused(411, "one Content-Length is needed, and no Transfer-Encoding")
        if not (lengths[0].isascii() and lengths[0].isdigit()):
            raise wrong("Content-Length must be a number")
        size = int(lengths[0][:20])
        if size > MOST_BYTES:
            raise Refused(413, f"the body has {size} bytes, {MOST_BYTES} are taken at most")
        data = self.rfile.read(size)
        if len(data) < size:
            raise Gone
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise wrong("the body is not JSON") from None

    # ---- waiting -------------------------------------------------------------------------------

    def events_of(self, job):
        """The events of a job, which is submitted now. It is cancelled if the client goes, or if
        nobody asks for more.
        """
        worker = self.server.worker
        worker.submit(job)
        looked = time.monotonic()
        try:
            ended = False
            while not ended:
                if time.monotonic() - looked > POLL_SECONDS:
                    self.check_client()
                    looked = time.monotonic()
                try:
                    event = job.events.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    continue
                if isinstance(event, Failed):
                    raise event.error
                ended = not isinstance(event, (Block, Step))
                yield event
        finally:
            worker.cancel(job)

    def check_client(self):
        """Gone if the client has closed its side. What else it sends is thrown away: a connection
        is for one request.
        """
        self.connection.settimeout(0)
        try:
            if not self.connection.recv(4096):
                raise Gone
        except BlockingIOError:
            pass
        finally:
            self.connection.settimeout(SEND_SECONDS)

    # ---- sending -------------------------------------------------------------------------------

    def send_head(self, status, kind, length=None, policy=page.NOTHING):
        """The status and the headers of every answer."""
        self.connection.settimeout(SEND_SECONDS)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Content-Security-Policy", policy)
        if status == 429:
            self.send_header("Retry-After", "1")
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        seconds = time.monotonic() - self.started
        self.server.metrics.count("requests", 1, f'{{path="{self.asked}",status="{status}"}}')
        say(f"{self.asked} {int(status)} after {seconds:.2f} s")

    def send(self, status, data, kind, policy=page.NOTHING):
        self.send_head(status, kind, len(data), policy)
        self.wfile.write(data)

    def send_json(self, status, body):
        data = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        self.send(status, data, "application/json")

    def begin_events(self):
        """The head of a stream, once."""
        if not self.streaming:
            self.send_head(200, "text/event-stream; charset=utf-8")
            self.streaming = True

    def send_event(self, body, name=None):
        text = json.dumps(body, ensure_ascii=False)
        if name:
            self.send_part(f"event: {name}\n".encode())
        self.send_part(f"data: {text}\n\n".encode("utf-8", "replace"))

    def send_part(self, data):
        self.wfile.write(data)
        self.wfile.flush()

    def refuse(self, refused):
        """An error, as an answer or as the last event of a stream."""
        if self.streaming:
            self.send_event(refused.body, "error")
            return
        self.send_json(refused.status, refused.body)
        self.drain()

    def send_error(self, code, message=None, explain=None):
        """What http.server could not read, as JSON; nothing of it is sent back."""
        self.send_json(code, Refused(code, HTTPStatus(code).phrase).body)
        self.drain()

    def drain(self):
        """Read what a refused client is still sending, for a moment: a connection that is closed
        before takes the answer away from it.
        """
        self.connection.shutdown(socket.SHUT_WR)
        end = time.monotonic() + 2
        left = DRAINED
        while left > 0 and time.monotonic() < end:
            self.connection.settimeout(max(0.01, end - time.monotonic()))
            data = self.connection.recv(65536)
            if not data:
                break
            left -= len(data)
