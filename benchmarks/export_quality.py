"""
What the precisions of an exported model keep of what a run has learnt: on held-out E2E, the loss of pairs as they were trained,
and BLEU of the sentences that are written for each meaning, against all that people wrote for it.

    splitlora-export onnx --run-dir RUN --output exported
    python benchmarks/export_quality.py exported --run-dir RUN --every 1

in the development environment with sacrebleu==2.5.1 beside it. With several folders of one run, all are compared with the first
precision of the first one. How much of a difference of BLEU is chance, a paired bootstrap over meanings says (Koehn 2004).
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import harness
import numpy as np
import sacrebleu
from numpy.typing import NDArray

from edge_client import Generator
from export import Agreement, verify
from storage import load_tokenizer
from terminal import Progress

LONGEST_SENTENCE = 60
RESAMPLES, SEED, INTERVAL = 10_000, 0, (2.5, 97.5)
Meanings = dict[str, list[str]]
"""What people wrote for each."""
Counts = NDArray[np.int64]
"""
(..., 10) all that BLEU is made of: the number of n-grams, for n from 1 to 4, that people wrote, too; the number of all n-grams;
the length of what is written; that of people's sentences nearest in length. They can be added up.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="folder", help="written by splitlora-export onnx")
    parser.add_argument("--run-dir", type=Path, help="the run that it is of (default: compare with the checkpoint in it)")
    parser.add_argument("--every", type=int, default=5, help="use every n-th meaning")
    options = parser.parse_args()
    meanings: Meanings = {}
    for meaning, sentence in harness.e2e_rows("valid", slice(None)):
        meanings.setdefault(meaning, []).append(sentence.strip())
    meanings = dict(list(meanings.items())[:: options.every])
    losses = [(folder, found) for folder in options.folders for found in losses_of(folder, options.run_dir, meanings)]
    rows = []
    first: Counts | None = None
    with Progress(len(losses) * len(meanings), unit="sentence") as progress:
        for folder, found in losses:
            counts, speed = written(folder, found.precision, meanings, progress)
            first = counts if first is None else first
            rows.append(
                [
                    found.precision if len(options.folders) == 1 else f"{folder.name}, {found.precision}",
                    f"{found.num_bytes / 1e6:.1f}",
                    f"{found.loss_change:+.4f} ± {found.uncertainty:.2g}",
                    f"{found.divergence:.2g}",
                    f"{100 * found.same_first / found.tokens:.1f} %",
                    f"{bleu(counts.sum(0)):.2f}",
                    "" if counts is first else difference(counts, first),
                    f"{speed:.0f}",
                ]
            )
    header = ["", "MB", "loss change (nats/token)", "divergence (nats/token)", "top-1 agreement"]
    header += ["BLEU", "against the first, 95 %", "tokens/s"]
    print(harness.markdown(header, rows))
    tokens, sentences = losses[0][1].tokens, sum(map(len, meanings.values()))
    print(f"\n{tokens} tokens; {len(meanings)} meanings, {sentences} sentences of people")


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


def written(folder: Path, precision: str, meanings: Meanings, progress: Progress) -> tuple[Counts, float]:
    """The counts of the sentence that is written for each meaning, and the median tokens a second, in two threads."""
    generator, counts, speeds = Generator(folder, precision=precision, num_threads=2), [], []
    for meaning, people in meanings.items():
        sentence = generator.text(meaning.strip(), max_new_tokens=LONGEST_SENTENCE).strip()
        counts.append(counted(sentence, people))
        speeds.append(generator.speed.tokens_per_second)
        progress.advance(precision)
    return np.array(counts), statistics.median(speeds)


def counted(sentence: str, people: Sequence[str]) -> list[int]:
    found = sacrebleu.corpus_bleu([sentence], [[person] for person in people])
    return [*found.counts, *found.totals, found.sys_len, found.ref_len]


def bleu(counts: Counts) -> float:
    same, total, (length, nearest) = np.split(counts, [4, 8])
    lengths = {"sys_len": int(length), "ref_len": int(nearest)}
    return sacrebleu.BLEU.compute_bleu(same.tolist(), total.tolist(), **lengths, smooth_method="exp").score


def difference(counts: Counts, others: Counts) -> str:
    """Of two scores, with the interval that holds most of those of meanings drawn again, the same ones for both."""
    number = len(counts)
    draws = np.random.default_rng(SEED).multinomial(number, np.full(number, 1 / number), RESAMPLES)
    of_draws = [bleu(own) - bleu(other) for own, other in zip(draws @ counts, draws @ others, strict=True)]
    lowest, highest = np.percentile(of_draws, INTERVAL)
    return f"{bleu(counts.sum(0)) - bleu(others.sum(0)):+.2f} ({lowest:+.2f} to {highest:+.2f})"


if __name__ == "__main__":
    main()
