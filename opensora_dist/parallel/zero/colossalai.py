"""ZeRO by Colossal-AI's Booster: LowLevelZero (stages 1 and 2) and Gemini (stage 3). The package is imported on use only.

Colossal-AI shards, gathers and reduces, and keeps state in CPU memory where that is asked for. The step is ours: the same AdamW as in
every backend, over the same float32 shards, so that a step with a non-finite norm is skipped alike and moments mean the same.
Its plugins run on CUDA devices only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from opensora_dist.config.train import OptimConfig, ParallelConfig, ZeroConfig
from opensora_dist.core.errors import ConfigError
from opensora_dist.parallel.mesh import Mesh
from opensora_dist.parallel.zero.fragments import Fragments, Span
from opensora_dist.parallel.zero.optimizer import adamw, start_moments

_BUCKET_ELEMENTS = 12 * 1024 * 1024  # gathered at once after a step; what LowLevelZero reduces at once, too


class ColossalaiBackend:
    """A model built on the meta device, boosted. See ``ZeroBackend`` for the protocol, ``NativeBackend`` for the arguments.

    Raises:
        ConfigError: Colossal-AI is not installed here.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mesh: Mesh,
        units: Sequence[nn.Module],
        init: Callable[[nn.Module], None],
        parallel: ParallelConfig,
        optim: OptimConfig,
        compute_dtype: torch.dtype,
    ) -> None:
        self._mesh, self._compute_dtype = mesh, compute_dtype
        self.num_parameters = sum(p.numel() for p in model.parameters())
        shapes = {name: p.shape for name, p in model.named_parameters()}
        model.to_empty(device=mesh.device)
        init(model)
        # Colossal-AI makes its float32 weights from what it has cast to bfloat16 already, and casts buffers too.
        whole = {name: p.detach().flatten().clone() for name, p in model.named_parameters()}
        buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        zero, half = parallel.zero, compute_dtype == torch.bfloat16
        self._shards: _Shards
        if zero.stage == 3:
            self._shards = _Gemini(model, mesh=mesh.fsdp, units=units, zero=zero, accumulates=parallel.grad_accum > 1)
        else:
            self._shards = _LowLevelZero(model, mesh=mesh.fsdp, zero=zero, half=half)
        self.model, self.weights = self._shards.model, self._shards.weights
        for name, buffer in model.named_buffers():
            buffer.data = buffers[name]
        spans = self._shards.spans
        for name, weight in self.weights.items():
            weight.copy_(whole.pop(name)[spans[name].start : spans[name].stop])
        self._shards.publish(self.weights)
        self._buffers = {name: b for name, b in model.named_buffers() if name in model.state_dict()}
        self._fragments = Fragments(spans, shapes=shapes, mesh=mesh.fsdp)
        self.optimizer = adamw(self.weights, {name: len(shape) for name, shape in shapes.items()}, optim)
        start_moments(self.optimizer, self.weights.values())

    @contextmanager
    def forward_context(self, *, last_micro: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch. Stage 1 sends nothing before the last; 2 and 3 sum each one's gradients."""
        with self._shards.sync(last_micro=last_micro), self._autocast():
            yield

    @contextmanager
    def inference(self, weights: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """The model without gradients, in eval mode. Collective."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                if weights is not None:
                    self._shards.publish(weights)
                with self._autocast():
                    yield self.model
        finally:
            self.model.train(was_training)
            if weights is not None:
                self._shards.publish(self.weights)

    def _autocast(self) -> AbstractContextManager[None]:
        if self._compute_dtype == torch.bfloat16:
            return torch.autocast(self._mesh.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of this rank's share of the global weighted sum."""
        # Colossal-AI divides gradients by the ranks it sums them over: a loss that many times as large makes it a plain sum.
        self._shards.backward(loss * self._mesh.fsdp.size())

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Clips once, on the norm over all parameters and ranks; returns the norm before."""
        grads = self._shards.grads()
        norms = torch._foreach_norm(list(grads.values()))
        squares = torch.stack(norms).double().square().sum().to(self._mesh.device)
        dist.all_reduce(squares, group=self._mesh.fsdp.get_group())
        norm = squares.sqrt().to(norms[0].dtype)
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(list(grads.values()), scale.to(norms[0].device))
        for name, weight in self.weights.items():
            weight.grad = grads.get(name)
        # Read by the fused kernel on its device: a non-finite step is skipped without a host sync, and moments stay as they were.
        self._skipped = (~torch.isfinite(norm)).float()
        self.optimizer.found_inf = self._skipped.to(norms[0].device)  # type: ignore[attr-defined]
        return norm

    def step(self, *, lr: float) -> None:
        """AdamW on this rank's shards, which are then sent to all; skipped where ``clip`` saw a non-finite norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for weight in self.weights.values():
            weight.grad = None
        self._shards.clear()
        self._shards.publish(self.weights)

    def skipped(self) -> Tensor:
        """1 where the last step was skipped, else 0; on the device."""
        return self._skipped

    def state_dict(self, *, ema: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of this rank's rows of weights, moments and average; live buffers."""
        return {name: t for part in self.state_parts(ema=ema) for name, t in part.items()}

    def state_parts(self, *, ema: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """``state_dict`` kind by kind. Collective."""
        yield {f"model.{name}": b for name, b in self._buffers.items()}
        for kind, parts in self._parts(ema).items():
            yield {f"{kind}.{name}": rows for name, rows in self._fragments.to_rows(parts).items()}

    def load_state_dict(self, state: Mapping[str, Tensor], *, ema: Mapping[str, Tensor], steps: int) -> None:
        """Rows of weights, moments and average to where they belong; buffers are in place already."""
        for kind, parts in self._parts(ema).items():
            self._fragments.from_rows({name: state[f"{kind}.{name}"] for name in parts}, parts)
        for moments in self.optimizer.state.values():
            moments["step"].fill_(steps)
        self._shards.publish(self.weights)

    def _parts(self, ema: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
        """What a checkpoint has of each parameter, as this rank holds it."""
        state = self.optimizer.state
        moments = {kind: {name: state[w][kind] for name, w in self.weights.items()} for kind in ("exp_avg", "exp_avg_sq")}
        return {"model": self.weights, **moments, "ema": ema}

    def optimizer_steps(self) -> int:
        """Steps taken, skipped ones left out: AdamW's bias correction counts these."""
        return int(next(iter(self.optimizer.state.values()))["step"].item())


class _Shards(Protocol):
    """What differs between Colossal-AI's two ways of sharding."""

    model: nn.Module
    """What is called, in training and without gradients."""

    weights: dict[str, Tensor]
    """float32 shards by canonical name, flat; empty where this rank has none."""

    spans: dict[str, Span]
    """Where in its flattened parameter each of them lies."""

    def sync(self, *, last_micro: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Gradients of ``loss`` summed over ranks and divided by their number, added to what is there."""
        ...

    def grads(self) -> dict[str, Tensor]:
        """float32 gradients laid out as ``weights``; without names that have none."""
        ...

    def publish(self, weights: Mapping[str, Tensor]) -> None:
        """Makes the model compute with these. Collective."""
        ...

    def clear(self) -> None:
        """Forgets the gradients."""
        ...


class _LowLevelZero:
    """Stages 1 and 2: each parameter is flattened, padded and cut into as many equal pieces as there are ranks."""

    def __init__(self, model: nn.Module, *, mesh: DeviceMesh, zero: ZeroConfig, half: bool) -> None:
        booster = _import("colossalai.booster")
        self._bucket_type = _import("colossalai.zero.low_level.bookkeeping").TensorBucket
        self._group, self._stage = mesh.get_group(), zero.stage
        plugin = _import("colossalai.booster.plugin").LowLevelZeroPlugin(
            stage=zero.stage,
            precision="bf16" if half else "fp32",
            max_norm=0.0,  # clipped by us, once
            cpu_offload=zero.offload == "optimizer",
            cast_inputs=False,  # autocast does that per operator, and a timestep of 999 has no bf16
        )
        # The plugin has no argument for its group: it would take all ranks of the default one, and wait as long as that does.
        plugin.zero_optim_kwargs["dp_process_group"] = self._group
        self._params = dict(model.named_parameters())
        for param in self._params.values():
            # bfloat16 weights with float32 gradients: micro-batches and ranks are summed in float32.
            param.grad_dtype = torch.float32
        # Never stepped: it says which parameters there are. One group, since a bucket of gradients ends where the next group begins.
        basic = torch.optim.SGD(self._params.values(), lr=0.0)
        self.model, self._optimizer, *_ = booster.Booster(plugin=plugin).boost(model, basic)
        rank, size = dist.get_rank(self._group), dist.get_world_size(self._group)
        masters = self._optimizer.get_working_to_master_map()
        self.weights: dict[str, Tensor] = {}
        self.spans: dict[str, Span] = {}
        self._padded: dict[str, int] = {}
        for name, param in self._params.items():
            master, each = masters[id(param)], -(-param.numel() // size)
            assert master.numel() == each and master.dtype == torch.float32, (name, master.shape, master.dtype)
            span = Span(start=min(rank * each, param.numel()), stop=min((rank + 1) * each, param.numel()))
            self.spans[name], self._padded[name] = span, each
            self.weights[name] = master[: span.stop - span.start]

    def sync(self, *, last_micro: bool) -> AbstractContextManager[None]:
        if self._stage == 1 and not last_micro:
            context: AbstractContextManager[None] = self._optimizer.no_sync()
            return context
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._optimizer.backward(loss)

    def grads(self) -> dict[str, Tensor]:
        found = {name: self._optimizer.get_working_grad_by_param_id(id(param)) for name, param in self._params.items()}
        return {
            name: grad[: self.weights[name].numel()].to(self.weights[name]) for name, grad in found.items() if grad is not None
        }

    @torch.no_grad()
    def publish(self, weights: Mapping[str, Tensor]) -> None:
        bucket = self._bucket_type(_BUCKET_ELEMENTS)
        for name, param in self._params.items():
            piece = weights[name].to(device=param.device, dtype=param.dtype)
            piece = nn.functional.pad(piece, (0, self._padded[name] - piece.numel()))
            if not bucket.is_empty() and bucket.will_exceed_max_size(piece.numel()):
                bucket.all_gather(self._group)
            bucket.add_to_bucket(piece, allow_oversize=True, write_back_tensor=param)
        bucket.all_gather(self._group)

    def clear(self) -> None:
        self._optimizer.zero_grad()


class _Gemini:
    """Stage 3: parameters lie in chunks, in CPU or GPU memory, that are gathered for the operators that use them."""

    def __init__(
        self, model: nn.Module, *, mesh: DeviceMesh, units: Sequence[nn.Module], zero: ZeroConfig, accumulates: bool
    ) -> None:
        # A chunk takes a block, whose operators then gather one chunk after the other. Left to its search, Gemini keeps models of fewer
        # than 32 M parameters whole on every rank.
        size = mesh.size()
        largest = max(sum(p.numel() for p in unit.parameters()) for unit in units)
        chunks = {size: {"chunk_size": -(-largest // size) * size, "keep_gathered": False}}
        plugins, optimizers = _import("colossalai.booster.plugin"), _import("colossalai.nn.optimizer")
        plugin = plugins.GeminiPlugin(
            chunk_config_dict=chunks,
            precision="bf16",
            # auto moves chunks between CPU and GPU as memory allows; static leaves them where they are put.
            placement_policy="auto" if zero.offload == "all" else "static",
            offload_optim_frac=1.0 if zero.offload == "optimizer" else 0.0,
            max_prefetch=zero.prefetch,
            pin_memory=True,
            enable_gradient_accumulation=accumulates,
            max_norm=0.0,  # clipped by us, once
        )
        plugin.zero_group = mesh.get_group()
        # Gemini asks for one of its own optimizers; this one is never stepped, and its constructor would compile kernels.
        basic = object.__new__(optimizers.HybridAdam)
        torch.optim.Optimizer.__init__(basic, model.parameters(), {"lr": 0.0})
        gemini, self._optimizer, *_ = _import("colossalai.booster").Booster(plugin=plugin).boost(model, basic)
        self._gemini = gemini
        self.model: nn.Module = _Hooked(gemini)
        self._places: dict[str, tuple[Any, int, int]] = {}
        self.weights: dict[str, Tensor] = {}
        self.spans: dict[str, Span] = {}
        self._kept: dict[str, Tensor] = {}
        for i, param in self._optimizer.id_to_real_params.items():
            name, fake = gemini.param2name[param], self._optimizer.id_to_fake_params.get(i)
            self.spans[name] = Span(start=0, stop=0)
            if fake is not None:
                _, start, size = self._optimizer.get_offsets(i)
                self._places[name] = (self._optimizer.param_to_chunk16[fake], *self._optimizer.param_to_range[fake])
                self.spans[name] = Span(start=start, stop=start + size)
            self.weights[name] = self._part(name, lambda chunk: chunk.paired_chunk, device=gemini.grads_device[param])

    def _part(self, name: str, of: Callable[[Any], Any], *, device: torch.device) -> Tensor:
        """This rank's piece of a parameter in a chunk paired with the one that it lies in; empty where it has none."""
        if name not in self._places:
            return torch.empty(0, dtype=torch.float32, device=device)
        chunk, begin, end = self._places[name]
        part: Tensor = of(chunk).payload[begin:end]
        return part

    def sync(self, *, last_micro: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._optimizer.backward(loss)

    def grads(self) -> dict[str, Tensor]:
        reuses = self._gemini.chunk_manager.reuse_fp16_chunk  # gradients then take the place of the weights they are of
        return {
            name: self._part(name, lambda chunk: chunk if reuses else chunk.grad_chunk, device=weight.device).to(weight)
            for name, weight in self.weights.items()
        }

    @torch.no_grad()
    def publish(self, weights: Mapping[str, Tensor]) -> None:
        # A chunk of bfloat16 weights is filled from its float32 twin, perhaps only when it is used: other weights must lie there till then.
        if weights is not self.weights:
            self._kept = {name: w.clone() for name, w in self.weights.items()}
        source, self._kept = (weights, self._kept) if weights is not self.weights else (self._kept, {})
        for name, weight in source.items():
            self.weights[name].copy_(weight)
        for chunk in self._optimizer.chunk16_set:
            chunk.optim_update()

    def clear(self) -> None:
        self._optimizer.zero_grad()
        self._gemini.chunk_manager.accumulating_grads = False


class _Hooked(nn.Module):
    """Calls the model under Gemini's hooks, without its cast of every input to bfloat16."""

    def __init__(self, gemini: Any) -> None:
        super().__init__()
        self.gemini = gemini
        self._hooks = _import("colossalai.tensor.param_op_hook").ColoParamOpHookManager

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.gemini.module.zero_grad(set_to_none=True)
        if not torch.is_grad_enabled():
            # Chunks are fetched ahead in the order of a training step, backward included: those would be left half fetched here.
            policy = self.gemini.gemini_manager.placement_policy
            ahead, policy.max_prefetch = policy.max_prefetch, 0
            try:
                return self.gemini._inference_forward(*args, **kwargs)
            finally:
                policy.max_prefetch = ahead
        self.gemini.gemini_manager.pre_iter()
        with self._hooks.use_hooks(*self.gemini.hooks):
            return self.gemini.module(*args, **kwargs)


def _import(module: str) -> Any:
    """A module of Colossal-AI.

    Raises:
        ConfigError: It is not installed here.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"parallel.zero.backend=colossalai can't import {module} ({error}); Colossal-AI needs an environment of its own "
            "(docs/colossalai.md, requirements/colossalai.txt), or use parallel.zero.backend=native"
        ) from error
