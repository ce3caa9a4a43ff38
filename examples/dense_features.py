# SPDX-License-Identifier: Apache-2.0
"""Maps of features of a pruned backbone, as heads for segmentation and detection read them.

    python examples/dense_features.py swin_tiny_patch4_window7_224 --images path/to/folder

Without a folder, weights and images are random: then only shapes and times mean something.
"""

import argparse

import timm
import torch

import gohsp
from gohsp.timing import interleave

parser = argparse.ArgumentParser()
parser.add_argument("name", nargs="?", default="swin_tiny_patch4_window7_224")
parser.add_argument("--images", help="folder of images to prune with")
parser.add_argument("--count", type=int, default=128, help="of these so many")
options = parser.parse_args()

model = timm.create_model(options.name, pretrained=options.images is not None, num_classes=0).eval()
config = timm.data.resolve_model_data_config(model)
if options.images:
    data = timm.data.create_dataset("", options.images, transform=timm.data.create_transform(**config))
    images = torch.stack([data[i][0] for i in range(min(options.count, len(data)))])
else:
    images = torch.randn(options.count, *config["input_size"], generator=torch.Generator().manual_seed(0))

result = gohsp.prune(model, images.split(32), {"params": 0.65})
small = gohsp.freeze(gohsp.compress(result.model, result.mask))
with torch.inference_mode():
    found = [m.forward_intermediates(images[:1], intermediates_only=True) for m in (model, small)]
    for before, after in zip(*found, strict=True):
        alike = torch.nn.functional.cosine_similarity(before, after, dim=1).mean()
        print(f"map {list(after.shape)}, cosine to the dense one {alike:.3f}")
    runs = {"dense": lambda: model(images[:1]), "pruned": lambda: small(images[:1])}
    for name, timing in interleave(runs, rounds=10).items():
        print(f"{name}: {1e3 * timing.median:.1f} ms an image")
