"""Strings on which two tokenizers fall apart if they can: random ones, the same for the same seed.

Used by hf/folder.py, whose tokenizer.json must give our ids, and by tests. Half a surrogate pair is
in none of them, as the package tokenizers takes no such string; nor are signs that Unicode has only
since 2021, which its tables lack: two of them on one letter may stay in another order there.
"""
import random

SPECIAL = ("<s>", "</s>", "<pad>", "<unk>", "<mask>", "<0x41>", "<0x0A>", "\u2581", "<|endoftext|>")
SPACES = (" ", "  ", "\n", "\r\n", "\r", "\t", "\u00a0", "\u2003", "\u2028", "\ufeff", "\u200b")
JOINERS = ("\u200c", "\u200d", "\u200d\u200c", "\u200c\u200d", "\u200d\u200d")
SIGNS = ("\u094d", "\u093c", "\u093e", "\u093f", "\u0902", "\u0301", "\u0323", "\ufe0f", "\u20e3")
CONTROLS = ("\x00", "\x07", "\x1b[31m", "\x7f", "\u0085", "\u202e", "\u202a", "\ufffe", "\ufffd")
LETTERS = "कखगघचजटडतदनपबमयरलवशसहअआइउएऑक़ड़ढ़ऩऱऴज़०१२३"
EMOJI = "👩🚀❤👍🏽🇮🇳😀"
FOREIGN = "éåÅﬁＡ½①ßİıǅ漢字한글กำעבαβ가" "\u0b95\u0bca\u1e9b\u0323\U0001d160\U00011099\U000110ba"
ASCII = "abcdefghij ABC 0123456789 .,!?<>|_-'\"\\/"
RANGES = ((0x20, 0x7e), (0xa0, 0x24f), (0x300, 0x36f), (0x900, 0x97f), (0x980, 0xbff),
          (0x1e00, 0x1eff), (0x2000, 0x206f), (0x2190, 0x2bff), (0x3040, 0x30ff), (0x4e00, 0x4fff),
          (0xac00, 0xad00), (0xf900, 0xfaff), (0xfb00, 0xfdff), (0xfe00, 0xffff),
          (0x10000, 0x10e7f), (0x1f000, 0x1faff), (0x20000, 0x20100), (0xe0000, 0xe01ef))


def awkward_strings(count, seed):
    """So many strings of up to 40 parts."""
    random_of = random.Random(seed)
    found = []
    for _ in range(count):
        parts = random_of.choices(
            (SPECIAL, SPACES, JOINERS, SIGNS, CONTROLS, LETTERS, EMOJI, FOREIGN, ASCII, RANGES),
            weights=(1, 4, 4, 5, 1, 12, 3, 3, 8, 4),
            k=random_of.randint(0, 40),
        )
        found.append("".join(letter_of(part, random_of) for part in parts))
    return found


def letter_of(part, random_of):
    """One of a part's choices; of RANGES, any letter in one of them."""
    chosen = random_of.choice(part)
    if isinstance(chosen, str):
        return chosen
    return chr(random_of.randint(*chosen))
