"""Settings: what they may be, where they come from, and the lists of flags and names that people rely on."""

import argparse
import dataclasses
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import edge_client.cli
import export.cli
import gpu_server.cli
from gpu_server import ConfigError, ServerConfig
from gpu_server.config import COUNTS, resumed
from gpu_server.options import options_from_toml
from protocol import CODECS, RunSettings
from protocol.settings import BOUNDS, COARSE, CODEC_NAMES, codec_name, codec_named

_, *LOSSY = CODEC_NAMES
REQUIRED = {"model": "gpt2", "run_dir": "runs/demo", "steps": 10}
NOISE = {"labels", "label_rows", "activation_noise", "activation_clip", "gradient_noise", "gradient_clip", "noise_delta"}


def config(**options: Any) -> ServerConfig:
    return ServerConfig.from_options({**REQUIRED, **options})


def refused(**options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        config(**options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Ranges


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -1, 2**31])
def test_counts_begin_at_one(name: str, value: int) -> None:
    assert refused(**{name: value}) == f"{name.replace('_', '-')} must be 1 to 2147483647, got {value}"


@pytest.mark.parametrize("name", [name for name in BOUNDS if name != "cut_layer"])
@pytest.mark.parametrize("end", [0, 1])
def test_what_clients_are_told_has_the_bounds_of_the_protocol(name: str, end: int) -> None:
    value = (BOUNDS[name][0] - 1, 2 * BOUNDS[name][1] + 1)[end]
    options = {"steps": None, "epochs": value} if name == "epochs" else {name: value}
    least, most = (f"{bound:.16g}" for bound in BOUNDS[name])
    assert refused(**options).startswith(f"{name.replace('_', '-')} must be {least} to {most}, got ")


@pytest.mark.parametrize("name", ["step_deadline", "handshake_seconds", "max_messages_per_second"])
@pytest.mark.parametrize("value", [0.0, -1e-4, float("nan"), float("inf")])
def test_times_are_positive_numbers(name: str, value: float) -> None:
    assert refused(**{name: value}) == f"{name.replace('_', '-')} must be positive, got {value}"


def test_quorum_is_not_more_than_all() -> None:
    assert refused(clients=2, quorum=3) == "quorum must be at most clients, 2, got 3"


def test_run_goes_on_with_what_it_was_begun_with_and_where_it_is_told() -> None:
    recorded = {**dataclasses.asdict(config(lr=1e-3)), "lora_targets": ["c_attn"]}
    told = resumed({"run_dir": "moved", "port": 9, "lora_targets": "c_attn", "steps": 10}, recorded)
    assert (told["run_dir"], told["port"], told["lr"]) == ("moved", 9, 1e-3)


def test_run_goes_on_with_the_same_layers_in_any_order() -> None:
    recorded = {**dataclasses.asdict(config()), "lora_targets": ["c_attn", "c_fc"]}
    assert resumed({"run_dir": "r", "lora_targets": "c_fc,c_attn"}, recorded)["lora_targets"] == "c_fc,c_attn"


@pytest.mark.parametrize(("name", "given", "before"), [("lr", 1e-2, 0.001), ("lora_targets", ("c_fc",), ["c_attn"])])
def test_run_cannot_go_on_as_another_one(name: str, given: Any, before: Any) -> None:
    recorded = {**dataclasses.asdict(config()), "lora_targets": ["c_attn"]}
    with pytest.raises(ConfigError) as caught:
        resumed({"run_dir": "r", name: given}, recorded)
    flag = name.replace("_", "-")
    before, shown = (",".join(value) if isinstance(value, list | tuple) else value for value in (before, given))
    assert str(caught.value) == (
        f"r holds a run with {flag} {before}; it cannot go on with {flag} {shown}. Leave --{flag} out, "
        "or start another run from its adapter: --init-adapter r/adapter with another --run-dir"
    )


