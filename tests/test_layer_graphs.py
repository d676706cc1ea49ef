"""The engine around the decoder layers: one compilation for all, and CUDA graphs that give the bits of plain calls."""

from __future__ import annotations

import copy
import hashlib
import json
import weakref
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters

from peft_pretraining.build import build_training
from peft_pretraining.checkpoint.run_state import tensors_here
from peft_pretraining.config.parse import parse_args
from peft_pretraining.models.llama.modeling import LlamaForCausalLM
from peft_pretraining.optim import layer_execution
from peft_pretraining.runtime.process import make_reproducible
from qgalore.graphs import runner
from qgalore.graphs.captured import CapturedStack
from qgalore.graphs.runner import LayerGraphs
from qgalore.optimizer import LowRankAdamW
from qgalore.optimizer.update_cycle import UpdateCycle
from qgalore.sharding.mesh import ShardMesh
from qgalore.update import step_table
from qgalore.update.all_reduce import Bucket
from qgalore.update.finite_checks import UpdateChecks
from qgalore.update.weight import Weight
from tests.recorded_graphs import RecordedGraph, RecordedStack, record_kernels
from tests.small_run import CONFIG


class SumOfOne:
    """The sum of a message over one rank; graphs neither begin it nor wait for it."""

    def __init__(self, message: Tensor) -> None:
        assert not in_graph()

    def wait(self) -> None:
        """It is there."""
        assert not in_graph()


QUANTIZED = "--optimizer q_galore_adamw8bit_per_layer --weight_quant --stochastic_round --proj_quant"
PER_LAYER = f"{QUANTIZED} --rank 8 --recipe paper"
STREAMING = f"{PER_LAYER} --subspace streaming"
CASES = {
    "streaming": STREAMING,
    "checkpointing": f"{STREAMING} --activation_checkpointing",
    "every second checkpointed": f"{STREAMING} --activation_checkpointing --checkpoint_every 2",
    "the first layer checkpointed": f"{STREAMING} --activation_checkpointing --checkpoint_layers 1",
    "int8 activations": f"{STREAMING} --int8_activations",
    "int8 activations, every second recomputed": (
        f"{STREAMING} --int8_activations --activation_checkpointing --checkpoint_every 2"
    ),
    "svd": PER_LAYER,
    "other side": f"{STREAMING} --proj_type reverse_std",
    "products in int8": f"{STREAMING} --int8_products",
    "products in fp8": f"{STREAMING} --fp8_products",
    "products in fp8, checkpointed": f"{STREAMING} --fp8_products --activation_checkpointing",
    "head in fp8": f"{STREAMING} --fp8_products --fp8_head",
    "gradients in fp8": (
        "--optimizer q_galore_adamw8bit_per_layer --weight_quant --stochastic_round --rank full --fp8_products "
        "--fp8_weight_gradients"
    ),
    "int4": f"{STREAMING} --weight_bits 4",
    "float weights": "--optimizer galore_adamw8bit_per_layer --rank 8 --weight_decay 0.1",
    "recipe": QUANTIZED,
    "second moments of rows": f"{QUANTIZED} --full_rank_second_moment row",
    "cautious decay": f"{QUANTIZED} --cautious_decay --weight_decay 0.5",
    "normuon": f"{QUANTIZED} --direction normuon",
    "full rank": "--optimizer q_galore_adamw8bit_per_layer --weight_quant --stochastic_round --rank full",
    "momentum in parts": (
        "--optimizer q_galore_adamw8bit_per_layer --weight_quant --stochastic_round --rank full --momentum_rank 1/8"
    ),
    "momentum in parts, two bits": (
        "--optimizer galore_adamw8bit --rank full --recipe orthogonal --momentum_rank 3 --momentum_rest_bits 2"
    ),
    "rounding feedback": (
        "--optimizer q_galore_adamw8bit_per_layer --weight_quant --stochastic_round --rank full "
        "--recipe orthogonal --rounding_feedback 1"
    ),
    "fira, limited": f"{STREAMING} --residual fira --norm_growth 1.01",
    "in step": STREAMING.replace("_per_layer", ""),
    "clipping": f"{STREAMING} --grad_clipping 0.5".replace("_per_layer", ""),
    "sums": f"{STREAMING} --gradient_accumulation 3",
    "int8 sums": f"{STREAMING} --gradient_accumulation 3 --grad_accum_dtype int8 --activation_checkpointing",
    "float16, fixed scale": f"{STREAMING} --dtype float16 --loss_scale 1024",
    "float16, sums": f"{STREAMING} --dtype float16 --gradient_accumulation 3",
    "bfloat16 sums, svd": f"{PER_LAYER} --gradient_accumulation 2 --grad_accum_dtype bfloat16",
}

