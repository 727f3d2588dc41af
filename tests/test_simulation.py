"""The simulated fleet: small runs whose outcome is known in advance, and properties of larger ones."""

import json
import re
import subprocess
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY

from protocol import (
    ActivationGradient,
    Activations,
    AdapterGradient,
    AdapterWeights,
    Done,
    EdgeAdapter,
    Goodbye,
    Message,
    RunEnd,
    Seconds,
    Start,
    coded_update,
    encode,
    gradient_codec,
    identity,
)
from protocol.gradients import coded_gradient
from protocol.passage import coded_contribution
from protocol.rounding import Dither
from protocol.settings import DITHERED, EXACT, codec_named
from simulation import Fleet, Plan, PlanError, RunStuck, Server, simulate
from simulation.cli import main
from simulation.cost import Meter, bytes_a_member
from simulation.events import make_federation
from simulation.tables import growth_table
from simulation.traffic import CODECS, Traffic

ALIKE = Fleet(device_spread=0.0, link_spread=0.0, jitter=0.0, connected=0.0)
WIDE = 1e6  # Gbit/s: the server's own link takes no time
HARSH = Fleet(connected=8.0, away=4.0, leaving=0.05, arrival=2.0)


def closed_form(
    plan: Plan, *, after: type[Message] = Start, forward: float | None = None, took_part: int | None = None
) -> float:
    """Seconds of a step of equal devices, in one micro-batch: what happens in it, added up, from the adapter's arrival on."""
    fleet, server, devices = plan.fleet, plan.server, took_part or plan.devices
    sizes = Traffic(plan.tokens, plan.micro_batches, plan.width, plan.cut_layer, plan.lora_rank, plan.codec).bytes_by_kind()
    one_way = fleet.round_trip / 2
    if forward is None:
        forward = plan.tokens / (2 * fleet.device_speed)

    def goes_up(kind: type[Message]) -> float:
        return 8 * sizes[kind] / (1e6 * fleet.uplink) + one_way + devices * server.exchange

    def goes_down(kind: type[Message]) -> float:
        return one_way + 8 * sizes[kind] / (1e6 * fleet.downlink)

    computes = server.server_overhead + devices * plan.tokens / (server.server_speed * server.ranks * efficiency(server))
    adds = devices * 4 * plan.cut_layer * plan.lora_rank * 4 * plan.width / server.adding
    to_gradient = goes_down(after) + forward + goes_up(Activations) + computes + goes_down(ActivationGradient)
    return to_gradient + forward + goes_up(AdapterGradient) + adds


def efficiency(server: Server) -> float:
    return server.rank_efficiency if server.ranks > 1 else 1.0


@pytest.mark.parametrize("server", [Server(gigabits=WIDE), Server(gigabits=WIDE, exchange=0.0, ranks=4)])
@pytest.mark.parametrize("devices", [1, 7])
def test_step_of_equal_devices_takes_what_its_parts_add_up_to(server: Server, devices: int) -> None:
    plan = Plan(devices=devices, steps=3, micro_batches=1, fleet=ALIKE, server=server)
    result = simulate(plan)
    expected = [closed_form(plan, after=kind) for kind in (Start, EdgeAdapter, EdgeAdapter)]
    assert [step.seconds for step in result.steps] == pytest.approx(expected, rel=1e-6)
    assert [step.devices for step in result.steps] == [devices] * 3


def test_servers_link_bounds_a_step_of_many_devices() -> None:
    plan = Plan(devices=50, steps=3, fleet=ALIKE, server=Server(gigabits=0.1, exchange=0.0))
    sizes = Traffic(plan.tokens, plan.micro_batches, plan.width, plan.cut_layer, plan.lora_rank, plan.codec).bytes_by_kind()
    each_way = [2 * sizes[Activations] + sizes[AdapterGradient], 2 * sizes[ActivationGradient] + sizes[EdgeAdapter]]
    assert simulate(plan).step_seconds > 8 * 50 * max(each_way) / 1e8


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_first_step_with_a_quorum_waits_for_the_order_statistic_of_its_devices(share: float, seed: int) -> None:
    fleet = replace(ALIKE, device_spread=0.7)
    plan = Plan(
        devices=40,
        steps=1,
        quorum=share,
        deadline=0.0,
        micro_batches=1,
        seed=seed,
        fleet=fleet,
        server=Server(gigabits=WIDE, exchange=0.0),
    )
    factors = np.exp(0.7 * np.random.default_rng(seed).standard_normal(40))
    slowest_needed = np.sort(plan.tokens / (2 * fleet.device_speed * factors))[round(share * 40) - 1]
    expected = closed_form(plan, forward=float(slowest_needed), took_part=round(share * 40))
    (step,) = simulate(plan).steps
    assert step.seconds == pytest.approx(expected, rel=1e-6)
    assert step.devices == share * 40


