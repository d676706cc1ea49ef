"""Token ids from files: every window once an epoch, types by sidecar or suffix, and what the script writes."""

import itertools
import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peft_pretraining.commands import tokenize as script
from peft_pretraining.commands.tokenize import Counted
from peft_pretraining.commands.tokenize import main as tokenize_dataset
from peft_pretraining.data.eval_set import build_eval_set, read_documents
from peft_pretraining.data.held_out import open_split
from peft_pretraining.data.order import DamageCount
from peft_pretraining.data.sources.kind import SourceOptions
from peft_pretraining.data.sources.local import LocalFiles
from peft_pretraining.data.sources.mapped_tokens import TokenFiles, TokenMixture
from peft_pretraining.data.sources.registry import find_kind
from peft_pretraining.data.sources.token_files import KIND, open_token_files
from peft_pretraining.data.tokenizer import Added, Tokenizer, load_tokenizer
from peft_pretraining.data.train_loader import merge_states
from peft_pretraining.errors import UserError
from tests.data.collect import close, global_rows, loaders
from tests.data.conftest import document
from tests.data.files import write_texts
from tests.data.hub_server import DatasetHub, HubRepository, point_at
from tests.data.small_tokenizers import byte_level, write_model

LENGTH = 8


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """Three train files of 50, 3 and 70 windows with some ids to spare, the ids counting up; and validation."""
    counts = np.arange(2000, dtype=np.uint32)
    for name, start, stop in (
        ("train-0", 0, 405),
        ("train-1", 405, 429),
        ("train-2", 429, 990),
        ("validation", 1000, 1101),
    ):
        counts[start:stop].astype("<u4").tofile(tmp_path / f"{name}.uint32")
    return tmp_path


def run(dataset: Path, updates: int, world_size: int = 1, state: Any = None, **arguments: Any) -> Any:
    arguments = {"max_length": LENGTH, "tokenizer": None} | arguments
    ranks = loaders(world_size, dataset=str(dataset), **arguments)
    for loader in ranks:
        if state:
            loader.load_state_dict(state)
    rows = torch.cat(global_rows(ranks, updates))
    state = json.loads(json.dumps(merge_states([loader.state_dict() for loader in ranks])))
    close(ranks)
    return rows, state


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_window_is_read_once_an_epoch(tokens: Path, world_size: int) -> None:
    rows, _ = run(tokens, 46, world_size)  # 123 windows in 8 logical shards of 15 or 16, six epochs
    assert (rows.diff(dim=1) == 1).all()
    windows = {*range(0, 400, LENGTH), *range(405, 429, LENGTH), *range(429, 989, LENGTH)}
    assert set(rows[:, 0].tolist()) == windows
    for logical_shard in range(8):
        own = rows[logical_shard::8, 0].tolist()
        size = len(set(own))
        assert size in (15, 16)
        epochs = [own[i : i + size] for i in range(0, len(own) - size, size)]
        assert all(len(set(numbers)) == size for numbers in epochs)
        assert epochs[0] != epochs[1]


def test_resume_on_other_ranks_and_workers(tokens: Path) -> None:
    whole, _ = run(tokens, 20)
    first, state = run(tokens, 7, 2, workers=0)
    second, state = run(tokens, 6, 1, state)
    third, _ = run(tokens, 7, 4, state, workers=3)
    assert torch.equal(whole, torch.cat([first, second, third]))


