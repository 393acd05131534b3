"""The built-in starter corpus: Hindi and Hinglish from our own grammar, so that the first run needs
no network.

    python -m text.starter.grammar --docs 5 --seed 0

It is named for what it is: synthetic text from the words and the sentences of text/starter/, not
real data. prepare offers it as `builtin` and the tests use it everywhere. A document is a pure
function of (seed, index): document 1,000 is made without the 999 before it, and no text changes
unless VERSION does. Everything is written once, in Devanagari; the Hinglish is the same sentence as
one of a few typists, each with spelling habits, would type it. So both scripts share one grammar.

`S कल place.o गया~S था=S` is a frame: Devanagari words are themselves, Latin words are slots (S the
subject, place a noun), `.x` asks for a form, and `~` and `=` make a word agree with a slot.
starter/__init__.py has the whole notation.

Notable: the order of the random draws is part of every text; a change of it changes the corpus.
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

VERSION = 1            # bump it whenever any text changes: a golden hash in the tests insists
NAME = "Aria starter corpus (synthetic)"
LICENCE = (
    "Written for Aria: the words, the frames and every text generated from them are this project's "
    "own work and carry its licence. No outside text is included."
)
STYLES = 32            # how many people type the Hinglish
# gender, then person 1 2 3, p plural or honorific, o oblique case
CLASSES = "m1 f1 m2 f2 m3 f3 mp fp mo fo".split()


def nfc(text):
    return unicodedata.normalize("NFC", text)


def pick(rnd, options):
    """One option. Built on random() alone, the one stream Python promises to keep."""
    return options[int(rnd() * len(options))]


# ---- word forms ----------------------------------------------------------------------------------
# Each rule moves the Devanagari form and its typed form together.

ROMAN = {}             # word -> how it is typed in Latin letters


def learn(word, roman):
    """Remember how a word (or phrase, word by word) is typed in Latin letters -> the word. A
    contradiction is a mistake in the tables.
    """
    for part, typed in zip(word.split(), roman.split(), strict=True):
        if ROMAN.setdefault(part, typed) != typed:
            raise ValueError(
                f"{part} is typed both {ROMAN[part]} and {typed}: keep one in starter/lexicon.py"
            )
    return word


def before_vowel(roman):
    """Without the vowel that people drop before an ending: nikal -> nikl(a), samajh -> samjh(o)."""
    return re.sub(r"(?<=[aeiou])([b-df-hj-np-tv-z]h?)a([b-df-hj-np-tv-z]h?)$", r"\1\2", roman)


# endings of the future by person: after a consonant, after a vowel, typed
FUTURE = {
    "1": ("ूँ", "ऊँ", "un"),
    "2": ("ो", "ओ", "o"),
    "3": ("े", "ए", "e"),
    "p": ("ें", "एँ", "en"),
}


def inflect(word, roman, cls, finite):
    """The form of a masculine singular word (अच्छा, गया, करेगा, है) that agrees with a class ->
    (word, roman).
    """
    gender, number = cls
    plural = number in "2po"           # तुम takes plural forms; an oblique masculine looks plural
    if word in lexicon.INVARIABLE.split():
        return word, roman
    if word in AUXILIARIES:
        return AUXILIARIES[word].get(cls) or AUXILIARIES[word][gender + "p"]
    if word.endswith(("ेगा", "एगा")):
        return inflect_future(word, roman, gender, number, plural)
    if not word.endswith(("ा", "हुआ")) or gender == "m" and not plural:
        return word, roman             # लाल, सुंदर never change

    nasal = ""
    if finite and gender == "f" and plural:
        nasal = "ं"                    # वे गईं, but वे गई थीं; typed without the nasal
    if word.endswith("िया"):
        if gender == "f":
            return word[:-3] + "ी" + nasal, roman[:-2]
        return word[:-2] + "ए", roman[:-1] + "e"

    # गया गए गई, हुआ हुए हुई have independent vowels
    independent = word.endswith(("या", "आ"))
    stem = word[:-2] if word.endswith("या") else word[:-1]
    if gender == "f":
        return stem + ("ई" if independent else "ी") + nasal, roman[:-1] + "i"
    return stem + ("ए" if independent else "े"), roman[:-1] + "e"


def inflect_future(word, roman, gender, number, plural):
    """करेगा -> करूँगा करोगे करेंगे."""
    sign, letter, latin = FUTURE.get(number, FUTURE["p"])
    base = roman[:-3]
    if number in "12":
        base = base.removesuffix("y")
    if gender == "f":
        end, latin_end = "ी", "i"
    elif plural:
        end, latin_end = "े", "e"
    else:
        end, latin_end = "ा", "a"
    vowel = sign if word[-3] == "े" else letter
    return word[:-3] + vowel + "ग" + end, base + latin + "g" + latin_end


def agreement(word, roman=None, prefix=""):
    """Table mark + class -> form of a word; each has the prefix (an object, perhaps नहीं)."""
    if roman is None:
        roman = ROMAN[word]
    table = {}
    for mark in "~=":
        for cls in CLASSES:
            form, typed = inflect(word, roman, cls, finite=mark == "=")
            table[mark + cls] = prefix + learn(form, typed)
    return table


def noun(word, roman, gender):
    """Entity of a noun: direct and oblique, singular and plural, and the class each of them asks
    for.
    """
    oblique, plural, oblique_plural = noun_forms(word, roman, gender)
    return {
        "": learn(word, roman),
        "o": learn(*oblique),
        "p": learn(*plural),
        "po": learn(*oblique_plural),
        "cls": gender + "3",
        "cls.p": gender + "p",
        "cls.o": gender + "o",
        "cls.po": gender + "o",
        "cls.i": gender + "1",         # what it says of itself
    }


def noun_forms(word, roman, gender):
    """Oblique singular, direct plural and oblique plural, each (word, roman)."""
    stem = word[:-1]
    typed = roman[:-1]
    if gender == "m":
        if word[-1] == "ा":             # लड़का लड़के लड़कों
            return (stem + "े", typed + "e"), (stem + "े", typed + "e"), (stem + "ों", typed + "on")
        many, typed_many = word + "ों", roman + "on"       # घर घरों
        if word[-1] == "ी":             # आदमी आदमियों
            many, typed_many = stem + "ियों", roman + "yon"
        elif word[-1] == "ू":           # आलू आलुओं
            many = stem + "ुओं"
        return (word, roman), (word, roman), (many, typed_many)
    if word.endswith("िया"):            # चिड़िया चिड़ियाँ
        return (word, roman), (word + "ँ", roman + "n"), (stem + "ों", typed + "on")
    if word[-1] == "ी":                 # लड़की लड़कियाँ
        return (word, roman), (stem + "ियाँ", roman + "yan"), (stem + "ियों", roman + "yon")
    # किताब किताबें, कविता कविताएँ
    short = before_vowel(roman)
    direct, oblique = ("एँ", "ओं") if word[-1] == "ा" else ("ें", "ों")
    return (word, roman), (word + direct, short + "ein"), (word + oblique, short + "on")


AGREEING_FORMS = ("ta", "ya", "ga", "na")


def verb(stem, roman):
    """The forms of a verb, each (word, roman): imperfective, perfective, future, infinitives,
    having done, imperatives.
    """
    vowel = stem[-1] in "ाआोूएी"
    short = before_vowel(roman)
    forms = {
        "": (stem, roman),
        "ta": (stem + "ता", roman + "ta"),
        "na": (stem + "ना", roman + "na"),
        "ne": (stem + "ने", roman + "ne"),
        "kar": (stem + "कर", roman + "kar"),
    }
    if vowel:
        forms["ya"] = (stem + "या", short + "ya")
        forms["ga"] = (stem + "एगा", short + "yega")
        forms["imp"] = (stem + "ओ", short + "o")
        forms["iye"] = (stem + "इए", short + "iye")
    else:
        forms["ya"] = (stem + "ा", short + "a")
        forms["ga"] = (stem + "ेगा", short + "ega")
        forms["imp"] = (stem + "ो", short + "o")
        forms["iye"] = (stem + "िए", short + "iye")
    for key, form, word, latin in IRREGULAR:
        if key == stem:
            forms[form] = (word, latin)
    for form, (word, latin) in forms.items():
        if form in AGREEING_FORMS:
            agreement(word, latin)
        else:
            learn(word, latin)
    return forms


def person(direct, roman, oblique, cls, pronoun=None):
    """Entity of somebody: direct, oblique, with ने को से पर, and the genitive, which agrees with what
    is owned.
    """
    learn(direct, roman)
    oblique = oblique or direct
    forms = {
        "": direct,
        "o": oblique,
        "ne": f"{oblique} ने",
        "ko": f"{oblique} को",
        "se": f"{oblique} से",
        "par": f"{oblique} पर",
        "cls": cls,
        "pronoun": pronoun,
        "age": "o" if pronoun == "hep" else "k",
    }
    return forms | owner("का", f"{oblique} ")


def owner(genitive, prefix=""):
    """The genitive of a person: ka is the table to agree with, ke and ki two of its cells."""
    table = agreement(genitive, prefix=prefix)
    return {"ka": table, "ke": table["~mo"], "ki": table["~f3"]}


def pronouns(key, direct, genitive, *cases):
    """The two entities (he, she) of a pronoun, whose cases are words of their own."""
    forms = dict(zip(("ne", "ko", "se", "par"), cases, strict=True))
    forms |= {"": direct, "pronoun": None, "age": "k"} | owner(genitive)
    return [forms | {"cls": gender + key[-1]} for gender in "mf"]


def activity(thing, cls, forms, age, when, where):
    """Entity of an activity (V): a verb with its object. Transitive perfectives agree with the
    object (ने).
    """
    entity = {
        "cls": cls or "m3",
        "trans": bool(cls),
        "age": age,
        "stem": forms[""][0],
        "when": when,
        "where": where,
    }
    for form, (word, roman) in forms.items():
        for mark, prefix in (("", thing), ("n", f"{thing} नहीं")):
            prefix = f"{prefix} ".lstrip()
            entity[mark + form] = prefix + word
            if form in AGREEING_FORMS:
                entity[mark + form + "="] = agreement(word, roman, prefix)
    return entity


# ---- tables: everything in text/starter/, expanded once at import --------------------------------

def split_rows(table, width):
    """Rows of whitespace-separated cells; `_` inside a cell is a space, `-` is an empty cell."""
    cells = []
    for cell in nfc(table).split():
        cells.append("" if cell == "-" else cell.replace("_", " "))
    if len(cells) % width:
        raise ValueError(
            f"a table of {width} columns has {len(cells)} cells, ending in {cells[-width:]}"
        )
    return [cells[i:i + width] for i in range(0, len(cells), width)]


def read_auxiliaries(table):
    """{auxiliary: {class: (word, roman)}}; a row has no columns for the oblique classes."""
    found = {}
    for word, *cells in split_rows(table, 17):
        pairs = zip(cells[0::2], cells[1::2], strict=True)
        found[word] = dict(zip(CLASSES, pairs, strict=False))
    return found


def read_activities(table):
    found = []
    for objects, stem, age, when, where in split_rows(table, 5):
        for item in objects.split("|"):
            thing, cls = item.split(":")
            found.append(
                activity(thing, cls, VERBS[stem], age, when.split("|"), where.split("|"))
            )
    return found


for _word, _roman in split_rows(lexicon.WORDS, 2):
    learn(_word, _roman)
AUXILIARIES = read_auxiliaries(lexicon.AUXILIARIES)
for _forms in AUXILIARIES.values():
    for _word, _roman in _forms.values():
        learn(_word, _roman)
for _word, _roman in split_rows(lexicon.AGREEING, 2):
    agreement(_word, _roman)
IRREGULAR = split_rows(lexicon.IRREGULAR, 4)
VERBS = {stem: verb(stem, roman) for stem, roman in split_rows(lexicon.VERBS, 2)}
NOUNS = {
    name: [noun(*row) for row in split_rows(table, 3)] for name, table in lexicon.NOUNS.items()
}
ADJECTIVES = {
    name: [{"": word, "=": agreement(word)} for word in nfc(words).split()]
    for name, words in lexicon.ADJECTIVES.items()
}
PRONOUNS = {row[0]: pronouns(*row) for row in split_rows(lexicon.PRONOUNS, 7)}
PEOPLE = {
    name: [person(*row) for row in split_rows(table, 5)] for name, table in lexicon.PEOPLE.items()
}
PEOPLE |= {"me": PRONOUNS["I1"], "we": PRONOUNS["wep"][:1], "you": PRONOUNS["you2"]}
ACTIVITIES = {"k": read_activities(lexicon.ACTIVITIES)}                # k young people: anything
ACTIVITIES["o"] = [act for act in ACTIVITIES["k"] if act["age"] == "a"]        # o elders


# ---- frames: parsed once into parts, each a string or a function of the document -----------------

class Doc(dict):
    """The slots of one document. A slot is filled when first read and then stays: the same people
    and places throughout.
    """

    def __init__(self, rnd):
        super().__init__()
        self.rnd = rnd

    def __missing__(self, name):
        base = name.rstrip("0123456789")
        if base != name and base in "ABSFT":    # A1 A2 A3: the same person as मैं तुम आप
            key = {"1": "I1", "2": "you2", "3": "youp"}[name[-1]]
            value = pronoun_of(key, self[base])
        elif name == "P":                       # the pronoun that stands for S
            who = self["S"]
            value = who if who["pronoun"] is None else pronoun_of(who["pronoun"], who)
        elif name in ("both", "pair"):          # S and F, A and B: feminine only if both are
            members = "SF" if name == "both" else "AB"
            genders = [self[who]["cls"][0] for who in members]
            value = {"cls": "fp" if genders == ["f", "f"] else "mp"}
        elif name in "VW":
            value = self.pick_activity(name)
        elif base in lexicon.NUMBERS:
            low, high, step = lexicon.NUMBERS[base]
            steps = (high - low) // step + 1
            value = {"": str(low + step * int(self.rnd() * steps))}
        else:
            value = self.pick_new(self.options(base))
        self[name] = value
        return value

    def pick_activity(self, name):
        """W is another activity than V."""
        doer = self.get("S") or self["A"]
        options = ACTIVITIES[doer["age"]]
        value = pick(self.rnd, options)
        while name == "W" and value["stem"] == self["V"]["stem"]:
            value = pick(self.rnd, options)
        return value

    def options(self, base):
        """Everything that can fill a slot."""
        if base == "F":
            return PEOPLE["name"]
        if base == "T":
            return PEOPLE["you"]
        if base in NOUNS:
            return NOUNS[base]
        if base in ADJECTIVES:
            return ADJECTIVES[base]
        return NOUNS[f"{base}_{self['S']['cls'][0]}"]           # role_m, role_f

    def pick_new(self, options):
        """One that fills no other slot yet."""
        value = pick(self.rnd, options)
        taken = [id(other) for other in self.values()]
        while id(value) in taken:
            value = pick(self.rnd, options)
        return value


def pronoun_of(key, who):
    """The pronoun in the gender of somebody."""
    return PRONOUNS[key]["mf".index(who["cls"][0])]


TOKEN = re.compile(
    r"""
    (?P<word> [\u0900-\u0963\u0971-\u097f-]+                # a Devanagari word
            | [A-Za-z]+\d* (?: \.[a-z]+ | /[A-Z] )? )       # or a slot, perhaps with its form
    (?: (?P<mark> [~=])
        (?P<ctrl> [A-Za-z]+\d* (?: \.[a-z]+ | _[A-Z] )? )?  # what the word agrees with
    )?
    """,
    re.VERBOSE,
)


def parse_control(ctrl):
    """The class a word must agree with: slot, slot.form, or V_S (the object of V if it takes ने,
    else S).
    """
    name, _, subject = ctrl.partition("_")
    if subject:
        return lambda doc: doc[name if doc[name]["trans"] else subject]["cls"]
    name, dot, form = ctrl.partition(".")
    key = "cls" + dot + form
    return lambda doc: doc[name][key]


def parse_token(match):
    """A word of a frame as a part: a string, or a function of the document."""
    word = match["word"]
    mark = match["mark"]
    ctrl = match["ctrl"] and parse_control(match["ctrl"])
    if not word[0].isascii():                   # a Devanagari word, perhaps agreeing
        if not mark:
            return learn(word, ROMAN[word])     # KeyError: a word missing from lexicon.WORDS
        table = agreement(word)
        return lambda doc: table[mark + ctrl(doc)]
    name, _, subject_of = word.partition("/")
    if subject_of:                              # S/V: S as the perfective of V wants it
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
    parts = []
    position = 0
    while position < len(text):
        if text[position] == "[":
            options, position = parse_choice(text, position)
            parts.append(lambda doc, options=options: fill(pick(doc.rnd, options), doc))
            continue
        match = TOKEN.match(text, position)
        if match:
            parts.append(parse_token(match))
            position = match.end()
        else:
            parts.append(text[position])
            position += 1

    merged = []             # neighbouring strings become one, so that filling touches fewer parts
    for part in parts:
        if merged and isinstance(part, str) and isinstance(merged[-1], str):
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)


def parse_choice(text, position):
    """The options of [a|b] that begins at a position, and the position after it."""
    options = []
    start = position + 1
    depth = 1
    while depth:
        position += 1
        if text[position] == "[":
            depth += 1
        elif text[position] == "]":
            depth -= 1
        if depth == 0 or depth == 1 and text[position] == "|":
            options.append(parse_frame(text[start:position]))
            start = position + 1
    return tuple(options), position + 1


def fill(parts, doc):
    return "".join([part if part.__class__ is str else part(doc) for part in parts])


def parse_kind(row):
    """(name, weights, cast, text) -> a kind of document: a list of stages, each with its
    alternatives.
    """
    name, devanagari, latin, cast, text = row
    stages = []                                 # (may be left out, alternatives)
    for line in nfc(text).strip().split("\n"):
        if line[0] in "*?":
            stages.append((line[0] == "?", []))
        line = line[2:].strip()
        _, alternatives = stages[-1]
        alternatives.append(line if line[0] == "@" else parse_frame(line))
    slots = []
    for item in cast.split():
        slot, pools = item.split(":")
        slots.append((slot, [PEOPLE[pool] for pool in pools.split(",")]))
    return {
        "weights": (devanagari, latin),
        "cast": slots,
        "stages": stages,
        "join": " ¶ " if name.startswith("talk") else " ",      # talk: one line for each turn
    }


def chooser(side):
    """All kinds, and the running sum of their weights (0 in Devanagari, 1 in Hinglish)."""
    kinds = list(KINDS.values())
    return kinds, list(accumulate(kind["weights"][side] for kind in kinds))


KINDS = {row[0]: parse_kind(row) for row in starter.KINDS}
CHOOSERS = [chooser(0), chooser(1)]


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
        if isinstance(frame, str):
            # @a,b: one of these kinds is told here, with the same people
            told_here = pick(rnd, frame[1:].split(","))
            sentences.append(tell(KINDS[told_here], doc))
            continue
        # V and W belong to a sentence, everything else to the document
        doc.pop("V", None)
        doc.pop("W", None)
        sentences.append(fill(frame, doc))
    return kind["join"].join(sentences)


# ---- Hinglish: the same words, typed by somebody -------------------------------------------------

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
        if word not in ROMAN:
            return word.replace("।", ".")
        typed = ROMAN[word]
        return self.habits.get(typed, typed).replace("-", " ")

    def __missing__(self, token):
        self[token] = "".join(self.type(part) for part in WORD.split(token))
        return self[token]


TYPISTS = [Typist(number) for number in range(STYLES)]


# ---- the stream ----------------------------------------------------------------------------------

def starter_document(seed, index, hinglish_ratio):
    """Document `index` of the stream `seed` -> (script, text); depends on nothing else."""
    rnd = random.Random(f"aria {seed} {index}").random
    latin = rnd() < hinglish_ratio
    kinds, ladder = CHOOSERS[latin]
    kind = kinds[bisect(ladder, rnd() * ladder[-1])]
    tokens = tell(kind, Doc(rnd)).split()
    if latin:
        typist = pick(rnd, TYPISTS)
        tokens = [typist[token] for token in tokens]
    script = "latin" if latin else "devanagari"
    return script, " ".join(tokens).replace(" ¶ ", "\n")


def starter_documents(seed, hinglish_ratio):
    """Endless stream of (script, text), script 'devanagari' or 'latin'; always the same for the
    same arguments.
    """
    return (starter_document(seed, index, hinglish_ratio) for index in count())


def describe():
    """What this text is, for meta.json and the cards."""
    return {
        "name": NAME,
        "version": VERSION,
        "licence": LICENCE,
        "kinds": len(KINDS),
        "note": "Generated by a grammar. Good for trying the tools; numbers measured on it say "
        "nothing about Hindi.",
    }


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m text.starter.grammar", description="Print documents of the starter corpus."
    )
    parser.add_argument("--docs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hinglish_ratio", type=float, default=0.35)
    args = parser.parse_args(argv)
    for index in range(args.docs):
        script, text = starter_document(args.seed, index, args.hinglish_ratio)
        print(f"[{index} {script}]\n{text}\n")


if __name__ == "__main__":
    run(main)
