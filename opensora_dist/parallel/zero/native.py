"""ZeRO by PyTorch itself: whole gradients summed behind backward (stage 0), FSDP2 / HSDP (stages 1, 2 and 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from opensora_dist.config.train import OptimConfig, ParallelConfig, ZeroConfig
from opensora_dist.parallel.mesh import Mesh
from opensora_dist.parallel.tensor.linear import packed_parts, tp_size
from opensora_dist.parallel.tensor.state import in_order, put_back
from opensora_dist.parallel.zero.optimizer import adamw, start_moments
from opensora_dist.parallel.zero.replicated import GradientSums

if TYPE_CHECKING:
    from opensora_dist.parallel.zero.silent import SilentGather, SilentScatter

_CPU = torch.device("cpu")


class NativeBackend:
    """``GradientSums`` or FSDP2 around a model built on the meta device. See ``ZeroBackend`` for the protocol.

    The optimizer works on the local shards as plain tensors: elementwise work needs no DTensor.

    Args:
        model: On the meta device, in the dtype its weights are to be kept in.
        units: Submodules that are sharded one by one (the transformer's blocks); the rest is one more unit.
        init: Gives every parameter and buffer its value, after storage for this rank's share has been made.
        compute_dtype: bfloat16 turns on mixed precision; weights, gradient sums and moments keep the model's dtype.
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
        self._stage, self._offload = parallel.zero.stage, parallel.zero.offload
        self.num_parameters = sum(p.numel() for p in model.parameters())
        if self._stage > 0:
            _shard(model, mesh=mesh, units=units, zero=parallel.zero, compute_dtype=compute_dtype)
        model.to_empty(device=_CPU if self._offload == "all" else mesh.device)
        if self._offload == "all":
            for buffer in model.buffers():
                buffer.data = buffer.data.to(mesh.device)
        init(model)
        self._module = model
        self._params = dict(model.named_parameters())
        self._buffers = {name: b for name, b in model.named_buffers() if name in model.state_dict()}
        self._packed = packed_parts(model)
        self._held = {name: _local(p.detach()) for name, p in self._params.items()}
        self.weights = self._held
        if self._offload == "optimizer":
            self.weights = {name: _to_cpu(t) for name, t in self._held.items()}
            self._cpu_grads = {name: _to_cpu(t) for name, t in self._held.items()}
        self.model = model
        self._sums = GradientSums(list(model.parameters()), group=dist.group.WORLD) if self._stage == 0 else None
        self._comms: tuple[SilentGather, SilentScatter] | None = None
        self.optimizer = adamw(self.weights, {name: p.ndim for name, p in self._params.items()}, optim)
        start_moments(self.optimizer, self.weights.values())

    @contextmanager
    def forward_context(self, *, last_micro: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch: precision, and what is communicated before the last one.

        Before the last micro-batch, stages 0 and 1 send nothing but the first gather of weights, and hold whole gradients; stages 2 and
        3 sum gradients within the group that shards them, so that no rank ever holds more than its share; copies of a share (HSDP) are
        summed with the last.
        """
        if self._sums is not None:
            self._sums.expect(last_micro=last_micro)
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last_micro or self._stage > 1)
            self.model.set_requires_all_reduce(last_micro)
            self.model.set_is_last_backward(last_micro)
            if self._stage < 3:
                self.model.set_reshard_after_backward(last_micro)
        with self._autocast():
            yield

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Steps inside send no weights and no gradients, so that what they compute is of no use: for benchmarks, which ask what sending
        costs. The one number that is the gradients' norm still travels, and so do sums between copies (``dp_replicate``) and ``tp``.
        """
        if self._sums is not None:
            self._sums.silent = True
        sharded = [module for module in self._module.modules() if isinstance(module, FSDPModule)]
        if self._comms is None and sharded:
            # It is made of parts of FSDP2 that are private to it, which no training may depend on.
            from opensora_dist.parallel.zero.silent import SilentGather, SilentScatter

            self._comms = SilentGather(), SilentScatter()
            for module in sharded:
                module.set_custom_all_gather(self._comms[0])
                module.set_custom_reduce_scatter(self._comms[1])
        for comm in self._comms or ():
            comm.silent = True
        try:
            yield
        finally:
            if self._sums is not None:
                self._sums.silent = False
            for comm in self._comms or ():
                comm.silent = False

    @contextmanager
    def inference(self, weights: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """The unwrapped model without gradients, in eval mode. Collective under stages 1 to 3."""
        was_training = self._module.training
        self._module.eval()
        kept: dict[str, Tensor] = {}
        try:
            with torch.no_grad():
                if weights is not None:
                    self._settle()
                    # With the optimizer in CPU memory its weights are there too, and put back from there.
                    kept = {n: t.clone() for n, t in self._held.items()} if self.weights is self._held else self.weights
                    _copy_all(self._held, weights)
                with self._autocast():
                    yield self._module
        finally:
            self._module.train(was_training)
            for module in self._module.modules():
                if isinstance(module, FSDPModule):
                    # Stages 1 and 2 keep gathered weights until a backward; left in place, the next step would train on these.
                    module.reshard()
            if kept:
                self._settle()
                _copy_all(self._held, kept)

    def _settle(self) -> None:
        """Before shards in CPU memory are written: the device may still be copying from them, in FSDP2's own streams."""
        if self._offload == "all" and self._mesh.device.type == "cuda":
            torch.cuda.synchronize(self._mesh.device)

    def _autocast(self) -> AbstractContextManager[None]:
        if self._compute_dtype == torch.bfloat16:
            return torch.autocast(self._mesh.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of this rank's share of the global weighted sum."""
        torch.autograd.backward(loss)
        if self._sums is not None:
            self._sums.finish()

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Clips once, on the norm over all parameters and ranks; returns the norm before."""
        grads = {name: _local(p.grad) for name, p in self._params.items() if p.grad is not None}
        self._make_alike(grads)
        norm = self._global_norm(grads)
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(list(grads.values()), scale.to(next(iter(grads.values())).device))
        if self.weights is not self._held:
            _copy_all(self._cpu_grads, grads)
            if self._mesh.device.type == "cuda":
                torch.cuda.current_stream(self._mesh.device).synchronize()  # the optimizer reads them on the CPU
            grads = {name: self._cpu_grads[name] for name in grads}
        for name, weight in self.weights.items():
            weight.grad = grads.get(name)
        # Read by the fused kernel on its device: a non-finite step is skipped without a host sync, and moments stay as they were.
        self._skipped = (~torch.isfinite(norm)).float()
        self.optimizer.found_inf = self._skipped.to(next(iter(self.weights.values())).device)  # type: ignore[attr-defined]
        return norm

    def _make_alike(self, grads: Mapping[str, Tensor]) -> None:
        """Gives what ranks of ``tp`` hold alike the same bits on each of them.

        Each has computed and summed these gradients for itself; where two libraries' sums end in different last bits, weights that are
        the same by definition would part for good.
        """
        if self._mesh.tp_size == 1:
            return
        alike = [grad for name, grad in grads.items() if tp_size(self._params[name]) == 1]
        flat = torch.cat([grad.flatten() for grad in alike])
        dist.all_reduce(flat, group=self._mesh.tp.get_group())
        for grad, part in zip(alike, torch.split(flat.div_(self._mesh.tp_size), [g.numel() for g in alike]), strict=True):
            grad.copy_(part.view_as(grad))

    def _global_norm(self, grads: Mapping[str, Tensor]) -> Tensor:
        """The norm over all ranks, each shard counted once, and once what ranks of ``tp`` hold alike."""
        norms = torch._foreach_norm(list(grads.values()))
        by_holders: dict[int, list[Tensor]] = {}
        for name, norm in zip(grads, norms, strict=True):
            by_holders.setdefault(self._mesh.tp_size // tp_size(self._params[name]), []).append(norm)
        sums = [torch.stack(some).double().square().sum() / holders for holders, some in by_holders.items()]
        squares = torch.stack(sums).sum().to(self._mesh.device)
        if self._stage > 0:
            # A sum over tp also where all of it is held alike: so all ranks clip and skip alike, come what may.
            dist.all_reduce(squares, group=self._mesh.copy.get_group())
        return squares.sqrt().to(norms[0].dtype)

    def step(self, *, lr: float) -> None:
        """AdamW; skipped where ``clip`` saw a non-finite norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for weight in self.weights.values():
            weight.grad = None
        if self._sums is not None:
            self._sums.zero()
        else:
            for param in self._params.values():
                param.grad = None
        if self.weights is not self._held:
            _copy_all(self._held, self.weights)

    def skipped(self) -> Tensor:
        """1 where the last step was skipped, else 0; on the device."""
        return self._skipped

    def state_dict(self, *, ema: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Live tensors by canonical name, but copies of what tensor parallelism holds in another order; DTensors where sharded."""
        state = {f"model.{name}": self._canonical(name, t) for name, t in self.weights.items()}
        state |= {f"model.{name}": b for name, b in self._buffers.items()}
        for name, weight in self.weights.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{moment}.{name}"] = self._canonical(name, self.optimizer.state[weight][moment])
            state[f"ema.{name}"] = self._canonical(name, ema[name])
        return state

    def state_parts(self, *, ema: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """One part: most of it is live."""
        yield self.state_dict(ema=ema)

    def load_state_dict(self, state: Mapping[str, Tensor], *, ema: Mapping[str, Tensor], steps: int) -> None:
        """Most of ``state`` aliases what it came from, so that it is in place already."""
        for name, parts in self._packed.items():
            weight = self.weights[name]
            held = {"model": weight, "ema": ema[name]} | {m: self.optimizer.state[weight][m] for m in ("exp_avg", "exp_avg_sq")}
            for kind, local in held.items():
                put_back(local, state[f"{kind}.{name}"], like=self._params[name], parts=parts)
        for moments in self.optimizer.state.values():
            moments["step"].fill_(steps)
        if self.weights is not self._held:
            _copy_all(self._held, self.weights)

    def optimizer_steps(self) -> int:
        """Steps taken, skipped ones left out: AdamW's bias correction counts these."""
        return int(next(iter(self.optimizer.state.values()))["step"].item())

    def _canonical(self, name: str, local: Tensor) -> Tensor:
        """A tensor laid out as a weight, with its place in the whole."""
        param = self._params[name]
        if name in self._packed:
            return in_order(local, like=param, parts=self._packed[name], mesh=self._mesh)
        # `from_local` would move what is offloaded to the mesh's device, and no longer be the live tensor.
        if isinstance(param, DTensor):
            return DTensor(local, param._spec, requires_grad=False)  # type: ignore[no-untyped-call]
        return local


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _to_cpu(tensor: Tensor) -> Tensor:
    """A copy in CPU memory, pinned where a GPU is to copy from it."""
    copy = torch.empty_like(tensor, device=_CPU, pin_memory=tensor.device.type == "cuda")
    return copy.copy_(tensor)


@torch.no_grad()
def _copy_all(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    for name, source in sources.items():
        targets[name].copy_(source, non_blocking=True)


def _shard(model: nn.Module, *, mesh: Mesh, units: Sequence[nn.Module], zero: ZeroConfig, compute_dtype: torch.dtype) -> None:
    """FSDP2: stage 3 frees parameters after use, the others keep them until the step. Two mesh axes make it HSDP."""
    # Inputs are not cast: autocast does that per operator, and a timestep of 999 has no bf16.
    half = compute_dtype == torch.bfloat16
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32 if half else None, cast_forward_inputs=False
    )
    offload = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if zero.offload == "all" else OffloadPolicy()
    for unit in [*units, model]:
        fully_shard(
            unit,
            mesh=mesh.hsdp or mesh.fsdp,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=zero.stage == 3 and unit is not model,
        )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The gradient rule is a plain sum. gloo knows no PREMUL_SUM, so the reduction itself must be a sum too.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if zero.stage == 3:
        blocks: list[FSDPModule] = [unit for unit in units if isinstance(unit, FSDPModule)]
        for i, block in enumerate(blocks):
            block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + zero.prefetch])
            block.set_modules_to_backward_prefetch(blocks[max(0, i - zero.prefetch) : i][::-1])
