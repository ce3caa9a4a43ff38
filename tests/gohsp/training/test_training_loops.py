# SPDX-License-Identifier: Apache-2.0
"""A compressed model in the training loops that people use: each evaluation is of the weights as they are then."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm.optim
import torch
import torch.distributed as dist
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset

import gohsp
import gohsp_kernels as gk
from gohsp_kernels import _native

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not _native.load(), reason=_native.load().reason)]


class Pictures(Dataset[dict[str, Tensor]]):
    """Random images with random labels, as the loops want them."""

    def __init__(self, count: int = 8) -> None:
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randn(count, 3, 48, 48, generator=generator)
        self.labels = torch.arange(count) % 5

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


class Classifier(nn.Module):
    """A model of timm behind the interface that Hugging Face's Trainer calls."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.vit(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.fixture
def model(make_model: Callable[..., Any]) -> Any:
    dense = make_model(num_classes=5).float()
    keep = {"heads": 0.7, "qk": 0.7, "v": 0.7, "hidden": 0.5}
    return gohsp.compress(dense, gohsp.ModelMask.random(dense, keep, torch.Generator().manual_seed(3)))


class Judge:
    """Compares what a loop was told with the definition in plain PyTorch, and notes that it changes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.images = Pictures().images
        self.seen: list[Tensor] = []

    def look(self, logits: Tensor) -> None:
        twin = copy.deepcopy(self.model).eval()
        with torch.no_grad(), gk.use_backend("reference"):
            wanted = twin(self.images)
        assert float((logits - wanted).norm() / wanted.norm()) < 1e-4
        self.seen.append(logits.detach().clone())

    def looked(self, times: int) -> None:
        assert len(self.seen) >= times
        for before, after in zip(self.seen, self.seen[1:], strict=False):
            assert float((after - before).norm() / before.norm()) > 1e-3


def train_once(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step on all pictures; the model is left in evaluation mode."""
    data = Pictures()
    model.train()
    nn.functional.cross_entropy(model(data.images), data.labels).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_trainer_of_hugging_face(model: Any, tmp_path: Path) -> None:
    """With its default optimiser, the fused AdamW, which moves no version counter."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    judge = Judge(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=3,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    assert arguments.optim == "adamw_torch_fused"
    trainer = transformers.Trainer(
        Classifier(model),
        arguments,
        train_dataset=Pictures(),
        eval_dataset=Pictures(),
        compute_metrics=lambda told: judge.look(torch.as_tensor(told.predictions)) or {},
    )
    trainer.evaluate()
    trainer.train()
    judge.looked(4)


def test_accelerate(model: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    judge = Judge(model)
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Pictures(), batch_size=4))
    for _ in range(2):
        for batch in loader:
            prepared.train()
            accelerator.backward(nn.functional.cross_entropy(prepared(batch["pixel_values"]), batch["labels"]))
            optimizer.step()
            optimizer.zero_grad()
            prepared.eval()
            with torch.inference_mode():
                judge.look(prepared(judge.images))
    judge.looked(4)


def test_task_of_timm(model: Any) -> None:
    """The loop of timm's train script: a task with an average of its model, an optimiser by name."""
    task = ClassificationTask(model, verbose=False)
    task.setup_ema(decay=0.5)
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05)
    judge, data = Judge(model), Pictures()
    averaged = Judge(task.trainable_module_ema)
    for step in range(1, 4):
        task.train()
        task(data.images, data.labels)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=step)
        task.eval()
        with torch.no_grad():
            judge.look(model(data.images))
            averaged.look(task.trainable_module_ema(data.images))
    judge.looked(3)
    averaged.looked(3)


@pytest.mark.filterwarnings("error:FSDP2-wrapped module")
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("by_block", [False, True], ids=["as a whole", "block by block"])
def test_fully_sharded(by_block: bool, model: Any) -> None:
    """FSDP2: parameters are shards, gathered by hooks before the modules that read them are called."""
    twin = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks if by_block else ():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.numel()], lr=1e-2)
    judge = Judge(twin)
    for _ in range(3):
        train_once(model, optimizer)
        twin.load_state_dict({name: value.full_tensor() for name, value in model.state_dict().items()})
        with torch.no_grad():
            judge.look(model(judge.images))
    judge.looked(3)


def test_adapters_of_peft(model: Any) -> None:
    """LoRA on the classifier trains and is seen; on the cut layers it is refused by peft, which knows them not."""
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="CompactLinear"):
        peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["qkv"]))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["head"], init_lora_weights=False))
    judge = Judge(adapted)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-1, fused=True)
    for _ in range(3):
        train_once(adapted, optimizer)
        with torch.no_grad():
            judge.look(adapted(judge.images))
    judge.looked(3)
