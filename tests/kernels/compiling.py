"""Helper: compiles launches for GPUs that are not present and reads properties of the result.

Does not work in a process that runs Triton's interpreter.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels._launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "gfx942": 65_536}  # bytes
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass
class Compiled:
    registers: int
    spills: int  # bytes of stack, or registers on AMD
    shared: int  # bytes
    wide: int  # loads of 16 bytes from global memory
    loads: int  # loads from global memory, of any width
    matrix: int  # matrix instructions
    text: str


def compiled(launch: Launch, target: str) -> Compiled:
    """Compiles a launch, whose tensors may be on the meta device."""
    names = launch.kernel.arg_names
    assert set(launch.args) == set(names), set(launch.args) ^ set(names)
    constant = {p.name for p in launch.kernel.params if p.is_constexpr}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        value = launch.args[name]
        if name in constant or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value  # specialised, as by the launcher
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]  # PyTorch aligns to 512 bytes
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = launch.options(hip=target == "gfx942")
    made = triton.compile(source, target=TARGETS[target], options=options)
    return _amd(made) if target == "gfx942" else _nvidia(made)


def _nvidia(made) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        ran = subprocess.run(
            [str(CUOBJDUMP), "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", ran.stdout).groups())
    ptx = made.asm["ptx"]
    return Compiled(
        registers, stack, made.metadata.shared,
        wide=len(re.findall(r"ld\.global[.\w:]*\.(?:v4\.b32|v2\.b64|v8\.b32)", ptx)),
        loads=len(re.findall(r"ld\.global", ptx)),
        matrix=len(re.findall(r"mma\.sync|wgmma\.mma_async", ptx)), text=ptx,
    )  # fmt: skip


def _amd(made) -> Compiled:
    text = made.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

    return Compiled(
        number("vgpr_count"), number("vgpr_spill_count"),
        made.metadata.shared,
        wide=len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
        loads=len(re.findall(r"(?:global|buffer)_load_", text)),
        matrix=text.count("v_mfma"), text=text,
    )  # fmt: skip
