"""The command splitlora-edge. Each subcommand imports what it needs by itself, so that --help and ping answer at once."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from getpass import getpass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from terminal import (
    Parser,
    Progress,
    count,
    duration,
    importing,
    listed,
    plain,
    run_program,
    show_log,
    user_path,
    version,
    where_time_went,
)

from .leak.flags import add_flags as add_leak_flags

if TYPE_CHECKING:
    from .client import EdgeClient
    from .data import Dataset
    from .generation import Generator, Speed

__all__ = ["build_parser", "main"]

logger = logging.getLogger("edge_client")

PROGRAM = "splitlora-edge"
INVITATION_VARIABLE = "SPLITLORA_INVITATION"
LONGEST_INVITATION = 4096  # characters; no more is read of a file, which may be another than the user meant

ADVICE = {
    "edge_compute": "a smaller --cut-layer on the server leaves devices less to compute",
    "encode": "making bytes takes longer than sending them: --codec bfloat16 or float32 on the server takes less",
    "decode": "reading bytes takes longer than receiving them: --codec bfloat16 or float32 on the server takes less",
    "uplink": "a leaner --codec on the server (int8, int4, delta), or a higher --aggregate-every, sends less",
    "downlink": "a leaner --codec on the server (int8, int4, delta), or a higher --aggregate-every, sends less",
    "queue": "it waits for slower devices: give those a smaller --batch-size, or the server a --quorum",
    "server_compute": "a higher --cut-layer on the server moves work to the devices; or give the server a faster processor",
}
"""What to change about each part of the time; most of it is set where the server is started."""


def build_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description="Take part in a split fine-tuning run, and use the model that came out. Your texts stay on this device.",
        meant={"enrol": "join"},
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="take part in a run to its end", description="Take part in a run to its end.")
    train.add_argument("--server", required=True, metavar="URL", help="address of the server, such as ws://192.168.1.20:8765")
    train.add_argument(
        "--name",
        help="name of this device in the run (default: the enrolled one; else made of the names of host and data file)",
    )
    _add_training_flags(train)
    train.set_defaults(run=run_train, errors=_errors_of_train)

    join = commands.add_parser(
        "join",
        help="enrol this device with an invitation, and take part in the run",
        description="Enrol this device with an invitation, and take part in the run. The invitation says which server and by "
        "what name, and is kept: afterwards the command train does as well.",
    )
    join.add_argument(
        "invitation",
        nargs="?",
        metavar="INVITATION",
        help="what splitlora-server enrol has printed: @FILE reads it from a file, - from standard input; if it is left "
        f"out, it is taken from the environment variable {INVITATION_VARIABLE}. Written here as it is, other users of this "
        "machine can read it in the list of processes",
    )
    _add_training_flags(join)
    join.set_defaults(run=run_join, errors=_errors_of_train)

    ping = commands.add_parser(
        "ping", help="ask a server how its run is doing", description="Ask a server how its run is doing."
    )
    ping.add_argument("--server", required=True, metavar="URL", help="address of the server")
    ping.add_argument("--name", help="name of this device, if it is enrolled there under several")
    ping.add_argument(
        "--state-dir", metavar="DIR", help="folder of this device's enrolments (default: the user's folder for state)"
    )
    ping.set_defaults(run=run_ping, errors=_errors_of_ping)

    preview = commands.add_parser(
        "preview",
        help="show what would be learnt of a file",
        description="Show the first samples of a file as tokens, what is learnt of each apart, and how long all are. "
        "No text leaves this device.",
    )
    preview.add_argument("--data", required=True, metavar="FILE", type=Path, help="texts: .jsonl, .csv, .txt or .parquet")
    tokenizer = preview.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--model", metavar="DIR", type=Path, help="a folder with the model's tokenizer; weights are not needed"
    )
    tokenizer.add_argument("--server", metavar="URL", help="or address of the server that hands over the tokenizer")
    preview.add_argument("--name", help="name of this device, if it is enrolled there under several")
    preview.add_argument(
        "--state-dir", metavar="DIR", help="folder of this device's enrolments (default: the user's folder for state)"
    )
    _add_sample_flags(preview)
    preview.add_argument("--samples", type=int, default=3, metavar="N", help="how many are shown (default: %(default)s)")
    preview.set_defaults(run=run_preview, errors=_errors_of_preview)

    leak = commands.add_parser(
        "leak",
        help="measure what a server could recover of your texts",
        description="Measure on this machine, on your own texts, what a curious server could recover of them from what crosses "
        "the wire, and what codecs and noise cost. Sends nothing. Needs splitlora[leak].",
    )
    add_leak_flags(leak)
    leak.set_defaults(run=run_leak, errors=_errors_of_leak)

    generate = commands.add_parser(
        "generate",
        help="continue a text with an exported model",
        description="Continue a text with a model exported by splitlora-export onnx. Needs onnxruntime, not torch.",
    )
    _add_generation_flags(generate)
    generate.set_defaults(run=run_generate, errors=_errors_of_generate)

    prepare = commands.add_parser(
        "prepare",
        help="make an exported model load faster and take less memory on this processor",
        description="Save the quantised weights of an exported model as this processor and this onnxruntime use them.",
    )
    prepare.add_argument("folder", metavar="DIR", type=Path, help="a folder written by splitlora-export onnx")
    prepare.set_defaults(run=run_prepare, errors=_errors_of_generate)
    return parser


def _add_generation_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="DIR", type=Path, help="a folder written by splitlora-export onnx")
    text = command.add_mutually_exclusive_group(required=True)
    text.add_argument(
        "--prompt",
        metavar="TEXT",
        help="complete it, with a model trained on prompts and completions; the token that ends a text is put behind it, as in "
        "training",
    )
    text.add_argument("--chat", metavar="TEXT", help="answer it, by the model's chat template, with a model of conversations")
    text.add_argument("--raw", metavar="TEXT", help="continue it as it stands, with a model trained on plain texts")
    command.add_argument("--system", metavar="TEXT", help="with --chat: the message of the system that stands before it")
    command.add_argument("--precision", choices=("auto", "fp32", "fp16", "q8", "q4"), default="auto")
    command.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="most tokens to generate (default: %(default)s)"
    )
    command.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0 always takes the most likely token; 1 draws tokens with the model's probabilities (default: 0)",
    )
    command.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="draw only from the most likely tokens that together have this probability (default: 1)",
    )
    command.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    command.add_argument("--stream", action="store_true", help="print the text as it is generated")
    command.add_argument(
        "--adapter",
        metavar="FILE",
        type=Path,
        help="a .onnx_adapter to use instead of the folder's own, if it was exported with --keep-adapter",
    )


def _add_training_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model",
        help="the run's base model: a Hugging Face folder, or a hub name such as gpt2 (default: the server hands over this "
        "device's part of it)",
    )
    command.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="training texts: .jsonl, .csv, .txt or .parquet; it never leaves this device",
    )
    command.add_argument(
        "--eval-data", metavar="FILE", help="held-out texts, whose perplexity is measured before and after training"
    )
    command.add_argument(
        "--eval-every",
        type=int,
        metavar="N",
        help="evaluate --eval-data after every N steps as well, while the other devices wait, and tell the server its loss",
    )
    command.add_argument("--batch-size", type=int, default=8, help="samples in a step (default: %(default)s)")
    _add_sample_flags(command)
    command.add_argument("--no-shuffle", action="store_true", help="take the samples in the order of the file")
    command.add_argument(
        "--engine",
        choices=("auto", "onnxruntime", "torch"),
        default="auto",
        help="what computes: onnxruntime, on what the server hands over, or torch, on --model; auto is torch where --model is "
        "given and there is CUDA, or where the server hands over nothing (default: %(default)s)",
    )
    command.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: %(default)s)"
    )
    command.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="precision of the frozen weights; with onnxruntime, auto is what the server hands over (default: %(default)s)",
    )
    command.add_argument(
        "--in-flight",
        type=int,
        default=2,
        metavar="COUNT",
        help="parts of a batch that may be under way at once; 1 waits for every answer (default: %(default)s)",
    )
    command.add_argument(
        "--cache-bytes",
        type=int,
        metavar="BYTES",
        help="most bytes of its samples' activations that are kept: with codec delta here, too; else on the "
        "server's alone; a device that comes back to a run needs the same again (default: the server's, at most 1 GiB)",
    )
    command.add_argument(
        "--part-bytes",
        type=int,
        metavar="BYTES",
        help="most bytes of what servers hand over that are kept on this device's disk; what is used least recently goes "
        "first (default: 4 GiB)",
    )
    command.add_argument(
        "--labels",
        choices=("server", "device"),
        default="server",
        help="device: take part in no run that sends the labels, token ids of what is learnt, to the server (default: any run)",
    )
    for kind, what in (("activation", "activations"), ("gradient", "gradients at the hidden states")):
        command.add_argument(
            f"--{kind}-noise",
            type=float,
            default=0.0,
            metavar="SIGMA",
            help=f"take part in no run with less noise on {what} than this times the run's clip (default: any run)",
        )
    command.add_argument(
        "--state-dir",
        metavar="DIR",
        help="folder for this device's enrolments, for what servers hand over, and for what it needs to go on after it was "
        "killed (default: the user's folder for state)",
    )
    command.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="json: a line an event on standard error, steps too, as in this device's own log (default: text)",
    )
    command.add_argument(
        "--give-up-after", type=float, metavar="SECONDS", help="stop after so long without a connection (default: never)"
    )


def _add_sample_flags(command: argparse.ArgumentParser) -> None:
    """How entries of a file become samples."""
    command.add_argument(
        "--max-length", type=int, default=512, help="the greatest number of tokens in a sample (default: %(default)s)"
    )
    command.add_argument(
        "--long",
        choices=("cut", "split", "skip"),
        default="cut",
        help="a longer sample: keep its beginning, make several of it that overlap, or leave it out (default: %(default)s)",
    )
    command.add_argument(
        "--loss-on",
        choices=("all", "completion", "assistant"),
        help="learn all; or of pairs the completion, of conversations the last answer; or all answers of the assistant "
        "(default: all answers, completions, and texts that stand alone)",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 after an error with one sentence on standard error, 130 after Ctrl-C."""
    options = build_parser().parse_args(arguments)
    return run_program(PROGRAM, lambda: options.run(options), options.errors)


