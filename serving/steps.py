"""What the page is sent of a text that is being written: after each forward the parts of the block
that have changed, as words with their confidence.

    shown = Shown(request, tokenizer, mask_id, framed)
    start = shown.start()                       # all positions as they are at the beginning
    change = shown.step(event)                  # a job.Step

A part is a word (or a piece of one between gaps), so that no letter is ever drawn in two colours:
that would break Devanagari. It is {"at": first position, "n": positions, "text": ..., "p": the
least confidence of its tokens}; without "p" it was given, without "text" it is a mask, with "end"
the text ends here. A new part replaces all parts that lie in its positions.
"""
from text.tokenizer import opens_cluster


class Shown:
    """The parts that the page has, so that only changes are sent."""

    def __init__(self, request, tokenizer, mask_id, framed):
        self.request = request
        self.framed = framed                    # a model of pairs: the text is an answer
        self.tokenizer = tokenizer
        self.mask_id = mask_id
        self.eos_id = request.settings.eos_id
        ids = request.job.prompts[0]
        self.written = set()                    # positions of a text with gaps that are the model's
        if request.gapped:
            self.written = {at for at, token in enumerate(ids) if token == mask_id}
        self.block = None
        self.parts = []

    def start(self):
        """The beginning, for the page."""
        job = self.request.job
        ids = job.prompts[0]
        found = {
            "first": len(ids),
            "length": self.request.settings.max_new_tokens,
            "notices": self.request.notices,
            "seed": self.request.seed,
        }
        if self.request.gapped:
            found["first"] = 1
            found["length"] = len(ids) - 1
            self.block = (1, len(ids))
            self.parts = self.parts_of(1, ids[1:], [1.0] * (len(ids) - 1))
        else:
            found["prompt"] = self.request.prompts[0]
            if self.framed:
                found["prompt"] += "\n"         # an answer is no part of its prompt
            end = len(ids) + self.request.block
            self.block = (len(ids), end)
            self.parts = [{"at": at, "n": 1} for at in range(len(ids), end)]
        found["parts"] = self.parts
        return found

    def step(self, step):
        """The parts that this forward has changed."""
        lo = max(1, step.lo)                    # the first token is none of the text
        skip = lo - step.lo
        parts = self.parts_of(lo, step.ids[skip:].tolist(), step.chance[skip:].tolist())
        before = self.parts if self.block == (lo, step.hi) else []
        self.block = (lo, step.hi)
        self.parts = parts
        return {
            "forwards": step.forwards,
            "seconds": round(step.seconds, 4),
            "parts": [part for part in parts if part not in before],
        }

    def parts_of(self, first, ids, chance):
        """The tokens from position `first` on as parts."""
        groups = []                             # [first index, [tokens]]
        for i, token in enumerate(ids):
            alone = token in (self.mask_id, self.eos_id)
            if groups and not alone:
                last = groups[-1][1][-1]
                if last not in (self.mask_id, self.eos_id) and not self.tokenizer.opens_word(token):
                    groups[-1][1].append(token)
                    continue
            groups.append([i, [token]])

        parts = []
        for i, tokens in groups:
            part = {"at": first + i, "n": len(tokens)}
            if tokens[0] != self.mask_id:
                after_mask = i > 0 and ids[i - 1] == self.mask_id
                part |= self.seen(part["at"], tokens, chance[i:i + len(tokens)], after_mask)
            parts.append(part)
        return parts

    def seen(self, at, tokens, chance, after_mask):
        """The text and confidence of one part, whose first token stands at position `at`."""
        if tokens[0] == self.eos_id:
            return {"text": "", "end": True, "p": round(chance[0], 3)}
        text = self.tokenizer.decode(tokens).strip("\ufffd")
        if after_mask:
            # what belongs to a letter that is not there yet waits for it
            while text and not opens_cluster(text, 0):
                text = text[1:]
        found = {"text": text}
        if self.request.gapped:
            chance = [
                p for place, p in enumerate(chance, at) if place in self.written
            ]
        if chance:
            found["p"] = round(min(chance), 3)
        return found

    def end(self, result):
        """The end, for the page: the text as the API gives it."""
        request = self.request
        ids = result.rows[0]
        if request.gapped:
            text = request.gapped.filled(ids)
            tokens = request.gapped.masked
        else:
            text = self.tokenizer.written(ids)
            if not self.framed:
                text = request.prompts[0] + text
            tokens = len(result.full_rows[0])
        job = request.job
        return {
            "text": text,
            "tokens": tokens,
            "forwards": job.forwards,
            "seconds": round(result.seconds, 4),
        }
