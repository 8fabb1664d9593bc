"""Every Triton kernel that ships, compiled for every target without a GPU: none spills a register."""

import json
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import LONG

from mixfeat import PolyReLU, cli, report

configs = pytest.importorskip("mixfeat.kernels.triton.configs")
triton = pytest.importorskip("triton")


def is_usual(case, target):
    """Whether a case is compiled in every run: each takes a second. The others, in make test-long, are variants of a
    configuration (another activation, mixing, few samples) and kernels whose configurations are the same on all
    targets, or on all of NVIDIA's: those without matrix units.
    """
    variant = getattr(case, "mix", False) or getattr(case, "activation", PolyReLU()) != PolyReLU()
    if case.kernel == "patch_conv":
        variant = variant or case.samples < 4096
        same = case.dtype == torch.float32 and case.matmul_precision == "highest"
    elif case.kernel == "pairwise_mixup_loss":
        variant = variant or case.readout or case.deterministic
        same = case.direction in ("pack", "softmax")
    else:
        same, variant = True, case.dtype == torch.float32
    return target == "sm_90" or (not variant and (not same or target == "gfx942"))


CASES = [
    (target, case)
    for target in report.TARGETS
    for case in dict.fromkeys(report.shipped(target))
    if case.kernel != "gradient_descent" and (LONG or is_usual(case, target))  # see test_cuda_gradient_descent.py
]
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
# instructions per evaluation on sm_90: those of the gradients serve both samples of a pair
PAIRWISE_INSTRUCTIONS = {
    str(report.PairwiseCase(direction, torch.float32, PolyReLU(), samples)): limit
    for direction, samples, limit in (
        ("logits", 50, 7.6), ("logits", 1024, 7.4), ("logits", 4096, 7.3),
        ("gradient", 50, 8.9), ("gradient", 1024, 8.5), ("gradient", 4096, 8.5),
    )
}  # fmt: skip
# what older releases of Triton may take more: of instructions per evaluation, of registers
OLDER = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
MORE_INSTRUCTIONS, MORE_REGISTERS = (0.05, 2) if OLDER else (0, 0)
# and of the stack, in bytes, where Triton 3.6 spills
POLYRELU = str(PolyReLU(8, 0.1))
SPILLED_BYTES = {
    ("sm_90", f"patch_conv-backward_weight-float32-highest-N4096-D64-M10-{POLYRELU}"): 64,
    ("sm_90", f"patch_conv-backward_weight-float32-highest-N4096-D128-M10-{POLYRELU}"): 56,
    ("sm_90", "mixup-backward-float32-highest-K10-float32"): 8,
    ("sm_90", "mixup-backward-bfloat16-K10-bfloat16"): 8,
    ("sm_90", "binary_cross_entropy-forward-bfloat16-C10"): 336,
    ("sm_100", f"patch_conv-backward_weight-float32-high-N4096-D32-M10-{POLYRELU}"): 40,
} if OLDER else {}  # fmt: skip
MATRIX_UNIT = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCMMA", "sm_120": "HMMA", "gfx942": "MFMA"}


def unwritten_uniform_registers(sass):
    """Uniform registers that sm_90's instructions read and none writes, by number, with one that reads each.

    ptxas 12.8 has left one of a matrix instruction's descriptor unwritten: the product was wrong on an H100, and in no
    emulation of the PTX. In gdesc[URn] lie the descriptors of A, unless A is in registers, and of B.
    """
    written, read = set(), {}
    for instruction in re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", sass):
        name, _, rest = instruction.partition(" ")
        operands = [operand.strip() for operand in rest.split(",")]
        target = re.fullmatch(r"UR(\d+)", operands[0])
        if target:
            width = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name else 1
            written |= {int(target[1]) + i for i in range(width)}
            del operands[0]
        a_in_registers = len(operands) > 1 and re.fullmatch(r"R\d+(\.reuse)?", operands[1])
        for kind, number in re.findall(r"(gdesc|desc)?\[?\bUR(\d+)\b", ",".join(operands)):
            places = {"gdesc": (2, 3) if a_in_registers else (0, 1, 2, 3), "desc": (0, 1)}.get(kind, (0,))
            read |= {int(number) + i: instruction for i in places}
    return {number: instruction for number, instruction in read.items() if number not in written}


