"""Reports of runs: their numbers against sums made here, what they show of bad folders, and what they leave alone."""

import csv
import itertools
import json
import math
import re
import sys
import xml.dom.minidom
from collections import Counter
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import written_runs
from conftest import metrics, run_split
from hypothesis import given
from hypothesis import strategies as st
from written_runs import ABSENT, PARTS, evaluation, row

pytest.importorskip("matplotlib")

import gpu_server.cli
from gpu_server.history import RunFiles
from gpu_server.report import ReportError, RunsLeftOut, write_report
from gpu_server.report.curves import AXES, MOST_POINTS, loss_curve
from gpu_server.report.differences import labels_of, settings_of, split_settings
from gpu_server.report.measured_run import MeasuredRun, measure
from gpu_server.report.pictures import LINES, MARKERS, places_of_labels
from terminal import PackageMissing

PICTURES = [f"{what}-by-{axis}" for what in ("loss", "perplexity") for axis in ("steps", "seconds", "bytes")] + ["time"]


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run into a folder of this name; see `written_runs.write_run`."""
    return lambda name, *lines, **more: written_runs.write_run(tmp_path / name, *lines, **more)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def numbers(path: Path, column: str, run: str | None = None) -> list[float]:
    return [float(line[column]) for line in table(path) if run in (None, line["run"])]


def runs_in(output: Path) -> list[str]:
    return [line["run"] for line in table(output / "results.csv")]


class TestNumbers:
    def test_results_are_the_sums_of_the_rows(self, write_run: Callable[..., Path], tmp_path: Path) -> None:
        run = write_run("one", [row(1, 3.0), row(2, 2.0, devices=("a",)), row(3, 1.5)], restarts=2)
        write_report([run], tmp_path / "report")
        (line,) = table(tmp_path / "report/results.csv")
        assert {name: line[name] for name in ("run", "state", "steps", "final_loss", "seconds", "tokens")} == {
            "run": "one",
            "state": "not finished",  # 3 of 4 steps
            "steps": "3",
            "final_loss": "1.5",
            "seconds": "6",
            "tokens": "120",
        }
        assert (line["tokens_per_second"], line["bytes_up"], line["bytes_down"]) == ("20", "500", "250")
        assert (line["devices"], line["restarts"]) == ("2", "2")

    def test_every_picture_has_its_numbers_beside_it(self, write_run: Callable[..., Path], tmp_path: Path) -> None:
        run = write_run("one", evaluations=[evaluation(0, "a", 2.0, 1), evaluation(4, "a", 1.0, 1)])
        output = tmp_path / "report"
        write_report([run], output)
        expected = {"index.html", "results.csv"} | {f"{name}.{kind}" for name in PICTURES for kind in ("svg", "png", "csv")}
        assert {path.name for path in output.iterdir()} == expected
        for axis, places in (("steps", [1, 2, 3, 4]), ("seconds", [2, 4, 6, 8]), ("bytes", [300, 600, 900, 1200])):
            loss = output / f"loss-by-{axis}.csv"
            assert numbers(loss, axis) == places
            assert numbers(loss, "loss") == numbers(loss, "smoothed") == pytest.approx([4, 2, 4 / 3, 1])
            perplexity = output / f"perplexity-by-{axis}.csv"
            assert numbers(perplexity, axis) == [0, places[-1]]
            assert numbers(perplexity, "perplexity") == pytest.approx([math.exp(2), math.exp(1)])
        parts = {line["part"]: (line["seconds_of_a_device_in_a_step"], line["share"]) for line in table(output / "time.csv")}
        assert parts == dict.fromkeys(PARTS, ("0.5", f"{1 / 7:.9g}"))

    def test_device_that_was_connected_and_not_in_a_step_does_not_count_there(
        self, write_run: Callable[..., Path], tmp_path: Path
    ) -> None:
        """Its line has bytes, and seconds that are all 0."""
        client = {"bytes_up": 100, "bytes_down": 50, "seconds": dict.fromkeys(PARTS, 0.5), "labelled_tokens": 10}
        waits = {"bytes_up": 9, "bytes_down": 9, "seconds": dict.fromkeys(PARTS, 0.0)}
        rows = [row(1, 2.0, clients={"a": client, "b": client}), row(2, 2.0, clients={"a": client, "b": waits})]
        write_report([write_run("quorum", rows)], tmp_path / "report")
        seconds = {line["seconds_of_a_device_in_a_step"] for line in table(tmp_path / "report/time.csv")}
        assert seconds == {"0.5"}

    def test_lines_of_very_many_devices_have_their_sums(self, write_run: Callable[..., Path], tmp_path: Path) -> None:
        all_together = {"clients": 2000, "labelled_tokens": 10, "samples": 5, "tokens": 40, "loss": 1.0}
        all_together |= {"bytes_up": 2000, "bytes_down": 1000, "seconds": dict.fromkeys(PARTS, 1000.0)}
        joined = [{"time": 1.0, "kind": "joined", "text": "", "client": name} for name in ("b", "a")]
        folder = write_run("many", [row(number, 1.0, clients={"*": all_together}) for number in (1, 2)], events=joined)
        run = measure(RunFiles(folder), print)
        assert run is not None
        assert (run.bytes_up, run.device_steps, list(run.devices)) == (4000, 4000, ["a", "b"])
        assert run.seconds_by_part["uplink"] / run.device_steps == 0.5

    def test_seconds_do_not_count_the_hours_between_two_servers(self, write_run: Callable[..., Path], tmp_path: Path) -> None:
        rows = [row(1, 2.0, time=1e9), row(2, 2.0, time=1e9 + 80_000, step_seconds=3.0)]
        write_report([write_run("resumed", rows)], tmp_path / "report")
        assert numbers(tmp_path / "report/loss-by-seconds.csv", "seconds") == [2, 5]

    def test_held_out_loss_is_the_mean_over_all_tokens_where_all_devices_have_measured(
        self, write_run: Callable[..., Path], tmp_path: Path
    ) -> None:
        both = [evaluation(2, "a", 1.0, 30), evaluation(2, "b", 3.0, 10)]
        again = [evaluation(4, "a", 9.0, 30), evaluation(4, "b", 2.0, 10), evaluation(4, "a", 2.0, 30)]  # a server went back
        run = write_run("two", evaluations=[evaluation(1, "a", 0.1, 30), *both, *again])
        page = write_report([run], tmp_path / "report").read_text()
        losses = np.log(numbers(tmp_path / "report/perplexity-by-steps.csv", "perplexity"))
        assert numbers(tmp_path / "report/perplexity-by-steps.csv", "steps") == [2, 4]
        assert losses == pytest.approx([1.5, 2.0])
        assert "perplexities after 1 step are left out" in page

    def test_smoothed_loss_weighs_labelled_tokens_and_keeps_every_one(self, write_run: Callable[..., Path]) -> None:
        rows = [row(step, 1.0 if step % 2 else 4.0, labelled_tokens=30 if step % 2 else 10) for step in range(1, 1001)]
        run = measure(RunFiles(write_run("long", rows)), lambda _: None)
        assert run is not None
        curve = loss_curve(run, "long", 0, AXES[0])
        assert curve is not None
        columns = curve.columns
        assert len(columns["smoothed"]) == MOST_POINTS
        assert columns["smoothed"][10:-10] == pytest.approx(1.75)  # windows of 50 steps; shorter ones at the ends
        assert (columns["lowest"].min(), columns["highest"].max()) == (1.0, 4.0)

    @given(st.integers(1, 3 * MOST_POINTS), st.integers(0, 2**32 - 1))
    def test_thinned_curve_has_the_bounds_of_all_steps_and_their_order(self, steps: int, seed: int) -> None:
        losses = np.random.default_rng(seed).gamma(2.0, size=steps).tolist()
        curve = loss_curve(run_of(losses), "any", 0, AXES[0])
        assert curve is not None
        assert len(curve.x) == min(len(losses), MOST_POINTS)
        assert (np.diff(curve.x) > 0).all()
        assert curve.columns["lowest"].min() == min(losses)
        assert curve.columns["highest"].max() == max(losses)
        if len(losses) <= MOST_POINTS:
            assert curve.columns["loss"] == pytest.approx(losses)

    def test_where_a_scale_has_no_zero_nothing_is_drawn_there(self, write_run: Callable[..., Path], tmp_path: Path) -> None:
        first, last = evaluation(0, "a", 2.0, 1), {"client": "a", "loss": 1.0, "labelled_tokens": 1}
        many = write_run("many", [row(step, 1.0) for step in range(1, 8)], evaluations=[first, evaluation(7, **last)])
        few = write_run(
            "few",
            [row(step, 1.0, devices=("a",) if step == 3 else ()) for step in range(1, 5)],
            evaluations=[first, evaluation(4, **last)],
        )
        output = tmp_path / "report"
        write_report([many, few], output)
        assert "on a log scale" in "".join(text_of(output / "loss-by-bytes.svg"))
        assert numbers(output / "loss-by-bytes.csv", "bytes", "few") == [150, 150]
        assert numbers(output / "perplexity-by-bytes.csv", "bytes") == [2100, 150]
        assert "log scale" not in "".join(text_of(output / "loss-by-steps.svg"))
        assert numbers(output / "perplexity-by-steps.csv", "steps") == [0, 7, 0, 4]

    def test_steps_without_a_loss_are_not_drawn(self, write_run: Callable[..., Path], tmp_path: Path) -> None:
        write_report([write_run("gaps", [row(1, 2.0), row(2, None), row(3, 1.0)])], tmp_path / "report")
        assert numbers(tmp_path / "report/loss-by-steps.csv", "steps") == [1, 3]

    def test_real_run_is_what_its_files_say(self, tiny_model: Path, pairs_file: Callable[..., Path], tmp_path: Path) -> None:
        data = {"data": str(pairs_file("data", 12)), "batch_size": 4}
        result = run_split(
            {"model": str(tiny_model), "run_dir": str(tmp_path / "run"), "epochs": 2, "cut_layer": 2}, {"a": data, "b": data}
        )
        output = tmp_path / "report"
        write_report([result.run_dir], output)
        (line,) = table(output / "results.csv")
        rows = metrics(result.run_dir)
        assert (line["steps"], line["devices"], line["state"]) == ("6", "2", "finished")
        assert int(line["bytes_up"]) == sum(client["bytes_up"] for each in rows for client in each["clients"].values())
        assert numbers(output / "loss-by-steps.csv", "loss") == pytest.approx(result.losses)
        seconds = numbers(output / "loss-by-seconds.csv", "seconds")
        assert seconds == pytest.approx(np.cumsum([each["step_seconds"] for each in rows]))


def run_of(losses: Sequence[float]) -> MeasuredRun:
    from gpu_server.report.measured_run import held_out_of
    from storage import RunDescription

    places = np.arange(1.0, len(losses) + 1)
    return MeasuredRun(
        path=Path("any"),
        description=RunDescription(run="any", fingerprint="", config={}, dtype="float32", versions={}),
        is_served=False,
        steps=places,
        losses=np.array(losses),
        labelled_tokens=np.ones(len(losses)),
        seconds=places,
        num_bytes=places,
        tokens=1,
        bytes_up=1,
        bytes_down=1,
        seconds_by_part=dict.fromkeys(PARTS, 1.0),
        device_steps=1,
        devices={},
        held_out=held_out_of([]),
    )


class TestLabels:
    def test_runs_are_called_by_what_differs(self, write_run: Callable[..., Path]) -> None:
        runs = [
            write_run("x", codec="int8", port=1),
            write_run("y", codec="int8", cut_layer=1, port=2),
            write_run("z", codec="int4", port=3),
        ]
        labels, differ = named(runs)
        assert labels == ["cut 3, int8", "cut 1, int8", "cut 3, int4"]
        assert differ == ["cut layer", "codec"]

    def test_what_only_says_where_a_run_is_served_is_not_a_setting(self, write_run: Callable[..., Path]) -> None:
        runs = [write_run("x", host="0.0.0.0", port=1, linger=1.0), write_run("y", max_queue=7)]
        assert named(runs) == (["x", "y"], [])

    def test_settings_that_a_run_cannot_have_do_not_differ_in_it(self, write_run: Callable[..., Path]) -> None:
        runs = [
            write_run("x", quorum=None),
            write_run("y", quorum=1),
            write_run("z", mode="federated", cut_layer=ABSENT, codec=ABSENT, local_steps=5),
        ]
        assert named(runs) == (["split, quorum none", "split, quorum 1", "federated"], ["mode", "quorum"])

    def test_devices_batch_size_is_told_by_events(self, write_run: Callable[..., Path]) -> None:
        def joined(*sizes: int) -> list[dict[str, Any]]:
            return [
                {"time": 1.0, "kind": "joined", "text": "…", "client": name, "details": {"samples": 9, "batch_size": size}}
                for name, size in zip("ab", sizes, strict=True)
            ]

        runs = [write_run("x", events=joined(8, 8)), write_run("y", events=joined(8, 4))]
        assert named(runs)[0] == ["batch 8", "batch 8, 4"]

    def test_runs_with_many_differences_are_called_by_their_folders(self, write_run: Callable[..., Path]) -> None:
        many = {"lora_rank": 16, "lora_alpha": 64.0, "lr": 0.003, "lora_targets": ["c_attn", "c_proj"]}
        assert named([write_run("one"), write_run("two", **many)])[0] == ["one", "two"]

    def test_folders_of_the_same_name_are_told_apart(self, write_run: Callable[..., Path]) -> None:
        runs = [write_run("monday/run"), write_run("tuesday/run"), write_run("third")]
        assert named(runs)[0] == ["monday/run", "tuesday/run", "third"]

    def test_any_name_is_shown_as_it_is(self, write_run: Callable[..., Path], tmp_path: Path) -> None:
        names = ["a$x_1$b$", "<b>&amp;\"'", "日本", "a" * 90, "back\\1slash", "-->"]
        output = tmp_path / "report"
        page = write_report([write_run(name) for name in names], output).read_text()
        assert runs_in(output) == names
        assert set(names) <= set(Text.of(page).headers)
        drawn = text_of(output / "loss-by-steps.svg")
        assert {name if len(name) < 30 else f"{'a' * 15}…{'a' * 15}" for name in names} <= set(drawn)


def named(paths: Sequence[Path]) -> tuple[list[str], list[str]]:
    """The runs' labels, and which settings differ."""
    runs = [run for path in paths if (run := measure(RunFiles(path), lambda _: None)) is not None]
    settings = [settings_of(run) for run in runs]
    return labels_of(runs, settings), split_settings(settings)[0]


