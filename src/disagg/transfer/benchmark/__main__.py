"""``python -m disagg.transfer.benchmark``: the other process of the benchmark, which owns the pool that is read.

Told its ``PeerTask`` as JSON on stdin. Prints where the pool is and an offer of all its blocks, sends plain bytes to
whoever connects to ``raw_port``, and ends when stdin does.
"""

import socket
import sys
import threading
from contextlib import ExitStack

import msgspec

from disagg.base.clock import MonotonicClock
from disagg.base.ids import BlockId, Epoch, InstanceId, RequestId
from disagg.base.messages import KvOffer
from disagg.base.transfer_settings import KvLinkChoice, TransferSettings
from disagg.transfer.benchmark.peer_task import PeerReady, PeerTask
from disagg.transfer.links import SharedBlocks
from disagg.transfer.pool import KvPool

_LEASE_S = 3600.0


def main() -> None:
    """Own a pool until stdin ends."""
    task = msgspec.json.decode(sys.stdin.readline(), type=PeerTask)
    pool = KvPool(task.layout, task.incarnation)
    pool.blocks[:] = 1
    with ExitStack() as stack:
        stack.callback(pool.close)
        shared = SharedBlocks(pool, TransferSettings(), task.host, MonotonicClock(), stack)
        nixl_pool = b""
        if task.has_nixl:
            nixl = TransferSettings(kv_link=KvLinkChoice.NIXL)
            nixl_pool = SharedBlocks(pool, nixl, task.host, MonotonicClock(), stack).address
        offer = KvOffer(
            request_id=RequestId("benchmark"),
            epoch=Epoch(0),
            source=InstanceId("peer"),
            incarnation=task.incarnation,
            num_tokens=1,
            block_size=task.layout.block_size,
            block_ids=tuple(BlockId(block) for block in range(task.layout.num_blocks)),
            lease_s=_LEASE_S,
            pool=shared.address,
        )
        listener = stack.enter_context(socket.create_server((task.host, 0)))
        threading.Thread(target=_send_plain_bytes, args=(listener, task.raw_bytes), daemon=True).start()
        ready = PeerReady(offer=shared.seal(offer), nixl_pool=nixl_pool, raw_port=listener.getsockname()[1])
        sys.stdout.write(msgspec.json.encode(ready).decode() + "\n")
        sys.stdout.flush()
        sys.stdin.read()


def _send_plain_bytes(listener: socket.socket, num_bytes: int) -> None:
    """Send as many bytes as a read has for each byte that comes in."""
    data = bytes(num_bytes)
    while True:
        try:
            reader, _ = listener.accept()
        except OSError:  # the benchmark is over
            return
        with reader:
            while reader.recv(1):
                reader.sendall(data)


if __name__ == "__main__":
    main()
