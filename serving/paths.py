"""What there is at each path of the server.

    GET  /                  the page
    GET  /health, /metrics  is it there; counts for Prometheus
    GET  /v1/models         what is served, and what it can do
    POST /v1/completions    a prompt is continued, in one answer or as a stream
    POST /v1/infill         the gaps of a text are filled
    POST /v1/transliterate  what is typed in Latin letters, in Devanagari
    POST /steps             one text, every forward of it, for the page

Used by serve.py. The fields of the bodies are in serving/requests.py, the answers in
serving/answers.py and serving/steps.py.
"""
from urllib.parse import quote

from serving import answers, page, requests
from serving.errors import Refused
from serving.job import Block, Step
from serving.server import Connection
from serving.steps import Shown


class Client(Connection):
    """A connection whose request is answered."""

    def route(self, path):
        """The function for this path and method."""
        served = self.server.served
        model_path = f"/v1/models/{quote(served.name, safe='')}"
        routes = {
            "/": {"GET": self.get_page},
            "/health": {"GET": self.get_health},
            "/metrics": {"GET": self.get_metrics},
            "/v1/models": {"GET": self.get_models},
            model_path: {"GET": self.get_model},
            "/v1/completions": {"POST": self.post_completion},
            "/v1/infill": {"POST": self.post_infill},
            "/v1/transliterate": {"POST": self.post_transliterate},
            "/steps": {"POST": self.post_steps},
        }
        if path not in routes:
            raise Refused(404, "there is nothing at this path", code="not_found")
        self.asked = path
        functions = routes[path]
        if self.command not in functions:
            raise Refused(405, f"use {', '.join(functions)} here")
        return functions[self.command]

    def get_page(self):
        self.send(200, page.PAGE, "text/html; charset=utf-8", page.POLICY)

    def get_health(self):
        self.send_json(200, {"status": "ok", "model": self.server.served.name})

    def get_metrics(self):
        worker = self.server.worker
        text = self.server.metrics.text(len(worker.waiting), worker.busy)
        self.send(200, text.encode(), "text/plain; version=0.0.4")

    def get_models(self):
        served = self.server.served
        self.send_json(200, answers.listing(served, requests.described(served)))

    def get_model(self):
        served = self.server.served
        self.send_json(200, answers.model(served, requests.described(served)))

    def post_infill(self):
        request = requests.infill(self.body(), self.server.served)
        for event in self.events_of(request.job):
            last = event
        self.send_json(200, answers.infilling(request, self.server.served, last.result))

    def post_transliterate(self):
        served = self.server.served
        request = requests.transliteration(self.body(), served)
        for event in self.events_of(request.job):
            last = event
        self.send_json(200, answers.transliteration(request, served, last.result))

    def post_completion(self):
        served = self.server.served
        request = requests.completion(self.body(), served)
        growing = [
            answers.GrowingText(request, served.tokenizer, prompt) for prompt in request.prompts
        ]
        if request.stream:
            self.stream(request, growing)
            return
        for event in self.events_of(request.job):
            if isinstance(event, Block):
                growing[event.row].add(event.ids)
                if all(text.reason for text in growing):
                    break
        for text in growing:
            text.finish()
        self.send_json(200, answers.completion(request, served, growing))

    def stream(self, request, growing):
        """An event for each block that is final, and one for the end of each text."""
        served = self.server.served
        envelope = answers.envelope("text_completion", "cmpl", served)

        def send(index, text, reason):
            self.send_event(envelope | {"choices": [answers.choice(index, text, reason)]})

        for event in self.events_of(request.job):
            self.begin_events()
            if not isinstance(event, Block) or growing[event.row].reason:
                continue
            new = growing[event.row].add(event.ids)
            reason = growing[event.row].reason
            if new or reason:
                send(event.row, new, reason)
            if all(text.reason for text in growing):
                break
        for index, text in enumerate(growing):
            if not text.reason:
                rest = text.finish()
                send(index, rest, text.reason)
        if request.include_usage:
            tokens = sum(text.tokens for text in growing)
            self.send_event(
                envelope | {"choices": [], "usage": answers.usage(request, tokens)}
            )
        self.send_part(b"data: [DONE]\n\n")

    def post_steps(self):
        """Every forward, for the page."""
        served = self.server.served
        request = requests.watched(self.body(), served)
        shown = Shown(request, served.tokenizer, served.model.cfg.mask_id, served.framed)
        for event in self.events_of(request.job):
            if not self.streaming:
                self.begin_events()
                self.send_event(shown.start(), "start")
            if isinstance(event, Step):
                self.send_event(shown.step(event), "step")
        self.send_event(shown.end(event.result), "done")