def test_types(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    path.write_bytes(np.arange(600, dtype="<u2").tobytes())
    assert find_kind(str(path)) is KIND
    assert find_kind(str(tmp_path)) is KIND
    with pytest.raises(UserError, match=r"type of its ids is unknown.*train.bin.json"):
        open_token_files(str(path), "train")
    (tmp_path / "train.bin.json").write_text('{"dtype": "uint16"}')
    assert open_token_files(str(tmp_path), "train").vocab_size() == 600
    (tmp_path / "train.bin.json").write_text('{"dtype": "uint16", "vocab_size": 32000}')
    assert open_token_files(str(tmp_path), "train").vocab_size() == 32000
    (tmp_path / "train.bin.json").write_text("{")
    with pytest.raises(UserError, match="not a JSON object"):
        open_token_files(str(tmp_path), "train")
    path.write_bytes(b"abc")
    (tmp_path / "train.bin.json").write_text('{"dtype": "uint16"}')
    with pytest.raises(UserError, match="3 bytes are no whole number of uint16"):
        open_token_files(str(tmp_path), "train")
    with pytest.raises(UserError, match="no file validation"):
        open_token_files(str(tmp_path), "validation")


def test_a_single_file_holds_out_its_end_or_uses_the_file_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "my-train.t5.uint16"
    np.arange(5000, dtype="<u2").tofile(path)
    assert open_token_files(str(path), "train").tokens == 4950
    assert open_token_files(str(path), "validation").files[0].ids.tolist() == list(range(4950, 5000))
    np.arange(30, dtype="<u2").tofile(tmp_path / "my-validation.t5.uint16")
    assert open_token_files(str(path), "train").tokens == 5000
    assert open_token_files(str(path), "validation").tokens == 30


def test_too_few_ids(tokens: Path) -> None:
    with pytest.raises(UserError, match=r"--data_lanes 128"):
        run(tokens, 1, data_lanes=128)


def test_validation_windows_and_their_shorter_end(tokens: Path) -> None:
    arguments: dict[str, Any] = {"dataset": str(tokens), "tokenizer": None, "packing": "pack", "max_length": LENGTH}
    batches = dict(build_eval_set(**arguments, eval_batch_size=5, eval_tokens=0))
    labels = torch.cat([batch.labels for batch in batches.values()])
    assert labels[labels >= 0].tolist() == list(range(1000, 1101))
    # 12 rows of 8 ids and one of 5; the first id of each is no target.
    assert [batch.target_tokens for batch in batches.values()] == [35, 35, 7 + 7 + 4]


def test_the_script_writes_what_the_loader_reads(tmp_path: Path, c4_dir: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "tokenizer.json"
    tokenizer.save(file)
    out = tmp_path / "tokens"
    assert tokenize_dataset(["--dataset", str(c4_dir), "--tokenizer", str(file), "--output_dir", str(out)]) == 0
    settings = json.loads((out / "train.bin.json").read_text())
    assert settings["documents"] == 195
    assert settings["dtype"] == "uint16"
    assert settings["vocab_size"] == tokenizer.vocab_size
    assert settings["tokens"] == open_token_files(str(out), "train").tokens
    common: dict[str, Any] = {
        "tokenizer": tokenizer,
        "packing": "pack",
        "max_length": 32,
        "eval_batch_size": 4,
        "eval_tokens": 0,
    }
    from_text = dict(build_eval_set(dataset=str(c4_dir), **common))
    from_ids = dict(build_eval_set(dataset=str(out), **common))
    assert from_text.keys() == from_ids.keys()
    assert all(torch.equal(from_text[k].labels, from_ids[k].labels) for k in from_text)
    capped = ["--dataset", str(c4_dir), "--tokenizer", str(file), "--output_dir", str(out), "--max_tokens", "0.5K"]
    assert tokenize_dataset(capped) == 0
    assert 500 <= open_token_files(str(out), "train").tokens < 550


@pytest.mark.parametrize("encoder", ["tokenizers", "sentencepiece"])
def test_the_script_encodes_in_several_threads_and_writes_in_order(
    tmp_path: Path, c4_dir: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, encoder: str
) -> None:
    monkeypatch.setattr(script, "DOCUMENTS_PER_BATCH", 7)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    tokenizer.save(tmp_path / "tokenizer.json")
    place = tmp_path / "tokenizer.json" if encoder == "tokenizers" else write_model(tmp_path, "unigram", "a.model")
    loaded = load_tokenizer(str(place), "c4")
    assert loaded.encoder == encoder
    whole, threads = Tokenizer.encode_documents, set[str]()

    def encode_documents(self: Tokenizer, texts: list[str]) -> list[list[int]]:
        threads.add(threading.current_thread().name.rpartition("_")[2])
        time.sleep(0.005 if threading.current_thread().name.endswith("_0") else 0)  # the first of them is the slowest
        return whole(self, texts)

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_documents", encode_documents)
        words = f"--dataset {c4_dir} --tokenizer {place} --output_dir {tmp_path}/out"
        assert tokenize_dataset(words.split()) == 0
    assert len(threads) == 1 if encoder == "tokenizers" else len(threads) > 1
    for split, count in (("train", 195), ("validation", 30)):
        source = open_split(str(c4_dir), split)
        assert not isinstance(source, TokenFiles | TokenMixture)
        texts = list(read_documents(source, DamageCount(0)))
        ids = open_token_files(str(tmp_path / "out"), split).files[0].ids.tolist()
        assert ids == list(itertools.chain(*loaded.encode_documents(texts))) and len(texts) == count


@pytest.mark.parametrize(
    ("flags", "says"),
    [("--tokenizer /none", "--tokenizer /none: no such file"),
     ("--tokenizer train:9", "--tokenizer train:9: give the number of pieces"),
     ("--max_tokens many", "--max_tokens is 'many', it must be a number with an optional suffix"),
     ("--damaged_limit -1", "--damaged_limit is -1, it must be at least 0 (places)"),
     ("--text_unit word", "--text_unit is 'word', it must be one of line, paragraph, file"),
     ("--dataset ~no-such-user/text", "--dataset is '~no-such-user/text', a path whose ~no-such-user is the folder"),
     ("--dataset_config x --splits train test", "--splits test: --dataset")],
)  # fmt: skip
def test_the_script_refuses_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, says: str
) -> None:
    out = tmp_path / "out"
    assert tokenize_dataset(["--dataset", str(tmp_path), "--output_dir", str(out), *flags.split()]) == 2
    assert says in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("error", [UserError("too many damaged places"), KeyboardInterrupt()])
def test_the_script_leaves_no_partial_file(
    tmp_path: Path, c4_dir: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def some_documents(source: Counted, damage: DamageCount) -> Iterator[str]:
        yield from itertools.islice(read_documents(source, damage), 10)
        raise error

    monkeypatch.setattr(script, "DOCUMENTS_PER_BATCH", 2)
    monkeypatch.setattr(script, "read_documents", some_documents)
    tokenizer.save(tmp_path / "tokenizer.json")
    flags = f"--dataset {c4_dir} --tokenizer {tmp_path}/tokenizer.json --output_dir {tmp_path}/out --splits train"
    with suppress(KeyboardInterrupt):
        assert tokenize_dataset(flags.split()) == 2
    assert not [*(tmp_path / "out").glob("train*")]


def test_the_script_says_that_the_weights_of_a_mixture_are_not_in_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        write_texts(tmp_path / f"{name}.txt", [document(number) for number in range(80)])
    (tmp_path / "b.txt").write_text((tmp_path / "b.txt").read_text().replace("0", "zero"))
    mixed = f"{tmp_path}/a.txt:0.7,{tmp_path}/b.txt:0.3"
    common = ["--tokenizer", "train:300", "--output_dir", str(tmp_path / "out"), "--dataset"]
    assert tokenize_dataset([*common, mixed]) == 0
    said = capsys.readouterr().out
    assert f"warning: --dataset {mixed}: the documents of its parts are written one part after another" in said
    assert "give the run --dataset a_tokens:0.7,b_tokens:0.3" in said
    assert tokenize_dataset([*common, f"{tmp_path}/a.txt"]) == 0
    assert "warning" not in capsys.readouterr().out


def test_the_script_says_what_it_added(
    tmp_path: Path, c4_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QGALORE_CACHE", str(tmp_path / "cache"))
    backend = byte_level(["<pad>", "</s>", "<|begin|>"], begins_with="<|begin|>")
    backend.save(str(tmp_path / "tokenizer.json"))
    common = f"--dataset {c4_dir} --splits validation --output_dir {tmp_path}/out --tokenizer"
    for flags, bos, eos in (
        (f"{tmp_path}/tokenizer.json", 2, 1),
        (f"{tmp_path}/tokenizer.json --no-add_eos", 2, None),
        ("train:400 --no-add_bos", None, 1),
        ("train:400 --no-add_eos", None, None),
    ):
        assert tokenize_dataset([*common.split(), *flags.split()]) == 0
        settings = json.loads((tmp_path / "out" / "validation.bin.json").read_text())
        assert (settings["bos_token_id"], settings["eos_token_id"]) == (bos, eos)
        assert settings["dataset"] == str(c4_dir)
        ids = open_token_files(str(tmp_path / "out"), "validation").files[0].ids
        assert (ids == 2).sum() == (30 if bos else 0) and (ids == 1).sum() == (30 if eos else 0)
        assert (ids[0] == 2) == bool(bos) and (ids[-1] == 1) == bool(eos)
    said = capsys.readouterr().out
    assert "<|begin|> begins each document and </s> ends each document" in said and "nothing is added" in said
    kept = load_tokenizer(str(tmp_path / "out" / "tokenizer"), "c4", added=Added(eos=False))
    assert kept.resume_as(settings["tokenizer_fingerprint"])


def test_all_splits_of_the_hub_are_of_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, numbers in (("train", range(70)), ("validation", range(70, 80))):
        write_texts(tmp_path / "repository" / f"{split}.jsonl", [document(i) for i in numbers])
    repository = HubRepository(tmp_path / "repository")
    hub = DatasetHub({"org/name": repository})
    point_at(hub, tmp_path / "hub_cache", monkeypatch)
    byte_level(["</s>"]).save(str(tmp_path / "tokenizer.json"))
    words = f"--dataset org/name --tokenizer {tmp_path}/tokenizer.json --output_dir {tmp_path}/out"
    seen: list[str] = []
    whole = script.open_split
    monkeypatch.setattr(script, "open_split", lambda *a: (seen.append(a[2].revision), whole(*a))[1])
    assert tokenize_dataset(words.split()) == 0
    hub.close()
    commit = repository.refs()["main"][0]
    assert seen == [commit, commit]
    for split, count in (("train", 70), ("validation", 10)):
        settings = json.loads((tmp_path / "out" / f"{split}.bin.json").read_text())
        assert (settings["dataset_revision"], settings["documents"]) == (commit, count)


def test_the_time_left_is_known_from_the_first_documents_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the bytes of the files; with --max_tokens from the beginning."""
    texts = [[f"{'long ' * 60}{shard} {i}" for i in range(100 * (shard + 1))] for shard in range(3)]
    for shard, documents in enumerate(texts):
        write_texts(tmp_path / "text" / f"train-{shard}.jsonl", documents)
    totals: list[int | None] = []

    @contextmanager
    def progress(what: str, unit: str, total: int | None = None) -> Iterator[Any]:
        totals.append(total)
        yield lambda done, total=None: totals.append(total)

    monkeypatch.setattr(script, "progress", progress)
    monkeypatch.setattr(script, "DOCUMENTS_PER_BATCH", 50)
    byte_level(["</s>"]).save(str(tmp_path / "tokenizer.json"))
    words = f"--dataset {tmp_path}/text --tokenizer {tmp_path}/tokenizer.json --output_dir {tmp_path} --splits train"
    assert tokenize_dataset(words.split()) == 0
    tokens = open_token_files(str(tmp_path), "train").tokens
    assert totals[0] is None and len(totals) == 12 and totals[-1] == tokens  # 540 documents in 11 batches
    assert all(total == pytest.approx(tokens, rel=0.3) for total in totals[1:])  # in the first file by its text
    assert totals[-2] == pytest.approx(tokens, rel=0.2)
    totals.clear()
    assert tokenize_dataset([*words.split(), "--max_tokens", "20K"]) == 0
    assert set(totals) == {20_000}


def test_text_is_not_taken_for_token_ids(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def kind() -> str:
        return type(find_kind(str(tmp_path))).__name__

    for name in ("training_args.bin", "train.npy", "model.bin"):
        (tmp_path / name).write_bytes(b"abcd")
    assert kind() == "LocalFiles"
    (tmp_path / "train.bin").write_bytes(b"abcd")
    assert kind() == "TokenFilesKind"  # which says what is missing
    (tmp_path / "notes.jsonl").write_text('{"text": "a"}\n')
    assert kind() == "LocalFiles"
    (tmp_path / "train.bin.json").write_text('{"dtype": "uint16"}')
    assert kind() == "TokenFilesKind"
    for _ in range(2):
        files = open_token_files(str(tmp_path), "train").files
        assert [file.path.name for file in files] == ["train.bin"]
    said = f"--dataset {tmp_path}: its token ids are read, and its text, such as notes.jsonl, is left out"
    assert caplog.text.count(said) == 1


def test_names_that_token_files_should_have(tmp_path: Path) -> None:
    for name in ("a.uint16", "b.uint16", ".c.uint16", "d.bin"):
        (tmp_path / name).write_bytes(b"abcd")
    assert find_kind(str(tmp_path)) is KIND
    with pytest.raises(
        UserError, match=r"no file train\* with .*, but a.uint16, b.uint16: name the files to train on tr"
    ):
        open_token_files(str(tmp_path), "train")
    (tmp_path / "a.txt").write_text("a text\n")
    assert isinstance(find_kind(str(tmp_path)), LocalFiles)


@pytest.mark.parametrize("name", ["notes.txt", "train.json.gz", "data.parquet"])
def test_only_token_files_are_recognised(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"abcd" * 100)
    assert not KIND.recognises(str(tmp_path / name)) and not KIND.recognises(str(tmp_path))
    for content in ("[]", "{", '{"dtype": 3}', "{}"):
        (tmp_path / f"{name}.json").write_text(content)
        assert not KIND.recognises(str(tmp_path / name))
    (tmp_path / f"{name}.json").write_text('{"dtype": "uint16"}')
    assert KIND.recognises(str(tmp_path / name))


@pytest.mark.parametrize(
    ("sidecar", "message"),
    [('{"dtype": "uint16", "tokens": 601}', r"holds 600 ids of uint16, but train.bin.json says 601: it is cut off"),
     ('{"dtype": "uint16", "tokens": 599}', "says 599: it is longer"),
     ('{"dtype": "uint32", "tokens": 600}', "holds 300 ids of uint32.*says 600: it is cut off, of another type"),
     ('{"dtype": "uint16", "vocab_size": 128256}', "uint16, which cannot hold a vocabulary of 128256"),
     ('{"dtype": "int64"}', "train.bin.json says that its ids are of the type 'int64', they must be uint16 or uint32"),
     ('{"dtype": "uint16", "vocab_size": "many"}', "vocab_size 'many', which must be a positive whole number"),
     ("[1]", "is not a JSON object, but a list")],
)  # fmt: skip
def test_a_sidecar_that_cannot_be_right_is_refused(tmp_path: Path, sidecar: str, message: str) -> None:
    (tmp_path / "train.bin").write_bytes(np.arange(600, dtype="<u2").tobytes())
    (tmp_path / "train.bin.json").write_text(sidecar)
    with pytest.raises(UserError, match=message):
        open_token_files(str(tmp_path), "train")


def test_an_id_beyond_the_vocabulary_is_named_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.arange(4000, dtype="<u2") % 500
    ids[2345] = 600
    for split in ("train", "validation"):
        ids.tofile(tmp_path / f"{split}.bin")
        (tmp_path / f"{split}.bin.json").write_text('{"dtype": "uint16", "vocab_size": 500}')
    message = r"train.bin: the id 600 at index 2345 is beyond the vocabulary of 500 ids"
    with pytest.raises(UserError, match=message):
        loaders(1, dataset=str(tmp_path), tokenizer=None)
    evaluation: dict[str, Any] = {"dataset": str(tmp_path), "tokenizer": None, "packing": "pack", "max_length": LENGTH}
    with pytest.raises(UserError, match=message.replace("train", "validation")):
        build_eval_set(**evaluation, eval_batch_size=4, eval_tokens=0)
    # Further into a file than is looked at before training it is found with its row, and never reaches the model.
    monkeypatch.setattr("peft_pretraining.data.sources.mapped_tokens._CHECKED_IDS", 2000)
    ranks = loaders(1, dataset=str(tmp_path), tokenizer=None, max_length=LENGTH)
    with pytest.raises(UserError, match=message):
        global_rows(ranks, 40)
    close(ranks)
    with pytest.raises(UserError, match=message.replace("train", "validation")):
        list(build_eval_set(**evaluation, eval_batch_size=4, eval_tokens=0))
    (tmp_path / "validation.bin").unlink()
    with pytest.raises(UserError, match="at index 3999"):  # in the part that is held out of a single file
        ids[[2345, 3999]] = 0, 700
        ids.tofile(tmp_path / "train.bin")
        build_eval_set(**{**evaluation, "dataset": str(tmp_path / "train.bin")}, eval_batch_size=4, eval_tokens=0)


def test_ids_of_32_bits_under_the_name_of_16_are_refused(tmp_path: Path) -> None:
    np.arange(1, 4000, dtype="<u4").tofile(tmp_path / "train.uint16")
    with pytest.raises(UserError, match="every second id is 0, so its ids are uint32 and not uint16: correct its name"):
        open_split(str(tmp_path / "train.uint16"), "train")
    (tmp_path / "train.bin.json").write_text('{"dtype": "uint16"}')
    (tmp_path / "train.uint16").rename(tmp_path / "train.bin")
    with pytest.raises(UserError, match=r"every second id is 0.*correct train\.bin\.json"):
        open_split(str(tmp_path / "train.bin"), "train")


def test_the_script_takes_the_options_of_a_data_set(
    tmp_path: Path, c4_dir: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mixture is its parts one after another, and the flags of a run reach its sources."""
    seen: list[SourceOptions] = []
    whole = LocalFiles.open
    monkeypatch.setattr(LocalFiles, "open", lambda *a: (seen.append(a[3]), whole(*a))[1])
    tokenizer.save(tmp_path / "tokenizer.json")
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = "--dataset_config en --text_column text --text_unit file --train_split train --validation_split validation"
    shutil.copytree(c4_dir / "en", tmp_path / "copy")
    words = f"--dataset {c4_dir}:2,{tmp_path}/copy:1 --tokenizer {tmp_path}/tokenizer.json --output_dir ~/out {flags}"
    assert tokenize_dataset(words.split()) == 0
    assert json.loads((tmp_path / "out/train.bin.json").read_text())["documents"] == 2 * 195
    expected = SourceOptions(
        "en", text_column="text", text_unit="file", train_split="train", validation_split="validation"
    )
    assert seen and all(options == expected for options in seen)
