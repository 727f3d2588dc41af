"""The flags of `splitlora-edge leak`. Imports nothing that computes."""

import argparse
from collections.abc import Callable
from typing import TypeVar

__all__ = ["add_flags"]

Value = TypeVar("Value", int, float, str)


def add_flags(command: argparse.ArgumentParser) -> None:
    several = "; several, separated by commas, are measured in all combinations"
    add = command.add_argument
    add("--data", required=True, metavar="FILE", help="your texts, as for training: .jsonl, .csv or .txt")
    add("--model", required=True, help="the base model: a Hugging Face folder, or a hub name such as gpt2")
    add("--adapter", metavar="DIR", help="a PEFT folder as a run leaves it (default: the adapter with which a run begins)")
    add("--cut-layer", type=_list(int), default=[3], metavar="LAYER", help=f"blocks on the device (default: 3){several}")
    add("--codec", type=_list(str), default=["float32", "int4"], help=f"default: float32,int4{several}")
    add("--labels", type=_list(str), default=["device"], help=f"who has them: device or server (default: device){several}")
    add(
        "--label-rows", type=_list(str), default=["shown"], help="shown or hidden (default: shown); hidden needs gradient noise"
    )
    for kind in ("activation", "gradient"):
        add(
            f"--{kind}-noise",
            type=_list(float),
            default=[0.0],
            metavar="SIGMA",
            help=f"noise on {kind}s, in units of the clip (default: none){several}",
        )
        add(f"--{kind}-clip", type=float, default=0.0, metavar="C", help=f"longest norm of a row of {kind}s (default: none)")
    add("--noise-delta", type=float, default=1e-6, metavar="DELTA", help="at which epsilon is given (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="texts in a micro-batch (default: %(default)s)")
    add("--max-length", type=int, default=64, help="tokens after which a text is cut (default: %(default)s)")
    add("--sequences", type=int, default=12, metavar="COUNT", help="texts that are attacked (default: %(default)s)")
    add("--attacker-texts", type=int, default=48, metavar="COUNT", help="others, which the attacker has (default: %(default)s)")
    add(
        "--training-steps",
        type=int,
        metavar="COUNT",
        help="of a short training that measures the cost of a setting (default: "
        "20 for settings with gradient noise, 0 for others)",
    )
    add("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    add(
        "--seeds",
        type=int,
        default=1,
        metavar="COUNT",
        help="repeat with so many seeds, and other texts (default: %(default)s)",
    )
    add("--json", metavar="FILE", help="write the findings there, too")
    add("--output", metavar="DIR", help="write report.txt, report.json, picture.svg and picture.png there")


def _list(kind: type[Value]) -> Callable[[str], list[Value]]:
    def parse(text: str) -> list[Value]:
        try:
            return list(dict.fromkeys(kind(part.strip()) for part in text.split(",")))
        except ValueError:
            what = {int: "whole numbers", float: "numbers"}.get(kind, "words")
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} separated by commas") from None

    return parse