def test_run_of_an_earlier_version_goes_on_with_what_that_version_did() -> None:
    recorded = dataclasses.asdict(config())
    for name in ("labels", "gradient_noise", "micro_batches"):
        del recorded[name]
    assert (
        resumed({"run_dir": "r", "labels": "server", "gradient_noise": 0, "micro_batches": 2}, recorded)["labels"] == "server"
    )
    with pytest.raises(
        ConfigError, match=r"^r holds a run with labels server; it cannot go on with labels device. Leave --labels"
    ):
        resumed({"run_dir": "r", "labels": "device"}, recorded)


def test_adapter_is_coded_where_activations_are_and_not_in_runs_that_an_earlier_version_has_begun() -> None:
    told = {codec: config(codec=codec).settled("float32").adapter_codec for codec in ("float32", "auto", *LOSSY, "delta")}
    assert told == {"float32": "float32", **dict.fromkeys(("auto", *LOSSY, "delta"), "dithered")}
    assert config(codec="auto").settled("float64").adapter_codec == "float32"
    assert config(codec="int4", adapter_codec="float32").settled("float32").adapter_codec == "float32"
    with pytest.raises(ConfigError, match="adapter-codec dithered is for runs in float32; in float64"):
        config(adapter_codec="dithered", dtype="float64")
    recorded = dataclasses.asdict(config(codec="int8"))
    del recorded["adapter_codec"]
    assert ServerConfig(**resumed({"run_dir": "r"}, recorded)).settled("float32").adapter_codec == "float32"
    with pytest.raises(
        ConfigError, match="r holds a run with adapter-codec float32; it cannot go on with adapter-codec dithered"
    ):
        resumed({"run_dir": "r", "adapter_codec": "dithered"}, recorded)


@pytest.mark.parametrize("name", sorted(NOISE))
def test_noise_is_of_the_run(name: str) -> None:
    flag = name.replace("_", "-")
    with pytest.raises(ConfigError, match=f"^r holds a run with {flag} .*; it cannot go on with {flag} "):
        going_on({}, **{name: OTHER_VALUES[name]})


# Labels and noise


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_noise": 0.5}, "activation-noise 0.5 is a multiple of activation-clip, which is not given"),
        ({"labels": "device", "gradient_noise": 0.5}, "gradient-noise 0.5 is a multiple of gradient-clip, which is not given"),
        ({"gradient_noise": 0.5, "gradient_clip": 1.0}, "gradient-noise needs labels device: "),
        ({"gradient_clip": 1.0}, "gradient-clip needs labels device: "),
        ({"label_rows": "hidden"}, "label-rows hidden needs labels device: "),
        ({"label_rows": "hidden", "labels": "device"}, "label-rows hidden needs gradient-noise: "),
        (
            {"activation_noise": 0.5, "activation_clip": 1.0, "codec": "delta"},
            "activation-noise 0.5 does not go with codec delta",
        ),
        ({"labels": "device", "check_codec_every": 5}, "check-codec-every must be 0 where labels stay on the device, got 5"),
        ({"activation_clip": -1.0}, "activation-clip must be 0 to 10000, got -1.0"),
        ({"noise_delta": 0.0}, "noise-delta must be 1e-30 to 0.999, got 0.0"),
        ({"noise_delta": 1.0}, "noise-delta must be 1e-30 to 0.999, got 1.0"),
        ({"labels": "nobody"}, "labels must be one of server, device; got 'nobody'"),
    ],
)
def test_noise_and_labels_that_do_not_go_together_are_refused_before_a_model_is_loaded(
    options: dict[str, Any], message: str
) -> None:
    assert refused(**options).startswith(message)


def test_codec_is_checked_where_the_server_has_a_loss() -> None:
    assert config().settled("float32").check_codec_every == 100
    assert config(labels="device").settled("float32").check_codec_every == 0
    assert config(check_codec_every=7).settled("float32").check_codec_every == 7


