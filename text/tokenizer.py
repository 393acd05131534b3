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

import numpy as np
import sentencepiece

from common.console import UserError
from common.files import json_text, replace_file

NORMALISER = "v1"          # any change of the rules below needs a new version
PAD, UNK, BOS, EOS = 0, 1, 2, 3
SCRIPTS = ("devanagari", "latin", "mixed", "other")
_ASCII = bytes(range(128))
# ASCII letters and the first bytes of U+00C0..027F
_LATIN = bytes(byte for byte in _ASCII if chr(byte).isalpha()) + bytes(range(0xc3, 0xca))

# ---- normaliser ----------------------------------------------------------------------------------
# Replaced: CRLF, lone surrogates, NBSP, U+2581. Dropped: C0 controls but \n and \t, bidi embeddings
# and overrides, BOM, U+FFFE. Then NFC, joiners, NFC: NFC moves marks across a virama, hence it
# stands on both sides of the joiner rule.
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
    text = match.string
    before = text[max(match.start() - 3, 0) : match.start()]
    after = text[match.end() : match.end() + 1]

    # letter (+ nukta) + virama + joiner + letter
    if before[-1:] == "\u094d":
        letter = before[:-1].removesuffix("\u093c")[-1:]
        if _LETTER.match(letter) and _LETTER.match(after):
            return match[0][0]
        return ""

    # emoji (+ variation selector) + ZWJ + emoji
    base = before.removesuffix("\ufe0f")[-1:]
    if "\u200d" in match[0] and _EMOJI.match(base) and _EMOJI.match(after):
        return "\u200d"
    return ""


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
    devanagari = raw.count(b"\xe0\xa4") + raw.count(b"\xe0\xa5")     # U+0900..097F
    latin = len(raw) - len(raw.translate(None, _LATIN))
    ascii_chars = len(raw) - len(raw.translate(None, _ASCII))

    letters = devanagari + latin
    elsewhere = len(text) - ascii_chars - devanagari
    if letters <= elsewhere:
        return "other"
    share = devanagari / letters
    if share >= 0.7:
        return "devanagari"
    if share <= 0.3:
        return "latin"
    return "mixed"


# ---- training ------------------------------------------------------------------------------------
LINE_BYTES = 4192  # SentencePiece skips longer lines: 69 % of our Hindi, if whole documents go in
# text that the trainer sees at most; the caller spreads it over the corpus
SAMPLE_BYTES = 32_000_000
MEASURED_DOCS, MEASURED_CHARS = 300, 5000      # of each script, for the report
_SENTENCE = re.compile("[^।॥?!.\n]+[।॥?!.\n]*|[।॥?!.\n]+")


def opens_cluster(text, i):
    """Whether a letter as people see it (a syllable, an emoji) begins at i: no mark, no joiner, not
    after a virama.
    """
    letter = text[i]
    before = text[i - 1 : i]                   # empty at the beginning of the text
    if unicodedata.category(letter)[0] == "M" or letter in "\u200c\u200d":
        return False
    if before == "\u200d":
        return False
    if before and unicodedata.combining(before) == 9:       # a virama
        return False
    return not "\U0001f3fb" <= letter <= "\U0001f3ff"       # a skin tone


def sentences(text):
    """Cut at danda ? ! . and newline, keeping every character; what is still too long is cut
    between clusters.
    """
    for match in _SENTENCE.finditer(text):
        start, end = match.span()
        while end - start > LINE_BYTES // 4:
            cut = place_to_cut(text, start)
            yield text[start:cut]
            start = cut
        yield text[start:end]


