"""``python -m disagg.calibration.steps``: an instance that plays scripts.

The first line of stdin is ``InstanceSettings`` as JSON, each later one a ``Command``; stdout answers with a ``Report``
each. The end of stdin ends it. The exit status is that of ``python -m disagg.engine``.
"""

import gc
import logging
import os
import signal
import sys
from contextlib import ExitStack

import msgspec

from disagg.base.clock import MonotonicClock
from disagg.base.config import InstanceSettings
from disagg.base.errors import ConfigurationError
from disagg.base.parent import end_with_parent
from disagg.calibration.steps.channel import ScriptedChannel
from disagg.engine.allocator import keep_freed_memory
from disagg.engine.process_setup import pin_to_cores

CONFIGURATION_STATUS = 2


def main() -> int:
    """Run the instance; return the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        _run(msgspec.json.decode(sys.stdin.buffer.readline(), type=InstanceSettings))
    except ConfigurationError as error:
        sys.stderr.write(f"error: {error}\n")
        return CONFIGURATION_STATUS
    return 0


def _run(settings: InstanceSettings) -> None:
    if settings.parent_pid and not end_with_parent(settings.parent_pid):
        return
    # The decodes of a script begin together: one that was pulled first would run on, a quick model's to its end.
    scheduler = msgspec.structs.replace(settings.scheduler, pull_before_step=True)
    settings = msgspec.structs.replace(settings, scheduler=scheduler)
    pin_to_cores(settings.cpus)
    keep_freed_memory()
    os.environ["OMP_NUM_THREADS"] = str(settings.num_threads)  # PyTorch reads it while it is imported
    import torch

    from disagg.engine.instance import build_loop

    torch.set_num_threads(settings.num_threads)
    torch.set_num_interop_threads(1)
    clock = MonotonicClock()
    channel = ScriptedChannel(settings.control_endpoint, settings.instance, clock)
    with ExitStack() as stack:
        stack.callback(channel.close)
        loop = build_loop(settings, channel, clock, stack, watch=channel.watch)
        gc.collect()
        gc.freeze()
        with torch.inference_mode():
            loop.run()


if __name__ == "__main__":
    sys.exit(main())
