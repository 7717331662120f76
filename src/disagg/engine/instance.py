"""Building one live instance from its settings, reporting progress, and running its loop."""

import gc
import logging
import os
import signal
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import msgspec
import psutil
import torch

from disagg.base.clock import Clock
from disagg.base.config import Device, InstanceSettings, ModelSettings
from disagg.base.disk_settings import DiskSettings
from disagg.base.errors import ConfigurationError
from disagg.base.event_log import EventLog
from disagg.base.ids import BlockHash
from disagg.base.kv_events import Medium
from disagg.base.message_fields import PROTOCOL_VERSION
from disagg.base.messages import InstanceFacts, Loading, Ready
from disagg.base.transfer_settings import KvLinkChoice, KvTransferDtype
from disagg.base.units import format_bytes
from disagg.costs.measured_steps import FittedLatency
from disagg.costs.profile import load_profile
from disagg.costs.thread_scaling import estimate_words, latency_at
from disagg.engine.batch_builder import BatchBuilder
from disagg.engine.control import ControlChannel
from disagg.engine.decoder_loading import DecoderLoading
from disagg.engine.disk_files import BlockFiles
from disagg.engine.executor import Executor
from disagg.engine.facts import Capacity, check_memory, layer_tables, plan_capacity
from disagg.engine.grammar import Grammars
from disagg.engine.host_blocks import HostBlocks
from disagg.engine.isolation import IsolatingExecutor
from disagg.engine.kernels.interface import KernelBackend
from disagg.engine.kernels.select import select_backend
from disagg.engine.kv_store import make_kv_store
from disagg.engine.kv_tiers import BlockStore, KvTiers
from disagg.engine.lent_cores import OWN_CORES, SharedCores, open_cores
from disagg.engine.link_measuring import LinkMeasuring
from disagg.engine.loop import Accessories, EngineLoop
from disagg.engine.model.decoder import StepDecoder
from disagg.engine.model.weights import TORCH_DTYPES
from disagg.engine.model_executor import ModelExecutor
from disagg.engine.pulls import Pulls
from disagg.engine.steps import InlineSteps, Steps, ThreadedSteps
from disagg.models.config import ModelConfig
from disagg.models.fingerprint import fingerprint
from disagg.models.foreign import ForeignModel
from disagg.models.generation_config import end_token_ids, load_generation_config
from disagg.models.grammar import GrammarCompiler
from disagg.models.locate import ModelFiles, load_served_model_config, locate_model
from disagg.models.shape import ModelShape
from disagg.models.tokenizer import load_tokenizer
from disagg.scheduling.capacity import step_limits
from disagg.scheduling.instance.copy_queue import MAX_BEHIND_STEPS
from disagg.scheduling.instance.core import InstanceCore
from disagg.scheduling.instance.header import InstanceHeader
from disagg.scheduling.step.threads import StepThreads
from disagg.transfer.links import Links, SharedBlocks
from disagg.transfer.page_toucher import PageToucher
from disagg.transfer.pool import KvPool

_logger = logging.getLogger(__name__)


def run_instance(settings: InstanceSettings, channel: ControlChannel, clock: Clock) -> None:
    """Load the model, say Ready, and serve until a Stop message or SIGTERM.

    Raises ConfigurationError when the settings cannot be used.
    """
    with ExitStack() as stack:
        loop = build_loop(settings, channel, clock, stack)
        # Before this, SIGTERM ends the process at once: it holds nothing that needs an orderly end.
        signal.signal(signal.SIGTERM, lambda *_: loop.stop())
        stack.callback(signal.signal, signal.SIGTERM, signal.SIG_IGN)
        gc.collect()
        gc.freeze()  # what was loaded stays: the collector need not look at it again
        with torch.inference_mode():
            loop.run()


