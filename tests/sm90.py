"""Compiles Triton kernels for Hopper on a machine without a card; the interpreter has to be off, so in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from conftest import REPOSITORY

_PROGRAM = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
for module, name, signature, constants, options in json.loads(sys.argv[1]):
    kernel = getattr(importlib.import_module(module), name)
    signature |= {key: "constexpr" for key in constants}
    source = ASTSource(fn=kernel, signature={key: signature[key] for key in kernel.arg_names}, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]
    print("compiled")
"""


def compile_for_sm90(*kernels: tuple[str, str, dict[str, str], dict[str, object], dict[str, int]]) -> None:
    """Compiles each kernel to machine code.

    Args:
        kernels: module, name, types of the arguments that are not constants, values of the others, launch options.
    """
    order = json.dumps(kernels)
    environ = os.environ | {"PYTHONPATH": str(REPOSITORY), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", _PROGRAM, order], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["compiled"] * len(kernels)
