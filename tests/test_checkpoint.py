"""Checkpoints: exactly what was saved comes back, or a sentence says why not; nothing is ever half there."""

import json
import math
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_pretraining.checkpoint.store import (
    check_compatible,
    check_model_tensors,
    list_checkpoints,
    load_checkpoint,
    load_newest_checkpoint,
    save_checkpoint,
    set_aside_later,
)
from peft_pretraining.checkpoint.tensor_file import join_tree, split_tree
from peft_pretraining.errors import UserError
from tests.file_opens import counted_opens

ROOT = Path(__file__).resolve().parent.parent
FILES = ["manifest.json", "model.safetensors", "optimizer.json", "optimizer.safetensors", "state.json"]
DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
]


def model_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (5, 7), generator=generator, dtype=torch.uint8)
    scale = torch.randn(5, 1, generator=generator).bfloat16()
    return {"layer.weight": codes, "layer.weight_scale": scale, "norm.weight": torch.randn(3, generator=generator)}


def optimizer_state() -> dict[str, Any]:
    first = {"step": torch.tensor(3.0), "exp_avg": torch.arange(6, dtype=torch.uint8), "interval": 200, "seen": None}
    second = {"basis": torch.randn(4, 6).t(), "similarity": [0.25, math.nan, -math.inf], "betas": (0.9, 0.95)}
    return {"state": {0: first, 11: second}, "param_groups": [{"lr": 0.1 + 0.2, "params": [0, 11], "quant": True}]}


def save(folder: Path, step: int, keep: int = 0, **state: object) -> Path:
    return save_checkpoint(folder, step, model_tensors(step), optimizer_state(), {"step": step, **state}, keep)


