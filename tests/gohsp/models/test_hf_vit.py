# SPDX-License-Identifier: Apache-2.0
"""transformers' own ways with a compressed model: outputs, hooks, checkpoints, configuration; and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import gohsp
import gohsp_kernels as gk
from gohsp.masks.mask import ModelMask
from gohsp.models import hf_vit
from gohsp.models.registry import family_of, open_model
from tests.gohsp.models.test_adapters import compressed, masks
from tests.gohsp.models.zoo import REGISTERS, SIZES, WIDE, difference, images, make

TOWERS = pytest.mark.parametrize("name", ["ViTModel", "ViTForImageClassification", "Dinov2Model", "CLIPVisionModel"])


@TOWERS
def test_hidden_states_are_those_of_the_masked_model(name: str) -> None:
    model, x = make(name), images()
    with torch.no_grad():
        model(x, output_hidden_states=True)  # which leaves hooks of transformers on the layers
        mask = masks(model)[0]
        small = gohsp.compress(model, mask)
        wanted = mask.apply_(copy.deepcopy(model))(x, output_hidden_states=True).hidden_states
        assert len(wanted) == 3
        for other in (small, gohsp.densify(small), pickle.loads(pickle.dumps(small))):
            assert difference(dict(h=other(x, output_hidden_states=True).hidden_states), dict(h=wanted)) < 1e-12
        assert small(x).hidden_states is None
        gohsp.densify(small)  # whose layers carry such hooks now


def test_a_hook_of_the_users_is_not_taken_for_one_of_transformers() -> None:
    small = compressed(make("ViTModel"))
    small.layers[1].register_forward_hook(lambda module, args, out: out)
    with pytest.raises(ValueError, match="a hook hangs on the block"):
        gohsp.densify(small)
    model = make("ViTModel")
    model.layers[1].register_forward_hook(lambda module, args, out: out)
    with pytest.raises(ValueError, match=r"a hook hangs on blocks\.1, which compress replaces"):
        compressed(model)


@TOWERS
def test_probabilities_of_attention_are_refused_in_words(name: str) -> None:
    small = compressed(make(name)).float()
    models = [small, gohsp.freeze(small)] if gk.can_run("cpu") else [small]
    for model in models:
        assert model(images().float()).get("attentions") is None
        with pytest.raises(ValueError, match="output_attentions: wanted False; got True, but the kernels keep no"):
            model(images().float(), output_attentions=True)


@pytest.mark.skipif(not gk.can_run("cpu"), reason="no CPU kernels")
def test_a_frozen_model_says_what_it_does_not_give() -> None:
    frozen = gohsp.freeze(compressed(make("ViTModel")).float())
    with pytest.raises(ValueError, match="output_hidden_states: wanted False; got True"):
        frozen(images().float(), output_hidden_states=True)
    with pytest.raises(ValueError, match="attention_mask: wanted None"):
        frozen(images().float(), attention_mask=torch.tensor([[1] * 16 + [0]] * 2))


def test_attention_masks_reach_the_heads_that_are_left() -> None:
    model, x = make("ViTModel"), images()
    mask = masks(model)[0]
    hidden = torch.tensor([[1] * 9 + [0] * 8, [1] * 17])
    small = gohsp.compress(model, mask)
    with torch.no_grad():
        wanted = mask.apply_(model)(x, attention_mask=hidden)
        assert difference(small(x, attention_mask=hidden), wanted) < 1e-12
        assert difference(gohsp.densify(small)(x, attention_mask=hidden), wanted) < 1e-12
        assert difference(small(x), wanted) > 1e-3


def test_gradients_are_checkpointed() -> None:
    small, x = compressed(make("Dinov2Model")).train(), images()
    for layer in small.encoder.layer:
        layer.drop_path1 = layer.drop_path2 = nn.Identity()
    calls: list[object] = []
    small.encoder.layer[0].attn.register_forward_hook(lambda *call: calls.append(call))

    def gradients() -> dict[str, Tensor]:
        small.zero_grad()
        small(x).last_hidden_state.square().sum().backward()
        return {name: p.grad.clone() for name, p in small.named_parameters() if p.grad is not None}

    wanted = gradients()
    assert len(calls) == 1
    small.gradient_checkpointing_enable()
    got = gradients()
    assert len(calls) == 3  # once more on the way back
    torch.testing.assert_close(got, wanted)


def test_dropout_of_the_configuration_drops(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**WIDE, hidden_dropout_prob=0.4, attention_probs_dropout_prob=0.3)
    small = compressed(transformers.ViTModel(config))
    layer = small.layers[0]
    assert (layer.attn.attn_drop.p, layer.attn.proj_drop.p, layer.mlp.drop2.p) == (0.3, 0.4, 0.4)
    assert small.training
    x = images().float()
    assert not torch.equal(small(x).last_hidden_state, small(x).last_hidden_state)
    gohsp.save(small, tmp_path)
    assert gohsp.load(tmp_path).layers[0].attn.attn_drop.p == 0.3


def test_save_pretrained_writes_a_checkpoint_and_says_that_it_is_no_more(tmp_path: Path) -> None:
    small = compressed(make("ViTForImageClassification")).float()
    with pytest.warns(UserWarning, match=r"from_pretrained cannot read them.*gohsp\.save"):
        small.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    other = compressed(make("ViTForImageClassification").float())
    other.load_state_dict({name: torch.zeros_like(value) for name, value in saved.items()})
    other.load_state_dict(saved)
    assert difference(other(images().float()), small(images().float())) == 0
    gohsp.densify(small).save_pretrained(tmp_path / "plain")  # of transformers' own class, so without a word
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.ViTForImageClassification.from_pretrained(tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:save_pretrained")
def test_a_trainer_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    data = [{"pixel_values": image.float(), "labels": index % 5} for index, image in enumerate(images(8))]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        save_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )

    def trained(checkpoint: str | None) -> dict[str, Tensor]:
        model = compressed(make("ViTForImageClassification").float())
        transformers.Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=checkpoint)
        return model.state_dict()

    whole = trained(None)
    torch.testing.assert_close(trained(str(tmp_path / "checkpoint-2")), whole)
    assert not torch.equal(whole["classifier.weight"], make("ViTForImageClassification").float().classifier.weight)


def test_names_of_classes_are_saved(tmp_path: Path) -> None:
    config = transformers.Dinov2Config(**SIZES, mlp_ratio=2, id2label={0: "cat", 1: "dog", 2: "eel"})
    small = compressed(transformers.Dinov2ForImageClassification(config))
    gohsp.save(small, tmp_path)
    loaded: Any = gohsp.load(tmp_path)
    assert loaded.config.id2label == {0: "cat", 1: "dog", 2: "eel"}
    assert loaded.config.label2id["eel"] == 2
    assert family_of(loaded).classes(loaded) == 3


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda plan: plan.update({"class": "CLIPTextModel"}),
            r"plan\.model\.class: wanted one of \['CLIPForIm.*CLIPText",
        ),
        (lambda plan: plan["config"].update(auto_map="x"), r"plan\.model\.config\.auto_map"),
        (lambda plan: plan["config"].update(hidden_size=2**40), r"plan\.model\.config\.hidden_size"),
        (lambda plan: plan["config"].update(hidden_act="xielu"), r"plan\.model\.config\.hidden_act"),
        (lambda plan: plan["config"].update(patch_size=[8, 0]), r"plan\.model\.config\.patch_size"),
        (lambda plan: plan["config"].update(patch_size=4), "not of one save"),
        (lambda plan: plan["config"].update(num_attention_heads=5), "made for .*num_heads=3.* the model is .*=5"),
        (lambda plan: plan["config"].update(num_hidden_layers=3), "made for .*depth=2.* the model is .*depth=3"),
        (lambda plan: plan["options"].update(attn_implementation="x"), r"plan\.model\.options\.attn_implementation"),
        (lambda plan: plan.update(labels=[1]), r"plan\.model\.labels"),
    ],
)
def test_wrong_plans_are_refused(tmp_path: Path, edit: Any, message: str) -> None:
    gohsp.save(compressed(make("ViTModel")), tmp_path)
    where = tmp_path / "plan.json"
    plan = json.loads(where.read_text())
    edit(plan["model"])
    where.write_text(json.dumps(plan))
    with pytest.raises(ValueError, match=message):
        gohsp.load(tmp_path)


def _refused(model: nn.Module, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        open_model(model)


def test_what_cannot_be_pruned_exactly_is_refused_with_the_reason() -> None:
    gated = transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, mlp_ratio=2, use_swiglu_ffn=True))
    _refused(gated, r"cannot prune encoder\.layer\.0: mlp is Dinov2SwiGLUFFN \(a gated MLP")
    gated = transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**REGISTERS, use_swiglu_ffn=True)
    )
    _refused(gated, r"cannot prune encoder\.layer\.0: mlp is Dinov2WithRegistersSwiGLUFFN \(a gated MLP")
    _refused(transformers.ViTModel(transformers.ViTConfig(**WIDE, hidden_act="mish")), "activation MishActivation")
    model = make("ViTModel")
    model.layers[1].attention.q_proj = nn.Sequential(model.layers[1].attention.q_proj)
    _refused(model, r"cannot prune layers\.1: attention\.q_proj is torch.*Sequential; wanted torch\.nn\.Linear")
    model = make("ViTModel")
    model.layers[1].layernorm_after = nn.Identity()
    _refused(model, r"cannot prune layers\.1: layernorm_after is Identity")
    _refused(compressed(make("ViTForImageClassification")).vit, r"layers\.0: wanted ViTLayer, got PrunedViTLayer")
    _refused(transformers.ViTModel(transformers.ViTConfig(**{**WIDE, "num_hidden_layers": 0})), "no transformer layers")

    class Own(transformers.ViTModel):
        pass

    _refused(Own(transformers.ViTConfig(**WIDE)), r"wanted ViTModel or .* \(not a subclass\), got .*Own")


@pytest.mark.slow
def test_the_refusal_says_which_part_to_give() -> None:
    text = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 24}
    model = transformers.CLIPModel(transformers.CLIPConfig(vision_config=WIDE, text_config=text))
    _refused(model, r"got transformers.*CLIPModel\. Its vision_model is a CLIPVisionModel: give model\.vision_model")
    inner = make("ViTModel")
    _refused(nn.DataParallel(inner), r"DataParallel\. Its module is a ViTModel: give model\.module")
    _refused(torch.compile(inner), r"OptimizedModule\. Its _orig_mod is a ViTModel: give model\._orig_mod")
    wrapped = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args={"depth": 1})
    _refused(transformers.TimmWrapperModel(wrapped), r"Its timm_model is a VisionTransformer: give model\.timm_model")
    swin = transformers.SwinModel(transformers.SwinConfig(embed_dim=12, depths=[1], num_heads=[1]))
    _refused(swin, r"wanted a timm .* or a transformers ViT, .*, got transformers\.[\w.]+\.SwinModel$")


@pytest.mark.parametrize("activation", sorted(set(hf_vit._Config.model_fields["hidden_act"].annotation.__args__)))
def test_activations_mean_the_same_in_the_kernels(activation: str) -> None:
    module = transformers.activations.ACT2FN[activation]
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    torch.testing.assert_close(gk.ACTIVATIONS[hf_vit.ACTIVATIONS[type(module)]](x), module(x))


@pytest.mark.slow
def test_transformers_is_imported_for_its_models_alone_and_by_a_pickle_of_one(tmp_path: Path) -> None:
    small, x = compressed(make("CLIPVisionModel")), images()
    torch.save((small, x), tmp_path / "model.pt")
    code = (
        "import sys, timm, torch, gohsp;"
        "gohsp.accelerate(timm.create_model('vit_tiny_patch16_224', depth=1));"
        "print('transformers' in sys.modules);"
        "small, x = torch.load(sys.argv[1], weights_only=False);"
        "out = small(x, output_hidden_states=True);"
        "print(len(out.hidden_states), float(out.pooler_output.detach().sum()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True, check=True
    )
    imported, depth, total = run.stdout.split()
    assert (imported, depth) == ("False", "3")
    assert float(total) == pytest.approx(float(small(x).pooler_output.detach().sum()))


@pytest.fixture
def clip() -> Any:
    text = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 24}
    torch.manual_seed(0)
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=WIDE, text_config=text)).double().eval()


WORDS = torch.tensor([[1, 5, 49407], [1, 9, 49407], [3, 4, 49407]])


def test_the_tower_of_clip_is_pruned_in_its_place(clip: Any) -> None:
    mask = ModelMask.random(clip.vision_model, 0.7, torch.Generator().manual_seed(0))
    masked = copy.deepcopy(clip)
    mask.apply_(masked.vision_model)
    clip.vision_model = gohsp.compress(clip.vision_model, mask)
    with torch.no_grad():
        got, wanted = (m(input_ids=WORDS, pixel_values=images()).logits_per_image for m in (clip, masked))
    assert got.shape == (2, 3)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_words_attend_to_earlier_ones_alone(clip: Any, padded: bool, attention: str) -> None:
    clip.set_attn_implementation(attention)
    fast = gohsp.accelerate(clip)
    attended = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 1]]) if padded else None
    given = {"input_ids": WORDS, "pixel_values": images(), "attention_mask": attended}
    with torch.no_grad():
        torch.testing.assert_close(fast(**given).text_embeds, clip(**given).text_embeds, rtol=0, atol=1e-7)
        layer = fast.text_model.encoder.layers[0]
        with pytest.raises(ValueError, match=r"attention_mask: wanted \[B, heads, N, N\].*got \[2, 3\]"):
            layer(torch.zeros(2, 3, 24, dtype=torch.float64), torch.ones(2, 3))


def dinov3() -> tuple[Any, Any]:
    """The masked DINOv3 and the compressed one, in float64."""
    model = make("DINOv3ViTModel")
    mask = ModelMask.random(model, 0.7, torch.Generator().manual_seed(2))
    return mask.apply_(copy.deepcopy(model)), gohsp.compress(model, mask)


def test_layers_hold_the_rotary_positions_of_the_images_that_come() -> None:
    masked, small = dinov3()
    held = small.model.layer[0].positions
    for size in ((48, 24), (32, 32), (24, 48)):
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            assert difference(small(x).last_hidden_state, masked(x).last_hidden_state) < 1e-12
        assert small.model.layer[0].positions.shape[1] == size[0] * size[1] // 64
        assert difference(small(x).last_hidden_state, masked(x).last_hidden_state) < 1e-12  # and with gradients
    if gk.can_run("cpu"):
        frozen = gohsp.freeze(small.float())
        assert small.model.layer[0].positions.shape == held.shape
        with torch.no_grad():
            wanted = masked(images()).last_hidden_state
        assert difference(frozen(images().float()).last_hidden_state, wanted) < 1e-5
        with pytest.raises(ValueError, match="whose rotary positions a frozen model holds"):
            frozen(torch.randn(1, 3, 24, 48))


def test_positions_that_training_shifts_are_those_of_the_step() -> None:
    masked, small = dinov3()
    for model in (masked, small):
        for layer in model.model.layer:
            layer.drop_path = layer.drop_path1 = layer.drop_path2 = nn.Identity()
    answers = []
    for model in (masked, small):
        torch.manual_seed(3)
        answers.append(model.train()(images()).last_hidden_state)
    assert difference(*answers) < 1e-6  # transformers computes angles in float32
    with torch.no_grad():
        assert difference(small.eval()(images()).last_hidden_state, answers[1]) > 1e-3


def test_images_of_another_size_are_pruned_where_the_configuration_says_so() -> None:
    model, x = make("DINOv3ViTModel"), torch.randn(4, 3, 48, 24, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"set config\.image_size to what the images are"):
        gohsp.prune(model, [x], {"params": 0.8})
    model.config.image_size = [48, 24]
    result = gohsp.prune(model, [x], {"params": 0.8})
    with torch.no_grad():
        small = gohsp.compress(result.model, result.mask)
        assert difference(small(x).last_hidden_state, result.model(x).last_hidden_state) < 1e-10


def test_a_layer_alone_knows_no_positions() -> None:
    model = make("DINOv3ViTModel")
    with pytest.raises(ValueError, match="its model gives it rotary positions; wanted the model"):
        gohsp.compress_block(model.model.layer[0], gohsp.BlockMask.full_of(open_model(model).blocks[0]))
