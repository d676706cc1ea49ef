"""metrics.jsonl is the truth: what is written is read back, survives crashes, and does not depend on wandb."""

import builtins
import itertools
import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_pretraining.errors import UserError
from peft_pretraining.reporting.jsonl import MetricsLogger, deterministic_metrics, read_metrics
from peft_pretraining.reporting.progress import Progress, describe, format_rate, format_seconds
from peft_pretraining.reporting.throughput import (
    ThroughputMeter,
    memory_metrics,
    peak_flops,
    train_flops_per_token,
)
from peft_pretraining.reporting.wandb import has_login, resolve_mode
from tests.small_run import SmallRun


def make_logger(save_dir: Path, **options: Any) -> MetricsLogger:
    return MetricsLogger(save_dir, {"lr": 0.1}, **{"total_updates": 10, "show_progress": False, **options})


def write_updates(save_dir: Path, steps: range) -> None:
    logger = make_logger(save_dir)
    for step in steps:
        logger.log_metrics(step, {"train/loss": 1 / step, "throughput/tokens_per_second": 100.0 * step})
    logger.close()


@pytest.fixture
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_lines_are_written_at_once_and_read_back(tmp_path: Path) -> None:
    logger = make_logger(tmp_path / "new" / "run")
    logger.log_metrics(1, {"train/loss": 0.1 + 0.2, "train/tokens": 7})
    assert read_metrics(tmp_path / "new" / "run") == [{"update_step": 1, "train/loss": 0.1 + 0.2, "train/tokens": 7}]
    logger.log_metrics(1, {"eval/loss": math.nan})
    assert read_metrics(tmp_path / "new" / "run")[1] == {"update_step": 1, "eval/loss": None}
    logger.close()


def test_only_rank_zero_writes(tmp_path: Path) -> None:
    logger = make_logger(tmp_path / "run", rank=1, wandb_mode="offline")
    logger.log_metrics(1, {"train/loss": 1.0})
    logger.truncate_after(0)
    logger.sync()
    logger.log("unseen")
    logger.close()
    assert not (tmp_path / "run").exists()
    assert logger.run_id is None


