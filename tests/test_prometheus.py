"""What Prometheus is told of a run: figures that are those of the files, names that its own tools accept, and a real scrape."""

import functools
import itertools
import json
import math
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from conftest import REPOSITORY, metrics, run_in_thread
from ports import free_port
from prometheus_client.parser import text_string_to_metric_families
from steps import a_step as step

from edge_client import EdgeClient
from gpu_server import GpuServer, RunEndedEarly, StepRecord
from gpu_server.history import EvaluationRecord, Overview, RunEvent
from gpu_server.prometheus import PrometheusObserver
from protocol import Seconds

SERVICES = REPOSITORY / "services"
SECONDS = 60.0
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="needs the programs prometheus and promtool, such as those of Debian's package prometheus",
)


class Watched:
    """An observer, and the overview that it is given."""

    def __init__(self, clients: int = 2) -> None:
        self.overview: Overview | None = Overview("r", clients)
        self.overview.add_event(RunEvent(time=1e9, kind="server_started", text=""))
        self.observer = PrometheusObserver(self._now, {"run": "r", "model": "gpt2"}, clients)

    def _now(self, most_devices: int) -> dict[str, Any] | None:
        return None if self.overview is None else self.overview.as_json(1e9 + 100, most_devices)

    def step(self, record: StepRecord) -> None:
        self.observer.step_finished(record)
        if self.overview is not None:
            self.overview.add_step(record)

    def samples(self) -> Samples:
        return samples_in(self.observer.exposition()()[0])


def samples_in(text: bytes) -> Samples:
    families = text_string_to_metric_families(text.decode())
    return {(sample.name, frozenset(sample.labels.items())): sample.value for family in families for sample in family.samples}


def one(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"splitlora_{name}", frozenset(labels.items())]


def named(samples: Samples, name: str) -> list[float]:
    return [value for (each, _), value in samples.items() if each == f"splitlora_{name}"]


# Figures


def test_counters_are_the_sums_of_the_steps() -> None:
    run = Watched()
    for number in (1, 2, 3):
        run.step(step(number, step_seconds=number / 2))
    said = run.samples()
    assert one(said, "steps_total") == 3
    assert one(said, "tokens_total") == 90
    assert one(said, "labelled_tokens_total") == 36
    assert one(said, "server_compute_seconds_total") == 0.375
    assert one(said, "client_bytes_total", client="b", direction="up") == 600
    assert one(said, "client_bytes_total", client="a", direction="down") == 900
    assert one(said, "client_time_seconds_total", client="a", part="edge_compute") == 0.75
    assert one(said, "client_time_seconds_total", client="b", part="uplink") == 1.5
    assert one(said, "client_tokens_total", client="b") == 60
    assert one(said, "client_steps_total", client="a") == 3
    assert one(said, "step_seconds_sum") == 3.0
    assert one(said, "step_seconds_count") == 3
    assert one(said, "step_seconds_bucket", le="0.5") == 1
    assert one(said, "step_seconds_bucket", le="1.0") == 2


def test_gauges_are_the_overview_s() -> None:
    run = Watched()
    assert run.overview is not None
    run.step(step(1))
    run.overview.add_event(RunEvent(time=1e9 + 90, kind="late", text="", details={"clients": ["b"], "seconds": 30.0}))
    run.overview.checkpoint_written(1, 1e9 + 2)
    held_out = EvaluationRecord(step=1, time=1e9, client="a", loss=2.0, labelled_tokens=5)
    run.overview.add_evaluation(held_out)
    run.observer.evaluated(held_out)
    run.observer.checkpoint_written(1)
    said = run.samples()
    assert one(said, "run_info", run="r", model="gpt2") == 1
    assert one(said, "codec_info", codec="int8") == 1
    assert one(said, "loss_nats") == 2.5
    assert one(said, "client_loss_nats", client="b") == 4.0
    assert one(said, "learning_rate") == 0.25
    assert one(said, "gradient_norm") == 2.0
    assert one(said, "held_out_loss_nats") == one(said, "client_held_out_loss_nats", client="a") == 2.0
    assert one(said, "bytes_total", direction="down") == 700
    assert one(said, "time_seconds_total", part="queue") == 0.5
    assert [one(said, "clients", state=state) for state in ("connected", "late", "lost", "left")] == [1, 1, 0, 0]
    assert one(said, "late_seconds") == 40
    assert one(said, "client_late_seconds", client="a") == 0
    assert one(said, "client_late_seconds", client="b") == 40
    assert one(said, "last_checkpoint_timestamp_seconds") == 1e9 + 2
    assert one(said, "checkpoints_total") == 1
    assert sum(named(said, "run_state")) == 1


