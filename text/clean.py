"""Cleaning that respects the scripts: repairs inside a document, rules that drop one, exact and
near duplicates, a report.

Used by prepare (--clean); a document passes through `Cleaner.__call__` once, in order, in bounded
memory:

    cleaner = Cleaner()
    text = cleaner(text, "hindi")    # the repaired text, or "" when a rule dropped the document
    cleaner.table(); cleaner.write_html(path)  # what each rule removed, with examples

Notable: nothing cuts inside a grapheme cluster, ZWJ and ZWNJ stay (tokenizer.normalise decides
about them), and a rule that fits English but not Hindi is not here: no minimum word length, no
ASCII punctuation counts. Near duplicates are found by containment: a document goes when most of its
five-word shingles, sampled by their hash, stood in documents before it.
"""
import hashlib
import html
import re
import unicodedata
from collections import Counter

import numpy as np

from common.files import write_text

RULES = "v1"               # any change of what comes out needs a new version
MIN_LETTERS = 10           # a shorter document says nothing
MIN_SHARE = 0.5            # of the letters in the wanted script
MAX_FOREIGN = 0.3          # of the letters neither Devanagari nor Latin
MIN_TEXT = 0.6             # of all characters: letters, vowel signs, spaces
NEAR = 0.7                 # of a document's shingles seen before
SHINGLE = 5                # words
# of the table of shingles seen: 32 MiB; a chance hit costs nothing until it is very full
BITS = 2**28
SAMPLE = 4                 # one shingle of so many is remembered and asked for, in long documents
EXAMPLES, EXAMPLE_CHARS = 5, 300

# ---- repairs -------------------------------------------------------------------------------------
_DEVANAGARI = "\u0900-\u097f"
_LETTERS = "\u0904-\u0939\u0958-\u0961"                    # Devanagari letters, without signs
_SIGNS = "\u093e-\u094c\u0901-\u0903"                      # vowel signs and nasals

MARKUP = "|".join((
    r"</?[a-zA-Z][^<>\n]{0,200}>",
    r"<!--.*?-->",
    r"\[(?:\d{1,3}|संपादित करें)\]",
    r"\{\{[^{}\n]{0,200}\}\}",
))
ADDRESSES = "|".join((
    r"https?://[^\s<>]+",
    r"www\.[^\s<>]+",
    r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]+\.[\w.]+",
    r"(?<!\w)@\w{2,}",
))
BRACKETS = "|".join((
    r"\{\w*\}",
    r"\(\s*\)",
    r"\[\s*\]",
    r"\"\"",
    r"“”",
    r"(?<=\w)\(_?[A-Z]\)",
))
INVISIBLE = "\u00ad\u200b\u2060\u2028\u2029"
DOUBLED = "\u093e\u093f\u0940\u0941\u0942\u0947\u0948\u094b\u094c\u0902\u0901"
NO_SPACE_AFTER = f"(?<=[{_DEVANAGARI}])([,;।?!])(?=[{_LETTERS}])"
SPACE_BEFORE = f"(?<=[{_DEVANAGARI}])[ \t]+(?=[,;।?!])"

# in this order: name, characters of which one must be there, pattern, replacement
REPAIRS = [
    ("invisible characters", INVISIBLE, f"[{INVISIBLE}]+", ""),
    ("markup", "<[{", MARKUP, ""),
    ("addresses", "/@", ADDRESSES, ""),
    ("placeholders", "%", r"%\d?\$?[sdSD]\b", ""),
    ("placeholders", "$", r"\$\w+\$|(?<!\w)\$\d\b", ""),
    ("placeholders", "([{\"“", BRACKETS, ""),
    ("doubled vowel signs", DOUBLED, f"([{_SIGNS}])\\1+", r"\1"),
    ("doubled danda", "।|", r"[।|]{2,}", "।"),
    ("rulers", "_=*~#-.", r"[_=*~#\-]{4,}|\.{4,}", ""),
    ("no space after a stop", "।,;?!", NO_SPACE_AFTER, r"\1 "),
    ("space before a stop", "।,;?!", SPACE_BEFORE, ""),
    ("space runs", " ", r"[ \t]{2,}", " "),
    ("space at line ends", "\n", r"[ \t]+(?=\n)|(?<=\n)[ \t]+", ""),
    ("empty lines", "\n", r"\n{3,}", "\n\n"),
]
REPAIRS = [(name, needles, re.compile(pattern), by) for name, needles, pattern, by in REPAIRS]

