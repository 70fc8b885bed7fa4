"""Caption match and aesthetics by CLIP-like models, on tiny random checkpoints."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_models import save_clip, save_llava, save_siglip

from opensora_dist.core.errors import ConfigError, WeightsError
from opensora_dist.prepare.clip_model import ClipModel

CPU = torch.device("cpu")
FAMILIES = {"clip": save_clip, "siglip": save_siglip}
WIDTH = {"clip": 8, "siglip": 16}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {name: save(tmp_path_factory.mktemp(name)) for name, save in FAMILIES.items()}


def model(path, *, head=None):
    return ClipModel(str(path), head=None if head is None else str(head), device=CPU)


def clip(seed, *, frames=3):
    return np.random.default_rng(seed).integers(0, 256, (frames, 40, 56, 3), dtype=np.uint8)


def save_head(path, *sizes, names=None):
    """LAION's layout: ``layers.N``, where dropouts and the first layers take numbers too."""
    draws = torch.Generator().manual_seed(1)
    numbers = names or [f"layers.{2 * i}." for i in range(len(sizes) - 1)]
    tensors = {}
    for name, before, after in zip(numbers, sizes, sizes[1:]):
        tensors[f"{name}weight"] = torch.empty(after, before).normal_(generator=draws)
        tensors[f"{name}bias"] = torch.empty(after).normal_(generator=draws)
    save_file(tensors, path)
    return list(tensors.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_match_is_the_mean_cosine_as_transformers_computes_it(checkpoints, family):
    import transformers

    frames, caption = clip(0), "a red circle"
    reference = transformers.AutoModel.from_pretrained(checkpoints[family])
    processor = transformers.AutoProcessor.from_pretrained(checkpoints[family])
    padding = {"padding": "max_length", "max_length": 16} if family == "siglip" else {}
    inputs = processor(text=[caption], images=[Image.fromarray(f) for f in frames], return_tensors="pt", **padding)
    with torch.no_grad():
        out = reference(**inputs)
    wanted = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds).mean()
    assert model(checkpoints[family]).match(frames, caption) == pytest.approx(float(wanted), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_match_tells_captions_and_clips_apart_and_is_a_cosine(checkpoints, family):
    made = model(checkpoints[family])
    values = [made.match(clip(seed), caption) for seed in (0, 1) for caption in ("a red circle", "blue square moves left")]
    assert len(set(values)) == 4 and all(-1 <= value <= 1 for value in values)
    assert made.match(clip(0), "a red circle") == values[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_an_empty_and_an_unknown_caption_have_a_match_too(checkpoints, family):
    made = model(checkpoints[family])
    for caption in ("a red circle " * 40, "", "zebra"):
        assert -1 <= made.match(clip(0), caption) <= 1


def test_frames_are_looked_at_a_few_at_a_time_with_the_same_result(checkpoints, monkeypatch):
    made, frames = model(checkpoints["clip"]), clip(0, frames=7)
    whole = made.match(frames, "a red circle")
    monkeypatch.setattr("opensora_dist.prepare.clip_model._FRAMES_AT_ONCE", 3)
    assert made.match(frames, "a red circle") == pytest.approx(whole, abs=1e-6)
    assert whole == pytest.approx(np.mean([made.match(frames[i : i + 1], "a red circle") for i in range(7)]), abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_aesthetic_is_the_mean_of_the_head_on_unit_embeddings(checkpoints, family, tmp_path):
    w1, b1, w2, b2 = save_head(tmp_path / "head.safetensors", WIDTH[family], 4, 1)
    made = model(checkpoints[family], head=tmp_path / "head.safetensors")
    vectors = made._embed_images(clip(0))
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3))
    wanted = ((vectors @ w1.T + b1) @ w2.T + b2).mean()
    assert made.aesthetic(clip(0)) == pytest.approx(float(wanted), abs=1e-5)
    assert made.aesthetic(clip(0)) != made.aesthetic(clip(1))


def test_heads_are_read_in_the_order_of_their_numbers(checkpoints, tmp_path):
    """LAION's: 768-1024-128-64-16-1 under layers.0, 2, 4, 6, 7; sorted as text, layers.10 would come before layers.2."""
    names = [f"layers.{n}." for n in (0, 2, 4, 6, 10)]
    save_head(tmp_path / "head.safetensors", 8, 12, 6, 5, 3, 1, names=names)
    assert np.isfinite(model(checkpoints["clip"], head=tmp_path / "head.safetensors").aesthetic(clip(0)))
    save_head(tmp_path / "linear.safetensors", 8, 1, names=[""])  # LAION's first predictor is one layer
    assert np.isfinite(model(checkpoints["clip"], head=tmp_path / "linear.safetensors").aesthetic(clip(0)))


@pytest.mark.parametrize("sizes", [(768, 16, 1), (8, 4, 2), (8, 4, 3, 1)])
def test_a_head_that_does_not_fit_is_refused_with_what_it_holds(checkpoints, tmp_path, sizes):
    tensors = {f"layers.{i}.weight": torch.zeros(b, a) for i, (a, b) in enumerate(itertools.pairwise(sizes))}
    tensors |= {f"layers.{i}.bias": torch.zeros(b) for i, b in enumerate(sizes[1:])}
    if len(sizes) == 4:
        del tensors["layers.1.bias"]
    save_file(tensors, tmp_path / "head.safetensors")
    with pytest.raises(WeightsError, match=r"must be linear layers from the 8 values .* to one; it holds layers\.0\.\w+ \["):
        model(checkpoints["clip"], head=tmp_path / "head.safetensors")


def test_a_pickled_head_is_not_read(checkpoints, tmp_path):
    torch.save({"layers.0.weight": torch.zeros(1, 8)}, tmp_path / "head.pth")
    for name in ("head.pth", "absent.safetensors"):
        with pytest.raises(WeightsError, match=r"scores\.aesthetic_head=.*can't be read"):
            model(checkpoints["clip"], head=tmp_path / name)


def test_a_missing_model_and_one_without_towers_are_named(tmp_path):
    with pytest.raises(WeightsError, match=r"scores\.clip_model=.*absent.*can't be loaded"):
        model(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"holds a LlavaModel, which doesn't embed both pictures and text"):
        model(save_llava(tmp_path / "llava"))


def test_a_lacking_tensor_is_named(checkpoints, tmp_path):
    from safetensors.torch import load_file

    for file in checkpoints["clip"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("visual_projection.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"lack 1 tensors of CLIPModel: visual_projection\.weight"):
        model(tmp_path)


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'opensora-dist\[hf\]'"):
        model("anywhere")
