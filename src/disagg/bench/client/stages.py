"""Where our server tells it: who served each request, and how long each stage of it took."""

from collections.abc import Iterable, Sequence

import msgspec

from disagg.bench.client.inquiries import RecentRequest
from disagg.measure.record import RequestRecord


def merge_stages(records: Sequence[RequestRecord], views: Iterable[RecentRequest]) -> list[RequestRecord]:
    """Return the records with instances and stages of the views of equal request id."""
    known = {view.request_id: view for view in views}
    return [_merge(record, known.get(record.request_id)) for record in records]


def _merge(record: RequestRecord, view: RecentRequest | None) -> RequestRecord:
    if view is None:
        return record
    instances = tuple(name for name in (view.prefill_instance, view.decode_instance) if name)
    return msgspec.structs.replace(record, stages=view.stages, instances=instances, is_best_effort=view.is_best_effort)
