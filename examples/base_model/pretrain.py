"""Pretrain the project's own small GPT-2 on RNNLG descriptions of hotels, laptops and televisions.

The base learns to turn `slot: value | slot: value` into a sentence in three domains, so that fine-tuning it on a
fourth is quick. RNNLG's restaurants are left out on purpose: they would give away what the demonstration teaches.

    python examples/base_model/pretrain.py --data /path/to/rnnlg --output examples/base_model
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

DOMAINS = ("hotel", "laptop", "tv")
END = "<|endoftext|>"
VOCABULARY = 4000
POSITIONS = 256
WORDS = Path(__file__).with_name("words.txt")
SAMPLES = Path(__file__).parents[1] / "restaurants" / "valid.jsonl"

READABLE = {
    "acceptscreditcards": "credit cards",
    "batteryrating": "battery rating",
    "dogsallowed": "dogs allowed",
    "driverange": "drive size",
    "ecorating": "eco rating",
    "hasinternet": "internet",
    "hasusbport": "usb port",
    "hdmiport": "hdmi ports",
    "isforbusinesscomputing": "business computing",
    "powerconsumption": "power consumption",
    "pricerange": "price",
    "reqmore": "more",
    "screensize": "screen size",
    "screensizerange": "screen class",
    "weightrange": "weight class",
}
CLOSED_VALUES = {"true": "yes", "false": "no", "dontcare": "any", "dont_care": "any"}
PROPER_SLOTS = ("name", "area", "near", "address", "family")
MINOR_WORDS = ("a", "and", "at", "by", "in", "of", "on", "or", "the")

# Placeholders are private-use characters, which no text contains: the value of slot i is chr(FIRST_HOLE + i).
FIRST_HOLE = 0xE000

# How often a value that the sentence repeats is replaced by an invented one. Names nearly always are, so that the
# only way to predict them is to copy them from the prompt.
REPLACED = {"name": 0.9, "area": 0.7, "near": 0.7, "address": 0.7, "family": 0.7}
REPLACED_OTHERWISE = 0.25

# What invented words are made of; a letter that is listed twice is chosen twice as often.
ONSETS = ("b", "br", "c", "ch", "d", "f", "fl", "g", "gr", "h", "j", "k", "l", "m", "n", "p", "r", "s", "sh", "st", "t",
          "tr", "v", "w")  # fmt: skip
VOWELS = ("a", "a", "e", "e", "i", "i", "o", "o", "u", "u", "ee", "oo")
CODAS = ("", "", "", "ck", "l", "ll", "m", "n", "n", "nd", "r", "rt", "s", "st", "t")


@dataclass(frozen=True)
class Pair:
    """One dialogue act and its sentence, whose copied values are placeholders."""

    kind: str
    slots: tuple[tuple[str, str], ...]
    text: str

    def render(self, values: list[str]) -> tuple[str, str]:
        """Return the prompt and the completion with these values filled in."""
        fields = [f"{slot}: {value}" if value else slot for (slot, _), value in zip(self.slots, values, strict=True)]
        text = self.text
        for index, value in enumerate(values):
            text = text.replace(chr(FIRST_HOLE + index), value)
        return " | ".join([self.kind, *fields] if self.kind else fields), sentence(text)

    def as_written(self) -> tuple[str, str]:
        """Return the pair with the values of the data set."""
        return self.render([value for _, value in self.slots])

    def invented(self, generator: random.Random, lexicon: list[str]) -> tuple[str, str]:
        """Return the pair with many copied values replaced by invented ones."""
        replacements: dict[str, str] = {}
        for index, (slot, value) in enumerate(self.slots):
            copied = chr(FIRST_HOLE + index) in self.text
            if copied and generator.random() < REPLACED.get(slot, REPLACED_OTHERWISE):
                replacements[value] = invent(slot, value, generator, lexicon)
        return self.render([replacements.get(value, value) for _, value in self.slots])


def tidy(text: str) -> str:
    """Undo the data set's tokenisation: join suffixes and punctuation to their words."""
    text = re.sub(r"(\w(?:ch|sh|[sx])) -s\b", r"\1es", text)
    text = re.sub(r"([^\Waeiou])y -s\b", r"\1ies", text)
    text = re.sub(r" -(s|ly|er|ed|ing)\b", r"\1", text)
    text = re.sub(r"\s+([,.?!;:]|'\w|n't\b)", r"\1", text)
    return re.sub(r"\s+", " ", text).strip()


