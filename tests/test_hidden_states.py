"""Hidden states that stream between host and device: no access races with another, whatever the streams' speeds.

Streams are emulated on the CPU. Copies are made at once, in the order of the program; but each stream has a vector
clock, that events carry from one to another, and every read and write of a buffer or row is checked: of two accesses
one of which writes, one must have happened before the other. Then every order in which a GPU may do the work gives
what the order of the program gives.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peft_pretraining.accumulation import layer_by_layer
from peft_pretraining.accumulation.hidden_states import HiddenStates, HostHiddenStates, StreamedHiddenStates
from peft_pretraining.accumulation.host_memory import free_host_bytes
from peft_pretraining.accumulation.layer_by_layer import LayerByLayer
from peft_pretraining.build import build_training
from peft_pretraining.config.parse import parse_args
from tests.small_run import CONFIG, assert_same_bits

COMPUTE = "compute"
Clock = dict[str, int]


class Access(NamedTuple):
    """A read or write of a region of memory."""

    stream: str
    tick: int
    writes: bool


class RaceError(AssertionError):
    """Two accesses of which none has happened before the other."""


class ClockedStreams(TorchDispatchMode):
    """Streams with clocks; while it is entered, all operations of the program are those of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.clocks: dict[str, Clock] = {COMPUTE: {}}
        self.regions: dict[int, tuple[int, list[Access]]] = {}
        """By address: the bytes of a buffer or row, and its accesses."""
        self.copies = 0
        self._copying = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._copying:
            arguments = func._schema.arguments
            for argument, value in zip(arguments, args, strict=False):
                info = argument.alias_info
                for tensor in value if isinstance(value, list | tuple) else [value]:
                    if isinstance(tensor, Tensor) and not func.is_view:
                        self.access(COMPUTE, tensor, info is not None and info.is_write)
        return func(*args, **(kwargs or {}))

    def access(self, stream: str, tensor: Tensor, writes: bool) -> None:
        """An access of the stream; raises RaceError."""
        found = [each for start, each in self.regions.items() if start <= tensor.data_ptr() < start + each[0]]
        for _, accesses in found:
            clock = self.clocks[stream]
            clock[stream] = clock.get(stream, 0) + 1
            for other in accesses:
                if (writes or other.writes) and clock.get(other.stream, 0) < other.tick:
                    raise RaceError(f"{stream} {'writes' if writes else 'reads'} what {other} may still use")
            accesses.append(Access(stream, clock[stream], writes))

    def mark(self) -> Clock:
        """See `Streams`."""
        return dict(self.clocks[COMPUTE])

    def wait(self, event: Clock) -> None:
        """See `Streams`."""
        self.merge(COMPUTE, event)

    def merge(self, stream: str, event: Clock) -> None:
        """Let the stream go on after an event."""
        clock = self.clocks[stream]
        clock.update({name: max(tick, clock.get(name, 0)) for name, tick in event.items()})

    def side_stream(self) -> ClockedSideStream:
        """See `Streams`."""
        name = f"copies {len(self.clocks)}"
        self.clocks[name] = {}
        return ClockedSideStream(self, name)


class ClockedSideStream:
    """A side stream with a clock."""

    def __init__(self, streams: ClockedStreams, name: str) -> None:
        self._streams, self._name = streams, name

    def copy(self, out: Tensor, source: Tensor, after: Iterable[Clock]) -> Clock:
        """See `SideStream`."""
        streams = self._streams
        streams.copies += 1
        for event in after:
            streams.merge(self._name, event)
        for tensor in (out, source):
            streams.regions.setdefault(tensor.data_ptr(), (tensor.nbytes, []))
        streams.access(self._name, source, writes=False)
        streams.access(self._name, out, writes=True)
        streams._copying = True
        out.data.copy_(source)
        streams._copying = False
        return dict(streams.clocks[self._name])


def streamed(streams: ClockedStreams, boundaries: int, micro_batches: int, like: Tensor) -> StreamedHiddenStates:
    host = [like.new_full((micro_batches, *like.shape), torch.nan) for _ in range(boundaries)]
    return StreamedHiddenStates(host, like, streams)


