"""One way to build an instance: its role, its devices, how it forms steps."""

from dataclasses import dataclass, replace

from disagg.base.config import InstanceGroup, SchedulingMode
from disagg.base.request import Role


@dataclass(frozen=True, order=True)
class BatchLimits:
    """How an instance forms steps. What is None is as the engine's rules say."""

    scheduling: str | None = None
    """A ``SchedulingMode``'s value."""
    max_batch_tokens: int | None = None
    max_batch_size: int | None = None

    def __str__(self) -> str:
        words = [] if self.scheduling is None else [self.scheduling]
        if self.max_batch_tokens is not None:
            words.append(f"{self.max_batch_tokens} tokens")
        if self.max_batch_size is not None:
            words.append(f"{self.max_batch_size} sequences")
        return ", ".join(words)


@dataclass(frozen=True)
class InstanceChoice:
    """An instance of a role on devices of one kind, ``tensor_parallel`` x ``pipeline_parallel`` of them."""

    role: Role
    kind: str
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    batching: BatchLimits = BatchLimits()

    @property
    def num_devices(self) -> int:
        """Devices of one instance."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def order(self) -> tuple[str, str, int, int, str]:
        """Sort key: equal searches look at equal choices in equal order."""
        return (
            self.role.value,
            self.kind,
            self.tensor_parallel,
            self.pipeline_parallel,
            str(self.batching),
        )

    def with_batching(self, batching: BatchLimits) -> "InstanceChoice":
        """Return the same devices with steps formed otherwise."""
        return replace(self, batching=batching)

    def group(self, count: int, devices: tuple[str, ...] = ()) -> InstanceGroup:
        """Return so many of them as a placement file says it."""
        mode = self.batching.scheduling
        return InstanceGroup(
            role=self.role,
            count=count,
            tensor_parallel=self.tensor_parallel,
            pipeline_parallel=self.pipeline_parallel,
            scheduling=None if mode is None else SchedulingMode(mode),
            max_batch_tokens=self.batching.max_batch_tokens,
            max_batch_size=self.batching.max_batch_size,
            devices=devices,
        )

    def __str__(self) -> str:
        words = f"{self.role.value} TP{self.tensor_parallel}"
        if self.pipeline_parallel > 1:
            words += f" PP{self.pipeline_parallel}"
        if self.batching.scheduling is not None:
            words += f" {self.batching.scheduling} {self.batching.max_batch_tokens or ''}".rstrip()
        return words
