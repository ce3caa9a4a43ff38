# SPDX-License-Identifier: Apache-2.0
"""Which models of timm, torchvision and transformers gohsp takes, each tried: what ``gohsp models`` prints and writes.

A model is looked at with all its layers, without weights. Where it is taken, one of the same blocks is made, small and
with random weights, pruned by a random mask and compared with the masked dense one in float64.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.models.eva import Eva
from timm.models.hiera import Hiera
from timm.models.hieradet_sam2 import HieraDet
from timm.models.maxxvit import MaxxVit
from timm.models.nest import Nest
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from torch import Tensor, nn

from gohsp.compress import compress, densify
from gohsp.count import count
from gohsp.files import cut, parse_json, write_text
from gohsp.masks.mask import ModelMask
from gohsp.models.registry import family_of, open_block, open_model
from gohsp.serialization import plan_of

LARGEST = 1e8
"""Parameters of a block; that of a larger one is not compared."""

TRANSFORMERS = (
    *("ViTModel", "ViTForImageClassification", "ViTForMaskedImageModeling"),
    *("DeiTModel", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher", "DeiTForMaskedImageModeling"),
    *("Dinov2Model", "Dinov2ForImageClassification", "Dinov2Backbone"),
    *("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersBackbone"),
    *("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPForImageClassification", "CLIPModel"),
    *("SiglipVisionModel", "SiglipForImageClassification", "SiglipModel", "Siglip2VisionModel"),
    *("DINOv3ViTModel", "BeitModel", "Data2VecVisionModel", "SwinModel", "Swinv2Model", "ViTMAEModel", "ViTMSNModel"),
    *("ViTMSNForImageClassification", "IJepaModel", "IJepaForImageClassification"),
    *("HieraModel", "PvtModel", "SegformerModel", "YolosModel", "VitDetModel", "MobileViTModel", "LevitModel"),
    *("BlipVisionModel", "SamVisionModel", "VivitModel", "CvtModel"),
)
"""Classes of transformers that are looked at."""


@dataclass(frozen=True)
class Entry:
    """What was found of one model.

    Attributes:
        library, name: Of timm and torchvision a registered name, of transformers a class.
        kind: Its class, with the last part of the module.
        verdict: "yes", "blocks" (single blocks can be replaced, see :func:`gohsp.compress_block`) or "no".
        reason: Why not, or which blocks.
        error: Relative difference between compact and masked model in float64; None where that was not compared.
    """

    library: str
    name: str
    kind: str
    verdict: str
    reason: str
    error: float | None

    def line(self) -> str:
        """Return one line for a reader."""
        told = self.reason or ("not compared" if self.error is None else f"agrees to {self.error:.0e}")
        return f"{self.library}:{self.name}  {self.verdict}  {told}"


def names(patterns: Iterable[str] = ("*",)) -> Iterator[tuple[str, str]]:
    """Return (library, name) of what is known under some patterns of the shell's kind, with or without the library."""
    known = [("timm", name) for name in timm.list_models()]
    known += [("torchvision", name) for name in torchvision.models.list_models(module=torchvision.models)]
    if find_spec("transformers"):
        known += [("transformers", name) for name in TRANSFORMERS]
    wanted = list(patterns)
    for library, name in known:
        if any(fnmatch.fnmatch(name, p) or fnmatch.fnmatch(f"{library}:{name}", p) for p in wanted):
            yield library, name


def look(library: str, name: str) -> Entry | None:
    """Try one model. None where it holds no block of attention and MLP."""
    try:
        with torch.device("meta"):
            model = _MAKERS[library](name)
    except (
        NotImplementedError,
        RuntimeError,
        ValueError,
        AssertionError,
    ):  # which compute with values when they are made
        model = _MAKERS[library](name)
    kind = f"{type(model).__module__.rpartition('.')[2]}.{type(model).__name__}"
    blocks = _blocks(model)
    if not blocks:
        return None
    try:
        opened = open_model(model)
    except TypeError:
        return Entry(library, name, kind, *_by_blocks(model, blocks), None)
    except ValueError as error:
        return Entry(library, name, kind, "no", str(error).removeprefix("model: "), None)
    largest = max(sum(p.numel() for p in block.module.parameters()) for block in opened.blocks)
    try:
        error_found = None if largest > LARGEST else agreement(_SMALLER[library](name, model))
    except Exception as error:
        return Entry(library, name, kind, "no", f"taken, and then: {type(error).__name__}: {cut(error)}", None)
    return Entry(library, name, kind, "yes", "", error_found)