# a short line that holds one of these is no part of the text
BOILERPLATE = (
    "copyright|©|all rights reserved|privacy policy|terms of use|terms of service|cookie|"
    "subscribe|sign in|sign up|click here|read more|also read|follow us|share on|share this|"
    "advertisement|javascript|loading...|और पढ़ें|भी पढ़ें|यहाँ क्लिक|यहां क्लिक|विज्ञापन|कॉपीराइट|"
    "सर्वाधिकार|फॉलो करें|सब्सक्राइब|शेयर करें|लॉग इन|लॉगइन"
)
BOILERPLATE = tuple(unicodedata.normalize("NFC", words) for words in BOILERPLATE.split("|"))
BOILERPLATE_WORDS = 12     # a longer line that holds such a word is prose about it

# ---- what a text is made of: a class for each code point, counted by numpy -----------------------
_WORD = re.compile(r"[^\W\d_]+(?:[\u0900-\u0903\u093a-\u094d\u200c\u200d]+[^\W\d_]*)*")
ENGLISH = frozenset(
    "the of and to in is was for that with as on by are from this be at it which were an or".split()
)
HINGLISH = frozenset(
    "hai hain he ka ki ke ko se mein me nahi nahin aur ye yeh wo woh kya bhi hi to tha thi the ho "
    "kar par raha rahi rahe mai main hum tum aap kuch koi jo yaar bhai".split()
) - ENGLISH
SYMBOL, DEVANAGARI, LATIN, OTHER, MARK, SPACE = range(6)


def _class_of(letter):
    kind = unicodedata.category(letter)
    if kind[0] == "L":
        if "\u0900" <= letter <= "\u097f":
            return DEVANAGARI
        return LATIN if letter < "\u0250" else OTHER
    if kind[0] == "M" or letter in "\u200c\u200d":
        return MARK
    return SPACE if letter.isspace() else SYMBOL


_TABLED = 0x3000           # from here on all are OTHER: CJK, emoji, rarer
_CLASSES = np.array([_class_of(chr(point)) for point in range(_TABLED)] + [OTHER], np.uint8)