def test_what_a_device_will_count_is_there_before_it_counts() -> None:
    run = Watched()
    run.observer.event_happened(RunEvent(time=1e9, kind="joined", text="", client="a"))
    said = run.samples()
    assert one(said, "client_bytes_total", client="a", direction="up") == 0
    assert one(said, "events_total", kind="lost") == 0
    assert len(named(said, "client_time_seconds_total")) == len(vars(Seconds()))
    run.observer.event_happened(RunEvent(time=1e9, kind="lost", text=""))
    assert one(run.samples(), "events_total", kind="lost") == 1


def test_run_of_more_devices_than_prometheus_is_made_for_has_series_of_all_together_and_of_the_late() -> None:
    few, many = Watched(clients=1000), Watched(clients=1001)
    for run in (few, many):
        assert run.overview is not None
        for name in "ab":
            run.observer.event_happened(RunEvent(time=1e9, kind="joined", text="", client=name))
            run.overview.add_event(RunEvent(time=1e9, kind="joined", text="", client=name))
        run.step(step(1))
        run.observer.evaluated(EvaluationRecord(step=1, time=1e9, client="a", loss=2.0, labelled_tokens=5))
        run.overview.add_event(RunEvent(time=1e9 + 90, kind="late", text="", details={"clients": ["b"], "seconds": 30.0}))
    of_clients = {name: labels for name, labels in many.samples() if "client" in dict(labels)}
    assert of_clients == {"splitlora_client_late_seconds": frozenset({("client", "b")})}
    together = {name: value for name, value in few.samples().items() if "client" not in dict(name[1])}
    assert together.keys() <= many.samples().keys()
    assert one(many.samples(), "bytes_total", direction="up") == 300


def test_metrics_are_those_of_when_they_were_asked_for_whenever_they_are_written() -> None:
    run = Watched()
    run.step(step(1))
    write = run.observer.exposition()
    run.step(step(2))
    assert one(samples_in(write()[0]), "step") == 1
    assert one(run.samples(), "step") == 2


def test_what_is_not_known_is_left_out() -> None:
    run = Watched()
    run.step(step(1, loss=math.nan, learning_rate=math.nan, gradient_norm=math.inf, losses={}))
    said = run.samples()
    assert all(math.isfinite(value) for value in said.values())
    for name in (
        "loss_nats",
        "client_loss_nats",
        "learning_rate",
        "gradient_norm",
        "held_out_loss_nats",
        "last_checkpoint_step",
    ):
        assert named(said, name) == []


def test_counters_go_on_while_the_history_of_the_run_is_read() -> None:
    run = Watched()
    run.overview = None
    run.step(step(1))
    said = run.samples()
    assert one(said, "steps_total") == 1
    assert named(said, "step") == []


def test_two_runs_of_one_process_count_for_themselves() -> None:
    first, second = Watched(), Watched()
    first.step(step(1))
    assert (one(first.samples(), "steps_total"), one(second.samples(), "steps_total")) == (1, 0)


def test_counters_have_no_gauges_of_their_beginning() -> None:
    run = Watched()
    run.step(step(1))
    assert not [name for name, _ in run.samples() if name.endswith("_created")]