def build_loop(
    settings: InstanceSettings,
    channel: ControlChannel,
    clock: Clock,
    stack: ExitStack,
    *,
    watch: Callable[[Executor], Executor] = lambda executor: executor,
) -> EngineLoop:
    """Build everything that an instance consists of; ``stack`` takes what must be closed.

    ``watch`` may put something around the executor that sees its steps.
    """
    started_s = clock.now()
    progress = _Progress(settings, channel)
    progress.report("model", 0.0)
    files = locate_model(settings.model.model, settings.model.model_code)
    config = load_served_model_config(files, settings.model.model_code)
    grammars = _make_grammars(files, config, stack)
    device = _device(settings.device)
    cores = _open_cores(settings, stack)
    backend = _backend(settings, device, config.head_dim, cores)
    capacity = _plan_capacity(settings, config, backend)
    incarnation = uuid.uuid4().hex
    pool = _make_pool(capacity, incarnation, device, stack)
    loading = DecoderLoading(settings, files, backend, capacity, partial(progress.report, "weights"), clock)
    loaded = loading.load(config, device)
    executor = IsolatingExecutor(_make_executor(settings, loaded.decoder, pool, device))
    shared = SharedBlocks(pool, settings.transfer, settings.kv_host, clock, stack)
    links, pulls = _make_pulls(settings, pool, shared, channel, clock, stack)
    tiers, room = _open_tiers(settings, files, pool, channel.wake, clock, stack)
    facts = InstanceFacts(
        pid=os.getpid(),
        device=settings.device.value,
        kernel_backend=loaded.kernels,
        num_blocks=capacity.layout.num_blocks,
        block_size=capacity.layout.block_size,
        max_model_len=capacity.max_model_len,
        vocab_size=config.vocab_size,
        weight_bytes=loaded.weight_bytes,
        kv_bytes=capacity.layout.total_bytes,
        load_s=clock.now() - started_s,
        pool=shared.address,
        limits=step_limits(settings.scheduler, _threads(settings)),
        kv_layout=capacity.layout.describe(),
        max_host_blocks=room.max_host_blocks,
        max_disk_blocks=room.max_disk_blocks,
        num_saved_blocks=len(room.saved),
        probe=shared.probe,
        window=capacity.layout.window_blocks,
    )
    name, role = settings.instance, settings.role
    ready = Ready(version=PROTOCOL_VERSION, instance=name, incarnation=incarnation, role=role, facts=facts)
    header = core_header(settings, ready, room.saved, counts_layers=loaded.counts_layers)
    watched = watch(executor)
    steps = _make_steps(settings, watched, pool, channel, clock, cores, stack)
    log = None if settings.event_log is None else stack.enter_context(EventLog(Path(settings.event_log), header))
    measuring = LinkMeasuring(name, incarnation, links, clock, channel.wake)
    accessories = Accessories(log, tiers, grammars, measuring)
    return EngineLoop(ready, InstanceCore(header), steps, watched, pulls, channel, clock, accessories)


def _open_cores(settings: InstanceSettings, stack: ExitStack) -> SharedCores | None:
    cores = open_cores(settings.cpus, settings.lent_cores)
    if cores is not None:
        stack.callback(cores.close)
    return cores


def _backend(
    settings: InstanceSettings, device: torch.device, head_dim: int, cores: SharedCores | None
) -> KernelBackend:
    return select_backend(
        device,
        TORCH_DTYPES[settings.model.dtype],
        settings.kernel_backend,
        head_dim=head_dim,
        block_size=settings.cache.block_size,
        helpers=None if cores is None else cores.helpers,
    )


def _plan_capacity(settings: InstanceSettings, config: ModelShape, backend: KernelBackend) -> Capacity:
    has_tiers = settings.kv_disk is not None or settings.cache.kv_host_memory_bytes is not None
    scheduler, kv_format = settings.scheduler, backend.kv_format
    return plan_capacity(settings.model, settings.cache, config, kv_format, scheduler, has_tiers=has_tiers)


def core_header(
    settings: InstanceSettings,
    ready: Ready,
    saved_blocks: tuple[BlockHash, ...] = (),
    *,
    counts_layers: bool = False,
) -> InstanceHeader:
    """Return what the core of an instance is made from, which an event log begins with.

    ``saved_blocks`` are on its disk from a life before. Blocks can be read behind a step that ``counts_layers`` where
    they travel as they are, over a link that sees the count.
    """
    facts, transfer = ready.facts, settings.transfer
    is_seen = transfer.kv_link is not KvLinkChoice.NIXL and transfer.kv_transfer_dtype is KvTransferDtype.RAW
    return InstanceHeader(
        instance=ready.instance,
        incarnation=ready.incarnation,
        settings=settings.scheduler,
        num_blocks=facts.num_blocks,
        block_size=facts.block_size,
        prefix_caching=settings.cache.prefix_caching,
        max_model_len=facts.max_model_len,
        pool=facts.pool,
        max_host_blocks=facts.max_host_blocks,
        max_disk_blocks=facts.max_disk_blocks,
        window=facts.window,
        saved_blocks=saved_blocks,
        shows_progress=counts_layers and is_seen,
        tells_tokens=settings.tells_tokens,
        medium=Medium.CPU if settings.device is Device.CPU else Medium.GPU,
        threads=_threads(settings),
        latency=None if settings.latency is None else _step_times(Path(settings.latency), settings),
    )


