"""``python -m disagg.serve.launch.guest``: one instance for another host's server, as whoever started this one orders.

The order is the first line of standard input; the end of that input ends the instance at once, so that it does not
outlive who started it. SIGTERM drains it first, as it does ``disagg serve --join``.
"""

import logging
import os
import signal
import socket
import sys
import threading
from typing import Final

import msgspec

from disagg.base.config import CurveKeys, InstanceGroup
from disagg.base.errors import ConfigurationError, DisaggError
from disagg.base.ids import InstanceId
from disagg.serve.launch.deployment import Deployment
from disagg.serve.launch.join import run_guest
from disagg.serve.launch.joined_host import Introduction
from disagg.serve.launch.launcher import CONFIGURATION_STATUS

FAILURE_STATUS: Final = 1


class GuestOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that a guest is told. It is one of ``group``, and joins at ``server`` (HOST:PORT)."""

    deployment: Deployment
    group: InstanceGroup
    server: str
    keys: CurveKeys
    instance: InstanceId
    """The name under which the server expects it."""


def main() -> int:
    """Run the instance; return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        order = _read_order()
        threading.Thread(target=_end_with_input, name="end of input", daemon=True).start()
        introduction = Introduction(socket.gethostname(), order.instance)
        run_guest(order.deployment, order.group, order.server, order.keys, introduction, _show)
    except DisaggError as error:
        sys.stderr.write(f"error: {error}\n")
        return CONFIGURATION_STATUS if isinstance(error, ConfigurationError) else FAILURE_STATUS
    return 0


def _read_order() -> GuestOrder:
    try:
        return msgspec.json.decode(sys.stdin.buffer.readline(), type=GuestOrder)
    except msgspec.MsgspecError as error:
        raise ConfigurationError(f"order on stdin: {error}") from error


def _end_with_input() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    for number in (signal.SIGTERM, signal.SIGINT):  # the second one cuts the drain short
        os.kill(os.getpid(), number)


def _show(instance: InstanceId, line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
