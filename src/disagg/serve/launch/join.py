"""The entry point of ``disagg serve --join``: from settings to a running instance of another host's server."""

import asyncio
import os
import socket
from pathlib import Path

import uvloop

from disagg.base.config import CurveKeys, InstanceGroup
from disagg.base.joining import ModelIdentity
from disagg.base.request import Role
from disagg.models.fingerprint import fingerprint
from disagg.models.locate import locate_model
from disagg.serve.launch.deployment import Deployment, RemoteSettings, hash_block_size, plan_guest
from disagg.serve.launch.joined_host import Introduction, JoinedHost
from disagg.serve.launch.key_files import default_folder, instance_keys
from disagg.serve.launch.process import LineListener
from disagg.serve.launch.ready_file import ReadyFile
from disagg.serve.launch.server_address import ServerName, parse_host_port


def join(deployment: Deployment, role: Role, server: str, listener: LineListener) -> None:
    """Run one instance for the server at ``server`` (HOST:PORT) until a signal, or until it is removed.

    Raises ConfigurationError when that cannot be, or the server says why not; UnavailableError when it is not there.
    """
    run_guest(
        deployment,
        InstanceGroup(role=role, count=1),
        server,
        instance_keys(key_folder(deployment.remote)),
        Introduction(socket.gethostname()),
        listener,
    )


def run_guest(
    deployment: Deployment,
    group: InstanceGroup,
    server: str,
    keys: CurveKeys,
    introduction: Introduction,
    listener: LineListener,
) -> None:
    """Run one of a group's instances as ``join`` does, with keys and names in hand."""
    name = ServerName(*parse_host_port(server, "--join"), kv_host=deployment.remote.kv_host)
    settings = plan_guest(deployment, group, keys, sorted(os.sched_getaffinity(0)), os.getpid())
    ready = ReadyFile(deployment.remote.ready_file)
    identity, leave_s = identity_of(deployment), deployment.serve.drain_s
    host = JoinedHost(settings, name, identity, listener, ready, introduction=introduction, leave_s=leave_s)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(host.run())


def identity_of(deployment: Deployment) -> ModelIdentity:
    """Return what instances of a deployment agree on. Raises ConfigurationError when its model is not here."""
    model = deployment.model
    files = locate_model(model.model, model.model_code)
    return ModelIdentity(
        fingerprint=fingerprint(files, model.model_code, model.max_model_len).hex(),
        dtype=deployment.model.dtype,
        quantization=deployment.model.quantization,
        block_size=hash_block_size(deployment),
    )


def key_folder(remote: RemoteSettings) -> Path:
    """Return where the keys are."""
    return default_folder() if remote.keys is None else Path(remote.keys).expanduser()