def place_to_cut(text, start):
    """Where a line that begins at `start` is cut: at the last space, else between two clusters."""
    steps = range(start + LINE_BYTES // 4, start + LINE_BYTES // 8, -1)
    for i in steps:
        if text[i] == " ":
            return i
    for i in steps:
        if opens_cluster(text, i):
            return i
    return steps[0]


def train_tokenizer(documents, path, vocab_size, model_type, corpus_bytes=0, log=print):
    """Train on the documents (SAMPLE_BYTES at most), write `path` and a report .json beside it;
    return the Tokenizer.

    The report says what the pieces cost in each script; its lines are logged.
    vocab_size counts base pieces (no mask); 0 picks it by corpus_bytes. A text too small for it
    gives the largest vocabulary possible, with a notice. Same documents, same bytes.
    """
    lines, size, evidence = lines_to_train_on(documents)
    if not any(map(str.strip, lines)):
        raise UserError("no text to train a tokenizer on; check --input")
    settings = trainer_settings(model_type)
    asked = vocab_size or vocab_size_for(max(size, corpus_bytes))
    model, asked = train_model(lines, asked, settings, may_grow=not vocab_size)

    tok = Tokenizer(model)
    if tok.vocab_size < asked and model_type != "char":
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


def lines_to_train_on(documents):
    """-> (lines for the trainer, their bytes, {script: beginnings of documents to measure on})."""
    lines = []
    size = 0
    evidence = {script: [] for script in SCRIPTS}
    for text in map(normalise, documents):
        measured = evidence[script_of(text)]
        if len(measured) < MEASURED_DOCS:
            measured.append(text[:MEASURED_CHARS])
        # the trainer skips lines with its own U+2585
        for line in sentences(text.replace("\u2585", " ")):
            size += len(line.encode())
            if size > SAMPLE_BYTES:
                return lines, size, evidence
            lines.append(line)
    return lines, size, evidence


def trainer_settings(model_type):
    """Of SentencePiece: an identity model with byte fallback, whose ids 0 to 3 are ours."""
    return dict(
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
        required_chars="\u2581",        # else a text without spaces cannot spell one
        hard_vocab_limit=False,
        num_threads=4,                  # a fixed number: unigram sums depend on it
    )


def vocab_size_for(corpus_bytes):
    """docs/results.md, vocabulary: 23 MB are better off with 16,000 pieces than with 8,000."""
    for below, vocab_size in ((1e6, 2000), (1e7, 4000), (2e7, 8000)):
        if corpus_bytes < below:
            return vocab_size
    return 16000


def train_model(lines, asked, settings, may_grow):
    """-> (bytes of a model of these lines, pieces asked for). may_grow: ask for more where the
    letters of the text do not fit; else that is an error.
    """
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
            if not letters:
                raise UserError(f"no vocabulary from this text: {error}") from None
            if not may_grow:
                raise UserError(
                    f"--tokenizer_vocab {asked} is too small: bytes and single letters of this "
                    f"text take {letters[1]}"
                ) from None
            asked += int(letters[1])
    return model.getvalue(), asked


# ---- the tokenizer -------------------------------------------------------------------------------
PART_CHARS = 50_000  # longer texts are encoded in parts: the C++ side takes memory by the letter
# what a model other than ours changes: spaces, letters that other normalisers unite, our specials
_PROBE = (
    "  \u0915\u093c \ufb01 \uff21\u00bd\tx\n\n <s> e\u0301 "
    "\u200d\u0a95\u0acd\u0ab7 \U0001f469\u200d\U0001f680 12 "
)


def _parts(text):
    """Cut before a space or line break, which no piece crosses, so that the ids are those of the
    whole text.
    """
    start = 0
    while start + PART_CHARS < len(text):
        limit = start + PART_CHARS
        cut = max(text.rfind(" ", start + 1, limit), text.rfind("\n", start + 1, limit))
        if cut < 0:
            cut = limit
        yield text[start:cut]
        start = cut
    yield text[start:]


class Tokenizer:
    """Text to ids and back. `source` is a path, or the bytes of a model (a checkpoint carries
    them).
    """

    def __init__(self, source):
        given = isinstance(source, bytes)
        name = "the tokenizer" if given else source
        fix = "delete it and run python -m prepare again, or name another"
        try:
            self.model_bytes = source if given else Path(source).read_bytes()
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes)
            self.vocab_size = self.sp.vocab_size()  # base pieces; the mask id is this number
            self.pad_id = self.sp.pad_id()
            self.unk_id = self.sp.unk_id()
            self.bos_id = self.sp.bos_id()
            self.eos_id = self.sp.eos_id()
            exact = self.sp.decode(self.sp.encode(_PROBE)) == _PROBE
            newline = "\n" in self.sp.encode(_PROBE, out_type=str)
        except OSError as error:
            raise UserError(
                f"no tokenizer at {name} ({error.strerror}); python -m prepare trains one"
            ) from None
        except Exception:  # the binding raises many types on damage
            raise UserError(f"{name} is not a readable SentencePiece model; {fix}") from None
        ids = (self.pad_id, self.unk_id, self.bos_id, self.eos_id)
        if ids != (PAD, UNK, BOS, EOS) or not exact or not newline:
            raise UserError(
                f"{name} is no model with identity, byte fallback, newline, ids 0-3 (has {ids}); "
                f"{fix}"
            )
        self.sha256 = hashlib.sha256(self.model_bytes).hexdigest()

    @property
    def of_letters(self):
        """Is no piece longer than a letter?"""
        ids = range(EOS + 1, self.vocab_size)
        return all(self.sp.is_byte(i) or len(self.sp.id_to_piece(i)) == 1 for i in ids)

    def encode(self, text):
        """Ids of one text, without specials; never a special id, whatever the text says."""
        ids = []
        for part in _parts(normalise(text)):
            ids += self.sp.encode(part)
        return ids

    def encode_many(self, texts, normalised=False):
        """The same ids as `encode`, as one int32 array per text, on all cores. normalised=True
        skips that pass.
        """
        if not normalised:
            texts = map(normalise, texts)
        groups = [list(_parts(text)) for text in texts]
        parts = [part for group in groups for part in group]
        threads = os.cpu_count() or 1
        encoded = iter(self.sp.encode(parts, return_type="numpy", num_threads=threads))

        # the parts of a text together again
        ids = []
        for group in groups:
            if len(group) == 1:
                ids.append(next(encoded))
            else:
                ids.append(np.concatenate([next(encoded) for _ in group]))
        return ids

    def decode(self, ids):
        """Text of ids (list, array, tensor); specials, the mask and ids out of range are left out.
        """
        return self.sp.decode([i for i in map(int, ids) if EOS < i < self.vocab_size])

    def written(self, ids):
        """Text of ids that a model wrote: its length may cut a letter that is made of bytes, whose
        first ones are left out.
        """
        return self.decode(ids).rstrip("\ufffd")

    def opens_word(self, token):
        """Whether a word begins with this id: with a space or a line break."""
        return self.sp.id_to_piece(token).startswith(("\u2581", "\n"))

    def clusters(self, text):
        """How many letters as people see them (opens_cluster) a text has, and how many of them a
        token boundary cuts.
        """
        # where each cluster begins, in bytes: a token can be one byte of a letter
        openings = []
        size = 0
        for i, letter in enumerate(text):
            if opens_cluster(text, i):
                openings.append(size)
            size += len(letter.encode())

        # the clusters in whose middle a token begins
        cut = set()
        place = 0
        for token in self.encode(text):
            before = bisect_right(openings, place)
            if before and openings[before - 1] != place:
                cut.add(before)
            if self.sp.is_byte(token):
                place += 1
            else:
                place += len(self.sp.id_to_piece(token).replace("\u2581", " ").encode())
        return len(openings), len(cut)

    def measure(self, texts):
        """What the tokenizer costs on these texts; the cut letters are counted where each text
        begins.
        """
        count = Counter()
        for text in map(normalise, texts):
            ids = self.encode(text)
            letters, cut = self.clusters(text[:500])
            count.update(
                tokens=len(ids),
                words=len(text.split()),
                bytes=len(text.encode()),
                fallback=sum(map(self.sp.is_byte, ids)),
                lost=self.decode(ids) != text,
                letters=letters,
                cut=cut,
            )
        tokens = max(count["tokens"], 1)
        return dict(
            documents=len(texts),
            tokens_per_word=round(count["tokens"] / max(count["words"], 1), 3),
            bytes_per_token=round(count["bytes"] / tokens, 3),
            byte_fallback_share=round(count["fallback"] / tokens, 5),
            clusters_cut=round(count["cut"] / max(count["letters"], 1), 5),
            round_trip=not count["lost"],
        )