def sentence(text: str) -> str:
    """Capitalise the start of each sentence, and write one article where a name brings its own."""
    text = re.sub(r"\b[Tt]he The\b", "The", text)
    return re.sub(r"(^|[.?!] )([a-z])", lambda found: found[1] + found[2].upper(), text)


def title(text: str) -> str:
    """Capitalise a proper name."""
    words = text.split()
    return " ".join(word if index and word in MINOR_WORDS else word[:1].upper() + word[1:] for index, word in enumerate(words))


def parse_slot(field: str) -> tuple[str, str]:
    """Read `slot=value` into readable words."""
    slot, _, value = field.partition("=")
    value = tidy(value.strip("' "))
    return READABLE.get(slot, slot), title(value) if slot in PROPER_SLOTS else CLOSED_VALUES.get(value, value)


def parse_kind(kind: str) -> str:
    """Name the act: nothing for a plain statement, `question: confirm`, `no match`, `recommend` and so on."""
    words = READABLE.get(kind.lstrip("?"), kind.lstrip("?")).replace("_", " ").removeprefix("inform").strip()
    return f"question: {words}" if kind.startswith("?") else words


def parse_pair(act: str, text: str, domain: str) -> Pair:
    """Read a dialogue act, and put placeholders in its sentence wherever it repeats a value."""
    kind, _, rest = act.partition("(")
    slots = [parse_slot(field) for field in rest.rstrip(")").split(";") if field.strip()]
    if domain == "hotel" and slots and slots[0][0] == "name" and "type" not in dict(slots):
        slots.insert(1, ("type", "hotel"))  # the other domains always say what they describe
    text = tidy(text)
    if text[-1] not in ".?!":
        text += "?" if kind.startswith("?") else "."
    # Longest first, so that "Satellite Pro" is not taken apart by "Satellite".
    for index, (_, value) in sorted(enumerate(slots), key=lambda slot: -len(slot[1][1])):
        if (len(value) > 1 or value.isdigit()) and value not in ("yes", "no", "any", "none"):
            text = re.sub(rf"(?<![\w.]){re.escape(value)}(?![\w+])", chr(FIRST_HOLE + index), text, flags=re.IGNORECASE)
    return Pair(parse_kind(kind), tuple(slots), text)


def read_pairs(data: Path, domain: str, split: str) -> list[Pair]:
    """Read the distinct pairs of one file, in RNNLG's own layout or as `hotel.train.json`."""
    path = data / "data" / "original" / domain / f"{split}.json"
    if not path.exists():
        path = data / f"{domain}.{split}.json"
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = json.loads("\n".join(line for line in lines if not line.startswith("#")))
    return list(dict.fromkeys(parse_pair(act, text, domain) for act, text, _ in rows if text.strip()))


def invent_word(generator: random.Random, lexicon: list[str]) -> str:
    """Return a word of the lexicon, or one made of syllables."""
    if generator.random() < 0.75:
        return generator.choice(lexicon)
    syllables = range(generator.choice((1, 2, 2)))
    return "".join(generator.choice(ONSETS) + generator.choice(VOWELS) + generator.choice(CODAS) for _ in syllables)


def invent(slot: str, value: str, generator: random.Random, lexicon: list[str]) -> str:
    """Make up a value of the same sort: other digits in a value with digits, other words elsewhere."""
    if slot != "name" and any(character.isdigit() for character in value):
        return re.sub(r"\d", lambda _: str(generator.randint(1, 9)), value)
    if slot not in PROPER_SLOTS:
        return " ".join(invent_word(generator, lexicon) for _ in range(generator.choice((1, 1, 2))))
    words = [invent_word(generator, lexicon) for _ in range(generator.choice((1, 2, 2)))]
    if slot != "name" and generator.random() < 0.4:
        return " ".join(words)  # areas such as "riverside" are written small
    if len(words) > 1 and generator.random() < 0.1:
        words.insert(-1, generator.choice(("and", "of", "&")))
    if generator.random() < 0.1:
        words[0] += "'s"
    elif slot == "name" and generator.random() < 0.3:
        words.insert(0, "The")
    return title(" ".join(words))


