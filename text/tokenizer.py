"""The text end of Aria: one normaliser, one SentencePiece wrapper, one way to train it. No torch.

Used by whatever reads or writes text; nobody else touches SentencePiece. Text goes through
`normalise` (ours) and then through an identity model with byte fallback: decode(encode(x)) ==
normalise(x) for every string. Special ids come only from code: "<s>" or "<mask>" in user text stays
text. The mask is not in the model file; its id is `vocab_size`.
"""
import hashlib
import io
import os
import re
import unicodedata
from bisect import bisect_right
from collections import Counter
from pathlib import Path

import sentencepiece

from common.console import UserError
from common.files import json_text, replace_file

NORMALISER = "v1"          # any change of the rules below needs a new version
PAD, UNK, BOS, EOS = 0, 1, 2, 3
SCRIPTS = ("devanagari", "latin", "mixed", "other")
# and leads of U+00C0..027F
_LATIN = bytes(b for b in range(128) if chr(b).isalpha()) + bytes(range(0xc3, 0xca))

# ---- normaliser: CRLF, lone surrogates, NBSP, U+2581; dropped: C0 controls but \n \t, bidi
# embeddings and overrides,
# BOM, U+FFFE; then NFC, joiners, NFC. NFC moves marks across a virama, hence on both sides of the
# joiner rule.
_FIX = re.compile("\r\n|[\ud800-\udfff\u00a0\u2581\x00-\x08\x0b-\x1f\u202a-\u202e\ufeff\ufffe]")
_JOINERS = re.compile("[\u200c\u200d]+")
_LETTER = re.compile("[\u0904-\u0939\u0958-\u0961\u0972-\u097f]")
_EMOJI = re.compile("[\u2190-\u2bff\U0001f000-\U0001faff]")


def _fix(match):
    if "\ud800" <= match[0] <= "\udfff":
        return "\ufffd"
    return {"\r\n": "\n", "\u00a0": " ", "\u2581": "_"}.get(match[0], "")


def _joiner(match):
    """Keep one joiner of a run: after a virama between Devanagari letters, or ZWJ between two
    emoji.
    """
    before, after = (
        match.string[max(match.start() - 3, 0) : match.start()],
        match.string[match.end() : match.end() + 1],
    )
    if before[-1:] == "\u094d":
        # letter (+ nukta) + virama + joiner + letter
        letter = before[:-1].removesuffix("\u093c")[-1:]
        return match[0][0] if _LETTER.match(letter) and _LETTER.match(after) else ""
    base = before.removesuffix("\ufe0f")[-1:]  # emoji (+ variation selector) + ZWJ + emoji
    return "\u200d" if "\u200d" in match[0] and _EMOJI.match(base) and _EMOJI.match(after) else ""


def normalise(text):
    """The one form of a text that models see. Idempotent."""
    text = unicodedata.normalize("NFC", _FIX.sub(_fix, text))
    if "\u200c" in text or "\u200d" in text:
        text = unicodedata.normalize("NFC", _JOINERS.sub(_joiner, text))
    return text


def script_of(text):
    """Which of SCRIPTS a document is in, by shares of its letters; counted on UTF-8 bytes because
    that is fast.
    """
    raw = text.encode("utf-8", "replace")
    deva = raw.count(b"\xe0\xa4") + raw.count(b"\xe0\xa5")  # U+0900..097F
    latin, ascii_chars = (
        len(raw) - len(raw.translate(None, some)) for some in (_LATIN, bytes(range(128)))
    )
    if deva + latin <= len(text) - ascii_chars - deva:
        return "other"
    share = deva / (deva + latin)
    return "devanagari" if share >= 0.7 else "latin" if share <= 0.3 else "mixed"

# ---- training
LINE_BYTES = 4192  # SentencePiece skips longer lines: 69 % of our Hindi, if whole documents go in
# text that the trainer sees at most; the caller spreads it over the corpus
SAMPLE_BYTES = 32_000_000
_SENTENCE = re.compile("[^।॥?!.\n]+[।॥?!.\n]*|[।॥?!.\n]+")


def opens_cluster(text, i):
    """Whether a letter as people see it (a syllable, an emoji) begins at i: no mark, no joiner, not
    after a virama.
    """
    return not (
        unicodedata.category(text[i])[0] == "M"
        or text[i] in "\u200c\u200d"
        or text[i - 1 : i] == "\u200d"
        or i
        and unicodedata.combining(text[i - 1]) == 9
        or "\U0001f3fb" <= text[i] <= "\U0001f3ff"
    )