SUMMED = [("streaming", True), pytest.param("int8 sums", True, marks=pytest.mark.slow), ("fira, limited", True)]
"""Cases that are tried as on several ranks, too."""


def trained(
    folder: Path,
    device: str,
    flags: str,
    updates: int = 9,
    waits_from: int = 99,
    sums: bool = False,
    mesh: ShardMesh | None = None,
    overflows: int = -1,
    flag_each: bool = True,
) -> tuple[list[float], str, LlamaForCausalLM]:
    """Losses, a hash of all weights and states, and the model after some updates; the sixth is skipped.

    From update `waits_from` on it is an error to wait for the device inside an update. In update `overflows` the
    gradient of the embeddings alone, which is the last, is infinite: too late for updates inside the backward pass.
    flag_each: whether each update gets a flag that may skip it, and not the sixth alone.
    """
    config = folder / "model.json"
    tied = {"tie_word_embeddings": "tied" in flags}
    flags = flags.replace("tied", "")
    config.write_text(json.dumps(CONFIG | {"num_hidden_layers": 3, "intermediate_size": 85} | tied))
    argv = f"--model_config {config} --dataset {folder} --batch_size 4 --num_training_steps 100 --wandb_mode off"
    gap = "" if "--rank full" in flags else "--update_proj_gap 3"
    argv += f" --save_dir {folder}/run {gap} --max_length 32 --device {device} {flags}"
    args = parse_args(argv.split(), 1 if mesh is None else mesh.size)
    model, optimizer = build_training(args, torch.device(device), SumOfOne if sums else None, mesh)
    assert isinstance(model, LlamaForCausalLM)
    losses: list[float] = []
    embeddings = model.get_submodule("model.embed_tokens")
    embeddings.register_forward_hook(lambda _, __, x: _spoil(x) if len(losses) == overflows else None)
    for step in range(updates):
        shape = (args.batch.gradient_accumulation, 4, 32)
        batches = torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(step)).to(device)
        flag = torch.tensor(step == 5, device=device)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, step / 4)
        if step >= waits_from:
            torch.cuda.set_sync_debug_mode("error")
        total = torch.zeros((), device=device)
        for micro_step, ids in enumerate(batches, start=1):
            optimizer.is_last_micro_batch = micro_step == len(batches)
            loss = model(ids, ids).loss_sum / batches.numel()
            assert loss is not None
            if optimizer.is_last_micro_batch and (flag_each or step == 5):
                optimizer.skip_update_if(flag)
            (loss if optimizer.loss_scale is None else optimizer.loss_scale.scaled(loss)).backward()
            total += loss.detach()
        if args.optimizer.grad_clipping:
            optimizer.clip_grad_norm_(args.optimizer.grad_clipping)
        optimizer.step()
        norm = optimizer.grad_norm()
        if optimizer.loss_scale is not None:
            optimizer.loss_scale.update_(optimizer.skipped())
        if step >= waits_from:
            torch.cuda.set_sync_debug_mode("default")
        assert bool(optimizer.skipped()) == (step in (5, overflows))
        assert bool(optimizer.late_overflow()) == (step == overflows and "_per_layer" in flags)
        assert float(norm) > 0 or step == overflows
        optimizer.zero_grad()
        losses.append(float(total))
    digest = hashlib.sha256()
    states = (value for state in optimizer.state_dict()["state"].values() for value in state.values())
    for tensor in (*tensors_here(model, optimizer).values(), *states):
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return losses, digest.hexdigest(), model