def test_unwritten_uniform_registers():
    good = """
        /*1380*/   UMOV UR9, 0x40000040 ;
        /*1390*/   @!UP0 UIADD3.64 UR10, UR8, 0x80, URZ ;
        /*13a0*/   ULDC UR8, c[0x0][0x228] ;
        /*13c0*/   HGMMA.64x64x16.F32.BF16 R56, gdesc[UR8].tnspB, RZ, !UPT ;
        /*13d0*/   HGMMA.64x32x16.F32.BF16 R24, R56, gdesc[UR8].tnspB, R24 ;
    """
    assert not unwritten_uniform_registers(good)
    assert unwritten_uniform_registers(good.replace("UMOV UR9", "UMOV UR12")).keys() == {9}
    assert unwritten_uniform_registers(good + "/*1620*/ UIADD3 UR10, UP0, UR7, 0x2, URZ ;").keys() == {7}
    assert unwritten_uniform_registers(good + "/*1630*/ LDG.E.128 R8, desc[UR14][R4.64] ;").keys() == {14, 15}


@pytest.fixture(scope="module")
def compiled(request):
    """What the selected cases compile to: futures, all under way at once in other processes."""
    items = [item for item in request.session.items if getattr(item, "function", None) is test_kernel]
    keys = [item.callspec.params["key"] for item in items]
    with report.compile_pool() as pool:
        yield {(target, case): pool.submit(report.compile_case, case, target) for target, case in keys}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("key", CASES, ids=lambda key: f"{key[0]}-{key[1]}")
def test_kernel(compiled, key):
    target, case = key
    row = compiled[key].result()
    spilled = SPILLED_BYTES.get((target, str(case)), 0)
    assert row.stack_bytes <= spilled
    assert spilled or (row.local_loads, row.local_stores) == (0, 0)
    assert row.registers > 0
    assert row.shared_bytes <= SHARED_KIB[target] * 1024
    if target == "sm_90":
        assert not unwritten_uniform_registers(row.assembly)
    assert not re.search(r"_f64|\.F64|\bD(ADD|MUL|FMA|SETP)\b", row.assembly), "float64 instructions"
    if str(case) in PAIRWISE_INSTRUCTIONS and target == "sm_90":
        instructions, evaluations = max(row.evaluation_loops())
        assert instructions / evaluations <= PAIRWISE_INSTRUCTIONS[str(case)] + MORE_INSTRUCTIONS
    if case.kernel == "patch_conv" and case.direction not in ("mix", "sum"):
        assert row.matrix_instructions[MATRIX_UNIT[target]] > 0
    if case.kernel == "patch_conv" and case.matmul_precision == "high":
        assert "0x1000" in row.assembly, "TF32 operands are rounded before matrix units cut them off"
    assert not products_fused_into_exchanges(row.assembly)
    if case.kernel in ("mixup", "cross_entropy") and case.direction not in ("count", "mean"):
        check_streaming(case, target, row)


def products_fused_into_exchanges(sass):
    """The FFMA that add a product to what SHFL.BFLY has just brought: lanes then disagree on the last bit of a sum."""
    shuffled, found = set(), []
    for opcode, operands in re.findall(r"\b([A-Z][A-Z0-9_.]+) ([^;\n]*);", sass):
        registers = re.findall(r"\bR\d+\b", operands)
        if opcode.startswith("FFMA") and re.search(r"\bR\d+\b", operands.split(",")[-1]) and registers[-1] in shuffled:
            found.append(f"{opcode} {operands}")
        if opcode.startswith("SHFL.BFLY"):
            shuffled.add(registers[0])
        elif registers and not opcode.startswith(("ST", "RED")):  # a wide result takes the registers after it too
            width = 4 if ".128" in opcode else 2 if ".64" in opcode or ".WIDE" in opcode else 1
            first = int(registers[0][1:])
            shuffled -= {f"R{number}" for number in range(first, first + width)}
    return found