def make_up(text):
    """Characters of the text in each class."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    return np.bincount(_CLASSES[np.minimum(points, _TABLED)], minlength=6).tolist()


def kind_problem(text, kind, words):
    """Why a document is not of the wanted kind: '' when it is. kind: hindi, hinglish, english, or
    any.
    """
    _, devanagari, latin, other, mark, space = make_up(text)
    letters = devanagari + latin + other
    if letters < MIN_LETTERS:
        return "too short"
    if letters + mark + space < MIN_TEXT * len(text):
        return "symbols and digits"
    if other > MAX_FOREIGN * letters:
        return "another script"
    if kind == "hindi" and devanagari < MIN_SHARE * letters:
        return "not in Devanagari"
    if kind in ("hinglish", "english") and latin < MIN_SHARE * letters:
        return "not in Latin letters"
    if kind == "hinglish":
        count = Counter(words.split())
        english = sum(count[word] for word in ENGLISH)
        hinglish = sum(count[word] for word in HINGLISH)
        if english > 0.1 * count.total() and hinglish < 0.03 * count.total():
            return "English, not Hinglish"
    return ""


_WEIGHTS = np.random.default_rng(0).integers(2**63, 2**64, 64, np.uint64) | np.uint64(1)


def mix(hashes):
    """uint64 -> uint64: every bit in reaches every bit out."""
    hashes = (hashes ^ (hashes >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return hashes ^ (hashes >> np.uint64(32))


def word_hashes(words):
    """A uint64 for each word of a text of words with single spaces between them."""
    raw = np.frombuffer(words.encode(), np.uint8)
    starts = np.concatenate([[0], np.flatnonzero(raw == 32) + 1])
    lengths = np.diff(np.append(starts, len(raw)))
    place = np.arange(len(raw)) - np.repeat(starts, lengths)           # of a byte in its word
    return mix(np.add.reduceat(raw * _WEIGHTS[place % 64], starts))


def shingles(hashes, n):
    """One uint64 for each run of n words."""
    runs = np.zeros(max(len(hashes) - n + 1, 1), np.uint64)
    for i in range(min(n, len(hashes))):
        runs = runs * np.uint64(0x9E3779B97F4A7C15) + hashes[i:i + len(runs)]
    return mix(runs)


def repeats(text, hashes):
    """Does the text say the same again and again?"""
    # one word
    if len(hashes) >= 12:
        _, counts = np.unique(hashes, return_counts=True)
        if counts.max() > 0.4 * len(hashes):
            return True

    # runs of three words
    if len(hashes) >= 30 and len(np.unique(shingles(hashes, 3))) < 0.4 * (len(hashes) - 2):
        return True

    # lines
    lines = [line for line in text.split("\n") if line.strip()]
    different = sum(map(len, set(lines)))
    return len(lines) >= 4 and different < 0.7 * sum(map(len, lines))


def is_boilerplate(line):
    if len(line) >= 200 or len(line.split()) > BOILERPLATE_WORDS:
        return False
    low = line.lower()
    return any(phrase in low for phrase in BOILERPLATE)


# ---- the report ----------------------------------------------------------------------------------

HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>\
body{{font:15px/1.5 system-ui,"Noto Sans Devanagari",sans-serif;max-width:52rem;margin:2rem auto;\
padding:0 1rem}}
table{{border-collapse:collapse}}td,th{{padding:.15rem .7rem .15rem 0;text-align:left}}\
.n{{text-align:right}}
blockquote{{margin:.3rem 0;padding:.3rem .8rem;border-left:3px solid #bbb;white-space:pre-wrap;\
overflow-wrap:anywhere}}</style>
<h1>{title}</h1>
"""


def bars(counts, unit, what="rule"):
    """A table of counts with a bar for each, the largest first."""
    if not counts:
        return "<p>none</p>"
    top = max([*counts.values(), 1])
    rows = []
    for rule, count in sorted(counts.items(), key=lambda item: -item[1]):
        rows.append(
            f'<tr><td>{html.escape(rule)}</td><td class="n">{count:,}</td>'
            '<td><svg width="320" height="14" role="img">'
            f'<rect width="{max(1, 320 * count / top):.0f}" height="14" fill="#2a6f97"/>'
            "</svg></td></tr>"
        )
    head = f"<tr><th>{what}</th><th>{unit}</th><th></th></tr>"
    return f'<table>{head}{"".join(rows)}</table>'


# ---- the cleaner ---------------------------------------------------------------------------------