def test_residual_stream_is_in_bfloat16_only_where_the_weights_are_and_stays_what_it_was() -> None:
    assert config(residual="bfloat16").settled("bfloat16").residual == "bfloat16"
    for dtype in ("float32", "float64"):
        with pytest.raises(ConfigError, match=f"^residual bfloat16 needs dtype bfloat16, and the run has {dtype}: leave "):
            config(residual="bfloat16").settled(dtype)
        assert config().settled(dtype).residual == "float32"
    with pytest.raises(ConfigError, match="holds a run with residual float32; it cannot go on with residual bfloat16"):
        going_on({}, residual="bfloat16")
    assert refused(residual="float16") == "residual must be one of float32, bfloat16; got 'float16'"


def going_on(before: dict[str, Any], **given: Any) -> dict[str, Any]:
    return resumed({"run_dir": "r", **given}, {**dataclasses.asdict(config()), **before})


def test_run_of_a_constant_rate_may_become_longer_and_no_other_and_none_shorter() -> None:
    assert going_on({}, steps=11)["steps"] == 11
    with pytest.raises(ConfigError, match=r"^r holds a run of 10 steps, which cannot be made shorter; leave --steps out$"):
        going_on({}, steps=9)
    longer = r"learning rate depends on their number \(.*{}.*\), so it cannot be made longer; .*--init-adapter r/"
    for name, value in (("lr_schedule", "linear"), ("lr_schedule", "cosine"), ("warmup_ratio", 0.1)):
        with pytest.raises(ConfigError, match=longer.format(f"{name.replace('_', '-')} {value}")):
            going_on({name: value}, steps=11)
    with pytest.raises(ConfigError, match=r"^r holds a run with no steps; it cannot go on with steps 11. Leave --steps out, "):
        going_on({"steps": None, "epochs": 3}, steps=11)


@pytest.mark.parametrize("name", ["lr", "lora_alpha", "lora_dropout", "weight_decay"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-4])
def test_what_is_no_number_of_a_setting_is_within_no_bounds(name: str, value: float) -> None:
    assert refused(**{name: value}).endswith(f", got {value}")


@pytest.mark.parametrize("value", [-1, 65536])
def test_port_is_a_port(value: int) -> None:
    assert refused(port=value) == f"port must be a port, 0 to 65535, got {value}"


@pytest.mark.parametrize(
    "options", [{"port": 0}, {"seed": 0}, {"weight_decay": 0.0}, {"warmup_steps": 0}, {"clients": 1}, {"port": 65535}]
)
def test_ends_of_ranges_are_in_them(options: dict[str, Any]) -> None:
    assert config(**options)


def test_run_has_steps_or_epochs() -> None:
    assert refused(steps=None) == "give either steps or epochs"


def test_run_has_not_both_steps_and_epochs() -> None:
    assert refused(epochs=1) == "give steps or epochs, not both"


@pytest.mark.parametrize("name", ["model", "run_dir"])
def test_missing_setting_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name.replace('_', '-')} is missing: "):
        ServerConfig.from_options({key: value for key, value in REQUIRED.items() if key != name})


# Types and choices


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("cut_layer", True, "a whole number"),
        ("cut_layer", 3.0, "a whole number"),
        ("cut_layer", "3", "a whole number"),
        ("steps", True, "a whole number"),
        ("steps", [1], "a whole number"),
        ("lr", "2e-4", "a number"),
        ("lr", True, "a number"),
        ("lora_alpha", None, "a number"),
        ("model", 3, "a text"),
        ("host", ["127.0.0.1"], "a text"),
        ("init_adapter", False, "a text"),
        ("lora_targets", 3, "a list of names"),
        ("lora_targets", ["c_attn", 3], "a list of names"),
    ],
)
def test_value_of_another_type_is_refused(name: str, value: Any, wanted: str) -> None:
    assert refused(**{name: value}) == f"{name.replace('_', '-')} must be {wanted}, got {value!r}"


def test_unknown_or_contradictory_reports_are_refused() -> None:
    assert refused(report_to="tensorbord") == "report-to must be one of tensorboard, none; got 'tensorbord'"
    assert refused(report_to="none,tensorboard").startswith("report-to must be none alone, or others, got ")
    assert config(report_to="tensorboard").report_to == ("tensorboard",)


