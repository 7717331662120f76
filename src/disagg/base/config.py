"""Configuration: nested frozen structs, one per concern, composed and never edited after construction.

Command-line flags are generated from these structs: a field's ``Meta`` carries its help text and its bounds. What
start-up finds out (block count, free memory) is another type (``InstanceFacts``), not a later edit of these.
"""

import enum
import re
from collections.abc import Mapping
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from disagg.base.answer_parsers import ReasoningParser, ToolCallParser
from disagg.base.cache_routing import CacheRouting
from disagg.base.core_settings import LentCores
from disagg.base.disk_settings import DiskSettings
from disagg.base.elastic_settings import InstanceRange, Replan, parse_autoscale
from disagg.base.errors import ConfigurationError
from disagg.base.ids import InstanceId
from disagg.base.model_code import ModelCode
from disagg.base.objectives import Objectives
from disagg.base.request import Role
from disagg.base.service_classes import MAX_CLASSES, ClassName, Overload, ServiceClass, ServiceClassEntry
from disagg.base.tenants import TenantSettings, check_classes, is_api_key
from disagg.base.transfer_settings import KvTransferDtype, TransferSettings

_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@,]+|null")


class DType(enum.Enum):
    """Element type of weights, activations and KV cache."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Quantization(enum.Enum):
    """How weight matrices are stored, where not in the element type."""

    INT8 = "int8"
    """A byte for each weight, one scale per output feature; activations and KV cache keep their type."""
    GGUF = "gguf"
    """The blocks of a GGUF file as they are, where the kernels have products with them."""


class Device(enum.Enum):
    """Where an engine computes."""

    CPU = "cpu"
    CUDA = "cuda"


class SchedulingMode(enum.Enum):
    """Which work a step takes first when prefills and decodes both wait on one instance.

    ``CHUNKED``: every running decode gets its token, and prompts fill what is left of the token budget in chunks
    (stall-free batching, Sarathi-Serve section 4). ``PREFILL_FIRST``: whole prompts go first in steps of their own
    (early vLLM). ``DECODE_FIRST``: a prompt starts only when nothing is decoding. ``SLACK``: as ``CHUNKED``, with
    chunks that end before a running answer's next token is due by its objective.
    """

    CHUNKED = "chunked"
    PREFILL_FIRST = "prefill-first"
    DECODE_FIRST = "decode-first"
    SLACK = "slack"


class QueueOrder(enum.Enum):
    """Which of the sequences that wait comes next.

    ``PRIORITY``: by priority, then by arrival. ``FCFS``: by arrival alone. ``SJF`` by priority, then the shortest
    first. ``EDF`` by priority, then the one whose first token is due first. Nobody is overtaken by one of the same
    priority that arrives more than ``MAX_OVERTAKE_S`` later.
    """

    FCFS = "fcfs"
    SJF = "sjf"
    EDF = "edf"
    PRIORITY = "priority"


MAX_OVERTAKE_S: Final = 30.0


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which model, and in which precision."""

    model: Annotated[
        str | None,
        Meta(description="Hugging Face folder, hub id or GGUF file [default: SmolLM2-135M-Instruct]"),
    ] = None
    dtype: Annotated[DType, Meta(description="element type of weights, activations and KV cache")] = DType.BFLOAT16
    quantization: (
        Annotated[Quantization, Meta(description="store weight matrices in fewer bits [default: in the dtype]")] | None
    ) = None
    model_code: Annotated[
        ModelCode, Meta(description="who computes the layers; 'auto': transformers where the architecture is not ours")
    ] = ModelCode.AUTO
    max_model_len: (
        Annotated[
            int, Meta(ge=2, description="longest sequence, prompt plus answer, in tokens [default: the model's own]")
        ]
        | None
    ) = None


class CacheSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The KV pool of each instance."""

    kv_memory_bytes: Annotated[int, Meta(ge=1, description="memory for the KV pool of each instance")] = 1 << 30
    block_size: Annotated[int, Meta(ge=2, le=1024, description="tokens of a KV block (even)")] = 64
    kv_host_memory_bytes: (
        Annotated[
            int,
            Meta(
                ge=1, description="host memory behind the KV pool of each instance whose device has memory of its own"
            ),
        ]
        | None
    ) = None
    prefix_caching: Annotated[
        bool, Meta(description="keep full KV blocks of prompts and answers and reuse them for equal prefixes")
    ] = True
    kv_disk: (
        Annotated[
            str,
            Meta(
                description="PATH,SIZE: keep KV blocks on disk too, such as /var/cache/disagg,20GiB, shared out among "
                "the instances; they are found again after a restart"
            ),
        ]
        | None
    ) = None

    def __post_init__(self) -> None:
        for flag, value in (("--kv-disk", self.kv_disk), ("--kv-host-memory", self.kv_host_memory_bytes)):
            if value is not None and not self.prefix_caching:
                raise ConfigurationError(f"{flag} keeps what --no-prefix-caching does not want to find: leave one out")

    def disk(self, num_instances: int) -> DiskSettings | None:
        """Return what each of so many instances may use; None without a disk. Raises ConfigurationError."""
        if self.kv_disk is None:
            return None
        whole = DiskSettings.parse(self.kv_disk)
        return msgspec.structs.replace(whole, max_bytes=whole.max_bytes // num_instances)


class SchedulerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The step scheduler of each instance."""

    scheduling: (
        Annotated[SchedulingMode, Meta(description="what a step takes first [default: slack with a TPOT objective]")]
        | None
    ) = None
    queue: (
        Annotated[
            QueueOrder,
            Meta(description="which waiting sequence comes next [default: edf with a TTFT objective, else priority]"),
        ]
        | None
    ) = None
    objectives: Objectives = Objectives()
    """Of requests that bring none."""
    tells_costs: bool = False
    """Learn what steps cost, and tell the router."""
    max_batch_tokens: Annotated[int, Meta(ge=1, description="most new tokens in one step")] = 512
    max_batch_size: Annotated[int, Meta(ge=1, description="most sequences in one step")] = 64
    max_steps_in_flight: Annotated[int, Meta(ge=1, description="steps given to the executor before the first ends")] = 1
    max_pulls_in_flight: Annotated[int, Meta(ge=1, description="hand-overs that an instance copies at once")] = 1
    kv_overlap: Annotated[bool, Meta(description="hand KV blocks over while their prompt is still being computed")] = (
        True
    )
    pull_before_step: Annotated[
        bool, Meta(description="pull offered KV blocks before the next step starts, as DistServe does, not beside it")
    ] = False
    fixed_batches: Annotated[
        bool,
        Meta(description="keep a sequence in the batch of the pipeline that it joined, as DistServe does; else share"),
    ] = False
    lease_s: Annotated[
        float,
        Meta(gt=0, description="seconds that handed-over KV blocks wait to be pulled before they are freed"),
    ] = 120.0