def _spoil(output: Tensor) -> None:
    output.register_hook(lambda grad: grad * float("inf"))


@pytest.mark.parametrize("case", ["streaming", "checkpointing", "float weights"])
def test_one_compilation_serves_all_layers_and_changes_nothing(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trained(tmp_path, "cpu", f"{CASES[case]} --compile off --dtype float32", 4)
    torch._dynamo.reset()
    counters.clear()
    compile_layers = LlamaForCausalLM.compile_layers
    # Without a C++ compiler: the same graphs, not lowered to machine code.
    monkeypatch.setattr(LlamaForCausalLM, "compile_layers", lambda model: compile_layers(model, "aot_eager"))
    compiled = trained(tmp_path, "cpu", f"{CASES[case]} --compile on --dtype float32", 4)
    assert compiled[:2] == plain[:2]
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(("case", "sums"), [("svd", False), ("clipping", False), *SUMMED])
def test_the_order_of_the_graphs_gives_the_bits_of_autograd(
    case: str, sums: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = f"{CASES[case]} --dtype float32"
    plain = trained(tmp_path, "cpu", flags, sums=sums)
    calls = []

    def layer_by_layer(model: LlamaForCausalLM, optimizer: LowRankAdamW) -> None:
        def run(layer: nn.Module, *inputs: Tensor) -> Tensor:
            calls.append(layer)
            out: Tensor = layer(*inputs)
            return out

        model.model.run_layers = LayerGraphs(list(model.model.layers), run, optimizer)

    monkeypatch.setattr(layer_execution, "can_replay", lambda *_: True)
    monkeypatch.setattr(layer_execution, "replay_layers", layer_by_layer)
    assert trained(tmp_path, "cpu", flags, sums=sums)[:2] == plain[:2]
    assert len(calls) % (3 * 9) == 0 and calls


def in_graph() -> bool:
    return RecordedGraph.recording is not None


def skip_for_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the host does not know whether an update is skipped."""
    monkeypatch.setattr(UpdateChecks, "skip_for_kernels", lambda checks: checks.skip)


def record_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs on the CPU go as from graphs, in which no step row can be written."""
    write = step_table._write

    def write_outside(rows: Tensor, values: object) -> None:
        assert not in_graph(), "a graph would write the rows of its capture again"
        write(rows, values)

    skip_for_kernels(monkeypatch)
    record_kernels(monkeypatch)
    monkeypatch.setattr(step_table, "_write", write_outside)
    monkeypatch.setattr(step_table, "is_capturing", lambda device: in_graph())

    def layer_by_layer(model: LlamaForCausalLM, optimizer: LowRankAdamW) -> None:
        model.model.run_layers = LayerGraphs(list(model.model.layers), lambda layer, *x: layer(*x), optimizer)

    monkeypatch.setattr(layer_execution, "allows_graphs", lambda _: True)
    monkeypatch.setattr(layer_execution, "can_replay", lambda *_: True)
    monkeypatch.setattr(layer_execution, "replay_layers", layer_by_layer)
    monkeypatch.setattr(runner, "CapturedStack", RecordedStack)
    monkeypatch.setattr(runner, "_can_capture", lambda _: True)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)


@pytest.mark.parametrize(("case", "sums"), [*((case, False) for case in CASES), *SUMMED])
def test_recorded_graphs_give_the_bits_of_plain_calls(
    case: str, sums: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = CASES[case] if "--dtype" in CASES[case] else f"{CASES[case]} --dtype float32"
    plain = trained(tmp_path, "cpu", flags, sums=sums)
    record_graphs(monkeypatch)
    recorded = trained(tmp_path, "cpu", flags, sums=sums)
    assert recorded[:2] == plain[:2]
    graphs = recorded[2].model.run_layers
    assert isinstance(graphs, LayerGraphs) and graphs.replays
    sums = [weight.gradient._sums for weight in graphs._optimizer.low_rank_weights()]
    assert all(each.keys() == {"gradient"} for each in sums), "no full gradient is kept"


LATE = {
    "tied": f"{CASES['full rank']} tied",
    "tied, float weights": "--optimizer galore_adamw8bit_per_layer --rank full --recipe orthogonal tied",
    "untied": CASES["full rank"],
    "tied, in step": f"{CASES['full rank']} tied".replace("_per_layer", ""),
}
"""With a tied head nothing that Python updates comes before the layers, and the embeddings come after them. A subspace
that is refreshed would take a layer out of its graph."""


@pytest.mark.parametrize(("case", "flag_each"), [*((case, True) for case in LATE), ("tied", False)])
def test_recorded_graphs_tell_of_an_overflow_that_comes_too_late(
    case: str, flag_each: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an update that is replayed, after one that was; what is left is of no update, and differs."""
    flags = f"{LATE[case]} --dtype float32"
    plain = trained(tmp_path, "cpu", flags, overflows=7, flag_each=flag_each)
    record_graphs(monkeypatch)
    recorded = trained(tmp_path, "cpu", flags, overflows=7, flag_each=flag_each)
    assert recorded[0][:8] == plain[0][:8]
    graphs = recorded[2].model.run_layers
    assert isinstance(graphs, LayerGraphs) and graphs.replays


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("case", LATE)
def test_graphs_tell_of_an_overflow_that_comes_too_late(case: str, tmp_path: Path) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        model = trained(tmp_path, "cuda", LATE[case], overflows=7)[2]
    graphs = model.model.run_layers
    assert isinstance(graphs, LayerGraphs) and graphs.replays


@pytest.mark.parametrize("captures", [False, True])
def test_no_bucket_outlives_its_updates(captures: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is made while the other is under way, and graphs have two buffers for them."""
    record_graphs(monkeypatch)
    monkeypatch.setattr(runner, "_can_capture", lambda _: captures)
    bucket_of, alive, most = UpdateCycle.bucket_of, weakref.WeakSet[Bucket](), []

    def watched(cycle: UpdateCycle, weights: list[Weight], buffer: Tensor | None = None) -> Bucket | None:
        bucket = bucket_of(cycle, weights, buffer)
        assert bucket is not None
        if buffer is None or bucket.buffer.data_ptr() != buffer.data_ptr():
            alive.add(bucket)
            assert not RecordedStack.in_pool, "a graph of the layer below would write over it"
        most.append(len(alive))
        return bucket

    monkeypatch.setattr(UpdateCycle, "bucket_of", watched)
    trained(tmp_path, "cpu", f"{CASES['streaming']} --dtype float32", sums=True)
    assert max(most) == 2 and not alive


def test_two_forward_passes_at_once_go_without_graphs_or_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    record_graphs(monkeypatch)
    layers = [nn.Linear(6, 6), nn.Linear(6, 6)]
    optimizer = LowRankAdamW([parameter for layer in layers for parameter in layer.parameters()], lr=0.02)
    optimizer.attach(nn.ModuleList(layers))
    graphs = LayerGraphs(layers, lambda layer, x: layer(x), optimizer)
    optimizer.is_last_micro_batch = False

    def train(forward_passes: int) -> None:
        outputs = [graphs(torch.randn(3, 6, requires_grad=True)) for _ in range(forward_passes)]
        torch.cat(outputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    train(2)
    train(1)
    assert graphs.replays
    train(1)
    with pytest.raises(RuntimeError, match="activations of their newest forward pass alone"):
        train(2)


@pytest.mark.parametrize("rows", [3, 2])
def test_a_forward_pass_that_fails_in_its_capture_is_captured_anew(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory ends in it, and the caller tries again, or with a smaller batch."""
    record_graphs(monkeypatch)
    found = []
    for fails in (False, True):
        torch.manual_seed(0)
        layers = [nn.Linear(6, 6) for _ in range(3)]
        optimizer = LowRankAdamW([parameter for layer in layers for parameter in layer.parameters()], lr=0.02)
        optimizer.attach(nn.ModuleList(layers), update_in_backward=True)
        graphs = LayerGraphs(layers, lambda layer, x: layer(x), optimizer)
        losses = []
        for step in range(6):
            x = torch.randn(3 if step < 2 else rows, 6, generator=torch.Generator().manual_seed(step))
            if step == 2 and fails:
                hook = layers[1].register_forward_pre_hook(_fail)
                with pytest.raises(torch.OutOfMemoryError):
                    graphs(torch.randn(3, 6, requires_grad=True))
                hook.remove()
            loss = graphs(x.requires_grad_()).square().sum()
            loss.backward()
            losses.append(float(loss.detach()))
            optimizer.step()
            optimizer.zero_grad()
        assert graphs.replays and graphs._captured is not None and graphs._captured.serves(x)
        found.append((losses, [layer.weight.tolist() for layer in layers]))
    assert found[0] == found[1]


def _fail(*_: object) -> None:
    raise torch.OutOfMemoryError("in the capture")


@pytest.mark.parametrize("change", ["group", "state"])
def test_graphs_are_void_after_another_group_or_state(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record_graphs(monkeypatch)
    layers = [nn.Linear(6, 6), nn.Linear(6, 6)]
    optimizer = LowRankAdamW([parameter for layer in layers for parameter in layer.parameters()], lr=0.02)
    optimizer.attach(nn.ModuleList(layers), update_in_backward=change == "state")
    graphs = LayerGraphs(layers, lambda layer, x: layer(x), optimizer)
    empty = copy.deepcopy(optimizer.state_dict())
    begins = []
    init_state = Weight.init_state

    def noted(weight: Weight) -> None:
        if not weight.state:
            begins.append(graphs.replays)
        init_state(weight)

    monkeypatch.setattr(Weight, "init_state", noted)

    def train(steps: int) -> None:
        for _ in range(steps):
            graphs(torch.randn(3, 6, requires_grad=True)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    train(4)
    before = graphs._captured
    assert before is not None
    if change == "group":
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    else:
        optimizer.load_state_dict(empty)
    train(3)
    assert graphs._captured not in (before, None)
    assert begins and not any(begins), "a state began in a graph"


def test_a_cpu_neither_compiles_nor_captures(tmp_path: Path) -> None:
    model = trained(tmp_path, "cpu", CASES["streaming"], 1)[2].model
    assert model.compiled_layer is None and model.run_layers is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("case", "sums"), [*((case, False) for case in CASES), *SUMMED])
def test_graphs_give_the_bits_of_plain_calls(case: str, sums: bool, tmp_path: Path) -> None:
    make_reproducible()
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            plain = trained(tmp_path, "cuda", f"{CASES[case]} --cuda_graphs off", sums=sums)
            replayed = trained(tmp_path, "cuda", CASES[case], sums=sums)
    finally:
        torch.use_deterministic_algorithms(False)
    assert replayed[:2] == plain[:2]
    assert plain[2].model.run_layers is None
    graphs = replayed[2].model.run_layers
    assert isinstance(graphs, LayerGraphs) and graphs.replays


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("graphs", ["auto", "off"])
def test_nothing_waits_for_the_device_in_a_steady_update(graphs: str, tmp_path: Path) -> None:
    # From the tenth update on every subspace has had its first refresh, from random numbers of the host.
    with torch.cuda.stream(torch.cuda.Stream()):
        trained(tmp_path, "cuda", f"{CASES['streaming']} --cuda_graphs {graphs}", 20, waits_from=14)


def test_a_capture_that_fails_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the stream would go on capturing, and every later error would be about that."""
    calls = []

    class Graph:
        def capture_begin(self, **_: object) -> None:
            calls.append("begin")

        def capture_end(self) -> None:
            calls.append("end")

    def work() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    stack = object.__new__(CapturedStack)
    stack._pool = None
    with pytest.raises(ZeroDivisionError):
        stack._capture(work)
    assert calls == ["begin", "end"]
