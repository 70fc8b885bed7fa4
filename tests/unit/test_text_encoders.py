from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from opensora_dist.codecs.registry import build_text_encoder
from opensora_dist.codecs.text_hash import HashTextEncoder, tokenize
from opensora_dist.config.codec import HashTextConfig, HfTextConfig
from opensora_dist.core.errors import ConfigError, WeightsError
from opensora_dist.core.protocols import TextEncoder

CPU = torch.device("cpu")
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "circle", "moves", "left", ".", ","]


def hash_encoder(*, width: int = 64, max_tokens: int = 32) -> TextEncoder:
    return build_text_encoder(HashTextConfig(width=width, max_tokens=max_tokens), device=CPU)


def hf_encoder(path: Path, *, max_tokens: int = 8) -> TextEncoder:
    return build_text_encoder(HfTextConfig(path=str(path), max_tokens=max_tokens), device=CPU)


def save_tokenizer(folder: Path, *, end_of_text: bool = True) -> None:
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if end_of_text:
        core.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=len(WORDS), d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)  # with its decoder, as T5 is published
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=1,
        eos_token_id=1,
    )
    transformers.CLIPTextModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_hash_splits_punctuation_and_lowers_case() -> None:
    assert tokenize("A red circle, moves LEFT. Übung!") == ["a", "red", "circle", ",", "moves", "left", ".", "übung", "!"]


def test_hash_gives_one_vector_per_token() -> None:
    (vectors,) = hash_encoder(width=24).encode(["a red circle."])
    assert vectors.shape == (4, 24)
    assert vectors.dtype == torch.float32


def test_hash_is_the_same_in_every_encoder_and_known_for_ever() -> None:
    first, second = hash_encoder().encode(["a red circle"])[0], hash_encoder().encode(["A RED  circle"])[0]
    assert torch.equal(first, second)
    # A data set prepared last year must still match the words of a prompt typed today.
    # Eight times a draw: 8 = sqrt(4096 / 64) makes it as loud as a vector of T5-XXL's width.
    torch.testing.assert_close(first[0, :3], 8 * torch.tensor([0.790883, -0.846022, -2.352669]), atol=1e-4, rtol=0)


def test_hash_words_have_unit_variance_and_are_nearly_orthogonal() -> None:
    words = [f"word{i}" for i in range(60)]
    position_0 = torch.cat([torch.zeros(128), torch.ones(128)])
    vectors = torch.cat(hash_encoder(width=256).encode(words)) / 4 - position_0  # 4 = sqrt(4096 / 256)
    assert abs(float(vectors.var()) - 1) < 0.05
    cosine = torch.nn.functional.normalize(vectors, dim=1)
    cosine = cosine @ cosine.T - torch.eye(len(words))
    assert float(cosine.abs().max()) < 5 / 256**0.5


def test_hash_tells_word_order() -> None:
    first, second = hash_encoder().encode(["red blue", "blue red"])
    assert not torch.allclose(first.flip(0), second)


def test_hash_gives_an_empty_caption_one_token_of_its_own() -> None:
    empty, blank, word = hash_encoder().encode(["", "  \n", "empty"])
    assert empty.shape == (1, 64)
    assert torch.equal(empty, blank)
    assert not torch.allclose(empty, word)


def test_hash_cuts_long_captions_and_counts_them() -> None:
    encoder = hash_encoder(max_tokens=3)
    cut, exact = encoder.encode(["one two three four", "one two three"])
    assert torch.equal(cut, exact)
    assert encoder.num_cut() == 1


@pytest.mark.parametrize("width", [8, 9, 64])
def test_hash_positions_fit_odd_widths(width: int) -> None:
    assert HashTextEncoder(width=width, max_tokens=9, device=CPU).encode(["a b c"])[0].shape == (3, width)


def test_t5_gives_valid_tokens_only_as_transformers_computes_them(t5: Path) -> None:
    import transformers

    long, short, empty = hf_encoder(t5).encode(["a red circle moves left", "a circle", ""])
    assert [len(long), len(short), len(empty)] == [6, 3, 1]
    model = transformers.T5EncoderModel.from_pretrained(t5)
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([[3, 5, 1]])).last_hidden_state[0]
    torch.testing.assert_close(short, wanted, atol=1e-5, rtol=1e-5)


def test_t5_is_loaded_without_its_decoder_and_frozen(t5: Path) -> None:
    encoder = hf_encoder(t5)
    names = [n for n, _ in encoder._model.named_parameters()]  # type: ignore[attr-defined]
    assert names
    assert not any("decoder" in n for n in names)
    assert all(not p.requires_grad for p in encoder._model.parameters())  # type: ignore[attr-defined]
    assert not encoder._model.training  # type: ignore[attr-defined]


def test_t5_cuts_long_captions_and_counts_them(t5: Path) -> None:
    encoder = hf_encoder(t5, max_tokens=4)
    assert [len(v) for v in encoder.encode(["a red circle moves left", "a red circle"])] == [4, 4]
    assert encoder.num_cut() == 1


def test_width_is_the_models(t5: Path, clip: Path) -> None:
    assert hf_encoder(t5).width == hf_encoder(clip).width == 16


def test_clip_gives_the_text_towers_last_hidden_states(clip: Path) -> None:
    import transformers

    _, short = hf_encoder(clip).encode(["a red circle moves left", "a circle"])
    with torch.no_grad():
        wanted = transformers.CLIPTextModel.from_pretrained(clip)(input_ids=torch.tensor([[3, 5, 1]])).last_hidden_state[0]
    torch.testing.assert_close(short, wanted, atol=1e-5, rtol=1e-5)


def test_more_tokens_than_the_encoder_has_positions_is_a_config_error(clip: Path) -> None:
    with pytest.raises(ConfigError, match=r"text\.max_tokens=77 exceeds the 12 positions"):
        hf_encoder(clip, max_tokens=77)


def test_an_encoder_decoder_of_no_special_class_gives_its_encoder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BartConfig(
        vocab_size=len(WORDS),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
    )
    transformers.BartModel(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    assert hf_encoder(tmp_path).encode(["a circle"])[0].shape == (3, 16)


def test_an_empty_caption_has_one_token_even_without_special_tokens(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=len(WORDS), d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, end_of_text=False)
    assert [len(v) for v in hf_encoder(tmp_path).encode(["", ""])] == [1, 1]
    assert [len(v) for v in hf_encoder(tmp_path).encode(["", "a red circle"])] == [1, 3]


def test_a_missing_folder_is_a_weights_error(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(WeightsError, match=r"text\.path"):
        hf_encoder(tmp_path / "absent")


def test_pickled_weights_are_not_read(t5: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for file in t5.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(t5 / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"text\.path"):
        hf_encoder(tmp_path)


def test_a_lacking_tensor_is_named(t5: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in t5.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(t5 / "model.safetensors")
    weights.pop("encoder.block.1.layer.0.SelfAttention.q.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"encoder\.block\.1\.layer\.0\.SelfAttention\.q\.weight"):
        hf_encoder(tmp_path)


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'opensora-dist\[hf\]'"):
        build_text_encoder(HfTextConfig(path="anywhere"), device=CPU)
