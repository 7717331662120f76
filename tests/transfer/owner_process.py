"""A peer in a process of its own, perhaps on another host."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from link_contract import small_layout

PEER_LAYOUT = small_layout(num_blocks=12)


class OwnerProcess:
    """Runs ``pool_owner.py``, perhaps behind a command such as ip netns exec."""

    def __init__(
        self, incarnation: str, kv_link: str = "shm", host: str = "127.0.0.1", prefix: Sequence[str] = ()
    ) -> None:
        script = Path(__file__).with_name("pool_owner.py")
        layout = msgspec.json.encode(PEER_LAYOUT).decode()
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(script), layout, incarnation, kv_link, host],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address = bytes.fromhex(self._line())
        self.access = bytes.fromhex(self._line())

    def close_pool(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        assert self._line() == "closed"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=30)

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()
