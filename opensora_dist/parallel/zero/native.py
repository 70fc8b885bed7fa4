"""ZeRO by PyTorch itself: DDP (stage 0) and FSDP2 / HSDP (stages 2 and 3)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from opensora_dist.config.train import OptimConfig, ParallelConfig
from opensora_dist.parallel.mesh import Mesh


class NativeBackend:
    """DDP or FSDP2 around a model built on the meta device. See ``ZeroBackend`` for the protocol.

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
        units: list[nn.Module],
        init: Callable[[nn.Module], None],
        parallel: ParallelConfig,
        optim: OptimConfig,
        compute_dtype: torch.dtype,
    ) -> None:
        self._mesh = mesh
        self._compute_dtype = compute_dtype
        self._sharded = parallel.zero.stage > 0
        if self._sharded:
            _shard(model, mesh=mesh, units=units, stage=parallel.zero.stage, compute_dtype=compute_dtype)
        model.to_empty(device=mesh.device)
        init(model)
        self._module = model
        self.params: dict[str, Tensor] = dict(model.named_parameters())
        self._buffers = {name: b for name, b in model.named_buffers() if name in model.state_dict()}
        self.model = model if self._sharded or mesh.world == 1 else _replicate(model, mesh=mesh)
        self.optimizer = _adamw(self.params, optim)

    @contextmanager
    def forward_context(self, *, last_micro: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch: precision, and no communication before the last micro-batch."""
        sync: AbstractContextManager[None] = nullcontext()
        if isinstance(self.model, DistributedDataParallel) and not last_micro:
            sync = self.model.no_sync()
        elif isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last_micro)
            self.model.set_is_last_backward(last_micro)
        with sync, self._autocast():
            yield

    @contextmanager
    def inference(self) -> Iterator[nn.Module]:
        """The unwrapped model without gradients, in eval mode. Collective under stages 2 and 3."""
        was_training = self._module.training
        self._module.eval()
        try:
            with torch.no_grad(), self._autocast():
                yield self._module
        finally:
            self._module.train(was_training)
            for module in self._module.modules():
                if isinstance(module, FSDPModule):
                    # Stage 2 keeps gathered weights until a backward; left in place, the next step would train on these.
                    module.reshard()

    def _autocast(self) -> AbstractContextManager[None]:
        if self._compute_dtype == torch.bfloat16:
            return torch.autocast(self._mesh.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of this rank's share of the global weighted sum."""
        torch.autograd.backward(loss)

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Clips once, on the norm over all parameters and ranks; returns the norm before."""
        grads = [p.grad for p in self.params.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads, foreach=True)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        nn.utils.clip_grads_with_norm_(self.params.values(), max_norm, norm, foreach=True)
        # Read by the fused kernel on the device: a non-finite step is skipped without a host sync, and moments stay as they were.
        self.optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        return norm

    def step(self, *, lr: float) -> None:
        """AdamW; skipped where ``clip`` saw a non-finite norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def skipped(self) -> Tensor:
        """1 where the last step was skipped, else 0; on the device."""
        return self.optimizer.found_inf  # type: ignore[attr-defined, no-any-return]

    def state_dict(self) -> dict[str, Tensor]:
        """Live tensors by canonical name; sharded ones are DTensors."""
        state: dict[str, Tensor] = {f"model.{n}": p.detach() for n, p in self.params.items()}
        state |= {f"model.{n}": b for n, b in self._buffers.items()}
        for name, param in self.params.items():
            moments = self.optimizer.state[param]
            state[f"exp_avg.{name}"] = moments["exp_avg"]
            state[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"]
        return state

    def optimizer_steps(self) -> int:
        """Steps taken, skipped ones left out: AdamW's bias correction counts these."""
        return int(next(iter(self.optimizer.state.values()))["step"].item())

    def load_optimizer_steps(self, steps: int) -> None:
        """Sets what ``optimizer_steps`` gave; the tensors of ``state_dict`` are loaded in place."""
        for state in self.optimizer.state.values():
            state["step"].fill_(steps)


def _shard(model: nn.Module, *, mesh: Mesh, units: list[nn.Module], stage: int, compute_dtype: torch.dtype) -> None:
    """FSDP2: stage 3 frees parameters after use, stage 2 keeps them until the step. Two mesh axes make it HSDP."""
    # Inputs are not cast: autocast does that per operator, and a timestep of 999 has no bf16.
    half = compute_dtype == torch.bfloat16
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32 if half else None, cast_forward_inputs=False
    )
    for unit in [*units, model]:
        fully_shard(unit, mesh=mesh.hsdp or mesh.fsdp, mp_policy=policy, reshard_after_forward=stage == 3 and unit is not model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The gradient rule is a plain sum. gloo knows no PREMUL_SUM, so the reduction itself must be a sum too.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _replicate(model: nn.Module, *, mesh: Mesh) -> DistributedDataParallel:
    """DDP with a summing hook in place of its averaging one."""
    device_ids = [mesh.device.index] if mesh.device.type == "cuda" else None
    with warnings.catch_warnings():
        # torch 2.13 renames `broadcast_buffers`; the old name is the one that every supported release knows.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        ddp = DistributedDataParallel(
            model, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True, init_sync=False
        )
    ddp.register_comm_hook(dist.group.WORLD, _sum_gradients)
    return ddp


def _sum_gradients(group: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), op=dist.ReduceOp.SUM, group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])  # type: ignore[no-any-return]


# DDP compares a hook's annotations with classes, and this file's are strings.
_sum_gradients.__annotations__.update(bucket=GradBucket, **{"return": torch.futures.Future[Tensor]})


def _adamw(params: dict[str, Tensor], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW, with its state made now so that a checkpoint can be loaded into it.

    Decay is for the weights of linears and convolutions; biases, and tables that are added to a modulation, keep their size.
    """
    matrices = [p for name, p in params.items() if name.endswith(".weight") and p.ndim >= 2]
    others = [p for name, p in params.items() if not (name.endswith(".weight") and p.ndim >= 2)]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )
    for param in params.values():
        optimizer.state[param] = {
            "step": torch.zeros((), dtype=torch.float32, device=param.device),
            "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format).detach(),
            "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format).detach(),
        }
    return optimizer
