"""What training would learn of a file, for a person to look at before it takes hours. Computes nothing, and sends no text."""

import os
import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from protocol import Hello
from protocol.settings import ABILITIES, OFFERED
from storage import (
    PART_FILE,
    TOKENIZER_FILES,
    ChatTemplate,
    Folder,
    ModelError,
    NamedFiles,
    PartDescription,
    load_tokenizer,
    shown,
)
from storage.model_folder import stated_ends, stated_positions
from storage.tokenizer import end_of_text, guarded
from terminal import count, listed, plain

from .access import Access
from .arguments import whole_number
from .data import DataError, Form, by_length
from .enrolment import state_folder
from .membership import Membership
from .part.fetching import fetch_part
from .part.part_cache import PART_BYTES, PartCache
from .samples import samples
from .text_encoder import TextEncoder
from .text_file import SHOWN, TextFile
from .token_file import CUT, SKIP, SPLIT, check_long, windows

__all__ = ["Model", "Preview", "preview"]

PREVIEWING = "preview"
"""What a device calls itself whose name no server asks for."""
WIDEST_BAR = 40
BETWEEN = "\N{MIDDLE DOT}"
"""What stands between two tokens."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What of a model decides on samples."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    end_token: int
    """Id of the token that ends a text."""
    stop_tokens: tuple[int, ...] | None = None
    """Other tokens at which generation stops; None where they are not known, as of a server's model."""
    num_positions: int | None = None
    """The longest sample, in tokens; None where that is not known."""

    @classmethod
    def in_folder(cls, folder: Path) -> "Model":
        """
        Of a folder with the model's tokenizer; no weights are needed.

        Raises:
            ModelError: it has no tokenizer, or does not say which token ends a text.
        """
        files = Folder(folder, ModelError)
        tokenizer, end = load_tokenizer(files), end_of_text(folder)
        end_token = None if end is None else tokenizer.token_to_id(end)
        if end_token is None:
            raise ModelError(
                f"{folder} does not say which token ends a text: its tokenizer_config.json should have an eos_token"
            )
        ends = stated_ends(files)
        return cls(
            tokenizer=tokenizer,
            template=ChatTemplate.find(files),
            end_token=end_token,
            stop_tokens=tuple(token for token in ends if token != end_token) if ends else None,
            num_positions=stated_positions(files),
        )

    @classmethod
    def of_server(cls, server: str, name: str | None = None, state_dir: str | os.PathLike[str] | None = None) -> "Model":
        """
        Of a server's run: its tokenizer alone is fetched, and kept for training.

        Args:
            name: of this device there, if it is enrolled under several names.
            state_dir: where its enrolments are; None is the user's folder for state.

        Raises:
            ConnectionFailed, Refused, CertificateChanged, RemoteProtocolError, EnrolmentError: the server cannot be asked.
            ModelError: it hands over no part of its model, or one that cannot be used.
            StateError: there is no room for what it hands over.
        """
        state = state_folder(state_dir)
        access = Access.to(server, state, name)
        hello = Hello(
            name=name or access.name or PREVIEWING,
            fingerprint="",
            codecs=OFFERED,
            abilities=ABILITIES,
            instance=secrets.token_hex(16),
        )
        membership = Membership(access.connect, hello, wants_part=True)
        try:
            _, paths = fetch_part(membership, PartCache(state / "parts", PART_BYTES), only=(PART_FILE, *TOKENIZER_FILES))
        finally:
            membership.hang_up()  # this device takes no part in the run yet
        files = NamedFiles(paths, ModelError, "the server's part of the model")
        described = PartDescription.read(files)
        return cls(
            tokenizer=load_tokenizer(files),
            template=ChatTemplate.find(files),
            end_token=described.end_token,
            num_positions=described.num_positions,
        )


def preview(
    data: Path, model: Model, *, max_length: int = 512, long: str = CUT, loss_on: str | None = None, num_shown: int = 3
) -> Iterator[str]:
    """
    Lines: the first samples as tokens, what is learnt of each apart; how long all samples are; and what is odd about them.

    Args:
        data: the file of texts or conversations.
        num_shown: how many samples are shown.

    Raises:
        DataError: the file cannot be used, or a setting cannot be right.
        ModelError: the tokenizer or the chat template fails.
    """
    whole_number("max-length", max_length, 2, " tokens")
    whole_number("samples", num_shown, 0)
    check_long(long)
    form = Form(template=model.template, loss_on=loss_on)
    seen = Preview(model, min(max_length, model.num_positions or max_length), long)
    with TextFile(data) as file:
        encoder = TextEncoder(model.tokenizer, model.end_token)
        for some in by_length(file.texts()):
            for tokens, num_labels in samples(some, form, encoder, model.end_token):
                ids = np.frombuffer(tokens, encoder.dtype).tolist()
                if seen.num_samples < num_shown:
                    yield from seen.sample(ids, num_labels)
                seen.add(ids, num_labels)
    yield from seen.summary(data.name)
    if file.left_out:
        names = [f"{shown(name)} of {count(entries, 'entry', 'entries')}" for name, entries in file.left_out.most_common(SHOWN)]
        yield f"left out: {listed(names, of=len(file.left_out))}"
    if model.num_positions is None:
        yield f"config.json does not say how many tokens the model takes: here it is --max-length alone, {max_length}"


