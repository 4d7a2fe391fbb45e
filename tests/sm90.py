"""Compiles Triton kernels for Hopper on a machine without a card; the interpreter has to be off, so in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from conftest import REPOSITORY

_PROGRAM = """
import collections, importlib, json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
for module, name, signature, constants, options, *divisible in json.loads(sys.argv[1]):
    kernel = getattr(importlib.import_module(module), name)
    signature |= {key: "constexpr" for key in constants}
    attributes = {(kernel.arg_names.index(key),): [["tt.divisibility", 16]] for key in (divisible or [[]])[0]}
    source = ASTSource(fn=kernel, signature={key: signature[key] for key in kernel.arg_names}, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.asm["cubin"]
    print(json.dumps(collections.Counter(re.findall(r"(?:ld|st)\\.global[.\\w]*", compiled.asm["ptx"]))))
"""


def compile_for_sm90(*kernels: tuple) -> list[dict[str, int]]:
    """Compiles each kernel to machine code; returns how often each kind of access to global memory is in its PTX ("ld.global.v4.b32").

    Args:
        kernels: module, name, types of the arguments that are not constants, values of the others, launch options; and, where
            given, names of arguments that are multiples of 16 (addresses: of 16 bytes), as Triton finds out at a launch.
    """
    order = json.dumps(kernels)
    environ = os.environ | {"PYTHONPATH": str(REPOSITORY), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", _PROGRAM, order], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    accesses = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(accesses) == len(kernels)
    return accesses