class Cleaner:
    """Repairs documents and drops bad ones and copies; remembers what it has seen and done."""

    def __init__(self):
        self.repaired = Counter()          # repair -> places
        self.lines = Counter()             # rule -> lines dropped
        self.dropped = Counter()           # rule -> documents
        self.dropped_bytes = Counter()
        self.kept = 0                      # documents
        self.kept_bytes = 0
        self.examples = {}                 # rule -> documents or lines that it dropped
        self.exact = set()                 # hashes of the documents kept
        self.seen = np.zeros(BITS // 8, np.uint8)           # a bit for each shingle of theirs

    def note(self, rule, text):
        """Keep an example of what a rule dropped."""
        kept = self.examples.setdefault(rule, [])
        example = text[:EXAMPLE_CHARS]
        if len(kept) < EXAMPLES and example not in kept:
            kept.append(example)

    def __call__(self, text, kind="any"):
        """The repaired document, or "" if a rule drops it. `text` is normalised."""
        fixed = self.repair(text)
        words = " ".join(_WORD.findall(fixed)).lower()
        rule = kind_problem(fixed, kind, words)
        if not rule:
            hashes = word_hashes(words)
            if repeats(fixed, hashes):
                rule = "repeats itself"
            else:
                rule = self.duplicate(words, hashes)
        if rule:
            self.dropped[rule] += 1
            self.dropped_bytes[rule] += len(text.encode())
            self.note(rule, text)
            return ""
        self.kept += 1
        self.kept_bytes += len(fixed.encode())
        return fixed

    def repair(self, text):
        """The text without what is broken in it, and without lines that are not part of it."""
        for name, needles, pattern, by in REPAIRS:
            if any(needle in text for needle in needles):
                text, count = pattern.subn(by, text)
                if count:
                    self.repaired[name] += count
        low = text.lower()
        if not any(phrase in low for phrase in BOILERPLATE) and "\n" not in text:
            return text.strip()

        kept = []
        before = None
        for line in text.split("\n"):
            rule = None
            if is_boilerplate(line):
                rule = "boilerplate line"
            elif len(line) > 20 and line == before:
                rule = "line repeated"
            if rule:
                self.lines[rule] += 1
                self.note(rule, line)
            else:
                kept.append(line)
            before = line
        return "\n".join(kept).strip()

    def duplicate(self, words, hashes):
        """Exact: the same words, digits and punctuation aside. Near: most of its shingles stood in
        documents before it.
        """
        key = hashlib.blake2b(words.encode(), digest_size=12).digest()
        if key in self.exact:
            return "exact duplicate"
        self.exact.add(key)
        if len(hashes) < 4 * SHINGLE:
            return ""  # a short text shares phrases with others by right

        runs = shingles(hashes, SHINGLE)
        if len(runs) > 50 * SAMPLE:
            runs = runs[runs % np.uint64(SAMPLE) == 0]
        bits = np.unique(runs // np.uint64(SAMPLE) % np.uint64(BITS))
        byte = bits >> np.uint64(3)
        bit = np.left_shift(np.uint8(1), (bits & np.uint64(7)).astype(np.uint8))
        if ((self.seen[byte] & bit) > 0).mean() >= NEAR:
            return "near duplicate"
        np.bitwise_or.at(self.seen, byte, bit)
        return ""

    def counts(self):
        """For meta.json."""
        return dict(
            kept_docs=self.kept,
            kept_bytes=self.kept_bytes,
            dropped_docs=dict(self.dropped),
            dropped_bytes=dict(self.dropped_bytes),
            dropped_lines=dict(self.lines),
            repaired_places=dict(self.repaired),
        )

    def table(self):
        """Lines for people: every rule that did something."""
        total = self.kept + self.dropped.total()
        yield f"cleaning: {self.kept:,} of {total:,} documents kept"
        for rule, count in self.dropped.most_common():
            yield f"{rule:>24}: {count:,} documents, {self.dropped_bytes[rule] / 1e6:.2f} MB"
        for what, some in (("lines", self.lines), ("places repaired", self.repaired)):
            for rule, count in some.most_common():
                yield f"{rule:>24}: {count:,} {what}"

    def write_html(self, path, title, scripts):
        """The report as one page without scripts or outside files: counts, bars, examples."""
        total = self.kept + self.dropped.total()
        parts = [
            HEAD.format(title=html.escape(title)),
            f"<p>{self.kept:,} of {total:,} documents kept, {self.kept_bytes / 1e6:.2f} MB.</p>\n",
            "<h2>Kept, by script</h2>", bars(scripts, "documents", "script"),
            "\n<h2>Documents dropped</h2>", bars(self.dropped, "documents"),
            "\n<h2>Bytes dropped</h2>", bars(self.dropped_bytes, "bytes"),
            "\n<h2>Lines dropped</h2>", bars(self.lines, "lines"),
            "\n<h2>Places repaired</h2>", bars(self.repaired, "places"),
            "\n<h2>Examples of what was dropped</h2>",
        ]
        for rule, texts in self.examples.items():
            parts.append(f"<h3>{html.escape(rule)}</h3>")
            parts += [f'<blockquote lang="hi">{html.escape(text)}</blockquote>' for text in texts]
        if not self.examples:
            parts.append("<p>none</p>")
        parts.append("</html>\n")
        page = "".join(parts)
        write_text(path, page)
