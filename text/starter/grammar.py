"""The built-in starter corpus: Hindi and Hinglish from our own grammar, so that the first run needs no network.

    python -m corpus --docs 5 --seed 0

It is named for what it is: synthetic text from the words and the sentences of text/starter/, not real data.
prepare.py offers it as `builtin` and the tests use it everywhere. A document is a pure function of (seed, index): document
1,000 is made without the 999 before it, and no text changes unless VERSION does. Everything is written once, in Devanagari;
the Hinglish is the same sentence as one of a few typists, each with spelling habits, would type it. So both scripts share
one grammar.

`S कल place.o गया~S था=S` is a frame: Devanagari words are themselves, Latin words are slots (S the subject, place a noun),
`.x` asks for a form, and `~` and `=` make a word agree with a slot. starter/__init__.py has the whole notation.
"""
import argparse
import random
import re
import unicodedata
from bisect import bisect
from itertools import accumulate, count

from common.console import run
from text import starter
from text.starter import lexicon

VERSION = 1                                     # bump it whenever any text changes: a golden hash in the tests insists
NAME = "Aria starter corpus (synthetic)"
LICENCE = ("Written for Aria: the words, the frames and every text generated from them are this project's own work and "
           "carry its licence. No outside text is included.")
STYLES = 32                                     # how many people type the Hinglish
CLASSES = "m1 f1 m2 f2 m3 f3 mp fp mo fo".split()   # gender, then person 1 2 3, p plural or honorific, o oblique case


def nfc(text):
    return unicodedata.normalize("NFC", text)


def pick(rnd, options):
    """One option. Built on random() alone, the one stream Python promises to keep."""
    return options[int(rnd() * len(options))]


# ---- word forms: each rule moves the Devanagari form and its typed form together; ROMAN remembers every pair

ROMAN = {}


def learn(word, roman):
    """Remember how a word (or phrase, word by word) is typed in Latin letters; contradictions are usage errors in the tables."""
    for w, r in zip(word.split(), roman.split(), strict=True):
        if ROMAN.setdefault(w, r) != r:
            raise ValueError(f"{w} is typed both {ROMAN[w]} and {r}: keep one in starter/lexicon.py")
    return word


def before_vowel(roman):
    """The vowel people drop when an ending begins with one: nikal -> nikl(a), samajh -> samjh(o)."""
    return re.sub(r"(?<=[aeiou])([b-df-hj-np-tv-z]h?)a([b-df-hj-np-tv-z]h?)$", r"\1\2", roman)


FUTURE = {"1": ("ूँ", "ऊँ", "un"), "2": ("ो", "ओ", "o"), "3": ("े", "ए", "e"), "p": ("ें", "एँ", "en")}


def inflect(word, roman, cls, finite):
    """The form of a masculine singular word (अच्छा, गया, करेगा, है) that agrees with a class -> (word, roman)."""
    gender, number = cls
    plural = number in "2po"                    # तुम takes plural forms; an oblique masculine looks like its plural
    if word in lexicon.INVARIABLE.split():
        return word, roman
    if word in AUXILIARIES:
        return AUXILIARIES[word].get(cls) or AUXILIARIES[word][gender + "p"]
    if word.endswith(("ेगा", "एगा")):            # future: करेगा करूँगा करोगे करेंगे
        sign, letter, latin = FUTURE.get(number, FUTURE["p"])
        base = roman[:-3].removesuffix("y") if number in "12" else roman[:-3]
        end, latin_end = ("ी", "i") if gender == "f" else ("े", "e") if plural else ("ा", "a")
        return word[:-3] + (sign if word[-3] == "े" else letter) + "ग" + end, base + latin + "g" + latin_end
    if not word.endswith(("ा", "हुआ")) or gender == "m" and not plural:
        return word, roman                      # लाल, सुंदर never change
    nasal = "ं" if finite and gender == "f" and plural else ""      # वे गईं, but वे गई थीं; typed without the nasal
    if word.endswith("िया"):
        return (word[:-3] + "ी" + nasal, roman[:-2]) if gender == "f" else (word[:-2] + "ए", roman[:-1] + "e")
    full = word.endswith(("या", "आ"))            # गया गए गई, हुआ हुए हुई: independent vowels
    stem = word[:-2] if word.endswith("या") else word[:-1]
    if gender == "f":
        return stem + ("ई" if full else "ी") + nasal, roman[:-1] + "i"
    return stem + ("ए" if full else "े"), roman[:-1] + "e"


