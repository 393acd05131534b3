"""What a word in Latin letters probably means, without a model: out of the tables of words that
text/romanise.py types, else letter by letter.

    in_devanagari("mujhe")                   # मुझे

A guess for sampling/left_to_right.py, where a model verifies it: 71 % of the words of real text are
right, by the rules alone 57 %. Part of the baseline of benchmarks/transliterate_eval.py.
"""
import re
import unicodedata

from text.romanise import CONSONANTS, LOANS, NASALS, SIGNS, STARTER, TYPED, VIRAMA, VOWELS

NASAL = NASALS[-1]
BEHIND = ".,;:?!\"')"

# the vowel that letters stand for, and the commonest letter for each sound
SOUNDS = dict(aa="A", ee="I", ii="I", oo="U", uu="U", ai="E", au="O", a="a", i="i", u="u", e="e",
              o="o", ei="e")
LETTERS = {sound: letter for letter, sound in reversed(CONSONANTS.items())}
LETTERS |= dict(n="न", t="त", th="थ", d="द", dh="ध", f="फ", q="क", x="क्स", c="क", w="व", v="व",
                z="ज", ksh="क्ष", gy="ज्ञ")
STANDING = {sound: letter for letter, sound in reversed(VOWELS.items())} | dict(e="ए", o="ओ")
HANGING = {sound: sign for sign, sound in reversed(SIGNS.items())}
HANGING |= dict(e="\u0947", o="\u094b", a="")
LATIN_SOUND = re.compile("|".join(sorted([*SOUNDS, *LETTERS], key=len, reverse=True)) + "|.")
AT_THE_END = dict(a="A", i="I", u="U")              # short vowels are long there
COMMON = """
ki की  tha था  thi थी  the थे  di दी  li ली  din दिन  or और  a आ  na न  ka का  ke के  ja जा
ga गा  he है  wo वो  ye ये  hi ही  bhi भी  to तो
liye लिए  kiya किया  diya दिया  gaya गया  kaha कहा  raha रहा  rahi रही  rahe रहे
"""


def known_words():
    """{spelling: word} of the tables; of words that are spelled alike the first one."""
    found = dict(entry.split() for entry in re.split("  +|\n", COMMON.strip()))
    for table in (TYPED, STARTER, LOANS):
        for word, spellings in table.items():
            for spelling in spellings.split("/"):
                found.setdefault(spelling, unicodedata.normalize("NFC", word))
    return found


KNOWN = known_words()


def in_devanagari(word):
    """The commonest meaning of a word in small Latin letters, with what stands behind it."""
    letters = word.rstrip(BEHIND)
    meant = KNOWN.get(letters) or by_rule(letters)
    return meant + word[len(letters):].replace(".", "।")


def by_rule(word):
    """A Latin word letter by letter."""
    sounds = LATIN_SOUND.findall(word)
    out = ""
    before = ""                          # the consonant that stands here without its vowel
    for place, sound in enumerate(sounds):
        after = sounds[place + 1:]
        if sound in SOUNDS:
            vowel = SOUNDS[sound]
            if not after:
                vowel = AT_THE_END.get(vowel, vowel)
            out += HANGING[vowel] if before else STANDING[vowel]
            before = ""
        elif sound not in LETTERS:
            out += sound
            before = ""
        elif is_nasal(sound, sounds[:place], after):
            out += NASAL
            before = ""
        else:
            if before and is_joined(before, sound, out, after):
                out += VIRAMA
            out += LETTERS[sound]
            before = sound
    return out


def is_nasal(sound, before, after):
    """Is an n or m only the nasal of the vowel before it?"""
    if not before or before[-1] not in SOUNDS:
        return False
    if sound == "n" and not after:
        return before[-1] in ("o", "e", "ei", "ai")
    if not after or after[0] in SOUNDS:
        return False
    return sound == "n" and after[0][0] in "gcjtds" or sound == "m" and after[0][0] in "pb"


def is_joined(before, sound, out, after):
    """Do two consonants that meet share a vowel? Else there is one between them that nobody says.
    """
    if len(out) == 1 or before[0] == sound[0]:      # at the beginning; tt, cch
        return True
    if not after:
        return before == "r"
    return sound == "y" or sound == "r" and before in "p t d k g b s sh bh dh".split() or (
        before in ("s", "sh") and sound in ("t", "th"))