def test_step_without_a_quorum_waits_for_the_slowest_device() -> None:
    fleet = replace(ALIKE, device_spread=0.7)
    plan = Plan(devices=40, steps=1, micro_batches=1, fleet=fleet, server=Server(gigabits=WIDE, exchange=0.0))
    slowest = float(np.exp(0.7 * np.random.default_rng(0).standard_normal(40)).min())
    expected = closed_form(plan, forward=plan.tokens / (2 * fleet.device_speed * slowest))
    assert simulate(plan).steps[0].seconds == pytest.approx(expected, rel=1e-6)


def test_overlapping_micro_batches_save_time_and_never_more_than_the_larger_side_takes() -> None:
    whole, halves = (simulate(Plan(devices=5, steps=4, micro_batches=n, fleet=ALIKE)).step_seconds for n in (1, 2))
    assert 0.5 * whole < halves < whole


PLANS = [
    Plan(devices=12, steps=4, quorum=quorum, aggregate_every=every, micro_batches=parts, in_flight=2, seed=seed, fleet=fleet)
    for quorum in (0.5, 1.0)
    for every in (1, 3)
    for parts in (1, 3)
    for seed in (0, 1)
    for fleet in (HARSH, replace(HARSH, leaving=0.0))
]


@pytest.mark.parametrize("plan", PLANS)
def test_run_of_devices_that_come_and_go_comes_to_its_end(plan: Plan) -> None:
    """At which `simulate` checks where the federation stands; on the way, that every answer is of the question asked."""
    result = simulate(plan)
    assert result.losses > 0
    assert 0 < result.counted <= result.worked * (1 + 1e-12)
    assert all(step.seconds >= 0 and step.devices <= 12 for step in result.steps)
    assert result == simulate(plan)


def test_another_seed_gives_another_result() -> None:
    assert simulate(Plan(devices=5, steps=2)).steps != simulate(Plan(devices=5, steps=2, seed=1)).steps


@pytest.mark.parametrize("every", [1, 3])
def test_all_work_counts_where_nobody_is_lost_and_all_are_waited_for(every: int) -> None:
    result = simulate(Plan(devices=9, steps=6, aggregate_every=every, fleet=replace(Fleet(), connected=0.0)))
    assert result.counted == pytest.approx(result.worked)
    assert result.share_in_step == 1


def test_work_is_lost_where_slow_devices_are_overtaken() -> None:
    plan = Plan(devices=30, steps=6, quorum=0.5, deadline=0.0, fleet=replace(Fleet(), connected=0.0))
    assert simulate(plan).share_that_counts < 1


def delivered(plan: Plan) -> dict[tuple[str, str], list[Message]]:
    messages: defaultdict[tuple[str, str], list[Message]] = defaultdict(list)
    times = [0.0]

    def trace(now: float, name: str, way: str, message: Message) -> None:
        assert now >= times[-1]
        times.append(now)
        messages[name, way].append(message)

    simulate(plan, trace=trace)
    return messages