class CurveKeys(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """With what an instance on another host shows itself to the server, and knows it: CURVE keys in Z85."""

    server_public: str
    public: str
    secret: str


class InstanceSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything one engine instance is told at its start."""

    instance: InstanceId
    role: Role
    control_endpoint: str
    """ZeroMQ endpoint on which the router listens."""
    control_key: str | None = None
    """What shows the router that this is an instance of its server; None where it does not ask."""
    control_curve: CurveKeys | None = None
    """The same over TCP."""
    model: ModelSettings
    cache: CacheSettings
    scheduler: SchedulerSettings
    transfer: TransferSettings = TransferSettings()
    kv_host: str | None = None
    """Address of this host on which other hosts read KV blocks; None where none does."""
    device: Device = Device.CPU
    cpus: tuple[int, ...] = ()
    """Cores this instance is pinned to; empty pins nothing."""
    num_threads: int = 1
    lent_cores: LentCores | None = None
    """None lends and borrows none."""
    kernel_backend: str | None = None
    """``native`` or ``torch``; None takes the best that is there."""
    kv_disk: DiskSettings | None = None
    """Its own share."""
    tells_tokens: bool = False
    """With the names of the KV blocks that it keeps: somebody publishes them."""
    latency: str | None = None
    """Profile that predicts step times; None learns them."""
    event_log: str | None = None
    """File that receives every scheduler event and action, for replay."""
    weights: str | None = None
    """File in which the server's instances share their packed weights; None keeps them to itself."""
    parent_pid: int = 0
    """The instance ends when this process is gone; 0 watches nobody."""


class RouterSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Dispatch and its bounds."""

    strict_roles: (
        Annotated[
            bool,
            Meta(
                description="prefill on prefill instances and decode on decode instances alone; without, predicted "
                "latency decides for each request, and the role is a leaning [default: without where --slo is given]"
            ),
        ]
        | None
    ) = None
    overload: Annotated[
        Overload, Meta(description="what becomes of a request that is predicted to miss its objectives")
    ] = Overload.QUEUE
    tenants: dict[str, TenantSettings] = {}
    """Those with a weight, a bound or a class of their own, by name."""
    classes: dict[str, ServiceClass] = {}
    """Classes of service by name."""
    max_queued_requests: Annotated[
        int,
        Meta(ge=1, description="sequences that may be under way or wait at once; more are refused with 429"),
    ] = 1024
    instance_timeout_s: Annotated[
        float, Meta(gt=0, description="seconds without a sign of life after which an instance counts as lost")
    ] = 30.0
    start_timeout_s: Annotated[
        float, Meta(gt=0, description="seconds without a sign of life after which a starting instance has failed")
    ] = 300.0
    instance_wait_s: Annotated[
        float,
        Meta(gt=0, description="seconds that a request waits for an instance that is (re)starting before it gets 503"),
    ] = 20.0
    request_timeout_s: Annotated[
        float, Meta(gt=0, description="seconds after which an unfinished request is given up with 408")
    ] = 600.0
    cache_routing: Annotated[
        CacheRouting, Meta(description="what dispatch makes of the prefixes that instances have cached")
    ] = CacheRouting.PULL
    append_turns: Annotated[
        bool,
        Meta(description="let the decode instance that holds a conversation compute its next turn if that is quicker"),
    ] = True
    min_kv_bandwidth_bytes: Annotated[
        int,
        Meta(
            ge=0,
            description="bytes per second at which KV blocks must be read from each prefill instance, such as 1GB: an "
            "instance with a slower link is refused [default: any speed will do]",
        ),
    ] = 0
    max_instance_losses: Annotated[
        int,
        Meta(
            ge=1, description="deaths of the instance that it is on after which a request gets 503; before, it goes on"
        ),
    ] = 2
    autoscale: Annotated[
        str | None,
        Meta(
            description="how many instances of each role there may be, such as prefill=1..3,decode=1..3: they are "
            "added and removed by the predicted attainment of --slo"
        ),
    ] = None
    replan: Annotated[
        Replan, Meta(description="whether the placement is planned anew when the workload has moved: told, or changed")
    ] = Replan.OFF

    def __post_init__(self) -> None:
        parse_autoscale(self.autoscale)
        check_classes(self.tenants, self.classes)

    @property
    def has_walls(self) -> bool:
        """True when an instance does what its role says alone: where nobody decided, too."""
        return self.strict_roles is not False

    @property
    def predicts(self) -> bool:
        """True when dispatch goes by predicted latency."""
        overloads = {self.overload, *(one.overload or self.overload for one in self.classes.values())}
        return not self.has_walls or overloads != {Overload.QUEUE} or bool(self.tenants)

    @property
    def needs_costs(self) -> bool:
        """True when instances have to tell what their steps cost."""
        return self.predicts or self.watches_workload

    @property
    def watches_workload(self) -> bool:
        """True when somebody looks at what was asked lately, and what came of it."""
        return self.autoscale is not None or self.replan is not Replan.OFF

    @property
    def changes_placement(self) -> bool:
        """True when instances come, go or change their roles without an operator."""
        return self.autoscale is not None or self.replan is Replan.ACT

    @property
    def ranges(self) -> Mapping[Role, InstanceRange]:
        """How many instances there may be of the roles that are scaled."""
        return parse_autoscale(self.autoscale)


class ServeSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP side."""

    host: Annotated[str, Meta(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="port to listen on; 0 takes a free one")] = 8000
    api_key: Annotated[str | None, Meta(description="key that clients must send as a bearer token")] = None
    tenant_keys: dict[str, str] = {}
    """Further keys, each with the name of its tenant."""
    api_key_file: Annotated[
        str | None, Meta(description="file with a key on each line, for clients with keys of their own")
    ] = None
    cors_origin: Annotated[
        tuple[str, ...],
        Meta(description="origin whose web pages may call the API, such as http://localhost:3000, or * for any"),
    ] = ()
    otlp_endpoint: Annotated[
        str | None,
        Meta(description="collector that receives a trace of each request, such as http://127.0.0.1:4318"),
    ] = None
    trace_ratio: Annotated[
        float, Meta(ge=0, le=1, description="share of requests to trace where the client's traceparent does not say")
    ] = 1.0
    served_model_name: Annotated[
        str | None,
        Meta(description="name of the model in the API [default: from the model's folder or file]"),
    ] = None
    generation_config: Annotated[
        str,
        Meta(
            description="sampling defaults: auto (the model's generation_config.json), vllm (none), a folder with one"
        ),
    ] = "auto"
    tool_call_parser: Annotated[
        ToolCallParser, Meta(description="how the model writes calls of tools; auto: as its chat template says")
    ] = ToolCallParser.AUTO
    reasoning_parser: Annotated[
        ReasoningParser, Meta(description="tell reasoning from the answer; auto: by the tags of the chat template")
    ] = ReasoningParser.AUTO
    trust_request_chat_template: Annotated[
        bool, Meta(description="run chat templates that requests bring: sandboxed programs, bounded in time and memory")
    ] = False
    keep_alive_s: Annotated[
        float, Meta(gt=0, description="seconds that a connection is kept open for a client's next request")
    ] = 300.0
    header_timeout_s: Annotated[
        float,
        Meta(gt=0, description="seconds that a new connection, or a request's headers, may take to say something"),
    ] = 30.0
    drain_s: Annotated[
        float, Meta(ge=0, description="seconds that running requests get to finish after Ctrl-C or SIGTERM")
    ] = 5.0

    def __post_init__(self) -> None:
        own = {f"the key of {name}": key for key, name in self.tenant_keys.items()}
        for what, key in ({"--api-key": self.api_key} | own).items():
            if key is not None and not is_api_key(key):
                raise ConfigurationError(
                    f"{what}: an empty key, or one with control characters or spaces at its ends, cannot be sent; "
                    "choose another, or leave it out"
                )
        for origin in self.cors_origin:
            if origin != "*" and _ORIGIN.fullmatch(origin) is None:
                raise ConfigurationError(
                    f"--cors-origin {origin!r} is not an origin: write scheme, host and port as browsers do, "
                    "such as http://localhost:3000 (no path, no slash at the end), or *"
                )
        if self.otlp_endpoint is not None and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ConfigurationError(
                f"--otlp-endpoint {self.otlp_endpoint!r} is not the URL of a collector that takes OTLP over HTTP: "
                "write one such as http://127.0.0.1:4318"
            )


MAX_INSTANCES: Final = 4096
MAX_PARALLEL: Final = 1024
"""Of a placement: what is over is a slip, and would only be found when memory ends."""


DeviceRange = Annotated[str, Meta(pattern=r"^[^:\s]+:\d+(-\d+)?$", max_length=256)]
"""One device of a node, ``gpu-0:3``, or several, ``gpu-0:0-3``."""


class InstanceGroup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Equal instances of one role. What is None here is as for all instances."""

    role: Role
    count: Annotated[int, Meta(ge=1, le=MAX_INSTANCES)]
    num_threads: Annotated[int, Meta(ge=1, le=MAX_PARALLEL)] | None = None
    tensor_parallel: Annotated[int, Meta(ge=1, le=MAX_PARALLEL)] = 1
    pipeline_parallel: Annotated[int, Meta(ge=1, le=MAX_PARALLEL)] = 1
    scheduling: SchedulingMode | None = None
    max_batch_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_batch_size: Annotated[int, Meta(ge=1)] | None = None
    kv_memory_bytes: Annotated[int, Meta(ge=1)] | None = None
    block_size: Annotated[int, Meta(ge=2, le=1024)] | None = None
    dtype: DType | None = None
    quantization: Quantization | None = None
    kernels: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    """Of its engines, as ``--kernels``. Where groups differ in these, KV blocks are converted on their way."""
    devices: tuple[DeviceRange, ...] = ()
    """Of a cluster file's nodes: those of the first instance, stage after stage, then those of the next. None named:
    whoever starts or simulates the instances chooses."""

    def scheduler(self, common: SchedulerSettings) -> SchedulerSettings:
        """Return the scheduler's settings of this group, given those of all."""
        own = {name: getattr(self, name) for name in ("scheduling", "max_batch_tokens", "max_batch_size")}
        return msgspec.structs.replace(common, **{name: value for name, value in own.items() if value is not None})

    def model(self, common: ModelSettings) -> ModelSettings:
        """Return in which precision this group computes, given that of all."""
        return msgspec.structs.replace(
            common, dtype=self.dtype or common.dtype, quantization=self.quantization or common.quantization
        )

    def cache(self, common: CacheSettings) -> CacheSettings:
        """Return the KV pool's settings of this group, given those of all."""
        own = {"kv_memory_bytes": self.kv_memory_bytes, "block_size": self.block_size}
        return msgspec.structs.replace(common, **{name: value for name, value in own.items() if value is not None})


class Placement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many instances of which phase with which parallelism. Written as YAML by hand or by a planner.

    Raises ConfigurationError when no request could ever be served: prefill without decode, or the reverse, with no
    colocated instance beside it.
    """

    groups: tuple[InstanceGroup, ...]
    others_join: bool = False
    """Instances on other hosts complete it, so that it need not serve anything alone."""
    kv_transfer_dtype: KvTransferDtype | None = None
    """Form of KV blocks over TCP, where ``--kv-transfer-dtype`` says none."""
    lend_cores: bool | None = None
    """Whether instances of one host lend each other their cores, where ``--lend-cores`` says nothing."""
    classes: Annotated[dict[ClassName, ServiceClassEntry], Meta(max_length=MAX_CLASSES)] = {}
    """Classes of service."""

    def __post_init__(self) -> None:
        prefill, decode, colocated = (self.count(role) for role in (Role.PREFILL, Role.DECODE, Role.COLOCATED))
        if self.others_join:
            return
        if not colocated and not (prefill and decode):
            raise ConfigurationError(
                f"placement of {prefill} prefill, {decode} decode and {colocated} colocated instances serves nothing: "
                "give at least one prefill and one decode instance, or one colocated"
            )

    def __hash__(self) -> int:
        # Classes are no key, and rarely differ.
        return hash((self.groups, self.others_join, self.kv_transfer_dtype, self.lend_cores))

    def count(self, role: Role) -> int:
        """Return the number of instances of one role."""
        return sum(group.count for group in self.groups if group.role is role)
