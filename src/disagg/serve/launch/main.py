"""``serve``: from a deployment to a running server."""

import asyncio
from contextlib import ExitStack
from typing import TYPE_CHECKING

import uvloop
from msgspec import structs
from starlette.types import ASGIApp

from disagg.base.answer_parsers import ReasoningParser, ToolCallParser
from disagg.base.config import Placement, ServeSettings
from disagg.base.errors import ConfigurationError
from disagg.models.chat_template import ChatTemplate, load_chat_template
from disagg.models.generation_config import end_token_ids, load_generation_config
from disagg.models.locate import load_served_model_config, locate_model
from disagg.models.tokenizer import load_tokenizer
from disagg.models.tool_calls.syntax import AnswerSyntax, ToolCallFormat, syntax_of
from disagg.serve.api.app import create_app
from disagg.serve.api.metrics import ServerMetrics
from disagg.serve.api.preparers import Preparers
from disagg.serve.api.sampling import check_defaults
from disagg.serve.api.served_model import ServedModel
from disagg.serve.launch.api_keys import read_api_keys
from disagg.serve.launch.deployment import Deployment
from disagg.serve.launch.descriptors import raise_descriptor_limit
from disagg.serve.launch.join import key_folder
from disagg.serve.launch.key_files import instance_keys, make_keys
from disagg.serve.launch.listening import listen
from disagg.serve.launch.operator import LocalOperator
from disagg.serve.launch.server import LiveServer, ManagerFactory
from disagg.serve.launch.server_observer import ServerObserver
from disagg.serve.router.live import LiveRouter

if TYPE_CHECKING:
    from disagg.serve.api.tracing import Traces


def serve(deployment: Deployment, observer: ServerObserver) -> None:
    """Serve until a signal ends it.

    The port is taken first and the model's files are checked next, so that what is wrong there is said before any
    process is started. Raises a DisaggError when the server cannot start or go on.
    """
    raise_descriptor_limit()
    with ExitStack() as resources:
        bound = resources.enter_context(listen(deployment.serve))
        model = load_served_model(deployment)
        api_keys = read_api_keys(deployment.serve)
        observer.model_read(model.name, can_chat=model.chat_template.available)
        preparers = resources.enter_context(Preparers(model))
        metrics = ServerMetrics(model.name)
        traces = _open_traces(deployment.serve, model.name, resources)

        def make_app(router: LiveRouter, operator: LocalOperator) -> ASGIApp:
            return create_app(
                router,
                model,
                metrics,
                operator=operator,
                preparers=preparers,
                api_keys=api_keys,
                tenant_keys=deployment.serve.tenant_keys,
                cors_origins=deployment.serve.cors_origin,
                traces=traces,
            )

        here, make_manager = _open_cluster(deployment, observer, resources)
        server = LiveServer(
            here, bound, make_app, observer, model_name=model.name, sink=metrics, make_manager=make_manager
        )
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


def _open_traces(settings: ServeSettings, model_name: str, resources: ExitStack) -> "Traces | None":
    if settings.otlp_endpoint is None:
        return None
    try:
        from disagg.serve.api.tracing import Traces
    except ImportError as error:
        raise ConfigurationError(
            f"--otlp-endpoint needs OpenTelemetry's libraries ({error}): pip install 'disagg[otlp]'"
        ) from error
    traces = Traces(settings.otlp_endpoint, settings.trace_ratio, model_name)
    resources.callback(traces.close)
    return traces


def load_served_model(deployment: Deployment) -> ServedModel:
    """Return what the API needs of the model: everything but its weights, whose files are only looked for.

    Raises ConfigurationError when it is not there or broken, UnsupportedModelError when it cannot be run.
    """
    files = locate_model(deployment.model.model, deployment.model.model_code)
    config = load_served_model_config(files, deployment.model.model_code)
    files.weight_files()
    tokenizer = load_tokenizer(files)
    generation = load_generation_config(files, deployment.serve.generation_config)
    check_defaults(generation.defaults, generation.source)
    template = load_chat_template(files, tokenizer.special_tokens)
    return ServedModel(
        name=deployment.serve.served_model_name or files.name,
        tokenizer=tokenizer,
        chat_template=template,
        eos_token_ids=end_token_ids(config, tokenizer, generation),
        vocab_size=config.vocab_size,
        block_size=deployment.cache.block_size,
        defaults=generation.defaults,
        trusts_request_templates=deployment.serve.trust_request_chat_template,
        syntax=_syntax(template, deployment.serve),
    )


def _syntax(template: ChatTemplate, settings: ServeSettings) -> AnswerSyntax:
    parser = settings.tool_call_parser
    calls = None if parser is ToolCallParser.AUTO else ToolCallFormat(parser.value)
    tells_reasoning = settings.reasoning_parser is ReasoningParser.AUTO
    return syntax_of(template.source, calls, tells_reasoning=tells_reasoning)
