"""The hub: an exported folder goes there, and --ckpt hf:owner/name@revision comes from there.

    commit = push(folder, "owner/name")
    folder = fetched("hf:owner/name@main")      # in the cache of the package huggingface_hub

Address, cache and token are the package's own (HF_ENDPOINT, HF_HOME, HF_TOKEN or hf auth login). Of
a model come aria.json and the files in it that Aria reads, no others, and each is compared with its
hash. The messages of the package are not printed: they are long, and could quote what was sent.

Used by export.py and checkpoint.py.
"""
import contextlib
import re
from pathlib import Path

try:
    import huggingface_hub
except ModuleNotFoundError:
    huggingface_hub = None      # need() says what to install

from common.console import UserError, need, say
from hf import published
from text.hub import status_of

WHY = "for models on the hub; requirements_hf.txt has it"
MARK = "hf:"
REVISION = re.compile(r"(?!.*\.\.)\w[\w./-]*", re.ASCII)
NEWEST = "main"
LOG_IN = "log in with hf auth login, or set HF_TOKEN"


# ---- names ---------------------------------------------------------------------------------------

def is_spelling(path):
    """Does --ckpt name a model on the hub?"""
    return str(path).startswith(MARK)


def parted(spelling):
    """"hf:owner/name@revision" -> ("owner/name", "revision")."""
    name, at, revision = spelling.removeprefix(MARK).partition("@")
    if not at:
        revision = NEWEST
    if not published.is_name(name) or not REVISION.fullmatch(revision):
        raise UserError(f"{spelling} names no model: write hf:owner/name or hf:owner/name@revision")
    return name, revision


# ---- from the hub --------------------------------------------------------------------------------

def fetched(spelling):
    """The folder of a model on the hub, whose files were verified. Without a network it is the one
    that was fetched before.
    """
    name, revision = parted(spelling)
    need("huggingface_hub", WHY)
    with told_of(name, revision):
        path = Path(huggingface_hub.hf_hub_download(name, published.MANIFEST, revision=revision))
    folder = path.parent
    commit = folder.name
    manifest = published.read_manifest(folder)
    for file in published.NEEDED:
        with told_of(name, revision):
            huggingface_hub.hf_hub_download(name, file, revision=commit)
    remedy = f"delete {folder.parents[1]}, the copy of {MARK}{name}, and fetch it again"
    published.check_files(folder, manifest, published.NEEDED, remedy)
    say(f"checkpoint: {spelling} -> commit {commit}")
    return folder


# ---- to the hub ----------------------------------------------------------------------------------

def push(folder, name):
    """Write an exported folder to the hub in one commit -> its hash. A repository that is not there
    is made, private.
    """
    manifest = published.read_manifest(folder)
    published.check_files(folder, manifest, manifest["files"], published.AGAIN)
    with told_of(name, writes=True):
        api = huggingface_hub.HfApi()
        api.create_repo(name, private=True, exist_ok=True)
        operations = [
            huggingface_hub.CommitOperationAdd(file, Path(folder) / file)
            for file in (*manifest["files"], published.MANIFEST)
        ]
        message = f"Aria's export of step {manifest['step']}"
        return api.create_commit(name, operations, commit_message=message).oid


# ---- what goes wrong -----------------------------------------------------------------------------

@contextlib.contextmanager
def told_of(name, revision=None, writes=False):
    """What goes wrong in here is one sentence about this model."""
    try:
        yield
    except Exception as error:  # the package and its HTTP client raise types of their own
        sentence, code = why_not(error, revision, writes)
        raise UserError(f"{MARK}{name}: {sentence}", code) from None


def why_not(error, revision, writes):
    """-> (what to do about an error of the package, the exit code)."""
    errors = huggingface_hub.errors
    status = status_of(error)
    if isinstance(error, errors.RevisionNotFoundError):
        return f"there is no revision {revision}: name a branch, a tag or a whole commit", 2
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return (
            f"there is no {published.MANIFEST} at {revision}, so it is no model of python -m "
            "export --format hf", 2
        )
    if writes and status in (401, 403):
        return f"the hub does not let you write there: {LOG_IN} to a token that may", 2
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403, 404):
        return f"the hub has no such model, or not for you: check the name, or {LOG_IN}", 2
    if status is not None:
        return f"the hub answers with HTTP status {status}: try again later", 3
    if isinstance(error, UnicodeError):
        return f"what is set as the token is none: {LOG_IN}", 2
    if isinstance(error, OSError) and error.strerror:
        return f"the copy cannot be written ({error.strerror})", 2
    silent = (OSError, errors.HTTPError)
    if not isinstance(error, silent) and not isinstance(error.__cause__, silent):
        kind = type(error).__name__
        return f"the package huggingface_hub fails on it ({kind}): try another version of it", 3
    if writes:
        return "the hub does not answer, so nothing was published: try again with a network", 3
    return "the hub does not answer, and it was not fetched before: try again with a network", 3
