"""``python -m disagg.engine``: one engine instance, told what to be by ``InstanceSettings`` as JSON on stdin.

Exit status 0 after a Stop message or SIGTERM, 2 with one line ``error: ...`` for settings that cannot be used, 1 for
anything else. SIGINT is left to the parent, which decides when its instances end.
"""

import logging
import os
import signal
import sys

import msgspec

from disagg.base.clock import MonotonicClock
from disagg.base.config import InstanceSettings
from disagg.base.errors import ConfigurationError
from disagg.base.messages import Loading
from disagg.base.parent import end_with_parent
from disagg.engine.allocator import keep_freed_memory
from disagg.engine.control import ControlChannel
from disagg.engine.process_setup import pin_to_cores

CONFIGURATION_STATUS = 2


def main() -> int:
    """Run the instance; return the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        _run(_read_settings())
    except ConfigurationError as error:
        sys.stderr.write(f"error: {error}\n")
        return CONFIGURATION_STATUS
    return 0


def _read_settings() -> InstanceSettings:
    try:
        return msgspec.json.decode(sys.stdin.buffer.read(), type=InstanceSettings)
    except msgspec.MsgspecError as error:
        raise ConfigurationError(f"instance settings on stdin: {error}") from error


def _run(settings: InstanceSettings) -> None:
    if settings.parent_pid and not end_with_parent(settings.parent_pid):
        return
    pin_to_cores(settings.cpus)
    keep_freed_memory()
    os.environ["OMP_NUM_THREADS"] = str(settings.num_threads)  # PyTorch reads it while it is imported
    channel = ControlChannel(settings.control_endpoint, settings.instance, settings.control_key, settings.control_curve)
    try:
        channel.send(Loading(instance=settings.instance, stage="libraries", fraction=0.0))
        import torch

        from disagg.engine.instance import run_instance

        torch.set_num_threads(settings.num_threads)
        torch.set_num_interop_threads(1)
        run_instance(settings, channel, MonotonicClock())
    finally:
        channel.close()


if __name__ == "__main__":
    sys.exit(main())
