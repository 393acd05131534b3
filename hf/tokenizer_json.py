"""A tokenizer of ours as the tokenizer.json that transformers and others read, with equal ids.

    text = tokenizer_json(tokenizer, framed)    # of text/tokenizer.py or text/gpt2.py
    names = special_pieces(tokenizer)

Used by hf/folder.py, which proves it on awkward strings. SentencePiece's BPE becomes a BPE with
byte fallback; our normaliser becomes a chain of replacements. The special pieces are in the
vocabulary, and no merge leads to them: "<s>" or "<mask>" in a text stays text.
"""
import json

from common.console import UserError
from text.gpt2 import END, Gpt2Tokenizer

SPACE = "\u2581"
MASK = "<mask>"

# The normaliser of text/tokenizer.py, in the words of the regular expressions there.
JOINER = "[\u200c\u200d]"
LETTER = "[\u0904-\u0939\u0958-\u0961\u0972-\u097f]"
EMOJI = "[\u2190-\u2bff\U0001f000-\U0001faff]"
# after a virama behind a letter (maybe with a nukta), and before a letter
SYLLABLE = f"(?<={LETTER}\u094d|{LETTER}\u093c\u094d)"
# after an emoji (maybe with a variation selector), and before one
PICTURE = f"(?<={EMOJI}|{EMOJI}\ufe0f)"
REPLACED = (
    ("\r\n", "\n"),
    ("\u00a0", " "),
    (SPACE, "_"),
    ("[\x00-\x08\x0b-\x1f\u202a-\u202e\ufeff\ufffe]", ""),
)
JOINERS = (
    # of a run that has a place, one joiner stays: the first, or between emoji a ZWJ
    (f"{SYLLABLE}\u200c{JOINER}*(?={LETTER})", "\u200c"),
    (f"{SYLLABLE}\u200d{JOINER}*(?={LETTER})", "\u200d"),
    (f"{PICTURE}\u200c*\u200d{JOINER}*(?={EMOJI})", "\u200d"),
    # any other goes
    (
        f"{JOINER}(?!(?<={LETTER}\u094d{JOINER}|{LETTER}\u093c\u094d{JOINER}){LETTER})"
        f"(?!(?<={EMOJI}\u200d|{EMOJI}\ufe0f\u200d){EMOJI})",
        "",
    ),
)


def special_pieces(tokenizer):
    """{id: name} of the pieces that no text is made of, the mask's included: SentencePiece has
    none, and as its pieces do not go across scripts, none is called like it.
    """
    if isinstance(tokenizer, Gpt2Tokenizer):
        return {tokenizer.eos_id: END, tokenizer.vocab_size: "<|mask|>"}
    pieces = pieces_of(tokenizer)
    assert MASK not in pieces
    special = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id)
    return {number: pieces[number] for number in special} | {tokenizer.vocab_size: MASK}


def tokenizer_json(tokenizer, framed):
    """The file's text. framed: the model was trained on pairs, so a prompt has an end, too, as in
    sampling.settings.opening.
    """
    if isinstance(tokenizer, Gpt2Tokenizer):
        found = json.loads(tokenizer.bpe.to_str())
    else:
        found = from_sentencepiece(tokenizer)
    names = special_pieces(tokenizer)
    found["model"]["vocab"][names[tokenizer.vocab_size]] = tokenizer.vocab_size
    frame = {names[tokenizer.bos_id]: tokenizer.bos_id}
    if framed:
        frame[names[tokenizer.pad_id]] = tokenizer.pad_id
    found["post_processor"] = framing(frame)
    return json.dumps(found, ensure_ascii=False, indent=1) + "\n"


def framing(frame):
    """Every text stands behind the first of these pieces {name: id}, and before the other, if there
    is one.
    """
    parts = [{"SpecialToken": {"id": name, "type_id": 0}} for name in frame]
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [parts[0], first, *parts[1:]],
        "pair": [parts[0], first, *parts[1:], second],
        "special_tokens": {
            name: {"id": name, "ids": [number], "tokens": [name]} for name, number in frame.items()
        },
    }


# ---- SentencePiece -------------------------------------------------------------------------------

def pieces_of(tokenizer):
    sp = tokenizer.sp
    return [sp.id_to_piece(number) for number in range(tokenizer.vocab_size)]


def from_sentencepiece(tokenizer):
    pieces = pieces_of(tokenizer)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": normaliser(),
        "pre_tokenizer": words(pieces),
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[tokenizer.unk_id],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: number for number, piece in enumerate(pieces)},
            "merges": merges(tokenizer, pieces),
        },
    }


def normaliser():
    """text.tokenizer.normalise, and SentencePiece's sign for a space."""
    steps = [replace(*pair) for pair in REPLACED]
    steps.append({"type": "NFC"})
    steps += [replace(*pair) for pair in JOINERS]
    steps.append({"type": "NFC"})
    steps.append(replace(" ", SPACE))
    return {"type": "Sequence", "normalizers": steps}


def replace(pattern, content):
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def words(pieces):
    """Where no piece goes across: around a line break, and before a space. Parts are encoded by
    themselves, which is faster.
    """
    steps = [split("\n", "Isolated")]
    if not any(SPACE in piece[1:] for piece in pieces):
        steps.append(split(SPACE, "MergedWithNext"))
    return {"type": "Sequence", "pretokenizers": steps}


def split(text, behaviour):
    return {
        "type": "Split",
        "pattern": {"String": text},
        "behavior": behaviour,
        "invert": False,
    }


def merges(tokenizer, pieces):
    """The pairs that become a piece, in the order in which SentencePiece tries them: the pieces by
    their score, each with all its cuts into two pieces.
    """
    sp = tokenizer.sp
    special = special_pieces(tokenizer)
    ordinary = {
        piece: sp.get_score(number)
        for number, piece in enumerate(pieces)
        if number not in special and not sp.is_byte(number) and piece != "\n"
    }
    scores = list(ordinary.values())
    if scores != [-float(rank) for rank in range(len(scores))]:
        raise UserError(
            "this checkpoint's tokenizer is no BPE of SentencePiece's (prepare --model_type "
            "unigram makes others), and only of BPE a tokenizer.json has equal ids: export it with "
            "--format onnx"
        )
    found = []
    for piece in ordinary:
        cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        known = [cut for cut in cuts if cut[0] in ordinary and cut[1] in ordinary]
        found += sorted(known, key=lambda cut: (-ordinary[cut[0]], -ordinary[cut[1]]))
    return [list(pair) for pair in found]