@needs_prometheus
def test_promtool_finds_nothing_to_say_of_the_names_and_units() -> None:
    run = Watched()
    run.step(step(1))
    run.observer.evaluated(EvaluationRecord(step=1, time=1e9, client="a", loss=2.0, labelled_tokens=5))
    text, kind = run.observer.exposition()()
    assert kind.startswith("text/plain; version=")
    ours = b"".join(line for line in text.splitlines(keepends=True) if b"splitlora_" in line)
    checked = subprocess.run(["promtool", "check", "metrics"], input=ours, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_document_names_every_metric_there_is() -> None:
    run = Watched()
    assert run.overview is not None
    run.overview.add_event(RunEvent(time=1e9, kind="training_started", text="", details={"total_steps": 9}))
    run.step(step(1))
    held_out = EvaluationRecord(step=1, time=1e9, client="a", loss=2.0, labelled_tokens=5)
    run.overview.add_evaluation(held_out)
    run.observer.evaluated(held_out)
    run.overview.checkpoint_written(1, 1e9 + 2)
    said = {re.sub(r"_(bucket|sum|count)$", "", name) for name, _ in run.samples() if name.startswith("splitlora_")}
    document = (REPOSITORY / "docs/operating.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| splitlora_ \| \|\n((?:\|.*\n)+)", document, re.MULTILINE)
    named = {name for row in table.splitlines()[1:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert {f"splitlora_{name}" for name in named} == said


# What an operator is told


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_prometheus
def test_configuration_and_rules_are_ones() -> None:
    assert "SUCCESS" in promtool("check", "config", SERVICES / "prometheus.yml")
    assert "SUCCESS: 3 rules found" in promtool("check", "rules", SERVICES / "prometheus-rules.yml")


RULES_TEST = """
rule_files: [RULES]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      # Waited for from the third minute on, and back in the twenty-first.
      - series: splitlora_client_late_seconds{client="cellar", instance="here:8765", job="splitlora"}
        values: "0 0 0 60+60x17 0x9"
      - series: splitlora_client_late_seconds{client="attic", instance="here:8765", job="splitlora"}
        values: "0x30"
      - series: splitlora_client_missed_steps{client="attic", instance="here:8765", job="splitlora"}
        values: "0x20 0+1x100"
      - series: up{instance="here:8765", job="splitlora"}
        values: "1x50 0x50"
      - series: splitlora_run_state{instance="here:8765", job="splitlora", state="finished"}
        values: "0x50 stale"
      - series: up{instance="here:8766", job="splitlora"}
        values: "1x50 0x50"
      - series: splitlora_run_state{instance="here:8766", job="splitlora", state="finished"}
        values: "0x40 1x10 stale"
    alert_rule_test:
      - {eval_time: 11m, alertname: SplitloraDeviceLate}
      - eval_time: 12m
        alertname: SplitloraDeviceLate
        exp_alerts:
          - exp_labels: {client: cellar, instance: "here:8765", job: splitlora, severity: warning}
            exp_annotations:
              summary: cellar is late
              description: >-
                The run at here:8765 has been waiting for cellar for 10m 0s. Look after the device; with --quorum the run goes
                on without it, and after splitlora-server revoke it is waited for no more.
      - {eval_time: 22m, alertname: SplitloraDeviceLate}
      - {eval_time: 20m, alertname: SplitloraDeviceMissesSteps}
      - eval_time: 40m
        alertname: SplitloraDeviceMissesSteps
        exp_alerts:
          - exp_labels: {client: attic, instance: "here:8765", job: splitlora, severity: warning}
            exp_annotations:
              summary: the run goes on without attic
              description: >-
                The run at here:8765 has a quorum, and attic has missed 10 of the steps of the last 10 minutes: what it would
                have learnt of its texts is missing.
      - {eval_time: 50m, alertname: SplitloraServerDown}
      - eval_time: 60m
        alertname: SplitloraServerDown
        exp_alerts:
          - exp_labels: {instance: "here:8765", job: splitlora, severity: critical}
            exp_annotations:
              summary: no splitlora server answers at here:8765
              description: >-
                Its run was not complete when it was heard last. Start it again with the same command: it goes on from its last
                checkpoint. If the run is complete by now, take it off Prometheus' list.
"""


@needs_prometheus
def test_alerts_come_when_a_device_is_late_for_ten_minutes_and_end_when_it_is_back(tmp_path: Path) -> None:
    file = tmp_path / "test.yml"
    file.write_text(RULES_TEST.replace("RULES", str(SERVICES / "prometheus-rules.yml")))
    assert "SUCCESS" in promtool("test", "rules", file)


# A real scrape


class Prometheus:
    """The real one, with the configuration of services/ but for the target and the interval."""

    def __init__(self, port: int) -> None:
        self._port = port

    def ask(self, path: str, **query: str) -> Any:
        with urlopen(f"http://127.0.0.1:{self._port}/api/v1/{path}?{urlencode(query)}", timeout=SECONDS) as reply:
            told = json.load(reply)
        assert told["status"] == "success", told
        return told["data"]

    def query(self, expression: str) -> list[float]:
        return [float(series["value"][1]) for series in self.ask("query", query=expression)["result"]]


@contextmanager
def prometheus(folder: Path, target: int, elsewhere: Path | None = None) -> Iterator[Prometheus]:
    """
    Args:
        elsewhere: run directory of a server that is reached as its configuration's comments say.
    """
    text = (SERVICES / "prometheus.yml").read_text().replace("127.0.0.1:8765", f"127.0.0.1:{target}").replace("15s", "200ms")
    if elsewhere is not None:
        text = re.sub(r"^    # (scheme|authorization|tls_config|  \w+)(?=:)", r"    \1", text, flags=re.MULTILINE)
        for name in ("page-token", "server-certificate.pem"):
            text = text.replace(f"_file: {name} ", f"_file: {elsewhere / name} ")
    folder.mkdir()
    (folder / "prometheus.yml").write_text(text)
    shutil.copy(SERVICES / "prometheus-rules.yml", folder)
    port = free_port()
    command = ["prometheus", "--config.file", "prometheus.yml", "--storage.tsdb.path", "data", "--web.listen-address"]
    with subprocess.Popen([*command, f"127.0.0.1:{port}"], cwd=folder, stderr=subprocess.PIPE, text=True) as program:
        assert program.stderr is not None
        try:
            said = []
            for line in program.stderr:
                said.append(line)
                if "Server is ready to receive web requests" in line:
                    break
            else:
                raise AssertionError("".join(said))
            yield Prometheus(port)
        finally:
            program.terminate()
            program.communicate()


@pytest.fixture
def scrapes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Waits until Prometheus knows what is true now: a scrape has begun, and the one after it, when the first is stored."""
    scraped, original = threading.Semaphore(0), PrometheusObserver.exposition

    def exposition(self: PrometheusObserver) -> Callable[[], tuple[bytes, str]]:
        scraped.release()
        return original(self)

    def wait() -> None:
        while scraped.acquire(blocking=False):
            pass
        for _ in range(8):
            assert scraped.acquire(timeout=SECONDS)

    monkeypatch.setattr(PrometheusObserver, "exposition", exposition)
    return wait


def queries_of_the_dashboard() -> dict[str, list[str]]:
    """By the panel's title."""
    dashboard = json.loads((SERVICES / "grafana-dashboard.json").read_text())
    panels = [*dashboard["panels"], {"title": "annotations", "targets": dashboard["annotations"]["list"]}]
    return {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in panels}


@needs_prometheus
def test_prometheus_scrapes_a_run_over_a_restart_and_the_dashboard_shows_it(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], scrapes: Callable[[], None]
) -> None:
    run_dir, port = tmp_path / "run", free_port()
    where: dict[str, Any] = {"run_dir": str(run_dir), "port": port, "model": str(tiny_model)}
    paused, go_on = ({number: kind() for number in (4, 7)} for kind in (lambda: threading.Barrier(3), threading.Event))

    def take_part(name: str) -> None:
        data, held_out = pairs_file(name, 9), pairs_file(f"{name}-held-out", 3)
        texts = {"data": data, "eval_data": held_out, "eval_every": 1}
        with EdgeClient(
            f"ws://127.0.0.1:{port}", engine="torch", model=str(tiny_model), name=name, dtype="float32", **texts
        ) as device:
            been = set()
            for step in device.train():
                if step.number in paused and step.number not in been:
                    been.add(step.number)
                    paused[step.number].wait(SECONDS)
                    assert go_on[step.number].wait(SECONDS)

    with prometheus(tmp_path / "prometheus", port) as told:
        settings: dict[str, Any] = {"clients": 2, "cut_layer": 1, "dtype": "float32", "steps": 8, "checkpoint_every": 1}
        with GpuServer(**where, **settings) as first:
            scrapes()  # what happens from now on is an increase
            devices = [run_in_thread(functools.partial(take_part, name)) for name in ("a", "b")]
            paused[4].wait(SECONDS)
            scrapes()
            rows = metrics(run_dir)
            assert told.query("splitlora_steps_total") == told.query("splitlora_step") == [len(rows)]
            assert told.query("splitlora_loss_nats") == pytest.approx([rows[-1]["loss"]])
            for client, direction in itertools.product("ab", ("up", "down")):
                counted = told.query(f'splitlora_client_bytes_total{{client="{client}",direction="{direction}"}}')
                assert counted == [sum(row["clients"][client][f"bytes_{direction}"] for row in rows)]
            spent = sum(row["clients"]["a"]["seconds"]["edge_compute"] for row in rows)
            assert told.query('splitlora_client_time_seconds_total{client="a",part="edge_compute"}') == pytest.approx(
                [spent], abs=1e-4
            )
            assert told.query('splitlora_client_late_seconds{client="a"}') == [0]
            empty = {}
            for title, queries in queries_of_the_dashboard().items():
                for query in queries:
                    query = query.replace("$instance", f"127.0.0.1:{port}").replace("$__rate_interval", "1m")
                    if not told.query(query):
                        empty[title] = query
            assert empty.keys() == {"annotations"}  # nothing has started again
            first.suspend()
            with pytest.raises(RunEndedEarly):
                list(first.train())
        with GpuServer(**where, resume=True) as second:
            go_on[4].set()
            paused[7].wait(SECONDS)
            scrapes()
            rows = metrics(run_dir)
            assert told.query("splitlora_step") == [len(rows)]
            assert told.query("splitlora_steps_total") == [len(rows) - 4]
            assert told.query("resets(splitlora_steps_total[5m])") == [1]
            assert told.query("splitlora_server_restarts_total") == [1]
            assert {rule["name"] for rule in told.ask("rules")["groups"][0]["rules"] if rule["health"] == "ok"} == {
                "SplitloraDeviceLate",
                "SplitloraDeviceMissesSteps",
                "SplitloraServerDown",
            }
            go_on[7].set()
            list(second.train())
        for device in devices:
            device.result(SECONDS)


@needs_prometheus
def test_prometheus_elsewhere_knows_the_server_by_its_certificate_and_is_known_by_the_page_s_token(
    tiny_model: Path, tmp_path: Path, scrapes: Callable[[], None]
) -> None:
    run_dir, port = tmp_path / "run", free_port()
    where: dict[str, Any] = {"run_dir": str(run_dir), "host": "0.0.0.0", "port": port, "model": str(tiny_model)}
    with GpuServer(**where, cut_layer=1, steps=1, page_token=True), prometheus(tmp_path / "p", port, run_dir) as told:
        scrapes()
        assert told.query('up{job="splitlora"}') == [1]
        assert told.query("splitlora_expected_clients") == [1]
