"""Triton kernels, one file for each family of operators: kernels, then the launcher. Imported by dispatch alone."""

from importlib import import_module
from pathlib import Path

from triton.runtime.jit import JITFunction

_FIRST = ["nf4", "dropout", "qlora_linear"]  # what the others call


def _take_keys() -> None:
    """Have Triton compute the key of each function under which its cache on disk has it, callees before callers.

    Triton 3.7 makes the key of a function from constants of those of its callees whose keys are known by then. Left to
    itself it would compile a kernel anew in a process that uses kernels in another order than the one before.
    """
    names = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
    for name in sorted(names, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST)):
        for value in vars(import_module(f"{__name__}.{name}")).values():
            if isinstance(value, JITFunction) and value.fn.__module__ == f"{__name__}.{name}":
                _ = value.cache_key  # in the order of the file


_take_keys()
