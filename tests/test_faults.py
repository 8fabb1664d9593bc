"""Memory that is not to be had: PyTorch's error, and a process that goes on as if nothing had been asked."""

import sys

import pytest

# Calls whose inputs take no memory, being one number each, repeated by strides of 0: values and gradients to it.
CALLS = """
import torch, mixfeat as mf
def calls(many, device):
    number = torch.ones((), device=device, requires_grad=True)
    def derived(f):
        def call():
            value = f()
            return value.detach(), *torch.autograd.grad(value.sum(), number)
        return call
    index, lam = torch.zeros(many, dtype=torch.int64, device=device), torch.full((many,), 0.5, device=device)
    x, w, wide = (number.expand(shape) for shape in ((many, 2, 4), (4, 2, 4), (4, many, 4)))
    rows, bytes, poly = number.expand(many, 4), torch.ones((), dtype=torch.uint8, device=device), mf.PolyReLU(8, 0.1)
    return {name: derived(f) for name, f in {
        "patch_conv": lambda: mf.patch_conv(x, w, poly),
        "patch_conv of a wide network": lambda: mf.patch_conv(w, wide, poly),
        "patch_conv of mixed samples": lambda: mf.patch_conv(x, w, poly, index=index, lam=lam),
        "pairwise_mixup_loss": lambda: mf.pairwise_mixup_loss(w, wide, index[:4], poly),
        "mixup": lambda: mf.mixup(rows, index, lam),
        "mixup of bytes": lambda: number * mf.mixup(bytes.expand(many, 4), index, lam),
        "mixup_cross_entropy": lambda: mf.mixup_cross_entropy(rows, index, index, lam),
        "soft_target_cross_entropy": lambda: mf.soft_target_cross_entropy(rows, rows.detach(), reduction="none"),
    }.items()}
def small():
    return [t for call in calls(40, DEVICE).values() for t in call()]
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space")
def test_no_memory(run_python):
    """On a CPU: less and less of the memory that a call needs is missing, so that every allocation in it fails once."""
    output = run_python(f"""{CALLS}
import resource
DEVICE = "cpu"
before = small()
for name, call in calls(2**16, DEVICE).items():
    room, errors, done = 2**16, 0, False
    while not done:
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + int(room), resource.RLIM_INFINITY))
        try:
            call()
            done = True
        except (RuntimeError, MemoryError) as error:
            errors += 1
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        assert all(torch.equal(a, b) for a, b in zip(before, small(), strict=True)), name
        room *= 1.2
    assert errors > 3, (name, errors)
    print(name, errors)
""", fresh=True, OMP_NUM_THREADS="2", MALLOC_MMAP_THRESHOLD_="65536")  # fmt: skip
    assert output.count("\n") == 8


@pytest.mark.gpu
def test_no_memory_on_a_gpu(run_python):
    output = run_python(f"""{CALLS}
DEVICE = "cuda"
before = small()
for name, call in calls(2**26, DEVICE).items():
    torch.cuda.set_per_process_memory_fraction(2**28 / torch.cuda.get_device_properties(0).total_memory)
    try:
        call()
        raise SystemExit(f"{{name}} had enough")
    except torch.OutOfMemoryError:
        pass
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, small(), strict=True)), name
    print(name)
""")  # fmt: skip
    assert output.count("\n") == 8
