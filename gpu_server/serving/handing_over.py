"""Hands a device its part of the model, piece by piece, before it joins."""

import asyncio

from protocol import PIECE_BYTES, AskPart, AskPiece, Part, PartFile, Piece, RemoteProtocolError
from terminal import count

from ..edge_part import EdgePartStore
from .peer import Peer

__all__ = ["HandingOver"]

SPARE_QUESTIONS = 16


class HandingOver:
    """
    Answers whoever asks for the part.

    Args:
        part: None where this run hands over none.
    """

    def __init__(self, part: EdgePartStore | None) -> None:
        self._part = part
        self._making: asyncio.Task[tuple[PartFile, ...]] | None = None

    async def answer(self, peer: Peer, question: AskPart | AskPiece) -> None:
        """
        Raises:
            RemoteProtocolError: there is no such part, file or byte, or the device has asked too often.
            PartUnavailable: the part cannot be made, or not be read.
        """
        part = self._part
        if part is None:
            raise RemoteProtocolError("this run hands over no part of its model; start this device with --model")
        files = await self._files(part)
        peer.asked_of_part += 1
        # Each is worth a whole piece, however few bytes it asks for: so it bounds both, bytes and questions.
        num_pieces = sum(-(-file.size // PIECE_BYTES) for file in files)
        if peer.asked_of_part > (most := 2 * num_pieces + SPARE_QUESTIONS):
            raise RemoteProtocolError(
                f"{peer.name} has asked more than {most} times for a part of {count(num_pieces, 'piece')}"
            )
        if isinstance(question, AskPart):
            await peer.send(Part(index=question.index, files=files))
            return
        try:
            data = await asyncio.to_thread(part.piece, question.sha256, question.offset)
        except LookupError as error:
            raise RemoteProtocolError(error.args[0]) from None
        if await peer.send(Piece(index=question.index, data=data)):
            peer.handed_over += len(data)

    async def _files(self, part: EdgePartStore) -> tuple[PartFile, ...]:
        """Made by one thread for all who wait; the others do not even take a thread each."""
        if part.files is not None:
            return part.files
        if self._making is None or self._making.done():
            self._making = asyncio.create_task(asyncio.to_thread(part.make))
        return await asyncio.shield(self._making)