def agreement(model: nn.Module) -> float:
    """Return the relative difference between a compact model and the masked dense one, on random images in float64.

    Costs are counted, the plan that would be saved is made, and the compact model is made plain, on the way.
    """
    torch.manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    mask = ModelMask.random(model, 0.7, torch.Generator().manual_seed(0))
    small = compress(model, mask)
    shape = family_of(model).image_shape(model) or (3, 224, 224)
    if count(small, shape) != count(model, shape, mask=mask):
        raise ValueError("the compact model costs something else than was counted")
    plan_of(small)
    images = torch.randn(1, *shape, dtype=torch.float64)
    with torch.no_grad():
        wanted = mask.apply_(copy.deepcopy(model))(images)
        return max(_difference(other(images), wanted) for other in (small, densify(small)))


def _difference(got: Any, wanted: Any) -> float:
    pairs = [(got, wanted)] if isinstance(wanted, Tensor) else [(got[k], wanted[k]) for k in wanted]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs if isinstance(b, Tensor))


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules that hold attention and an MLP, as the names of the classes of their children have it."""
    return [module for module in model.modules() if _is_block(module)]


def _is_block(module: nn.Module) -> bool:
    kinds = [type(child).__name__.lower() for child in module.children()]
    attends = any(re.search("att(entio)?n", kind) for kind in kinds)
    if attends and any(re.search("mlp|ffn|feedforward|intermediate|glu", kind) for kind in kinds):
        return True
    # timm's parallel block has both in itself.
    return type(module).__name__.startswith("Parallel") and hasattr(module, "mlp_hidden_dim")


def _by_blocks(model: nn.Module, blocks: list[nn.Module]) -> tuple[str, str]:
    """Return verdict and reason for a model of a class that is not taken as a whole."""
    known, reasons = 0, []
    for block in blocks:
        try:
            known += open_block(block) is not None
        except ValueError as error:
            reasons.append(str(error).removeprefix("block: cannot prune it: "))
    kinds = sorted({type(block).__name__ for block in blocks})
    if known:
        return "blocks", "each block can be replaced" if known == len(
            blocks
        ) else f"{known} of {len(blocks)} blocks can be"
    return "no", (reasons or [f"blocks of another class: {', '.join(kinds)}"])[0]


def _timm(name: str, **arguments: Any) -> nn.Module:
    return timm.create_model(name, pretrained=False, **arguments)


def _torchvision(name: str) -> nn.Module:
    return torchvision.models.get_model(name, weights=None)


def _transformers(name: str, sizes: Mapping[str, Any] | None = None) -> nn.Module:
    import transformers

    kind = getattr(transformers, name)
    config = kind.config_class
    if sizes is None:
        return kind(config())
    known = {
        key: value
        for key, value in sizes.items()
        if hasattr((config.sub_configs.get("vision_config") or config)(), key)
    }
    made = config(vision_config=known) if "vision_config" in config.sub_configs else config(**known)
    return kind(made)


_MAKERS: dict[str, Callable[[str], nn.Module]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
}


def _smaller_timm(name: str, model: Any) -> nn.Module:
    """Return one block behind the embedding, for images of few patches; of stages the first ones, short."""
    model = getattr(model, "encoder", model)
    classes = min(model.num_classes, 5)
    if isinstance(model, MaxxVit):
        dims = [told["num_chs"] for told in model.feature_info[1:3]]
        return _timm(name, img_size=64, embed_dim=dims, depths=(1, 1), num_classes=classes)
    if isinstance(model, Hiera):
        unit, side = {"mask_unit_size": model.q_stride, "q_pool": 1}, 4 * model.patch_stride[0]
        return _timm(name, img_size=side, stages=(1, 2), num_classes=classes, **unit)
    if isinstance(model, HieraDet):
        images = {"pretrained_cfg_overlay": {"input_size": (3, 64, 64)}, "num_classes": classes}
        return _timm(name, stages=(1, 2), q_pool=1, window_spec=(8, 4), **images)
    embed = model.patch_embed
    if isinstance(model, SwinTransformerV2Cr):
        return _timm(name, img_size=64, depths=(2, *[1] * (len(model.stages) - 1)), num_classes=classes)
    if isinstance(model, SwinTransformer | SwinTransformerV2):
        windows = [
            2 * step * side for step, side in zip(embed.patch_size, model.layers[0].blocks[0].window_size, strict=True)
        ]
        return _timm(name, img_size=windows, depths=(2, *[1] * (len(model.layers) - 1)), num_classes=classes)
    if isinstance(model, Nest):
        levels = [level.transformer_encoder[0].attn for level in model.levels[:2]]
        dims, heads = [attn.qkv.in_features for attn in levels], [attn.num_heads for attn in levels]
        side = 4 * model.patch_size
        return Nest(side, 3, model.patch_size, 2, dims, heads, (1, 1), num_classes=classes, pad_type="same")
    ratio = getattr(embed, "feature_ratio", (1, 1))
    sizes = tuple(2 * patch * step for patch, step in zip(embed.patch_size, ratio, strict=True))
    own = getattr(model.blocks[0].attn, "num_kv_heads", None)
    # A list of one for each block, where the architecture has one, is too long for a single block.
    kv = {"num_kv_heads": own} if own and isinstance(model, Eva) else {}
    return _timm(name, img_size=sizes, depth=1, num_classes=classes, **kv)


def _smaller_torchvision(name: str, model: Any) -> nn.Module:
    block = model.encoder.layers[0]
    sizes = {"num_heads": block.num_heads, "hidden_dim": model.hidden_dim, "mlp_dim": model.mlp_dim}
    return torchvision.models.VisionTransformer(2 * model.patch_size, model.patch_size, 1, num_classes=5, **sizes)


def _smaller_transformers(name: str, model: Any) -> nn.Module:
    sizes = {"num_hidden_layers": 1, "image_size": 32, "patch_size": 16, "hidden_size": 48, "num_attention_heads": 3}
    return _transformers(name, {**sizes, "intermediate_size": 96})


_SMALLER: dict[str, Callable[[str, Any], nn.Module]] = {
    "timm": _smaller_timm,
    "torchvision": _smaller_torchvision,
    "transformers": _smaller_transformers,
}


def walk(found: Path | None, patterns: Iterable[str] = ("*",), told: Callable[[str], object] = print) -> list[Entry]:
    """Try all models of some patterns.

    Args:
        found: A line of JSON for each name: an entry, or the name alone where there is no block. What is in it is not
            tried again; what is new is written to it. None for no file.
        patterns: See :func:`names`.
        told: Called with a line about each.

    Returns:
        The entries of these names.

    Raises:
        ValueError: There is no such name, or the file is damaged.
    """
    lines = found.read_bytes().splitlines() if found is not None and found.exists() else []
    known = {(line["library"], line["name"]): line for line in (parse_json(line, str(found)) for line in lines)}
    asked = list(names(patterns))
    if not asked:
        raise ValueError(f"names: wanted some of timm, torchvision or transformers; got {', '.join(patterns)}")
    entries = []
    for library, name in asked:
        if (library, name) not in known:
            entry = look(library, name)
            known[library, name] = {"library": library, "name": name} if entry is None else asdict(entry)
            if found is not None:
                found.parent.mkdir(parents=True, exist_ok=True)
                write_text(found, "".join(f"{json.dumps(line)}\n" for line in known.values()))
        if "verdict" in known[library, name]:
            entries.append(Entry(**known[library, name]))
            told(entries[-1].line())
    return entries


def releases() -> dict[str, str]:
    """Return the releases of the libraries that are looked at."""
    return {library: version(library) for library in _MAKERS if find_spec(library)}


def document(entries: list[Entry], libraries: Mapping[str, str]) -> str:
    """Return what the document says: a table a library, a row for each class and verdict.

    Args:
        entries: What was found.
        libraries: Releases that were looked at.
    """
    looked = ", ".join(f"{library} {release}" for library, release in libraries.items())
    lines = [
        *("# Models", ""),
        "Made by `gohsp models --write docs/models.md`; do not edit. It looks at every registered name of timm and of",
        "torchvision, and at classes of transformers, that hold blocks of attention and MLP. What is taken was tried",
        "with random weights: one block of the model's own width (transformers: of a small one), a random mask over",
        f"all groups, compact and made plain (`densify`) against the masked dense model in float64. {looked}.",
        *("", "- **yes**: everything from ranking to saving works on the model."),
        "- **blocks**: the class is not taken, but blocks of it can be replaced by compact ones, each with a mask of",
        "  its own (`gohsp.compress_block`), or run on the kernels unpruned (`gohsp.accelerate`).",
        *("- **no**: with the first reason.", ""),
        *("| library | names | yes | blocks | no | largest difference |", "| --- | --- | --- | --- | --- | --- |"),
    ]
    for library in libraries:
        own = [entry for entry in entries if entry.library == library]
        counts = [sum(entry.verdict == verdict for entry in own) for verdict in ("yes", "blocks", "no")]
        lines.append(f"| {library} | {len(own)} | {' | '.join(map(str, counts))} | {_worst(own)} |")
    for library in libraries:
        lines += ["", f"## {library}", ""]
        lines += ["| class | taken | names | difference | why |", "| --- | --- | --- | --- | --- |"]
        rows: dict[tuple[str, ...], list[Entry]] = {}
        for entry in entries:
            if entry.library == library:
                rows.setdefault((entry.verdict, entry.kind, entry.reason), []).append(entry)
        order = ("yes", "blocks", "no")
        for (verdict, kind, reason), own in sorted(rows.items(), key=lambda row: (order.index(row[0][0]), row[0])):
            shown = ", ".join(entry.name for entry in own)
            lines.append(f"| {kind} | {verdict} | {len(own)}: {shown} | {_worst(own)} | {reason} |")
    return "\n".join(lines) + "\n"


def _worst(entries: list[Entry]) -> str:
    errors = [entry.error for entry in entries if entry.error is not None]
    return f"{max(errors):.0e}" if errors else ""
