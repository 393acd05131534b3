"""Cleaning that respects the scripts: repairs inside a document, rules that drop one, exact and
near duplicates, a report.

Used by prepare (--clean); a document passes through `Cleaner.__call__` once, in order, in bounded
memory:

    cleaner = Cleaner()
    text = cleaner(text, "hindi")              # the repaired text, or "" when a rule dropped the
        document
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

# ---- repairs, in this order: name, characters of which one must be there, pattern, replacement ---
_DEVA = "\u0900-\u097f"
REPAIRS = [
    (name, needles, re.compile(pattern), by)
    for name, needles, pattern, by in (
        (
            "invisible characters",
            "\u00ad\u200b\u2060\u2028\u2029",
            "[\u00ad\u200b\u2060\u2028\u2029]+",
            "",
        ),
        (
            "markup",
            "<[{",
            r"</?[a-zA-Z][^<>\n]{0,200}>|<!--.*?-->|\[(?:\d{1,3}|संपादित करें)\]|\{\{[^{}\n]{0,200}\}\}",
            "",
        ),
        (
            "addresses",
            "/@",
            r"https?://[^\s<>]+|www\.[^\s<>]+|(?<![\w.+-])[\w.+-]{1,64}@[\w-]+\.[\w.]+|(?<!\w)@\w{2,}",
            "",
        ),
        ("placeholders", "%", r"%\d?\$?[sdSD]\b", ""),
        ("placeholders", "$", r"\$\w+\$|(?<!\w)\$\d\b", ""),
        ("placeholders", "([{\"“", r"\{\w*\}|\(\s*\)|\[\s*\]|\"\"|“”|(?<=\w)\(_?[A-Z]\)", ""),
        (
            "doubled vowel signs",
            "\u093e\u093f\u0940\u0941\u0942\u0947\u0948\u094b\u094c\u0902\u0901",
            "([\u093e-\u094c\u0901-\u0903])\\1+",
            r"\1",
        ),
        ("doubled danda", "।|", r"[।|]{2,}", "।"),
        ("rulers", "_=*~#-.", r"[_=*~#\-]{4,}|\.{4,}", ""),
        (
            "no space after a stop",
            "।,;?!",
            f"(?<=[{_DEVA}])([,;।?!])(?=[\u0904-\u0939\u0958-\u0961])",
            r"\1 ",
        ),
        ("space before a stop", "।,;?!", f"(?<=[{_DEVA}])[ \t]+(?=[,;।?!])", ""),
        ("space runs", " ", r"[ \t]{2,}", " "),
        ("space at line ends", "\n", r"[ \t]+(?=\n)|(?<=\n)[ \t]+", ""),
        ("empty lines", "\n", r"\n{3,}", "\n\n"),
    )
]
BOILERPLATE = (
    "copyright|©|all rights reserved|privacy policy|terms of use|terms of "
    "service|cookie|subscribe|sign in|sign up|"
    "click here|read more|also read|follow us|share on|share "
    "this|advertisement|javascript|loading...|और पढ़ें|भी पढ़ें|"
    "यहाँ क्लिक|यहां क्लिक|विज्ञापन|कॉपीराइट|सर्वाधिकार|फॉलो करें|सब्सक्राइब|शेयर करें|लॉग इन|लॉगइन"
)
BOILERPLATE = tuple(unicodedata.normalize("NFC", words) for words in BOILERPLATE.split("|"))
BOILERPLATE_WORDS = 12     # a longer line that holds such a word is prose about it

# ---- what a text is made of: a class for each code point, counted by numpy -----------------------
_WORD = re.compile(r"[^\W\d_]+(?:[\u0900-\u0903\u093a-\u094d\u200c\u200d]+[^\W\d_]*)*")
ENGLISH = frozenset(
    "the of and to in is was for that with as on by are from this be at it which were an or".split()
)
HINGLISH = (
    frozenset(
        "hai hain he ka ki ke ko se mein me nahi nahin aur ye yeh wo woh kya bhi hi to tha thi the "
        "ho kar par raha "
        "rahi rahe mai main hum tum aap kuch koi jo yaar bhai".split()
    )
    - ENGLISH
)
SYMBOL, DEVANAGARI, LATIN, OTHER, MARK, SPACE = range(6)


def _class_of(c):
    kind = unicodedata.category(c)
    if kind[0] == "L":
        return DEVANAGARI if "\u0900" <= c <= "\u097f" else LATIN if c < "\u0250" else OTHER
    return MARK if kind[0] == "M" or c in "\u200c\u200d" else SPACE if c.isspace() else SYMBOL


# from U+3000 on: CJK, emoji, rarer
_CLASSES = np.array([_class_of(chr(c)) for c in range(0x3000)] + [OTHER], np.uint8)


def make_up(text):
    """Characters of the text in each class."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    return np.bincount(_CLASSES[np.minimum(points, 0x3000)], minlength=6).tolist()