def _threads(settings: InstanceSettings) -> StepThreads:
    return StepThreads(settings.num_threads, len(settings.lent_cores.cores) if settings.lent_cores else 0)


def _step_times(path: Path, settings: InstanceSettings) -> FittedLatency:
    """Return what a profile says of this instance's threads. Raises ConfigurationError when it has no such steps."""
    profile = load_profile(path)
    estimate = estimate_words(profile, settings.num_threads) if settings.device is Device.CPU else None
    if estimate is not None:
        _logger.warning("--latency %s: %s", path, estimate)
    return latency_at(profile, settings.num_threads)


def _make_steps(
    settings: InstanceSettings,
    executor: Executor,
    pool: KvPool,
    channel: ControlChannel,
    clock: Clock,
    cores: SharedCores | None,
    stack: ExitStack,
) -> Steps:
    if settings.scheduler.max_steps_in_flight == 1:
        return InlineSteps(executor, clock, pool.progress, cores or OWN_CORES)
    # OpenMP counts threads for each thread that starts some.
    prepare = partial(torch.set_num_threads, settings.num_threads)
    steps = ThreadedSteps(executor, clock, channel.wake, prepare, pool.progress)
    stack.callback(steps.close)
    return steps


class _Progress:
    """Tells the router how far the start has come, once for each percent."""

    def __init__(self, settings: InstanceSettings, channel: ControlChannel) -> None:
        self._instance = settings.instance
        self._channel = channel
        self._last = ("", 0)

    def report(self, stage: str, fraction: float) -> None:
        """Send a message unless the last one said the same."""
        current = (stage, int(fraction * 100))
        if current != self._last:
            self._last = current
            self._channel.send(Loading(instance=self._instance, stage=stage, fraction=fraction))


def _device(device: Device) -> torch.device:
    if device is Device.CUDA and not torch.cuda.is_available():
        raise ConfigurationError(f"--device cuda: PyTorch {torch.__version__} finds no CUDA device; use --device cpu")
    return torch.device(device.value)


def _make_pool(capacity: Capacity, incarnation: str, device: torch.device, stack: ExitStack) -> KvPool:
    if device.type == "cuda":
        check_memory(capacity.layout, torch.cuda.mem_get_info(device)[0], "the CUDA device")
    else:
        check_memory(capacity.layout, psutil.virtual_memory().available, "this host")
    pool = KvPool(capacity.layout, incarnation)
    stack.callback(pool.close)
    if device.type == "cpu":
        toucher = PageToucher(pool)
        toucher.start()
        stack.callback(toucher.stop)
    return pool


def _make_executor(
    settings: InstanceSettings, decoder: StepDecoder, pool: KvPool, device: torch.device
) -> ModelExecutor:
    builder = BatchBuilder(
        max_tokens=max(settings.scheduler.max_batch_tokens, settings.scheduler.max_batch_size),
        max_sequences=settings.scheduler.max_batch_size,
        max_blocks=pool.layout.num_blocks_for(decoder.max_model_len),
        device=device,
        layer_tables=layer_tables(decoder.config, pool.layout),
    )
    return ModelExecutor(decoder, make_kv_store(pool, device), builder, pool.progress)


def _make_grammars(files: ModelFiles, config: ModelConfig | ForeignModel, stack: ExitStack) -> Grammars:
    """Return what compiles grammars; it begins to read the tokenizer."""
    tokenizer = cache(partial(load_tokenizer, files))

    def make_compiler(eos_token_ids: tuple[int, ...]) -> GrammarCompiler:
        return GrammarCompiler(tokenizer(), config.vocab_size, eos_token_ids)

    grammars = Grammars(make_compiler, stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="grammar")))
    grammars.prepare(lambda: end_token_ids(config, tokenizer(), load_generation_config(files)))
    return grammars


