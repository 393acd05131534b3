"""The model as transformers sees it, behind the network's own modules.

Never imported here: hf/join.py puts it into the one file of an exported folder, together with what
it uses of model.py, eco_hybrid.py, attention.py, layers.py and model_config.py.

Legend: B rows, P tokens of a prompt, T tokens, S tokens of a block, N positions, V vocabulary rows.
"""
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput, MaskedLMOutput

from model import build_model

PROMPT_TOKENS = 1024    # of a prompt that are read at once


class AriaDiffusionConfig(PretrainedConfig):
    """shape: of the network; writing: what generate does unless it is told otherwise."""
    model_type = "aria_diffusion"

    def __init__(self, shape=None, writing=None, **others):
        self.shape = shape
        self.writing = writing
        super().__init__(**others)


class AriaDiffusion(PreTrainedModel):
    """The network, and the text that it writes."""
    config_class = AriaDiffusionConfig
    # whatever dtype is asked for: products in bfloat16 are torch.autocast's matter
    _keep_in_fp32_modules_strict = ["denoiser"]

    def __init__(self, config):
        super().__init__(config)
        self.denoiser = build_model(SimpleNamespace(**config.shape))
        self.post_init()

    def _init_weights(self, module):
        """build_model has done it."""

    def get_input_embeddings(self):
        return self.denoiser.head

    @torch.no_grad()
    def generate(self, input_ids, attention_mask=None, generator=None, **settings):
        """Continue the prompts input_ids (B, P), each with its first id <s> -> (B, P + new tokens);
        behind an end of text stands the pad.

        settings, in the place of those in config.writing:
          max_new_tokens
          block_size    1: left to right. More: a block starts as masks, and each forward fills in
                        the tokens that the model is sure of; finished blocks join an exact cache
          threshold     how sure that is: the chance of the likeliest token
          temperature   0: always the likeliest token
          top_k, top_p  only the likeliest so many tokens, or those that have this chance together
        generator: the torch.Generator that tokens are drawn with.
        """
        must_be_whole(attention_mask)
        unknown = set(settings) - set(self.config.writing)
        if unknown:
            raise TypeError(
                f"generate() knows no {', '.join(sorted(unknown))}; it takes "
                f"{', '.join(self.config.writing)}"
            )
        writing = SimpleNamespace(**self.config.writing | settings)
        block = writing.block_size
        if self.config.shape["causal"]:
            block = 1

        # The cache, with the prompts in it; left to right, the first forward reads their last token
        prompt = input_ids.shape[1]
        length = prompt + writing.max_new_tokens
        room = min(length, max(self.config.max_position_embeddings, block))
        cache = self.denoiser.new_cache(len(input_ids), room)
        known = input_ids[:, :prompt - 1] if block == 1 else input_ids
        for part in known.split(max(1, min(PROMPT_TOKENS, room // 2)), dim=1):
            if part.shape[1]:
                self.denoiser.step(part, cache)

        # Block after block, until each row has an end of text
        text = input_ids
        ended = torch.zeros(len(text), dtype=torch.bool, device=text.device)
        while text.shape[1] < length and not ended.all():
            if block == 1:
                states = self.denoiser.step(text[:, -1:], cache)                   # (B, 1, D)
                new = draw(self.denoiser.logits(states[:, 0]), writing, generator).unsqueeze(1)
            else:
                if text.shape[1] > prompt:
                    self.denoiser.step(text[:, -block:], cache)
                size = min(block, length - text.shape[1])
                new = self.filled(size, cache, writing, generator)                 # (B, S)
            text = torch.cat((text, new), dim=1)
            ended |= (new == self.config.eos_token_id).any(1)
        return self.cut(text, prompt)

    def filled(self, size, cache, writing, generator):
        """A block of so many masks behind the cache, filled in -> (B, S)."""
        rows = len(cache.front)
        mask_id = self.config.mask_token_id
        block = torch.full((rows, size), mask_id, device=self.device)              # (B, S)
        while (block == mask_id).any():
            logits = self.denoiser.logits(self.denoiser.states(block, cache))      # (B, S, V)
            masked = block == mask_id
            sure = logits.softmax(-1).amax(-1).masked_fill(~masked, -1)            # (B, S)
            surest = F.one_hot(sure.argmax(-1), size).bool()
            chosen = masked & (surest | (sure >= writing.threshold))
            block[chosen] = draw(logits[chosen], writing, generator)
        return block

    def cut(self, text, prompt):
        """The text (B, T), with pads behind the first end of text after so many tokens."""
        new = text[:, prompt:]
        ends = new == self.config.eos_token_id
        behind = ends.cumsum(1) - ends.int() > 0
        new = new.masked_fill(behind, self.config.pad_token_id)
        used = int((~behind).sum(1).max()) if new.shape[1] else 0
        return torch.cat((text[:, :prompt], new[:, :used]), dim=1)


class AriaDiffusionForCausalLM(AriaDiffusion):
    """Left to right: logits[:, i] are about the token behind input_ids[:, i]."""

    def forward(self, input_ids, attention_mask=None, labels=None, **unread):
        """labels (B, T): as input_ids, -100 where nothing is asked."""
        must_be_whole(attention_mask, may_end=True)
        # the clean stream answers for its own tokens: one more, which nobody reads
        text = F.pad(input_ids, (0, 1))
        states = self.denoiser.clean_states(text)[:, 1:]                           # (B, T, D)
        logits = self.denoiser.logits(states)                                      # (B, T, V)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


class AriaDiffusionForMaskedLM(AriaDiffusion):
    """All at once: logits[:, i] are about the token at place i, given the others that are no mask.
    """

    def forward(self, input_ids, attention_mask=None, labels=None, **unread):
        """labels (B, T): the tokens behind the masks, -100 elsewhere."""
        must_be_whole(attention_mask)
        states = self.denoiser.block_states(input_ids, input_ids, input_ids.shape[1])
        logits = self.denoiser.logits(states)                                      # (B, T, V)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)


def must_be_whole(attention_mask, may_end=False):
    """Refuse pads, which this network would read as text; may_end: behind a text they do no harm.
    """
    if attention_mask is None or attention_mask.all():
        return
    if may_end and (attention_mask.diff(dim=1) <= 0).all():
        return
    raise ValueError(
        "this model reads pads as text: give texts of one length, or one text at a time"
    )


def draw(logits, writing, generator):
    """A token of each row of logits (N, V) -> (N,)."""
    if writing.temperature == 0:
        return logits.argmax(-1)
    chances = (logits.double() / writing.temperature).softmax(-1)                  # (N, V)
    ordered, tokens = chances.sort(-1, descending=True)
    if writing.top_k:
        ordered[:, writing.top_k:] = 0
    # as many as it takes for what stands before a token to have the chance top_p
    ordered[ordered.cumsum(-1) - ordered >= writing.top_p] = 0
    place = torch.multinomial(ordered, 1, generator=generator)                     # (N, 1)
    return tokens.gather(-1, place)[:, 0]