def read_lexicon() -> list[str]:
    """Read the everyday words that invented values are made of; they become tokens, and so are easy to copy."""
    return WORDS.read_text(encoding="utf-8").split()


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train GPT-2's kind of tokenizer: byte-level byte-pair encoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, prompt: str, completion: str) -> tuple[list[int], int]:
    """Return the tokens of a pair, and where its completion begins."""
    end = tokenizer.token_to_id(END)
    start = [*tokenizer.encode(prompt).ids, end]
    return [*start, *tokenizer.encode(" " + completion).ids, end], len(start)


def pad(sequences: list[list[int]], filler: int) -> torch.Tensor:
    """Lay sequences of unequal length into one tensor, filled up on the right."""
    length = max(len(sequence) for sequence in sequences)
    return torch.tensor([sequence + [filler] * (length - len(sequence)) for sequence in sequences])


def training_batches(
    pairs: list[Pair], tokenizer: Tokenizer, lexicon: list[str], generator: random.Random, size: int
) -> Iterator[list[tuple[list[int], int]]]:
    """Yield batches of tokens and completion starts for ever, each of similar lengths, because padding costs time."""
    while True:
        order = generator.sample(pairs, len(pairs))
        for start in range(0, len(order), size * 16):
            rendered = [pair.invented(generator, lexicon) for pair in order[start : start + size * 16]]
            group = sorted((encode(tokenizer, *pair) for pair in rendered), key=lambda item: len(item[0]))
            group = [(tokens, first) for tokens, first in group if len(tokens) <= POSITIONS]
            batches = [group[first : first + size] for first in range(0, len(group), size)]
            yield from generator.sample(batches, len(batches))


def language_loss(model: GPT2LMHeadModel, batch: list[tuple[list[int], int]], offset: int = 0) -> torch.Tensor:
    """Return the mean loss of the completions, placed from position `offset` on.

    The prompts' values are invented, so nothing can be learnt from predicting them.
    """
    inputs = pad([tokens[:-1] for tokens, _ in batch], 0)
    targets = pad([[-100] * (start - 1) + tokens[start:] for tokens, start in batch], -100)
    positions = torch.arange(offset, offset + inputs.shape[1])[None] if offset else None
    logits = model(inputs, position_ids=positions, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_model(tokenizer: Tokenizer, width: int) -> GPT2LMHeadModel:
    """Make a GPT-2 of six blocks with random weights."""
    end = tokenizer.token_to_id(END)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_positions=POSITIONS, n_embd=width, n_layer=6, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=end, eos_token_id=end,
        architectures=["GPT2LMHeadModel"], tie_word_embeddings=True,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


class Muon:
    """Momentum, orthogonalised, for the matrices of the blocks: it needs half the tokens that AdamW needs.

    In float32; torch.optim.Muon computes in bfloat16, which is a hundred times slower on a CPU without its instructions.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], learning_rate: float) -> None:
        self.matrices, self.learning_rate = matrices, learning_rate
        self.momenta = [torch.zeros_like(matrix) for matrix in matrices]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Update with the gradients there are, at a fraction of the learning rate."""
        for matrix, momentum in zip(self.matrices, self.momenta, strict=True):
            momentum.lerp_(matrix.grad, 0.05)
            update = orthogonal(matrix.grad.lerp(momentum, 0.95))
            scale = max(1.0, matrix.shape[1] / matrix.shape[0]) ** 0.5  # (in, out), as GPT-2 stores them
            matrix.mul_(1 - 0.1 * self.learning_rate * factor)
            matrix.add_(update, alpha=-self.learning_rate * factor * scale)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Return the matrix with all its singular values near 1, by Newton-Schulz iteration."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def train(
    model: GPT2LMHeadModel, batches: Iterator[list[tuple[list[int], int]]], steps: int, learning_rate: float,
    generator: random.Random,
) -> None:  # fmt: skip
    """Train on the completions: Muon on the blocks' matrices, AdamW on the rest, warm-up and a decay to zero."""
    in_blocks = [parameter for parameter in model.transformer.h.parameters() if parameter.ndim == 2]
    chosen = set(map(id, in_blocks))
    muon = Muon(in_blocks, learning_rate)
    rest = torch.optim.AdamW([p for p in model.parameters() if id(p) not in chosen], betas=(0.9, 0.98), weight_decay=0.0)
    average = None
    progress = tqdm(range(steps), desc="pretraining", unit="step", mininterval=2)
    for step in progress:
        batch = next(batches)
        # Pairs are much shorter than the model's reach: moving some of them trains its later positions too.
        room = POSITIONS - max(len(tokens) for tokens, _ in batch)
        loss = language_loss(model, batch, generator.randint(0, room) if generator.random() < 0.25 else 0)
        loss.backward()
        factor = min(1.0, (step + 1) / 50, 2 * (1 - step / steps))
        muon.step(factor)
        rest.param_groups[0]["lr"] = learning_rate * factor / 5
        rest.step()
        model.zero_grad(set_to_none=True)
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        progress.set_postfix(loss=f"{average:.3f}")


