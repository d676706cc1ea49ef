"""An export has its run's tokenizer: bos and eos as trained, no id beyond the embedding, readable by others."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from peft_pretraining.after_training.exported_tokenizer import write_tokenizer
from peft_pretraining.commands import export as export_command
from peft_pretraining.data.tokenizer import Added, Tokenizer
from peft_pretraining.data.tokenizers.encoders import PROBES
from peft_pretraining.data.tokenizers.files import named_tokenizer
from peft_pretraining.errors import UserError
from tests.data.small_tokenizers import TEXTS, byte_level, write_model, write_unigram_json
from tests.small_run import SmallRun, write_text

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """With a run `text`, of documents that end with eos."""
    small = SmallRun(tmp_path_factory.mktemp("exported"))
    small.run("text", num_training_steps=1, **write_text(small.folder / "c4"))
    return small


def export(small: SmallRun, output: Path, *flags: str) -> None:
    assert export_command.main([str(small.folder / "text"), str(output), "--dtype", "float32", *flags]) == 0


def test_the_three_lines_load_and_generate(
    small: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    export(small, Path("out"))
    lines = capsys.readouterr().out.split("\n\n")[1]
    assert len(lines.splitlines()) == 3
    # The small vocabulary has no "The".
    exec(lines.replace('tokenizer("The"', 'tokenizer("w0 w7"'), {})
    printed = capsys.readouterr().out.split()
    assert printed[:2] == ["w0", "w7"] and 2 < len(printed) <= 52


def test_files_and_ids_are_those_of_the_run(small: SmallRun, tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        export(small, tmp_path / "out")
    finally:
        os.umask(umask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys(
        ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"), 0o640
    )
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    ids = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == ids
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == config | ids
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.model_max_length == 64 and len(tokenizer) <= config["vocab_size"]
    assert tokenizer("w0 w7").input_ids == [3, 10]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (1, 0)


def test_a_run_without_its_tokenizer(small: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(small, tmp_path / "alone", "--no-tokenizer")
    assert sorted(path.name for path in (tmp_path / "alone").iterdir()) == ["config.json", "model.safetensors"]
    export(small, tmp_path / "given", "--tokenizer", str(small.folder / "c4"))
    assert (tmp_path / "given" / "tokenizer.json").is_file()
    capsys.readouterr()
    both = [str(small.folder / "text"), str(tmp_path / "out"), "--no-tokenizer", "--tokenizer", "t5-base"]
    assert export_command.main(both) == 2
    assert "--tokenizer t5-base and --no-tokenizer exclude each other" in capsys.readouterr().err
    assert export_command.main([str(tmp_path / "given"), str(tmp_path / "out")]) == 2
    assert "is an exported model already" in capsys.readouterr().err


def exported(tokenizer: Tokenizer, folder: Path, rows: int = 1000) -> tuple[Any, list[str]]:
    folder.mkdir()
    notes = write_tokenizer(tokenizer, folder, rows, 128)
    return transformers.AutoTokenizer.from_pretrained(folder), notes


@pytest.mark.parametrize("bos", [False, True])
def test_a_prompt_begins_with_bos_as_documents_do_and_never_ends_with_eos(tmp_path: Path, bos: bool) -> None:
    backend = byte_level(["<pad>", "</s>", "<s>"], begins_with="" if bos else "<s>")  # the run has decided otherwise
    backend.save(str(tmp_path / "tokenizer.json"))
    read = named_tokenizer(str(tmp_path / "tokenizer.json"), Added(bos=bos))
    tokenizer, notes = exported(read, tmp_path / "out")
    assert not notes
    for text in [*PROBES, *TEXTS[::40]]:
        assert tokenizer(text).input_ids == [2] * bos + read.encode([text])[0]
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    again = named_tokenizer(str(tmp_path / "out"))
    assert again.bos_token_id == (2 if bos else None) and again.eos_token_id == 1


def test_a_template_with_eos_is_replaced_and_ids_beyond_the_embedding_left_out(tmp_path: Path) -> None:
    """As T5's tokenizer, which is that of the paper: it ends each text, and lists 100 ids more than there are rows."""
    from tokenizers import processors

    model = write_model(tmp_path / "both", "unigram", "spiece.model")
    path = tmp_path / "both" / "tokenizer.json"
    write_unigram_json(model, path)
    backend = Backend.from_file(str(path))
    backend.add_special_tokens([AddedToken("<extra_id_1>", special=True)])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    backend.save(str(path))
    assert backend.encode("fox").ids[-1] == 1
    read = named_tokenizer(str(tmp_path / "both"))
    rows = read.vocab_size
    tokenizer, notes = exported(read, tmp_path / "out", rows)
    assert notes[0].startswith(
        f"the tokenizer's special tokens with ids {rows} to {rows + 1} (<extra_id_0> to <extra_id_1>) are left out"
    )
    assert len(tokenizer) == rows
    for text in ["The quick fox", *TEXTS[::40]]:
        assert tokenizer(text).input_ids == read.encode([text])[0]
    with pytest.raises(
        UserError, match=rf"--tokenizer yields ids up to {rows - 1}, but .* has a vocabulary of {rows - 1}"
    ):
        exported(read, tmp_path / "small", rows - 1)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_sentencepiece_model_is_converted(tmp_path: Path, kind: str) -> None:
    read = named_tokenizer(str(write_model(tmp_path, kind, "tokenizer.model")))
    tokenizer, _ = exported(read, tmp_path / "out")
    before = [1] if kind == "bpe" else []
    for text in TEXTS[::20]:
        assert tokenizer(text).input_ids == before + read.encode([text])[0]
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_the_tokenizer_of_the_paper(shared_data: Path, tmp_path: Path) -> None:
    read = named_tokenizer(str(shared_data / "tokenizers" / "t5"))
    tokenizer, notes = exported(read, tmp_path / "out", 32_000)
    assert len(notes) == 1 and "ids 32000 to 32099 (<extra_id_99> to <extra_id_0>) are left out" in notes[0]
    assert len(tokenizer) == 32_000
    assert tokenizer("The quick brown fox").input_ids == read.encode(["The quick brown fox"])[0]
