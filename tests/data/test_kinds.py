"""A kind of `--dataset` is one file: the registry finds it, and everything else asks it."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from peft_pretraining.commands.tokenize import main as tokenize_dataset
from peft_pretraining.config.parse import parse_args
from peft_pretraining.data import sources
from peft_pretraining.data.sources import registry
from peft_pretraining.data.sources.hub import Hub
from peft_pretraining.data.sources.kind import TextKind, TokenKind
from peft_pretraining.data.sources.local import LocalFiles
from peft_pretraining.data.sources.mixture import MixtureKind
from peft_pretraining.errors import UserError
from tests.small_run import CONFIG, SmallRun

LINES = """
from pathlib import Path

from peft_pretraining.data.sources.documents import MemorySource
from peft_pretraining.data.sources.kind import OwnBPE, TextKind


class Lines(TextKind):
    in_words = "a .lines file with a document a line"
    default_tokenizer = OwnBPE("lines-bpe", 300)

    def recognises(self, dataset):
        return dataset.endswith(".lines") and Path(dataset).is_file()

    def open(self, dataset, split, options):
        documents = Path(dataset).read_text().splitlines()
        return MemorySource(dataset, documents[::10] if split == "validation" else documents)


KIND = Lines()
"""
NAMED = """
from peft_pretraining.data.sources.documents import MemorySource
from peft_pretraining.data.sources.kind import OwnBPE, TextKind


class Named(TextKind):
    name = "{name}"
    in_words = "{name} (for a test)"
    default_tokenizer = OwnBPE("{name}-bpe", 300)
    splits = ("train",)

    def open(self, dataset, split, options):
        return MemorySource(dataset, ["one document"])