def test_whole_number_will_do_for_a_number() -> None:
    assert config(lora_alpha=32) == config(lora_alpha=32.0)


def test_number_beyond_all_floats_is_refused() -> None:
    assert refused(lr=10**400) == "lr must be 1e-30 to 1e+30, got inf"


@pytest.mark.parametrize("value", ["c_attn,c_fc", "c_attn, c_fc", ["c_attn", "c_fc"], ("c_attn", "c_fc")])
def test_targets_are_a_list_or_a_text_with_commas(value: Any) -> None:
    assert config(lora_targets=value).lora_targets == ("c_attn", "c_fc")


@pytest.mark.parametrize(
    ("name", "choices"),
    [("lr_schedule", "constant, linear, cosine"), ("device", "auto, cpu, cuda"), ("dtype", "auto, float32, bfloat16")],
)
def test_value_beside_the_choices_is_refused_with_the_choices(name: str, choices: str) -> None:
    assert refused(**{name: "other"}) == f"{name.replace('_', '-')} must be one of {choices}; got 'other'"


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("lora_rnak", "lora-rank"), ("client", "clients"), ("stepz", "steps"), ("cut", "cut-layer"), ("Seed", "seed")],
)
def test_unknown_setting_is_named_with_the_nearest_known_one(given: str, nearest: str) -> None:
    assert refused(**{given: 1}) == f"unknown setting {given!r}; the nearest known one is {nearest!r}"


def test_setting_that_is_like_no_other_is_named_all_the_same() -> None:
    assert refused(xyz=1).startswith("unknown setting 'xyz'; the nearest known one is ")


# TOML


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_toml_keys_may_have_dashes_or_underscores(tmp_path: Path) -> None:
    path = toml(tmp_path, 'model = "gpt2"\nrun-dir = "a"\ncut_layer = 2\nlora-targets = ["c_fc"]\nlr = 1e-3\nsteps = 5\n')
    expected = ServerConfig(model="gpt2", run_dir="a", cut_layer=2, lora_targets=("c_fc",), lr=1e-3, steps=5)
    assert ServerConfig.from_options(options_from_toml(path)) == expected