def kind_problem(text, kind, words):
    """Why a document is not of the wanted kind: '' when it is. kind: hindi, hinglish, english, or
    any.
    """
    _, deva, latin, other, mark, space = make_up(text)
    letters = deva + latin + other
    if letters < MIN_LETTERS:
        return "too short"
    if letters + mark + space < MIN_TEXT * len(text):
        return "symbols and digits"
    if other > MAX_FOREIGN * letters:
        return "another script"
    if kind == "hindi" and deva < MIN_SHARE * letters:
        return "not in Devanagari"
    if kind in ("hinglish", "english") and latin < MIN_SHARE * letters:
        return "not in Latin letters"
    if kind == "hinglish":
        count = Counter(words.split())
        english, hinglish = (sum(count[w] for w in some) for some in (ENGLISH, HINGLISH))
        if english > 0.1 * count.total() and hinglish < 0.03 * count.total():
            return "English, not Hinglish"
    return ""


_WEIGHTS = np.random.default_rng(0).integers(2**63, 2**64, 64, np.uint64) | np.uint64(1)


def mix(h):
    """uint64 -> uint64: every bit in reaches every bit out."""
    h = (h ^ (h >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return h ^ (h >> np.uint64(32))


def word_hashes(words):
    """A uint64 for each word of a text of words with single spaces between them."""
    raw = np.frombuffer(words.encode(), np.uint8)
    starts = np.concatenate([[0], np.flatnonzero(raw == 32) + 1])
    place = np.arange(len(raw)) - np.repeat(starts, np.diff(np.append(starts, len(raw))))
    return mix(np.add.reduceat(raw * _WEIGHTS[place % 64], starts))


def shingles(hashes, n):
    """One uint64 for each run of n words."""
    h = np.zeros(max(len(hashes) - n + 1, 1), np.uint64)
    for i in range(min(n, len(hashes))):
        h = h * np.uint64(0x9E3779B97F4A7C15) + hashes[i:i + len(h)]
    return mix(h)


def repeats(text, hashes):
    """Does the text say the same again and again?"""
    if len(hashes) >= 12 and np.unique(hashes, return_counts=True)[1].max() > 0.4 * len(hashes):
        return True
    if len(hashes) >= 30 and len(np.unique(shingles(hashes, 3))) < 0.4 * (len(hashes) - 2):
        return True
    lines = [line for line in text.split("\n") if line.strip()]
    return len(lines) >= 4 and sum(map(len, set(lines))) < 0.7 * sum(map(len, lines))


class Cleaner:
    def __init__(self):
        self.repaired, self.lines = Counter(), Counter()   # places; lines
        self.dropped, self.dropped_bytes, self.kept, self.kept_bytes = Counter(), Counter(), 0, 0
        self.examples = {}  # rule -> (document or line, what is left)
        self.exact, self.seen = set(), np.zeros(BITS // 8, np.uint8)

    def note(self, rule, before, after=""):
        kept = self.examples.setdefault(rule, [])
        example = (before[:EXAMPLE_CHARS], after[:EXAMPLE_CHARS])
        if len(kept) < EXAMPLES and example not in kept:
            kept.append(example)

    def __call__(self, text, kind="any"):
        """The repaired document, or "" if a rule drops it. `text` is normalised."""
        fixed = self.repair(text)
        words = " ".join(_WORD.findall(fixed)).lower()
        rule = kind_problem(fixed, kind, words)
        if not rule:
            hashes = word_hashes(words)
            rule = "repeats itself" if repeats(fixed, hashes) else self.duplicate(words, hashes)
        size = len(text.encode())
        if rule:
            self.dropped[rule] += 1
            self.dropped_bytes[rule] += size
            self.note(rule, text)
            return ""
        self.kept, self.kept_bytes = self.kept + 1, self.kept_bytes + len(fixed.encode())
        return fixed

    def repair(self, text):
        for name, needles, pattern, by in REPAIRS:
            if any(needle in text for needle in needles):
                text, count = pattern.subn(by, text)
                if count:
                    self.repaired[name] += count
        low = text.lower()
        if not any(phrase in low for phrase in BOILERPLATE) and "\n" not in text:
            return text.strip()
        lines, before = [], None
        for line in text.split("\n"):
            rule = None
            if (
                len(line) < 200
                and len(line.split()) <= BOILERPLATE_WORDS
                and any(p in line.lower() for p in BOILERPLATE)
            ):
                rule = "boilerplate line"
            elif len(line) > 20 and line == before:
                rule = "line repeated"
            if rule:
                self.lines[rule] += 1
                self.note(rule, line)
            else:
                lines.append(line)
            before = line
        return "\n".join(lines).strip()

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
        h = shingles(hashes, SHINGLE)
        if len(h) > 50 * SAMPLE:
            h = h[h % np.uint64(SAMPLE) == 0]
        bits = np.unique(h // np.uint64(SAMPLE) % np.uint64(BITS))
        byte, bit = (
            bits >> np.uint64(3),
            np.left_shift(np.uint8(1), (bits & np.uint64(7)).astype(np.uint8)),
        )
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
        def bars(counts, unit, what="rule"):
            top = max([*counts.values(), 1])
            rows = (
                f'<tr><td>{html.escape(rule)}</td><td class="n">{count:,}</td><td><svg width="320" '
                'height="14" role="img">'
                f'<rect width="{max(1, 320 * count / top):.0f}" height="14" '
                'fill="#2a6f97"/></svg></td></tr>'
                for rule, count in sorted(counts.items(), key=lambda item: -item[1])
            )
            return (
                f'<table><tr><th>{what}</th><th>{unit}</th><th></th></tr>{"".join(rows)}</table>'
                if counts
                else "<p>none</p>"
            )

        examples = "".join(
            f'<h3>{html.escape(rule)}</h3>'
            + "".join(
                f'<blockquote lang="hi">{html.escape(before)}</blockquote>' for before, _ in some
            )
            for rule, some in self.examples.items()
        )
        page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>body{{font:15px/1.5 system-ui,"Noto Sans Devanagari",sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem}}
table{{border-collapse:collapse}}td,th{{padding:.15rem .7rem .15rem 0;text-align:left}}.n{{text-align:right}}
blockquote{{margin:.3rem 0;padding:.3rem .8rem;border-left:3px solid #bbb;white-space:pre-wrap;overflow-wrap:anywhere}}</style>
<h1>{html.escape(title)}</h1>
<p>{self.kept:,} of {self.kept + self.dropped.total():,} documents kept, {self.kept_bytes / 1e6:.2f} MB.</p>
<h2>Kept, by script</h2>{bars(scripts, "documents", "script")}
<h2>Documents dropped</h2>{bars(self.dropped, "documents")}
<h2>Bytes dropped</h2>{bars(self.dropped_bytes, "bytes")}
<h2>Lines dropped</h2>{bars(self.lines, "lines")}
<h2>Places repaired</h2>{bars(self.repaired, "places")}
<h2>Examples of what was dropped</h2>{examples or "<p>none</p>"}</html>
"""
        write_text(path, page)
