"""Private names of PyTorch: all in one list, and all there in the release that is installed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qgalore import torch_internals
from qgalore.torch_internals import NAMES, internal, set_for_process
from tests.small_run import ROOT

PRIVATE = re.compile(r"torch(?:\.\w+)*\._[a-zA-Z]\w*(?:\.\w+)*")


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there(name: str) -> None:
    if "._cuda_" in name and torch.version.cuda is None:
        pytest.skip("this build of PyTorch is without CUDA")
    assert internal(name) is not None


def test_what_is_gone_is_named_with_the_release(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch._inductor.no_such_module.name", "torch._C._no_such_function", "torch.ops.aten._no_such_op"):
        monkeypatch.setitem(NAMES, name, "a test")
        with pytest.raises(RuntimeError, match=rf"^PyTorch {re.escape(torch.__version__)} has no {name}, .*for a test"):
            internal(name)
    with pytest.raises(KeyError):
        internal("torch._not_in_the_list")


def test_a_setting_is_set() -> None:
    with torch._functorch.config.patch(donated_buffer=True):
        set_for_process("torch._functorch.config.donated_buffer", False)
        assert torch._functorch.config.donated_buffer is False


def private_names(path: Path) -> Iterator[str]:
    """The private names of torch that the code of a file spells, those in strings and comments aside."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and (found := PRIVATE.fullmatch(ast.unparse(node))):
            yield found.group()
        if isinstance(node, ast.ImportFrom) and (found := PRIVATE.fullmatch(f"{node.module}.{node.names[0].name}")):
            yield found.group()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if PRIVATE.fullmatch(alias.name))


def test_no_other_file_uses_a_private_name() -> None:
    """But an operator of the list, which `torch.compile` has to see as one."""
    files = [path for folder in ("qgalore", "peft_pretraining", "scripts") for path in (ROOT / folder).rglob("*.py")]
    allowed = {name for name in NAMES if name.startswith("torch.ops.")}
    found = {
        str(path.relative_to(ROOT)): names
        for path in [*files, ROOT / "run_pretrain.py"]
        if (names := {name for name in private_names(path) if not any(name.startswith(a) for a in allowed)})
    }
    assert found == {}
    own = Path(torch_internals.__file__).read_text(encoding="utf-8")
    used_here = {name for name in NAMES if own.count(name) > 1}
    others = "".join(path.read_text(encoding="utf-8") for path in files if path.name != "torch_internals.py")
    assert {name for name in NAMES if name in others} | used_here == set(NAMES), "each has a use"
