"""Which parts of a KV block go from which device of one instance to which of another, where they are cut differently.

Tensor parallelism shares out the KV heads, pipeline parallelism the layers. Where there are more tensor ranks than KV
heads, several ranks hold the same head. The reader asks for what it lacks: each (layer, head) once for each of its own
ranks that holds it, from one of the ranks that have it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from disagg.base.errors import ConfigurationError


@dataclass(frozen=True, slots=True, order=True)
class Rank:
    """One device of an instance: its place in the pipeline, and among those that share out the heads of its layers."""

    stage: int
    tensor: int


@dataclass(frozen=True, slots=True)
class KvShare:
    """The layers and KV heads of which a device holds the keys and values."""

    layers: range
    heads: range

    def common(self, other: "KvShare") -> "KvShare | None":
        """Return what both hold; None where that is nothing."""
        layers, heads = _overlap(self.layers, other.layers), _overlap(self.heads, other.heads)
        return KvShare(layers, heads) if layers and heads else None


@dataclass(frozen=True, slots=True)
class Sharding:
    """How one instance cuts the KV of a model of ``num_layers`` and ``num_kv_heads``.

    Raises ConfigurationError for sizes that do not divide.
    """

    num_layers: int
    num_kv_heads: int
    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    def __post_init__(self) -> None:
        heads, tensor = self.num_kv_heads, self.tensor_parallel
        if heads % tensor and tensor % heads:
            raise ConfigurationError(
                f"{heads} KV heads cannot be shared out to {tensor} tensor ranks: choose a tensor_parallel that "
                "divides their number, or that it divides"
            )
        if not 1 <= self.pipeline_parallel <= self.num_layers:
            raise ConfigurationError(
                f"{self.num_layers} layers cannot be shared out to {self.pipeline_parallel} stages: choose a smaller "
                "pipeline_parallel"
            )

    @property
    def ranks(self) -> Iterator[Rank]:
        """All devices, stage after stage."""
        for stage, tensor in product(range(self.pipeline_parallel), range(self.tensor_parallel)):
            yield Rank(stage, tensor)

    def share(self, rank: Rank) -> KvShare:
        """Return what a device holds. Stages differ by a layer at most, the first ones having more."""
        each, more = divmod(self.num_layers, self.pipeline_parallel)
        first_layer = rank.stage * each + min(rank.stage, more)
        layers = range(first_layer, first_layer + each + (rank.stage < more))
        if self.tensor_parallel >= self.num_kv_heads:
            head = rank.tensor * self.num_kv_heads // self.tensor_parallel
            return KvShare(layers, range(head, head + 1))
        size = self.num_kv_heads // self.tensor_parallel
        return KvShare(layers, range(rank.tensor * size, (rank.tensor + 1) * size))


@dataclass(frozen=True, slots=True)
class ShareCopy:
    """Of each block: these layers and heads, counted over the whole model, from one device to another."""

    source: Rank
    target: Rank
    share: KvShare


def plan_copies(source: Sharding, target: Sharding) -> tuple[ShareCopy, ...]:
    """Return the copies that give every device of ``target`` all that it holds, each part once.

    Devices of the source that hold the same heads take turns, so that none is asked for everything. Raises
    ConfigurationError when the two are of different models.
    """
    for name in ("num_layers", "num_kv_heads"):
        theirs, ours = getattr(source, name), getattr(target, name)
        if theirs != ours:
            raise ConfigurationError(f"{name} differ: the source has {theirs}, the reader {ours}; serve one model")
    copies = []
    for reader in target.ranks:
        wanted, taken = target.share(reader), set[tuple[int, int]]()
        for owner in _in_turn(source, reader):
            part = source.share(owner).common(wanted)
            if part is not None and (part.layers.start, part.heads.start) not in taken:
                taken.add((part.layers.start, part.heads.start))
                copies.append(ShareCopy(owner, reader, part))
    return tuple(copies)


def _in_turn(source: Sharding, reader: Rank) -> list[Rank]:
    """Return the source's devices; of those that hold the same heads, another one first for each reader."""
    num_copies = max(1, source.tensor_parallel // source.num_kv_heads)
    return sorted(source.ranks, key=lambda rank: (rank.stage, (rank.tensor - reader.tensor) % num_copies, rank.tensor))


def _overlap(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))