def run_train(options: argparse.Namespace) -> None:
    from .client import EdgeClient

    as_json = options.log_format == "json"
    with show_log("edge_client", options.log_format), _Preparations(silent=as_json) as shown:
        client = EdgeClient(options.server, name=options.name, report=shown, **_training_options(options))
        _train(client, shown, as_json=as_json)


def run_join(options: argparse.Namespace) -> None:
    from .client import EdgeClient

    invitation = _invitation(options.invitation)
    as_json = options.log_format == "json"
    with show_log("edge_client", options.log_format), _Preparations(silent=as_json) as shown:
        _train(EdgeClient.join(invitation, report=shown, **_training_options(options)), shown, as_json=as_json)


def _invitation(given: str | None) -> str:
    """
    The text of the invitation: ``given`` itself, or what it refers to.

    Raises:
        InvalidInvitation: there is none, or it cannot be read.
    """
    from protocol.invitation import SCHEME, InvalidInvitation

    if given is None:
        given = os.environ.get(INVITATION_VARIABLE)
        if given is None:
            raise InvalidInvitation(f"there is no invitation: give @FILE, - for standard input, or set {INVITATION_VARIABLE}")
    try:
        if given == "-":
            return getpass("invitation (it is not shown): ") if sys.stdin.isatty() else sys.stdin.read(LONGEST_INVITATION)
        if given.startswith("@"):
            with user_path(given[1:]).open(encoding="utf-8-sig") as file:
                return file.read(LONGEST_INVITATION)
    except OSError as error:
        raise InvalidInvitation(f"the invitation cannot be read from {given}: {error.strerror or error}") from None
    except ValueError:
        raise InvalidInvitation(f"{given} holds no invitation: it is not text") from None
    if not given.startswith(SCHEME) and os.path.isfile(given):
        raise InvalidInvitation(f"{given} is a file: to read the invitation from it, write @{given}")
    return given