class Preview:
    """What was seen of the samples so far."""

    def __init__(self, model: Model, max_length: int, long: str) -> None:
        self._tokenizer, self._max_length, self._long = model.tokenizer, max_length, long
        self._ends = dict.fromkeys((model.end_token, *(model.stop_tokens or ())))
        self._knows_all_ends = model.stop_tokens is not None
        self._learns_to_end = False
        self.num_samples = self.num_tokens = self.num_learnt = self.num_long = self.num_unlearnt = self.longest = 0
        self._lengths: Counter[int] = Counter()

    def sample(self, ids: list[int], num_labels: int) -> Iterator[str]:
        """Lines that show a sample."""
        yield f"sample {self.num_samples + 1}: {count(len(ids), 'token')}, {num_labels} of them learnt"
        given = len(ids) - num_labels
        yield f"  given   {self._shown(ids[:given])}"
        yield f"  learnt  {self._shown(ids[given:])}"
        if len(ids) > self._max_length:
            yield f"  longer than {self._max_length} tokens: {self._outcome(len(ids), num_labels)}"
        yield ""

    def add(self, ids: list[int], num_labels: int) -> None:
        length = len(ids)
        self._learns_to_end = self._learns_to_end or not self._ends.keys().isdisjoint(ids[length - num_labels :])
        self.num_samples += 1
        self.num_tokens += length
        self.longest = max(self.longest, length)
        self._lengths[length.bit_length()] += 1
        is_long = length > self._max_length
        self.num_long += is_long
        learnt = num_labels
        if is_long and self._long != SPLIT:
            learnt = 0 if self._long == SKIP else max(0, num_labels - (length - self._max_length))
        self.num_learnt += learnt
        self.num_unlearnt += not learnt and self._long != SKIP

    def summary(self, name: str) -> Iterator[str]:
        """Lines about all samples."""
        if not self.num_samples:
            raise DataError(f"{name}: there is no text in it")
        total = f"{count(self.num_samples, 'sample')}, {count(self.num_tokens, 'token')}"
        yield f"{name}: {total}, {self.num_learnt:,} of them learnt; the longest has {self.longest:,}"
        most = max(self._lengths.values())
        for bits in range(min(self._lengths), max(self._lengths) + 1):
            number = self._lengths[bits]
            bar = "#" * (-(-number * WIDEST_BAR // most))
            yield f"{f'{1 << bits >> 1:,} to {(1 << bits) - 1:,} tokens':>24} {number:>9,} {bar}".rstrip()
        if self.num_long:
            ways = {CUT: "cut", SPLIT: "split into parts that overlap", SKIP: "left out"}
            yield f"{count(self.num_long, 'sample')} with more than {self._max_length} tokens: {ways[self._long]}"
        if self.num_unlearnt:
            cut = count(self.num_unlearnt, "sample")
            yield f"{cut} cut before what is learnt of them: take --long split, or a greater --max-length if the model has it"
        if not self._learns_to_end:
            ends = " or ".join(self._shown([token]) for token in self._ends)
            without = "at which generation stops, in what is learnt: a model that learns this does not end"
            if not self._knows_all_ends:
                without += ", unless eos_token_id in its config.json or generation_config.json names a token that is learnt"
            yield f"no sample has {ends}, {without}"

    def _outcome(self, length: int, num_labels: int) -> str:
        if self._long == SPLIT:
            return f"split into {count(len(list(windows(length, num_labels, self._max_length))), 'part')}"
        return "left out" if self._long == SKIP else f"its last {length - self._max_length} tokens are cut off"

    def _shown(self, ids: list[int]) -> str:
        def texts() -> list[str]:
            return [self._tokenizer.decode([number], skip_special_tokens=False) for number in ids]

        return plain(BETWEEN.join(guarded(texts, UNREADABLE))) or "nothing"


UNREADABLE = "the tokenizer cannot be used"
