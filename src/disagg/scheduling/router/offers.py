"""Offers of KV blocks that wait in the router until their sequence is placed; they are passed on unread."""

from msgspec import structs

from disagg.base.ids import Epoch, RequestId
from disagg.base.messages import KvOffer


class OfferShelf:
    """The offer of each sequence that has one, and since when."""

    def __init__(self) -> None:
        self._offers: dict[RequestId, tuple[KvOffer, float]] = {}

    def keep(self, offer: KvOffer, now: float, epoch: Epoch | None) -> None:
        """Remember an instance's first offer of the present attempt, ``epoch``, for the instance that will read it."""
        known = self._offers.get(offer.request_id)
        if offer.epoch == epoch and (known is None or known[0].source != offer.source):
            self._offers[offer.request_id] = (offer, now)

    def take(self, request_id: RequestId, now: float) -> KvOffer:
        """Return the offer that is kept of a sequence, with what is left of its lease, and keep it no more."""
        offer, since_s = self._offers.pop(request_id)
        return structs.replace(offer, lease_s=max(0.0, offer.lease_s - (now - since_s)))

    def drop(self, request_id: RequestId) -> None:
        """Forget the offer of a sequence, if there is one."""
        self._offers.pop(request_id, None)
