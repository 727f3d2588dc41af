"""The files of a stranger's folder: no link leads out of it, and what cannot be read is one sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.cli import main as export_main
from storage import Folder, ModelError, NamedFiles, load_tokenizer, shown


def opened(folder: Path) -> Any:
    from split_model import PretrainedModel  # which needs torch, and most of these tests do not

    return PretrainedModel(folder)


class WrongFolder(ValueError):
    pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    (tmp_path / "private").write_text("a private key")
    return tmp_path / "folder"


def test_file_and_link_within_the_folder_are_found(folder: Path) -> None:
    (folder / "real").write_text("content")
    (folder / "link").symlink_to("real")
    files = Folder(folder, WrongFolder)
    assert files.find("real") == folder / "real"
    assert files.read_text("link") == "content"
    assert files.find("other") is None
    assert files.find(".") is None


@pytest.mark.parametrize("target", ["../private", "absolute", "again", "folder/private"])
def test_link_that_leaves_the_folder_is_refused(folder: Path, tmp_path: Path, target: str) -> None:
    name = "link"
    if target == "again":
        (folder / "second").symlink_to("../private")
        (folder / "link").symlink_to("second")
    elif target == "folder/private":
        (folder / "inner").symlink_to("..")
        name = "inner/private"
    else:
        (folder / "link").symlink_to(tmp_path / "private" if target == "absolute" else target)
    with pytest.raises(WrongFolder, match=f"{name} leads out of its folder by a link; replace the link by the file"):
        Folder(folder, WrongFolder).find(name)


def test_link_to_nothing_and_a_circle_of_links_are_no_files(folder: Path) -> None:
    (folder / "nothing").symlink_to("not-there")
    (folder / "circle").symlink_to("circle")
    assert Folder(folder, WrongFolder).find("nothing") is None
    for name in ("nothing", "circle"):
        with pytest.raises(WrongFolder, match=name):
            Folder(folder, WrongFolder).require(name)


@pytest.mark.parametrize("name", ["../private", "/etc/passwd", "a/../../private"])
def test_name_that_leaves_the_folder_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(WrongFolder, match="is outside the folder"):
        Folder(folder, WrongFolder).locate(name)


def in_the_hubs_cache(tmp_path: Path, source: Path) -> Path:
    """A model as huggingface_hub keeps it: a snapshot's files are links to blobs."""
    repository = tmp_path / "hub/models--somebody--tiny"
    snapshot = repository / "snapshots/0123456789abcdef"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        (repository / f"blobs/{number}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_cache_of_the_hub_goes_on_working(tiny_model: Path, tmp_path: Path) -> None:
    snapshot = in_the_hubs_cache(tmp_path, tiny_model)
    assert opened(snapshot).fingerprint() == opened(tiny_model).fingerprint()
    (tmp_path / "named").symlink_to(snapshot)  # the folder itself is the user's own choice
    assert opened(tmp_path / "named").fingerprint() == opened(tiny_model).fingerprint()


def test_cache_of_the_hub_is_no_way_out(tiny_model: Path, tmp_path: Path) -> None:
    snapshot = in_the_hubs_cache(tmp_path, tiny_model)
    (tmp_path / "private").write_text("a private key")
    (snapshot / "vocab.json").symlink_to("../../blobs/key")
    (snapshot / "../../blobs/key").symlink_to(tmp_path / "private")
    with pytest.raises(WrongFolder, match="leads out of its folder"):
        Folder(snapshot, WrongFolder).find("vocab.json")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "merges.txt", "chat_template.jinja"])
def test_export_copies_nothing_through_a_link(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes((model / name).read_bytes() if (model / name).exists() else b"a private key")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(outside)
    assert export_main(["merge", "--model", str(model), "--output", str(tmp_path / "out")]) == 1
    assert f"{name} leads out of its folder by a link" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_byte_order_mark_is_no_part_of_a_file(folder: Path) -> None:
    (folder / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert Folder(folder, WrongFolder).read_json("a.json") == {"a": 1}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "a.json cannot be read: "),
        (b"\xff\xfe{}", "a.json is not UTF-8: byte 0xff at 0"),
        (b"[1]", r"a.json is not a JSON object but \[1\]"),
        (b"[" * 200_000, "a.json cannot be read: its JSON is nested too deeply"),
        (b'{"a":' * 200_000, "a.json cannot be read: its JSON is nested too deeply"),
        (b"9" * 5000, "a.json cannot be read: "),
        (b'{"a": "\\uD800"}', "a.json has half a character"),
    ],
)
def test_what_is_no_json_object_is_one_sentence(folder: Path, content: bytes, reason: str) -> None:
    (folder / "a.json").write_bytes(content)
    with pytest.raises(WrongFolder, match=reason) as refused:
        Folder(folder, WrongFolder).read_json("a.json")
    assert "\n" not in str(refused.value)


def test_values_are_shown_as_they_stand_in_the_file() -> None:
    assert [shown(value) for value in (None, True, "a", 1.5)] == ["null", "true", '"a"', "1.5"]
    assert len(shown("x" * 1000)) == 60
    assert shown(object()) == "object"


@pytest.mark.parametrize("read", [opened, lambda folder: opened(folder).tokenizer()])
def test_model_whose_files_begin_with_a_byte_order_mark_is_the_same(
    model: Path, tiny_model: Path, read: Callable[[Path], object]
) -> None:
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_bytes(b"\xef\xbb\xbf" + (model / name).read_bytes())
    read(model)
    assert opened(model).fingerprint() == opened(tiny_model).fingerprint()


def test_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model folder at"):
        opened(tmp_path / "nothing")


def test_files_that_lie_elsewhere_are_read_by_the_names_they_are_meant_by(tiny_model: Path, tmp_path: Path) -> None:
    moved = tmp_path / "0123"
    moved.write_bytes((tiny_model / "tokenizer.json").read_bytes())
    files = NamedFiles({"tokenizer.json": moved, "gone.json": tmp_path / "gone"}, ModelError, "the part")
    assert load_tokenizer(files).to_str() == opened(tiny_model).tokenizer().to_str()
    for name in ("gone.json", "other.json", "0123", f"{tmp_path}/0123"):
        assert files.find(name) is None
    with pytest.raises(ModelError, match=r"the part/other\.json is missing"):
        files.require("other.json")
