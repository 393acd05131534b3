"""The measured speed of other engines, for edge_benchmark --peer.

Used by edge_benchmark.py. A file holds one of
* {"name": "llama.cpp Q8_0", "tok_s": 523.0, "nats": 2.1, "note": "prompt of 64"}, of which nats
  (nats/token of its text under the same n-gram model) and note may be null or left out;
* a list of these;
* what benchmarks/decode_peers.py prints, whose last line is its document. Of it the rows with the
  shortest prompt are taken, and not those of Aria.
"""
from dataclasses import dataclass
from pathlib import Path

from common.console import UserError
from common.files import strict_json


@dataclass
class Peer:
    """Another engine's point in the picture of --grid."""
    name: str
    tok_s: float
    nats: float = None      # None: its text was not judged
    note: str = ""


def read_peers(paths):
    """Files of --peer -> [Peer]. Trouble is a UserError that names the file."""
    found = []
    for path in paths:
        value = document_in(path)
        try:
            if isinstance(value, dict) and "rows" in value:
                found += of_shortest_prompt(value)
            elif isinstance(value, list):
                found += [peer_of(entry) for entry in value]
            else:
                found.append(peer_of(value))
        except ValueError as error:
            raise UserError(
                f'--peer {path}: {error}; write {{"name": "llama.cpp Q8_0", "tok_s": 523, "nats": '
                'null} or give the output of benchmarks/decode_peers.py'
            ) from None
    return found


def document_in(path):
    """The JSON of a whole file, or of its last line."""
    if Path(path).is_dir():
        raise UserError(
            f"--peer {path} is a folder: measure what lies in it by python "
            f"benchmarks/decode_peers.py --peers {path}, and give the file with its output"
        )
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UserError(f"cannot read --peer {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"--peer {path} is not text in UTF-8") from None
    try:
        return strict_json(text)
    except (ValueError, RecursionError) as error:
        whole = error
    try:
        return strict_json(text.rpartition("\n")[2])
    except (ValueError, RecursionError):
        raise UserError(f"--peer {path} is not valid JSON: {whole}") from None


def peer_of(entry):
    """An entry of a file -> Peer. Trouble is a ValueError."""
    if not isinstance(entry, dict):
        raise ValueError("an entry is no JSON object")
    name = entry.get("name")
    if not isinstance(name, str) or not name.strip():
        raise ValueError('an entry has no "name"')
    speed = entry.get("tok_s")
    if not is_positive(speed):
        raise ValueError(f'"tok_s" of {name} is not a number above 0')
    nats = entry.get("nats")
    if nats is not None and not is_positive(nats):
        raise ValueError(f'"nats" of {name} is neither a number above 0 nor null')
    note = entry.get("note")
    if note is not None and not isinstance(note, str):
        raise ValueError(f'"note" of {name} is no text')
    return Peer(name, speed, nats, note or "")


def is_positive(value):
    """Is this a number above 0 that an axis can show? JSON's true is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value < 1e9


def of_shortest_prompt(document):
    """The document of benchmarks/decode_peers.py -> [Peer], of its shortest prompt."""
    rows = document["rows"]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError('"rows" is no list of objects')
    others = [row for row in rows if not str(row.get("name")).startswith("aria ")]
    if not others:
        raise ValueError('"rows" has no other engine')
    if not all(is_positive(row.get("prompt")) and "tok_per_s" in row for row in others):
        raise ValueError('a row has no "prompt" or no "tok_per_s"')
    shortest = min(row["prompt"] for row in others)
    note = f"prompt of {shortest:g}"
    params = document.get("params")
    if is_positive(params):
        note = f"{params / 1e6:.1f}M parameters, {note}"
    threads = document.get("threads")
    if threads == 1:
        note += ", 1 thread"
    elif is_positive(threads):
        note += f", {threads:g} threads"
    found = []
    for row in others:
        if row["prompt"] == shortest:
            found.append(peer_of(dict(name=row.get("name"), tok_s=row["tok_per_s"], note=note)))
    return found
