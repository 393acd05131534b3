"""A server for a checkpoint or an exported model: a page that shows the text come out of the masks,
and the completions of OpenAI's API.

    python -m serve                # the newest run, at http://127.0.0.1:8000/
    python -m serve --ckpt checkpoints/eco_hybrid_hi --port 9000

Texts from left to right are written side by side, of others one request at a time, while the rest
waits (serving/worker.py). Only this machine can reach it, unless --host and --token_file say
otherwise. docs/SERVE.md has the paths and the limits.
"""
import signal
import threading
from pathlib import Path

import cli
import config
from common.console import UserError, say

if __name__ == "__main__":
    # before numpy is imported: --help has to be instant
    cli.answer_help(config.ServeArgs, "serve")

from sampling import exported
from serving import paths, requests, server, worker
from serving.metrics import Metrics

SHORTEST_TOKEN = 16        # characters


def main(argv=None):
    args, origins = cli.parse(config.ServeArgs, argv, "serve")
    cli.announce(args, origins)
    token = read_token(args.token_file)

    # The address first: loading takes longer
    if not server.is_local(args.host) and not token:
        raise UserError(
            f"--host {args.host} lets other machines in: add --token_file FILE, whose first line "
            f"is a secret of at least {SHORTEST_TOKEN} characters"
        )
    listener = server.listen(args.host, args.port, paths.Client)

    # The model
    writer, tokenizer, saved = exported.model_of(args)
    served = requests.Served(saved.name, writer, tokenizer, saved, args.max_length, args.max_work)

    # Clients have their threads, the model has this one
    metrics = Metrics()
    owner = worker.Worker(writer, args.queue, args.parallel, metrics)
    listener.offer(served, owner, metrics, token)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"{served.name} at {listener.url} (Ctrl-C stops the server)", flush=True)
    try:
        owner.run()
    except KeyboardInterrupt:
        say("stopped")
    finally:
        owner.close()
        listener.shutdown()
        listener.server_close()


def read_token(path):
    """The first line of --token_file."""
    if path is None:
        return None
    try:
        token = Path(path).read_text(encoding="utf-8").split("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token_file {path} cannot be read: {error}") from None
    if len(token) < SHORTEST_TOKEN:
        raise UserError(
            f"--token_file {path}: its first line must be a secret of at least {SHORTEST_TOKEN} "
            "characters"
        )
    return token


if __name__ == "__main__":
    cli.run(main)