@pytest.mark.parametrize("every", [1, 2])
def test_every_message_is_delivered_once_and_in_order(every: int) -> None:
    plan = Plan(devices=6, steps=4, aggregate_every=every, fleet=replace(Fleet(), connected=0.0))
    messages = delivered(plan)
    up: list[tuple[type, int, int]] = []
    down: list[tuple[type, int, int]] = []
    for step in range(1, 5):
        for part in (0, 1):
            up.append((Activations, step, part))
            down.append((ActivationGradient, step, part))
        if step % every == 0:
            up.append((AdapterGradient if every == 1 else AdapterWeights, step, 0))
            down.append((EdgeAdapter, step, 0))
    for number in range(6):
        name = f"device-{number:06}"
        *questions, goodbye = messages[name, "up"]
        start, *answers, end = messages[name, "down"]
        assert [identity(question) for question in questions] == [*up, (Done, 4, 0)]
        assert isinstance(goodbye, Goodbye)
        assert isinstance(start, Start)
        assert isinstance(end, RunEnd)
        assert [identity(answer) for answer in answers] == down


@pytest.mark.parametrize("seed", range(4))
def test_adapters_come_in_the_order_of_their_steps_whatever_is_lost(seed: int) -> None:
    messages = delivered(Plan(devices=10, steps=5, quorum=0.6, seed=seed, fleet=HARSH))
    for (_, way), heard in messages.items():
        if way == "down":
            steps = [message.step for message in heard if isinstance(message, EdgeAdapter)]
            assert steps == sorted(set(steps))


def test_lost_connections_cost_a_step_without_a_quorum_more_than_one_with() -> None:
    plans = [Plan(devices=60, steps=6, quorum=quorum, fleet=Fleet(connected=100.0)) for quorum in (0.7, 1.0)]
    with_quorum, without = (simulate(plan) for plan in plans)
    assert with_quorum.step_seconds < 0.5 * without.step_seconds
    assert with_quorum.share_that_counts < 1
    assert without.share_in_step == 1


def test_sizes_by_formula_are_those_of_encoded_messages() -> None:
    rows, width, draw = 100, 256, np.random.default_rng(0)
    ones = np.full(10, rows // 10, np.int32)
    labels = draw.integers(0, 50_000, rows // 2).astype(np.int32)
    values = draw.standard_normal((rows, width), np.float32)
    batch: dict[str, Any] = {"lengths": ones, "label_counts": ones // 2, "labels": labels, "values": values}
    message = Activations(step=1, seconds=Seconds(), **batch)
    matrices = {"A": draw.standard_normal((8, width), np.float32), "B": draw.standard_normal((3 * width, 8), np.float32)}
    contribution = AdapterGradient(step=1, seconds=Seconds(), tensors=matrices)
    zeros = {name: np.zeros_like(matrix) for name, matrix in matrices.items()}
    gradient = ActivationGradient(step=1, loss=1.0, labelled_tokens=1, values=values)
    for codec in ("float32", "bfloat16", "int8", "int4"):
        in_codec = {"activation_codec": codec_named(codec), "adapter_codec": EXACT if codec == "float32" else DITHERED}
        settings = replace(Plan(devices=1).settings(), gradient_codec=gradient_codec(codec_named(codec)), **in_codec)
        encoded: dict[type[Message], bytes] = {
            Activations: encode(message, settings.activation_codec),
            ActivationGradient: (
                encode(coded_gradient(gradient, settings.activation_codec, Dither(0)))
                if settings.gradient_codec == DITHERED
                else encode(gradient, settings.gradient_codec)
            ),
            AdapterGradient: encode(contribution),
            EdgeAdapter: encode(EdgeAdapter(step=1, tensors=matrices)),
        }
        if settings.codes_adapter:
            encoded[AdapterGradient] = encode(coded_contribution(contribution, settings, Dither(0)))
            change, _, _ = coded_update(zeros, matrices, settings)
            encoded[EdgeAdapter] = encode(EdgeAdapter(step=1, tensors=change))  # type: ignore[arg-type]  # as it is on the wire
        sizes = Traffic(rows, 1, width, cut_layer=1, lora_rank=8, codec=codec).bytes_by_kind()
        for kind, data in encoded.items():
            assert sizes[kind] == pytest.approx(len(data), rel=0.2), (codec, kind)


def test_member_takes_as_much_memory_among_many_as_among_few() -> None:
    few, many = (bytes_a_member(lambda n=n: make_federation(Plan(devices=n)), n) for n in (300, 900))
    assert 100 < few < 5000
    assert many < 1.5 * few


def test_meter_names_what_grows_with_the_number_of_devices() -> None:
    results = [simulate(Plan(devices=devices, steps=2)) for devices in (4, 40)]
    table = growth_table(results)
    assert "| 4 devices | 40 devices |" in table
    assert {line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]} >= {"receive", "trained", "aggregated", "join"}
    assert results[0].spent["receive"].calls == 4 * (2 * 3 + 1)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Plan(devices=0), "devices must be 1 to 1,000,000, got 0"),
        (lambda: Plan(devices=2, steps=0), "steps must be 1 to 10,000,000, got 0"),
        (lambda: Plan(devices=2, quorum=0.0), "quorum is a share of the devices, above 0 and up to 1, got 0"),
        (lambda: Plan(devices=2, quorum=float("nan")), "quorum is a share of the devices, above 0 and up to 1, got nan"),
        (lambda: Plan(devices=2, deadline=-1.0), "deadline must be 0 to 1e+09, got -1"),
        (lambda: Plan(devices=2, codec="zip"), "codec must be one of float32, bfloat16, int8, int4, got 'zip'"),
        (lambda: Plan(devices=2, fleet=Fleet(uplink=0.0)), "uplink must be 1e-06 to 1e+12, got 0"),
        (lambda: Plan(devices=2, server=Server(ranks=0)), "ranks must be 1 to 100,000, got 0"),
        (lambda: Plan(devices=2, seed=-1), "seed must be 0 to 9,223,372,036,854,775,807, got -1"),
    ],
)
def test_what_cannot_be_simulated_is_said_in_a_sentence(make: Callable[[], Plan], sentence: str) -> None:
    with pytest.raises(PlanError) as raised:
        make()
    assert str(raised.value) == sentence


