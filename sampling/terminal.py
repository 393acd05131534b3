"""Text on a terminal: no escape of a model's making reaches it, streaming never cuts a character,
the unmasking can be watched.

Used by sample.py. Colours go around whole words, because an escape code between a Devanagari letter
and its sign breaks both.
"""
import sys

from common.console import printable

GAP = "░"
COLOURS = (196, 208, 220, 148, 40)          # 256-colour codes from a guess to a certainty


class Stream:
    """Text that grows: prints what is new. Whoever calls leaves an unfinished character out
    (Tokenizer.written).
    """

    def __init__(self, file=None):
        self.file, self.shown = file or sys.stdout, ""

    def grow(self, text, final=False):
        text = printable(text)
        assert text.startswith(self.shown), "streamed text was taken back"
        self.file.write(text[len(self.shown):] + ("\n" if final else ""))
        self.file.flush()
        self.shown = text


def painted(ids, chance, tokenizer, mask_id, colour):
    """One row as text: masks as ░, words coloured by the least sure of their tokens."""
    words = []  # [ids, least chance]; a word starts at a space, a newline or a gap
    for token, p in zip(ids, chance, strict=True):
        if (
            words
            and token != mask_id
            and words[-1][0][-1] != mask_id
            and not tokenizer.opens_word(token)
        ):
            words[-1][0].append(token)
            words[-1][1] = min(words[-1][1], p)
        else:
            words.append([[token], p])
    parts = []
    for tokens, p in words:
        if tokens == [mask_id]:
            parts.append(GAP)
            continue
        text = printable(tokenizer.decode(tokens)).replace("\n", "⏎")
        if colour and text.strip():
            code = COLOURS[min(len(COLOURS) - 1, int(p * len(COLOURS)))]
            text = f"\x1b[38;5;{code}m{text}\x1b[0m"
        parts.append(text)
    return "".join(parts)


class Watch:
    """on_step of decode: one line per forward with the block as it stands, of the batch's first
    row.
    """

    def __init__(self, tokenizer, file=None, colour=None):
        self.tokenizer, self.file = tokenizer, file or sys.stderr
        self.colour = self.file.isatty() if colour is None else colour

    def __call__(self, canvas, lo, hi, step):
        ids, chance = (t[0, lo:hi].tolist() for t in (canvas.ids, canvas.chance))
        line = painted(ids, chance, self.tokenizer, canvas.mask_id, self.colour)
        print(f"[{lo}-{hi} {step + 1:>3}] {line}", file=self.file, flush=True)