@pytest.mark.parametrize("content", ["steps = \n", "steps", "a = 1\na = 2\n", "\x00"])
def test_broken_toml_is_named(tmp_path: Path, content: str) -> None:
    path = toml(tmp_path, content)
    with pytest.raises(ConfigError, match="is not TOML: ") as caught:
        options_from_toml(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_setting_that_toml_gives_in_both_spellings_is_refused(tmp_path: Path) -> None:
    path = toml(tmp_path, 'lora_targets = "c_attn"\nlora-targets = "c_fc"\n')
    with pytest.raises(ConfigError, match=r"gives both lora_targets and lora-targets, which are the same setting"):
        options_from_toml(path)


def test_toml_of_other_bytes_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML: "):
        options_from_toml(path)


def test_toml_of_brackets_without_end_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("x = " + "[" * 100_000)
    with pytest.raises(ConfigError, match=r"run.toml is not TOML: "):
        options_from_toml(path)


def test_missing_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read: No such file or directory"):
        options_from_toml(tmp_path / "none.toml")


def built(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> ServerConfig:
    """The configuration a command line comes to; nothing is served."""

    class Told(Exception):
        pass

    def told(**options: Any) -> None:
        raise Told(options)

    monkeypatch.setattr("gpu_server.sdk.GpuServer", told)
    options = gpu_server.cli.build_parser().parse_args(["serve", *arguments])
    with pytest.raises(Told) as caught:
        options.run(options)
    return ServerConfig.from_options(caught.value.args[0])


def test_flags_override_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = toml(tmp_path, 'model = "gpt2"\nrun-dir = "a"\nsteps = 5\nlr = 1e-3\nseed = 4\n')
    told = built(monkeypatch, "--config", str(path), "--lr", "1e-2", "--run-dir", "b", "--seed", "0")
    assert (told.model, told.run_dir, told.steps, told.lr, told.seed) == ("gpt2", "b", 5, 1e-2, 0)


def test_without_flag_and_file_the_defaults_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    told = built(monkeypatch, "--model", "gpt2", "--run-dir", "a", "--steps", "1")
    assert told == ServerConfig(model="gpt2", run_dir="a", steps=1)


OTHER_VALUES: dict[str, Any] = {
    "model": "m",
    "run_dir": "r",
    "cut_layer": 5,
    "lora_rank": 4,
    "lora_alpha": 16.5,
    "lora_dropout": 0.1,
    "lora_rslora": True,
    "lora_targets": ("c_attn", "c_proj"),
    "clients": 7,
    "steps": 9,
    "epochs": 2,
    "micro_batches": 4,
    "aggregate_every": 3,
    "lr": 5e-4,
    "lr_schedule": "linear",
    "warmup_steps": 8,
    "warmup_ratio": 0.25,
    "max_grad_norm": 0.5,
    "label_smoothing": 0.125,
    "early_stopping_patience": 2,
    "early_stopping_threshold": 0.125,
    "final_adapter": "best",
    "weight_decay": 0.5,
    "seed": 42,
    "init_adapter": "folder",
    "device": "cpu",
    "dtype": "bfloat16",
    "host": "0.0.0.0",
    "port": 1234,
    "edge_weights": "int8",
    "residual": "bfloat16",
    "codec": "int4",
    "adapter_codec": "dithered",
    "edge_adapter": "none",
    "codec_tolerance": 0.05,
    "check_codec_every": 0,
    "cache_bytes": 1000,
    "report_to": ("tensorboard",),
    "labels": "device",
    "label_rows": "hidden",
    "activation_noise": 0.5,
    "activation_clip": 4.5,
    "gradient_noise": 0.25,
    "gradient_clip": 0.5,
    "noise_delta": 1e-7,
    "resume": True,
    "resume_or_start": True,
    "checkpoint_every": 3,
    "quorum": 1,
    "step_deadline": 2.5,
    "linger": 1.5,
    "tls_cert": "c.pem",
    "tls_key": "k.pem",
    "next_tls_cert": "n.pem",
    "insecure": True,
    "shard": True,
    "clients_file": "clients.json",
    "max_batch_tokens": 100,
    "max_connections": 10,
    "max_strangers": 5,
    "max_pages": 3,
    "page": "off",
    "page_token": True,
    "handshake_seconds": 3.5,
    "max_messages_per_second": 7.5,
    "max_queue": 1,
}


NEEDED: dict[str, dict[str, Any]] = {
    "early_stopping_threshold": {"early_stopping_patience": 1},
    "label_rows": {"labels": "device", "gradient_noise": 1.0, "gradient_clip": 1.0},
    "activation_noise": {"activation_clip": 1.0},
    "gradient_noise": {"labels": "device", "gradient_clip": 1.0},
    "gradient_clip": {"labels": "device"},
}
"""What a setting does not go without."""


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_every_setting_is_a_flag(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = OTHER_VALUES[name]
    length = {} if name == "epochs" else {"steps": 1}
    options = {"model": "gpt2", "run_dir": "a", **length, **NEEDED.get(name, {}), name: value}
    arguments = []
    for key, given in options.items():
        arguments.append(f"--{key.replace('_', '-')}")
        if given is not True:
            arguments.append(",".join(given) if isinstance(given, tuple) else str(given))
    assert built(monkeypatch, *arguments) == ServerConfig(**options)


def test_every_setting_has_another_value_in_these_tests() -> None:
    defaults = {item.name: item.default for item in dataclasses.fields(ServerConfig)}
    assert OTHER_VALUES.keys() == defaults.keys()
    assert all(value != defaults[name] for name, value in OTHER_VALUES.items())


# What clients are told


NOT_TOGETHER: dict[str, Any] = {"epochs": None, "warmup_ratio": 0.0, "max_grad_norm": 0.0, "edge_adapter": "lora"}
"""Of settings that do not go with others of OTHER_VALUES: what they are without."""


def test_clients_are_told_the_settings_of_the_run() -> None:
    given = {**OTHER_VALUES, **NOT_TOGETHER}
    told = ServerConfig(**given).settings()
    assert isinstance(told, RunSettings)
    assert told.precision == "float32"
    assert (told.activation_codec, told.gradient_codec) == (codec_named(OTHER_VALUES["codec"]), "dithered")
    for item in dataclasses.fields(RunSettings):
        if item.name not in ("precision", "epochs", "activation_codec", "gradient_codec", "lora_alpha"):
            assert getattr(told, item.name) == given[item.name]
    # Rank-stabilised by the rank 4: alpha / sqrt(4) is what (alpha * sqrt(4)) / 4 is.
    assert told.lora_alpha == 2 * OTHER_VALUES["lora_alpha"]


@pytest.mark.parametrize(
    ("codec", "precision", "told"),
    [
        ("float32", "float32", "exact"),
        ("float32", "float64", "exact"),
        ("auto", "float32", "int8"),
        ("auto", "float64", "exact"),
        *((codec_name(codec), "float32", codec) for codec in CODECS),
    ],
)
def test_codec_is_what_the_operator_says_and_auto_is_what_the_run_allows(codec: str, precision: str, told: str) -> None:
    settings = config(codec=codec, lora_targets="c_attn").settled(precision).settings()
    assert (settings.activation_codec, settings.gradient_codec) == (told, "dithered" if told in ("int8", COARSE) else told)


@pytest.mark.parametrize("codec", LOSSY)
def test_run_in_float64_has_no_codec(codec: str) -> None:
    with pytest.raises(ConfigError, match=f"codec {codec} is for runs in float32"):
        config(codec=codec).settled("float64")


def test_clients_are_not_told_where_things_lie() -> None:
    told = {item.name for item in dataclasses.fields(RunSettings)}
    assert told.isdisjoint({"model", "run_dir", "init_adapter", "host", "port", "device", "dtype"})


# Public flags and names: people and scripts rely on them, so that a change is a decision

TRAINING = {
    *(
        "--batch-size",
        "--data",
        "--device",
        "--dtype",
        "--eval-data",
        "--eval-every",
        "--give-up-after",
        "--help",
        "--log-format",
    ),
    *("--max-length", "--long", "--loss-on", "--model"),
    *("--cache-bytes", "--engine", "--in-flight", "--no-shuffle", "--part-bytes", "--state-dir", "-h"),
    *("--activation-noise", "--gradient-noise", "--labels"),
}
SOURCE = {"--adapter", "--help", "--model", "--output", "--overwrite", "--run-dir", "-h"}
FLAGS = {
    "splitlora-edge": {
        "": {"--help", "-h", "--version"},
        "train": {*TRAINING, "--name", "--server"},
        "join": TRAINING,
        "ping": {"--help", "--server", "-h", "--name", "--state-dir"},
        "generate": {
            *(
                "--adapter",
                "--chat",
                "--help",
                "--max-new-tokens",
                "--precision",
                "--prompt",
                "--raw",
                "--seed",
                "--system",
                "--stream",
                "--temperature",
            ),
            *("--top-p", "-h"),
        },
        "prepare": {"--help", "-h"},
        "preview": {
            *("--help", "-h", "--data", "--model", "--server", "--name", "--state-dir", "--samples"),
            *("--max-length", "--long", "--loss-on"),
        },
        "leak": {
            *("--help", "-h", "--data", "--model", "--adapter", "--cut-layer", "--codec", "--labels", "--label-rows"),
            *("--activation-noise", "--activation-clip", "--gradient-noise", "--gradient-clip", "--noise-delta"),
            *("--batch-size", "--max-length", "--sequences", "--attacker-texts", "--training-steps"),
            *("--seed", "--seeds", "--json", "--output"),
        },
    },
    "splitlora-server": {
        "": {"--help", "-h", "--version"},
        "serve": {"--help", "-h", "--config", "--log-format", *(f"--{name.replace('_', '-')}" for name in OTHER_VALUES)},
        "enrol": {"--help", "-h", "--run-dir", "--clients-file", "--address", "--tls-cert", "--insecure", "--renew"},
        "renew-key": {"--help", "-h", "--run-dir", "--clients-file", "--now", "--force"},
        "revoke": {"--help", "-h", "--run-dir", "--clients-file", "--not-seen-for"},
        "clients": {"--help", "-h", "--run-dir", "--clients-file"},
        "status": {"-h", "--help", "--run-dir", "--json"},
        "report": {"--help", "-h", "--output"},
        "sweep": {"--help", "--output", "-h"},
    },
    "splitlora-export": {
        "": {"--help", "-h", "--version"},
        "onnx": {*SOURCE, "--attention", "--calibration", "--keep-adapter", "--precision", "--split"},
        "merge": SOURCE,
        "verify": {"--adapter", "--help", "-h", "--model", "--prompts", "--run-dir"},
    },
}

NAMES = {
    "edge_client": [
        "Callback",
        *("CertificateChanged", "ConnectionFailed", "DataError", "EdgeClient", "EnrolmentError", "ExportedModelError"),
        *("GenerationError", "Generator", "Refused", "RuntimeMissing", "Sampling", "ServerStatus", "StateError", "Step"),
        "TooMuchDisclosed",
        "ping",
    ],
    "export": ["Agreement", "Disagreement", "ExportError", "export_onnx", "merge", "verify"],
    "gpu_server": [
        *("ConfigError", "GpuServer", "Observer", "RunEndedEarly", "RunStatus", "ServerConfig", "ServerError", "StepRecord"),
    ],
    "protocol": [
        *(
            "CODECS",
            "DELTA",
            "EXACT",
            "HANDING_OVER_BYTES",
            "HANDSHAKE_BYTES",
            "MAX_FRAMES",
            "PIECE_BYTES",
            "PROTOCOL_VERSION",
            "SECONDS_BETWEEN_PINGS",
            "SECONDS_TO_PONG",
            "TRANSITIONS",
        ),
        *(
            "ActivationCache",
            "ActivationGradient",
            "Activations",
            "AdapterGradient",
            "AdapterWeights",
            "Array",
            "AskPart",
            "AskPiece",
        ),
        *("Contribution", "Done"),
        *(
            "EdgeAdapter",
            "Evaluation",
            "EvaluationLoss",
            "EvaluationStates",
            "Failure",
            "Goodbye",
            "HeldOutLoss",
            "Hello",
            "HiddenGradient",
            "HiddenStates",
            "InvalidName",
            "Itinerary",
            "Join",
        ),
        *(
            "LEGS",
            "LabelledBatch",
            "Leg",
            "LocalProtocolError",
            "Message",
            "Noted",
            "Part",
            "PartFile",
            "Piece",
            "Ping",
            "Pong",
            "ProtocolError",
            "RemoteProtocolError",
        ),
        *(
            "QuestionId",
            "Remembered",
            "RunEnd",
            "RunSettings",
            "Seconds",
            "Session",
            "Side",
            "Start",
            "State",
            "Tensors",
            "TrainingDiverged",
            "Welcome",
            "changed_by",
            "changes",
            "check_name",
            "coded_update",
            "compressed_bound",
        ),
        *("decode", "derive_seed", "encode", "gradient_codec", "identity", "kept_since", "largest_message_bytes"),
    ],
    "split_model": [
        *("Adapter", "DTYPES", "DamagedFile", "EdgePart", "LoraConfig", "ModelConfig", "OptimiserConfig", "PretrainedModel"),
        *(
            "ServerPart",
            "Uploads",
            "adamw",
            "adapted_layers",
            "adapter_shapes",
            "check_cut_layer",
            "check_lora_rank",
            "choose_device",
            "choose_dtype",
        ),
        *(
            "continue_greedily",
            "copied_to",
            "cross_entropies",
            "gradient_norm",
            "initial_adapter",
            "load_adapter",
            "clipping_factor",
            "optimiser_state",
            "read_back",
            "read_sealed",
            "restore_optimiser",
            "seal",
        ),
        *("backpropagate", "save_adapter", "summed_cross_entropy", "take_step"),
    ],
    "storage": [
        *(
            "AdapterError",
            "AdapterSettings",
            "CacheFolder",
            "ChatTemplate",
            "EDGE_WEIGHTS",
            "ExportedManifest",
            "FILES_BESIDE_WEIGHTS",
            "Folder",
            "GRAPH_FILES",
            "HEAD_GRAPH_FILES",
            "HEAD_WEIGHTS",
            "Message",
            "ModelError",
            "NamedFiles",
            "PART_FILE",
            "PartDescription",
            "RunDescription",
            "TOKENIZER_FILES",
            "TemplateFailed",
            "encode",
        ),
        *("find_model", "fingerprint", "is_hub_name", "load_tokenizer", "part_that_differs", "remove_unfinished"),
        *("replace_file", "required_files", "shown"),
    ],
    "terminal": [
        *(
            "PackageMissing",
            "Parser",
            "PathError",
            "Progress",
            "Reminders",
            "amount",
            "count",
            "duration",
            "import_onnxruntime",
            "importing",
            "in_words",
            "listed",
            "plain",
            "run_program",
            "show_log",
            "user_path",
        ),
        *("user_text_path", "version", "where_time_went"),
    ],
}


def flags_of(parser: argparse.ArgumentParser) -> dict[str, set[str]]:
    found = {"": {flag for action in parser._actions for flag in action.option_strings}}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                found[name] = flags_of(command)[""]
    return found


@pytest.mark.parametrize("module", [edge_client.cli, export.cli, gpu_server.cli])
def test_flags_are_those_people_know(module: Any) -> None:
    assert flags_of(module.build_parser()) == FLAGS[module.PROGRAM]


@pytest.mark.parametrize("package", NAMES)
def test_public_names_are_those_people_know(package: str) -> None:
    module = importlib.import_module(package)
    assert sorted(module.__all__) == sorted(NAMES[package])
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("package", ["edge_client", "gpu_server"])
def test_package_has_no_attribute_that_is_not_there(package: str) -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        importlib.import_module(package).nothing  # noqa: B018


HEAVY = {"torch", "transformers", "peft", "tokenizers", "websockets", "safetensors", "huggingface_hub", "onnxruntime"}


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("edge_client", ["--help"]),
        ("edge_client", ["train", "--help"]),
        ("edge_client", ["generate", "--help"]),
        ("gpu_server", ["--help"]),
        ("gpu_server", ["serve", "--help"]),
    ],
)
def test_help_loads_nothing_heavy(package: str, arguments: list[str]) -> None:
    script = f"""
import json, sys
from {package}.cli import main
try:
    main({arguments!r})
except SystemExit as ended:
    print(json.dumps([ended.code, sorted(sys.modules)]))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    status, modules = json.loads(ended.stdout.splitlines()[-1])
    assert status == 0
    assert "usage: splitlora-" in ended.stdout
    assert HEAVY.isdisjoint(modules)


@pytest.mark.parametrize("package", ["edge_client", "gpu_server"])
def test_package_runs_as_a_module(package: str) -> None:
    ended = subprocess.run([sys.executable, "-m", package, "--version"], capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("splitlora-")


def test_keyword_arguments_of_the_sdk_are_the_settings_and_are_described() -> None:
    from gpu_server import GpuServer

    _, *given = inspect.signature(GpuServer.__init__).parameters.values()
    settings = dataclasses.fields(ServerConfig)
    assert [(each.name, each.kind, each.default) for each in given] == [
        (item.name, inspect.Parameter.KEYWORD_ONLY, item.default) for item in settings
    ]
    assert get_type_hints(ServerConfig) == {each.name: each.annotation for each in given}
    described = GpuServer.__init__.__doc__ or ""
    assert all(f"    {item.name}" in described and item.metadata["help"] in described for item in settings)
