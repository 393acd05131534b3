"""What a client gets: objects in the shape of OpenAI's API, and texts that grow without ever taking
back a letter.

    growing = [GrowingText(request, tokenizer, prompt) for prompt in request.prompts]
    new = growing[row].add(ids)                 # what may be shown now, whole letters only
    answer = completion(request, served, growing, job)

Used by serving/server.py; serving/steps.py has what the page is sent.
"""
import secrets
import time

from text.tokenizer import opens_cluster


class GrowingText:
    """One row of a completion: its tokens so far, the text that was handed out, how it ended."""

    def __init__(self, request, tokenizer, prompt):
        self.tokenizer = tokenizer
        self.eos_id = request.settings.eos_id
        self.stops = request.stops
        self.start = prompt if request.echo else ""
        self.ids = []
        self.tokens = 0                   # all that were written, an EOS included
        self.text = self.start
        self.shown = 0                    # characters that were handed out
        self.reason = None                # why it ended; None: it goes on

    def add(self, ids):
        """More final tokens -> the text that can be shown now and could not before."""
        if self.reason:
            return ""
        if self.eos_id in ids:
            ids = ids[:ids.index(self.eos_id)]
            self.tokens += 1
            self.reason = "stop"
        self.ids += ids
        self.tokens += len(ids)
        written = self.tokenizer.written(self.ids)
        places = [written.find(stop) for stop in self.stops if stop in written]
        if places:
            written = written[:min(places)]
            self.reason = "stop"
        self.text = self.start + written
        if self.reason:
            return self.show(len(self.text))
        return self.show(len(self.start) + self.sure(written))

    def sure(self, written):
        """How many characters of a text cannot become part of another letter any more, nor of a
        text at which to stop.
        """
        longest = max(map(len, self.stops), default=0)
        end = max(0, len(written) - max(1, longest - 1))
        while end and not opens_cluster(written, end):
            end -= 1
        return end

    def finish(self):
        """No more tokens come -> the rest of the text."""
        if not self.reason:
            self.reason = "length"
        return self.show(len(self.text))

    def show(self, end):
        new = self.text[self.shown:end]
        self.shown = max(self.shown, end)
        return new


# ---- objects -------------------------------------------------------------------------------------

def envelope(kind, letters, served):
    """What every answer begins with."""
    return {
        "id": f"{letters}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": served.name,
    }


def choice(index, text, reason):
    return {"text": text, "index": index, "logprobs": None, "finish_reason": reason}


def usage(request, tokens):
    return {
        "prompt_tokens": request.prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": request.prompt_tokens + tokens,
    }


def how(request):
    """What is ours: how the text was made, and what to know about the settings."""
    job = request.job
    return {
        "seed": request.seed,
        "mode": request.settings.mode,
        "forwards": job.forwards,
        "seconds": round(job.seconds, 4),
        "notices": request.notices,
    }


def completion(request, served, growing):
    """The answer of /v1/completions in one piece."""
    answer = envelope("text_completion", "cmpl", served)
    answer["choices"] = [
        choice(index, text.text, text.reason) for index, text in enumerate(growing)
    ]
    answer["usage"] = usage(request, sum(text.tokens for text in growing))
    answer["aria"] = how(request)
    return answer


def infilling(request, served, result):
    """The answer of /v1/infill: whole texts, and what stands in each gap."""
    gapped = request.gapped
    answer = envelope("infill", "infl", served)
    answer["choices"] = []
    for index, ids in enumerate(result.rows):
        found = choice(index, gapped.filled(ids), "stop")
        found["gaps"] = gapped.answers(ids)[:-1]
        answer["choices"].append(found)
    answer["usage"] = usage(request, gapped.masked * len(result.rows))
    answer["aria"] = how(request)
    return answer


def transliteration(request, served, records):
    """The answer of /v1/transliterate: the lines, in Devanagari."""
    answer = envelope("transliteration", "trlt", served)
    text = "\n".join(record["text"] for record in records)
    answer["choices"] = [choice(0, text, "stop")]
    answer["usage"] = usage(request, request.job.tokens)
    answer["aria"] = how(request)
    return answer


def listing(served, described):
    """The answer of /v1/models; described: what a client can set, and what it gets without."""
    one = model(served, described)
    return {"object": "list", "data": [one]}


def model(served, described):
    return {
        "id": served.name,
        "object": "model",
        "created": 0,
        "owned_by": "aria",
        "aria": described,
    }
