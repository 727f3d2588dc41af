"""
What still leaks, as the meter has measured it: reports of `splitlora-edge leak --json` as one table in Markdown.

    .venv/bin/python benchmarks/leaks.py report.json ...
"""

import argparse
import json
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+")
    for path in parser.parse_args().reports:
        report = json.loads(path.read_text())
        print(f"\n{report['sequences']} texts of each of {len(report['seeds'])} seeds; {report['seconds']:.0f} s; ", end="")
        print(f"failed controls: {report['controls_failed'] or 'none'}\n")
        names = list(dict.fromkeys(_name(reading) for setting in report["settings"] for reading in setting["readings"]))
        print("|".join(["", " cut ", " codec ", " noise ", *(f" {name} " for name in names), " nats a label more ", ""]))
        print("|---" * (4 + len(names)) + "|")
        for setting in report["settings"]:
            found = {_name(reading): reading for reading in setting["readings"]}
            cells = [str(setting["cut_layer"]), setting["codec"], _noise(setting)]
            cells += [_share(found[name]) if name in found else "" for name in names]
            print("| " + " | ".join([*cells, _nats(setting)]) + " |")
        first = report["settings"][0]["readings"]
        guesses = [_percent(_guess(reading)) for reading in first]
        print("| | | guess | " + " | ".join(guesses) + " | |")
        print("\ncontrols, planted -> found, and what is read on shuffled texts against what can be guessed:")
        for reading in first:
            planted = ", ".join(
                f"{_percent(each['dose'])} -> {_percent(each['found']['value'])}" for each in reading["planted"]
            )
            shuffles = ", ".join(f"{_percent(each['reading'])} of {_percent(each['guess'])}" for each in reading["shuffled"])
            print(f"- {_name(reading)}: {planted or 'none planted'}; {shuffles}")
        for norms in report["norms"]["by_cut"]:
            print(f"- norms, cut {norms['cut_layer']}: {norms['activations']} {norms['gradients']}")


def _name(reading: dict[str, Any]) -> str:
    return f"{reading['channel']}: {reading['attack']}, {reading['target']}"


def _noise(setting: dict[str, Any]) -> str:
    kinds = [("activations", "activation"), ("labels' gradients", "gradient")]
    parts = [f"{setting[f'{kind}_noise']:g} on {what}" for what, kind in kinds if setting[f"{kind}_noise"]]
    if setting["labels"] == "server":
        parts.append("labels on the server")
    if setting["label_rows"] == "hidden":
        parts.append("label rows hidden")
    return ", ".join(parts) or "none"


def _share(reading: dict[str, Any]) -> str:
    tokens, rare = reading["tokens"], reading["rare"]
    if tokens is None:
        return ""
    interval = f"[{100 * tokens['low']:.1f}, {100 * tokens['high']:.1f}]"
    text = f"{_percent(tokens['value'])} {interval}"
    if rare is not None:
        text += f", rare {_percent(rare['value'])}"
    return text + f", whole {reading['whole']}/{reading['whole_of']}"


def _guess(reading: dict[str, Any]) -> float:
    return max(float(reading[guess]["tokens"]["value"]) for guess in ("guess_commonest", "guess_unseen"))


def _nats(setting: dict[str, Any]) -> str:
    texts = []
    for key, what in (("extra_nats", ""), ("extra_nats_after_training", f" after {setting['training_steps']} steps")):
        if (nats := setting[key]) is not None:
            texts.append(f"{nats['value']:+.3f} [{nats['low']:+.3f}, {nats['high']:+.3f}]{what}")
    return "; ".join(texts)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


if __name__ == "__main__":
    main()
