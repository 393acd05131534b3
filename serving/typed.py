"""What POST /v1/transliterate asks of the model: lines in Latin letters, which come back in
Devanagari as python -m sample --transliterate writes them.

    args, settings = rule_of(saved, tokenizer)      # the likeliest letters
    job = TypedJob(lines, args, settings, tokenizer, length)

Used by serving/requests.py.
"""
import config
from common.console import UserError
from sampling import transliteration
from sampling.settings import settings_of_sample, suited
from serving.job import Cancelled, Job


def can_transliterate(saved):
    """Was the model trained to?"""
    try:
        transliteration.refuse_other_models(saved)
    except UserError:
        return False
    return True


def rule_of(saved, tokenizer):
    """-> (the arguments of python -m sample --transliterate without any other flag, their
    Settings).
    """
    origins = dict.fromkeys(config.SampleArgs.__dataclass_fields__, "default")
    args, origins = transliteration.with_rule(config.SampleArgs(), origins, saved)
    args = suited(args, origins, saved, longest=1)
    return args, settings_of_sample(args, origins, saved, tokenizer)


def asked_of(lines, model, tokenizer, length):
    """The ids of each row of these lines that the model has to fill."""
    found = []
    for text in lines:
        line = transliteration.Line(model, tokenizer, text, length)
        found += [line.ids_of(row) for row in line.asked]
    return found


class TypedJob(Job):
    """Lines that are answered row by row; length: tokens of a row in training."""

    def __init__(self, lines, args, settings, tokenizer, length):
        super().__init__(lines, settings, [args.seed] * len(lines))
        self.joins = False
        self.args = args
        self.tokenizer = tokenizer
        self.length = length

    def write(self, model):
        """-> a record for each line. Cancelled is raised after the forward during which somebody
        asked for it.
        """
        if self.cancelled:
            raise Cancelled
        records = list(
            transliteration.transliterate(
                self.args, model, self.tokenizer, self.settings, self.prompts, self.length,
                self.after_forward,
            )
        )
        self.tokens = sum(record["new_tokens"] for record in records)
        return records