def check_streaming(case, target, row):
    """Whole vectors of 16 bytes where rows are aligned; registers for as many programs as configs.py counts on."""
    narrow = case.direction == "dense" and case.dtype.itemsize == 2  # its targets, float32, take 16 bytes
    if (case.width if case.kernel == "mixup" else case.classes) % 8 == 0:
        assert row.vector_accesses["load"] > 0 or (case.kernel == "mixup" and case.source == torch.uint8)
        assert row.vector_accesses["store"] > 0 or narrow or (case.kernel == "cross_entropy" and not case.need_grad)
    if target.startswith("sm_"):
        limit = (85 if target == "sm_120" else 80) if case.kernel == "mixup" else row.config["maxnreg"]
        assert row.registers <= min(limit + MORE_REGISTERS, 65536 // (32 * row.config["num_warps"]))


@pytest.mark.parametrize(
    ("registers", "num_warps", "warps"),
    [(189, 1, 8), (168, 4, 12), (128, 8, 16), (255, 4, 8), (40, 16, 48), (16, 4, 64)],
)
def test_occupancy_allocates_registers_per_scheduler(registers, num_warps, warps):
    kernel = report.CompiledKernel(
        "k", "forward", "float32", {"num_warps": num_warps}, "sm_90", registers, *[0] * 4, {}, {}, ""
    )
    assert kernel.occupancy() == warps / 64


def test_every_configuration_is_compiled():
    shipped = {
        (direction.removesuffix("_narrow"), config.holds(tiles.patch_dim), replace(config, programs=2))
        for kind in configs.PATCH_CONV_TILES.values()
        for tiles in kind
        for direction in ("forward", "forward_narrow", "backward_input", "backward_weight", "kept_input", "kept_weight")
        for config in [getattr(tiles, direction)]
        if config is not None
    }
    compiled = set()
    cases = ((target, case) for target in ("sm_90", "gfx942") for case in report.shipped(target))
    cases = (key for key in cases if key[1].kernel == "patch_conv" and key[1].direction not in ("mix", "sum"))
    for target, case in (key for key in cases if not key[1].mix):
        recorded = report.recorded_launch(case, report.TARGETS[target][0])
        network, tile = (recorded.constants[name] for name in ("NETWORK", "TILE"))
        blocks = (tile.samples * tile.patches, tile.filters, tile.dim)
        options = (recorded.num_warps, recorded.num_stages, recorded.max_registers)
        compiled.add((case.direction, network.width <= tile.dim, configs.PatchConvConfig(*blocks, *options)))
    assert shipped <= compiled


@pytest.mark.parametrize("samples", [1, 8, 50, 256, 1024, 8192])
@pytest.mark.parametrize("patches", [12, 196])
@pytest.mark.parametrize(("rows", "tiles"), [(64, 1), (64, 3), (32, 18)])
def test_rows_are_split_to_fill_a_gpu(samples, patches, rows, tiles):
    """No program has much more than its share of the work, and all places for programs that are worth it are taken."""
    slots = 264
    for slice_samples in (False, True):
        split = configs.split(samples, patches, rows, tiles, slots, slice_samples)
        steps = samples * patches / rows * tiles  # of full tiles
        assert split.programs >= min(steps / 4, slots / 2)
        blocks = -(-samples * split.block_p // rows)
        covered = -(-patches // split.block_p // (split.slices // split.sample_slices))
        if slice_samples:
            assert split.programs == tiles * split.slices
            assert split.sample_slices <= blocks
            covered *= -(-blocks // split.sample_slices)
        waves = -(-split.programs // slots)
        assert waves * covered <= 2 * steps / slots + 4


def test_parameters_of_kernels_are_few():
    """Constants count too."""
    cases = [case for case in report.shipped("sm_90") if case.kernel != "gradient_descent"]
    kernels = {report.recorded_launch(case).kernel for case in cases}
    assert len(kernels) == 16 + 5
    assert {kernel.__name__: len(kernel.arg_names) for kernel in kernels if len(kernel.arg_names) > 20} == {}


def test_every_configuration_of_the_cross_entropy_is_compiled():
    cases = [case for case in report.shipped("sm_90") if case.kernel == "cross_entropy"]
    recorded = [report.recorded_launch(case) for case in cases if case.direction not in ("count", "mean", "scale")]
    blocks = [one.constants["FORM"].block_n * one.constants["FORM"].block_c for one in recorded]
    compiled = {(block // (32 * one.num_warps), one.max_registers) for block, one in zip(blocks, recorded, strict=True)}
    for config in configs.CROSS_ENTROPY_CONFIGS.values():
        assert {(config.elements, config.whole_registers), (config.elements, config.part_registers)} <= compiled


def test_every_configuration_of_the_pairwise_loss_is_compiled():
    cases = [case for case in report.shipped("sm_90") if case.kernel == "pairwise_mixup_loss"]
    for direction in ("pack", "logits", "softmax"):
        recorded = [report.recorded_launch(case) for case in cases if case.direction == direction]
        assert {one.constants["BLOCK"] for one in recorded} == {block for block, _ in configs.PAIRWISE_CONFIG.blocks}


@pytest.mark.parametrize(("runs", "samples"), [(1, 64), (1, 256), (1, 1024), (128, 50)])
def test_all_pairs_fill_a_gpu_in_few_launches(monkeypatch, runs, samples):
    """Logits and gradients have a warp for each of 528 schedulers, if it would have 16 pairs of a class."""
    from mixfeat.kernels.triton import launch
    from mixfeat.kernels.triton.pairwise_mixup_loss import pairwise_mixup_loss

    monkeypatch.setattr(launch, "multiprocessors", lambda _: 132)
    s = torch.empty(runs, samples, 12, 10, 10, device="meta")
    target = torch.empty(samples, dtype=torch.int64, device="meta")
    with launch.record() as launches:
        pairwise_mixup_loss(s, None, target, None, [0.5], [1.0], PolyReLU().polynomial, True)
    _, logits, _, gradient = launches
    for one in (logits, gradient):
        assert one.programs * one.num_warps >= min(528, runs * 10 * samples**2 // 2 // 256)


def test_launches_of_small_calls(monkeypatch):
    """A mean of few rows takes three, forward and backward; the backward pass of mixup and of cutmix one."""
    from mixfeat import backends
    from mixfeat.kernels.triton import cutmix, launch, mixup
    from mixfeat.ops import cross_entropy

    monkeypatch.setattr(backends, "serving", lambda *_: "triton")
    meta = partial(torch.empty, device="meta")
    index, lam = meta(64, dtype=torch.int64), meta(64)
    x, target, options = meta(64, 10), meta(64, dtype=torch.int64), (0.0, 0.0, -100, "mean", False)
    with launch.record() as launches:
        _, _, grad, counts = cross_entropy._mixup_forward(x, target, target, lam, *options, True)
        saved = (grad, counts, x, target, target, lam)
        ctx = SimpleNamespace(saved_tensors=saved, options=options, divisor=1, may_overwrite=lambda grad: True)
        cross_entropy._mixup_backward_of(ctx, (meta(()), None), [True])
    assert len(launches) == 3
    for backward in (mixup.mixup_backward, partial(cutmix.cutmix_backward, height=2, width=5, pixel=1)):
        box_or_lam = lam if backward is mixup.mixup_backward else meta(4, dtype=torch.int64)
        with launch.record() as launches:
            backward(x, index, box_or_lam, input_grad=meta(64, 10))
        assert len(launches) == 1


def test_command(tmp_path, capsys):
    file = tmp_path / "report.json"
    assert (
        cli.main(["compile-report", "--targets", "sm_90", "--kernels", "pairwise_mixup_loss", "--json", str(file)]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(file.read_text())["kernels"]
    assert len(rows) == len([case for case in report.shipped("sm_90") if case.kernel == "pairwise_mixup_loss"])
    assert len(lines) == 1 + len(rows) + 2
    assert lines[-1].endswith("0 of which spill")
    needed = {
        "kernel", "direction", "dtype", "config", "target", "registers", "stack_bytes", "shared_bytes", "local_loads",
        "local_stores", "matrix_instructions", "loop_instructions", "evaluations_per_iteration",
        "instructions_per_evaluation", "occupancy", "fraction_of_peak",
    }  # fmt: skip
    for row in rows:
        assert needed <= set(row)
        assert 0 < row["occupancy"] <= 1
    default = next(row for row in rows if "logits-float32-highest-N4096" in row["case"])
    assert 7 < default["instructions_per_evaluation"] <= 7.3
    assert 0.8 < default["fraction_of_peak"] <= 1


@pytest.mark.parametrize("args", [["--targets", "sm_1"], ["--kernels", "conv,mixup"], ["--targets", ","]])
def test_command_refuses(args, capsys):
    assert cli.main(["compile-report", *args]) == 2
    assert f"{args[0]} must be of" in capsys.readouterr().err