@torch.inference_mode()
def completion_loss(model: GPT2LMHeadModel, tokenizer: Tokenizer, pairs: list[tuple[str, str]]) -> float:
    """Return the mean loss per token of the completions, given their prompts."""
    encoded = sorted((encode(tokenizer, *pair) for pair in pairs), key=lambda item: len(item[0]))
    total, count = 0.0, 0
    for first in range(0, len(encoded), 32):
        batch = encoded[first : first + 32]
        targets = pad([[-100] * (start - 1) + tokens[start:] for tokens, start in batch], -100)
        logits = model(pad([tokens[:-1] for tokens, _ in batch], 0), use_cache=False).logits
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += int((targets != -100).sum())
    return total / count


def save(model: GPT2LMHeadModel, tokenizer: Tokenizer, output: Path) -> None:
    """Write the model as float16 safetensors, and its tokenizer in both of the usual forms."""
    model.half().save_pretrained(output)
    (output / "generation_config.json").unlink(missing_ok=True)  # it repeats config.json
    tokenizer.save(str(output / "tokenizer.json"))
    tokenizer.model.save(str(output))
    settings = {
        "tokenizer_class": "GPT2Tokenizer", "model_max_length": POSITIONS, "add_prefix_space": False,
        "bos_token": END, "eos_token": END, "unk_token": END,
    }  # fmt: skip
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def report(output: Path, data: Path, samples: Path, lexicon: list[str], seed: int) -> None:
    """Print what the files just written achieve on text that training has not seen."""
    model = GPT2LMHeadModel.from_pretrained(output, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
    print(f"parameters: {model.num_parameters():,}")
    for domain in DOMAINS:
        pairs = read_pairs(data, domain, "valid")
        generator = random.Random(seed)
        versions = {
            "as written": [pair.as_written() for pair in pairs],
            "with invented names and values": [pair.invented(generator, lexicon) for pair in pairs],
        }
        for version, rendered in versions.items():
            loss = completion_loss(model, tokenizer, rendered)
            print(f"{domain} valid, {len(rendered)} pairs {version}: loss {loss:.3f}, perplexity {math.exp(loss):.2f}")
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    loss = completion_loss(model, tokenizer, [(row["prompt"], row["completion"]) for row in rows])
    print(f"restaurants, {len(rows)} pairs, zero-shot: loss {loss:.3f}, perplexity {math.exp(loss):.2f}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Pretrain a small GPT-2 on RNNLG hotels, laptops and televisions.")
    parser.add_argument("--data", type=Path, required=True, help="a checkout of RNNLG")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--samples", type=Path, default=SAMPLES, help="pairs for the zero-shot figure")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Read the data, train the tokenizer and the model, write both and measure them."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    generator = random.Random(arguments.seed)
    pairs = [pair for domain in DOMAINS for pair in read_pairs(arguments.data, domain, "train")]
    lexicon = read_lexicon()
    texts = [text for pair in pairs for text in (*pair.as_written(), *pair.invented(generator, lexicon))]
    tokenizer = train_tokenizer(texts)
    model = make_model(tokenizer, arguments.width)
    batches = training_batches(pairs, tokenizer, lexicon, generator, arguments.batch)
    began = time.monotonic()
    train(model, batches, arguments.steps, arguments.learning_rate, generator)
    print(f"{arguments.steps} steps of {arguments.batch} pairs in {(time.monotonic() - began) / 60:.1f} minutes")
    save(model, tokenizer, arguments.output)
    report(arguments.output, arguments.data, arguments.samples, lexicon, arguments.seed)


if __name__ == "__main__":
    main()
