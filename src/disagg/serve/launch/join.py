"""The entry point of ``disagg serve --join``: from settings to a running instance of another host's server."""

import asyncio
import os
import socket
from pathlib import Path

import uvloop

from disagg.base.config import InstanceSettings
from disagg.base.errors import ConfigurationError
from disagg.base.ids import InstanceId
from disagg.base.joining import ModelIdentity
from disagg.base.request import Role
from disagg.models.fingerprint import fingerprint
from disagg.models.locate import locate_model
from disagg.serve.launch.deployment import Deployment, RemoteSettings
from disagg.serve.launch.joined_host import JoinedHost
from disagg.serve.launch.key_files import default_folder, instance_keys
from disagg.serve.launch.process import LineListener


def join(deployment: Deployment, role: Role, server: str, listener: LineListener) -> None:
    """Run one instance for the server at ``server`` (HOST:PORT) until a signal.

    Raises ConfigurationError when that cannot be, or the server says why not; UnavailableError when it is not there.
    """
    host, port = parse_host_port(server, "--join")
    settings = InstanceSettings(
        instance=InstanceId(""),
        role=role,
        control_endpoint=zmq_endpoint(host, port),
        control_curve=instance_keys(key_folder(deployment.remote)),
        model=deployment.model,
        cache=deployment.cache,
        scheduler=deployment.scheduler,
        transfer=deployment.transfer,
        kv_host=deployment.remote.kv_host or _address_towards(host, port),
        device=deployment.host.device,
        cpus=deployment.host.cpus,
        num_threads=deployment.host.threads or len(deployment.host.cpus) or len(os.sched_getaffinity(0)),
        kernel_backend=deployment.host.kernels,
        latency=deployment.host.latency,
        event_log=None if deployment.host.event_log is None else f"{deployment.host.event_log}/{role.value}.jsonl",
        parent_pid=os.getpid(),
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(JoinedHost(settings, identity_of(deployment), listener).run())


def identity_of(deployment: Deployment) -> ModelIdentity:
    """Return what instances of a deployment agree on. Raises ConfigurationError when its model is not here."""
    model = deployment.model
    files = locate_model(model.model, model.model_code)
    return ModelIdentity(
        fingerprint=fingerprint(files, model.model_code, model.max_model_len).hex(),
        dtype=deployment.model.dtype,
        quantization=deployment.model.quantization,
        block_size=deployment.cache.block_size,
    )


def key_folder(remote: RemoteSettings) -> Path:
    """Return where the keys are."""
    return default_folder() if remote.keys is None else Path(remote.keys).expanduser()


def parse_host_port(value: str, flag: str) -> tuple[str, int]:
    """Return the parts of HOST:PORT or [HOST]:PORT. Raises ConfigurationError on anything else."""
    host, colon, port = value.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise ConfigurationError(f"{flag} {value!r} is no HOST:PORT, such as 10.0.0.1:7000")
    return host, int(port)


def zmq_endpoint(host: str, port: int) -> str:
    """Return ZeroMQ's words for a TCP address."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _address_towards(host: str, port: int) -> str:
    """Return this host's own address on the way to another one. Raises ConfigurationError where there is no way."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigurationError(f"--join {host}:{port}: there is no way to that host from here: {error}") from error
