"""
A model folder's tokenizer, without transformers: the ids are those of its AutoTokenizer, or the folder is refused.

AutoTokenizer takes a tokenizer.json as it stands only where the class that the folder names is a general one. For other
classes it takes vocabulary and merges from the file and builds the rest itself: there, the file has to say the same of it.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from .errors import ModelError
from .folder import Folder, shown

__all__ = [
    "CHAT_TEMPLATE",
    "FILE",
    "OF_MODELS",
    "TOKENIZER_FILES",
    "beginning",
    "chat_template",
    "described",
    "encode",
    "end_of_text",
    "guarded",
    "load_tokenizer",
    "separator",
    "special_tokens",
    "tokenizer_digest",
    "write_tokenizer",
]

SETTINGS, CHAT_TEMPLATE, CONFIG = "tokenizer_config.json", "chat_template.jinja", "config.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.json", "merges.txt", SETTINGS, "special_tokens_map.json", "added_tokens.json"),
    CHAT_TEMPLATE,
)
"""All files of a folder that may decide which ids a text or a conversation has."""

END_OF_TEXT = "<|endoftext|>"
GPT2, QWEN2, LLAMA, FILE = "GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast"
"""The classes, without the "Fast" that some names end with; FILE takes a tokenizer.json as it stands."""
AS_FILE = ("PreTrainedTokenizer", "TokenizersBackend")
"""What else FILE is called."""
OF_MODELS = {"gpt2": GPT2, "qwen2": QWEN2, "qwen3": QWEN2}
"""By model_type: the class of a folder that names none; FILE of any other."""
AS_FILE_OF_MODELS = ("mistral", "phi3")
"""Models for which AutoTokenizer ignores that a folder names LLAMA."""
LARGEST_ID = 10_000_000
"""The library walks through all numbers up to the largest id, so a huge one would keep it busy for ever."""
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Under which keys transformers looks for special tokens, in its order."""
TOKENS_OF_CLASS = {
    GPT2: dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
    QWEN2: dict.fromkeys(("eos_token", "pad_token", "unk_token"), END_OF_TEXT),
    LLAMA: {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    FILE: {},
}
"""The special tokens of a folder that does not say them."""
QWEN2_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What stands for a space in the vocabularies of SentencePiece."""

OPTIONS_OF_TOKENS = ("single_word", "lstrip", "rstrip", "normalized", "special")
OPTIONS_OF_MODELS = (
    *("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback"),
    "ignore_merges",
)
"""Of BPE."""

BARE = "a"
"""A text that is asked for what the tokenizer adds to it."""
UNREADABLE, UNUSABLE = "the tokenizer cannot be read", "the tokenizer cannot be used"

Result = TypeVar("Result")


def load_tokenizer(folder: Path | Folder) -> Tokenizer:
    """
    Read a model folder's tokenizer: its tokenizer.json, or else its vocab.json and merges.txt, and in both cases the tokens
    that the smaller files beside them add. It neither pads nor truncates.

    Raises:
        ModelError: the folder has neither, they cannot be read, or it is not certain which ids they mean.
    """
    files = _folder(folder)
    return _load(files, _Settings(files))


def write_tokenizer(folder: Path | Folder, into: Path) -> None:
    """
    Write a model folder's tokenizer for whoever has nothing else of the model: as one tokenizer.json to be taken as it stands,
    with the special tokens' names, and the chat template if there is one.

    Raises:
        ModelError: as `load_tokenizer`.
        OSError: a file cannot be written.
    """
    files = _folder(folder)
    settings = _Settings(files)
    (into / "tokenizer.json").write_text(_load(files, settings).to_str(), encoding="utf-8")
    content = {"tokenizer_class": FILE, **settings.special_tokens()}
    (into / SETTINGS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    template = settings.chat_template()
    if template is not None:
        (into / CHAT_TEMPLATE).write_text(template, encoding="utf-8")


def _folder(folder: Path | Folder) -> Folder:
    return folder if isinstance(folder, Folder) else Folder(folder, ModelError)


def _load(files: Folder, settings: "_Settings") -> Tokenizer:
    if files.find("tokenizer.json"):
        tokenizer = _from_one_file(files, settings)
    elif files.find("vocab.json") and files.find("merges.txt"):
        tokenizer = _from_vocabulary(files, settings)
    else:
        remedy = (
            f"; AutoTokenizer.from_pretrained({str(files.path)!r}).save_pretrained({str(files.path)!r}) of transformers makes "
            "a tokenizer.json of tokenizer.model"
            if files.find("tokenizer.model")
            else ""
        )
        raise ModelError(f"{files.path} has no tokenizer: neither tokenizer.json nor vocab.json and merges.txt{remedy}")
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


def beginning(tokenizer: Tokenizer) -> list[int]:
    """
    The ids that the tokenizer itself puts before a text, such as that of a token that begins it; often none.

    Raises:
        ModelError: the tokenizer fails on a text.
    """
    plain = guarded(lambda: tokenizer.encode(BARE, add_special_tokens=False), UNUSABLE).ids
    whole = guarded(lambda: tokenizer.encode(BARE), UNUSABLE).ids
    return next((whole[:start] for start in range(len(whole)) if whole[start : start + len(plain)] == plain), [])


def described(tokenizer: Tokenizer) -> dict[str, Any]:
    """
    What its tokenizer.json says, but for the vocabulary, the merges, and what is done with ids afterwards. The whole of a large
    vocabulary, read as JSON, is many times the tokenizer's own memory.
    """
    model = tokenizer.model
    return {
        "added_tokens": [
            {"id": number, "content": token.content, **{option: getattr(token, option) for option in OPTIONS_OF_TOKENS}}
            for number, token in tokenizer.get_added_tokens_decoder().items()
        ],
        "model": {"type": type(model).__name__, **{option: getattr(model, option, None) for option in OPTIONS_OF_MODELS}},
        **{
            part: None if (found := getattr(tokenizer, part)) is None else json.loads(found.__getstate__())
            for part in ("normalizer", "pre_tokenizer")
        },
    }


def separator(tokenizer: Tokenizer) -> str:
    """What is put before a text that continues another: a space, unless the tokenizer begins every text with one itself."""
    first = guarded(lambda: tokenizer.encode(BARE, add_special_tokens=False), UNUSABLE).tokens[:1]
    return "" if first and first[0].startswith(SPACE) else " "


def end_of_text(folder: Path) -> str | None:
    """The token that ends a text by the tokenizer's own files; None if they name none."""
    return _Settings(Folder(folder, ModelError)).named("eos_token")


def special_tokens(folder: Path | Folder) -> dict[str, str]:
    """The special tokens by the names that chat templates know them by, such as "bos_token"."""
    return _Settings(_folder(folder)).special_tokens()


def chat_template(folder: Path | Folder) -> str | None:
    """
    The text of the template by which a conversation becomes one text; None if the folder has none.

    Raises:
        ModelError: there are several, and none is the default.
    """
    return _Settings(_folder(folder)).chat_template()


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
    if _has_every_byte(tokenizer) or (model.get("byte_fallback") and _has_every_byte(tokenizer, as_numbers=True)):
        model.pop("unk_token", None)
    idle = {"special"} if normalizer else {"special", "normalized"}
    pipeline = {
        "added_tokens": [_without(token, idle) for token in whole["added_tokens"]],
        "model": model,
        "normalizer": normalizer,
        "pre_tokenizer": _without(whole["pre_tokenizer"], {"trim_offsets"}),
    }
    form = _without(pipeline, set()) | ({"merges": merges} if merges else {})
    if begins := beginning(tokenizer):
        form["beginning"] = begins
    form["vocabulary"] = sorted((number, token) for token, number in vocabulary.items())
    text = json.dumps(form, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _has_every_byte(tokenizer: Tokenizer, *, as_numbers: bool = False) -> bool:
    """
    Whether the vocabulary has a token for every byte: then nothing is unknown, and ``unk_token`` decides nothing.

    Args:
        as_numbers: whether such a token is "<0x0A>", as byte_fallback has them, and not a character.
    """
    tokens = [f"<0x{byte:02X}>" for byte in range(256)] if as_numbers else pre_tokenizers.ByteLevel.alphabet()
    return all(tokenizer.token_to_id(token) is not None for token in tokens)


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
        self._files, self.where = files, files.path / SETTINGS
        self._raw: dict[str, Any] = files.read_json(SETTINGS) if files.find(SETTINGS) else {}
        config = files.read_json(CONFIG) if files.find(CONFIG) else {"model_type": "gpt2"}
        self._model_type, self._class = (
            str(config.get("model_type")),
            self._raw.get("tokenizer_class") or config.get("tokenizer_class"),
        )
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

    def tokenizer_class(self) -> str:
        """GPT2, QWEN2, LLAMA or FILE."""
        named = self._class or OF_MODELS.get(self._model_type, FILE)
        name = str(named)
        name = FILE if name in (FILE, *AS_FILE) else name.removesuffix("Fast")
        if name == LLAMA and self._model_type == "qwen2":
            return QWEN2
        if name == LLAMA and (self._model_type in AS_FILE_OF_MODELS or self._has_bytes_as_characters()):
            return FILE
        if isinstance(named, str) and name in TOKENS_OF_CLASS:
            return name
        raise ModelError(
            f"{self.where}: tokenizer_class is {shown(named)}; {GPT2}, {QWEN2} and {LLAMA} can be used, and {FILE}, by which "
            "a tokenizer.json is taken as it stands"
        )

    def _has_bytes_as_characters(self) -> bool:
        return self._files.find("tokenizer.json") is not None and b'"ByteLevel"' in self._files.read_bytes("tokenizer.json")

    @property
    def prepends(self) -> str:
        """Before which texts a LlamaTokenizer puts a space, as the library names it."""
        if self.add_prefix_space is False:
            return "never"
        return "always" if self._raw.get("legacy", False) is True else "first"

    @property
    def add_prefix_space(self) -> bool | None:
        value = self._raw.get("add_prefix_space")
        if value is not None and not isinstance(value, bool):
            raise ModelError(f"{self.where}: add_prefix_space is {shown(value)}; true or false is expected")
        return value

    def named(self, part: str) -> str | None:
        """The special token under a key such as "eos_token"; None if there is none."""
        value = self._raw.get(part, TOKENS_OF_CLASS[self.tokenizer_class()].get(part))
        return None if value is None else str(_added_token(self.where, part, value))

    def special_tokens(self) -> dict[str, str]:
        return {part: token for part in self._parts() if (token := self.named(part)) is not None}

    def chat_template(self) -> str | None:
        if self._files.find(CHAT_TEMPLATE):
            return self._files.read_text(CHAT_TEMPLATE)
        found = self._raw.get("chat_template")
        if isinstance(found, list):  # several, by name
            named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
            found = named.get("default", named)
        if found is not None and not isinstance(found, str):
            raise ModelError(
                f"{self.where}: chat_template is {shown(found)}; a text, or a list with one called default, is expected"
            )
        return found

    def _parts(self) -> Iterator[str]:
        """The keys of special tokens: add_bos_token and add_eos_token end like tokens and are switches."""
        others = sorted(key for key in self._raw if key.endswith("_token") and key not in NAMED)
        return (part for part in (*NAMED, *others) if not isinstance(self._raw.get(part), bool))

    def _special_tokens(self) -> Iterator[AddedToken]:
        for part in self._parts():
            value = self._raw.get(part, TOKENS_OF_CLASS[self.tokenizer_class()].get(part))
            if value is not None:
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
    path = files.path / "tokenizer.json"
    tokenizer: Tokenizer = guarded(lambda: Tokenizer.from_buffer(files.read_bytes("tokenizer.json")), f"{path}: {UNREADABLE}")
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", 0))
    if number > LARGEST_ID:
        raise ModelError(f"{path}: {shown(token)} has the id {number}; it can be 0 to {LARGEST_ID}")
    whole = described(tokenizer)
    if whole["model"]["dropout"]:
        raise ModelError(f"{path}: model.dropout is {whole['model']['dropout']:g}, which makes ids random; remove it")
    name = settings.tokenizer_class()
    if name != FILE:
        odd = next(_ignored(tokenizer, whole, name), None)
        if odd is not None:
            raise ModelError(
                f"{path}: {odd} is not that of {name}, the tokenizer's class, which ignores it; if the file is right as it "
                f'stands, {SETTINGS} should have "tokenizer_class": "{FILE}"'
            )
        if not _has_digits_apart(whole):
            tokenizer.normalizer, tokenizer.pre_tokenizer = _preparation(settings)
        if name == LLAMA:
            model = tokenizer.model
            model.unk_token, model.fuse_unk, model.byte_fallback = None, True, True
    _check_agreement(path, whole, settings)
    return tokenizer


def _preparation(settings: _Settings) -> tuple[Any, Any]:
    """How a class changes and cuts texts before the vocabulary is asked: normalizer and pre-tokenizer."""
    name, prefix = settings.tokenizer_class(), bool(settings.add_prefix_space)
    if name == GPT2:
        return None, pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    if name == QWEN2:
        words = pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated")
        return normalizers.NFC(), pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(prefix, use_regex=False)])
    return None, pre_tokenizers.Metaspace(SPACE, prepend_scheme=settings.prepends, split=False)


