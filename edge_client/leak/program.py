"""`splitlora-edge leak`: from its flags to its report."""

import argparse
import json
import shutil
import sys
from pathlib import Path

from privacy import worth
from storage.model_folder import find_model
from terminal import Progress, count, duration, importing, user_path, user_text_path

from .meter import Findings, Plan, measure, open_subject, settings_of
from .report import as_json, as_text

__all__ = ["ControlsFailed", "MeterError", "run"]


class MeterError(ValueError):
    """What was asked for cannot be measured."""


class ControlsFailed(Exception):
    """The meter does not trust its own figures."""


def run(options: argparse.Namespace) -> None:
    """
    Raises:
        MeterError, DataError, ModelError, AdapterError: it cannot be measured, or the results cannot be written.
        ControlsFailed: it was measured and reported, and a control failed.
    """
    plan = _plan(options)
    output = None if options.output is None else user_path(options.output)
    if output is not None:
        with importing("--output, which draws a picture,", install="splitlora[leak]", instead="leave --output out"):
            from . import picture  # noqa: F401  # what is not installed is said before anything is measured
    if any(setting.activation_noise or setting.gradient_noise for setting in plan.settings):
        with importing("what noise is worth", install="splitlora[leak]"):
            worth(1.0, 1, plan.noise_delta)  # what is not installed is said before anything is measured
    adapter = None if options.adapter is None else user_path(options.adapter)
    subject = open_subject(
        user_path(options.data), find_model(user_text_path(options.model)), adapter, max_length=options.max_length
    )

    def expect(seconds: float) -> None:
        extent = f"{count(len(plan.settings), 'setting')}, {count(len(plan.seeds), 'seed')}, {plan.num_texts} texts each"
        print(f"{extent}: about {duration(seconds)}", file=sys.stderr, flush=True)  # noqa: T201

    with _Shown() as shown:
        findings = measure(subject, plan, shown, expect=expect)
    try:
        _write(findings, output, None if options.json is None else user_path(options.json))
    except OSError as error:
        raise MeterError(f"{error.filename}: the findings cannot be written: {error.strerror}") from None
    print(as_text(findings, width=shutil.get_terminal_size().columns))  # noqa: T201
    if findings.failures:
        raise ControlsFailed("a control failed, as the report says first: do not rely on its figures")


def _plan(options: argparse.Namespace) -> Plan:
    try:
        settings = settings_of(
            cut_layers=options.cut_layer,
            codecs=options.codec,
            labels=options.labels,
            label_rows=options.label_rows,
            activation_noises=options.activation_noise,
            activation_clip=options.activation_clip,
            gradient_noises=options.gradient_noise,
            gradient_clip=options.gradient_clip,
            batch_size=options.batch_size,
        )
        return Plan(
            settings=settings,
            num_texts=options.sequences,
            num_own=options.attacker_texts,
            seeds=tuple(range(options.seed, options.seed + options.seeds)),
            training_steps=options.training_steps,
            noise_delta=options.noise_delta,
        )
    except ValueError as error:
        raise MeterError(str(error)) from None


def _write(findings: Findings, output: Path | None, json_file: Path | None) -> None:
    text = json.dumps(as_json(findings), indent=1) + "\n"
    if json_file is not None:
        json_file.write_text(text, encoding="utf-8")
    if output is not None:
        from .picture import draw

        output.mkdir(parents=True, exist_ok=True)
        (output / "report.txt").write_text(as_text(findings, width=80), encoding="utf-8")
        (output / "report.json").write_text(text, encoding="utf-8")
        draw(findings, [output / "picture.svg", output / "picture.png"])


class _Shown:
    """The progress of a measurement, which says how much there is to do when it begins."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._progress is None:
            self._progress = Progress(total, unit="measurement")
        self._progress.advance(what)

    def __enter__(self) -> "_Shown":
        return self

    def __exit__(self, *_error: object) -> None:
        if self._progress is not None:
            self._progress.close()
