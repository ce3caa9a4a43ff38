# SPDX-License-Identifier: Apache-2.0
"""What the Triton launches would cost on GPUs that are not here: ``python -m bench gpu-model``. Nothing is measured.

Each launch is reduced to the FLOPs that its tiles execute, idle tiles of the last wave included, and to the bytes that
it moves to and from DRAM. A launch takes the longer of the two at the rates of the data sheet, and a gap to the next
launch. So every time is a lower bound, for the launches modelled here and for those they are compared with alike; the
latter are charged no padding and no idle tile.

Three yardsticks for the bytes. *Least* counts each tensor that crosses a launch once for the launch that writes it and
once for each that reads it, in the sizes that the mask leaves. It is the least for a block cut into these launches (a
launch a matrix product and one for attention, or the MLP as one): what they move above it is padding, column lists and
what a cache is too small to hold. It says nothing against another cut. *In and out* does: a sublayer as one launch that
keeps everything between on chip, so weights, x in, x out; that is not built here. *Unfused* is the same
mask run by library kernels: LayerNorm, a gather, cuBLAS, flash attention for each width, pointwise kernels for GELU and
residual; for a mask that slices evenly, that is the sliced model. It is charged its own least, as if nothing were ever
read twice.

Only the blocks count. Embedding, last norm and classifier are the same whatever runs the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import timm
import torch

import gohsp
from gohsp.masks.layout import BlockLayout
from gohsp_kernels._packing import round_up
from gohsp_kernels.triton import config
from gohsp_kernels.triton.attention import padded_width

ITEMSIZE = 2  # float16 or bfloat16
GAP = 1.5e-6
"""Seconds between two launches of a CUDA graph: an assumption, as no data sheet has it. Eager launches take 5 to 10."""

PER_PROCESSOR = 2
"""Programs of a linear layer that a multiprocessor holds at once: an assumption; the compiled tiles allow 1 to 3."""
DRIFT = 0.25
"""Share of the depth by which programs that read the same rows are apart: an assumption. They start one after another
and do equal work."""


@dataclass(frozen=True)
class Gpu:
    """Rates of a data sheet: dense 16-bit FLOPs a second, bytes a second, and bytes of the last cache before DRAM."""

    name: str
    target: config.Target
    flops: float
    bandwidth: float
    cache: float


GPUS = (
    Gpu("A100 80GB", config.Target("cuda", 80, 108), 312e12, 2.039e12, 40e6),
    Gpu("H100 SXM", config.Target("cuda", 90, 132), 989e12, 3.35e12, 50e6),
    Gpu("MI300X", config.Target("hip", "gfx942", 304), 1307e12, 5.3e12, 256e6),
)

PRESETS = {
    "deit_tiny_patch16_224": (3, 384),
    "deit_small_patch16_224": (4, 960),
    "deit_base_patch16_224": (8, 1920),
}
"""Heads and neurons that the preset of each model keeps in every block."""

BATCHES = (1, 8, 64, 256)
RAGGED_SHARE, SEED = 0.7, 2301


@dataclass(frozen=True)
class Product:
    """A linear layer on rows: features read and written a row, inputs and outputs of the matrix."""

    rows: int
    read: int
    inputs: int
    outputs: int
    written: int
    residual: bool = False

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.inputs * self.outputs

    @property
    def bytes(self) -> float:
        row = self.read + self.written * (2 if self.residual else 1)
        return float(ITEMSIZE * (self.rows * row + self.inputs * self.outputs))


@dataclass(frozen=True)
class Launch:
    """One kernel. ``flops`` are useful ones; ``executed`` also counts padding and idle tiles."""

    name: str
    flops: float
    executed: float
    bytes: float
    least_bytes: float

    def seconds(self, gpu: Gpu) -> float:
        return max(self.executed / gpu.flops, self.bytes / gpu.bandwidth) + GAP

    def bound(self, gpu: Gpu) -> str:
        compute, memory = self.executed / gpu.flops, self.bytes / gpu.bandwidth
        return "launch" if max(compute, memory) < GAP else "tensor cores" if compute > memory else "DRAM"


@dataclass(frozen=True)
class Block:
    """Sizes of one block, as its mask leaves them, and the batch it runs on."""

    layout: BlockLayout
    features: int
    batch: int
    tokens: int

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def heads(self) -> list[tuple[int, int]]:
        """QK and V width of each head."""
        return list(zip(self.layout.qk_widths, self.layout.v_widths, strict=True))

    def kept(self, which: str) -> int:
        """Number of columns in a column list of the layout; the list is None where all are kept."""
        columns = getattr(self.layout, which)
        return self.features if columns is None else len(columns)

    def products(self, align: int, align_hidden: int) -> dict[str, Product]:
        """The four linear layers, with widths of heads and number of neurons rounded up."""
        d, rows = self.features, self.rows
        qk, v = (sum(round_up(width, align) for width in widths) for widths in zip(*self.heads, strict=True))
        hidden = round_up(len(self.layout.hidden), align_hidden)
        attn_in, attn_out, mlp_in, mlp_out = map(self.kept, ("attn_in", "attn_out", "mlp_in", "mlp_out"))
        return {
            "qkv": Product(rows, d, attn_in, round_up(2 * qk + v, align_hidden), round_up(2 * qk + v, align_hidden)),
            "proj": Product(rows, v, v, attn_out, d, residual=True),
            "fc1": Product(rows, d, mlp_in, hidden, hidden),
            "fc2": Product(rows, hidden, hidden, mlp_out, d, residual=True),
        }


def idle_too(programs: int, processors: int) -> float:
    """How much longer ``programs`` equal programs take than if they could be divided evenly."""
    return config.cdiv(programs, processors) * processors / max(programs, 1)


def our_linear(gpu: Gpu, name: str, exact: Product, product: Product) -> Launch:
    """Our packed linear for ``product``, whose sizes are those of ``exact`` with padding."""
    indexed = product.inputs < product.read or (product.residual and product.outputs < product.written)
    tile = config.linear_tile(gpu.target, torch.float16, product.rows, product.outputs, product.inputs, indexed)
    m, n = config.cdiv(product.rows, tile.BLOCK_M), config.cdiv(product.outputs, tile.BLOCK_N)
    depth = config.cdiv(product.inputs, tile.BLOCK_K) * tile.BLOCK_K
    executed = 2.0 * m * tile.BLOCK_M * n * tile.BLOCK_N * depth * idle_too(m * n, gpu.target.processors)
    # The column tiles of a row tile are neighbours in the grid and run together. While what they read within their
    # drift shares half the cache with the weights, x is read once; and twice where a wave ends between them.
    wave = PER_PROCESSOR * gpu.target.processors
    span = max(tile.num_stages * tile.BLOCK_K, DRIFT * product.read)
    resident = ITEMSIZE * (min(m, config.cdiv(wave, n)) * tile.BLOCK_M * span + product.inputs * product.outputs)
    split = m * n // wave if wave % n else 0
    rows_again = split * tile.BLOCK_M if resident < gpu.cache / 2 else (n - 1) * product.rows
    vectors = 4.0 * (3 * product.outputs + (product.read + product.written if indexed else 0))
    moved = product.bytes + ITEMSIZE * rows_again * product.read + vectors
    return Launch(name, exact.flops, executed, moved, exact.bytes)


def our_attention(gpu: Gpu, block: Block) -> Launch:
    """Our ragged attention: each channel once from DRAM; a head's query tiles find its keys and values in the cache."""
    widest = padded_width(max(map(max, block.heads)))
    tile = config.attention_tile(gpu.target, torch.float16, block.tokens, block.tokens, widest, aligned=True)
    queries = config.cdiv(block.tokens, tile.BLOCK_M)
    area = queries * tile.BLOCK_M * config.cdiv(block.tokens, tile.BLOCK_N) * tile.BLOCK_N
    executed = sum(4.0 * block.batch * area * padded_width(max(qk, v)) for qk, v in block.heads)
    executed *= idle_too(queries * len(block.heads) * block.batch, gpu.target.processors)
    flops = sum(2.0 * block.batch * block.tokens**2 * (qk + v) for qk, v in block.heads)
    aligned = sum(2 * round_up(qk, 8) + 2 * round_up(v, 8) for qk, v in block.heads)
    exact = sum(2 * qk + 2 * v for qk, v in block.heads)
    moved = float(ITEMSIZE * block.rows * aligned + 24 * len(block.heads))
    return Launch("attention", flops, executed, moved, float(ITEMSIZE * block.rows * exact))