class Text(HTMLParser):
    """The page as a browser takes it apart."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.headers: list[str] = []
        self._is_header = False

    @classmethod
    def of(cls, page: str) -> "Text":
        parsed = cls()
        parsed.feed(page)
        return parsed

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attributes]
        self._is_header = tag == "th"

    def handle_endtag(self, tag: str) -> None:
        self._is_header = False

    def handle_data(self, data: str) -> None:
        if self._is_header:
            self.headers.append(data)


def text_of(svg: Path) -> list[str]:
    document = xml.dom.minidom.parse(str(svg))
    return ["".join(node.data for node in element.childNodes) for element in document.getElementsByTagName("text")]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    measured = written_runs.write_run(folder / "x", codec="int8", evaluations=[evaluation(4, "a", 1.0, 1)])
    write_report([measured, written_runs.write_run(folder / "y")], folder / "report")
    return folder / "report"


@pytest.fixture(scope="module")
def page(report: Path) -> Text:
    return Text.of((report / "index.html").read_text())


class TestPage:
    def test_page_asks_nobody_for_anything(self, page: Text, report: Path) -> None:
        assert not page.tags.keys() & {"script", "link", "img", "iframe", "object", "embed", "base"}
        for tag, name, value in page.attributes:
            assert not name.startswith("on")
            if name in ("href", "src", "xlink:href", "srcset", "action"):
                assert value is not None
                assert value.startswith("#") or (tag == "a" and (report / value).is_file())
        assert not re.search(r"@import|url\((?!#)", (report / "index.html").read_text())

    def test_pictures_on_the_page_are_described_and_do_not_share_names(self, page: Text) -> None:
        names = [value for _, name, value in page.attributes if name == "id"]
        assert len(names) == len(set(names)) > 100
        described = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
        assert len(described) == len(PICTURES)
        assert described[0] == "loss in training, nats per labelled token, against steps. int8: 1; float32: 1"
        used = [re.findall(r"url\(#(.*?)\)", value or "") for _, _, value in page.attributes]
        linked = [value[1:] for _, name, value in page.attributes if name.endswith("href") and value and value[0] == "#"]
        assert {*itertools.chain(*used), *linked} <= set(names)

    def test_colours_are_those_of_day_or_night(self, report: Path) -> None:
        text = (report / "index.html").read_text()
        assert "prefers-color-scheme: dark" in text
        style, _, drawn = text.partition("</style>")
        for colour in ("#ffffff", "#1c2024", "#0068b0", "#c34a00"):
            assert colour in style
            assert colour not in drawn

    def test_no_two_of_many_runs_look_the_same_even_in_grey(self) -> None:
        looks = [(place % len(LINES), place % len(MARKERS)) for place in range(35)]
        assert len(set(looks)) == 35

    def test_same_runs_give_the_same_bytes(self, report: Path, tmp_path: Path) -> None:
        write_report([report.parent / name for name in "xy"], tmp_path / "again")
        files = sorted(path.name for path in report.iterdir())
        assert len(files) > 20
        for name in files:
            assert (tmp_path / "again" / name).read_bytes() == (report / name).read_bytes(), name

    def test_what_was_not_measured_is_said(self, write_run: Callable[..., Path], tmp_path: Path) -> None:
        early = [{name: value for name, value in row(1, 2.0).items() if name not in ("time", "step_seconds")}]
        alone = [row(1, 2.0, devices=())]
        page = write_report([write_run("early", early), write_run("alone", alone)], tmp_path / "report").read_text()
        assert "Of these runs not all of it was recorded, so they are left out here: early." in page
        assert "These runs sent none, so they are left out here: alone." in page
        assert "No held-out perplexity was measured" in page
        assert {line["run"] for line in table(tmp_path / "report/loss-by-seconds.csv")} == {"alone"}
        assert {line["run"] for line in table(tmp_path / "report/loss-by-bytes.csv")} == {"early"}


boxes = st.tuples(st.integers(100, 500), st.integers(20, 150), st.integers(0, 400)).map(
    lambda box: (float(box[0]), float(box[0] + box[1]), float(box[2]))
)


@given(st.lists(boxes, min_size=1, max_size=10))
def test_no_label_is_over_another(meant: list[tuple[float, float, float]]) -> None:
    lines = [np.array([[0.0, 200.0], [left - 10, middle]]) for left, _, middle in meant]
    middles = places_of_labels(meant, lines, height=15, lowest=0, highest=400)
    placed = [(left, right, middle) for (left, right, _), middle in zip(meant, middles, strict=True)]
    for one, other in itertools.combinations(placed, 2):
        assert one[1] <= other[0] or other[1] <= one[0] or abs(one[2] - other[2]) > 15 - 1e-6


class TestBadInput:
    def test_runs_that_cannot_be_read_are_named_and_left_out(self, write_run: Callable[..., Path], tmp_path: Path) -> None:
        good, empty, newer = write_run("good"), write_run("empty", []), write_run("newer")
        (newer / "metrics.jsonl").write_text('{"step": 1, "of": "another kind"}\n')
        output = tmp_path / "report"
        with pytest.raises(RunsLeftOut) as said:
            write_report([empty, good, newer, tmp_path / "nowhere", good], output)
        sentences = (
            f"{empty} has finished no step yet",
            f"{newer / 'metrics.jsonl'}, line 1",
            f"{tmp_path / 'nowhere'} holds no run",
            f"{good} is given twice",
        )
        page = (output / "index.html").read_text()
        for sentence in sentences:
            assert sentence in str(said.value)
            assert sentence in page
        assert runs_in(output) == ["good"]

    def test_line_that_was_torn_is_not_read(self, write_run: Callable[..., Path], tmp_path: Path) -> None:
        torn = write_run("torn")
        with (torn / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row(5, 1.0))[:70])
        write_report([torn], tmp_path / "report")
        assert numbers(tmp_path / "report/loss-by-steps.csv", "steps") == [1, 2, 3, 4]

    def test_where_no_run_can_be_read_nothing_is_written(self, write_run: Callable[..., Path], tmp_path: Path) -> None:
        with pytest.raises(ReportError, match="empty has finished no step yet"):
            write_report([write_run("empty", [])], tmp_path / "report")
        assert not (tmp_path / "report").exists()

    @pytest.mark.parametrize("file", ["notes.txt", "index.html"])
    def test_folder_of_somebody_else_is_left_alone(self, file: str, write_run: Callable[..., Path], tmp_path: Path) -> None:
        output = tmp_path / "report"
        output.mkdir()
        (output / file).write_text("<html>mine</html>")
        with pytest.raises(ReportError, match="holds something that is no report"):
            write_report([write_run("x")], output)
        assert [path.name for path in output.iterdir()] == [file]
        assert (output / file).read_text() == "<html>mine</html>"

    def test_earlier_report_is_replaced_and_what_lies_beside_it_is_not(
        self, write_run: Callable[..., Path], tmp_path: Path
    ) -> None:
        output = tmp_path / "report"
        write_report([write_run("x", codec="int8", evaluations=[evaluation(4, "a", 1.0, 1)]), write_run("y")], output)
        (output / "notes.txt").write_text("mine")
        write_report([tmp_path / "y"], output)
        assert runs_in(output) == ["y"]
        assert (output / "notes.txt").read_text() == "mine"
        assert not list(output.glob("perplexity*"))
        assert not (output / "settings.csv").exists()

    def test_output_that_is_a_file_or_a_run_is_refused(self, write_run: Callable[..., Path], tmp_path: Path) -> None:
        run = write_run("x")
        before = sorted(run.iterdir())
        for output in (run, run / "run.json", run / "run.json" / "deeper"):
            with pytest.raises(ReportError, match=re.escape(str(output))):
                write_report([run], output)
        assert sorted(run.iterdir()) == before

    def test_program_says_what_it_left_out_by_its_exit_status(
        self, write_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        good, empty = str(write_run("good")), str(write_run("empty", []))
        output = str(tmp_path / "report")
        assert gpu_server.cli.main(["report", good, "--output", output]) == 0
        assert f"the report is {output}/index.html" in capsys.readouterr().err
        assert gpu_server.cli.main(["report", good, empty, "--output", output]) == 1
        assert f"{output} has 1 run; left out: {empty} has finished no step yet" in capsys.readouterr().err.splitlines()[-1]

    def test_without_matplotlib_it_is_said_what_installs_it(
        self, write_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("report", "pictures"):
            monkeypatch.delitem(sys.modules, f"gpu_server.report.{name}", raising=False)
        monkeypatch.setitem(sys.modules, "matplotlib", None)  # type: ignore[arg-type]
        with pytest.raises(PackageMissing, match=re.escape("pip install 'splitlora[report]'")):
            write_report([write_run("x")], tmp_path / "report")
