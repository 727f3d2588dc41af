"""
What LoRA makes of a pretrained model, by every way to train it: three devices split after several blocks, in several codecs;
federated; centralised; and centralised with transformers + PEFT, which shares no code with this project.

    python benchmarks/smollm2.py smollm2
    python benchmarks/real_model.py smollm2 --output runs --texts e2e --cuts 3,10,20 --ways peft,split,centralised,federated

All but PEFT are programs that `splitlora-server sweep` starts; devices have no model of their own. Everybody begins with the
same adapter, and all but the federated ones learn from the same texts in each step. Whatever way, the adapter that comes out is
loaded by transformers + PEFT, which compute the perplexity of held-out texts with it. What is finished is not run again: the
table is of all that the folder holds.

Texts are E2E in the paper's three thirds, or RNNLG's hotels, restaurants and television sets, a device for each: devices whose
texts have little in common.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch

from gpu_server.sweep.settings import device_names
from split_model import LoraConfig, PretrainedModel, initial_adapter, save_adapter
from storage import replace_file

Pair = tuple[str, str]
"""A prompt, and how it goes on."""

WAYS = ("peft", "split", "centralised", "federated")
THIRD, DOMAINS = 14_020, ("hotel", "restaurant", "tv")
RANK, ALPHA, LEARNING_RATE, SEED = 8, 32.0, 1e-3, 0
STEPS_IN_A_ROUND = 10
"""Of federated training."""
LONGEST_CONTINUATION = 60
PEFT, BASE = "peft", "the base model"


@dataclass(frozen=True)
class Texts:
    """Of the devices, and held out."""

    of_devices: Callable[[], list[list[Pair]]]
    held_out: Callable[[], list[Pair]]


TEXTS = {
    "e2e": Texts(
        lambda: [harness.e2e_rows("train", slice(number * THIRD, (number + 1) * THIRD)) for number in range(3)],
        lambda: harness.e2e_rows("valid", slice(None)),
    ),
    "rnnlg": Texts(
        lambda: [harness.rnnlg_rows(domain, "train") for domain in DOMAINS],
        lambda: [pair for domain in DOMAINS for pair in harness.rnnlg_rows(domain, "valid")],
    ),
}


@dataclass(frozen=True)
class Experiment:
    """One model, one set of texts, one length: runs that can be compared."""

    model: Path
    folder: Path
    texts: str
    steps: int
    batch_size: int

    @property
    def files(self) -> list[Path]:
        return [self.folder / f"{name}.txt" for name in device_names(3)]

    def write_texts(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for path, pairs in zip(self.files, TEXTS[self.texts].of_devices(), strict=True):
            if not path.exists():
                harness.write_rows(path, pairs)

    def held_out(self, every: int) -> list[Pair]:
        return TEXTS[self.texts].held_out()[::every]

    def runs(self) -> dict[str, Path]:
        """By what each is called in the table, all that are finished."""
        found = {}
        for note in sorted(self.folder.glob("*/cell.json")):
            if (note.parent / "finished.json").exists():
                cell = json.loads(note.read_text())
                found[_called(cell["mode"], cell["server"])] = note.parent
        if (self.folder / PEFT / "finished.json").exists():
            found = {"transformers + PEFT, centralised": self.folder / PEFT, **found}
        return found

    def sweep(self, mode: str, cuts: list[int], codecs: list[str]) -> None:
        """Run every combination that is not finished yet."""
        server: dict[str, Any] = {"model": str(self.model), "steps": self.steps, "lora_rank": RANK, "lora_alpha": ALPHA}
        server |= {"lr": LEARNING_RATE, "lr_schedule": "linear", "seed": SEED, "dtype": "float32"}
        if mode == "split":
            server |= {"cut_layer": cuts, "codec": codecs}
        elif mode == "federated":
            server |= {"aggregate_every": STEPS_IN_A_ROUND}
        lines = [f'mode = "{mode}"', f"data = {json.dumps([str(path) for path in self.files])}", "[server]"]
        lines += [f"{name} = {json.dumps(value)}" for name, value in server.items()]
        lines += ["[device]", f"batch_size = {self.batch_size}"]
        grid = self.folder / f"{mode}.toml"
        grid.write_text("\n".join(lines) + "\n")
        command = [str(harness.PROGRAMS / "splitlora-server"), "sweep", str(grid), "--output", str(self.folder)]
        if subprocess.run(command, cwd=harness.REPOSITORY).returncode:
            sys.exit(f"a run failed; its folder in {self.folder} says why")

    def train_with_peft(self) -> None:
        import reference
        from tqdm import tqdm
        from transformers import get_linear_schedule_with_warmup

        folder = self.folder / PEFT
        if (folder / "finished.json").exists():
            return
        config = PretrainedModel(self.model).config
        lora = LoraConfig(rank=RANK, alpha=ALPHA, targets=config.family.usual_targets)
        start = folder / "start"
        start.mkdir(parents=True, exist_ok=True)
        save_adapter(start, initial_adapter(config, lora, SEED), config, lora, str(self.model))
        sizes = {"batch_size": self.batch_size, "steps": self.steps, "seed": SEED}
        union = harness.union_batches(self.files, device_names(3), self.model, **sizes)
        began = time.perf_counter()
        losses, _, model = reference.train(
            self.model,
            start,
            tqdm(union, desc="transformers + PEFT", disable=None),
            dtype=torch.float32,
            lr=LEARNING_RATE,
            schedule=lambda optimiser: get_linear_schedule_with_warmup(optimiser, 0, self.steps),
        )
        seconds = time.perf_counter() - began
        model.save_pretrained(folder / "adapter")
        (folder / "losses.json").write_text(json.dumps(losses))
        replace_file(folder / "finished.json", json.dumps({"loss": losses[-1], "seconds": seconds, "num_bytes": 0}).encode())

    def table(self, held_out: list[Pair]) -> str:
        import reference

        samples = reference.encode(held_out, self.model)
        known = self.folder / f"perplexities-of-{len(held_out)}-rows.json"
        found: dict[str, float] = json.loads(known.read_text()) if known.exists() else {}
        runs = self.runs()
        for name in (BASE, *runs):
            if name not in found:
                base = reference.load_base(self.model)
                model = base if name == BASE else reference.load_peft(self.model, runs[name] / "adapter")
                found[name] = reference.perplexity(model, samples)
                replace_file(known, json.dumps(found, indent=2).encode())
        rows = [[BASE, f"{found[BASE]:.3f}", "", "", "", ""]]
        measure = next(iter(runs), None)
        for name, folder in runs.items():
            result = json.loads((folder / "finished.json").read_text())
            against = "" if name == measure else f"{found[name] / found[measure] - 1:+.2%}"  # type: ignore[index]
            seconds, megabytes = result["seconds"] / self.steps, result["num_bytes"] / 1e6
            furthest = "" if name == measure else self.furthest(folder)
            rows.append([name, f"{found[name]:.3f}", against, furthest, f"{seconds:.1f}", f"{megabytes:,.0f}"])
        header = [f"{self.texts}, {self.steps} steps of 3 x {self.batch_size}, {len(held_out)} held-out rows"]
        header += ["perplexity", "against the first", "largest difference of a step's loss, nats", "s a step", "MB"]
        return harness.markdown(header, rows)

    def furthest(self, run: Path) -> str:
        """The largest difference between a step's loss and that of transformers + PEFT."""
        of_peft = self.folder / PEFT / "losses.json"
        if not of_peft.exists():
            return ""
        losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        pairs = zip(losses, json.loads(of_peft.read_text()), strict=True)
        return f"{max(abs(loss - other) for loss, other in pairs):.1e}"

    def continuations(self, prompts: list[Pair]) -> str:
        """Greedy, by transformers + PEFT, of the base model and of all adapters."""
        import reference

        samples, tokenizer = reference.encode(prompts, self.model), PretrainedModel(self.model).tokenizer()
        written: dict[str, list[str]] = {"a person": [completion.strip() for _, completion in prompts]}
        for name, folder in {BASE: None, **self.runs()}.items():
            base = reference.load_base(self.model)
            model = base if folder is None else reference.load_peft(self.model, folder / "adapter")
            written[name] = [_continued(model, tokenizer, tokens[:unlabelled]) for tokens, unlabelled in samples]
        lines = []
        for number, (prompt, _) in enumerate(prompts):
            lines += ["", f"`{prompt.strip()}`", ""]
            writers: dict[str, list[str]] = {}
            for name, texts in written.items():
                writers.setdefault(texts[number], []).append(name)
            lines += [f"- {'; '.join(names)}: {text}" for text, names in writers.items()]
        return "\n".join(lines)


