# SPDX-License-Identifier: Apache-2.0
"""CLIP with a pruned image tower: the text tower, and how the two are compared, stay as they are.

    python examples/zero_shot.py openai/clip-vit-base-patch32 --images path/to/folder --labels "a dog" "a cat"

Without a name, a small CLIP of random weights sees random images: then only agreement and times mean something.
"""

import argparse
import copy

import torch
from transformers import AutoProcessor, CLIPConfig, CLIPModel

import gohsp
from gohsp.timing import interleave

parser = argparse.ArgumentParser()
parser.add_argument("name", nargs="?", help="of a CLIP on the Hugging Face hub, or its folder")
parser.add_argument("--images", help="folder of images")
parser.add_argument("--labels", nargs="+", default=["a photo of a dog", "a photo of a cat"])
options = parser.parse_args()

if options.name:
    from torchvision.datasets import ImageFolder

    model, processor = CLIPModel.from_pretrained(options.name).eval(), AutoProcessor.from_pretrained(options.name)
    photos = [photo for photo, _ in ImageFolder(options.images)][:256]
    inputs = processor(text=options.labels, images=photos, return_tensors="pt", padding=True)
else:
    tower = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 6}
    config = CLIPConfig(text_config=dict(tower), vision_config={**tower, "image_size": 64, "patch_size": 8})
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    inputs = {"pixel_values": torch.randn(64, 3, 64, 64), "input_ids": torch.randint(1, 1000, (2, 5))}

pixels, text = inputs["pixel_values"], {key: value for key, value in inputs.items() if key != "pixel_values"}
result = gohsp.prune(model.vision_model, pixels.split(32), {"params": 0.65})
pruned = copy.deepcopy(model)
pruned.vision_model = gohsp.freeze(gohsp.compress(result.model, result.mask))
with torch.inference_mode():
    before, after = (m(pixel_values=pixels, **text).logits_per_image for m in (model, pruned))
    print(f"same label: {(before.argmax(1) == after.argmax(1)).float().mean():.1%} of {len(pixels)} images")
    runs = {
        name: lambda m=m: m.get_image_features(pixel_values=pixels[:1])
        for name, m in (("dense", model), ("pruned", pruned))
    }
    for name, timing in interleave(runs, rounds=10).items():
        print(f"{name}: {1e3 * timing.median:.1f} ms an image")
