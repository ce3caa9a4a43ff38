# SPDX-License-Identifier: Apache-2.0
"""Who is compared end to end, each made ready as its own documentation advises for low latency on a CPU.

Fairness. All run in fp32 but those named after another precision: gohsp-int8 and gohsp-bf16, to be compared with
gohsp, openvino-bf16 and compile-bf16, to be compared with gohsp-bf16. All have the same number of threads. OpenVINO is
told f32 (it would take bf16 where the CPU has it) or bf16, one stream and the latency hint. ONNX Runtime's threads spin
while a model runs, as by default, and stop when the run ends, so that they take no core from the next contender. Both
get the model with its batch size fixed, and torch.compile gets static shapes. Compilation and export are never part of
a timing.
"""

from __future__ import annotations

import copy
import importlib
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gohsp
import gohsp_kernels as gk
from bench.harness.cases import Workload
from bench.harness.compare import BASELINE, TOLERANCE, ReadyContender
from bench.harness.environment import Settings, version_of
from gohsp_kernels.formats import FORMATS, ROUNDED

Forward = Callable[[Tensor], Tensor]

OWN = {f"{BASELINE}-{FORMATS[name].short}": name for name in ROUNDED} | {BASELINE: "float32"}
"""gohsp's contenders that are frozen, and the formats of their weights."""

REFERENCE_CHUNK = 8
"""Images that go through the float64 model at once: its activations are large."""


