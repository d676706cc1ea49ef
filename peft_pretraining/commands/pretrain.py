"""Pretrain a model: the program `run_pretrain.py`, as a command of the installed package.

    qgalore pretrain --model_config NAME_OR_PATH --batch_size SEQUENCES [flags]
    torchrun --nproc_per_node 2 -m peft_pretraining pretrain ...

The first is one process, on one GPU or the CPU.
"""

from collections.abc import Sequence

from peft_pretraining.runtime.interrupt import ending_on_interrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code. One of several ranks ends the process here, as `run_pretrain.py` does."""
    with ending_on_interrupt("qgalore pretrain"):
        import run_pretrain
        from peft_pretraining.runtime.process import leave
        from peft_pretraining.runtime.rendezvous import world_size_of_launch

    code = run_pretrain.main(argv, "qgalore pretrain")
    if world_size_of_launch() > 1:
        leave(code)
    return code
