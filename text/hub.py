"""Text from the Hugging Face hub: one table of pinned sources, streamed into data/raw, resumable,
added up to a budget.

Used by prepare (--source hindi, --source fineweb):
    files = download("hindi", folder, hinglish_ratio=0.35, chars=60_000_000, log=print)

Nothing but plain files is read (no loading scripts, ever). A source that is gone or gated is left
out with a notice; one that breaks is tried again with growing waits and keeps what it gave; one
that gives nothing is left out after PATIENCE seconds. The library's calls run in a thread, so that
a hub that hangs is noticed, and Ctrl-C answered, whatever it does there. Each source is one file,
.part until it is whole, with a .state.json beside it: what it is, how much there is, and where the
stream stopped, so that a second run continues there.
"""
import contextlib
import errno
import json
import os
import threading
import time
from dataclasses import asdict, dataclass

from tqdm import tqdm

from common.console import UserError, need
from common.files import read_json, write_json

WAITS = (1, 2, 4, 8, 16)  # seconds before the next try; one new row, and they start over
SYNC_ROWS = 1000                           # rows between two states on disk
BATCH_ROWS, BATCH_SECONDS = 100, 1         # what is read before the main thread has it
QUIET = 2                                  # seconds of waiting that need no line
PROBE = 5  # seconds in which a hub that works answers a small question
PATIENCE = 20                              # seconds that a source may take to say anything at all
SLOWLY = 600  # seconds for one batch, from a hub that answers small questions meanwhile
REFUSED = (401, 403, 404, 410)             # HTTP: not there, or not for us


@dataclass(frozen=True)
class Source:
    """revision None: the newest at the first download, recorded then and kept. share: of what its
    kind still misses.
    """
    name: str
    kind: str                              # hindi, hinglish, english
    repo: str
    revision: str | None
    licence: str  # as its card says; read the card before you publish anything
    config: str | None = None
    data_dir: str | None = None
    split: str = "train"
    field: str = "text"
    share: float = 1.0


# The pins are those that public projects record for these sets. None of them was loaded on the
# machine this was written on.
HINMIX = dict(
    kind="hinglish",
    repo="kartikagg98/HINMIX_hi-en",
    revision="5735b2d0737980b03c50ee643ad8ac31da5d8531",
    licence="Apache-2.0",
)
SOURCES = {
    "hindi": (
        Source(
            name="sangraha",
            kind="hindi",
            repo="ai4bharat/sangraha",
            revision=None,
            licence="CC BY 4.0",
            data_dir="verified/hin",
            share=0.6,
        ),
        Source(
            name="wikipedia",
            kind="hindi",
            repo="wikimedia/wikipedia",
            revision="b04c8d1ceb2f5cd4588862100d08de323dccfbaa",
            licence="CC BY-SA 3.0, GFDL",
            config="20231101.hi",
        ),
        Source(
            name="fineweb2",
            kind="hindi",
            repo="HuggingFaceFW/fineweb-2",
            revision="af9c13333eb981300149d5ca60a8e9d659b276b9",
            licence="ODC-By 1.0",
            config="hin_Deva",
        ),
        Source(name="hinmix", config="lcsalign-hicmrom", share=0.5, **HINMIX),
        Source(name="hinmix_noisy", config="lcsalign-noisyhicmrom", **HINMIX),
    ),
    "fineweb": (
        Source(
            name="fineweb_edu",
            kind="english",
            repo="HuggingFaceFW/fineweb-edu",
            revision="87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
            licence="ODC-By 1.0",
            config="sample-10BT",
        ),
    ),
}


class Gone(Exception):
    """The hub has no such set, or not for us: no use in trying again."""


class Silent(Exception):
    """No answer for so long that nobody should wait any more."""