def find_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Where the newest valid checkpoint lies, and what was refused."""
    checkpoint, refusals = load_newest_checkpoint(folder)
    return checkpoint and checkpoint.path, refusals


def assert_same(a: object, b: object) -> None:
    """Equal in value and in type, all the way down; NaN equals NaN."""
    assert type(a) is type(b), (a, b)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    elif isinstance(a, dict) and isinstance(b, dict):
        assert list(a) == list(b) and [type(key) for key in a] == [type(key) for key in b]
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b or (a != a and b != b)


class TestTree:
    @pytest.mark.parametrize(
        "tree",
        [
            {},
            {"a": [1, 2.5, "x", None, True, ()], "b": ((1, [2]), {})},
            {0: "int", "0": "str", 1.5: "float", (1, 2): "tuple", None: "none", True: "bool"},
            {"$tensor": "not a mark", "ok": {"$": 1}},
            {"nan": math.nan, "inf": [math.inf, -math.inf], "zero": -0.0, "big": 10**30, "tiny": 5e-324},
            {"text": "ü\ud800\n\x00", "lanes": [[["document"] * 2], {"position": 2**63}]},
            {"t": [torch.zeros(0, 3), torch.tensor(7), {1: torch.ones(2), "1": torch.zeros(2)}]},
            {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}},
        ],
    )
    def test_comes_back_exactly(self, tree: dict[Any, Any]) -> None:
        tensors: dict[str, torch.Tensor] = {}
        rest = json.loads(json.dumps(split_tree(tree, tensors), allow_nan=False))
        back = join_tree(rest, tensors)
        assert_same(back, tree)
        assert str(back) == str(tree)  # tells 0.0 from -0.0

    @pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", torch.float32, 1j])
    def test_names_what_cannot_be_kept(self, value: object) -> None:
        with pytest.raises(TypeError, match="state/3/projector is a"):
            split_tree({"state": {3: {"projector": value}}}, {})

    def test_unknown_mark(self) -> None:
        with pytest.raises(ValueError, match=r"\$new"):
            join_tree({"$new": 1}, {})


class TestRoundTrip:
    def test_everything_comes_back(self, tmp_path: Path) -> None:
        state = {"lanes": {"7": [1, 2]}, "wandb_id": None, "rng": torch.get_rng_state(), "betas": (0.9, 0.99)}
        tensors, optimizer = model_tensors(), optimizer_state()
        path = save_checkpoint(tmp_path / "run" / "deep", 12, tensors, optimizer, state)
        assert path == tmp_path / "run" / "deep" / "step_00000012"
        for check in (True, False):
            loaded = load_checkpoint(path, check)
            assert (loaded.path, loaded.update_step) == (path, 12)
            assert loaded.model_tensors.keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert_same(loaded.model_tensors[name], tensor)
            assert_same(loaded.optimizer_state, optimizer)
            assert_same(loaded.state, state)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtypes_and_layouts(self, tmp_path: Path, dtype: torch.dtype) -> None:
        base = (
            torch.randint(0, 2, (6, 5, 3)).to(dtype) if dtype == torch.bool else (torch.rand(6, 5, 3) * 100).to(dtype)
        )
        tensors = {
            "plain": base,
            "transposed": base.permute(2, 0, 1),
            "strided": base[::2, 1:, 0],
            "expanded": base[:1].expand(4, 5, 3),
            "scalar": base[0, 0, 0],
            "empty": base[:0],
            "odd": base.flatten()[:7],
        }
        loaded = load_checkpoint(save_checkpoint(tmp_path, 1, tensors, {"state": tensors}, {})).model_tensors
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert_same(loaded[name], tensor)

    def test_files_are_what_the_library_writes(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = {"b": torch.ones(3, dtype=torch.uint8), "a": torch.randn(2, 2), "c": torch.zeros(5).bfloat16()}
        path = save_checkpoint(tmp_path, 1, tensors, {}, {})
        assert sorted(file.name for file in path.iterdir()) == FILES
        save_file(tensors, tmp_path / "library.safetensors")
        ours, theirs = load_file(path / "model.safetensors"), load_file(tmp_path / "library.safetensors")
        for name in tensors:
            assert_same(ours[name], theirs[name])
        assert (path / "model.safetensors").stat().st_size == (tmp_path / "library.safetensors").stat().st_size

    def test_a_tied_tensor_is_stored_once_and_stays_tied(self, tmp_path: Path) -> None:
        table = torch.randn(100, 10)
        path = save_checkpoint(tmp_path, 1, {"embed": table, "head": table, "part": table[:50]}, {}, {})
        assert (path / "model.safetensors").stat().st_size < 6000 + 300
        loaded = load_checkpoint(path).model_tensors
        assert_same(loaded["head"], table)
        assert_same(loaded["part"], table[:50])
        assert loaded["head"].data_ptr() == loaded["embed"].data_ptr() != loaded["part"].data_ptr()

    def test_torch_optimizer_goes_on_where_it_stopped(self, tmp_path: Path) -> None:
        def train(steps: int, weight: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
            for _ in range(steps):
                weight.grad = weight.detach().sin()
                optimizer.step()

        weight = torch.nn.Parameter(torch.linspace(-1, 1, 10))
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        train(3, weight, optimizer)
        loaded = load_checkpoint(save_checkpoint(tmp_path, 3, {"weight": weight}, optimizer.state_dict(), {}))
        train(3, weight, optimizer)
        again = torch.nn.Parameter(loaded.model_tensors["weight"])
        resumed = torch.optim.AdamW([again], lr=0.5)
        resumed.load_state_dict(loaded.optimizer_state)
        train(3, again, resumed)
        assert torch.equal(again, weight)

    def test_same_content_gives_the_same_bytes(self, tmp_path: Path) -> None:
        optimizer = optimizer_state()
        paths = [save_checkpoint(tmp_path / name, 1, model_tensors(), optimizer, {"x": 1}) for name in "ab"]
        for file in FILES:
            assert (paths[0] / file).read_bytes() == (paths[1] / file).read_bytes()

    def test_foreign_content_is_a_programmers_error_and_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="state/0/projector is a object"):
            save_checkpoint(tmp_path, 1, {}, {"state": {0: {"projector": object()}}}, {})
        with pytest.raises(TypeError, match=r"x is torch\.complex64"):
            save_checkpoint(tmp_path, 1, {"x": torch.zeros(1, dtype=torch.complex64)}, {}, {})
        assert list(tmp_path.iterdir()) == []


class TestReading:
    def test_every_file_is_read_once(self, tmp_path: Path) -> None:
        path = save(tmp_path, 1)
        for load in (lambda: load_checkpoint(path), lambda: load_newest_checkpoint(tmp_path)[0]):
            with counted_opens(path) as opens:
                assert load() is not None
            assert opens == dict.fromkeys(FILES, 1)

    def test_what_is_written_to_a_loaded_tensor_stays_in_memory(self, tmp_path: Path) -> None:
        path = save(tmp_path, 1)
        for tensor in load_checkpoint(path).model_tensors.values():
            tensor.zero_()
        assert_same(load_checkpoint(path).model_tensors["layer.weight"], model_tensors(1)["layer.weight"])

    def test_a_loaded_tensor_outlives_its_file(self, tmp_path: Path) -> None:
        path = save(tmp_path, 1)
        loaded = load_checkpoint(path)
        shutil.rmtree(path)
        assert_same(loaded.model_tensors["norm.weight"], model_tensors(1)["norm.weight"])

    def test_an_unchecked_file_that_is_none_is_a_sentence(self, tmp_path: Path) -> None:
        path = save(tmp_path, 1)
        content = (path / "model.safetensors").read_bytes()
        for damaged in (content[:-1], b"", b"12345678", content.replace(b'"shape":[3]', b'"shape":[4]')):
            (path / "model.safetensors").write_bytes(damaged)
            with pytest.raises(UserError, match="cannot be read"):
                load_checkpoint(path, check=False)


class TestDamage:
    @pytest.fixture
    def two(self, tmp_path: Path) -> tuple[Path, Path]:
        return save(tmp_path, 10), save(tmp_path, 20)

    @pytest.mark.parametrize("name", FILES)
    def test_a_flipped_bit_anywhere_is_found(self, two: tuple[Path, Path], name: str) -> None:
        older, newer = two
        content = (newer / name).read_bytes()
        for position in {0, 1, len(content) // 3, len(content) // 2, len(content) - 1}:
            damaged = bytearray(content)
            damaged[position] ^= 1
            (newer / name).write_bytes(damaged)
            path, refusals = find_checkpoint(newer.parent)
            assert path == older, position
            assert len(refusals) == 1 and str(newer) in refusals[0] and name in refusals[0]
            with pytest.raises(UserError, match=f"{name} .*take an older checkpoint"):
                load_checkpoint(newer)
        (newer / name).write_bytes(content)
        assert find_checkpoint(newer.parent) == (newer, [])

    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.parametrize("how", ["cut", "emptied", "longer", "missing"])
    def test_wrong_length_or_missing(self, two: tuple[Path, Path], name: str, how: str) -> None:
        older, newer = two
        content = (newer / name).read_bytes()
        if how == "missing":
            (newer / name).unlink()
        else:
            (newer / name).write_bytes({"cut": content[:-1], "emptied": b"", "longer": content + b" "}[how])
        path, refusals = find_checkpoint(newer.parent)
        assert path == older and len(refusals) == 1 and name in refusals[0]
        with pytest.raises(UserError, match=name):
            load_checkpoint(newer)

    def test_every_byte_of_the_manifest_counts(self, tmp_path: Path) -> None:
        path = save(tmp_path, 1)
        content = (path / "manifest.json").read_bytes()
        for position in range(len(content)):
            damaged = bytearray(content)
            damaged[position] ^= 4
            (path / "manifest.json").write_bytes(damaged)
            with pytest.raises(UserError):
                load_checkpoint(path)

    def test_all_damaged(self, two: tuple[Path, Path]) -> None:
        for path in two:
            (path / "state.json").write_text("{}")
        path, refusals = find_checkpoint(two[0].parent)
        assert path is None and len(refusals) == 2 and str(two[1]) in refusals[0]

    def test_nothing_there(self, tmp_path: Path) -> None:
        assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path / "absent") == (None, [])
        with pytest.raises(UserError, match=r"step_1: there is no such directory: give a step_"):
            load_checkpoint(tmp_path / "step_1")
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="cannot be read"):
            find_checkpoint(tmp_path / "file")

    def test_the_folder_of_a_run_is_no_checkpoint(self, tmp_path: Path) -> None:
        save(tmp_path, 1)
        with pytest.raises(
            UserError, match=f"give one of its step_... directories, or auto with --save_dir {tmp_path}"
        ):
            load_checkpoint(tmp_path)

    def test_a_newer_format_is_named(self, tmp_path: Path) -> None:
        path = save(tmp_path, 1)
        body = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(body | {"version": 3}))
        with pytest.raises(UserError, match="version 3; this program reads up to 2"):
            load_checkpoint(path)

    def test_pickles_are_refused_and_not_run(self, tmp_path: Path) -> None:
        class Bomb:
            def __reduce__(self) -> tuple[Any, ...]:
                return (Path.touch, (tmp_path / "executed",))

        official = tmp_path / "step_00000099"
        official.mkdir()
        for name in ("pytorch_model.bin", "optimizer.pt"):
            (official / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(UserError, match=r"optimizer\.pt, pytorch_model\.bin, a pickle, which could run code"):
            load_checkpoint(official)
        with pytest.raises(UserError, match="it is a pickle"):
            load_checkpoint(official / "optimizer.pt")
        good = save(tmp_path, 5)
        assert find_checkpoint(tmp_path)[0] == good
        shutil.copy(official / "optimizer.pt", good)
        assert find_checkpoint(tmp_path)[0] is None
        assert not (tmp_path / "executed").exists()

    def test_a_manifest_cannot_point_elsewhere(self, tmp_path: Path) -> None:
        from peft_pretraining.checkpoint.manifest import write_manifest

        path = save(tmp_path, 1)
        (tmp_path / "secret").write_text("x")
        with (path / "manifest.json").open("wb") as file:
            write_manifest(file, 1, {"../secret": (1, "")}, {})
        with pytest.raises(UserError, match="lists other files"):
            load_checkpoint(path)


class TestPruning:
    def steps(self, folder: Path) -> list[int]:
        return [int(path.name[-8:]) for path in list_checkpoints(folder)]

    def test_keeps_the_newest(self, tmp_path: Path) -> None:
        for step in range(1, 6):
            save(tmp_path, step, keep=3)
        assert self.steps(tmp_path) == [3, 4, 5]
        save(tmp_path, 6, keep=1)
        assert self.steps(tmp_path) == [6]
        assert [path.name for path in tmp_path.iterdir()] == ["step_00000006"]

    def test_zero_keeps_all(self, tmp_path: Path) -> None:
        for step in range(1, 6):
            save(tmp_path, step, keep=0)
        assert self.steps(tmp_path) == [1, 2, 3, 4, 5]

    def test_damaged_ones_do_not_push_out_good_ones(self, tmp_path: Path) -> None:
        for step in (1, 2, 3, 4):
            save(tmp_path, step)
        for step in (3, 4):
            (tmp_path / f"step_{step:08d}" / "model.safetensors").unlink()
        save(tmp_path, 5, keep=2)
        assert self.steps(tmp_path) == [2, 3, 4, 5]
        save(tmp_path, 6, keep=2)
        assert self.steps(tmp_path) == [5, 6]

    def test_later_steps_and_other_files_are_left_alone(self, tmp_path: Path) -> None:
        for step in (1, 2, 30):
            save(tmp_path, step)
        (tmp_path / "metrics.jsonl").touch()
        (tmp_path / "step_notes").mkdir()
        save(tmp_path, 3, keep=1)
        assert self.steps(tmp_path) == [3, 30]
        assert (tmp_path / "metrics.jsonl").exists() and (tmp_path / "step_notes").exists()

    def test_going_back_sets_later_ones_aside(self, tmp_path: Path) -> None:
        for step in (1, 2, 3):
            save(tmp_path, step)
        assert [path.name for path in set_aside_later(tmp_path, 1)] == [
            "abandoned_0_step_00000002",
            "abandoned_0_step_00000003",
        ]
        save(tmp_path, 2)
        assert [path.name for path in set_aside_later(tmp_path, 1)] == ["abandoned_1_step_00000002"]
        assert self.steps(tmp_path) == [1]
        assert load_checkpoint(tmp_path / "abandoned_0_step_00000003").state["step"] == 3


class TestLeftovers:
    def test_half_written_directories_go_at_the_next_save(self, tmp_path: Path) -> None:
        good = save(tmp_path, 1)
        half = tmp_path / ".tmp_step_00000002_99999"
        shutil.copytree(good, half)
        assert find_checkpoint(tmp_path) == (good, [])
        save(tmp_path, 3)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]

    def test_saving_a_step_again_replaces_it(self, tmp_path: Path) -> None:
        save(tmp_path, 1, tag="old")
        path = save(tmp_path, 1, tag="new")
        assert load_checkpoint(path).state["tag"] == "new"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_crash_between_the_two_renames_loses_nothing(self, tmp_path: Path) -> None:
        path = save(tmp_path, 7)
        path.rename(tmp_path / ".replaced_step_00000007")
        found, refusals = find_checkpoint(tmp_path)
        assert found is not None and refusals == []
        assert load_checkpoint(found).update_step == 7
        save(tmp_path, 8)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000007", "step_00000008"]
        shutil.copytree(path, tmp_path / ".replaced_step_00000007")
        assert find_checkpoint(tmp_path)[0] == tmp_path / "step_00000008"
        assert list_checkpoints(tmp_path)[0] == path
        save(tmp_path, 9)
        assert not (tmp_path / ".replaced_step_00000007").exists()

    def test_killed_at_any_system_call_the_newest_is_whole(self, tmp_path: Path) -> None:
        """A child saves step 2 over and over and is killed at the n-th durable operation, for every n."""
        save(tmp_path, 1)
        program = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.test_checkpoint import save
save_dir = Path({str(tmp_path)!r})
for n in range(1, 60):
    pid = os.fork()
    if pid:
        status = os.waitpid(pid, 0)[1]
        print(n, status, flush=True)
        if status == 0:
            break
        import tests.test_checkpoint as t
        found, refusals = t.find_checkpoint(save_dir)
        assert found is not None and refusals == [], (n, found, refusals)
        assert t.load_checkpoint(found).state["step"] in (1, 2)
        continue
    left = n
    def dying(real):
        def call(*args, **kwargs):
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call
    for name in ("fsync", "rename", "rmdir", "unlink", "mkdir"):
        setattr(os, name, dying(getattr(os, name)))
    save(save_dir, 2, keep=1 if n % 2 else 2)
    os._exit(0)
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        *killed, last = [line.split() for line in done.stdout.splitlines()]
        assert len(killed) > 12 and {status for _, status in killed} == {str(int(signal.SIGKILL))} and last[1] == "0"
        assert find_checkpoint(tmp_path)[0] == tmp_path / "step_00000002"


class TestCannotWrite:
    def test_full_disk(self, tmp_path: Path) -> None:
        """A limit on the size of files stands for the full disk: both end a write in the middle."""
        before = save(tmp_path, 1)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        big = {"weight": torch.zeros(100_000)}
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            with pytest.raises(UserError) as error:
                save_checkpoint(tmp_path, 2, big, {}, {}, keep=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        for part in (f"--save_dir {tmp_path}", "step_00000002 could not be written", "free some space", str(before)):
            assert part in str(error.value)
        assert list(tmp_path.iterdir()) == [before]
        assert load_checkpoint(before).state["step"] == 1

    def test_really_full_disk(self, tmp_path: Path) -> None:
        """On a small file system, mounted where no other process sees it."""
        program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.test_checkpoint import *
disk = Path({str(tmp_path)!r})
before = save(disk, 1)
with pytest.raises(UserError, match="No space left on device.*free some space"):
    save_checkpoint(disk, 2, {{"weight": torch.zeros(200_000)}}, {{}}, {{}})
assert find_checkpoint(disk) == (before, []) and list(disk.iterdir()) == [before]
"""
        mount = f"mount -t tmpfs -o size=400k tmpfs '{tmp_path}'"
        isolated = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
        if not shutil.which("unshare") or subprocess.run([*isolated, mount], capture_output=True).returncode:
            pytest.skip("mounting a small file system needs privileges that this process lacks")
        run = f'{mount} && exec "$0" -c "$1"'
        done = subprocess.run([*isolated, run, sys.executable, program], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert list(tmp_path.iterdir()) == []

    def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for folder in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(UserError, match="give a --save_dir that is a writable directory"):
                save(folder, 1)

    def test_no_permission(self) -> None:
        """Root may write anywhere, so the save runs in a process that has given root up."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save(folder, 1)
            program = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.test_checkpoint import *
if os.getuid() == 0:
    os.setuid(65534)
with pytest.raises(UserError, match="step_00000002 could not be written .*give a --save_dir that this user may write"):
    save(Path({name!r}), 2)
"""
            folder.chmod(0o555)
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
            folder.chmod(0o755)
            assert done.returncode == 0, done.stderr
            assert [path.name for path in folder.iterdir()] == ["step_00000001"]


class TestCompatible:
    def test_flags_of_another_run(self, tmp_path: Path) -> None:
        checkpoint = load_checkpoint(save(tmp_path, 1, optimizer="adamw", rank=128))
        check_compatible(checkpoint, {"optimizer": "adamw", "rank": 128})
        with pytest.raises(UserError) as error:
            check_compatible(checkpoint, {"optimizer": "galore_adamw", "rank": 64, "proj_bits": 4})
        for part in (
            "optimizer is 'galore_adamw' here and 'adamw' there",
            "rank is 64 here and 128 there",
            "proj_bits is 4 here and not recorded there",
            str(checkpoint.path),
        ):
            assert part in str(error.value)

    def test_weights_of_another_model(self, tmp_path: Path) -> None:
        checkpoint = load_checkpoint(save(tmp_path, 1))
        here = model_tensors()
        check_model_tensors(checkpoint, here)
        here["layer.weight"] = torch.zeros(7, 5)
        here["extra"] = here.pop("norm.weight")
        with pytest.raises(UserError) as error:
            check_model_tensors(checkpoint, here)
        for part in (
            "float32 7 x 5 here and uint8 5 x 7 there",
            "extra is missing",
            "norm.weight is not in this model",
        ):
            assert part in str(error.value)
