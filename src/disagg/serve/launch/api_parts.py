"""What a process needs of the model and of the settings to answer clients over HTTP."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.types import ASGIApp

from disagg.base.answer_parsers import ReasoningParser, ToolCallParser
from disagg.base.config import ServeSettings
from disagg.base.errors import ConfigurationError
from disagg.models.chat_template import ChatTemplate, load_chat_template
from disagg.models.generation_config import end_token_ids, load_generation_config
from disagg.models.locate import load_served_model_config, locate_model
from disagg.models.tokenizer import load_tokenizer
from disagg.models.tool_calls.syntax import AnswerSyntax, ToolCallFormat, syntax_of
from disagg.serve.api.admin import Operator
from disagg.serve.api.app import create_app
from disagg.serve.api.jobs import check_defaults
from disagg.serve.api.metrics import ServerMetrics
from disagg.serve.api.preparers import Preparers
from disagg.serve.api.served_model import ServedModel
from disagg.serve.api.terms import ServiceTerms
from disagg.serve.api.watching import AllMetrics
from disagg.serve.launch.api_keys import read_api_keys
from disagg.serve.launch.deployment import Deployment, hash_block_size
from disagg.serve.router.interface import Router

if TYPE_CHECKING:
    from disagg.serve.api.tracing import Traces


@dataclass(frozen=True)
class ApiParts:
    """Everything but the router. Its resources are those of ``open_api``."""

    deployment: Deployment
    model: ServedModel
    metrics: ServerMetrics
    preparers: Preparers
    api_keys: tuple[str, ...]
    traces: "Traces | None"

    def make_app(self, router: Router, operator: Operator, all_metrics: AllMetrics | None = None) -> ASGIApp:
        """Return the application over a router and whoever changes its deployment.

        ``all_metrics`` is asked for what all routers have counted, where there are several.
        """
        settings, routing = self.deployment.serve, self.deployment.router
        return create_app(
            router,
            self.model,
            self.metrics,
            operator=operator,
            preparers=self.preparers,
            api_keys=self.api_keys,
            tenant_keys=settings.tenant_keys,
            terms=ServiceTerms(routing.classes, routing.tenants, self.deployment.scheduler.objectives),
            cors_origins=settings.cors_origin,
            traces=self.traces,
            all_metrics=all_metrics,
        )


def open_api(deployment: Deployment, resources: ExitStack) -> ApiParts:
    """Read the model's files, and start what prepares requests; ``resources`` takes what is to be closed.

    Raises ConfigurationError when the model is not there or broken, UnsupportedModelError when it cannot be run.
    """
    model = load_served_model(deployment)
    return ApiParts(
        deployment,
        model,
        ServerMetrics(model.name, keeps_fleet=deployment.front.routers is None),
        resources.enter_context(Preparers(model)),
        read_api_keys(deployment.serve),
        _open_traces(deployment.serve, model.name, resources),
    )


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
        hash_block_size=hash_block_size(deployment),
        defaults=generation.defaults,
        trusts_request_templates=deployment.serve.trust_request_chat_template,
        syntax=_syntax(template, deployment.serve),
    )


def _syntax(template: ChatTemplate, settings: ServeSettings) -> AnswerSyntax:
    parser = settings.tool_call_parser
    calls = None if parser is ToolCallParser.AUTO else ToolCallFormat(parser.value)
    tells_reasoning = settings.reasoning_parser is ReasoningParser.AUTO
    return syntax_of(template.source, calls, tells_reasoning=tells_reasoning)
