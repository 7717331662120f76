"""What an instance finds out when it measures a simulated link: what the model says of it, at no cost."""

from disagg.base.ids import InstanceId
from disagg.base.messages import LinkFigure, LinkMeasured
from disagg.costs.coded_links import CodedLinks
from disagg.costs.links import SerialLinks


def link_measured(
    links: SerialLinks | CodedLinks,
    source: tuple[InstanceId, str],
    target: tuple[InstanceId, str],
) -> LinkMeasured:
    """Return how fast the target reads the KV pool of the source over a link that nobody else uses.

    Both are instances, with the names of their lives.
    """
    latency_s, bytes_per_s = links.speed(source[0], target[0])
    return LinkMeasured(
        instance=target[0],
        incarnation=target[1],
        source=source[0],
        source_incarnation=source[1],
        figure=LinkFigure(
            link=links.kind(source[0], target[0]).value,
            bytes_per_s=bytes_per_s,
            latency_s=latency_s,
            limit_bytes_per_s=bytes_per_s,
        ),
    )
