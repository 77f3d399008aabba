"""The meeting of the ranks of one start in the launcher's store."""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist


def meet_ranks(rank: int, size: int, timeout: float) -> dist.Store:
    """Return the launcher's store, under a name that this start's ranks share and no earlier one's.

    torchrun keeps one store through all its restarts, and a rank that read there where its peers were before would wait
    for the dead. Its count of restarts is no name: each node has its own. So every rank says that it is there, in a word
    nobody has said before, and the main rank publishes all words until each has found its own among them.

    Example: rank 1 of 2 comes back first. "present" still has the two words of the start before, without rank 1's new one;
    so it waits. Once rank 0 has said its own word and published both, each finds its word, and the name made of the two is
    counted by both.
    """
    store, *_ = next(dist.rendezvous("env://", rank, size, timeout=timedelta(seconds=timeout)))
    words, mine, agreed = [f"word/{one}" for one in range(size)], uuid.uuid4().hex, ""
    store.set(words[rank], mine)
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        if rank == 0:
            store.set("present", b" ".join(store.multi_get(words)))
        present = store.get("present").decode()
        if mine in present:
            name = uuid.uuid5(uuid.NAMESPACE_OID, present).hex
            if store.add(name, int(present != agreed)) == size:
                return dist.PrefixStore(name, store)
            agreed = present
        time.sleep(0.02 * max(1.0, size / 64))
    raise dist.DistStoreError("those who are in the store belong to an earlier start")
