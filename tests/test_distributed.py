"""The all-pairs loss over the ranks of a process group. tests/rank.py holds what a rank does."""

import processes
import pytest
import torch
import torch.distributed as dist
from conftest import SEED

import mixfeat as mf
from mixfeat.ops.sharding import plan


@pytest.fixture
def run_ranks(tmp_path):
    def run(case, ranks):
        rendezvous = str(tmp_path / "rendezvous")
        calls = [f"import rank; rank.run{(case, rank, ranks, rendezvous, SEED)}" for rank in range(ranks)]
        failed = [ended.stderr for ended in processes.run(*calls) if ended.status]
        assert not failed, "\n".join(failed)

    return run


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_accuracy(run_ranks, ranks):
    run_ranks("accuracy", ranks)


@pytest.mark.parametrize(
    ("case", "ranks"),
    [("large", 3), ("data_parallel", 2), ("subgroups", 4), ("memory", 2), ("memory", 4), ("refusals", 3), ("death", 3),
     ("delay", 2)],
)  # fmt: skip
def test_case(run_ranks, case, ranks):
    run_ranks(case, ranks)


def even(samples, ranks):
    return tuple(samples // ranks + (rank < samples % ranks) for rank in range(ranks))


@pytest.mark.parametrize("ranks", range(1, 9))
def test_plan(ranks):
    """Every pair once; nobody has much more than the mean to do, from 40 samples on: below, single samples tell."""
    for samples in [*range(130), 1000, 4095, 4096, 100_003]:
        made = plan(even(samples, ranks))
        work = made.work()
        assert sum(work) == samples * (samples + 1) // 2
        if samples >= 40:
            assert max(work) <= 1.1 * sum(work) / ranks


@pytest.mark.parametrize("ranks", range(2, 9))
@pytest.mark.parametrize("samples", [840, 841, 846, 5000])
def test_bytes_sent(ranks, samples):
    """The least possible: of two shards at least one travels whole, and half of the other where they share the work."""
    made = plan(even(samples, ranks))
    partners = (ranks - 1) / 2 if ranks % 2 else ranks / 2 - 1 + 0.75
    assert sum(made.sent()) <= 1.1 * samples * partners
    assert max(made.sent()) <= 1.1 * (samples / ranks) * (ranks // 2)


@pytest.mark.parametrize("sizes", [(5, 4, 5), (9, 8, 9, 8), (700, 700), (1, 1, 1, 1, 1), (2, 1, 1, 1), (1, 0, 0)])
def test_plan_meets_all_pairs(sizes):
    made = plan(sizes)
    for step in made.steps:
        for a in range(len(sizes)):
            assert all(a in pair for pair in made.pairs_of(a, step))
    for pair in made.own:
        a, b = pair
        steps = [step for step in made.steps if pair in made.pairs_of(a, step)]
        assert steps == [step for step in made.steps if pair in made.pairs_of(b, step)]
        met = torch.zeros(sizes[a], sizes[b])
        for step in steps:
            met[made.rows_of(a, pair), made.send_rows(b, pair, step)] += 1
            met[made.send_rows(a, pair, step), made.rows_of(b, pair)] += 1
        assert (met == 1).all()


def test_needs_torch_distributed():
    x, w, y = torch.zeros(3, 1, 2), torch.zeros(2, 1, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"group needs torch.distributed: call torch.distributed.init_process_group"):
        mf.pairwise_mixup_loss(x, w, y, mf.ReLU(), group="world")


def test_refuses_what_is_no_group(tmp_path):
    x, w, y = torch.zeros(3, 1, 2), torch.zeros(2, 1, 2), torch.zeros(3, dtype=torch.int64)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        for group in (3, "other", dist.ProcessGroup):
            with pytest.raises(TypeError, match=r"group must be a torch.distributed.ProcessGroup or 'world', got"):
                mf.pairwise_mixup_loss(x, w, y, mf.ReLU(), group=group)
        loss = mf.PairwiseMixupLoss(group="world")(mf.TwoLayerPatchCNN(2, 1, 2, mf.ReLU()), x, y)
        assert loss.item() == pytest.approx(0.6931, abs=1e-4)
    finally:
        dist.destroy_process_group()