def test_run_that_nobody_would_wait_for_is_given_up_with_a_sentence() -> None:
    fleet = Fleet(connected=5.0, away=1e9, arrival=0.0)
    with pytest.raises(RunStuck, match=r"^no step was finished in 30 d of simulated time, and the run is waiting for"):
        simulate(Plan(devices=5, steps=50, fleet=fleet))


@pytest.mark.parametrize(
    ("flag", "number"),
    [
        ("--device-speed", "0"),
        ("--device-spread", "9"),
        ("--connected", "-1"),
        ("--away", "nan"),
        ("--server-speed", "0"),
        ("--server-overhead", "-1"),
        ("--exchange", "inf"),
    ],
)
def test_number_that_cannot_be_is_named_as_the_flag_that_gave_it(
    flag: str, number: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program(monkeypatch, flag, number) == 1
    assert capsys.readouterr().err.startswith(f"simulation: {flag.removeprefix('--')} must be ")


def run_program(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["simulation", *arguments])
    return main()


def test_program_says_what_is_wrong_with_a_number(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(monkeypatch, "--devices", "3", "0") == 1
    assert capsys.readouterr().err == "simulation: devices must be 1 to 1,000,000, got 0\n"
    with pytest.raises(SystemExit):
        run_program(monkeypatch, "--deadline", "soon")
    assert "a deadline is a number of seconds, or \"measured\", got 'soon'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (["--json", "{}/none/figures.json"], "--json {}/none/figures.json: there is no folder {}/none"),
        (["--json", "{}"], "--json {} is a folder; give a file's name"),
        (["--pictures", "{}/a-file"], "--pictures {}/a-file is a file; give a folder"),
        (["--pictures", "{}/a-file/in-it"], "--pictures {}/a-file/in-it: nothing can be written there: Not a directory"),
    ],
)
def test_program_looks_where_it_is_to_write_before_it_begins(
    asked: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a-file").touch()
    assert run_program(monkeypatch, *(word.format(tmp_path) for word in asked)) == 1
    assert capsys.readouterr().err == f"simulation: {sentence.replace('{}', str(tmp_path))}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="a folder in which nobody may write")
@pytest.mark.parametrize("flag", ["--json", "--pictures"])
def test_program_tries_to_write_before_it_begins(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program(monkeypatch, flag, "/proc/figures") == 1
    assert (
        capsys.readouterr().err
        == f"simulation: {flag} /proc/figures: nothing can be written there: No such file or directory\n"
    )


def test_program_writes_tables_figures_and_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    asked = ["--devices", "3", "5", "--quorum", "0.5", "1", "--deadline", "measured", "0", "--steps", "2", "--profile"]
    assert run_program(monkeypatch, *asked, "--json", f"{tmp_path}/figures.json", "--pictures", str(tmp_path)) == 0
    output = capsys.readouterr()
    assert "| 5 | all |" in output.out
    assert "function calls" in output.out
    assert "| 5 | 0.5 after 0 s |" in output.out
    assert "step 12/12" in output.err
    runs = json.loads((tmp_path / "figures.json").read_text())["runs"]
    asked_for = [(run["plan"]["devices"], run["plan"]["deadline"], run["plan"]["quorum"]) for run in runs]
    assert asked_for == [(n, *of) for n in (3, 5) for of in ((None, 0.5), (None, 1.0), (0.0, 0.5))]
    assert (tmp_path / "fleet.svg").read_text().startswith("<?xml")
    assert (tmp_path / "fleet.png").read_bytes().startswith(b"\x89PNG")


def test_profile_says_where_the_federation_spends_its_time() -> None:
    import cProfile

    result = simulate(Plan(devices=3, steps=1), meter=Meter(cProfile.Profile()))
    assert "federation.py" in result.where


DOCUMENT = (REPOSITORY / "docs/scale.md").read_text(encoding="utf-8")


def test_arithmetic_of_the_document_is_that_of_the_defaults() -> None:
    plan, server = Plan(devices=1), Server()
    sizes = Traffic(plan.tokens, 1, plan.width, plan.cut_layer, plan.lora_rank, plan.codec).bytes_by_kind()
    kinds = (Activations, ActivationGradient, AdapterGradient, EdgeAdapter)
    activations, gradient, contribution, change = (sizes[kind] / 1000 for kind in kinds)
    assert f"{activations:.0f} kB of activations, {contribution:.0f} kB of adapter" in DOCUMENT
    assert f"{gradient:.0f} kB of gradients, {change:.0f} kB of adapter" in DOCUMENT
    assert f"| {server.server_speed / plan.tokens:.0f} | g / t |" in DOCUMENT
    for every, parts in ((1, 2), (10, 2), (10, 1)):
        assert f"| {1 / ((parts + 1 / every) * server.exchange):.0f} |" in DOCUMENT
    formulas = re.findall(r"bytes/s / \((\d\.\d+) t d \+ (\d+\.\d+) r c d / A\)", DOCUMENT)
    each = CODECS[plan.codec]
    expected = [(each.activations, 4 * each.contributions), (each.gradients, 4 * each.changes)]
    assert [tuple(map(float, formula)) for formula in formulas] == [pytest.approx(pair) for pair in expected]
    assert f"{2 * plan.tokens * plan.width * 4 / 1e6:.1f} MB, once" in DOCUMENT


def test_merge_of_the_document_is_the_mean_by_labelled_tokens(tmp_path: Path) -> None:
    numpy_files = pytest.importorskip("safetensors.numpy")
    (snippet,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)
    space: dict[str, Any] = {}
    exec(textwrap.dedent("   " + snippet.lstrip()), space)
    for number, folder in enumerate(("a", "b", "mean")):
        (tmp_path / folder).mkdir()
        matrices = {"A": np.full((2, 3), 4.0 * number, np.float32)}
        numpy_files.save_file(matrices, tmp_path / folder / "adapter_model.safetensors")
    space["merge"]([f"{tmp_path}/a", f"{tmp_path}/b"], [3, 1], f"{tmp_path}/mean")
    merged = numpy_files.load_file(tmp_path / "mean/adapter_model.safetensors")
    assert merged["A"].dtype == np.float32
    assert merged["A"] == pytest.approx(np.full((2, 3), 1.0))


def test_simulation_needs_no_torch() -> None:
    check = (
        "import sys, simulation, simulation.cli; simulation.simulate(simulation.Plan(devices=3, steps=2)); "
        "sys.exit(bool({'torch', 'split_model', 'websockets', 'matplotlib'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", check], check=True, cwd=REPOSITORY)
