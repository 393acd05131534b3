"""Checkpoints as a model of lm-evaluation-harness, whose tasks are run as ever.

    python -m evaluation.harness run --model aria --model_args ckpt=checkpoints/eco_hybrid_hi \\
        --tasks multiblimp_hin --batch_size 16

Needs the package lm_eval. Every likelihood is the exact one, left to right (the clean stream's, in
one pass), never a bound: rows of a batch are filled up behind their end, where nothing looks, so
the batch size changes no score beyond float32's rounding. A text that is longer than those of the
training loses its beginning, or is scored in windows where all of it is asked (rolling).
generate_until writes left to right; block=32 in --model_args writes in blocks, all tokens at once
that the model is sure of.

Legend: B rows, T tokens of the longest row, N scored tokens, D width, V vocabulary rows.
"""
import sys

import torch

import checkpoint
import config
from common import machine
from common.console import UserError, run
from sampling import decode
from sampling.settings import Settings, cannot_freeze
from sampling.torch_model import writer_of

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError:
    print(
        "error: the package lm_eval is needed for its tasks: python -m pip install lm_eval",
        file=sys.stderr,
    )
    sys.exit(3)

NEW = 64            # tokens of an answer, if a task does not say


@register_model("aria")
class Aria(TemplateLM):
    """model_args: ckpt, and for generate_until block."""

    def __init__(self, ckpt, batch_size=None, max_batch_size=None, device=None, block=1):
        super().__init__()
        machine.start(0)
        if not torch.cuda.is_available():
            device = None               # the harness says cuda:0 if nobody says anything
        where = machine.pick_device(device or "auto")
        self.model, self.tokenizer, saved = checkpoint.load_model(ckpt, where, config.check_saved)
        if self.model.cfg.framed:
            raise UserError(f"{ckpt} was trained on pairs, and has no likelihood of a text")
        why_not = cannot_freeze(saved)
        if why_not:
            raise UserError(f"{why_not}, and it has learned no likelihood left to right")
        self.rows = int(batch_size or 1)
        self.block = int(block)
        self.longest = config.trained_length(saved)
        self.bos = self.tokenizer.bos_id

    eot_token_id = property(lambda self: self.tokenizer.eos_id)
    prefix_token_id = property(lambda self: self.bos)

    def tok_encode(self, string, add_special_tokens=None, **unread):
        return self.tokenizer.encode(string)

    # ---- likelihoods -----------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests, **unread):
        """requests: [(texts, ids of the context, ids behind it)] -> [(log p, is it greedy)]."""
        rows = []
        for _, context, scored in requests:
            ids = [self.bos, *(context if context[:1] != [self.bos] else context[1:]), *scored]
            scored = scored[-(self.longest - 1):]
            rows.append(([self.bos, *ids[1:][-(self.longest - 1):]], len(scored)))
        return self.scores(rows)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Windows of the trained length, the first behind BOS, each other behind the one token
        before it -> [log p of a text].
        """
        rows, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tokenizer.encode(request.args[0])
            pairs = get_rolling_token_windows(ids, self.bos, self.longest - 1, 1)
            for context, scored in map(make_disjoint_window, pairs):
                rows.append(([*context, *scored], len(scored)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log_p, _) in zip(owners, self.scores(rows), strict=True):
            totals[owner] += log_p
        return totals

    @torch.no_grad()
    def scores(self, rows):
        """rows: [(ids, so many of the last ones are scored)] -> [(log p, are all the likeliest)].
        """
        found = [None] * len(rows)
        by_length = sorted(range(len(rows)), key=lambda number: len(rows[number][0]))
        for start in range(0, len(rows), self.rows):
            numbers = by_length[start:start + self.rows]
            longest = max(len(rows[number][0]) for number in numbers)
            padded = [rows[number][0] + [self.bos] * (longest - len(rows[number][0]))
                      for number in numbers]
            states = self.model.clean_states(torch.tensor(padded, device=self.model.device))
            for row, number in enumerate(numbers):
                ids, count = rows[number]
                places = slice(len(ids) - count, len(ids))
                logits = self.model.logits(states[row, places]).log_softmax(-1)    # (N, V)
                tokens = torch.tensor(ids[places], device=logits.device)           # (N,)
                log_p = logits.gather(1, tokens[:, None]).double().sum()
                found[number] = float(log_p), bool((logits.argmax(-1) == tokens).all())
        return found

    # ---- text ------------------------------------------------------------------------------------

    def generate_until(self, requests, disable_tqdm=False):
        return [self.answer(*request.args) for request in requests]

    def answer(self, context, how):
        """The text behind a context, up to the first of the strings how["until"]."""
        new = min(int(how.get("max_gen_toks", NEW)), self.longest)
        settings = Settings(
            max_new_tokens=new,
            steps=self.block,
            mode="block_frozen",
            block_size=self.block,
            sampler="threshold",
            temperature=float(how.get("temperature", 0)) if how.get("do_sample") else 0.0,
            eos_id=self.tokenizer.eos_id,
        )
        prompt = [self.bos, *self.tokenizer.encode(context)[-(self.longest - 1):]]
        result = decode.generate(writer_of(self.model), prompt, settings, [0])
        text = self.tokenizer.written(result.rows[0])
        for stop in how.get("until") or ():
            text = text.split(stop)[0] if stop else text
        return text


def main(argv=None):
    cli_evaluate()


if __name__ == "__main__":
    run(main)
