"""The rate at which a GPU evaluates PolyReLU of degree 8 in registers: activation_rate.cpp in Triton."""

import torch
import triton
import triton.language as tl

from mixfeat.kernels.triton.activation import Kind, add_phi_of_sum, mul_slope_of_sum

from .timing import Contender, compare

__all__ = ["BLOCK", "evaluate", "rates"]

BLOCK, ROUNDS = 2048, 4096  # 16 entries per thread: enough to fill its pipeline
POLY_RELU_8 = Kind(degree=8, lower=True, upper=True)


@triton.jit
def evaluate(output, rounds, ACTIVATION: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """Evaluate ``rounds`` activations, or slopes, for each entry of output, (programs * BLOCK,)."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK).to(tl.float32) / BLOCK
    row = tl.full([], 0.0, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(rounds):
        if BACKWARD:
            total += mul_slope_of_sum(column, row, column, ACTIVATION)
        else:
            total = add_phi_of_sum(total, row, column, ACTIVATION)
        row += 1e-4
    tl.store(output + n, total)


def rates() -> dict[str, float]:
    """Measure evaluations per second, "forward" and "backward"."""
    programs = 32 * torch.cuda.get_device_properties("cuda").multi_processor_count
    output = torch.empty(programs * BLOCK, device="cuda")

    def launch(backward: bool) -> Contender:
        return lambda: evaluate[(programs,)](output, ROUNDS, POLY_RELU_8, backward, BLOCK, num_warps=4)

    times = compare({"forward": launch(False), "backward": launch(True)}, share=0.25)
    return {name: programs * BLOCK * ROUNDS / min(turns) for name, turns in times.items()}
