"""
What the precisions of an exported model keep of what a run has learnt: on held-out E2E, the loss of pairs as they were trained,
and BLEU of the sentences that are written for each meaning, against all that people wrote for it.

    splitlora-export onnx --run-dir RUN --output exported
    python benchmarks/export_quality.py exported --run-dir RUN

in the development environment with sacrebleu==2.5.1 beside it.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import harness
import sacrebleu

from edge_client import Generator
from export import Agreement, verify
from storage import load_tokenizer
from terminal import Progress

LONGEST_SENTENCE = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("folder", type=Path, help="written by splitlora-export onnx")
    parser.add_argument("--run-dir", type=Path, help="the run that it is of (default: compare with the checkpoint in it)")
    parser.add_argument("--every", type=int, default=5, help="use every n-th meaning")
    options = parser.parse_args()
    meanings: dict[str, list[str]] = {}
    for meaning, sentence in harness.e2e_rows("valid", slice(None)):
        meanings.setdefault(meaning, []).append(sentence.strip())
    meanings = dict(list(meanings.items())[:: options.every])
    losses = losses_of(options.folder, options.run_dir, meanings)
    rows = []
    with Progress(len(losses) * len(meanings), unit="sentence") as progress:
        for found in losses:
            bleu, speed = written(options.folder, found.precision, meanings, progress)
            size, same = f"{found.num_bytes / 1e6:.1f}", f"{100 * found.same_first / found.tokens:.1f} %"
            rows.append(
                [
                    found.precision,
                    size,
                    f"{found.loss_change:+.4f} ± {found.uncertainty:.2g}",
                    f"{found.divergence:.2g}",
                    same,
                    f"{bleu:.2f}",
                    f"{speed:.0f}",
                ]
            )
    print(
        harness.markdown(
            ["", "MB", "loss change (nats/token)", "divergence (nats/token)", "top-1 agreement", "BLEU", "tokens/s"], rows
        )
    )
    print(f"\n{losses[0].tokens} tokens; {len(meanings)} meanings, {sum(map(len, meanings.values()))} sentences of people")


def losses_of(folder: Path, run: Path | None, meanings: dict[str, list[str]]) -> list[Agreement]:
    """Of every precision, on a pair of each meaning: its prompt, the end token and a sentence, as a device learns it."""
    tokenizer = load_tokenizer(folder)
    end = tokenizer.id_to_token(Generator(folder).model.end_token)
    with tempfile.TemporaryDirectory() as scratch:
        pairs = Path(scratch, "pairs.txt")
        pairs.write_text(
            "".join(f"{meaning.strip()}{end}{people[0]}\n" for meaning, people in meanings.items()), encoding="utf-8"
        )
        return verify(folder, pairs, run_dir=run)


def written(folder: Path, precision: str, meanings: dict[str, list[str]], progress: Progress) -> tuple[float, float]:
    """BLEU, and the median tokens a second of what is written, in two threads."""
    generator, sentences, speeds = Generator(folder, precision=precision, num_threads=2), [], []
    for meaning in meanings:
        sentences.append(generator.text(meaning.strip(), max_new_tokens=LONGEST_SENTENCE).strip())
        speeds.append(generator.speed.tokens_per_second)
        progress.advance(precision)
    most = max(map(len, meanings.values()))
    references = [[people[index] if index < len(people) else None for people in meanings.values()] for index in range(most)]
    return sacrebleu.corpus_bleu(sentences, references).score, statistics.median(speeds)


if __name__ == "__main__":
    main()
