"""What a server that listens for instances on other hosts needs beside one that does not."""

import logging

from disagg.base.errors import ConfigurationError
from disagg.base.transfer_settings import KvLinkChoice
from disagg.serve.launch.deployment import Deployment, terms_of
from disagg.serve.launch.join import identity_of, key_folder
from disagg.serve.launch.key_files import make_keys, server_guard
from disagg.serve.launch.server_address import parse_host_port, zmq_endpoint
from disagg.serve.router.control_socket import ControlSocket, ZmqControlSocket
from disagg.serve.router.outside import KnownGuests, MemberListener, OutsideDoor, TwoDoors, TwoWatchers
from disagg.serve.router.watcher import InstanceWatcher

logger = logging.getLogger(__name__)

_WILDCARDS = frozenset({"0.0.0.0", "::", "*"})


def open_door(deployment: Deployment) -> OutsideDoor | None:
    """Return the door at which other hosts join, or None. Keys are made where there are none yet.

    Raises ConfigurationError for an address or keys that cannot be.
    """
    if deployment.remote.listen_instances is None:
        return None
    host, port = parse_host_port(deployment.remote.listen_instances, "--listen-instances")
    if deployment.transfer.kv_link is KvLinkChoice.SHM:
        raise ConfigurationError("--kv-link shm: other hosts cannot read this one's memory; leave it out, or take tcp")
    folder = key_folder(deployment.remote)
    if make_keys(folder):
        logger.info("made keys in %s; `disagg keys` says which of them other hosts need", folder)
    socket = ZmqControlSocket(zmq_endpoint(host, port), server_guard(folder))
    return OutsideDoor(socket, identity_of(deployment), terms_of(deployment))


def kv_host_of(deployment: Deployment) -> str | None:
    """Return the address at which other hosts read this host's KV blocks, or None where none does.

    Raises ConfigurationError when it is not said.
    """
    remote = deployment.remote
    if not deployment.placement.groups:
        return None  # nor has it any
    if remote.kv_host is not None or remote.listen_instances is None:
        return remote.kv_host
    host, _ = parse_host_port(remote.listen_instances, "--listen-instances")
    if host in _WILDCARDS:
        raise ConfigurationError(
            f"--listen-instances {remote.listen_instances} is every address of this host: say with --kv-host at which "
            "one other hosts read KV blocks"
        )
    return host


def control_socket(inside: ControlSocket, outside: OutsideDoor | KnownGuests | None) -> ControlSocket:
    """Return the control socket of a router."""
    return inside if outside is None else TwoDoors(inside, outside)


def watcher_of(local: InstanceWatcher, members: MemberListener, outside: OutsideDoor | None) -> InstanceWatcher:
    """Return who watches the instances of a server; ``members`` is told who joins and leaves."""
    if outside is None:
        return local
    outside.listener = members
    return TwoWatchers(local, outside)