def our_mlp(gpu: Gpu, block: Block, tile: config.MlpTile) -> Launch:
    """Our MLP in one launch; every tile of rows finds the weights in the cache."""
    fc1, fc2 = (block.products(1, 1)[name] for name in ("fc1", "fc2"))
    tiles = config.cdiv(block.rows, tile.BLOCK_M)
    width, hidden = tile.PANEL_A + tile.PANEL_B, round_up(fc1.outputs, max(16, tile.BLOCK_H))
    executed = 4.0 * tiles * tile.BLOCK_M * width * hidden * idle_too(tiles, gpu.target.processors)
    least = float(ITEMSIZE * (2 * block.rows * block.features + hidden * (fc1.inputs + fc2.outputs)))
    return Launch("mlp", fc1.flops + fc2.flops, executed, least + 4.0 * (hidden + 4 * block.features), least)


def ours(gpu: Gpu, block: Block) -> list[Launch]:
    """Our launches for one block, as the rules of the Triton backend choose them."""
    exact, padded = block.products(1, 1), block.products(8, 16)

    def product(name: str) -> Launch:
        return our_linear(gpu, name, exact[name], padded[name])

    launches = [product("qkv"), our_attention(gpu, block), product("proj")]
    tile = config.fused_mlp_tile(gpu.target, ITEMSIZE, block.rows, block.features)
    return [*launches, product("fc1"), product("fc2")] if tile is None else [*launches, our_mlp(gpu, block, tile)]