def _called(mode: str, server: dict[str, Any]) -> str:
    if mode == "federated":
        return f"federated, rounds of {server['aggregate_every']} steps"
    return mode if mode == "centralised" else f"split after block {server['cut_layer']}, {server['codec']}"


@torch.no_grad()
def _continued(model: Any, tokenizer: Any, prompt: list[int]) -> str:
    end = model.config.eos_token_id
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": LONGEST_CONTINUATION, "do_sample": False, "eos_token_id": end, "pad_token_id": end}
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
    return " ".join(tokenizer.decode(made).split()) or "(nothing)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("model", type=Path, help="a folder in Hugging Face's format")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--texts", choices=tuple(TEXTS), default="e2e")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"of {', '.join(WAYS)}; none to look at what is there")
    parser.add_argument("--cuts", default="3,10,20", help="of split runs")
    parser.add_argument("--codecs", default="float32", help="of split runs")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8, help="of a device")
    parser.add_argument("--held-out-every", type=int, default=12, help="use every n-th row of the held-out texts")
    parser.add_argument("--prompts", type=int, default=0, help="how many of those prompts are continued, too")
    options = parser.parse_args()
    ways = [way for way in options.ways.split(",") if way not in ("", "none")]
    for way in ways:
        if way not in WAYS:
            parser.error(f"--ways: {way} is not among {', '.join(WAYS)}")
    model, output = options.model.resolve(), options.output.resolve()
    folder = output / f"{options.texts}-{options.steps}-steps-of-{options.batch_size}"
    experiment = Experiment(model, folder, options.texts, options.steps, options.batch_size)
    experiment.write_texts()
    for way in ways:
        if way == PEFT:
            experiment.train_with_peft()
        else:
            experiment.sweep(way, [int(cut) for cut in options.cuts.split(",")], options.codecs.split(","))
    held_out = experiment.held_out(options.held_out_every)
    print(experiment.table(held_out))
    if options.prompts:
        print(experiment.continuations(held_out[:: len(held_out) // options.prompts][: options.prompts]))


if __name__ == "__main__":
    main()
