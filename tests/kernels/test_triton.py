"""Triton's passes against plain torch, in Triton's interpreter: their logic, without a GPU.

In a process of its own, as Triton reads how it is to run when it is imported. bfloat16 is left to
tests/gpu: the interpreter cuts where hardware rounds.
"""

from tests.kernels.apart import needs_triton, run

PROGRAMME = """
import torch
from lorafit.kernels import cross_entropy, cuda, elementwise, native
from tests.kernels.test_elementwise import every_pass, values

native.function = lambda *_: None
for dtype, rounding in ((torch.float32, 1e-6), (torch.float16, 1e-3)):
    plain = every_pass(dtype)
    cuda.runs = lambda *_: True
    ours = every_pass(dtype)
    heads = [cross_entropy.Head(torch.empty(0), cap, share) for cap in (0, 5) for share in (0, .1)]
    targets = torch.arange(37)
    for number, head in enumerate(heads):
        for found, runs in ((ours, True), (plain, False)):
            cuda.runs = lambda *_, runs=runs: runs
            logits = values(37, 3000, dtype=dtype)
            found[f"nats {number}"] = cross_entropy._nats_(logits, targets, head=head)
            found[f"logits {number}"] = logits
    for name, expected in plain.items():
        error = (ours[name].double() - expected.double()).norm() / expected.double().norm()
        assert float(error) < rounding, (name, float(error))
    assert torch.equal(ours["dropped"], plain["dropped"])
cuda.runs, cuda._PROGRAMS = lambda *_: True, 1  # several blocks of rows to a program
for T, F, ranks in ((200, 130, (5, 17)), (300, 64, (33, 1)), (70, 200, (0, 5)), (70, 200, (5, 0))):
    both, dh = (values(T, width, dtype=torch.float16) for width in (2 * F, F))
    low, low_dh = (
        (values(T, r, dtype=torch.float16), values(width, r, dtype=torch.float16)) if r else None
        for r, width in zip(ranks, (2 * F, F))
    )
    made = []
    for runs in (True, False):
        cuda.runs = lambda *_, runs=runs: runs
        grads = both.clone()
        made.append([elementwise.swiglu(both, low=low), grads])
        made[-1].append(elementwise.swiglu_backward_(grads, dh.clone(), low=low, low_dh=low_dh))
    for one, other in zip(*made):
        assert (one.double() - other.double()).norm() / other.double().norm() < 1e-3, (T, F, ranks)
lost = cuda.cross_entropy_(values(2, 30, dtype=torch.float32), torch.tensor([3, 30]), 0, 0, 1)
assert lost.isfinite().tolist() == [True, False], "a label beyond the vocabulary"
"""


@needs_triton
def test_triton_passes_are_the_plain_ones() -> None:
    run(PROGRAMME, TRITON_INTERPRET="1")