def test_stop_and_resume_gives_the_bytes_of_an_uninterrupted_run(tmp_path: Path) -> None:
    write_updates(tmp_path / "whole", range(1, 11))
    write_updates(tmp_path / "parts", range(1, 8))
    logger = make_logger(tmp_path / "parts")
    logger.truncate_after(5)
    for step in range(6, 11):
        logger.log_metrics(step, {"train/loss": 1 / step, "throughput/tokens_per_second": 100.0 * step})
    logger.close()
    whole, parts = (tmp_path / name / "metrics.jsonl" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path: Path) -> None:
    write_updates(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert [line["update_step"] for line in read_metrics(tmp_path)] == [1, 2]
    write_updates(tmp_path, range(3, 4))
    assert [line["update_step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert [json.loads(line)["update_step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_truncation_leaves_the_old_file_if_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_updates(tmp_path, range(1, 6))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    logger = make_logger(tmp_path)

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written \(No space left on device\)"):
        logger.truncate_after(2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    logger = make_logger(tmp_path)
    logger.log_metrics(1, {"train/loss": 1.0})
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    logger._open()
    with pytest.raises(UserError, match="No space left on device"):
        logger.log_metrics(2, {"train/loss": 1.0})
    logger.close()


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="give a --save_dir"):
        make_logger(tmp_path / "file" / "run")


def test_reading_a_folder_without_metrics_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be the --save_dir of a run"):
        read_metrics(tmp_path)


def test_what_is_measured_is_left_out_of_comparisons() -> None:
    line = {"update_step": 3, "train/loss": 1.0, "throughput/mfu": 0.4, "memory/peak_gb": 2.0}
    line |= {"data/wait_fraction": 0.1, "time/update_seconds": 1.0, "eval/loss": 2.0}
    assert deterministic_metrics(line) == {"update_step": 3, "train/loss": 1.0, "eval/loss": 2.0}


# wandb


def test_login_is_found_without_the_network(no_login: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_login()
    assert resolve_mode("auto") == "offline"
    no_login.write_text("machine api.wandb.ai login user password key\n")
    assert has_login()
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_login()
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert has_login()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode("auto") == "off"
    assert resolve_mode("online") == "online"


def test_a_missing_wandb_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real_import = builtins.__import__

    def without_wandb(name: str, *rest: Any, **options: Any) -> Any:
        if name == "wandb":
            raise ImportError("No module named 'wandb'")
        return real_import(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_wandb)
    logger = make_logger(tmp_path, wandb_mode="offline")
    for step in (1, 2, 3):
        logger.log_metrics(step, {"train/loss": 1.0})
    logger.close()
    assert len(read_metrics(tmp_path)) == 3
    assert capsys.readouterr().err.count("wandb could not start (ImportError: No module named 'wandb')") == 1


class _FailingRun:
    def log(self, _: dict[str, float]) -> None:
        raise RuntimeError("socket closed\nand a long trace")


def test_a_wandb_that_fails_later_is_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = make_logger(tmp_path)
    assert logger._wandb is not None
    logger._wandb._run = _FailingRun()
    for step in (1, 2, 3):
        logger.log_metrics(step, {"train/loss": 1.0})
    logger.close()
    assert len(read_metrics(tmp_path)) == 3
    assert capsys.readouterr().err.count("wandb could not log (RuntimeError: socket closed);") == 1


class _OfflineRun:
    """As much of a run of wandb as the mirror uses; keeps its lines in a file of a new folder."""

    numbers = itertools.count()

    def __init__(self, **options: Any) -> None:
        folder = Path(options["dir"]) / "wandb" / f"offline-run-2026_{next(self.numbers)}-{options['id']}"
        folder.mkdir(parents=True)
        self.settings = Namespace(sync_dir=str(folder))
        self.file = folder / "lines"
        self.file.touch()

    def define_metric(self, *_: str, **options: str) -> None:
        pass

    def log(self, line: dict[str, float]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def finish(self, exit_code: int) -> None:
        pass


@pytest.fixture
def offline_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Namespace(Settings=Namespace, init=_OfflineRun))  # type: ignore[arg-type]


def recorded_offline(save_dir: Path) -> list[dict[str, Any]]:
    """The lines in the only folder of wandb."""
    (file,) = (save_dir / "wandb").glob("offline-run-*/lines")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_resumed_offline_run_has_each_update_once_in_one_folder(
    tmp_path: Path, offline_wandb: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = None
    for first, last in ((1, 7), (5, 9), (10, 12)):  # as if killed after 7 updates and resumed after 4
        logger = make_logger(tmp_path, wandb_mode="offline", run_id=run_id, start_update=first - 1)
        run_id = logger.run_id
        for step in range(first, last + 1):
            logger.log_metrics(step, {"train/loss": 1 / step})
        logger.close()
        assert recorded_offline(tmp_path) == read_metrics(tmp_path)
        assert [line["update_step"] for line in recorded_offline(tmp_path)] == [*range(1, last + 1)]
    (folder,) = (tmp_path / "wandb").iterdir()
    assert folder.name.endswith(f"-{run_id}")
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == f"wandb recorded offline; upload the run with: wandb sync {folder}" and len(said) == 3


def test_earlier_folders_stay_if_the_new_one_is_not_whole(
    tmp_path: Path, offline_wandb: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = make_logger(tmp_path, wandb_mode="offline", start_update=0)
    logger.log_metrics(1, {"train/loss": 1.0})
    logger.close()
    monkeypatch.setattr(_OfflineRun, "log", _FailingRun.log)
    make_logger(tmp_path, wandb_mode="offline", run_id=logger.run_id, start_update=1).close()
    assert sorted(file.read_text().count("\n") for file in tmp_path.glob("wandb/*/lines")) == [0, 1]


def test_an_offline_run_that_goes_on_elsewhere_is_another_run(tmp_path: Path, offline_wandb: None) -> None:
    """Without the metrics before it, its upload would replace the run that it came from by its end."""
    logger = make_logger(tmp_path / "elsewhere", wandb_mode="offline", run_id="abcd1234", start_update=100)
    assert logger.run_id not in (None, "abcd1234")
    logger.close()


def test_no_upload_is_advised_where_nothing_is_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_logger(tmp_path, wandb_mode="off").close()
    assert "wandb" not in capsys.readouterr().err


WANDB_PROGRAM = """
import sys
from argparse import Namespace
from pathlib import Path
from peft_pretraining.reporting.jsonl import MetricsLogger
directory, mode, first, last, *run_id = sys.argv[1:]
logger = MetricsLogger(
    Path(directory), {"lr": 0.1}, wandb_mode=mode, run_id=(run_id or [None])[0], total_updates=9, show_progress=False,
    start_update=int(first) - 1,
)
for step in range(int(first), int(last) + 1):
    logger.log_metrics(step, {"train/loss": 1.0})
logger.close()
print(logger.run_id)
"""


def run_with_wandb(
    tmp_path: Path, mode: str, *run_id: str, first: int = 1, last: int = 1, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Log some updates in a process of its own, since wandb leaves a service and exit handlers behind."""
    pytest.importorskip("wandb")
    folders = {"WANDB_CACHE_DIR": str(tmp_path / "cache"), "WANDB_CONFIG_DIR": str(tmp_path / "config")}
    return subprocess.run(
        [sys.executable, "-c", WANDB_PROGRAM, str(tmp_path / "run"), mode, str(first), str(last), *run_id],
        capture_output=True,
        text=True,
        env={**os.environ, **folders, **environment},
        timeout=120,
        check=True,
    )


@pytest.mark.slow
def test_wandb_without_a_server_records_offline(tmp_path: Path) -> None:
    # Nothing listens on port 9 of this machine.
    key = "0123456789" * 4
    done = run_with_wandb(
        tmp_path, "online", WANDB_API_KEY=key, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_INIT_TIMEOUT="4"
    )
    assert done.stderr.count("warning: wandb could not start") == 1
    assert "it records offline" in done.stderr
    assert len(read_metrics(tmp_path / "run")) == 1
    run_id = done.stdout.split()[-1]
    (file,) = (tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")
    assert file.stat().st_size > 500


def updates_in(path: Path) -> list[int]:
    """The updates in a file of wandb: a header of 7 bytes, then blocks of 32 KiB of framed records, as in LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, updates = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last part
            record, whole = Record.FromString(whole), b""
            items = {(item.key or item.nested_key[0]): item.value_json for item in record.history.item}
            updates += [int(items["update_step"])] if "update_step" in items else []
    return updates


@pytest.mark.slow
def test_wandb_offline_writes_a_run_and_keeps_its_id(tmp_path: Path) -> None:
    first = run_with_wandb(tmp_path, "offline", last=7)
    run_id = first.stdout.split()[-1]
    assert "warning" not in first.stderr
    (file,) = (tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")
    assert updates_in(file) == [*range(1, 8)]
    # As if it had been killed after 7 updates, with a checkpoint after 4.
    second = run_with_wandb(tmp_path, "offline", run_id, first=5, last=9)
    assert second.stdout.split()[-1] == run_id
    (file,) = (tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")
    assert updates_in(file) == [*range(1, 10)]
    assert f"upload the run with: wandb sync {file.parent}\n" in second.stderr


def test_run_id_is_kept_while_wandb_is_off(tmp_path: Path) -> None:
    assert make_logger(tmp_path, wandb_mode="off").run_id is None
    assert make_logger(tmp_path, wandb_mode="off", run_id="abc").run_id == "abc"


# TensorBoard


def scalars_in(save_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by the name of a metric, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(save_dir / "tensorboard"), size_guidance={SCALARS: 0}).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()[SCALARS]}


def test_tensorboard_has_the_metrics_of_each_update_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for first, last in ((1, 7), (5, 9), (10, 11)):  # as if killed after 7 updates and resumed after 4
        logger = make_logger(tmp_path, tensorboard=True, start_update=first - 1)
        for step in range(first, last + 1):
            logger.log_metrics(step, {"train/loss": first + step, "train/lr": math.nan if step == 2 else 0.5})
            if step % 3 == 0:
                logger.log_metrics(step, {"eval/loss": 0.25 * step})
        logger.sync()
        assert scalars_in(tmp_path).keys() == {"train/loss", "train/lr", "eval/loss"}, "what is synced can be read"
        logger.close()
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in read_metrics(tmp_path):
        for name, value in line.items():
            if name != "update_step":
                expected.setdefault(name, []).append((line["update_step"], math.nan if value is None else value))
    found = scalars_in(tmp_path)
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points]
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in points], nan_ok=True)
    assert [step for step, _ in found["train/loss"]] == [*range(1, 12)]


def test_a_tensorboard_that_fails_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    logger = make_logger(tmp_path, tensorboard=True)
    for step in (1, 2, 3):
        logger.log_metrics(step, {"train/loss": 1.0})
    logger.close()
    assert len(read_metrics(tmp_path)) == 3
    assert capsys.readouterr().err.count("warning: TensorBoard could not start (ModuleNotFoundError: ") == 1


def test_the_mirrors_of_a_resumed_run_have_what_metrics_jsonl_has(
    tmp_path: Path, offline_wandb: None, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    small = SmallRun(tmp_path)
    flags: dict[str, object] = {"unset_wandb": None, "wandb_mode": "offline", "tensorboard": True, "eval_every": 3}
    path = small.run("run", **flags, num_training_steps=6, save_every=2).save_dir
    small.run("run", **flags, num_training_steps=8, continue_from=path / "step_00000004")
    lines = read_metrics(path)
    assert [line["update_step"] for line in lines if "train/loss" in line] == [*range(1, 9)]
    assert recorded_offline(path) == lines
    scalars = scalars_in(path)
    assert scalars.keys() == {name for line in lines for name in line} - {"update_step"}
    for name, points in scalars.items():
        pairs = [(line["update_step"], line[name]) for line in lines if name in line]
        assert [step for step, _ in points] == [step for step, _ in pairs]
        assert [value for _, value in points] == pytest.approx([value for _, value in pairs])
    assert "upload the run with: wandb sync" in capsys.readouterr().err.splitlines()[-1]


# What a person sees


def test_lines_for_a_log_file_are_few(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(1000, terminal=False)
    for step in range(1, 1001):
        progress.show(step, {"train/loss": 2.0, "train/perplexity": 7.39, "train/lr": 0.01})
        if step in (500, 1000):
            progress.show(step, {"eval/perplexity": 8.0})
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("update 1/1000: loss 2.000, ppl 7.39, lr 1.00e-02, ")
    assert "left" in lines[0]
    assert lines[-1].startswith("update 1000/1000") and "left" not in lines[-1]
    # The run says a line of its own for each evaluation.
    assert len(lines) == 2


def test_bar_shows_the_state(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    progress = Progress(10, start_update=4, terminal=True)
    progress.show(10, {"train/loss": 2.0, "memory/peak_gb": 1.5})
    progress.show(10, {"eval/perplexity": 8.0})
    progress.log("a note")
    progress.close()
    text = capsys.readouterr().err
    assert (
        "10/10" in text
        and "loss 2.000" in text
        and "eval ppl 8.00" in text
        and "1.50 GB" in text
        and "a note\n" in text
    )


def test_words_for_numbers() -> None:
    assert [format_rate(value) for value in (950.4, 12345, 1_264_000)] == ["950", "12.3k", "1.26M"]
    assert [format_seconds(value) for value in (45.2, 200, 18420, 183600)] == ["45s", "3m20s", "5h07m", "2d03h"]
    assert describe({"train/lr": 0.001, "train/loss": 4.2131, "other": 1.0}) == "loss 4.213, lr 1.00e-03"


# Speed and memory


def test_throughput_counts_only_the_time_of_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 100.0, 102.0])
    monkeypatch.setattr("peft_pretraining.reporting.throughput.time.perf_counter", lambda: next(clock))
    meter = ThroughputMeter(flops_per_token=10.0, peak_flops=10_000.0)
    assert meter.report() == {}
    for _ in range(2):
        meter.start_update()
        meter.finish_update(tokens=1000, wait_seconds=0.5)
    assert meter.report() == {
        "throughput/tokens_per_second": 500.0,
        "throughput/mfu": 0.5,
        "time/update_seconds": 2.0,
        "data/wait_fraction": 0.25,
    }
    assert meter.report() == {}


def test_unknown_device_has_no_utilisation() -> None:
    meter = ThroughputMeter(10.0, peak_flops("Imaginary 9000"))
    meter.start_update()
    meter.finish_update(10, 0.0)
    assert "throughput/mfu" not in meter.report()


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla T4", None),
    ],
)
def test_peaks_by_device_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_flops_of_a_token() -> None:
    assert train_flops_per_token(1000, num_layers=2, hidden_size=8, max_length=16) == 6000 + 12 * 2 * 8 * 16


def test_cpu_memory_is_the_peak_of_this_process() -> None:
    block = torch.ones(64 * 1024 * 1024)  # 0.268 GB
    peak = memory_metrics(torch.device("cpu"))["memory/peak_gb"]
    assert 0.3 < peak < 64
    del block
    # Linux counts pages in batches, so its peak may move by a few of them.
    assert memory_metrics(torch.device("cpu"))["memory/peak_gb"] == pytest.approx(peak, rel=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_memory() -> None:
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    block = torch.ones(25_000_000, device=device)
    metrics = memory_metrics(device)
    assert metrics["memory/peak_gb"] >= 0.1
    assert metrics["memory/reserved_gb"] >= metrics["memory/peak_gb"]
    del block