def unfused(block: Block) -> list[Launch]:
    """The same block by library kernels, each at its best: nothing padded, nothing read twice.

    cuBLAS adds the bias. Heads of one width share a call of flash attention; where widths differ, their outputs are
    joined by a copy. Column lists cost a gather of the normalised rows and an indexed addition to a copy of x.
    """
    d, rows, exact = block.features, block.rows, block.products(1, 1)

    def pointwise(name: str, moved: float) -> Launch:
        return Launch(name, 0.0, 0.0, ITEMSIZE * moved, ITEMSIZE * moved)

    def sublayer(first: str, middle: list[Launch], second: str) -> Iterator[Launch]:
        one, two = exact[first], exact[second]
        yield pointwise("norm", 2 * rows * d)
        if one.inputs < d:
            yield pointwise("gather", 2 * rows * one.inputs)
        for name, product in ((first, one), (second, two)):
            moved = ITEMSIZE * (rows * (product.inputs + product.outputs) + product.inputs * product.outputs)
            yield Launch(name, product.flops, product.flops, moved, moved)
            if name == first:
                yield from middle
        yield pointwise("residual", 3 * rows * d if two.outputs == d else rows * (2 * d + 3 * two.outputs))

    widths = sorted(set(block.heads))
    attention = []
    for qk, v in widths:
        heads = block.heads.count((qk, v))
        flops = 2.0 * heads * block.batch * block.tokens**2 * (qk + v)
        moved = float(ITEMSIZE * rows * heads * 2 * (qk + v))
        attention.append(Launch("flash attention", flops, flops, moved, moved))
    if len(widths) > 1:
        attention.append(pointwise("join", 2 * rows * exact["proj"].inputs))
    activation = [pointwise("activation", 2 * rows * exact["fc1"].outputs)]
    return [*sublayer("qkv", attention, "proj"), *sublayer("fc1", activation, "fc2")]


