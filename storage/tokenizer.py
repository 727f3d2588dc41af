"""A model folder's tokenizer, without transformers: the ids are those of its AutoTokenizer, or the folder is refused."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from .errors import ModelError
from .folder import Folder, shown

__all__ = ["TOKENIZER_FILES", "encode", "end_of_text", "guarded", "load_tokenizer", "tokenizer_digest"]

SETTINGS = "tokenizer_config.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", SETTINGS, "special_tokens_map.json", "added_tokens.json")
"""All files of a folder that may decide which ids a text has."""

END_OF_TEXT = "<|endoftext|>"
GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
DEFAULT_CLASS = "GPT2Tokenizer"
"""Of a folder that names none."""
CLASSES_OF_A_FILE = ("PreTrainedTokenizerFast", "TokenizersBackend")
LARGEST_ID = 10_000_000
"""The library walks through all numbers up to the largest id, so a huge one would keep it busy for ever."""
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Under which keys transformers looks for special tokens, in its order."""
OF_GPT2 = ("bos_token", "eos_token", "unk_token")

UNREADABLE, UNUSABLE = "the tokenizer cannot be read", "the tokenizer cannot be used"

Result = TypeVar("Result")


def load_tokenizer(folder: Path | Folder) -> Tokenizer:
    """
    Read a model folder's tokenizer: its tokenizer.json, or else its vocab.json and merges.txt, and in both cases the tokens
    that the smaller files beside them add. It neither pads nor truncates.

    Raises:
        ModelError: the folder has neither, they cannot be read, or it is not certain which ids they mean.
    """
    files = folder if isinstance(folder, Folder) else Folder(folder, ModelError)
    settings = _Settings(files)
    if files.find("tokenizer.json"):
        tokenizer = _from_one_file(files, settings)
    elif files.find("vocab.json") and files.find("merges.txt"):
        tokenizer = _from_vocabulary(files, settings)
    else:
        raise ModelError(f"{files.path} has no tokenizer: neither tokenizer.json nor vocab.json and merges.txt")
    guarded(lambda: settings.add_tokens_to(tokenizer), f"{files.path}: {UNREADABLE}")
    # Whoever saved the file may have saved the padding and truncation of their last batch with it.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """
    The ids of each text, without tokens that mark its beginning or end.

    Raises:
        ModelError: the tokenizer fails on a text.
    """
    encoded = guarded(lambda: tokenizer.encode_batch(list(texts), add_special_tokens=False), UNUSABLE)
    return [encoding.ids for encoding in encoded]


def end_of_text(folder: Path) -> str | None:
    """The token that ends a text by the tokenizer's own files; None if they name none."""
    return _Settings(Folder(folder, ModelError)).named("eos_token")


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """
    SHA-256, in hex, over everything that decides which ids a text has, and over nothing else: two folders whose files differ
    but give every text the same ids have the same digest. PROTOCOL.md, "Hello", describes what is digested.
    """
    whole = json.loads(tokenizer.to_str())
    model, normalizer = whole["model"], whole["normalizer"]
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if isinstance(model["vocab"], dict):
        del model["vocab"]  # ``vocabulary`` has it; a list, of tokens with scores, has more and stays
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.pop("merges", [])]
    if _has_every_byte(tokenizer):
        model.pop("unk_token", None)
    idle = {"special"} if normalizer else {"special", "normalized"}
    pipeline = {
        "added_tokens": [_without(token, idle) for token in whole["added_tokens"]],
        "model": model,
        "normalizer": normalizer,
        "pre_tokenizer": _without(whole["pre_tokenizer"], {"trim_offsets"}),
    }
    form = _without(pipeline, set()) | ({"merges": merges} if merges else {})
    form["vocabulary"] = sorted((number, token) for token, number in vocabulary.items())
    text = json.dumps(form, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _has_every_byte(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary has a token for every byte: then nothing is unknown, and ``unk_token`` decides nothing."""
    return all(tokenizer.token_to_id(character) is not None for character in pre_tokenizers.ByteLevel.alphabet())


def _without(value: Any, idle: set[str]) -> Any:
    """
    A JSON value without the members ``idle``, and without those that are false, null or empty: some versions of the library
    write these, others leave them out.
    """
    if isinstance(value, list):
        return [_without(item, idle) for item in value]
    if isinstance(value, dict):
        members = {key: _without(member, idle) for key, member in value.items() if key not in idle}
        return {key: member for key, member in members.items() if member is not False and member not in (None, "", [], {})}
    return value


class _Settings:
    """What tokenizer_config.json and the two older files beside it say, merged as transformers merges them."""

    def __init__(self, files: Folder) -> None:
        self.where = files.path / SETTINGS
        self._raw: dict[str, Any] = files.read_json(SETTINGS) if files.find(SETTINGS) else {}
        self.declared: dict[int, AddedToken] = {}
        """Added tokens, by the id that each must get."""
        for key in ("auto_map", "split_special_tokens"):
            if self._raw.get(key):
                raise ModelError(f"{self.where}: {key} is {shown(self._raw[key])}, which is not supported; remove it")
        self.is_declared = self._raw.get("added_tokens_decoder") is not None
        if self.is_declared:
            for number, token in _items(self.where, self._raw, "added_tokens_decoder"):
                if not number.isdecimal() or len(number) > len(str(LARGEST_ID)):
                    raise ModelError(f"{self.where}: added_tokens_decoder has a token of id {shown(number)}")
                self.declared[int(number)] = _added_token(self.where, "added_tokens_decoder", token)
            return
        if files.find("special_tokens_map.json"):
            self._raw |= files.read_json("special_tokens_map.json")
        if files.find("added_tokens.json"):
            path, special = files.path / "added_tokens.json", [str(token) for token in self._special_tokens()]
            for content, number in files.read_json("added_tokens.json").items():
                if not isinstance(number, int) or isinstance(number, bool):
                    raise ModelError(f"{path}: {shown(content)} has the id {shown(number)}, which is no whole number")
                is_special = content in special
                self.declared[number] = AddedToken(content, normalized=not is_special, special=is_special)

    @property
    def tokenizer_class(self) -> str:
        name = self._raw.get("tokenizer_class") or DEFAULT_CLASS
        if name in GPT2_CLASSES or name in CLASSES_OF_A_FILE:
            return str(name)
        raise ModelError(
            f"{self.where}: tokenizer_class is {shown(name)}; GPT2Tokenizer can be used, and PreTrainedTokenizerFast, by which "
            "a tokenizer.json is taken as it stands"
        )

    @property
    def is_gpt2(self) -> bool:
        return self.tokenizer_class in GPT2_CLASSES

    @property
    def add_prefix_space(self) -> bool | None:
        value = self._raw.get("add_prefix_space")
        if value is not None and not isinstance(value, bool):
            raise ModelError(f"{self.where}: add_prefix_space is {shown(value)}; true or false is expected")
        return value

    def named(self, part: str) -> str | None:
        """The special token under a key such as "eos_token"; None if there is none."""
        value = self._raw.get(part, END_OF_TEXT if self.is_gpt2 and part in OF_GPT2 else None)
        return None if value is None else str(_added_token(self.where, part, value))

    def _special_tokens(self) -> Iterator[AddedToken]:
        for part in (*NAMED, *sorted(key for key in self._raw if key.endswith("_token") and key not in NAMED)):
            value = self._raw.get(part, END_OF_TEXT if self.is_gpt2 and part in OF_GPT2 else None)
            if value is not None and not isinstance(
                value, bool
            ):  # add_bos_token and add_eos_token end like tokens and are switches
                yield _added_token(self.where, part, value)
        for key in ("extra_special_tokens", "additional_special_tokens"):
            more = self._raw.get(key) or []
            if not isinstance(more, list | dict):
                raise ModelError(f"{self.where}: {key} is {shown(more)}; a list of tokens is expected")
            for token in more.values() if isinstance(more, dict) else more:
                yield _added_token(self.where, key, token)

    def add_tokens_to(self, tokenizer: Tokenizer) -> None:
        """
        Add the declared tokens and the special ones that are not in the tokenizer yet.

        Raises:
            ModelError: a token would not get the id that is declared.
        """
        for number, token in sorted(self.declared.items()):
            tokenizer.add_tokens([token])
            found = tokenizer.token_to_id(str(token))
            if found != number:
                raise ModelError(
                    f"{self.where.parent}: the added token {shown(str(token))} is declared with id {number}, but gets {found}: "
                    "the vocabulary has it already, or ids are left out before it"
                )
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        tokenizer.add_tokens([token for token in self._special_tokens() if str(token) not in known])


def _from_one_file(files: Folder, settings: _Settings) -> Tokenizer:
    path, content = files.path / "tokenizer.json", files.read_text("tokenizer.json")
    tokenizer: Tokenizer = guarded(lambda: Tokenizer.from_str(content), f"{path}: {UNREADABLE}")
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", 0))
    if number > LARGEST_ID:
        raise ModelError(f"{path}: {shown(token)} has the id {number}; it can be 0 to {LARGEST_ID}")
    whole = json.loads(tokenizer.to_str())
    if whole["model"].get("dropout"):
        raise ModelError(f"{path}: model.dropout is {shown(whole['model']['dropout'])}, which makes ids random; remove it")
    if settings.is_gpt2:
        # transformers takes only the vocabulary and the merges from the file, and builds the rest itself as it is for GPT-2.
        odd = next(_more_than_gpt2(tokenizer, whole), None)
        if odd is not None:
            raise ModelError(
                f"{path}: {odd} is not that of GPT-2's tokenizer, and its class is GPT2Tokenizer; if the file is right as it "
                f'stands, {SETTINGS} should have "tokenizer_class": "PreTrainedTokenizerFast"'
            )
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.add_prefix_space))
    _check_agreement(path, whole, settings)
    return tokenizer


def _more_than_gpt2(tokenizer: Tokenizer, whole: dict[str, Any]) -> Iterator[str]:
    """The parts of a tokenizer.json that the class GPT2Tokenizer would ignore, and whose effect would be lost."""
    model, before = whole["model"], whole["pre_tokenizer"] or {}
    if model["type"] != "BPE":
        yield "model"
        return
    yield from (
        f"model.{option}"
        for option in ("ignore_merges", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
        if model.get(option)
    )
    if model.get("unk_token") and not _has_every_byte(tokenizer):
        yield "model.unk_token"
    if whole["normalizer"]:
        yield "normalizer"
    if before.get("type") != "ByteLevel" or not before.get("use_regex", True):
        yield "pre_tokenizer"


def _check_agreement(path: Path, whole: dict[str, Any], settings: _Settings) -> None:
    """
    Raises:
        ModelError: tokenizer.json and tokenizer_config.json contradict each other; some versions of transformers believe the
            one and some the other.
    """
    prefix = (whole["pre_tokenizer"] or {}).get("add_prefix_space", False)
    if not settings.is_gpt2 and settings.add_prefix_space not in (None, prefix):
        raise ModelError(
            f"{settings.where}: add_prefix_space is {shown(settings.add_prefix_space)}, in {path.name} it is {shown(prefix)}; "
            "correct the file that is wrong"
        )
    if settings.is_gpt2 and settings.is_declared:
        for token in whole["added_tokens"]:
            declared = settings.declared.get(token["id"])
            if declared is None or str(declared) != token["content"]:
                raise ModelError(
                    f"{path} adds the token {shown(token['content'])} with id {token['id']}, for which added_tokens_decoder in "
                    f"{SETTINGS} has {'nothing' if declared is None else shown(str(declared))}; correct the file that is wrong"
                )


def _from_vocabulary(files: Folder, settings: _Settings) -> Tokenizer:
    if not settings.is_gpt2:
        raise ModelError(f"{files.path} has no tokenizer.json, which tokenizer_class {settings.tokenizer_class} needs")
    path, vocabulary = files.path / "vocab.json", files.read_json("vocab.json")
    for token, number in vocabulary.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= LARGEST_ID:
            raise ModelError(f"{path}: {shown(token)} has the id {shown(number)}; it can be 0 to {LARGEST_ID}")
    merges = list(_merges(files))
    model = guarded(lambda: models.BPE(vocab=vocabulary, merges=merges), f"{files.path}: {UNREADABLE}")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.add_prefix_space))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _merges(files: Folder) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(files.read_text("merges.txt").split("\n"), 1):
        line = line.removesuffix("\r")
        if not line or line.startswith("#version"):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise ModelError(f"{files.path / 'merges.txt'}, line {number}: two tokens are expected; there is {shown(line)}")
        yield parts[0], parts[1]


def _items(where: Path, raw: dict[str, Any], key: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(raw[key], dict):
        raise ModelError(f"{where}: {key} is {shown(raw[key])}; an object is expected")
    yield from raw[key].items()


def _added_token(where: Path, key: str, value: Any) -> AddedToken:
    """A special token of a file, where it is either a text or an object with the text and options."""
    if isinstance(value, str) and value:
        return AddedToken(value, special=True, normalized=False)
    if isinstance(value, dict) and isinstance(value.get("content"), str) and value["content"]:
        options = {name: value[name] for name in ("single_word", "lstrip", "rstrip", "normalized", "special") if name in value}
        if all(isinstance(option, bool) for option in options.values()):
            return AddedToken(value["content"], **{"special": key != "added_tokens_decoder", **options})
    raise ModelError(f"{where}: {key} has {shown(value)} where a token is expected")


def guarded(work: Callable[[], Result], what: str, error: type[ValueError] = ModelError) -> Result:
    """
    Do something with the tokenizers library, and turn whatever it raises into one error. For a file that is wrong it raises
    Exception itself, and for some its Rust code panics.

    Args:
        work: calls the library.
        what: what cannot be done if that fails, as the message begins.
        error: the class of the error.
    """
    try:
        return work()
    except (error, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as failure:  # a panic raises PanicException, which is a BaseException and not an Exception
        if type(failure).__name__ != "PanicException" and not isinstance(failure, Exception):
            raise
        reason = str(failure).strip().split("\n")[0][:200]
        raise error(f"{what}: {reason}") from None
