# SPDX-License-Identifier: Apache-2.0
"""An opened model: its sublayers compute what the model computes."""

from __future__ import annotations

import torch

from gohsp.models.registry import open_model
from gohsp.pruning.calibration import embed


def test_sublayers_are_the_model(make_model, images) -> None:
    model = make_model()
    x, size = embed(open_model(model), [images(3), images(2, seed=1)])
    assert size == (48, 48)
    for layer in open_model(model).sublayers:
        trace = layer.trace(x)
        hidden, after = trace.hidden, trace.after
        caught: list[torch.Tensor] = []
        handle = layer.write.layers[0].register_forward_pre_hook(lambda _, inputs, to=caught: to.append(inputs[0]))
        wanted = layer(x)
        handle.remove()
        torch.testing.assert_close(caught[0], hidden)
        torch.testing.assert_close(after, wanted)
        torch.testing.assert_close(trace.read, layer.read(trace.seen))
        torch.testing.assert_close(after, x + layer.scale(layer.write(hidden)))
        x = after
    wanted = model.forward_features(torch.cat((images(3), images(2, seed=1))))
    torch.testing.assert_close(model.norm(x), wanted)


def test_distilled_models_have_two_prefix_tokens(make_model, images) -> None:
    model = make_model("deit_tiny_distilled_patch16_224")
    x, _ = embed(open_model(model), [images()])
    for layer in open_model(model).sublayers:
        x = layer(x)
    torch.testing.assert_close(model.norm(x), model.forward_features(images()))


def test_gain_is_the_layer_scale(make_model) -> None:
    scaled, plain = make_model(init_values=0.1), make_model()
    assert torch.equal(open_model(scaled).sublayers[1].gain(), scaled.blocks[0].ls2.gamma.double())
    assert torch.equal(open_model(plain).sublayers[1].gain(), torch.ones(192, dtype=torch.float64))
