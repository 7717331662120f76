"""The core of the router: messages and happenings in, messages and effects out. A live and a simulated shell drive it.

It owns dispatch, the members of the deployment (silence, nonsense, restarts, joins, drains, roles), and what is offered
to whom. A shell owns the clock, the sockets, the processes, the clients, and the values of tokens.
"""

import math
from collections.abc import Iterable
from contextlib import suppress
from typing import Final, assert_never

from disagg.base.by_type import by_type
from disagg.base.errors import ConfigurationError, InternalError
from disagg.base.ids import RequestId
from disagg.base.messages import (
    CostsLearned,
    Failed,
    KvEvents,
    KvOffer,
    LinkMeasured,
    Loading,
    LoadReport,
    NotHeld,
    Offered,
    PartOffered,
    Pulled,
    Ready,
)
from disagg.cache.prefix_index import PrefixIndex
from disagg.scheduling.capacity import capacity_tokens
from disagg.scheduling.dispatch.actions import (
    AnyDispatchAction,
    Drained,
    Drop,
    Fail,
    Finish,
    Resume,
    SendAdopt,
    SendGenerate,
    SendPart,
    SendPeerLost,
)
from disagg.scheduling.dispatch.dispatcher import Dispatcher
from disagg.scheduling.dispatch.events import (
    AnyDispatchEvent,
    ChangeRole,
    CostsKnown,
    Drain,
    ForeignLoadKnown,
    InstanceDown,
    InstanceUp,
    Join,
    Leave,
    NothingLent,
    OfferMade,
    PartMade,
    ProcessStarting,
    PullEnded,
    SequenceArrived,
    SequenceCancelled,
    SequenceFailed,
    TokensEmitted,
    Undrain,
)
from disagg.scheduling.dispatch.state import COMING, InstanceEntry, InstanceState
from disagg.scheduling.router.elastic_view import ElasticView
from disagg.scheduling.router.elasticity import AnyChange, AnyElasticNews, elasticity_of
from disagg.scheduling.router.header import RouterHeader
from disagg.scheduling.router.inputs import (
    AnyCommand,
    AnyRouterInput,
    InstanceSaid,
    MalformedMessage,
    MeasureLinks,
    ProcessExited,
    Unreachable,
)
from disagg.scheduling.router.link_survey import LinkSurvey, MeasuredLink, link_known
from disagg.scheduling.router.membership import MAX_MALFORMED_MESSAGES, Member, Membership
from disagg.scheduling.router.offers import OfferShelf
from disagg.scheduling.router.outputs import (
    AnyRouterOutput,
    AskForBlocks,
    DropReason,
    EndInstance,
    GiveUpInstance,
    HandOverEnded,
    InstanceLeft,
    InstanceLost,
    InstanceWelcomed,
    MessageDropped,
    PassedOn,
    RestartInstance,
    SendOffer,
    SendPartOffer,
    SendWithPrefix,
    StopInstance,
    TellPeerLost,
)
from disagg.scheduling.step.actions import WakeAt
from disagg.scheduling.step.events import Tick

_FromReady = Offered | PartOffered | NotHeld | Pulled | Failed | LoadReport | CostsLearned | LinkMeasured | KvEvents
_NEWS_OF_A_MEMBER: Final = (TokensEmitted, InstanceSaid, MalformedMessage, Unreachable, ProcessStarting)


