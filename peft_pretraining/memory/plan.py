"""The memory that a run needs on one device, by component, worked out before anything is built.

What stays for the whole run is exact to the byte. Of what comes and goes the largest phase counts. All ranks need the
same, unless `--shard` deals states to them: then the fullest rank is planned. Measured peaks are up to one per cent
higher: PyTorch's allocator leaves up to 1 MiB of a block unused, and the tensors that are smaller than a matrix's side
are not counted one by one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.memory.dealt_states import bytes_by_rank
from peft_pretraining.memory.lasting import GATHERED, GRADIENTS, REFRESHES, SLOTS, lasting_bytes
from peft_pretraining.memory.offloaded import offloaded
from peft_pretraining.memory.passing import PassingBytes
from peft_pretraining.memory.passing_by_layer import PassingByLayer
from peft_pretraining.memory.planned_run import PlannedRun
from peft_pretraining.models.config import ModelConfig

_WORKSPACES = 2 * (32 << 20)
"""Of cuBLAS, as `run_pretrain.py` sets CUBLAS_WORKSPACE_CONFIG, in the forward pass's thread and in autograd's."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by component: `lasting` and `overhead` stay; of the phases in `passing` only the largest counts."""

    lasting: dict[str, int]
    passing: dict[str, int]
    activations: int
    """What the backward pass keeps of the forward one; the phases of the backward pass include it."""
    overhead: dict[str, int]
    """What the way of running takes on a GPU: workspaces, and memory that CUDA graphs hold."""
    of: str = "one rank"
    """Whose memory it is."""
    hidden_states: int = 0
    """Bytes of host memory for the outputs of layers, with `--accumulate_by layer`."""
    waiting: int = 0
    """Bytes of host memory for weights and states that wait for their layer, with `--offload`."""

    @property
    def host(self) -> int:
        """Bytes of host memory that the run takes for what would else be on the device."""
        return self.hidden_states + self.waiting

    @property
    def weights_and_states_bytes(self) -> int:
        """Weights and optimizer states alone, on device and host: the estimate that the papers' tables give."""
        others = (GRADIENTS, REFRESHES, GATHERED, SLOTS)
        return self.waiting + sum(size for name, size in self.lasting.items() if name not in others)

    @property
    def peak_bytes(self) -> int:
        """The planned peak."""
        return sum(self.lasting.values()) + sum(self.overhead.values()) + max(self.passing.values())

    def table(self) -> str:
        """The plan as text, in GB (10^9 bytes)."""
        largest = max(self.passing, key=lambda name: self.passing[name])
        passing = {f"{name} *" if name == largest else name: size for name, size in self.passing.items()}
        sums = {"weights and optimizer states": self.weights_and_states_bytes, "peak": self.peak_bytes}
        parts = {
            "kept during the run": {name: size for name, size in (self.lasting | self.overhead).items() if size},
            "passing, of which the largest (*) counts": passing | {"of these, activations": self.activations},
            "together": sums,
        }
        lines = [f"Planned memory of {self.of}"]
        for title, sizes in parts.items():
            lines += [f"{title}:", *(f"  {name:<44}{size / 1e9:>10.3f} GB" for name, size in sizes.items())]
        if self.host:
            waits = {"weights and states of layers": self.waiting, "hidden states": self.hidden_states}
            of_what = ", ".join(f"{size / 1e9:.3f} GB of {name}" for name, size in waits.items() if size)
            lines.append(f"host memory of one rank: {of_what}")
        return "\n".join(lines)


def plan(args: RunArgs, config: ModelConfig) -> MemoryPlan:
    """The planned memory of one rank of this run; takes a fraction of a second for any model size."""
    planned = plan_of_run(run := PlannedRun(args, config), lasting_bytes(run), _whose(run))
    return replace(planned, waiting=offloaded(run).on_host)


def plan_of_run(run: PlannedRun, lasting: dict[str, int], of: str = "one rank") -> MemoryPlan:
    """The planned memory of a run of which it is known what lasts, and whose that is, which takes as long to find.

    With `--offload` that of the device.
    """
    overhead = {"workspaces of cuBLAS": _WORKSPACES} if run.cuda else {}
    if run.args.by_layer:
        by_layer = PassingByLayer(run)
        overhead |= by_layer.overhead()
        return MemoryPlan(lasting, by_layer.phases(), by_layer.kept, overhead, of, by_layer.host())
    passing = PassingBytes(run)
    overhead |= {"memory of CUDA graphs": passing.kept_by_graphs()} if run.graphs else {}
    counted = run.graphs and run.args.updates_immediately
    if run.args.owners_sum and not counted:
        overhead |= {"gradients of two layers on their way": passing.messages()}
    return MemoryPlan(lasting, passing.phases(), passing.kept, overhead, of)


def _whose(run: PlannedRun) -> str:
    if run.shards == 1:
        return "one rank"
    shard, totals = run.args.runtime.shard, [sum(each) for each in bytes_by_rank(run, run.shards)]
    what = "weights and optimizer states" if run.args.gathers_layers else "optimizer states"
    return (
        f"the fullest of {run.shards} ranks (--shard {shard}: {what} of {min(totals) / 1e9:.3f} to "
        f"{max(totals) / 1e9:.3f} GB a rank)"
    )
