"""The conversation with every device: it is greeted, joins, asks and is answered, until it goes or is sent away."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from protocol import (
    AskPart,
    AskPiece,
    Goodbye,
    Hello,
    Join,
    Message,
    Ping,
    Pong,
    RemoteProtocolError,
    State,
    largest_message_bytes,
)
from protocol.settings import NEXT_PIN
from storage import CacheFolder
from terminal import count, duration, version

from ..door import Door
from ..edge_part import EdgePartStore, PartUnavailable
from ..enrolment import Enrolment
from ..federation import Federation, NameInUse
from ..history import tell
from ..listener import Listener
from .handing_over import HandingOver
from .http_handshake import SECONDS_TO_TRY_AGAIN
from .lifetime import Lifetime
from .peer import CacheError, ConnectionLost, Peer
from .performer import Performer

__all__ = ["Conversations"]

logger = logging.getLogger("gpu_server")

# Between Welcome and Join a device reads its part of the model, from a slow card perhaps, or fetches it. With each piece it has
# as much time again: a slow link may take hours, as long as it gets on.
SECONDS_TO_JOIN = 600.0
SECONDS_TO_MEND = 60.0
NAMES_IN_A_PONG = 100


class Conversations:
    """
    All conversations of a run, one for each connection.

    Args:
        peers: by the name of the client, the one connection that is its own. A connection that was taken out of it was
            dismissed: the federation hears no more from it.
        model_name: of the base model on the Hugging Face hub, if it came from there.
        caches: the activation cache of a client, by its name, where the run has any.
        edge_part: what is handed to devices without a model, where the run has it.
    """

    def __init__(
        self,
        federation: Federation,
        performer: Performer,
        lifetime: Lifetime,
        *,
        peers: dict[str, Peer],
        door: Door,
        listener: Listener,
        model_name: str,
        caches: Callable[[str], CacheFolder] | None,
        edge_part: EdgePartStore | None,
    ) -> None:
        self._federation, self._performer, self._lifetime = federation, performer, lifetime
        self._peers, self._door, self._listener = peers, door, listener
        self._model_name, self._caches = model_name, caches
        self._edge_weights = "" if edge_part is None else edge_part.weights
        self._handing_over = HandingOver(edge_part)
        self._told_of_next_key: dict[str, str] = {}
        """By client, the pin of which it is noted in the events that the client knows it."""

    async def converse(self, peer: Peer) -> None:
        """Converse until the connection ends, and log why it did."""
        timeout = None
        try:
            while True:
                timeout = self._timeout(peer)
                message = await peer.receive(timeout)
                if peer.name is not None and not self._is_current(peer):
                    logger.debug("%s: ignored what came after it was dismissed", peer)
                    # Whoever dismissed it is still telling it why, and closes it; closing it here would cut that off.
                    await peer.connection.wait_closed()
                    break
                if isinstance(message, Goodbye):
                    self._forget(peer, "it said goodbye")
                    break
                if message is not None:
                    await self._answer(peer, message)
        except asyncio.TimeoutError:
            # Its link stalled, or its disk. It may come again, and is still a member, as if the link had been lost.
            awaited = "Join" if peer.session.state is State.WELCOMED else "Hello"
            self._forget(peer)
            await self._refuse(peer, f"no {awaited} came within {duration(timeout or 0.0)}", retry_after=SECONDS_TO_TRY_AGAIN)
        except RemoteProtocolError as error:
            # Before it is told: the others do not wait for a peer that does not listen. Who has not joined cannot leave.
            told = self._forget(peer, str(error) if peer.has_joined else None)
            retry_after = SECONDS_TO_TRY_AGAIN if isinstance(error, NameInUse) else 0.0
            await self._refuse(peer, str(error), retry_after=retry_after, told=told)
        except PartUnavailable as error:
            self._forget(peer)
            await self._refuse(peer, str(error), retry_after=SECONDS_TO_MEND if error.may_be_mended else 0.0)
        except CacheError as error:
            self._lifetime.fail(error)
            await peer.connection.wait_closed()  # by whoever dismisses all
        except ConnectionLost:
            # Else it was closed from this side, which has said why.
            is_lost = self._is_current(peer) and not self._lifetime.is_over
            if is_lost and peer.has_joined and not self._lifetime.is_saved:
                tell("lost", f"{peer}: connection lost", client=peer.name)
        finally:
            self._forget(peer)

    def _is_current(self, peer: Peer) -> bool:
        """Whether this is the connection of a client: it has said who it is, and was not dismissed."""
        return peer.name is not None and self._peers.get(peer.name) is peer

    def _timeout(self, peer: Peer) -> float | None:
        """How long a peer may take for its next message. Those who have joined take as long as they compute."""
        if peer.has_joined:
            return None
        return SECONDS_TO_JOIN if peer.session.state is State.WELCOMED else self._door.limits.handshake_seconds

    # Answers

    async def _answer(self, peer: Peer, message: Message) -> None:
        if isinstance(message, Ping):
            await peer.send(self._pong(message))
        elif isinstance(message, Hello):
            await self._greet(peer, message)
        elif isinstance(message, Join):
            await self._join(peer, message)
        elif isinstance(message, AskPart | AskPiece):
            await self._handing_over.answer(peer, message)
        else:
            assert peer.name is not None
            replies = self._performer.perform(self._federation.receive(peer.name, message, time.monotonic()))
            if peer.name in replies:
                # Only when the reply has left, the session knows that a `Start` answers what is still coming, too.
                await asyncio.wait([replies[peer.name]])

    async def _greet(self, peer: Peer, hello: Hello) -> None:
        if self._door.admits is not None and hello.name != (owner := peer.connection.username):
            raise RemoteProtocolError(f"the secret is that of {owner}; it does not open the run for {hello.name}")
        if (before := self._peers.get(hello.name)) is not None and (before.is_of(hello) or not await before.lives()):
            tell("note", f"{before}: its earlier connection is dead", client=hello.name)
            self._forget(before)
            before.drop()
        welcome = self._federation.welcome(hello)
        self._listener.admit(peer.connection.descriptor)
        peer.name, peer.instance, self._peers[hello.name] = hello.name, hello.instance, peer
        peer.keeps_next_pin, peer.next_pin = NEXT_PIN in hello.abilities, self._next_pin()
        await peer.send(replace(welcome, next_pin=peer.next_pin))

    async def _join(self, peer: Peer, join: Join) -> None:
        assert peer.name is not None
        federation = self._federation
        if self._caches is not None:
            peer.session.activation_cache = await asyncio.to_thread(_cache_with, self._caches, peer.name, join)
            if not self._is_current(peer):
                return  # its client was revoked meanwhile, or is back on another connection
        if peer.handed_over:
            fetched = f"{peer} has fetched its part of the model, {peer.handed_over / 1e6:.1f} MB"
            tell("part_fetched", fetched, client=peer.name, bytes=peer.handed_over)
            peer.take_counts()  # these bytes belong to no step
        if peer.keeps_next_pin and peer.next_pin and self._told_of_next_key.get(peer.name) != peer.next_pin:
            self._told_of_next_key[peer.name] = peer.next_pin  # it has kept it, or it would not have come so far
            tell("next_key", f"{peer} knows the server's next key", client=peer.name, quiet=True, pin=peer.next_pin)
        now = time.monotonic()
        before = federation.members.get(peer.name)
        was_started = federation.total_steps > 0
        actions = federation.join(peer.name, join, now)
        peer.has_joined = True
        peer.expect(self._largest_message(join.batch_size * join.longest), answers=federation.settings.micro_batches)
        if before is None:
            came = f"joined with {count(join.num_samples, 'sample')}"
        else:
            came = "is back" if before.lost_at is None else f"is back after {duration(now - before.lost_at)}"
        tell(
            "joined" if before is None else "back",
            f"{peer} {came}; {federation.connected} of {count(federation.settings.clients, 'device')} connected",
            client=peer.name,
            samples=join.num_samples,
            batch_size=join.batch_size,
            steps=federation.members[peer.name].last_step,
            address=peer.connection.address,
        )
        if federation.step == 0 and not was_started and federation.total_steps:
            steps = federation.total_steps
            tell("training_started", f"training starts: {count(steps, 'step')}", step=0, quiet=True, total_steps=steps)
        if federation.total_steps and federation.connected == federation.num_unfinished:
            self._listener.freeze_newcomers()  # all are there
        self._performer.perform(actions)
        self._performer.tell_status()

    def _next_pin(self) -> str:
        return "" if self._door.identity is None else self._door.identity.next_pin

    def _pong(self, ping: Ping) -> Pong:
        federation = self._federation
        waiting_for, waiting_seconds = federation.waits_for(time.monotonic(), NAMES_IN_A_PONG)
        return Pong(
            index=ping.index,
            software=version(),
            run=federation.run,
            clients=federation.settings.clients,
            joined=federation.connected,
            step=federation.step,
            model=self._model_name,
            waiting_for=tuple(waiting_for),
            waiting_seconds=waiting_seconds,
            edge_weights=self._edge_weights,
        )

    def _largest_message(self, rows: int) -> int:
        limits = self._federation.limits
        return largest_message_bytes(
            rows=rows,
            width=limits.width,
            precision=self._federation.settings.precision,
            adapter_elements=sum(a * b for a, b in limits.edge_shapes.values()),
        )

    # Ends

    def apply_enrolments(self, enrolled: Mapping[str, Enrolment]) -> None:
        """
        A device that is revoked has left the run, connected or not; also where its name is another device's by now. One that
        has a new secret keeps its place, and loses the connection that it made with the old one.

        Args:
            enrolled: by name.
        """
        gone = {name for name in self._federation.unfinished() if name not in enrolled}
        for name, peer in list(self._peers.items()):
            before, now = peer.connection.enrolment, enrolled.get(name)
            if before is None or not before.is_same_device(now):
                gone.add(name)
            elif before != now:
                tell("lost", f"{peer}: has a new secret, and has to join with its new invitation", client=name)
                self._forget(peer)
                peer.drop()
        for name in gone:
            reason = f"the enrolment of {name} was revoked"
            left = self._peers.pop(name, None)
            told = self._leave(name, left, reason)
            if left is not None:
                self._lifetime.spawn(self._refuse(left, reason, told=told))
            self._lifetime.end_if_all_have_left()

    def announce_next_key(self) -> None:
        """Devices that are in the run have not heard of a key that is announced since they came: they are to come again."""
        next_pin = self._next_pin()
        for name, peer in list(self._peers.items()) if next_pin else ():
            if peer.next_pin != next_pin and peer.has_joined and peer.keeps_next_pin:
                tell("lost", f"{peer}: is to come again, to hear of the server's next key", client=name)
                self._forget(peer)
                self._lifetime.spawn(peer.send_away())

    async def dismiss(self, reason: str, *, to_be_continued: bool = False) -> None:
        """
        Close all conversations.

        Args:
            to_be_continued: whether the devices try to come back; else they are told the reason.
        """
        endings = [peer.send_away() if to_be_continued else peer.refuse(reason) for peer in self._peers.values()]
        for error in await asyncio.gather(*endings, return_exceptions=True):
            if isinstance(error, Exception):  # one device must not keep the others from hearing, nor the run from being saved
                tell("note", f"a device could not be dismissed: {error!r}", level="error")

    def _forget(self, peer: Peer, for_good: str | None = None) -> bool:
        """
        A peer's connection is not its client's any more.

        Args:
            for_good: why the client has left the run; None where only its connection is lost.

        Returns:
            Whether that was logged.
        """
        if not self._is_current(peer):
            return False
        assert peer.name is not None
        del self._peers[peer.name]
        if self._lifetime.is_over:
            return False  # it did not go: we dismissed it
        told = False
        if for_good is None:
            self._federation.disconnected(peer.name, time.monotonic())
            self._performer.tell_status()
        else:
            told = self._leave(peer.name, peer, for_good)
        self._lifetime.end_if_all_have_left()
        return told

    def _leave(self, name: str, peer: Peer | None, reason: str) -> bool:
        """A client is out of the run, connected or not. Says whether that was logged."""
        federation = self._federation
        told = name in federation.members and federation.total_steps > 0 and not self._lifetime.is_saved
        if told:
            text = f"{peer or name} has left the run after step {federation.step}: {reason}"
            tell("left", text, level="warning", client=name, step=federation.step)
        self._performer.perform(federation.leave(name, time.monotonic()))
        self._performer.tell_status()
        return told

    async def _refuse(self, peer: Peer, reason: str, *, retry_after: float = 0.0, told: bool = False) -> None:
        """
        Args:
            retry_after: seconds after which the same may be allowed; 0 where it never will.
            told: whether it was logged already.
        """
        if not told:
            refusal = f"{peer} refused{' for now' if retry_after else ''}: {reason}"
            tell("refused", refusal, level="warning", client=peer.name)
        await peer.refuse(reason, retry_after=retry_after)


def _cache_with(caches: Callable[[str], CacheFolder], name: str, join: Join) -> CacheFolder:
    """
    A client's cache without the versions that the client does not have: the answer that confirmed them was lost with its
    connection, or the client has taken them back, of which the server has not heard.
    """
    cache = caches(name)
    if join.kept is not None:
        cache.forget_after(join.kept - 1)  # which leaves the step after: that is the client's latest
    return cache
