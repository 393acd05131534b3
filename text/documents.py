"""Documents out of text files: .txt (a blank line ends a document), .jsonl ({"text": ...}), both
also as .gz and .xz, and .parquet (a column "text"; needs pyarrow, which comes with datasets).

Used by prepare. An optional "prompt" in a .jsonl line becomes the line before the text. Memory
stays bounded, whatever the files look like; what cannot be read is a UserError with file, line and
the way out, never a guess.
"""
import gzip
import json
import lzma
import os
import re
import zlib
from pathlib import Path

from common.console import UserError, need

OPEN = {".gz": gzip.open, ".xz": lzma.open}
LINE_BYTES = 1 << 24  # a longer document is cut, so that a file of one line fits into memory
BLANK_LINES = re.compile(rb"(?:[ \t\r]*\n)+")
NAMED = 5                                  # files left out that a notice names


def kind_of(path):
    """'.txt', '.jsonl' or '.parquet' for a file that we can read, else None."""
    name = path.name.lower()
    if Path(name).suffix == ".parquet":
        return ".parquet"
    kind = Path(name.removesuffix(".gz").removesuffix(".xz")).suffix
    return kind if kind in (".txt", ".jsonl") else None


def find_files(inputs, log=print):
    """Files and folders (recursively, in the order of their names) -> files, each once.

    Of a folder, other kinds of file are left out. So are, with a notice, pipes and the like
    (reading one would wait without end) and links that lead out of the folder: only what was named
    is read. Naming a file of an unknown kind is an error.
    """
    files = {}
    left_out = []
    for given in map(Path, inputs):
        if not given.exists():
            raise UserError(f"--input {given}: no such file or folder")
        if given.is_dir():
            inside = sorted(texts_of_folder(given, left_out))
            if not inside:
                why = f"; left out: {', '.join(left_out[:NAMED])}" if left_out else ""
                raise UserError(
                    f"--input {given}: no .txt, .jsonl or .parquet file in this folder{why}"
                )
        else:
            check_named(given)
            inside = [given]
        for path in inside:
            files.setdefault(path.resolve(), path)
    if left_out:
        more = f" and {len(left_out) - NAMED} more" if len(left_out) > NAMED else ""
        names = ", ".join(left_out[:NAMED])
        log(f"notice: left out: {names}{more}; to read one, name it in --input")
    return list(files.values())


def check_named(path):
    """Dies if a file that was named cannot be read."""
    if not kind_of(path):
        raise UserError(
            f"--input {path}: unknown kind of file, not .txt or .jsonl (also .gz, .xz) or "
            ".parquet; rename or convert it"
        )
    if not path.is_file():
        raise UserError(
            f"--input {path}: not a plain file; for a pipe: cat {path} | "
            "python -m prepare --source files --input -"
        )


def texts_of_folder(folder, left_out):
    """The paths in a folder that are read; pipes and links out of it join left_out, with the
    reason.
    """
    home = folder.resolve()
    for top, subfolders, names in os.walk(folder):
        for path in (Path(top, name) for name in subfolders):
            if path.is_symlink() and not path.resolve().is_relative_to(home):
                left_out.append(f"{path} (a link out of the folder)")
        for path in (Path(top, name) for name in names):
            if not kind_of(path) or path.name.startswith("."):
                continue
            if path.is_symlink() and not path.resolve().is_relative_to(home):
                left_out.append(f"{path} (a link out of the folder)")
            elif not path.is_file():
                left_out.append(f"{path} (not a plain file)")
            else:
                yield path


def read_lines(path):
    """(line number, text); a line of more than LINE_BYTES comes in parts, empty lines in a row as
    one.
    """
    number = 0
    begins = True                              # does a line begin here, or go on?
    rest = b""                                 # the beginning of a letter that was cut
    open_file = OPEN.get(path.suffix.lower(), open)
    try:
        with open_file(path, "rb") as file:
            while raw := rest + file.readline(LINE_BYTES):
                if begins:
                    number += 1
                begins = raw.endswith(b"\n")
                rest = b""
                # perhaps inside a character: keep that back
                if len(raw) >= LINE_BYTES and raw[-1] >= 0x80:
                    last = start_of_last_letter(raw)
                    rest = raw[last:]
                    raw = raw[:last]
                yield number, raw.decode().removeprefix("\ufeff")
                if raw.endswith(b"\n") and not raw.strip():
                    number += skip_blank_lines(file)
    except UnicodeDecodeError as error:
        guess = "UTF-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "ITS_ENCODING"
        raise UserError(
            f"{path}, line {number}, byte {error.start} of the line: not valid UTF-8; convert the "
            "file "
            f"first: iconv -f {guess} -t UTF-8 {path.name} > new_{path.name}"
        ) from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"cannot read {path}, stopped after line {number}: {error}") from None


def start_of_last_letter(raw):
    """Where the last UTF-8 lead byte is; it is one of the last four."""
    return max(raw.rfind(bytes([lead]), -4) for lead in range(0xc2, 0xf5))


def skip_blank_lines(file):
    """Goes to the next line that is not empty, thousands of lines at a time -> how many it skipped.
    """
    count = 0
    while True:
        blank = BLANK_LINES.match(file.peek(1 << 16))
        if not blank:
            return count
        count += file.read(blank.end()).count(b"\n")


def read_documents(path, log=print):
    """The documents of one file as they stand there, not normalised, perhaps empty."""
    if kind_of(path) == ".parquet":
        yield from read_parquet(path)
        return
    records = kind_of(path) == ".jsonl"
    lines = []
    size = 0
    for number, line in read_lines(path):
        empty = not line.strip()
        if records:
            if not empty:
                yield parse_record(line, f"{path}, line {number}")
        elif not empty and size < LINE_BYTES:
            lines.append(line)
            size += len(line.encode())
        else:
            if not empty:
                log(f"notice: {path}, line {number}: a document is cut here, after {size:,} bytes")
            yield "".join(lines)
            lines = [line]
            size = len(line.encode())
    yield "".join(lines)


def read_parquet(path):
    """The column "text" of a parquet file, a batch of rows at a time."""
    need("pyarrow", f"to read {path}")
    from pyarrow import ArrowException, parquet
    try:
        with parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if "text" not in names:
                raise UserError(f'{path} has no column "text", but {", ".join(names)[:200]}')
            for batch in table.iter_batches(batch_size=256, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str | None):
                        raise UserError(f'{path}: the column "text" holds no text')
                    yield text or ""
    except UnicodeDecodeError as error:
        raise UserError(
            f'{path}: the column "text" holds bytes that are not valid UTF-8 ({error}); '
            "convert it first"
        ) from None
    except (OSError, ArrowException) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from None


def parse_record(line, where):
    """The text of one .jsonl line."""
    try:
        record = json.loads(line)
        text = record["text"]
        prompt = record.get("prompt") or ""
        if isinstance(text, str) and isinstance(prompt, str):
            return f"{prompt}\n{text}" if prompt else text
        why = '"text" and "prompt" must be strings'
    except (ValueError, RecursionError) as error:
        long = len(line.encode()) > LINE_BYTES - 8  # then this is only a part of the line
        why = f"longer than {LINE_BYTES:,} bytes" if long else f"not valid JSON ({error})"
    except (TypeError, KeyError, AttributeError):
        why = 'no "text"'
    raise UserError(f'{where}: {why}; each line must be an object like {{"text": "..."}}')
