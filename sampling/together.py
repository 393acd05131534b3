"""Texts of many requests in one batch, left to right: each joins and leaves when it likes.

    batch = Batch(model)
    if batch.takes(settings):
        batch.join(text)                # a Text: its prompt is read, and its first token chosen
    for text, error in batch.forward(): ...     # one token more for each

Used by serving/worker.py. One row a text and no positions: what EcoHybrid keeps of a text has one
size, so texts of any length stand side by side. The prompt and the first token take a pass of their
own, as they do when a text is written alone, and so each gets the ids that decode.generate gives
it, bit for bit where the engine's rows do not depend on their number (decode.py's docstring).

Legend: B texts, P tokens of a prompt, V vocabulary rows.
"""
import numpy as np

from sampling import decode
from sampling.unmasking import NotFinite, must_be_finite

DAMAGED = (
    "the denoiser returned NaN or infinity: the checkpoint is damaged, or its training went wrong; "
    "use an earlier one"
)


class Text:
    """One row of a request while it is written.

    owner: what the caller knows it by; result: the request's Result, which gets the finished row.
    """

    def __init__(self, owner, row, prompts, settings, seeds, result, keep_chance=False):
        self.owner = owner
        self.row = row
        self.prompts = prompts
        self.settings = decode.one_token_at_a_time(settings)
        self.seeds = seeds
        self.result = result
        self.keep_chance = keep_chance
        self.canvas = None
        self.end = len(prompts[row])            # tokens that stand, the prompt's included

    def begin(self, model):
        """Read the prompt and choose the first token -> the cache."""
        self.canvas, cache = decode.begin(
            model, [self.row], self.prompts, self.settings, self.seeds, self.result,
            self.keep_chance,
        )
        self.take(model, model.step(self.last[None], cache), 0)
        return cache

    @property
    def last(self):
        """The newest token, (1,)."""
        return self.canvas.ids[0, self.end - 1:self.end]

    def take(self, model, states, at):
        """Choose the next token by row `at` of the states (B, 1, D)."""
        at = np.array([at])
        logits = model.logits(states, at, np.zeros_like(at))                       # (1, V)
        self.choose(logits)

    def choose(self, logits):
        """Choose the next token by its logits (1, V)."""
        must_be_finite(logits, DAMAGED)
        only = decode.Turn(0, np.zeros(1, np.int64), None, np.zeros(0, np.int64))
        heat = self.settings.temperature
        decode.reveal(self.canvas, only, logits, self.end, self.end + 1, heat, self.settings)
        self.end += 1

    @property
    def finished(self):
        if self.end == self.canvas.ids.shape[1]:
            return True
        return self.settings.eos_id is not None and self.last[0] == self.settings.eos_id

    def keep(self, model):
        """It is finished: put it into the request's result."""
        ids = self.canvas.ids[0, :self.end].tolist()
        self.result.row_forwards[self.row] = self.canvas.forwards[0]
        decode.keep_answer(
            self.result, self.row, ids, self.prompts[self.row], self.settings, model
        )


class Batch:
    """The texts that are written now, and the one cache with all of them in it."""

    def __init__(self, model):
        self.model = model
        exact = getattr(model, "exact_rows", False)
        self.possible = exact and hasattr(model.new_cache(1, 1), "beside")
        self.texts = []
        self.cache = None

    def takes(self, settings):
        """May a text with these settings be written beside others?"""
        left_to_right = settings.left_to_right or self.model.cfg.causal
        return self.possible and left_to_right and not settings.speculates

    def join(self, text):
        """Read a text's prompt and choose its first token; if there is more to write, it joins."""
        cache = text.begin(self.model)
        if text.finished:
            text.keep(self.model)
            return
        self.texts.append(text)
        self.cache = cache if self.cache is None else self.cache.beside(cache)

    def forward(self):
        """Choose one token for each text -> [(text, None, or the NotFinite that ended it)]; those
        that are finished leave.
        """
        texts = self.texts
        ids = np.stack([text.last for text in texts])                              # (B, 1)
        states = self.model.step(ids, self.cache)
        rows = np.arange(len(texts))
        logits = self.model.logits(states, rows, np.zeros_like(rows))              # (B, V)
        written = []
        for row, text in enumerate(texts):
            try:
                text.choose(logits[row:row + 1])
                written.append((text, None))
            except NotFinite as error:
                written.append((text, error))
        ended = {text for text, error in written if error or text.finished}
        for text, error in written:
            if text in ended and not error:
                text.keep(self.model)
        self.leave(ended)
        return written

    def leave(self, ended):
        """These texts leave."""
        going = [row for row, text in enumerate(self.texts) if text not in ended]
        if len(going) == len(self.texts):
            return
        self.texts = [self.texts[row] for row in going]
        if not going:
            self.cache = None
            return
        self.cache.select(np.array(going))
