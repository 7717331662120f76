"""What an instance finds out when it measures a simulated link: what the model says of it, at no cost."""

from disagg.base.ids import InstanceId
from disagg.base.messages import LinkFigure
from disagg.costs.coded_links import CodedLinks
from disagg.costs.links import SerialLinks


def link_figure(links: SerialLinks | CodedLinks, source: InstanceId, target: InstanceId) -> LinkFigure:
    """Return how fast ``target`` reads the KV pool of ``source`` over a link that nobody else uses."""
    latency_s, bytes_per_s = links.speed(source, target)
    return LinkFigure(
        link=links.kind(source, target).value,
        bytes_per_s=bytes_per_s,
        latency_s=latency_s,
        limit_bytes_per_s=bytes_per_s,
    )