def passes(states: HiddenStates, boundaries: int, micro_batches: int, updates: int = 2) -> Iterator[Tensor]:
    """What the passes of an update read, as `LayerByLayer` has them; two layers may have one boundary."""
    for update in range(updates):
        for number in range(micro_batches):
            states.write(0, number, torch.full((2, 3), 100.0 * update + number))
        for boundary in range(1, boundaries):
            for number, x in enumerate(states.read(boundary - 1)):
                yield x.clone()
                states.write(boundary, number, x * 1.5 + boundary)
        last = boundaries - 1
        for number, x in enumerate(states.read(last)):
            states.write(last, number, x - 1)
        for boundary in range(last, 0, -1):
            for number, (x, grad) in enumerate(zip(states.read(boundary - 1), states.read(last), strict=True)):
                yield x + grad
                grad.mul_(x)  # as a compiled backward pass writes over the gradient that it was given
                states.write(last, number, grad)
        yield from (x.clone() for x in states.read(last))


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 5])
@pytest.mark.parametrize("boundaries", [1, 2, 4])
def test_no_copy_races_and_all_is_as_with_plain_copies(boundaries: int, micro_batches: int) -> None:
    streams, like = ClockedStreams(), torch.empty(2, 3)
    states = streamed(streams, boundaries, micro_batches, like)
    with streams:
        found = list(passes(states, boundaries, micro_batches))
    plain = HostHiddenStates(boundaries, micro_batches, like)
    assert_same_bits(found, list(passes(plain, boundaries, micro_batches)))
    # Forward and backward write each boundary but for the first and last once, and read twice.
    assert streams.copies > 3 * boundaries * micro_batches


@pytest.mark.parametrize("left_out", ["mark", "wait", "free", "written"])
def test_every_event_is_needed(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of races finds what is left out."""
    streams = ClockedStreams()
    states = streamed(streams, 3, 3, torch.empty(2, 3))
    if left_out == "mark":
        monkeypatch.setattr(streams, "mark", dict)
    elif left_out == "wait":
        monkeypatch.setattr(streams, "wait", lambda event: None)
    else:
        monkeypatch.setattr(states, f"_{left_out}", _Forgetful())
    with streams, pytest.raises(RaceError):
        list(passes(states, 3, 3))


class _Forgetful(dict[Any, Any]):
    def get(self, key: Any, default: Any = None) -> Any:
        return None


@pytest.mark.parametrize(
    "flags",
    ["--optimizer galore_adamw8bit_per_layer --rank 8", "--optimizer q_galore_adamw8bit_per_layer --recipe full_rank"],
)
def test_an_update_layer_by_layer_races_nowhere(flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All reads and writes of the model's own passes are checked, and the result is that of plain copies."""
    config = tmp_path / "model.json"
    config.write_text(json.dumps(CONFIG | {"num_hidden_layers": 3}))
    argv = f"--model_config {config} --dataset {tmp_path} --batch_size 2 --gradient_accumulation 3 --max_length 16"
    argv += f" --dtype float32 --device cpu --accumulate_by layer --compile off {flags}"
    args = parse_args(argv.split(), 1)
    found = []
    for streams in (None, ClockedStreams()):
        if streams is not None:
            make = lambda *sizes, streams=streams: streamed(streams, *sizes)  # noqa: E731
            monkeypatch.setattr(layer_by_layer, "hidden_states", make)
        model, optimizer = build_training(args, torch.device("cpu"))
        by_layer = LayerByLayer(model, optimizer)
        losses = []
        for update in range(3):
            ids = torch.randint(0, 256, (3, 2, 16), generator=torch.Generator().manual_seed(update))
            batches = [(each, each) for each in ids]
            with contextlib.nullcontext() if streams is None else streams:
                by_layer.forward(batches, lambda _: None, lambda: True)
                losses.append(by_layer.backward(90, lambda _: None))
                optimizer.step()
                optimizer.zero_grad()
        found.append((losses, model.state_dict(), optimizer.state_dict()["state"]))
        # A layer reads its input twice and writes its output and a gradient; the first one reads token ids.
        if streams is not None:
            assert streams.copies == 3 * 3 * (2 + 3 + 1 + 1 + 2 * 2 + 1 + 3 + 1)
    assert_same_bits(*found)


def test_free_host_memory_is_what_the_system_tells_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_text

    def read_text(path: Path, **named: Any) -> str:
        if path != Path("/proc/meminfo"):
            return read(path, **named)
        return "MemTotal:       65536000 kB\nMemFree:         1000000 kB\nMemAvailable:    3000000 kB\n"

    monkeypatch.setattr(Path, "read_text", read_text)
    assert free_host_bytes() == 3_000_000 * 1024


def test_free_host_memory_is_between_what_is_idle_and_what_there_is() -> None:
    """Of this machine; pages that are idle for a moment may be taken meanwhile."""
    free = free_host_bytes()
    if free is None:
        assert not Path("/proc/meminfo").exists()
    else:
        idle, all_pages = (
            os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES")
        )
        assert idle / 2 < free <= all_pages
