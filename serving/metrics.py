"""Counts of what the server did, as the text that Prometheus reads (/metrics). No text of a client
is in it.
"""
import os
import threading
from collections import Counter

MEANINGS = {
    "requests": "answers by path and status",
    "texts": "texts that were finished",
    "tokens": "tokens of them",
    "forwards": "forwards of the model",
    "seconds": "seconds in which the model wrote",
    "cancelled": "requests whose client went away",
}


class Metrics:
    """Counters that any thread may raise."""

    def __init__(self):
        self.counts = Counter()                 # (name, labels) -> number
        self.lock = threading.Lock()

    def count(self, name, amount=1, labels=""):
        with self.lock:
            self.counts[name, labels] += amount

    def text(self, waiting, busy):
        """The page; waiting, busy: requests in the queue and at the model."""
        lines = []
        with self.lock:
            counts = dict(self.counts)
        for name, meaning in MEANINGS.items():
            lines += [f"# HELP aria_{name}_total {meaning}", f"# TYPE aria_{name}_total counter"]
            found = {labels: value for (other, labels), value in counts.items() if other == name}
            for labels, value in sorted((found or {"": 0}).items()):
                lines.append(f"aria_{name}_total{labels} {value:g}")
        gauges = {"waiting": waiting, "busy": int(busy), "memory_bytes": memory()}
        for name, value in gauges.items():
            lines += [f"# TYPE aria_{name} gauge", f"aria_{name} {value}"]
        return "\n".join(lines) + "\n"


def memory():
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0
