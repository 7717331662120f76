"""``serve``: from a deployment to a running server."""

import asyncio
from contextlib import ExitStack

import uvloop
from msgspec import structs

from disagg.base.config import Placement
from disagg.base.errors import ConfigurationError
from disagg.serve.launch.api_parts import load_served_model, open_api
from disagg.serve.launch.cluster_manager import ManagerFactory
from disagg.serve.launch.deployment import Deployment
from disagg.serve.launch.descriptors import raise_descriptor_limit
from disagg.serve.launch.join import key_folder
from disagg.serve.launch.key_files import instance_keys, make_keys
from disagg.serve.launch.listening import listen
from disagg.serve.launch.server import LiveServer
from disagg.serve.launch.server_observer import ServerObserver
from disagg.serve.launch.supervisor import SupervisedServer


def serve(deployment: Deployment, observer: ServerObserver) -> None:
    """Serve until a signal ends it.

    The port is taken first and the model's files are checked next, so that what is wrong there is said before any
    process is started. Raises a DisaggError when the server cannot start or go on.
    """
    raise_descriptor_limit()
    if deployment.front.routers is not None:
        _supervise(deployment, observer)
        return
    with ExitStack() as resources:
        bound = resources.enter_context(listen(deployment.serve))
        parts = open_api(deployment, resources)
        observer.model_read(parts.model.name, can_chat=parts.model.chat_template.available)
        here, make_manager = _open_cluster(deployment, observer, resources)
        server = LiveServer(
            here,
            bound,
            parts.make_app,
            observer,
            model_name=parts.model.name,
            sink=parts.metrics,
            make_manager=make_manager,
        )
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(server.run())


def _supervise(deployment: Deployment, observer: ServerObserver) -> None:
    """Serve by several routers. What is wrong with the model's files is found before any process is started."""
    with ExitStack() as resources:
        bound = resources.enter_context(listen(deployment.serve))
        model = load_served_model(deployment)
        observer.model_read(model.name, can_chat=model.chat_template.available)
        name = model.name
        del model
        here, make_manager = _open_cluster(deployment, observer, resources)
        server = SupervisedServer(here, bound, observer, model_name=name, make_manager=make_manager)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(server.run())


def _open_cluster(
    deployment: Deployment, observer: ServerObserver, resources: ExitStack
) -> tuple[Deployment, ManagerFactory | None]:
    """Return what of a deployment is left to this host, and who runs the instances where it is not this host."""
    remote = deployment.remote
    if remote.cluster is None:
        return deployment, None
    if deployment.cache.kv_disk is not None:
        raise ConfigurationError("--kv-disk names a folder of one host: leave it out with --cluster")
    from disagg.serve.launch import ray_connection

    resources.enter_context(ray_connection.connected(remote.cluster))
    from disagg.serve.launch.ray_manager import RayManager

    address = ray_connection.own_address()
    here = structs.replace(
        deployment,
        placement=Placement(groups=(), others_join=True),
        remote=structs.replace(remote, listen_instances=remote.listen_instances or f"{address}:0"),
    )
    folder = key_folder(remote)
    make_keys(folder)
    keys = instance_keys(folder)
    return here, lambda: RayManager(deployment, deployment.placement, keys, observer.instance_line, address)
