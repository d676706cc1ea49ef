"""What tests of kernels in Triton's interpreter need of it."""

import importlib.util
import inspect
import os
from dataclasses import replace
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from triton.runtime import interpreter

    _patch_lang_tensor: Any = interpreter._patch_lang_tensor
    _patch_lang: Any = interpreter._patch_lang
    _in_place: set[str] = set()
    """Modules whose operations are the interpreter's, as long as a kernel runs."""

    def _count_with_arrays(tensor: Any, scope: Any) -> None:
        """Let loops of Triton 3.6, which PyTorch 2.11 comes with, run under NumPy 2.4.

        Their bounds are arrays of one element, which that NumPy no longer takes for numbers.
        """
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def _patch_lang_once(function: Any) -> Any:
        """Put the interpreter's operations in place once a launch, and not with each call of a function in it.

        Triton looks through all of its language each time, which takes a third of the time of our kernels.
        """
        modules = {value.__name__ for value in function.__globals__.values() if inspect.ismodule(value)}
        languages = modules & {"triton.language", "triton.language.core"}
        if languages and languages <= _in_place:
            return interpreter._LangPatchScope()
        is_launch, scope = not _in_place, _patch_lang(function)
        _in_place.update(languages)
        if is_launch:
            restore = scope.restore
            scope.restore = lambda: (_in_place.clear(), restore())
        return scope

    interpreter._patch_lang_tensor = _count_with_arrays
    interpreter._patch_lang = _patch_lang_once
    if not interpreter.interpreter_builder.options.debug:
        # What would be compared with the largest integer is computed, and then no assertion is made of it.
        unchecked = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
        interpreter.interpreter_builder.options = unchecked
