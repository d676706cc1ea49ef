"""`qgalore generate`: the text of a run, a checkpoint and an export, as its tokens come."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch

from peft_pretraining.after_training.trained_model import open_trained
from peft_pretraining.after_training.trained_tokenizer import tokenizer_of
from peft_pretraining.commands import generate as command
from peft_pretraining.commands import main as qgalore
from peft_pretraining.commands.export import export
from peft_pretraining.commands.generate import Generator, Sampling, _Stream
from peft_pretraining.data.tokenizer import Added, Tokenizer
from peft_pretraining.data.tokenizers.files import named_tokenizer
from peft_pretraining.errors import UserError
from tests.data.small_tokenizers import byte_level, write_model
from tests.small_run import SmallRun, flags_of, write_text

transformers = pytest.importorskip("transformers")

Q_GALORE = {**flags_of("q_galore_adamw8bit_per_layer"), "num_training_steps": 30, "save_every": 10}
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """With a run `text` of INT8 weights and its export `exported`."""
    small = SmallRun(tmp_path_factory.mktemp("generated"))
    small.run("text", **Q_GALORE, **write_text(small.folder / "c4", words=4))
    export(small.folder / "text", small.folder / "exported", "float32", tokenizer="")
    return small


@pytest.fixture(scope="module")
def generator(small: SmallRun) -> Generator:
    trained = open_trained(small.folder / "text", "cpu")
    return Generator(trained, tokenizer_of(trained))


def printed(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[str, str]:
    assert command.main([*map(str, argv), "--device", "cpu"]) == 0
    return capsys.readouterr()


def test_greedy_takes_the_most_probable_token_each_time(small: SmallRun, generator: Generator) -> None:
    text, reason = generator.continue_text("w0 w1", 6, GREEDY)
    trained = open_trained(small.folder / "text", "cpu")
    tokenizer = tokenizer_of(trained)
    ids = tokenizer.encode(["w0 w1"])[0]
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(trained.model(torch.tensor([ids])).logits[0, -1].argmax()))
    until = ids.index(1) if 1 in ids else len(ids)
    assert f"w0 w1{text}" == tokenizer.decode([ids[:until]])[0]
    assert reason == ("--max_tokens 6" if 1 not in ids else "the document ends here (</s>)")


def test_a_seed_gives_its_text_again(generator: Generator) -> None:
    texts = [generator.continue_text("w0", 20, Sampling(1.0, seed=seed))[0] for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1] and len(set(texts)) > 1
    before = torch.random.get_rng_state()
    generator.continue_text("w0", 5, Sampling(1.0, seed=1))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.gpu
def test_a_seed_gives_its_text_again_on_a_gpu(small: SmallRun) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    trained = open_trained(small.folder / "text", "cpu")
    generator = Generator(trained, tokenizer_of(trained), torch.device("cuda"))
    texts = [generator.continue_text("w0", 20, Sampling(1.0, seed=seed))[0] for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1] and len(set(texts)) > 1


def test_top_k_and_top_p_leave_the_most_probable(generator: Generator) -> None:
    greedy = generator.continue_text("w0 w2", 8, GREEDY)[0]
    for sampling in (Sampling(5.0, top_k=1), Sampling(5.0, top_p=1e-9), Sampling(1e-4)):
        assert generator.continue_text("w0 w2", 8, sampling)[0] == greedy
    assert generator.continue_text("w0 w2", 8, Sampling(5.0, seed=1))[0] != greedy


def test_why_it_ends(generator: Generator) -> None:
    reasons = {generator.continue_text("w0 w1", 40, Sampling(1.0, seed=seed))[1] for seed in range(6)}
    assert "the document ends here (</s>)" in reasons
    assert generator.continue_text("w0", 1, GREEDY)[1] == "--max_tokens 1"
    prompt = " ".join(["w1"] * 63)
    longest = {generator.continue_text(prompt, 40, Sampling(1.0, seed=seed))[1] for seed in range(4)}
    assert "with the prompt 64 tokens, the longest sequence that the model takes" in longest
    with pytest.raises(UserError, match="the prompt has 64 tokens, and the model takes 64 with what follows"):
        generator.continue_text(f"{prompt} w2", 40, GREEDY)
    with pytest.raises(UserError, match="the prompt is empty, and no token begins a document"):
        generator.continue_text("", 40, GREEDY)


def test_from_a_run_a_checkpoint_and_an_export(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--max_tokens", "9", "--temperature", "0")
    run, said = printed(capsys, small.folder / "text", "w0 w1", "w2", *flags)
    assert [line[:5] for line in run.splitlines()] == ["w0 w1", "w2 w"] or run.startswith("w0 w1")
    assert said.splitlines()[0].endswith("step_00000030, after 30 updates") and said.count("\n-- ") == 2
    of_export, said = printed(capsys, small.folder / "exported", "w0 w1", "w2", *flags)
    assert of_export == run and "exported, an export" in said
    printed(capsys, small.folder / "text" / "step_00000010", "w0 w1", "w2", *flags)


def test_a_prompt_may_stand_behind_flags(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    run, flags = str(small.folder / "text"), ["--max_tokens", "5", "--seed", "3"]
    assert command.main([run, "w0 w1", *flags, "--device", "cpu"]) == 0
    expected = capsys.readouterr().out
    assert command.main([run, *flags, "w0 w1", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == expected


def test_prompts_come_from_standard_input(
    small: SmallRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--max_tokens", "9", "--seed", "5")
    expected = printed(capsys, small.folder / "text", "w0 w1", "w2", *flags)
    monkeypatch.setattr("sys.stdin", io.StringIO("w0 w1\n\nw2\n"))
    assert printed(capsys, small.folder / "text", *flags) == expected


def test_a_reader_that_ends_early_ends_it_quietly(
    small: SmallRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert qgalore(["generate", str(small.folder / "text"), "w0", "--device", "cpu"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_bad_values_are_named_at_once(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    bad = ["--temperature", "-1", "--top_k", "-2", "--top_p", "0", "--seed", "-1", "--max_tokens", "many"]
    assert command.main([str(small.folder / "text"), "w0", *bad]) == 2
    error = capsys.readouterr().err
    assert error.startswith("qgalore generate: --temperature is -1") and error.count("it must be") == 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO(""))
        assert command.main([str(small.folder / "text")]) == 2
    assert "there is no prompt: give a text" in capsys.readouterr().err
    assert command.main([str(small.folder / "text"), "\udcff"]) == 2
    assert "is not UTF-8" in capsys.readouterr().err
    assert command.main([str(small.folder / "nowhere"), "w0"]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def shown(tokenizer: Tokenizer, prompt: str, ids: list[int]) -> list[str]:
    """The pieces in which text appears whose tokens come one by one."""
    pieces: list[str] = []
    streamed = _Stream(tokenizer, tokenizer.encode([prompt])[0], pieces.append)
    streamed.put(torch.tensor([tokenizer.encode([prompt])[0]]))
    for token in ids:
        streamed.put(torch.tensor([token]))
    streamed.end()
    assert streamed.text == "".join(pieces)
    return pieces


def test_text_appears_in_whole_characters(tmp_path: Path) -> None:
    byte_level(["<pad>", "</s>"]).save(str(tmp_path / "tokenizer.json"))
    bytes_alone = named_tokenizer(str(tmp_path / "tokenizer.json"), Added(eos=True))
    text = " naïve 北京 \U0001f600 end"
    ids = bytes_alone.encode([text])[0]
    assert len(ids) > len(text)
    pieces = shown(bytes_alone, "The", [*ids, 1])
    assert "".join(pieces) == text and len(pieces) > 8 and not any("\ufffd" in piece for piece in pieces)
    assert "".join(shown(bytes_alone, "The", ids[:-9])).endswith("\ufffd")  # cut inside a character
    fallback = named_tokenizer(str(write_model(tmp_path, "bpe", "tokenizer.model")))
    ids = fallback.encode([text])[0]
    pieces = shown(fallback, "The", ids)
    assert "".join(pieces).strip() == text.strip() and not any("\ufffd" in piece for piece in pieces)
    assert shown(fallback, "The", fallback.encode(["fox jumps"])[0])[0].startswith(" ")