class Unavailable(Exception):
    """A contender cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Job:
    """What a contender is made for.

    Attributes:
        work: The models.
        images: The input, [batch, C, height, width].
        threads: Number of threads that it may use.
        scratch: Directory for exported models.
    """

    work: Workload
    images: Tensor
    threads: int
    scratch: Path


@dataclass(frozen=True)
class Contender:
    """How to make a contender.

    Attributes:
        build: Returns the function that is timed; raises :class:`Unavailable`.
        library: Distribution whose version is stored.
        pruned: False for the unpruned model, which is checked against itself in float64.
        optional: Whether it is left out, with the reason, where another library fails to make it.
        dtype: Type of weights and activations, as stored.
        tolerance: Largest relative error of a result that may be timed.
    """

    build: Callable[[Job], Forward]
    library: str = "torch"
    pruned: bool = True
    optional: bool = False
    dtype: str = "float32"
    tolerance: float = TOLERANCE


@contextmanager
def ready(names: Sequence[str], work: Workload, images: Tensor, settings: Settings) -> Iterator[list[ReadyContender]]:
    """Make contenders ready for one input; what they wrote to disk goes when the ``with`` block ends.

    Those that cannot run are left out, and the reason is printed.

    Args:
        names: Names of the contenders; see :data:`CONTENDERS`.
        work: The models.
        images: The input.
        settings: Threads and console.

    Raises:
        ValueError: There is no contender of that name.
    """
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        raise ValueError(f"contenders: wanted some of {', '.join(CONTENDERS)}; got {', '.join(unknown)}")
    # Dynamo falls back to eager, without a word, after eight versions of the same code.
    torch.compiler.reset()
    made = []
    with tempfile.TemporaryDirectory() as scratch, settings.console.status("float64") as status:
        job = Job(work, images, settings.threads, Path(scratch))
        expected = {pruned: _in_float64(job, pruned) for pruned in {CONTENDERS[name].pruned for name in names}}
        for name in names:
            status.update(f"making ready: {name}")
            try:
                made.append(_set_up(name, job, expected[CONTENDERS[name].pruned]))
            except Unavailable as reason:
                settings.report_left_out(name, str(reason))
        status.stop()
        yield made


def why_not(name: str) -> str:
    """Return why a contender cannot run on this machine, whatever the model; empty where it can."""
    if name in OWN:
        return gk.can_run("cpu", weights=OWN[name]).reason
    try:
        for module in _MODULES.get(name, ()):
            _import(module)
    except Unavailable as reason:
        return str(reason)
    return ""


@torch.inference_mode()
def _in_float64(job: Job, pruned: bool) -> Tensor:
    model = job.work.masked_in_double() if pruned else copy.deepcopy(job.work.dense).double()
    return torch.cat([model(chunk.double()) for chunk in job.images.split(REFERENCE_CHUNK)])


def eager(model: nn.Module) -> Forward:
    """Return the model as it is, without autograd."""

    def run(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(x)

    return run


def _set_up(name: str, job: Job, expected: Tensor) -> ReadyContender:
    contender, start = CONTENDERS[name], time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            forward = contender.build(job)
            forward(job.images)
    except Exception as error:
        if isinstance(error, Unavailable) or not contender.optional:
            raise
        lines = str(error).strip().splitlines() or [""]
        raise Unavailable(f"{type(error).__name__}: {lines[0][:200]}") from error
    seconds = time.perf_counter() - start
    version, kind = version_of(contender.library), (contender.dtype, contender.tolerance)
    return ReadyContender(name, lambda: forward(job.images), expected, version, seconds, *kind)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{error}; pip install '.[bench]' brings it") from error


def _reference(job: Job) -> Forward:
    forward = eager(job.work.compressed)

    def run(x: Tensor) -> Tensor:
        with gk.use_backend("reference"):
            return forward(x)

    return run


def _frozen(weights: str) -> Callable[[Job], Forward]:
    def build(job: Job) -> Forward:
        support = gk.can_run("cpu", weights=weights)
        if not support:
            raise Unavailable(support.reason)
        return eager(gohsp.freeze(job.work.compressed, weights=weights))

    return build


def _compiled_bf16(job: Job) -> Forward:
    # Freezing folds the rounding of the weights into them; without it every call would do it again.
    forward = _compiled(freezing=True)(job)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(x)

    return run


def _compiled(**options: Any) -> Callable[[Job], Forward]:
    def build(job: Job) -> Forward:
        model: Any = torch.compile(job.work.sliced, fullgraph=True, dynamic=False, options=options)
        return eager(model)

    return build


def _onnx_file(job: Job) -> Path:
    """Export the sliced model, once for all contenders that read it."""
    for module in _EXPORTER:
        _import(module)
    path = job.scratch / "sliced.onnx"
    if not path.exists():
        program: Any = torch.onnx.export(job.work.sliced, (job.images,), dynamo=True, verbose=False)
        program.save(path)
    return path


def _openvino(job: Job, precision: str = "f32") -> Forward:
    openvino = _import("openvino")
    config = {
        "INFERENCE_NUM_THREADS": job.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    request = openvino.Core().compile_model(_onnx_file(job), "CPU", config).create_infer_request()

    def run(x: Tensor) -> Tensor:
        result = request.infer([x.numpy()], share_inputs=True, share_outputs=True)
        return torch.from_numpy(result[0])

    return run


def _onnxruntime(job: Job) -> Forward:
    onnxruntime = _import("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = job.threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(_onnx_file(job), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: x.numpy()})[0])

    return run


def _torch_pruning(job: Job) -> Forward:
    if job.work.uniform is None:
        raise Unavailable("this mask is not the same number of whole heads and of neurons in every block")
    pruning = _import("torch_pruning")
    heads, hidden = job.work.uniform
    # Its dependency graph is read off autograd's.
    model: Any = copy.deepcopy(job.work.dense).requires_grad_(True)
    graph = pruning.DependencyGraph().build_dependency(model, example_inputs=job.images[:1])
    for block in model.blocks:
        attn, fc1 = block.attn, block.mlp.fc1
        _prune_from(pruning, graph, attn.qkv, heads * attn.head_dim, attn.attn_dim)
        _prune_from(pruning, graph, fc1, hidden, fc1.out_features)
        attn.num_heads, attn.attn_dim = heads, heads * attn.head_dim
    return eager(model.requires_grad_(False))


def _prune_from(pruning: Any, graph: Any, layer: nn.Module, first: int, end: int) -> None:
    if first < end:
        graph.get_pruning_group(layer, pruning.prune_linear_out_channels, idxs=list(range(first, end))).prune()


_BF16: dict[str, Any] = {"dtype": "bfloat16", "tolerance": FORMATS["bfloat16"].tolerance}

CONTENDERS: dict[str, Contender] = {
    "dense": Contender(lambda job: eager(job.work.dense), pruned=False),
    "masked": Contender(lambda job: eager(job.work.masked)),
    "sliced": Contender(lambda job: eager(job.work.sliced)),
    "compile": Contender(_compiled(), optional=True),
    "compile-freezing": Contender(_compiled(freezing=True), optional=True),
    "openvino": Contender(_openvino, "openvino", optional=True),
    "onnxruntime": Contender(_onnxruntime, "onnxruntime", optional=True),
    "torch-pruning": Contender(_torch_pruning, "torch-pruning", optional=True),
    "gohsp-reference": Contender(_reference, "gohsp"),
    "compile-bf16": Contender(_compiled_bf16, optional=True, **_BF16),
    "openvino-bf16": Contender(lambda job: _openvino(job, "bf16"), "openvino", optional=True, **_BF16),
    **{
        name: Contender(_frozen(weights), "gohsp", dtype=weights, tolerance=FORMATS[weights].tolerance)
        for name, weights in OWN.items()
    },
}
"""All contenders. dense: unpruned, eager. masked: the dense model with pruned entries zero, eager. sliced: the pruned
model as plain PyTorch, eager; compile, openvino and onnxruntime run that too. gohsp-reference: the compressed model on
gohsp's own PyTorch backend. gohsp: frozen, on its kernels. gohsp-int8, gohsp-bf16: frozen with such weights.
openvino-bf16: with that inference precision. compile-bf16: compile-freezing under autocast. What runs in another
precision is checked against the same float64 result with a tolerance of its own."""

_EXPORTER = ("onnx", "onnxscript")
_MODULES = {
    "openvino": ("openvino", *_EXPORTER),
    "openvino-bf16": ("openvino", *_EXPORTER),
    "onnxruntime": ("onnxruntime", *_EXPORTER),
    "torch-pruning": ("torch_pruning",),
}