def _ignored(tokenizer: Tokenizer, whole: dict[str, Any], name: str) -> Iterator[str]:
    """The parts of a tokenizer.json that a class ignores, and whose effect would be lost."""
    model = whole["model"]
    if model["type"] != "BPE":
        yield "model"
        return
    options = ("ignore_merges", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    yield from (
        f"model.{option}" for option in options if bool(model.get(option)) != (name == LLAMA and option == "byte_fallback")
    )
    if model.get("unk_token") and not _has_every_byte(tokenizer, as_numbers=name == LLAMA):
        yield "model.unk_token"
    of_class = PREPARATIONS[name]
    for part in ("normalizer", "pre_tokenizer"):
        if _without(whole[part], IDLE) not in [each[part] for each in of_class]:
            yield part


def _has_digits_apart(whole: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is one of `DIGITS_APART`."""
    return bool(_without(whole["pre_tokenizer"], IDLE) == DIGITS_APART["pre_tokenizer"])


def _in_file(normalizer: Any, pre_tokenizer: Any) -> dict[str, Any]:
    """Both as they stand in a tokenizer.json, but for what `_ignored` does not look at."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    whole = described(tokenizer)
    return {part: _without(whole[part], IDLE) for part in ("normalizer", "pre_tokenizer")}


IDLE = {"trim_offsets", "add_prefix_space", "prepend_scheme"}
DIGITS_APART = _in_file(
    None, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel()])
)
"""
Some folders of this form name GPT2, which since transformers 5 forgets that each digit is a word of its own. A vocabulary that
was learnt so has no token of two digits: ids differ only where several spaces stand before a digit. The file is taken as it
stands: so the model was trained, and so every runtime takes it that reads the file.
"""
PREPARATIONS = {
    GPT2: [_in_file(None, pre_tokenizers.ByteLevel()), DIGITS_APART],
    QWEN2: [
        _in_file(
            normalizers.NFC(),
            pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
            ),
        )
    ],
    LLAMA: [
        _in_file(None, pre_tokenizers.Metaspace(SPACE, split=False)),
        _in_file(normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]), None),
        _in_file(normalizers.Replace(" ", SPACE), None),
    ],
}
"""By class: what its tokenizer.json says of texts before the vocabulary is asked, in one of these forms."""


