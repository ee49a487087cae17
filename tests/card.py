"""A stand-in for a card on a CPU: graphs that are recorded operation by operation, and events that are told in order.

As on a card, recording computes nothing, nothing may wait for a number, and a replay finds its tensors where they were.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "item", "equal", "nonzero", "is_nonzero", "masked_select", "unique_dim")


class NothingIsAwaited(TorchDispatchMode):
    """Fails where the host would wait for a number of the device's, or for a copy of it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits"
        return self.computed(func, args, kwargs or {})

    def computed(self, func, args, kwargs):
        return func(*args, **kwargs)


class Graph(NothingIsAwaited):
    def __init__(self, card):
        super().__init__()
        self.card, self.calls, self.before = card, [], []

    def computed(self, func, args, kwargs):
        given = dict(zip((each.name for each in func._schema.arguments), args)) | kwargs
        changed = [given[each.name] for each in func._schema.arguments if each.alias_info and each.alias_info.is_write]
        self.before += [(x, x.clone()) for x in tree_leaves(changed)]
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    def end(self):
        for x, value in reversed(self.before):
            x.copy_(value)

    def replay(self):
        self.card.log.append("replay")
        for func, args, kwargs, result in self.calls:
            for new, old in zip(tree_leaves(func(*args, **kwargs)), tree_leaves(result), strict=True):
                assert new.shape == old.shape
                if new.data_ptr() != old.data_ptr():
                    old.copy_(new)


class Stream:
    def __init__(self, card, name="side"):
        self.card, self.name = card, name

    def wait_stream(self, other):
        self.card.log.append(f"{self.name} waits for {other.name}")


class Event:
    def __init__(self, card):
        self.card, self.number = card, card.events
        card.events += 1

    def record(self):
        self.card.log.append(f"step {self.number}")

    def synchronize(self):
        self.card.log.append(f"done {self.number}")


class Card:
    """`log` tells what was asked of it, in order. With `refuses`, recording raises that."""

    def __init__(self, monkeypatch, refuses=None):
        self.log, self.events, self.refuses = [], 0, refuses
        parts = {
            "Stream": lambda: Stream(self),
            "current_stream": lambda: Stream(self, "main"),
            "stream": self.on,
            "CUDAGraph": lambda: Graph(self),
            "graph": self.recording,
            "graph_pool_handle": lambda: "pool",
            "Event": lambda blocking: Event(self),
        }
        for name, part in parts.items():
            monkeypatch.setattr(torch.cuda, name, part)

    @contextmanager
    def on(self, stream):
        self.log.append(f"on {stream.name}")
        yield
        self.log.append(f"off {stream.name}")

    @contextmanager
    def recording(self, graph, pool, stream):
        assert (pool, stream.name) == ("pool", "side")
        if self.refuses is not None:
            raise self.refuses
        self.log.append("begin")
        with graph:
            yield
        graph.end()
        self.log.append("end")