def _training_options(options: argparse.Namespace) -> dict[str, Any]:
    """What the flags of train and join have in common, as `EdgeClient` names it."""
    return {
        "data": options.data,
        "eval_data": options.eval_data,
        "eval_every": options.eval_every,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "long": options.long,
        "loss_on": options.loss_on,
        "shuffle": not options.no_shuffle,
        "model": options.model,
        "engine": options.engine,
        "device": options.device,
        "dtype": options.dtype,
        "state_dir": options.state_dir,
        "give_up_after": options.give_up_after,
        "in_flight": options.in_flight,
        "cache_bytes": options.cache_bytes,
        "part_bytes": options.part_bytes,
        "labels": options.labels,
        "activation_noise": options.activation_noise,
        "gradient_noise": options.gradient_noise,
    }


class _Preparations:
    """
    Shows how far this device is with what it does before it joins the run.

    Args:
        silent: show nothing: standard error is read by a program.
    """

    def __init__(self, *, silent: bool = False) -> None:
        self._is_silent = silent
        self._what = ""
        self._progress: Progress | None = None
        self._megabytes = 0
        self._began = (0.0, 0)
        """When the present task was first reported, and how many bytes of it were done by then."""

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what or self._progress is None:
            if done == total or _megabytes(total) == 1:
                return  # it was there already, or is over before anybody has read of it
            self.close()
            self._what, self._megabytes, self._began = what, _megabytes(done), (now, done)
            self._progress = Progress(_megabytes(total), self._megabytes, unit=f"MB of {what}", silent=self._is_silent)
        if _megabytes(done) > self._megabytes:
            speed = (done - self._began[1]) / max(now - self._began[0], 1e-9)
            self._progress.advance(f"{speed / 1e6:.3g} MB/s", _megabytes(done) - self._megabytes)
            self._megabytes = _megabytes(done)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()
        self._what, self._progress = "", None

    def __enter__(self) -> "_Preparations":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def _megabytes(num_bytes: int) -> int:
    return -(-num_bytes // 10**6)


def _train(device: "EdgeClient", shown: _Preparations, *, as_json: bool) -> None:
    from protocol import Seconds

    say = _log if as_json else _say
    with device as client:
        shown.close()
        say(_introduction(client))
        if report := client.noise_report():
            say(f"device {client.name}: {report}")
        start = client.start()
        is_evaluated = client.eval_every is not None  # then training does it, and the log says what comes of it
        if not is_evaluated:
            _show_perplexity(client, "before", say, silent=as_json)
        spent = Seconds()
        with Progress(client.num_steps, start.step, silent=as_json) as progress:
            for step in client.train():
                progress.update(step=step.number, loss=step.loss, tokens=step.tokens, num_bytes=step.num_bytes)
                spent += step.seconds
        if where := where_time_went(vars(spent), ADVICE):
            for line in where.splitlines():
                say(line)
        if client.evaluations:
            say(f"perplexity after: {client.evaluations[-1].perplexity:.3f}")
        else:
            _show_perplexity(client, "after", say, silent=as_json)
        say(f"done: {client.num_bytes / 1e6:.2f} MB exchanged")


def run_ping(options: argparse.Namespace) -> None:
    from .server_status import ping

    status = ping(options.server, name=options.name, state_dir=options.state_dir)
    pong = status.pong
    print(  # noqa: T201
        f"{options.server}: splitlora {plain(pong.software)}, run {plain(pong.run)}, "
        f"{pong.joined} of {count(pong.clients, 'device')} connected, {count(pong.step, 'step')} finished, "
        f"answered in {status.seconds * 1000:.1f} ms"
    )
    if pong.waiting_for and pong.waiting_seconds >= 1:
        print(f"the run has waited {duration(pong.waiting_seconds)} for {plain(listed(pong.waiting_for))}")  # noqa: T201


def run_preview(options: argparse.Namespace) -> None:
    from .preview import Model, preview

    if options.model is not None:
        model = Model.in_folder(user_path(options.model))
    else:
        model = Model.of_server(options.server, options.name, options.state_dir)
    for line in preview(
        user_path(options.data),
        model,
        max_length=options.max_length,
        long=options.long,
        loss_on=options.loss_on,
        num_shown=options.samples,
    ):
        print(line)  # noqa: T201


def run_leak(options: argparse.Namespace) -> None:
    with importing("the meter", install="splitlora[leak]"):
        from .leak.program import run

    run(options)


def run_generate(options: argparse.Namespace) -> None:
    from .generation import GenerationError, Generator, Sampling

    if options.system is not None and options.chat is None:
        raise GenerationError("--system is the beginning of a conversation: give what the user says with --chat")
    sampling = Sampling(temperature=options.temperature, top_p=options.top_p, seed=options.seed)
    generator = Generator(options.folder, precision=options.precision, adapter=options.adapter)
    if options.precision == "auto":
        _say(f"precision {generator.precision}: {generator.choice}")
    _say(f"weights: {generator.preparation}")
    pieces = generator.stream(
        _given(options), raw=options.raw is not None, max_new_tokens=options.max_new_tokens, sampling=sampling
    )
    if options.stream:
        for piece in pieces:
            print(piece, end="", flush=True)  # noqa: T201
        print()  # noqa: T201
    else:
        print(_collect(pieces, generator, options.max_new_tokens))  # noqa: T201
    _say(_figures(generator.speed))


def _given(options: argparse.Namespace) -> str | list[dict[str, str]]:
    """What is to be continued: a text, or messages."""
    if options.chat is None:
        return str(options.raw if options.prompt is None else options.prompt)
    messages = [("system", options.system), ("user", options.chat)]
    return [{"role": role, "content": content} for role, content in messages if content is not None]


def _collect(pieces: Iterator[str], generator: "Generator", max_new_tokens: int) -> str:
    text = ""
    with Progress(max_new_tokens, unit="token") as progress:
        for piece in pieces:
            text += piece
            progress.advance(f"{generator.speed.tokens_per_second:.1f} tokens/s")
    return text


def run_prepare(options: argparse.Namespace) -> None:
    from .generation import open_exported, precisions_to_prepare, prepare

    model = open_exported(user_path(options.folder))
    with Progress(len(precisions_to_prepare(model)), unit="precision") as progress:
        for precision in prepare(model):
            progress.advance(precision)
    _say(f"done: {options.folder / 'prepared'}, for this processor and this onnxruntime; splitlora-edge generate uses it")


def _figures(speed: "Speed") -> str:
    from .generation import process_memory

    peak = process_memory("VmHWM")
    return (
        f"prompt: {speed.prompt_tokens} tokens in {speed.prompt_seconds:.2f} s; "
        f"continuation: {speed.new_tokens} tokens, {speed.tokens_per_second:.1f} tokens/s"
        + (f"; peak memory {peak / 1e6:.0f} MB" if peak else "")
    )


def _introduction(client: "EdgeClient") -> str:
    settings, last = client.welcome.settings, client.welcome.settings.cut_layer - 1
    held_out = f"; {_described(client.eval_data, client.long)} held out" if client.eval_data is not None else ""
    return (
        f"run {client.welcome.run}, device {client.name}: {_described(client.data, client.long)}{held_out}; "
        f"{f'blocks 0 to {last}' if last else 'block 0'}; engine {client.engine}: {client.engine_choice}; "
        f"dtype {client.dtype}: {client.choice}; {client.disclosure}; "
        f"the run waits for {count(settings.clients, 'device')}"
    )


def _described(data: "Dataset", long: str) -> str:
    """How many samples there are, and how many were cut, split or left out, which the user may not expect."""
    described = count(len(data.samples), "sample")
    if data.num_cut:
        described += f" ({data.num_cut} {HOW_LONG[long]}"
        if data.num_unlabelled:
            described += f", {data.num_unlabelled} of them before their completion, so nothing is learnt from these"
        described += ")"
    return described


HOW_LONG = {
    "cut": "cut at --max-length",
    "split": "longer than --max-length, which were split",
    "skip": "more, longer than --max-length, left out",
}


def _show_perplexity(client: "EdgeClient", when: str, say: Callable[[str], None], *, silent: bool) -> None:
    if client.eval_data is None:
        return
    total = client.eval_data.num_batches(client.batch_size)
    with Progress(total, unit="batch", silent=silent) as progress:
        found = client.perplexity(lambda estimate: progress.advance(f"perplexity {when} {estimate:.2f}"))
    say(f"perplexity {when}: {found:.3f}")


def _log(line: str) -> None:
    logger.info("%s", line)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


def _errors_of_ping() -> tuple[type[Exception], ...]:
    from protocol import RemoteProtocolError

    from .connection import ConnectionFailed, Refused
    from .enrolment import EnrolmentError
    from .pinning import CertificateChanged

    return (RemoteProtocolError, ConnectionFailed, Refused, CertificateChanged, EnrolmentError)


def _errors_of_generate() -> tuple[type[Exception], ...]:
    from .generation import ExportedModelError, GenerationError

    return (ExportedModelError, GenerationError)


def _errors_of_preview() -> tuple[type[Exception], ...]:
    from storage import ModelError

    from .client_state import StateError
    from .data import DataError

    return (*_errors_of_ping(), DataError, ModelError, StateError)


def _errors_of_leak() -> tuple[type[Exception], ...]:
    from storage import AdapterError, ModelError

    from .data import DataError
    from .leak.program import ControlsFailed, MeterError

    return (DataError, ModelError, AdapterError, ControlsFailed, MeterError)


def _errors_of_train() -> tuple[type[Exception], ...]:
    from protocol import InvalidName, TrainingDiverged
    from protocol.invitation import InvalidInvitation
    from storage import AdapterError, ModelError

    from .client_state import StateError
    from .data import DataError
    from .disclosure import TooMuchDisclosed

    ours = (DataError, TooMuchDisclosed, StateError, InvalidInvitation, InvalidName)
    return (*_errors_of_ping(), *ours, AdapterError, ModelError, TrainingDiverged)