def agreement(word, roman=None, prefix=""):
    """Table mark + class -> form of a word; prefix (an object, perhaps नहीं) comes before it in every cell."""
    roman = ROMAN[word] if roman is None else roman
    return {mark + cls: prefix + learn(*inflect(word, roman, cls, mark == "=")) for mark in "~=" for cls in CLASSES}


def noun(word, roman, gender):
    """Entity of a noun: direct and oblique, singular and plural, and the class each of them asks for."""
    stem, r, long_i, long_u = word[:-1], roman[:-1], word[-1] == "ी", word[-1] == "ू"
    if gender == "m" and word[-1] == "ा":        # लड़का लड़के लड़कों
        forms = (stem + "े", r + "e"), (stem + "े", r + "e"), (stem + "ों", r + "on")
    elif gender == "m":                         # घर घरों, आदमी आदमियों, आलू आलुओं
        many = stem + "ियों" if long_i else stem + "ुओं" if long_u else word + "ों"
        forms = (word, roman), (word, roman), (many, roman + ("yon" if long_i else "on"))
    elif word.endswith("िया"):                   # चिड़िया चिड़ियाँ
        forms = (word, roman), (word + "ँ", roman + "n"), (stem + "ों", r + "on")
    elif long_i:                                # लड़की लड़कियाँ
        forms = (word, roman), (stem + "ियाँ", roman + "yan"), (stem + "ियों", roman + "yon")
    else:                                       # किताब किताबें, कविता कविताएँ
        r, end = before_vowel(roman), ("एँ", "ओं") if word[-1] == "ा" else ("ें", "ों")
        forms = (word, roman), (word + end[0], r + "ein"), (word + end[1], r + "on")
    entity = {"": learn(word, roman), "o": learn(*forms[0]), "p": learn(*forms[1]), "po": learn(*forms[2])}
    return entity | {"cls" + form: gender + number for form, number in
                     (("", "3"), (".p", "p"), (".o", "o"), (".po", "o"), (".i", "1"))}      # .i: what it says of itself


AGREEING_FORMS = ("ta", "ya", "ga", "na")


def verb(stem, roman):
    """The forms of a verb, each (word, roman): imperfective, perfective, future, infinitives, having done, imperatives."""
    vowel, short = stem[-1] in "ाआोूएी", before_vowel(roman)
    forms = {"": (stem, roman), "ta": (stem + "ता", roman + "ta"), "na": (stem + "ना", roman + "na"),
             "ne": (stem + "ने", roman + "ne"), "kar": (stem + "कर", roman + "kar"),
             "ya": (stem + ("या" if vowel else "ा"), short + ("ya" if vowel else "a")),
             "ga": (stem + ("एगा" if vowel else "ेगा"), short + ("yega" if vowel else "ega")),
             "imp": (stem + ("ओ" if vowel else "ो"), short + "o"),
             "iye": (stem + ("इए" if vowel else "िए"), short + "iye")}
    forms |= {form: (word, latin) for key, form, word, latin in IRREGULAR if key == stem}
    for form, (word, latin) in forms.items():
        agreement(word, latin) if form in AGREEING_FORMS else learn(word, latin)
    return forms


def person(direct, roman, oblique, cls, pronoun=None):
    """Entity of somebody: direct, oblique, with ने को से पर, and the genitive, which agrees with what is owned."""
    learn(direct, roman)
    oblique = oblique or direct
    forms = {"": direct, "o": oblique, "ne": f"{oblique} ने", "ko": f"{oblique} को", "se": f"{oblique} से",
             "par": f"{oblique} पर", "cls": cls, "pronoun": pronoun, "age": "o" if pronoun == "hep" else "k"}
    return forms | owner("का", f"{oblique} ")


def owner(genitive, prefix=""):
    """The genitive of a person: ka is the table to agree with, ke and ki two of its cells."""
    table = agreement(genitive, prefix=prefix)
    return {"ka": table, "ke": table["~mo"], "ki": table["~f3"]}