def _make_pulls(
    settings: InstanceSettings,
    pool: KvPool,
    shared: SharedBlocks,
    channel: ControlChannel,
    clock: Clock,
    stack: ExitStack,
) -> tuple[Links, Pulls]:
    # Closed in reverse: cancel what runs, then wait for the threads, which still wake the channel.
    num_threads = settings.scheduler.max_pulls_in_flight + MAX_BEHIND_STEPS
    threads = stack.enter_context(ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="kv-pull"))
    # Where KV only passes through the pools, on its way between devices, mapping all of them would take the memory.
    links = Links(pool, threads, clock, settings.transfer, maps_ahead=settings.device is Device.CPU, nixl=shared.nixl)
    pulls = Pulls(links, shared, pool.layout, channel.wake)
    stack.callback(pulls.close)
    return links, pulls


@dataclass(frozen=True, slots=True)
class _TierRoom:
    """How many KV blocks an instance may keep in its tiers, and the names of those that are on disk."""

    max_host_blocks: int = 0
    max_disk_blocks: int = 0
    saved: tuple[BlockHash, ...] = ()


def _open_tiers(
    settings: InstanceSettings,
    files: ModelFiles,
    pool: KvPool,
    wake: Callable[[], None],
    clock: Clock,
    stack: ExitStack,
) -> tuple[KvTiers | None, _TierRoom]:
    """Open what an instance has behind its pool, if anything. Raises ConfigurationError when it cannot be used."""
    stores: dict[Medium, BlockStore] = {}
    host = _open_host_memory(settings, pool)
    if host is not None:
        stores[Medium.CPU] = host
    disk = None if settings.kv_disk is None else _open_disk(settings, settings.kv_disk, files, pool, stack)
    if disk is not None:
        stores[Medium.DISK] = disk.files
    if not stores:
        return None, _TierRoom()
    tiers = KvTiers(stores, pool, clock, wake)
    stack.callback(tiers.close)
    max_host_blocks = 0 if host is None else host.max_blocks
    if disk is None:
        return tiers, _TierRoom(max_host_blocks)
    return tiers, _TierRoom(max_host_blocks, disk.max_blocks, disk.files.scan(disk.max_blocks))


def _open_host_memory(settings: InstanceSettings, pool: KvPool) -> HostBlocks | None:
    num_bytes = settings.cache.kv_host_memory_bytes
    if num_bytes is None:
        return None
    if settings.device is Device.CPU:
        raise ConfigurationError(
            "--kv-host-memory is for devices with memory of their own; on a CPU the KV pool is in host memory already: "
            "raise --kv-memory instead"
        )
    max_blocks = num_bytes // pool.layout.block_bytes
    if not max_blocks:
        raise ConfigurationError(
            f"--kv-host-memory {format_bytes(num_bytes)} is less than one KV block of "
            f"{format_bytes(pool.layout.block_bytes)}: raise it"
        )
    available = psutil.virtual_memory().available
    if num_bytes > available:
        raise ConfigurationError(
            f"--kv-host-memory {format_bytes(num_bytes)} is more than the {format_bytes(available)} that this host has "
            "left: lower it"
        )
    return HostBlocks(max_blocks, pool.layout)


@dataclass(frozen=True, slots=True)
class _Disk:
    files: BlockFiles
    max_blocks: int


def _open_disk(
    settings: InstanceSettings, share: DiskSettings, files: ModelFiles, pool: KvPool, stack: ExitStack
) -> _Disk:
    folder = Path(share.folder).expanduser()
    blocks = BlockFiles(folder, settings.instance, _contents(files, settings.model), pool.layout)
    stack.callback(blocks.close)
    max_blocks = share.max_bytes // blocks.file_bytes
    if not max_blocks:
        raise ConfigurationError(
            f"--kv-disk: the share of {settings.instance}, {format_bytes(share.max_bytes)}, is less than one KV block "
            f"of {format_bytes(blocks.file_bytes)}: raise it"
        )
    return _Disk(blocks, max_blocks)


def _contents(files: ModelFiles, model: ModelSettings) -> bytes:
    """Return a name for all that the contents of a KV block hang on, but for their layout."""
    return fingerprint(files, model.model_code, model.max_model_len) + msgspec.json.encode(
        (model.dtype, model.quantization, model.model_code)
    )
