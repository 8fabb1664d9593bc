"""The tile sizes of the Triton kernels, with their reasons, and which of them serves a problem."""

import functools
import math
import sys
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

__all__ = [
    "BINARY_CROSS_ENTROPY_CONFIG", "CROSS_ENTROPY_CONFIGS", "CUTMIX_CONFIG", "MEAN_LOGITS", "MEAN_ROWS",
    "MIXUP_CONFIG", "PAIRWISE_CONFIG", "PATCH_CONV_TILES", "SEARCHED_AT_ONCE", "SEARCHED_SAMPLES", "SEARCHING_ROWS",
    "CrossEntropyConfig", "Direction", "MixupConfig", "PairwiseConfig", "PatchConvConfig", "PatchConvTiles",
    "Split", "cdiv", "cross_entropy_config", "keeps_slopes", "pairwise_block", "pairwise_features", "pairwise_length",
    "pairwise_warps", "patch_conv_tiles", "split", "tile_rows", "vector_size",
]  # fmt: skip


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up. On the host triton.cdiv takes microseconds."""
    return -(-a // b)


Direction = Literal["forward", "backward_input", "backward_weight", "kept_input", "kept_weight"]


@dataclass(frozen=True)
class PatchConvConfig:
    """Tile sizes of one patch_conv kernel.

    Attributes:
        block_rows: patches per tile, some of each of some samples.
        block_q: filters per tile.
        block_d: entries of a patch per tile. A patch that fits is read once per tile, a longer one in steps of block_d.
        num_warps: warps per program, 32 (AMD: 64) threads each.
        num_stages: depth of the pipeline of loads.
        max_registers: cap per thread (NVIDIA, without a mix) that lets a multiprocessor hold several programs; None
            where the assembler finds by itself how many it needs.
        programs: how many programs a multiprocessor should have, to fill it.
    """

    block_rows: int
    block_q: int
    block_d: int
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = 255
    programs: int = 2

    def holds(self, patch_dim: int) -> bool:
        """Whether a tile holds patches of ``patch_dim`` entries."""
        return patch_dim <= self.block_d


@dataclass(frozen=True)
class PatchConvTiles:
    """The configurations for patches of up to ``patch_dim`` entries; ``mixes`` says whether these kernels can mix."""

    patch_dim: int
    forward: PatchConvConfig
    forward_narrow: PatchConvConfig
    backward_input: PatchConvConfig
    backward_weight: PatchConvConfig
    mixes: bool = False
    kept_input: PatchConvConfig | None = None
    kept_weight: PatchConvConfig | None = None

    def config(self, direction: Direction, num_classes: int, filters_per_class: int) -> PatchConvConfig:
        """Return the configuration for a direction and, in forward, for the numbers of classes and filters."""
        if direction == "kept_input":
            return self.kept_input or self.backward_input
        if direction == "kept_weight":
            return self.kept_weight or self.backward_weight
        if direction != "forward":
            return self.backward_input if direction == "backward_input" else self.backward_weight

        def columns(config: PatchConvConfig) -> int:  # filters computed, with those that pad the tiles of whole classes
            tiles_per_class = math.ceil(filters_per_class / config.block_q)
            classes_per_tile = max(config.block_q // filters_per_class, 1)
            return math.ceil(num_classes / classes_per_tile) * tiles_per_class * config.block_q

        # Wide tiles read the input half as often, but not where they compute much more padding than narrow ones.
        wide, narrow = self.forward, self.forward_narrow
        return wide if columns(wide) <= 1.2 * columns(narrow) else narrow


_Config, _ANY = PatchConvConfig, sys.maxsize

# All configurations that ship, by the kind of product. Registers set the sizes: these tiles do not spill on any target.
#
# "half": bfloat16 and float16. The matrix units of sm_90 and later (wgmma, tcgen05) take 64 rows per 4 warps. Forward
#   keeps two tiles, s and the sum of phi: 8 warps halve a thread's share of them. Backward keeps s, G and the gradient;
#   it has 4 warps, for with 8 each pair of warps would need, and compute, the same activations. One program's products
#   overlap with another's activations where a multiprocessor holds two or three: hence the caps on registers. Long
#   patches pass through a pipeline four stages deep.
# "tf32": float32 in TF32, with twice the bytes per operand.
# "tf32x3": float32 as three products in TF32, whose operands pass through registers to be split: tiles are smaller.
# "ieee": float32 on AMD, whose matrix units take it as it is.
PATCH_CONV_TILES: dict[str, list[PatchConvTiles]] = {
    "half": [
        PatchConvTiles(
            patch_dim=32,
            forward=_Config(64, 128, 32, num_warps=8, max_registers=128),
            forward_narrow=_Config(64, 64, 32, max_registers=168, programs=3),
            backward_input=_Config(64, 64, 32, max_registers=None),
            backward_weight=_Config(64, 64, 32, programs=3),
            mixes=True,
        ),
        PatchConvTiles(
            patch_dim=64,
            forward=_Config(64, 128, 64, num_warps=8, max_registers=128),
            forward_narrow=_Config(64, 64, 64, max_registers=168, programs=3),
            backward_input=_Config(64, 64, 64),
            backward_weight=_Config(64, 64, 64, programs=3),
            mixes=True,
        ),
        PatchConvTiles(
            patch_dim=128,
            forward=_Config(64, 128, 128, num_warps=8),
            forward_narrow=_Config(64, 64, 128, num_warps=8),
            backward_input=_Config(64, 32, 128),
            backward_weight=_Config(64, 32, 128),
        ),
        PatchConvTiles(
            patch_dim=_ANY,
            forward=_Config(64, 64, 64, num_warps=8, num_stages=4),
            forward_narrow=_Config(64, 64, 64, num_warps=8, num_stages=4),
            backward_input=_Config(64, 32, 128),
            backward_weight=_Config(32, 64, 128, num_warps=8),
            kept_input=_Config(64, 64, 128, num_warps=8, num_stages=3),
            kept_weight=_Config(64, 64, 128),
        ),
    ],
    "tf32": [
        PatchConvTiles(
            patch_dim=32,
            forward=_Config(64, 128, 32, num_warps=8),
            forward_narrow=_Config(64, 64, 32),
            backward_input=_Config(64, 32, 32),
            backward_weight=_Config(64, 64, 32),
            mixes=True,
        ),
        PatchConvTiles(
            patch_dim=64,
            forward=_Config(64, 64, 64),
            forward_narrow=_Config(64, 64, 64),
            backward_input=_Config(32, 64, 64),
            backward_weight=_Config(64, 64, 64),
        ),
        PatchConvTiles(
            patch_dim=_ANY,
            forward=_Config(64, 128, 32, num_warps=8),
            forward_narrow=_Config(64, 64, 32, num_warps=8),
            backward_input=_Config(64, 32, 64, num_warps=8, num_stages=1),
            backward_weight=_Config(32, 64, 64, num_warps=8),
            kept_input=_Config(64, 32, 64, num_stages=3),
            kept_weight=_Config(32, 64, 64, num_stages=3),
        ),
    ],
    "tf32x3": [
        PatchConvTiles(
            patch_dim=32,
            forward=_Config(64, 64, 32),
            forward_narrow=_Config(64, 64, 32),
            backward_input=_Config(64, 32, 32),
            backward_weight=_Config(64, 32, 32, num_stages=1),
            mixes=True,
        ),
        PatchConvTiles(
            patch_dim=64,
            forward=_Config(64, 32, 64),
            forward_narrow=_Config(64, 32, 64),
            backward_input=_Config(32, 64, 64),
            backward_weight=_Config(64, 32, 64),
        ),
        PatchConvTiles(
            patch_dim=_ANY,
            forward=_Config(64, 32, 64, num_stages=3),
            forward_narrow=_Config(64, 32, 64, num_stages=3),
            backward_input=_Config(32, 64, 64),
            backward_weight=_Config(64, 32, 64),
            kept_input=_Config(32, 32, 64, num_stages=3),
            kept_weight=_Config(32, 32, 64, num_stages=3),
        ),
    ],
    "ieee": [
        PatchConvTiles(
            patch_dim=32,
            forward=_Config(32, 64, 32),
            forward_narrow=_Config(32, 32, 32),
            backward_input=_Config(32, 32, 32, num_warps=8),
            backward_weight=_Config(32, 32, 32, num_warps=8),
            mixes=True,
        ),
        PatchConvTiles(
            patch_dim=_ANY,
            forward=_Config(64, 64, 16, num_warps=8),
            forward_narrow=_Config(64, 32, 16),
            backward_input=_Config(32, 32, 64, num_warps=8, num_stages=1),
            backward_weight=_Config(32, 32, 64, num_warps=8, num_stages=1),
        ),
    ],
}


def keeps_slopes(dtype: torch.dtype, num_filters: int, patch_dim: int) -> bool:
    """Whether forward keeps the slopes, in the input's dtype, for the backward pass of a network.

    For long patches computing the pre-activations again would take longer, once for each tile of D, than reading the
    slopes, which are no more than the input where there are no more filters than entries in a patch.
    """
    return num_filters <= patch_dim and patch_dim > (128 if dtype.itemsize == 2 else 64)


def patch_conv_tiles(dtype: torch.dtype, input_precision: str, patch_dim: int) -> PatchConvTiles:
    """Return the configurations that serve patches of ``patch_dim`` entries."""
    kind = input_precision if dtype == torch.float32 else "half"
    return next(tiles for tiles in PATCH_CONV_TILES[kind] if patch_dim <= tiles.patch_dim)


class Split(NamedTuple):
    """How the programs of a patch_conv kernel divide the samples and patches.

    Attributes:
        block_p: patches of each sample in a tile.
        slices: programs that share the work on other tiles, each with a partial sum.
        sample_slices: how many slices the samples are divided into, each of which the patches are divided into further.
        programs: programs in all.
    """

    block_p: int
    slices: int
    sample_slices: int
    programs: int


def _blocks(samples: int, patches: int, rows: int) -> list[tuple[int, int, int]]:
    """Return the tiles of so many rows: patches of each sample, and how many tiles cover samples and patches."""
    few = [block_p for block_p in (1, 4, 16, 64) if block_p <= rows]  # each is compiled
    return [(block_p, math.ceil(samples * block_p / rows), math.ceil(patches / block_p)) for block_p in few]


@functools.lru_cache(1024)
def tile_rows(samples: int, patches: int, rows: int) -> tuple[int, int]:
    """Return how many patches of each sample a tile has so that the fewest tiles cover all, and how many those are."""
    tiles, block_p = min((a * b, block_p) for block_p, a, b in _blocks(samples, patches, rows))
    return block_p, tiles


@functools.lru_cache(1024)
def split(samples: int, patches: int, rows: int, tiles: int, slots: int, slice_samples: bool) -> Split:
    """Choose the division that is done first where ``slots`` programs run at once.

    ``tiles`` programs have the same rows; ``slice_samples`` if one may have several blocks of samples. Time is counted
    in tiles of rows: a program takes that of one to begin and to end, that of half a one to load the gradients of a
    block of samples, and partial sums of several slices that of two.
    """
    best: tuple[tuple[float, ...], Split] = (math.inf,), Split(1, 1, 1, 1)
    for block_p, sample_blocks, patch_blocks in _blocks(samples, patches, rows):
        blocks = 1 if slice_samples else sample_blocks
        wanted = max(1, slots // (tiles * blocks))
        for patch_slices in range(1, min(patch_blocks, wanted) + 1):
            sample_slices = min(sample_blocks, wanted // patch_slices) if slice_samples else 1
            slices, programs = sample_slices * patch_slices, tiles * blocks * sample_slices * patch_slices
            sample_steps = math.ceil(sample_blocks / blocks / sample_slices)
            steps = math.ceil(patch_blocks / patch_slices) * sample_steps
            cost = math.ceil(programs / slots) * (steps + sample_steps / 2 + 1) + 2 * (slices > 1)
            best = min(best, ((cost, slices, block_p), Split(block_p, slices, sample_slices, programs)))
    return best[1]


@dataclass(frozen=True)
class PairwiseConfig:
    """Tile sizes of the all-pairs Mixup loss.

    Attributes:
        blocks: samples on each side of a tile of logits, by the warps of its program.
        logits_registers: cap per thread (NVIDIA) for them, so that a multiprocessor has 16 warps: the assembler takes
            128 then. With a cap of 128 it spills on sm_120 at high degrees.
        own: samples whose gradients a program adds up in registers.
        features: how many features a program of the gradients has at most, one a thread.
        pairs: how many pairs a program of the softmax has, and
        classes: how many of their logits at a time.
        pack_width: values that a program packs at a time, and
        pack_chunks: how many programs pack a block of samples at most, unless each has more values of a sample than
        pack_values.
        workspace_bytes: the most that logits take.
    """

    blocks: tuple[tuple[int, int], ...] = ((64, 4), (32, 2), (16, 1))
    logits_registers: int = 136
    own: int = 32
    features: int = 128
    pairs: int = 256
    classes: int = 8
    pack_width: int = 64
    pack_chunks: int = 16
    pack_values: int = 512
    workspace_bytes: int = 512 << 20


PAIRWISE_CONFIG = PairwiseConfig()


@functools.lru_cache(1024)
def pairwise_block(layers: int, rows: int, columns: int, symmetric: bool, multiprocessors: int) -> int:
    """Return how many samples are on each side of a tile; ``layers`` is the number of runs times that of classes.

    Large tiles load less for each pair. Small ones make more programs, and have less to pad where samples are few.
    """

    def cost(block: int) -> float:
        row_blocks, column_blocks = math.ceil(rows / block), math.ceil(columns / block)
        tiles = row_blocks * (row_blocks + 1) // 2 if symmetric else row_blocks * column_blocks
        warps = pairwise_warps(block)  # of which each of the four schedulers of a multiprocessor takes one at a time
        instructions = 7 + 24 / block  # of an evaluation, loads included
        return math.ceil(layers * tiles * warps / (4 * multiprocessors)) * block**2 / warps * instructions

    return min((block for block, _ in PAIRWISE_CONFIG.blocks), key=cost)


def pairwise_warps(block: int) -> int:
    """Return the warps of a program with such a tile. With more threads than samples on a side nothing is exchanged."""
    return dict(PAIRWISE_CONFIG.blocks)[block]


def pairwise_features(features: int) -> int:
    """Return how many features a program of the gradients has: the most of those that pad the fewest."""
    widths = (width for width in (128, 64, 32) if width <= PAIRWISE_CONFIG.features)
    return min(widths, key=lambda width: (math.ceil(features / width) * width, -width))


def pairwise_length(others: int, tiles: int, multiprocessors: int) -> int:
    """Return how many samples of the other side a program goes through, where ``tiles`` programs would have all."""
    parts = math.ceil(8 * multiprocessors / tiles)
    return max(math.ceil(others / parts), 16)


@dataclass(frozen=True)
class MixupConfig:
    """The tile of mixup.

    Attributes:
        vectors: how many vectors, of up to 16 bytes, of the output a program writes.
        elements: the same in elements, at least.
        num_warps: warps per program, 32 (AMD: 64) threads each.
        max_registers: cap per thread (NVIDIA).
    """

    vectors: int
    elements: int
    num_warps: int = 4
    max_registers: int = 80

    def tile(self, num_samples: int, width: int, vector: int, search: bool = False) -> tuple[int, int]:
        """Return the samples, and elements of each, that a program owns: as much of one sample as it can.

        A program that may ``search`` for partners has few samples.
        """
        rows = min(num_samples, SEARCHING_ROWS) if search else num_samples
        return _tile(max(self.vectors * vector, self.elements), rows, width)


# A thread loads 16 bytes four times from its sample and four times from the partner: few enough registers for 8 or more
# programs on a multiprocessor, which then have 128 KiB on the way, where the memory's latency asks for some 20. Rows
# that are not aligned load single elements, eight times.
MIXUP_CONFIG = MixupConfig(vectors=512, elements=1024)

# cutmix holds two masks and a position for each vector, so a thread has two vectors of each of the two images.
CUTMIX_CONFIG = MixupConfig(vectors=256, elements=512)


# A program of the backward pass of mixup or cutmix owns a few rows. It searches up to so many samples, so many at once,
# for those whose partners these are, which takes no longer than the launches of a sort.
SEARCHED_SAMPLES, SEARCHED_AT_ONCE, SEARCHING_ROWS = 8192, 512, 8


@dataclass(frozen=True)
class CrossEntropyConfig:
    """The tile of the cross-entropies: whole rows, or a part of one row at a time.

    Attributes:
        elements: logits that a thread holds, if warps have 32 threads.
        whole_registers: cap per thread (NVIDIA) where a program holds whole rows.
        part_registers: cap per thread (NVIDIA) where it holds a part of a longer one.
        min_warps: warps per program, 32 (AMD: 64) threads each: at least so many, which may share several rows,
        max_warps: and at most.
    """

    elements: int
    whole_registers: int
    part_registers: int
    min_warps: int = 1
    max_warps: int = 8

    def num_warps(self, num_classes: int) -> int:
        """Warps of a program for such rows: one, or as many as a row needs."""
        return min(max(_power_of_2(num_classes) // (32 * self.elements), self.min_warps), self.max_warps)

    def tile(self, num_classes: int) -> tuple[int, int]:
        """Return how many rows, and columns of each, a program holds: at least as many elements as it has threads.

        In a smaller tile several threads would hold one element, which a kernel that works in place must not have.
        """
        elements = 32 * self.elements * self.num_warps(num_classes)
        return _tile(elements, elements if self.min_warps > 1 else 1, num_classes)

    def max_registers(self, num_classes: int) -> int:
        """Cap per thread (NVIDIA) for such rows."""
        return self.whole_registers if self.holds(num_classes) else self.part_registers

    def holds(self, num_classes: int) -> bool:
        """Whether a program holds whole rows."""
        return num_classes <= self.tile(num_classes)[1]


# A row is one warp's, which waits for no other to find its maximum, or, where that would be too much for a thread,
# several warps'. The more logits the threads of a multiprocessor hold the more are on the way to it: the caps on
# registers see to some 32 KiB, where the memory's latency asks for 20. Longer rows are read again from L2, which has to
# hold all rows in work: so three programs are wanted on a multiprocessor, not more, and one for float32.
CROSS_ENTROPY_CONFIGS = {
    "short": CrossEntropyConfig(8, 128, 128, min_warps=4),
    "half": CrossEntropyConfig(32, 128, 80),
    "half with edges": CrossEntropyConfig(32, 128, 128),  # for which 80 registers are too few
    "float32": CrossEntropyConfig(32, 128, 128, max_warps=16),
    "other": CrossEntropyConfig(16, 96, 80),  # dense targets take as many registers again, single elements masks
}


# The most rows, and logits, of a mean that assumes that all targets count. One program adds up the losses of so many
# rows in some 3 us, and a gradient formed anew because a target did not count costs at most some 20.
MEAN_ROWS, MEAN_LOGITS = 4096, 1 << 24

# It needs no whole row at a time. A thread holds few logits, as each takes the registers of an exponential and a
# logarithm.
BINARY_CROSS_ENTROPY_CONFIG = CrossEntropyConfig(8, 128, 128, min_warps=4, max_warps=4)


def cross_entropy_config(
    num_classes: int, itemsize: int, vector: int, dense: bool, edges: bool = False
) -> CrossEntropyConfig:
    """Return the configuration for rows loaded ``vector`` logits at once, which may have ``edges`` of single ones.

    ``dense`` if targets are probabilities.
    """
    if num_classes <= 128:
        return CROSS_ENTROPY_CONFIGS["short"]
    if dense or vector * itemsize < 16:
        return CROSS_ENTROPY_CONFIGS["other"]
    return CROSS_ENTROPY_CONFIGS["float32" if itemsize == 4 else "half with edges" if edges else "half"]


def vector_size(itemsize: int, *sizes: int) -> int:
    """Return how many elements a kernel may load at once: at most 16 bytes, and a divisor of all ``sizes``.

    Kernels take row lengths and strides in units of this size, so that the compiler knows what divides them.
    """
    return math.gcd(16 // itemsize, *sizes)


def _power_of_2(size: int) -> int:
    """Return the smallest power of two that is no less."""
    return 1 << (size - 1).bit_length()


def _tile(elements: int, rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns, powers of two, of a tile of so many elements: as many columns as there are."""
    columns = min(_power_of_2(columns), elements)
    return min(_power_of_2(rows), elements // columns), columns