KIND = Named()
"""
AddModule = Callable[[str, str], None]


@pytest.fixture
def add_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AddModule]:
    """Puts a file into a folder that belongs to the package `sources`."""
    folder = tmp_path / "sources"
    folder.mkdir()
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(folder)])
    monkeypatch.setenv("QGALORE_CACHE", str(tmp_path / "cache"))
    added = []

    def add(name: str, text: str) -> None:
        (folder / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        added.append(f"{sources.__name__}.{name}")

    yield add
    for name in added:
        sys.modules.pop(name, None)


def words(path: Path, lines: int = 300) -> Path:
    path.write_text("".join(f"line {i} of the text, {i % 7} and {i * i % 11} words\n" for i in range(lines)))
    return path


def test_one_file_is_enough_to_train_on_another_kind(tmp_path: Path, add_module: AddModule) -> None:
    small, dataset = SmallRun(tmp_path), words(tmp_path / "text.lines")
    small.config.write_text(json.dumps(CONFIG | {"vocab_size": 300}))
    add_module("lines", LINES)
    result = small.run("run", dataset=dataset, packing="pack", num_training_steps=3)
    assert len(result.losses) == 3 and result.eval_loss > 0
    assert [path.name.startswith("lines-bpe-300-") for path in (tmp_path / "cache").iterdir()] == [True]


def test_another_kind_is_in_the_help_and_in_messages(
    tmp_path: Path, add_module: AddModule, capsys: pytest.CaptureFixture[str]
) -> None:
    def helped() -> str:
        with pytest.raises(SystemExit):
            parse_args(["--help"])
        return " ".join(capsys.readouterr().out.split())

    def refused() -> str:
        with pytest.raises(UserError) as caught:
            config = str(SmallRun(tmp_path).config)
            parse_args(["--model_config", config, "--batch_size", "8", "--max_length", "32", "--dataset", "./nowhere"])
        return str(caught.value)

    before = helped()
    assert (
        f"NAME_OR_PATH {Hub.in_words}, {LocalFiles.in_words}, {MixtureKind.in_words}, pydocs (Python's own "
        "documentation, " in before
    )
    assert "needs no network), a folder written by save_to_disk of datasets, or a file or folder of" in before
    assert "little-endian uint16 or uint32 token ids. (default: c4)" in before
    assert "(default: t5-base; for pydocs a small BPE trained on it once)" in before
    add_module("lines", LINES)
    text = f"{Hub.in_words}, a .lines file with a document a line, {LocalFiles.in_words}, several of these with weights"
    assert text in helped() and text not in before
    assert "t5-base; for a .lines file with a document a line a small BPE trained on it once; for pydocs a" in helped()
    add_module("of_a_test", NAMED.format(name="mine"))
    message = refused()
    assert message.startswith("--dataset ./nowhere is neither c4 nor mine nor pydocs nor a file or folder that exists")
    assert f"a .lines file with a document a line, {LocalFiles.in_words}, several of these with weights" in message


def test_another_kind_is_tokenized_by_the_script(
    tmp_path: Path, add_module: AddModule, capsys: pytest.CaptureFixture[str]
) -> None:
    add_module("lines", LINES)
    out = tmp_path / "tokens"
    assert tokenize_dataset(["--dataset", str(words(tmp_path / "text.lines")), "--output_dir", str(out)]) == 0
    assert sorted(path.name for path in out.glob("*.bin")) == ["train.bin", "validation.bin"]
    add_module("of_a_test", NAMED.format(name="mine"))
    assert tokenize_dataset(["--dataset", "mine", "--output_dir", str(out), "--splits", "validation"]) == 2
    assert "--splits validation: --dataset mine has train" in capsys.readouterr().err
    assert tokenize_dataset(["--dataset", str(out), "--output_dir", str(out)]) == 2
    assert "it holds token ids already" in capsys.readouterr().err


def test_kinds_are_asked_in_a_fixed_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def name_of(dataset: object) -> str:
        return type(registry.find_kind(str(dataset))).__module__.rpartition(".")[2]

    monkeypatch.chdir(tmp_path)
    assert [type(kind).__module__.rpartition(".")[2] for kind in registry.kinds()] == [
        "hub", "local", "mixture", "pydocs", "saved", "token_files",
    ]  # fmt: skip
    for name, module in (("c4", "hub"), ("pydocs", "pydocs")):  # a name means that kind, whatever lies there
        (tmp_path / name).mkdir()
        assert name_of(name) == module
    assert name_of(tmp_path / "c4") == "local"
    (tmp_path / "c4" / "c4-train.00000-of-00001.json.gz").touch()
    (tmp_path / "c4" / "train.bin").touch()
    assert name_of(tmp_path / "c4") == "local"  # .bin may be anything
    (tmp_path / "c4" / "train.bin.json").write_text('{"dtype": "uint16"}')
    assert name_of(tmp_path / "c4") == "token_files"
    assert name_of("pydocs:1,c4:2") == "mixture"
    (tmp_path / "unknown").touch()
    assert name_of(tmp_path / "unknown") == "local"  # which says what it is


HUB_NAMES = {
    "https://huggingface.co/datasets/org/name": "org/name",
    "https://huggingface.co/datasets/org/name/tree/main/data?x=1": "org/name",
    "http://www.hf.co/datasets/squad": "squad", "huggingface.co/datasets/squad/viewer": "squad",
    "hf://datasets/org/name@main/data/a.parquet": "org/name",
}  # fmt: skip


@pytest.mark.parametrize(
    ("dataset", "right"),
    [
        *((address, f"is an address of the hub: give the name alone, --dataset {name}") for address, name in
          HUB_NAMES.items()),
        ("https://example.org/a.jsonl.gz", "download it and give the file or folder, or give the name of a data set"),
        ("https://example.org/a?b=*", "nothing is read from https:// during a run"),
        ("s3://bucket/data", "nothing is read from s3://"), ("gs://bucket/*.parquet", "nothing is read from gs://"),
        ("https://huggingface.co/org/model", "nothing is read from https://"),
        ("file:///data/a.jsonl", "is an address: give the path alone, --dataset /data/a.jsonl"),
        ("pydocs:0.5,s3://bucket/data:0.5", "--dataset s3://bucket/data is an address"),
        ("https://example.org/a:0.5", "--dataset https://example.org/a is an address"),
        ("x" * 300, "xxx... (300 characters) cannot be looked up (File name too long): give c4 or another data set"),
        ("x/" * 2500, "... (5000 characters) cannot be looked up (File name too long)"),
        (f"pydocs:1,{'x' * 300}.jsonl:1", "cannot be looked up (File name too long)"),
        ("~nobody-is-called-so/data", "cannot be looked up (Could not determine home directory"),
    ],
)  # fmt: skip
def test_addresses_and_what_no_path_can_be_are_refused_in_a_sentence(dataset: str, right: str) -> None:
    with pytest.raises(UserError) as caught:
        registry.find_kind(dataset)
    assert right in str(caught.value) and str(caught.value).startswith("--dataset ")


def test_a_folder_that_is_called_like_an_address_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("huggingface.co/datasets/org").mkdir(parents=True)
    assert isinstance(registry.find_kind("huggingface.co/datasets/org"), LocalFiles)


def test_what_recognises_its_own_is_asked_before_what_takes_the_rest(tmp_path: Path, add_module: AddModule) -> None:
    dataset = str(words(tmp_path / "text.lines"))
    (tmp_path / "text.lines.json").write_text('{"dtype": "uint16"}')
    assert isinstance(registry.find_kind(dataset), TokenKind)
    add_module("zeilen", LINES)  # after token_files in the alphabet
    assert isinstance(registry.find_kind(dataset), TextKind)


def test_two_kinds_of_one_name_and_what_is_no_kind_are_refused(add_module: AddModule) -> None:
    add_module("of_a_test", NAMED.format(name="c4"))
    with pytest.raises(ValueError, match=r"two modules of peft_pretraining\.data\.sources define the kind c4"):
        registry.kinds()
    add_module("no_kind", "KIND = 3\n")
    with pytest.raises(TypeError, match=r"KIND of peft_pretraining\.data\.sources\.no_kind is no DatasetKind"):
        registry.kinds()