@dataclass(frozen=True)
class Modelled:
    """One line of the result: a sequence of launches for all blocks of a model."""

    gpu: str
    model: str
    layout: str
    batch: int
    sequence: str
    launches: int
    gflops: float
    megabytes: float
    least_megabytes: float
    in_and_out_megabytes: float
    microseconds: float
    bound: str

    def line(self) -> str:
        return (
            f"modelled  {self.gpu:9}  {self.model:21}  {self.layout:7}  batch {self.batch:3}  {self.sequence:7}  "
            f"{self.launches:4} launches  {self.gflops:8.1f} GFLOP  {self.megabytes:8.1f} MB moved  "
            f"{self.least_megabytes:8.1f} least  {self.in_and_out_megabytes:7.1f} in and out  "
            f"{self.microseconds:8.1f} us  mostly bound by {self.bound}"
        )


def summarise(
    gpu: Gpu, model: str, layout: str, sequence: str, blocks: Sequence[Block], launches: Sequence[Launch]
) -> Modelled:
    """Sums over launches; the bound is the one under which the most time is spent."""
    seconds: dict[str, float] = {}
    for launch in launches:
        seconds[launch.bound(gpu)] = seconds.get(launch.bound(gpu), 0.0) + launch.seconds(gpu)
    whole = 0.0
    for block in blocks:
        weights = sum(product.inputs * product.outputs for product in block.products(1, 1).values())
        whole += ITEMSIZE * (4 * block.rows * block.features + weights)
    return Modelled(
        gpu.name,
        model,
        layout,
        blocks[0].batch,
        sequence,
        len(launches),
        sum(launch.flops for launch in launches) / 1e9,
        sum(launch.bytes for launch in launches) / 1e6,
        sum(launch.least_bytes for launch in launches) / 1e6,
        whole / 1e6,
        sum(seconds.values()) * 1e6,
        max(seconds, key=lambda kind: seconds[kind]),
    )


def masks(model: str) -> tuple[int, int, dict[str, gohsp.ModelMask]]:
    """Features and tokens of a timm model, and its masks: dense, the preset, and a random heterogeneous one.

    Raises:
        ValueError: for a model without a preset.
    """
    if model not in PRESETS:
        raise ValueError(f"model: wanted one of {', '.join(PRESETS)}; got {model!r}")
    with torch.device("meta"):
        dense = timm.create_model(model)
    preset = gohsp.ModelMask.full(dense)
    heads, neurons = PRESETS[model]
    for block in preset.blocks:
        block.heads[heads:] = False
        block.hidden[neurons:] = False
    ragged = gohsp.ModelMask.random(dense, keep=RAGGED_SHARE, generator=torch.Generator().manual_seed(SEED))
    tokens = dense.patch_embed.num_patches + dense.num_prefix_tokens
    return dense.embed_dim, tokens, {"dense": gohsp.ModelMask.full(dense), "preset": preset, "ragged": ragged}


def results(
    models: Sequence[str] = tuple(PRESETS), batches: Sequence[int] = BATCHES, gpus: Sequence[Gpu] = GPUS
) -> Iterator[Modelled]:
    """Every model, layout, batch and GPU: our launches, and the same mask unfused."""
    for model in models:
        features, tokens, layouts = masks(model)
        for layout, mask in layouts.items():
            for batch in batches:
                blocks = [Block(block.layout(), features, batch, tokens) for block in mask.blocks]
                others = [launch for block in blocks for launch in unfused(block)]
                for gpu in gpus:
                    mine = [launch for block in blocks for launch in ours(gpu, block)]
                    yield summarise(gpu, model, layout, "ours", blocks, mine)
                    yield summarise(gpu, model, layout, "unfused", blocks, others)


def run(
    models: Sequence[str] = tuple(PRESETS),
    batches: Sequence[int] = BATCHES,
    gpus: Sequence[Gpu] = GPUS,
    write: Callable[[str], object] = print,
) -> None:
    """Write one line for each result.

    Args:
        models: timm names, of those in PRESETS.
        batches: images at a time.
        gpus: data sheets.
        write: takes a line.
    """
    for result in results(models, batches, gpus):
        write(result.line())