class RouterCore:
    """Not thread-safe; deterministic: equal inputs at equal times give equal outputs."""

    def __init__(self, header: RouterHeader) -> None:
        settings, self._watches_silence = header.settings, header.watches_silence
        self._prefixes = PrefixIndex()
        self._dispatcher = Dispatcher(header.instances, settings, header.scheduler, self._prefixes)
        self._members = Membership(settings, header.restarts)
        for entry in self._dispatcher.instances:
            entry.is_cordoned = entry.instance in header.cordoned
            self._members.add(entry, header.started_s)
        self._elasticity = elasticity_of(header, self._dispatcher)
        self._links = LinkSurvey(settings.min_kv_bandwidth_bytes, self._dispatcher, is_wanted=header.measures_links)
        self._offers = OfferShelf()
        self._part: KvOffer | None = None
        self._dispatch_wake_s = self._check_s = self._asked_s = math.inf
        self._now = header.started_s
        self._outputs: list[AnyRouterOutput] = []

    @property
    def members(self) -> Membership:
        """The instances of the deployment. Not to be changed."""
        return self._members

    @property
    def elastic_view(self) -> ElasticView:
        """What is known of how the deployment changes by itself."""
        return self._elasticity.view

    @property
    def links(self) -> tuple[MeasuredLink, ...]:
        """The links over which sequences are handed over, with what was measured of them."""
        return self._links.links

    @property
    def num_sequences(self) -> int:
        """Sequences under way or waiting."""
        return self._dispatcher.num_sequences

    def can_serve(self) -> bool:
        """True when ready instances can serve a request from prompt to last token."""
        return self._members.serves(self._members.roles({InstanceState.READY}))

    def compared(self, one: SequenceArrived | RequestId) -> list[InstanceEntry]:
        """See ``Dispatcher.compared``."""
        return self._dispatcher.compared(one)

    def validate(self) -> None:
        """Raise InternalError unless all books agree."""
        self._dispatcher.validate()

    def handle(self, one: AnyRouterInput, now: float) -> list[AnyRouterOutput]:
        """Take what happened at ``now`` (seconds) and return what is to be done, in order.

        Raises InternalError on what no instance and no client can cause: a fault of the shell; ConfigurationError on a
        command of an operator that cannot be carried out, with the reason.
        """
        self._outputs, self._now = [], now
        if isinstance(one, _NEWS_OF_A_MEMBER) and self._members.get(one.instance) is None:
            return []  # it has left since
        if self._watches_silence and math.isinf(self._check_s):
            self._check_s = self._members.next_check_s(now)
        _TAKEN_BY[type(one)](self, one)
        self._ask_to_be_woken()
        return self._outputs

    def _on_sequence(self, event: SequenceArrived | SequenceCancelled) -> None:
        self._elasticity.expect_work(self._now)
        self._dispatch(event)

    def _on_news(self, news: AnyElasticNews) -> None:
        self._adapt(self._elasticity.hear(news, self._members, self._now))

    # Instances' messages --------------------------------------------------------------------------------------

    def _on_tokens(self, event: TokensEmitted) -> None:
        member = self._members[event.instance]
        member.last_seen_s = self._now
        if not member.is_alive:
            self._drop(member, DropReason.STALE)
            return
        num_outputs = len(event.progress)
        if num_outputs > 1 and len({progress.request_id for progress in event.progress}) != num_outputs:
            self._broke_protocol(member, "two outputs of one step are for the same sequence")
            return
        self._dispatch_from(member, event)
        self._adapt(self._elasticity.look(self._members))

    def _on_said(self, said: InstanceSaid) -> None:
        member, message = self._members[said.instance], said.message
        member.last_seen_s = self._now
        take = _SAID_BY_READY.get(type(message))
        if take is not None and member.is_alive:
            take(self, message, member)
        elif isinstance(message, Ready):
            self._welcome(member, message)
        elif isinstance(message, Loading):
            member.detail = message.stage
        else:
            self._drop(member, DropReason.STALE)

    def _said_pulled(self, message: Pulled, member: Member) -> None:
        self._outputs.append(HandOverEnded.of(message, member.instance))
        self._dispatch_from(member, PullEnded.of(message, member.instance))

    def _said_nothing_comes(self, message: NotHeld | Failed, member: Member) -> None:
        name = member.instance
        event = SequenceFailed.of(message, name) if isinstance(message, Failed) else NothingLent.of(message, name)
        self._dispatch_from(member, event)

    def _said_load(self, message: LoadReport, member: Member) -> None:
        if message.incarnation != member.incarnation:
            self._drop(member, DropReason.STALE)
            return
        member.load = message.load
        if message.foreign != member.entry.foreign:
            self._dispatch(ForeignLoadKnown(instance=member.instance, load=message.foreign))

    def _said_costs(self, message: CostsLearned, member: Member) -> None:
        if (message.incarnation, message.instance) != (member.incarnation, member.instance):
            self._drop(member, DropReason.STALE)
        else:
            self._dispatch(CostsKnown(lesson=message))

    def _said_offered(self, message: Offered, member: Member) -> None:
        offer = message.offer
        if self._is_own(offer, member):
            self._offers.keep(offer, self._now, self._dispatcher.epoch_of(offer.request_id))
            self._dispatch_from(member, OfferMade.of(offer))

    def _said_part(self, message: PartOffered, member: Member) -> None:
        self._part = message.offer
        if self._is_own(message.offer, member):
            self._dispatch_from(member, PartMade.of(message.offer))

    def _is_own(self, offer: KvOffer, member: Member) -> bool:
        """Return whether an instance offers blocks of its own; one that does not is lost."""
        is_own = (offer.source, offer.incarnation) == (member.instance, member.incarnation)
        if not is_own:
            self._broke_protocol(member, f"it offered blocks of {offer.source} {offer.incarnation}")
        return is_own

    def _said_measured(self, message: LinkMeasured, member: Member) -> None:
        """Tell dispatch how fast a link is; one that is too slow costs the end that came last its place."""
        if (link := self._links.take(message)) is None:
            return
        self._outputs += (link, *self._links.next(self._members))
        source, target = self._members[link.source], self._members[link.target]
        if link.refusal:
            culprit = max(source, target, key=lambda member: member.ready_since_s or 0.0)
            culprit.is_refused = True
            self._declare_lost(culprit, link.refusal)
        elif not link.figure.failure:
            self._dispatch(link_known(link, source))

    def _said_blocks(self, message: KvEvents, member: Member) -> None:
        """Note what became of an instance's cached blocks; ask for all of them when a message was lost."""
        if message.incarnation != member.incarnation:
            self._drop(member, DropReason.STALE)
            return
        try:
            if not self._prefixes.take(member.instance, message.number, message.events):
                self._outputs.append(AskForBlocks(instance=member.instance))
        except InternalError as error:
            self._broke_protocol(member, str(error))

    def _on_malformed(self, event: MalformedMessage) -> None:
        member = self._members[event.instance]
        member.num_malformed += 1
        self._drop(member, DropReason.MALFORMED)
        if member.num_malformed == MAX_MALFORMED_MESSAGES:
            self._declare_lost(member, f"{member.num_malformed} malformed messages, the last: {event.error}")

    def _welcome(self, member: Member, message: Ready) -> None:
        if why := self._members.why_unfit(member, message):
            self._declare_lost(member, why)
            return
        if member.is_alive:
            if message.incarnation == member.incarnation:
                return
            self._lose(member, "it was started anew", returning=True)
        member.set_ready(message, self._now)
        facts = message.facts
        capacity = capacity_tokens(facts.num_blocks, facts.block_size, facts.max_model_len)
        max_blocks = facts.num_blocks + facts.max_host_blocks + facts.max_disk_blocks
        self._prefixes.join(member.instance, facts.block_size, max_blocks, has_host_tier=facts.max_host_blocks > 0)
        self._dispatch(
            InstanceUp(
                instance=member.instance,
                max_total_tokens=capacity,
                pool_tokens=facts.pool_tokens,
                window=facts.window,
                limits=facts.limits,
            )
        )
        self._outputs += (InstanceWelcomed(instance=member.instance), *self._links.joined(member, self._members))
        if facts.num_saved_blocks:
            self._outputs.append(AskForBlocks(instance=member.instance))

    # Lives and deaths -----------------------------------------------------------------------------------------

    def _on_unreachable(self, event: Unreachable) -> None:
        self._declare_lost(self._members[event.instance], event.why)

    def _on_starting(self, event: ProcessStarting) -> None:
        self._members[event.instance].set_starting(self._now)
        self._dispatch(event)

    def _on_exit(self, event: ProcessExited) -> None:
        """Decide whether a dead process is started again, and say what its death means."""
        member = self._members[event.instance]
        if member.is_leaving:
            self._let_go(member)
            return
        delay_s = member.die(self._now)
        if event.returns is not None:
            self._lose(member, event.detail, returning=event.returns)
            return
        self._lose(member, event.detail, returning=delay_s is not None)
        if delay_s is not None:
            self._outputs.append(RestartInstance(instance=member.instance, delay_s=delay_s))
            return
        left = self._members.roles({InstanceState.READY, InstanceState.DRAINING, *COMING})
        self._outputs.append(GiveUpInstance(instance=member.instance, nothing_left=not self._members.serves(left)))

    def _broke_protocol(self, member: Member, how: str) -> None:
        self._declare_lost(member, f"it broke the protocol: {how}")

    def _declare_lost(self, member: Member, why: str) -> None:
        """Treat a faulty instance as dead, and have it ended."""
        self._lose(member, why, returning=True)
        self._outputs.append(EndInstance(instance=member.instance, why=why))

    def _lose(self, member: Member, detail: str, *, returning: bool) -> None:
        if member.is_alive:
            self._outputs.append(InstanceLost(instance=member.instance))
        member.set_lost(detail)
        self._prefixes.leave(member.instance)
        self._dispatch(InstanceDown(instance=member.instance, returning=returning, detail=detail))
        self._outputs += self._links.next(self._members)

    # Commands -------------------------------------------------------------------------------------------------

    def _adapt(self, changes: Iterable[AnyChange]) -> None:
        """Carry out what the deployment decides for itself; what cannot be done now is decided anew another time."""
        for change in changes:
            if isinstance(change, Drain | ChangeRole):
                with suppress(ConfigurationError):
                    self._change_member(change)
            else:
                self._outputs.append(change)

    def _on_command(self, command: AnyCommand | MeasureLinks) -> None:
        if isinstance(command, MeasureLinks):
            self._links.begin_anew()
        else:
            self._change_member(command)
        self._outputs += self._links.next(self._members)

    def _change_member(self, command: AnyCommand) -> None:
        known = self._members.get(command.instance)
        if isinstance(command, Join):
            self._join(command, known)
            return
        if known is None:
            raise ConfigurationError(f"there is no instance {command.instance}, only {', '.join(self._members.names)}")
        match command:
            case Drain():
                self._drain(command, known)
            case Undrain(instance=instance):
                if known.is_leaving or not known.entry.is_cordoned:
                    state = "being removed" if known.is_leaving else "not draining"
                    raise ConfigurationError(f"{instance} cannot be given sequences again: it is {state}")
                self._dispatch(command)
            case Leave():
                if known.is_alive and (known.entry.num_sequences or not known.is_leaving):
                    self._outputs.append(InstanceLost(instance=known.instance))
                self._let_go(known)
            case ChangeRole(instance=instance, role=role):
                if role is known.role:
                    raise ConfigurationError(f"{instance} is a {role.value} instance already")
                self._members.check_serves(f"as a {role.value} instance {instance}", known, role, force=command.force)
                self._dispatch(command)
            case _:
                assert_never(command)

    def _join(self, command: Join, known: Member | None) -> None:
        if known is not None:
            raise ConfigurationError(f"there is an instance {command.instance} already: choose another name")
        self._dispatch(command)
        self._members.add(self._dispatcher.instances[-1], self._now)

    def _drain(self, command: Drain, member: Member) -> None:
        """Let an instance give away what it holds, and leave, where that is asked, once it holds nothing."""
        instance = member.instance
        if member.is_leaving:
            raise ConfigurationError(f"{instance} is being removed already")
        if not command.leave and member.state is not InstanceState.READY:
            raise ConfigurationError(f"{instance} cannot drain: it is {member.state.value}")
        if member.state is not InstanceState.GONE:
            self._members.check_serves(f"without {instance}", member, None, force=command.force)
        member.is_leaving = command.leave
        if member.state is InstanceState.READY:
            self._dispatch(command)
        elif member.state is InstanceState.GONE:
            self._outputs.append(StopInstance(instance=instance))
            self._let_go(member)
        elif not member.entry.num_sequences:
            self._outputs.append(StopInstance(instance=instance))

    def _let_go(self, member: Member) -> None:
        """Strike a member off the list; what it still holds goes on elsewhere."""
        self._prefixes.leave(member.instance)
        self._dispatch(Leave(instance=member.instance))
        self._members.remove(member.instance)
        self._outputs.append(InstanceLeft(instance=member.instance))

    # Dispatch -------------------------------------------------------------------------------------------------

    def _dispatch_from(self, member: Member, event: AnyDispatchEvent) -> None:
        """Let the dispatcher handle what an instance said; one that cannot be true is the instance's fault."""
        try:
            self._dispatch(event)
        except InternalError as error:
            self._broke_protocol(member, str(error))

    def _dispatch(self, event: AnyDispatchEvent) -> None:
        for action in self._dispatcher.handle(event, self._now):
            _CARRIED_OUT_BY[type(action)](self, action)

    def _do_pass_on(self, action: PassedOn) -> None:
        self._outputs.append(action)

    def _do_start(self, action: SendGenerate) -> None:
        prefix = self._offers.take(action.request_id, self._now) if action.with_prefix else None
        self._outputs.append(action if prefix is None else SendWithPrefix.of(action, prefix))

    def _do_tell_drained(self, action: Drained) -> None:
        self._outputs.append(action)
        if self._members[action.instance].is_leaving:
            self._outputs.append(StopInstance(instance=action.instance))

    def _do_wake(self, action: WakeAt) -> None:
        self._dispatch_wake_s = action.time_s

    def _do_drop(self, action: Drop) -> None:
        self._drop(self._members[action.instance], DropReason.STALE)

    def _do_adopt(self, action: SendAdopt) -> None:
        self._outputs.append(SendOffer.of(action, self._offers.take(action.request_id, self._now)))

    def _do_send_part(self, action: SendPart) -> None:
        assert self._part is not None, "a part is passed on as it comes"
        self._outputs.append(SendPartOffer.of(action, self._part))

    def _do_tell_loss(self, action: SendPeerLost) -> None:
        lost = self._members[action.lost]
        self._outputs.append(TellPeerLost(instance=action.instance, lost=action.lost, incarnation=lost.incarnation))

    def _do_end_attempt(self, action: Finish | Fail | Resume) -> None:
        self._offers.drop(action.request_id)
        self._outputs.append(action)

    def _drop(self, member: Member, reason: DropReason) -> None:
        self._outputs.append(MessageDropped(instance=member.instance, reason=reason))

    # Time -----------------------------------------------------------------------------------------------------

    def _on_tick(self, event: Tick) -> None:
        self._asked_s = math.inf
        if self._now >= self._dispatch_wake_s:
            self._dispatch_wake_s = math.inf
            self._dispatch(Tick())
        if self._watches_silence and self._now >= self._check_s:
            for member, why in self._members.silent(self._now):
                self._declare_lost(member, why)
            self._check_s = self._members.next_check_s(self._now)
        if self._now >= self._elasticity.due_s:
            self._adapt(self._elasticity.review(self._members, self._now, has_work=self.num_sequences > 0))

    def _ask_to_be_woken(self) -> None:
        """Ask for a Tick at the earliest time at which something may be due, unless it is asked for already."""
        due_s = min(self._dispatch_wake_s, self._check_s, self._elasticity.due_s)
        if due_s < self._asked_s:
            self._asked_s = due_s
            self._outputs.append(WakeAt(time_s=due_s))


_TAKEN_BY: Final = by_type(AnyRouterInput, RouterCore, "_on_")
_SAID_BY_READY: Final = by_type(_FromReady, RouterCore, "_said_")
_CARRIED_OUT_BY: Final = by_type(AnyDispatchAction, RouterCore, "_do_")
