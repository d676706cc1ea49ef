"""What tests of kernels in Triton's interpreter need of it."""

import importlib.util
import os
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from triton.runtime import interpreter

    _patch_lang_tensor: Any = interpreter._patch_lang_tensor

    def _count_with_arrays(tensor: Any, scope: Any) -> None:
        """Let loops of Triton 3.6, which PyTorch 2.11 comes with, run under NumPy 2.4.

        Their bounds are arrays of one element, which that NumPy no longer takes for numbers.
        """
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _count_with_arrays
