"""A process that reads over NIXL from a peer that is frozen meanwhile; prints what it is told, one word a line.

A process of its own, because NIXL reads which transports it may take when it is loaded: here TCP, over which a frozen
peer sends nothing.
"""

import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue

import numpy as np
from link_contract import pairs, pattern, small_layout
from owner_process import PEER_LAYOUT, OwnerProcess

from disagg.base.clock import MonotonicClock
from disagg.base.transfer_settings import KvLinkChoice, TransferSettings
from disagg.transfer.link import KvRead, Transfer
from disagg.transfer.links import Links
from disagg.transfer.nixl_agent import NixlAgent
from disagg.transfer.pool import KvPool

DEADLINE_S = 30.0
WAKING_S = 5.0


def main() -> None:
    owner = OwnerProcess("bb", "nixl")
    pool = KvPool(small_layout(num_blocks=8), "cc")
    told: SimpleQueue[str] = SimpleQueue()
    agent = NixlAgent(pool, "127.0.0.1")

    def end(transfer: Transfer) -> None:
        told.put(transfer.state.value)

    with ThreadPoolExecutor(1) as thread:
        links = Links(pool, thread, MonotonicClock(), TransferSettings(kv_link=KvLinkChoice.NIXL), nixl=agent)
        link = links.open(owner.address)
        link.read(KvRead(pairs((0, 0)), range(3)), end)
        say(told.get(timeout=DEADLINE_S))
        owner.process.send_signal(signal.SIGSTOP)
        transfer = link.read(KvRead(pairs((3, 2), (4, 5)), range(3), timeout_s=0.2), end)
        say(told.get(timeout=DEADLINE_S))
        say(transfer.failure)
        pool.blocks[:] = 0
        written = np.frombuffer(pool.data, np.uint8).reshape(3, 8, -1)[:, 2]
        state = ""
        if sys.argv[1] == "wakes":
            owner.process.send_signal(signal.SIGCONT)
            with suppress(Empty):  # now and then NIXL never tells the end of such a read
                state = told.get(timeout=WAKING_S)
        owner.process.kill()
        say(state or told.get(timeout=DEADLINE_S))
        came_late = np.array_equal(written, pattern(PEER_LAYOUT).reshape(3, 12, -1)[:, 3])
        if state or sys.argv[1] == "dies":
            say("written late" if came_late else "never written")
        links.close()
    agent.close()
    owner.kill()


def say(words: str) -> None:
    print(words, flush=True)  # noqa: T201 (stdout is how the test gets it)


if __name__ == "__main__":
    main()