def pronouns(key, direct, genitive, *cases):
    """The two entities (he, she) of a pronoun, whose cases are words of their own."""
    cases = dict(zip(("ne", "ko", "se", "par"), cases, strict=True))
    return [{"": direct, "cls": gender + key[-1], "pronoun": None, "age": "k"} | cases | owner(genitive) for gender in "mf"]


def activity(thing, cls, forms, age, when, where):
    """Entity of an activity (V): a verb with its object. Transitive perfectives agree with the object (ने)."""
    entity = {"cls": cls or "m3", "trans": bool(cls), "age": age, "stem": forms[""][0], "when": when, "where": where}
    for form, (word, roman) in forms.items():
        for mark, prefix in (("", thing), ("n", f"{thing} नहीं")):
            prefix = f"{prefix} ".lstrip()
            entity[mark + form] = prefix + word
            if form in AGREEING_FORMS:
                entity[mark + form + "="] = agreement(word, roman, prefix)
    return entity


# ---- tables: everything in text/starter/, expanded once at import

def split_rows(table, width):
    """Rows of whitespace-separated cells; `_` inside a cell is a space, `-` is an empty cell."""
    cells = [("" if cell == "-" else cell.replace("_", " ")) for cell in nfc(table).split()]
    if len(cells) % width:
        raise ValueError(f"a table of {width} columns has {len(cells)} cells, ending in {cells[-width:]}")
    return [cells[i:i + width] for i in range(0, len(cells), width)]


for _word, _roman in split_rows(lexicon.WORDS, 2):
    learn(_word, _roman)
AUXILIARIES = {row[0]: dict(zip(CLASSES, zip(row[1::2], row[2::2], strict=True), strict=False))
               for row in split_rows(lexicon.AUXILIARIES, 17)}
for _pair in (pair for forms in AUXILIARIES.values() for pair in forms.values()):
    learn(*_pair)
for _word, _roman in split_rows(lexicon.AGREEING, 2):
    agreement(_word, _roman)
IRREGULAR = split_rows(lexicon.IRREGULAR, 4)
VERBS = {stem: verb(stem, roman) for stem, roman in split_rows(lexicon.VERBS, 2)}
NOUNS = {name: [noun(*row) for row in split_rows(table, 3)] for name, table in lexicon.NOUNS.items()}
ADJECTIVES = {name: [{"": word, "=": agreement(word)} for word in nfc(words).split()]
              for name, words in lexicon.ADJECTIVES.items()}
PRONOUNS = {row[0]: pronouns(*row) for row in split_rows(lexicon.PRONOUNS, 7)}
PEOPLE = {name: [person(*row) for row in split_rows(table, 5)] for name, table in lexicon.PEOPLE.items()}
PEOPLE |= {"me": PRONOUNS["I1"], "we": PRONOUNS["wep"][:1], "you": PRONOUNS["you2"]}
ACTIVITIES = [activity(thing, cls, VERBS[stem], age, when.split("|"), where.split("|"))
              for objects, stem, age, when, where in split_rows(lexicon.ACTIVITIES, 5)
              for thing, cls in (item.split(":") for item in objects.split("|"))]
ACTIVITIES = {"k": ACTIVITIES, "o": [act for act in ACTIVITIES if act["age"] == "a"]}   # k young: anything; o elders


# ---- frames: parsed once into parts, each a string or a function of the document

