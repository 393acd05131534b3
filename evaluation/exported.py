"""An exported model as the estimators see a model: what it scores is what its graphs compute.

    model = ExportedModel(engine)       # of edge/engine.py

Used by evaluate.py, edge_benchmark.py and edge/folder.py. Ids are torch tensors, as are states and
logits; between them are numpy arrays. Legend: B rows, T tokens, D width, V vocabulary rows.
"""
import numpy as np
import torch


class ExportedModel:
    """cfg, device, clean_states, block_states and logits of model.py's protocol."""

    def __init__(self, engine):
        self.engine = engine
        self.cfg = engine.cfg
        self.device = torch.device("cpu")

    def clean_states(self, x0):
        """(B, T) -> (B, T, D), each about its own token."""
        ids = x0.numpy()
        cache = self.engine.empty_cache(*ids.shape)
        read = np.concatenate((self.engine.start(len(ids)), ids[:, :-1]), axis=1)
        return torch.from_numpy(self.engine.step(read, cache))

    def block_states(self, xt, x0, block, first=None):
        """The noisy blocks of xt (B, T), each behind the clean text before it -> (B, T, D)."""
        T = x0.shape[1]
        ids, noisy = x0.numpy(), xt.numpy()
        cache = self.engine.new_cache(*ids.shape)
        end = min(first or block, T)
        states = [self.engine.states(noisy[:, :end], cache)]
        begin = 0
        while end < T:
            following = min(end + block, T)
            states.append(
                self.engine.step_and_states(ids[:, begin:end], noisy[:, end:following], cache)
            )
            begin, end = end, following
        return torch.from_numpy(np.concatenate(states, axis=1))

    def logits(self, states):
        """(..., D) -> (..., V)."""
        flat = states.reshape(1, -1, states.shape[-1]).numpy()                     # (1, N, D)
        positions = np.arange(flat.shape[1])
        z = self.engine.logits(flat, np.zeros_like(positions), positions)          # (N, V)
        return torch.from_numpy(z).view(*states.shape[:-1], -1)