def sentences(text):
    """Cut at danda ? ! . and newline, keeping every character; what is still too long is cut
    between clusters.
    """
    for start, end in (match.span() for match in _SENTENCE.finditer(text)):
        while end - start > LINE_BYTES // 4:
            steps = range(start + LINE_BYTES // 4, start + LINE_BYTES // 8, -1)
            cut = (next((i for i in steps if text[i] == " "), None)
                   or next((i for i in steps if opens_cluster(text, i)), steps[0]))
            yield text[start:cut]
            start = cut
        yield text[start:end]


def train_tokenizer(
    documents, path, vocab_size, model_type, corpus_bytes=0, log=print
):
    """Train on the documents (SAMPLE_BYTES at most), write `path` and a report .json beside it;
    return the Tokenizer.

    The report says what the pieces cost in each script; its lines are logged.
    vocab_size counts base pieces (no mask); 0 picks it by corpus_bytes. A text too small for it
    gives the largest vocabulary possible, with a notice. Same documents, same bytes.
    """
    lines, size, evidence = [], 0, {script: [] for script in SCRIPTS}
    for text in map(normalise, documents):
        if len(kept := evidence[script_of(text)]) < 300:
            kept.append(text[:5000])
        # the trainer skips lines with its own U+2585
        for line in sentences(text.replace("\u2585", " ")):
            if (size := size + len(line.encode())) > SAMPLE_BYTES:
                break
            lines.append(line)
        if size > SAMPLE_BYTES:
            break
    if not any(map(str.strip, lines)):
        raise UserError("no text to train a tokenizer on; check --input")
    size = max(size, corpus_bytes)
    # docs/results.md, vocabulary: 23 MB are better off with 16,000 pieces than with 8,000
    asked = vocab_size or (
        2000 if size < 1e6 else 4000 if size < 1e7 else 8000 if size < 2e7 else 16000
    )
    settings = dict(
        model_type=model_type,
        normalization_rule_name="identity",
        byte_fallback=True,
        split_digits=True,
        user_defined_symbols=["\n"],
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        pad_id=PAD,
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        max_sentence_length=LINE_BYTES,
        required_chars="\u2581",  # else a text without spaces cannot spell one
        # a fixed number: unigram sums depend on it
        hard_vocab_limit=False,
        num_threads=4,
    )
    model = io.BytesIO()
    while not model.getvalue():
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                vocab_size=asked,
                minloglevel=2,
                **settings,
            )
        except RuntimeError as error:
            letters = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
            if not letters or vocab_size:
                raise UserError(
                    f"--tokenizer_vocab {asked} is too small: bytes and single letters of this "
                    "text take "
                    f"{letters[1]}"
                    if letters
                    else f"no vocabulary from this text: {error}"
                ) from None
            asked = int(letters[1]) + asked  # automatic size: make room for the letters
    tok = Tokenizer(model.getvalue())
    if tok.vocab_size < asked:
        log(
            f"notice: this text supports {tok.vocab_size} pieces, not {asked}; the vocabulary is "
            f"{tok.vocab_size}"
        )
    report = dict(
        version=1,
        sha256=tok.sha256,
        vocab_size=tok.vocab_size,
        asked_vocab_size=vocab_size,
        normaliser=NORMALISER,
        settings=settings,
        lines=len(lines),
        measured_on="training text",
        scripts={script: tok.measure(texts) for script, texts in evidence.items() if texts},
    )
    for script, cost in report["scripts"].items():
        log(
            f"  {script}: {cost['tokens_per_word']:.2f} tokens a word, "
            f"{cost['bytes_per_token']:.2f} bytes a token, "
            f"{100 * cost['byte_fallback_share']:.2f} % byte tokens, "
            f"{100 * cost['clusters_cut']:.1f} % of letters cut "
            f"({cost['documents']} documents)"
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the model last: where it is, its report is
    replace_file(path.with_suffix(".json"), json_text(report, indent=1).encode())
    replace_file(path, tok.model_bytes)
    return tok


# ---- the tokenizer
PART_CHARS = 50_000  # longer texts are encoded in parts: the C++ side takes memory by the letter
_PROBE = "  \u0915\u093c \ufb01 \uff21\u00bd\tx\n\n <s> e\u0301 \u200d\u0a95\u0acd\u0ab7 \U0001f469\u200d\U0001f680 12 "


def _parts(text):
    """Cut before a space or line break, which no piece crosses, so that the ids are those of the
    whole text.
    """
    start = 0
    while (limit := start + PART_CHARS) < len(text):
        cut = max(text.rfind(" ", start + 1, limit), text.rfind("\n", start + 1, limit))
        yield text[start:(start := cut if cut > 0 else limit)]
    yield text[start:]


class Tokenizer:
    """Text to ids and back. `source` is a path, or the bytes of a model (a checkpoint carries
    them).
    """

    def __init__(self, source):
        given = isinstance(source, bytes)
        name, fix = (
            "the tokenizer" if given else source,
            "delete it and run python -m prepare again, or name another",
        )
        try:
            self.model_bytes = source if given else Path(source).read_bytes()
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes)
            self.vocab_size = self.sp.vocab_size()  # base pieces; the mask id is this number
            ids = self.pad_id, self.unk_id, self.bos_id, self.eos_id = (
                self.sp.pad_id(), self.sp.unk_id(), self.sp.bos_id(), self.sp.eos_id())
            exact = self.sp.decode(self.sp.encode(_PROBE)) == _PROBE and "\n" in self.sp.encode(
                _PROBE, out_type=str
            )
        except OSError as error:
            raise UserError(
                f"no tokenizer at {name} ({error.strerror}); python -m prepare trains one"
            ) from None
        except Exception:  # the binding raises many types on damage
            raise UserError(f"{name} is not a readable SentencePiece model; {fix}") from None
        if ids != (PAD, UNK, BOS, EOS) or not exact:
            raise UserError(
                f"{name} is no model with identity, byte fallback, newline, ids 0-3 (has {ids}); "
                f"{fix}"
            )
        self.sha256 = hashlib.sha256(self.model_bytes).hexdigest()

    def encode(self, text):
        """Ids of one text, without specials; never a special id, whatever the text says."""
        return [i for part in _parts(normalise(text)) for i in self.sp.encode(part)]

    def encode_many(self, texts, normalised=False):
        """The same ids as `encode`, as one int32 array per text, on all cores. normalised=True
        skips that pass.
        """
        import numpy as np
        groups = [list(_parts(text if normalised else normalise(text))) for text in texts]
        flat = iter(
            self.sp.encode(
                [part for group in groups for part in group],
                return_type="numpy",
                num_threads=os.cpu_count() or 1,
            )
        )
        return [
            np.concatenate([next(flat) for _ in group]) if len(group) > 1 else next(flat)
            for group in groups
        ]

    def decode(self, ids):
        """Text of ids (list, array, tensor); specials, the mask and ids out of range are left out.
        """
        return self.sp.decode([i for i in map(int, ids) if EOS < i < self.vocab_size])

    def written(self, ids):
        """Text of ids that a model wrote: its length may cut a letter that is made of bytes, whose
        first ones are left out.
        """
        return self.decode(ids).rstrip("\ufffd")

    def clusters(self, text):
        """How many letters as people see them (opens_cluster) a text has, and how many of them a
        token boundary cuts.
        """
        size, openings, place, cut = 0, [], 0, set()
        for i, c in enumerate(text):
            if opens_cluster(text, i):
                openings.append(size)  # bytes, since a token can be one byte of a letter
            size += len(c.encode())
        for i in self.encode(text):
            if (before := bisect_right(openings, place)) and openings[before - 1] != place:
                cut.add(before)
            place += (
                1
                if self.sp.is_byte(i)
                else len(self.sp.id_to_piece(i).replace("\u2581", " ").encode())
            )
        return len(openings), len(cut)

    def measure(self, texts):
        """What the tokenizer costs on these texts; the cut letters are counted where each text
        begins.
        """
        n = Counter()
        for text in map(normalise, texts):
            ids = self.encode(text)
            n.update(tokens=len(ids), words=len(text.split()), bytes=len(text.encode()),
                     fallback=sum(map(self.sp.is_byte, ids)), lost=self.decode(ids) != text)
            letters, cut = self.clusters(text[:500])
            n.update(letters=letters, cut=cut)
        return dict(
            documents=len(texts),
            tokens_per_word=round(n["tokens"] / max(n["words"], 1), 3),
            bytes_per_token=round(n["bytes"] / max(n["tokens"], 1), 3),
            byte_fallback_share=round(n["fallback"] / max(n["tokens"], 1), 5),
            clusters_cut=round(n["cut"] / max(n["letters"], 1), 5),
            round_trip=not n["lost"],
        )
