"""Triton's interpreter, corrected: the same kernels on a CPU, with the arithmetic that a GPU would do.

Triton 3.6 to 3.9 keeps bfloat16 as 16-bit integers in its interpreter. ``tl.dot`` multiplies those integers, the cast
to bfloat16 truncates, and every ``tl.dot`` is one ``numpy.matmul``, whose bits depend on the number of rows.
``install`` replaces two things in ``InterpreterBuilder``:

- ``create_dot`` widens the operands to float64, goes over k in groups of 16, adds each group's product to the
  accumulator and rounds it to float32, as ``mma.m16n8k16`` does in effect. Bits no longer depend on the tile's shape.
- casts from bfloat16 shift the bits up; casts to it, from integers too, round to nearest even.

Triton 3.9 leaves integers in a mask that a number given at run time is part of, and then refuses it: masks are made
boolean. Triton 3.6 turns an array of one element into a loop's bound in a way that NumPy 2.4 refuses; that is mended
too.

It also stops a nested jit function from patching ``triton.language`` again at each call, which is most of the time
that small programs take.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

GROUP = 16  # depth of the tensor-core instruction that ``create_dot`` imitates

_originals: dict[tuple[Any, str], Any] = {}


def interpreting() -> bool:
    """Whether this process's Triton interprets kernels. Imports Triton if nothing has yet."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(tl.cdiv, InterpretedFunction)


def install() -> None:
    """Put the correction in place; a second call does nothing.

    Sets ``TRITON_INTERPRET=1`` if Triton has not been imported yet.

    Raises:
        ValueError: Triton was imported before, in compiled mode: one process has one mode.
    """
    if _originals:
        return
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    if not interpreting():
        raise ValueError(
            "triton was imported in compiled mode in this process, and one process has one mode; "
            "set TRITON_INTERPRET=1 before anything imports triton"
        )
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    _replace(InterpreterBuilder, "create_dot", lambda _: _create_dot)
    _replace(InterpreterBuilder, "cast_impl", _corrected_cast)
    _replace(InterpreterBuilder, "create_fp_ext", _corrected_cast)
    _replace(InterpreterBuilder, "create_fp_trunc", _corrected_cast)
    _replace(InterpreterBuilder, "create_fp_to_fp", _corrected_cast)
    _replace(InterpreterBuilder, "create_masked_load", _boolean_mask(1))
    _replace(InterpreterBuilder, "create_masked_store", _boolean_mask(2))
    _replace(InterpretedFunction, "__call__", _patching_once)
    _replace(interpreter, "_patch_lang_tensor", _with_index)


def uninstall() -> None:
    """Take the correction out again: for the test that shows what it is for."""
    for (owner, name), original in _originals.items():
        setattr(owner, name, original)
    _originals.clear()


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    original = getattr(owner, name)
    _originals[owner, name] = original
    setattr(owner, name, make(original))


def bf16_to_float32(bits: Any) -> Any:
    """bfloat16 bit patterns (uint16) to float32, exactly."""
    import numpy as np

    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bf16(values: Any) -> Any:
    """float32 to bfloat16 bit patterns (uint16), to the nearest, ties to even; NaN stays NaN."""
    import numpy as np

    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16).reshape(np.shape(values))


def _corrected_cast(original: Any) -> Any:
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def cast(self: Any, src: Any, dst_type: Any, *rounding: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if (source == tl.bfloat16) == (target == tl.bfloat16):
            return original(self, src, dst_type, *rounding)
        if source == tl.bfloat16:
            wide = TensorHandle(bf16_to_float32(src.data), tl.float32)
            return wide if target == tl.float32 else self.cast_impl(wide, dst_type)
        return TensorHandle(float32_to_bf16(src.data.astype(np.float32)), tl.bfloat16)

    return cast


def _create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def widen(x: Any) -> Any:
        data = bf16_to_float32(x.data) if x.dtype.scalar == tl.bfloat16 else x.data
        return data.astype(np.float64)

    left, right = widen(a), widen(b)
    total = d.data.astype(np.float32)
    for k in range(0, left.shape[-1], GROUP):
        product = left[..., :, k : k + GROUP] @ right[..., k : k + GROUP, :]
        total = (total.astype(np.float64) + product).astype(np.float32)
    return TensorHandle(total, d.dtype.scalar)


def _boolean_mask(place: int) -> Callable[[Any], Any]:
    """What makes the mask, the argument at this place, boolean before a load or store."""

    def make(original: Any) -> Any:
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        def call(builder: Any, *args: Any) -> Any:
            mask = args[place]
            if mask.data.dtype != bool:
                args = (*args[:place], TensorHandle(mask.data.astype(bool), tl.int1), *args[place + 1 :])
            return original(builder, *args)

        return call

    return make


def _with_index(original: Any) -> Any:
    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch


def _patching_once(original: Any) -> Any:
    import triton.language as tl

    languages: dict[Any, list[Any]] = {}  # jit function -> the modules of triton.language that it sees

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn not in languages:
            languages[self.fn] = [m for m in self.fn.__globals__.values() if m is tl or m is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages[self.fn]):
            return original(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    return call
