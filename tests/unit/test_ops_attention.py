"""Who attends: flash-attn where it is there, called as its own functions want to be called; torch otherwise; and what CUDA's grids allow."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from sequence_cases import Shape, make_inputs, make_model
from tiny_kernels import TinyKernels
from torch import Tensor

from opensora_dist.core.errors import ConfigError
from opensora_dist.core.types import Thw
from opensora_dist.ops import attention as ops
from opensora_dist.ops import choice, samples
from opensora_dist.ops.choice import Choice, choose, using
from opensora_dist.ops.frames import reads_in_place
from opensora_dist.ops.samples import Ends, captions, cross_attention, packed_attention

MODULES = {"flash_attn_2": "flash_attn", "flash_attn_3": "flash_attn_interface"}
VERSIONS = pytest.mark.parametrize("version", MODULES)
GPU = torch.device("cuda", 0)


class FlashAttn(ModuleType):
    """A package that checks what it is given, as flash-attn's C++ does, and computes the reference in float32."""

    def __init__(self, name: str, *, gives_lse: bool) -> None:
        super().__init__(name)
        self.calls: list[str] = []
        self._gives_lse = gives_lse

    def flash_attn_func(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """[batch, tokens, heads, head dim]."""
        self.calls.append("flash_attn_func")
        self._check(q, k, v, dims=4)
        assert len(q) == len(k) <= 65_535 and q.shape[2:] == k.shape[2:]
        return self._given(_reference(q, k, v))

    def flash_attn_varlen_func(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[tokens, heads, head dim], and where each sample ends."""
        self.calls.append("flash_attn_varlen_func")
        self._check(q, k, v, dims=3)
        for ends, most in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
            assert ends.dtype == torch.int32 and ends.is_contiguous() and type(most) is int
            assert int(ends.diff().max()) <= most and int(ends.diff().min()) > 0
        assert cu_seqlens_q[-1] == len(q)
        q, k, v = q, _Garbage.apply(k, int(cu_seqlens_k[-1])), _Garbage.apply(v, int(cu_seqlens_k[-1]))
        outs = [
            _reference(*(t[ends[g] : ends[g + 1]][None] for t, ends in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))))
            for g in range(len(cu_seqlens_q) - 1)
        ]
        return self._given(torch.cat([out[0] for out in outs]))

    def _check(self, *tensors: Tensor, dims: int) -> None:
        for tensor in tensors:
            assert tensor.dim() == dims and tensor.stride(-1) == 1 and tensor.shape[-1] % 8 == 0 and tensor.shape[-1] <= 256
            assert tensor.dtype in (torch.float16, torch.bfloat16)

    def _given(self, out: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return (out, out.new_zeros(1)) if self._gives_lse else out


class _Garbage(torch.autograd.Function):
    """The gradient of keys that no sample has is whatever was in memory."""

    @staticmethod
    def forward(ctx, x, end):
        ctx.end = end
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[ctx.end :] = float("nan")
        return grad, None


def _reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2).float() for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).to(torch.bfloat16)


@pytest.fixture(params=[False, True], ids=["output", "output and lse"])
def installed(request, monkeypatch):
    """Both versions; earlier builds of 3 give a tuple."""
    modules = {version: FlashAttn(name, gives_lse=request.param) for version, name in MODULES.items()}
    for module in modules.values():
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return modules


def draws(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]


def gradients(out: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return out, *torch.autograd.grad(out, inputs, weight)


def assert_near(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=2e-2, atol=2e-2 * float(other.abs().max()) + 1e-6)


def across(q: Tensor, kv: Tensor, mask: Tensor | None, *, runs: list[tuple[int, int]]) -> Tensor:
    of = captions(mask, samples=len(kv), keys=kv.shape[1], device=q.device)
    return cross_attention(q, kv, of, runs=runs)


@VERSIONS
def test_attention_is_the_packages_with_tokens_before_heads(installed, version):
    (qkv,) = draws((2, 5, 3, 3, 16))  # [B, L, 3, N, K], as a linear gives it
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    wanted = gradients(ops.attention(q, k, v), [qkv])
    with using(Choice(attention=version)):
        found = gradients(ops.attention(q, k, v), [qkv])
    assert_near(found, wanted)
    assert installed[version].calls == ["flash_attn_func"]


@VERSIONS
@pytest.mark.parametrize("masked", [True, False])
def test_captions_with_masks_in_any_pattern_go_through_its_function_for_many_lengths(installed, version, masked):
    runs = [(2, 6), (1, 9)]
    q, kv = draws((21, 2, 16), (3, 5, 2, 2, 16))
    mask = torch.tensor([[True, False, True, True, False], [False] * 5, [False, False, True, False, True]]) if masked else None
    wanted = gradients(across(q, kv, mask, runs=runs), [q, kv])
    with using(Choice(attention=version)):
        found = gradients(across(q, kv, mask, runs=runs), [q, kv])
    assert_near(found, wanted)
    assert installed[version].calls == ["flash_attn_varlen_func"]
    if mask is not None:
        out, dq, dkv = found
        assert (out[6:12] == 0).all() and (dq[6:12] == 0).all() and (dkv[~mask] == 0).all()


@VERSIONS
def test_a_pack_of_several_shapes_is_one_call_and_of_one_shape_a_batch(installed, version):
    (qkv,) = draws((2 * 6 + 9, 3, 2, 16))
    runs = [(2, 6), (1, 9)]
    wanted = gradients(packed_attention(qkv, runs=runs, ends=Ends()), [qkv])
    with using(Choice(attention=version)):
        found = gradients(packed_attention(qkv, runs=runs, ends=Ends()), [qkv])
        packed_attention(qkv, runs=[(3, 7)], ends=Ends())
    assert_near(found, wanted)
    assert installed[version].calls == ["flash_attn_varlen_func", "flash_attn_func"]


@pytest.mark.parametrize("dtype, K", [(torch.float32, 16), (torch.bfloat16, 12), (torch.bfloat16, 264)], ids=str)
def test_what_flash_attn_does_not_take_is_torchs(installed, dtype, K):
    q = torch.randn(1, 2, 3, K).to(dtype)
    with using(Choice(attention="flash_attn_2")):
        torch.testing.assert_close(ops.attention(q, q, q), F.scaled_dot_product_attention(q, q, q))
    assert not installed["flash_attn_2"].calls


def test_more_sequences_than_a_grid_has_places_for_are_attended_to_shape_by_shape(installed, monkeypatch):
    monkeypatch.setattr(samples, "MOST_SEQUENCES", 2)
    q, kv, qkv = draws((21, 2, 16), (3, 5, 2, 2, 16), (21, 3, 2, 16))
    runs, mask = [(2, 6), (1, 9)], torch.ones(3, 5, dtype=torch.bool)
    wanted = [across(q, kv, mask, runs=runs), packed_attention(qkv, runs=runs, ends=Ends())]
    with using(Choice(attention="flash_attn_2")):
        found = [across(q, kv, mask, runs=runs), packed_attention(qkv, runs=runs, ends=Ends())]
    assert_near(found, wanted)
    assert "flash_attn_varlen_func" not in installed["flash_attn_2"].calls


@pytest.mark.parametrize("attention", ["sdpa", "flash_attn_2"])
@pytest.mark.parametrize("packed", [False, True])
def test_where_samples_end_is_made_once_for_all_blocks_and_never_for_torchs(installed, attention, packed):
    shapes = [Shape(Thw(3, 2, 2), batch=2, heads=2, width=16), Shape(Thw(2, 2, 3), batch=1, heads=2, width=16)][: 1 + packed]
    made = []
    for depth in (1, 4):
        model = make_model("stdit", shapes[0], depth=depth).bfloat16()
        inputs = [make_inputs(shape, group=0, dtype=torch.bfloat16) for shape in shapes]
        of = [torch.cat([getattr(one, name) for one in inputs]) for name in ("timestep_B", "text_BYE", "text_mask_BY")]
        xs = [one.x_BCTHW for one in inputs]
        with using(Choice(attention=attention)), torch.no_grad(), TinyKernels() as counted:
            model(xs if packed else xs[0], *of)
        made.append(counted.made)
    assert made[0] == made[1], "of one block, and of four"
    assert bool(made[0]) == (attention != "sdpa")


@pytest.mark.parametrize(
    "dtype, head_dim, taken",
    [(torch.bfloat16, 72, True), (torch.float16, 128, True), (torch.bfloat16, 136, False), (torch.float32, 72, False)],
    ids=str,
)
def test_kernels_attend_in_halves_and_to_heads_of_128_at_most_but_for_the_interpreter(monkeypatch, dtype, head_dim, taken):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.empty(1, 4, 2, head_dim, dtype=dtype)
    assert not ops.triton_takes(x, head_dim=head_dim)
    with using(Choice(kernels="triton")):
        assert ops.triton_takes(x, head_dim=head_dim) == reads_in_place(4, x, head_dim=head_dim) == taken
        assert not reads_in_place(129, x, head_dim=head_dim)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert ops.triton_takes(x.float(), head_dim=64) and not ops.triton_takes(x.double(), head_dim=64)


@pytest.mark.parametrize(
    "shape, batch",
    [((1, 16, 16, 72), 10_922), ((1, 2, 16, 64), 65_535), ((1, 4, 10_496, 128), 399), ((1, 16, 2**21, 128), 1)],
    ids=str,
)
def test_a_batch_on_a_gpu_has_no_more_sequences_than_flash_kernels_find(shape, batch):
    assert ops._flash_batch(torch.empty(shape, device="meta")) == batch


@pytest.mark.parametrize("capability, found", [((9, 0), "flash_attn_3"), ((8, 0), "flash_attn_2"), ((10, 0), "flash_attn_2")])
def test_auto_takes_version_3_on_hopper_and_2_from_ampere_on(installed, monkeypatch, capability, found):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    chosen = choose("torch", device=GPU, dtype="bfloat16", attention="auto")
    assert chosen.attention == found and found.replace("_", "-") in str(chosen)
    assert choose("torch", device=GPU, dtype="float32", attention="auto").attention == "sdpa"
    assert choose("torch", device=GPU, dtype="bfloat16", attention="sdpa").attention == "sdpa"


@VERSIONS
def test_a_build_without_operators_is_not_called_within_compiled_graphs(installed, monkeypatch, version):
    capability = {"flash_attn_2": (8, 0), "flash_attn_3": (9, 0)}[version]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    asked = {"device": GPU, "dtype": "bfloat16", "compile": "blocks"}
    assert choose("torch", attention="auto", **asked).attention == "sdpa"
    with pytest.raises(
        ConfigError, match=r"run.compile=blocks wants an operator flash_attn.*::_flash_attn_forward.*auto or sdpa"
    ):
        choose("torch", attention="flash_attn", **asked)
    namespace = {"flash_attn_2": "flash_attn", "flash_attn_3": "flash_attn_3"}[version]
    with torch.library._scoped_library(namespace, "FRAGMENT") as library:
        library.define("_flash_attn_forward(Tensor q) -> Tensor")
        for attention in ("auto", "flash_attn"):
            assert choose("torch", attention=attention, **asked).attention == version


def test_flash_attn_asked_for_and_not_there_says_all_that_is_missing(monkeypatch):
    for name in MODULES.values():
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"needs a GPU.*run.dtype is float32.*run.attention=auto"):
        choose("torch", device=torch.device("cpu"), dtype="float32", attention="flash_attn")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    with pytest.raises(ConfigError, match=r"flash_attn_interface: .*flash_attn: .*pip install flash-attn"):
        choose("torch", device=GPU, dtype="bfloat16", attention="flash_attn")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    assert choose("torch", device=GPU, dtype="bfloat16", attention="auto").attention == "sdpa"


def test_the_log_says_which_of_torchs_kernels_are_allowed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "torch SDPA (any of flash, cudnn, efficient, math)" in str(Choice())
    monkeypatch.setattr(choice.torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    assert "any of flash, efficient, math" in str(Choice())
