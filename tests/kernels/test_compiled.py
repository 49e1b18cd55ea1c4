"""Every Triton kernel compiled for GPUs that are not here, as their wrappers launch them.

The interpreter takes what a compiler refuses (two types from one function, say), and no GPU is
needed to compile for one. In a process of its own, as others read TRITON_INTERPRET on import.
"""

from pathlib import Path

import pytest
from tests.kernels.apart import needs_triton, run

PROGRAMME = """
import re
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from lorafit.kernels import cuda, elementwise, native, tiles, triton_attention, triton_source
from tests.kernels.test_elementwise import every_pass

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
         torch.int32: "*i32", torch.int64: "*i64", int: "i32", float: "fp32"}
TARGET = GPUTarget("cuda", ARCHITECTURE, 32)
made = set()

class Kernels:  # instead of launching, compiles
    def __init__(self, source): self.source = source
    def __getattr__(self, name): return Launch(getattr(self.source, name))

class Launch:
    def __init__(self, kernel): self.kernel = kernel
    def __getitem__(self, grid): return self
    def __call__(self, *given, **meta):
        options = {key: meta.pop(key) for key in ("num_warps", "num_stages") if key in meta}
        names = self.kernel.arg_names
        kinds = [TYPES[x.dtype if isinstance(x, torch.Tensor) else type(x)] for x in given]
        signature = dict(zip(names, kinds)) | dict.fromkeys(meta, "constexpr")
        assert signature.keys() == set(names), (self.kernel, names)
        signature = {name: signature[name] for name in names}
        constants = {(names.index(key),): value for key, value in meta.items()}
        compile(ASTSource(self.kernel, signature, constants), target=TARGET, options=options)
        made.add(self.kernel.__name__)

native.function = lambda *_: None
cuda.runs = lambda *_: True
cuda._kernels = lambda: Kernels(triton_source)
tiles._kernels = lambda: Kernels(triton_attention)
for dtype in (torch.bfloat16, torch.float32):
    every_pass(dtype)
    cuda._PROGRAMS = 1  # several blocks of rows to a program
    cuda.cross_entropy_(torch.zeros(8, 3000, dtype=dtype), torch.arange(8), 0.1, 5.0, 1.0)
for width in (64, 128):
    q, k, v = (torch.zeros(80, heads, width, dtype=torch.bfloat16) for heads in (6, 2, 2))
    table, how = tiles.table([80]), {"scale": 0.1, "window": 7}
    out, lse = tiles.forward((q, k, v), table, **how)
    tiles.backward(out, (q, k, v, out, lse), grads=(q, k, v), tiles_N3=table, **how)
sources = open(cuda.__file__).read() + open(tiles.__file__).read()
launched = set(re.findall(r"_kernels\\(\\)\\.(\\w+)", sources))
assert launched == made and len(made) == 12, launched ^ made
"""


@needs_triton
@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_every_kernel_compiles(architecture: int, tmp_path: Path) -> None:
    programme = PROGRAMME.replace("ARCHITECTURE", str(architecture))
    run(programme, TRITON_CACHE_DIR=str(tmp_path))