class Doc(dict):
    """The slots of one document. A slot is filled when first read and then stays: the same people and places throughout."""

    def __init__(self, rnd):
        super().__init__()
        self.rnd = rnd

    def __missing__(self, name):
        base = name.rstrip("0123456789")
        if base != name and base in "ABSFT":     # A1 A2 A3: the same person as मैं तुम आप
            options = PRONOUNS[{"1": "I1", "2": "you2", "3": "youp"}[name[-1]]]
            value = options["mf".index(self[base]["cls"][0])]
        elif name == "P":                       # the pronoun that stands for S
            who = self["S"]
            value = who if who["pronoun"] is None else PRONOUNS[who["pronoun"]]["mf".index(who["cls"][0])]
        elif name in ("both", "pair"):          # S and F, A and B: feminine only if both are
            group = [self[who]["cls"][0] for who in ("SF" if name == "both" else "AB")]
            value = {"cls": "fp" if group == ["f", "f"] else "mp"}
        elif name in "VW":
            value = pick(self.rnd, ACTIVITIES[(self.get("S") or self["A"])["age"]])
            while name == "W" and value["stem"] == self["V"]["stem"]:
                value = pick(self.rnd, ACTIVITIES[(self.get("S") or self["A"])["age"]])
        elif base in lexicon.NUMBERS:
            low, high, step = lexicon.NUMBERS[base]
            value = {"": str(low + step * int(self.rnd() * ((high - low) // step + 1)))}
        else:
            options = PEOPLE[{"F": "name", "T": "you"}[base]] if base in "FT" else NOUNS.get(base) or \
                ADJECTIVES.get(base) or NOUNS[f"{base}_{self['S']['cls'][0]}"]         # role_m, role_f
            value, taken = pick(self.rnd, options), [id(v) for v in self.values()]
            while id(value) in taken:
                value = pick(self.rnd, options)
        self[name] = value
        return value


TOKEN = re.compile(r"(?P<word>[\u0900-\u0963\u0971-\u097f-]+|[A-Za-z]+\d*(?:\.[a-z]+|/[A-Z])?)"
                   r"(?:(?P<mark>[~=])(?P<ctrl>[A-Za-z]+\d*(?:\.[a-z]+|_[A-Z])?))?")


def parse_control(ctrl):
    """The class a word must agree with: slot, slot.form, or V_S (the object of V if it takes ने, else S)."""
    name, _, subject = ctrl.partition("_")
    if subject:
        return lambda doc: doc[name]["cls"] if doc[name]["trans"] else doc[subject]["cls"]
    name, dot, form = ctrl.partition(".")
    key = "cls" + dot + form
    return lambda doc: doc[name][key]


def parse_token(match):
    word, mark, ctrl = match["word"], match["mark"], match["ctrl"] and parse_control(match["ctrl"])
    if not word[0].isascii():                   # a Devanagari word, perhaps agreeing
        if not mark:
            return learn(word, ROMAN[word])     # KeyError: a word missing from lexicon.WORDS
        table = agreement(word)
        return lambda doc: table[mark + ctrl(doc)]
    name, _, subject_of = word.partition("/")
    if subject_of:                              # S/V: S as the perfective of V wants it, with or without ने
        return lambda doc: doc[name]["ne" if doc[subject_of]["trans"] else ""]
    name, _, form = word.partition(".")
    if mark:
        if form != "ka":
            form += "="
        return lambda doc: doc[name][form][mark + ctrl(doc)]
    if form == "ka":
        return lambda doc: doc[name]["ka"]["~m3"]
    if form in ("when", "where"):
        return lambda doc: pick(doc.rnd, doc[name][form])
    return lambda doc: doc[name][form]


def parse_frame(text):
    """A frame as a list of parts; [a|b] becomes a part that chooses, nested as deep as you like."""
    parts, position = [], 0
    while position < len(text):
        if text[position] == "[":
            depth, start, options = 1, position + 1, []
            while depth:
                position += 1
                depth += {"[": 1, "]": -1}.get(text[position], 0)
                if depth == 1 and text[position] == "|" or depth == 0:
                    options.append(parse_frame(text[start:position]))
                    start = position + 1
            parts.append(lambda doc, options=tuple(options): fill(pick(doc.rnd, options), doc))
            position += 1
            continue
        match = TOKEN.match(text, position)
        parts.append(parse_token(match) if match else text[position])
        position = match.end() if match else position + 1
    merged = []                                 # neighbouring strings become one, so that filling touches fewer parts
    for part in parts:
        if merged and isinstance(part, str) and isinstance(merged[-1], str):
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)


def fill(parts, doc):
    return "".join([part if part.__class__ is str else part(doc) for part in parts])


def parse_kind(row):
    """(name, weights, cast, text) -> a kind of document: a list of stages, each with its alternatives."""
    name, devanagari, latin, cast, text = row
    stages = []                                 # (may be left out, alternatives)
    for line in nfc(text).strip().split("\n"):
        if line[0] in "*?":
            stages.append((line[0] == "?", []))
        line = line[2:].strip()
        stages[-1][1].append(line if line[0] == "@" else parse_frame(line))
    cast = [(slot, [PEOPLE[pool] for pool in pools.split(",")])
            for slot, pools in (item.split(":") for item in cast.split())]
    return {"weights": (devanagari, latin), "cast": cast, "stages": stages,
            "join": " ¶ " if name.startswith("talk") else " "}          # talk: one line for each turn


KINDS = {row[0]: parse_kind(row) for row in starter.KINDS}
CHOOSERS = [(list(KINDS.values()), list(accumulate(kind["weights"][side] for kind in KINDS.values())))
            for side in (0, 1)]                 # Devanagari, Latin: kinds and the running sum of their weights


def tell(kind, doc):
    """One document of a kind as spaced text in Devanagari; ¶ marks a line break."""
    rnd = doc.rnd
    for slot, pools in kind["cast"]:
        while slot not in doc or slot == "B" and doc["B"] is doc.get("A"):
            doc[slot] = pick(rnd, pick(rnd, pools))
    sentences = []
    for optional, ways in kind["stages"]:
        if optional and rnd() < 0.5:
            continue
        frame = pick(rnd, ways)
        if frame.__class__ is str:              # @a,b: one of these kinds is told here, with the same people
            sentences.append(tell(KINDS[pick(rnd, frame[1:].split(","))], doc))
            continue
        doc.pop("V", None), doc.pop("W", None)  # V and W belong to a sentence, everything else to the document
        sentences.append(fill(frame, doc))
    return kind["join"].join(sentences)


# ---- Hinglish: the same words, typed by somebody

WORD = re.compile(r"([\u0900-\u0963\u0971-\u097f]+(?:-[\u0900-\u0963\u0971-\u097f]+)*)")


class Typist(dict):
    """Devanagari token -> what this person types. Built token by token, punctuation included."""

    def __init__(self, number):
        super().__init__()
        rnd = random.Random(f"typist {number}").random
        self.habits = {}
        for habit in lexicon.SPELLINGS.strip().split("\n"):
            rows = [option.split() for option in habit.split("|")]
            self.habits |= dict(zip(rows[0], pick(rnd, rows), strict=True))

    def type(self, word):
        return self.habits.get(ROMAN[word], ROMAN[word]).replace("-", " ") if word in ROMAN else word.replace("।", ".")

    def __missing__(self, token):
        self[token] = "".join(self.type(part) for part in WORD.split(token))
        return self[token]


TYPISTS = [Typist(number) for number in range(STYLES)]


# ---- the stream

def starter_document(seed, index, hinglish_ratio):
    """Document `index` of the stream `seed` -> (script, text); depends on nothing else."""
    rnd = random.Random(f"aria {seed} {index}").random
    latin = rnd() < hinglish_ratio
    kinds, ladder = CHOOSERS[latin]
    tokens = tell(kinds[bisect(ladder, rnd() * ladder[-1])], Doc(rnd)).split()
    if latin:
        tokens = map(pick(rnd, TYPISTS).__getitem__, tokens)
    return "latin" if latin else "devanagari", " ".join(tokens).replace(" ¶ ", "\n")


def starter_documents(seed, hinglish_ratio):
    """Endless stream of (script, text), script 'devanagari' or 'latin'; always the same for the same arguments."""
    return (starter_document(seed, index, hinglish_ratio) for index in count())


def describe():
    """What this text is, for meta.json and the cards."""
    return {"name": NAME, "version": VERSION, "licence": LICENCE, "kinds": len(KINDS),
            "note": "Generated by a grammar. Good for trying the tools; numbers measured on it say nothing about Hindi."}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m corpus", description="Print documents of the starter corpus.")
    parser.add_argument("--docs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hinglish_ratio", type=float, default=0.35)
    args = parser.parse_args(argv)
    for index in range(args.docs):
        script, text = starter_document(args.seed, index, args.hinglish_ratio)
        print(f"[{index} {script}]\n{text}\n")


if __name__ == "__main__":
    run(main)