def _check_agreement(path: Path, whole: dict[str, Any], settings: _Settings) -> None:
    """
    Raises:
        ModelError: tokenizer.json and tokenizer_config.json contradict each other; some versions of transformers believe the
            one and some the other.
    """
    is_file, prefix = settings.tokenizer_class() == FILE, (whole["pre_tokenizer"] or {}).get("add_prefix_space")
    if is_file and prefix is not None and settings.add_prefix_space not in (None, prefix):
        raise ModelError(
            f"{settings.where}: add_prefix_space is {shown(settings.add_prefix_space)}, in {path.name} it is {shown(prefix)}; "
            "correct the file that is wrong"
        )
    if not is_file and settings.is_declared:
        for token in whole["added_tokens"]:
            declared = settings.declared.get(token["id"])
            if declared is None or str(declared) != token["content"]:
                raise ModelError(
                    f"{path} adds the token {shown(token['content'])} with id {token['id']}, for which added_tokens_decoder in "
                    f"{SETTINGS} has {'nothing' if declared is None else shown(str(declared))}; correct the file that is wrong"
                )


def _from_vocabulary(files: Folder, settings: _Settings) -> Tokenizer:
    if settings.tokenizer_class() not in (GPT2, QWEN2):
        raise ModelError(f"{files.path} has no tokenizer.json, which tokenizer_class {settings.tokenizer_class()} needs")
    path, vocabulary = files.path / "vocab.json", files.read_json("vocab.json")
    for token, number in vocabulary.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= LARGEST_ID:
            raise ModelError(f"{path}: {shown(token)} has the id {shown(number)}; it can be 0 to {LARGEST_ID}")
    merges = list(_merges(files))
    model = guarded(lambda: models.BPE(vocab=vocabulary, merges=merges), f"{files.path}: {UNREADABLE}")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = _preparation(settings)
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
        options = {name: value[name] for name in OPTIONS_OF_TOKENS if name in value}
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