def patiently(what, work, log, limit, alive=None):
    """work(), done in a thread of its own: its result or its exception, or Silent after `limit`
    seconds.

    alive: a small question to the hub, asked half-way; while it is answered there is time until
    SLOWLY.
    """
    result = {}
    done = threading.Event()

    def call():
        try:
            result["value"] = work()
        except Exception as error:  # datasets and its HTTP client raise types of their own
            result["error"] = error
        done.set()

    began = time.monotonic()
    told = False
    asked = False
    threading.Thread(target=call, daemon=True).start()
    while not done.wait(0.2):  # Ctrl-C gets through here, into a hanging read it may not
        waited = time.monotonic() - began
        if waited > QUIET and not told:
            log(f"waiting for {what} ...")
            told = True
        if alive and waited > limit / 2 and not asked:
            asked = True
            if alive():
                limit = SLOWLY
        if waited > limit:
            raise Silent(f"no answer within {waited:.0f} s")
    if "error" in result:
        raise result["error"]
    return result["value"]


def status_of(error):
    """The HTTP status that an error, or one that led to it, was about; None without one."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__ or error.__context__
    return None


def open_stream(source, revision, state):
    """The rows of a source from a saved place on, as a datasets.IterableDataset."""
    import datasets
    datasets.config.STREAMING_READ_MAX_RETRIES = 2         # the waits are ours: see WAITS
    datasets.config.STREAMING_READ_RETRY_INTERVAL = 1
    try:
        rows = datasets.load_dataset(
            source.repo,
            source.config,
            data_dir=source.data_dir,
            split=source.split,
            revision=revision,
            streaming=True,
        )
    except (
        datasets.exceptions.DatasetNotFoundError,
        datasets.exceptions.DatasetGenerationError,
        ValueError,
        datasets.data_files.EmptyDatasetError,
    ) as error:
        raise Gone(str(error).split("\n")[0][:200]) from None
    if state:
        rows.load_state_dict(state)
    return rows


def newest(source, seconds=PATIENCE):
    """The commit that a set without a pin is at today."""
    from huggingface_hub import HfApi
    return HfApi().dataset_info(source.repo, timeout=seconds).sha


class Hub:
    """Does anything answer at the hub's address? Asked once, as each try of a dead one costs
    seconds, and again when a source falls silent. The library's own tries would take minutes to
    find that out."""

    def __init__(self, log):
        self.log = log
        self.known = None                  # the answer, once it was asked for

    def answers(self):
        if self.known is None:
            self.known = self.ask()
        return self.known

    def ask(self):
        from huggingface_hub import constants, get_session
        try:
            patiently(
                f"the hub at {constants.ENDPOINT}",
                lambda: get_session().head(constants.ENDPOINT, timeout=PROBE),
                self.log,
                PROBE + 1,
            )
        except Exception as error:  # whatever the HTTP client of the day raises
            self.log(
                f"notice: the hub at {constants.ENDPOINT} does not answer ({type(error).__name__})"
            )
            return False
        return True

    def status(self, source):
        """What the hub answers to a small question about a source: an HTTP status, or None when it
        does not answer.
        """
        try:
            patiently(source.repo, lambda: newest(source, PROBE), self.log, PROBE + 1)
        except Exception as error:
            return status_of(error)
        return 200


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)    # ours, not the hub's
RECORDED = ("name", "kind", "repo", "config", "data_dir", "split", "revision", "licence", "rows",
            "bytes", "chars", "ended")


class Stream:
    """The rows of one source, read with new tries. What becomes of them is a subclass's matter:

    source, state          state has "revision", "rows", "ended" and "at", the place in the stream
    missing()              so many characters are still wanted, at least about
    rewind()               back to what the state counts; called before each try
    keep(texts)            take the texts of the next rows
    file, new              what it writes to, and what is there beyond the state: {name: number}
    keep_state()           the state to the disk
    held()                 what there is, in words
    """

    def read(self, log, hub):
        """Streams, and after trouble waits and streams again, until there is enough, or no use in
        it -> why it was given up, None if it was not.
        """
        name = f"{self.source.repo} {self.source.config or self.source.data_dir or ''}".strip()
        rows_at_first = self.state["rows"]
        began = time.monotonic()
        tries = 0
        while True:
            self.rewind()
            rows_before = self.state["rows"]
            try:
                self.stream(log, hub)
                return None
            except Gone as error:
                log(f"notice: {name} is left out: {error}")
                return str(error)
            except Exception as error:  # datasets and its HTTP client raise types of their own
                if isinstance(error, UserError):
                    raise
                if isinstance(error, OSError) and error.errno in NO_ROOM:
                    raise
                trouble = error

            # refused: no use in trying again
            nothing_came = self.state["rows"] == rows_at_first
            status = status_of(trouble)
            if isinstance(trouble, FileNotFoundError) and status is None:
                status = hub.status(self.source)       # datasets says so of any trouble
            if nothing_came and status in REFUSED:
                log(f"notice: {name} is left out: the hub refuses it (HTTP {status})")
                return f"the hub refuses it, HTTP {status}"

            # given up: too many tries, or too long without a row
            if self.state["rows"] > rows_before:
                tries = 0
            else:
                tries += 1
            wait = WAITS[min(tries, len(WAITS) - 1)]
            too_long = isinstance(trouble, Silent) or time.monotonic() - began + wait > PATIENCE
            why = f"{type(trouble).__name__}: {first_line(trouble)}"
            if tries >= len(WAITS) or nothing_came and too_long:
                log(f"notice: {name} broke off, {self.held()} of it are kept ({why})")
                hub.known = None
                return why
            log(f"notice: {name}: trying again in {wait} s ({why})")
            time.sleep(wait)

    def stream(self, log, hub):
        """One try: rows, a state on the disk every SYNC_ROWS, and at the end however it comes."""
        state = self.state

        def wait_for(what, work):
            def alive():
                return hub.status(self.source)

            return patiently(f"{what} of {self.source.repo}", work, log, PATIENCE, alive)

        if not state["revision"]:
            state["revision"] = wait_for("the newest version", lambda: newest(self.source))
        rows = wait_for(
            "the files", lambda: open_stream(self.source, state["revision"], state["at"])
        )
        iterator = iter(rows)
        new_rows = 0                       # since the last state on the disk
        place = state["at"]                # after them
        try:
            while self.missing() > 0 and not state["ended"]:
                most = min(BATCH_ROWS, SYNC_ROWS - new_rows)
                texts, ended, error, after = wait_for(
                    "text",
                    lambda most=most: self.batch(rows, iterator, most, self.missing()),
                )
                self.keep(texts)
                new_rows += len(texts)
                place = after
                state["ended"] = ended
                if error and self.missing() > 0:
                    raise error
                if new_rows >= SYNC_ROWS:
                    self.sync(place)
                    new_rows = 0
        finally:
            if new_rows or state["ended"]:
                self.sync(place)

    def sync(self, place):
        """The file to the disk, and after it a state that counts what came, too."""
        self.file.flush()
        os.fsync(self.file.fileno())
        for name, number in self.new.items():
            self.state[name] += number
            self.new[name] = 0
        self.state["at"] = place
        self.keep_state()

    def batch(self, rows, iterator, most, chars):
        """-> (texts of the next rows: so many, or so many characters, or what a second gives; was
        that the end; the error that it met; the place after them)."""
        texts = []
        ended = False
        error = None
        until = time.monotonic() + BATCH_SECONDS
        try:
            while len(texts) < most and chars > 0 and time.monotonic() < until:
                row = next(iterator, None)
                if row is None:
                    ended = True
                    break
                text = row.get(self.source.field)
                if not isinstance(text, str):
                    raise Gone(
                        f"its rows have no text in {self.source.field!r}, but "
                        f"{', '.join(row)[:100]}"
                    )
                texts.append(text)
                chars -= len(text)
        except Exception as caught:                        # what came before it is good
            error = caught
        return texts, ended, error, rows.state_dict()

    def same_source(self, saved):
        """Was a saved state of this source, at the version that is asked for?"""
        fixed = set(asdict(self.source)) - {"share"}
        if not self.source.revision:
            fixed -= {"revision"}
        return set(saved) == set(self.state) and all(
            saved[key] == self.state[key] for key in fixed
        )


class Raw(Stream):
    """One source's file in data/raw, with its state."""

    def __init__(self, source, folder):
        self.source = source
        self.path = folder / f"{source.kind}_{source.name}.jsonl"
        self.part = self.path.with_suffix(".jsonl.part")
        self.state_path = self.path.with_suffix(".state.json")
        self.state = dict(asdict(source), rows=0, bytes=0, chars=0, ended=False, at=None)
        with contextlib.suppress(UserError, OSError):  # nothing usable there: from the beginning
            saved = read_json(self.state_path)
            file = self.path if self.path.exists() else self.part
            if self.same_source(saved) and file.stat().st_size >= saved["bytes"]:
                self.state = saved

    def fetch(self, chars, log, hub):
        """Rows until there are so many characters or the source ends, with new tries; what came
        stays. -> characters.
        """
        if self.state["chars"] >= chars or self.state["ended"]:
            return self.state["chars"]
        if not hub.answers():
            return self.state["chars"]
        if self.path.exists():
            os.replace(self.path, self.part)
        self.wanted = chars
        self.bar = tqdm(
            total=chars,
            initial=self.state["chars"],
            unit=" characters",
            unit_scale=True,
            desc=self.source.name,
            disable=None,
        )
        with open(self.part, "ab") as self.file, self.bar:
            self.read(log, hub)
        if self.state["rows"]:
            os.replace(self.part, self.path)
        else:
            self.part.unlink()
        return self.state["chars"]

    def missing(self):
        return self.wanted - self.state["chars"] - self.new["chars"]

    def rewind(self):
        self.file.truncate(self.state["bytes"])
        self.new = dict(rows=0, chars=0, bytes=0)

    def keep(self, texts):
        for text in texts:
            line = json.dumps({"text": text}, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
            self.file.write(line)
            self.new["rows"] += 1
            self.new["chars"] += len(text)
            self.new["bytes"] += len(line)
            self.bar.update(len(text))

    def keep_state(self):
        write_json(self.state_path, self.state)

    def held(self):
        return f"{self.state['chars']:,} characters"


def first_line(error):
    """What an error says, shortened; some say nothing."""
    lines = str(error).splitlines()
    return lines[0][:150] if lines else ""


def download(which, folder, hinglish_ratio, chars, log):
    """Files with about so many characters in all, the wanted share of them Hinglish; [(path, record
    for meta.json)].
    """
    kinds = {
        "hindi": {"hindi": 1 - hinglish_ratio, "hinglish": hinglish_ratio},
        "fineweb": {"english": 1.0},
    }[which]
    need("datasets", "to read the hub")
    folder.mkdir(parents=True, exist_ok=True)

    # each kind's sources in turn, until there is enough of it
    found = []
    hub = Hub(log)
    for kind, share in kinds.items():
        wanted = int(share * chars)
        missing = wanted
        for source in SOURCES[which]:
            if source.kind == kind and missing > 0:
                raw = Raw(source, folder)
                missing -= raw.fetch(int(source.share * missing), log, hub)
                if raw.state["rows"]:
                    found.append(raw)
        if missing > 0 and share:
            why = " (the hub does not answer)" if hub.known is False else ""
            log(
                f"notice: {kind}: {missing:,} of {wanted:,} characters are missing, no source gave "
                f"more{why}"
            )
    if not found:
        raise UserError(
            "nothing could be read from the hub: check the network and run it again, or use your "
            "own text "
            "(--source files --input FILES) or the starter corpus (--source builtin)",
            code=3,
        )

    # what came, for the reader of data/raw and for meta.json
    records = []
    for raw in found:
        record = {key: raw.state[key] for key in RECORDED}
        records.append(record | {"file": raw.path.name})
    write_json(folder / "sources.json", {"sources": records})
    return [(raw.path, record) for raw, record in zip(found, records, strict=True)]
