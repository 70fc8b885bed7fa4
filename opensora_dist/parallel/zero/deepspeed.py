"""ZeRO by DeepSpeed: stages 0 to 3, with optimizer or parameters in CPU memory. Imported only where it is asked for.

DeepSpeed reads norms and flags on the host in every step, so steps are not free of host syncs here, as they are with ``native``.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora_dist.config.load import expand
from opensora_dist.config.train import OptimConfig, ParallelConfig
from opensora_dist.core.extras import require_extra
from opensora_dist.parallel.mesh import Mesh
from opensora_dist.parallel.places import AxisName
from opensora_dist.parallel.zero.fragments import Fragments, Span
from opensora_dist.parallel.zero.optimizer import adamw, start_moments

_CPU = torch.device("cpu")
_BUCKET_ELEMENTS = 50_000_000  # 200 MB of float32; DeepSpeed's own default takes ten times that, on every rank


def deepspeed_config(
    parallel: ParallelConfig, model: nn.Module, *, units: Sequence[nn.Module], world: int, compute_dtype: torch.dtype
) -> dict[str, Any]:
    """What DeepSpeed is told. Its schedule, clipping value, accumulation count and reports stay off: these are the loop's.

    Weights are float32 and so is all that is communicated; bfloat16 is autocast alone. Its bf16 engine would cast the residual stream
    and the timestep too, and a timestep of 999 has no bf16.

    Args:
        model: Before it is sharded.
        units: The blocks that stage 3 gathers whole.
        world: Ranks that shard the model.
    """
    zero = parallel.zero
    sizes = [p.numel() for p in model.parameters()]
    blocks = [sum(p.numel() for p in unit.parameters()) for unit in units]
    bucket = min(_BUCKET_ELEMENTS, sum(sizes))
    section: dict[str, Any] = {
        "stage": zero.stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket + bucket % 2,
        # A block and those ahead of it, beside what is in none. Every module asks for a bucket more, so that this is what bounds it.
        "stage3_max_live_parameters": sum(sizes) - sum(blocks) + (1 + zero.prefetch) * max(blocks),
        "stage3_prefetch_bucket_size": zero.prefetch * max(blocks),
        # Everything is gathered for its own use and freed after it, however small.
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "memory_efficient_linear": False,  # it would replace torch's linear for the whole process
    }
    in_cpu = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if zero.offload != "none":
        section["offload_optimizer"] = in_cpu
    if zero.nvme_path is not None:
        # Parameters alone: the average and checkpoints read master weights and moments where they are.
        section["offload_param"] = {
            **in_cpu,
            "device": "nvme",
            "nvme_path": str(expand(zero.nvme_path)),
            "buffer_size": -(-max(sizes) // world),
            # What is read at once: a block and those ahead of it, and as many parameters outside of blocks.
            "buffer_count": (2 + zero.prefetch) * max(len(list(unit.parameters())) for unit in units),
        }
    elif zero.offload == "all":
        section["offload_param"] = in_cpu
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # the loop says which micro-batch is the last
        "gradient_allreduce_op": "sum" if zero.stage < 3 else "mean",
        "gradient_clipping": 0.0,  # set before each step
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the CPU as well, with nothing to compile
        "zero_optimization": section,
        "torch_autocast": {
            "enabled": compute_dtype == torch.bfloat16,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # those named here would be sent in bfloat16
        },
    }


class DeepSpeedBackend:
    """A DeepSpeed engine around a model built on the meta device. See ``ZeroBackend`` for the protocol, ``NativeBackend`` for arguments.

    DeepSpeed keeps each rank's share of weights and moments as fragments of flat buffers; ``weights`` are views of these. A checkpoint
    has them as rows of whole tensors, so saving and loading move fragments between ranks, as many bytes as a rank holds.
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
        self._mesh, self._stage, self._compute_dtype = mesh, parallel.zero.stage, compute_dtype
        self.num_parameters = sum(p.numel() for p in model.parameters())
        shapes = {name: p.shape for name, p in model.named_parameters()}
        deepspeed = import_deepspeed(mesh.device)
        groups = _Groups(mesh)
        config = deepspeed_config(parallel, model, units=units, world=mesh.world, compute_dtype=compute_dtype)
        # Stage 3 moves one parameter at a time to the device, where it is cut; until then host memory holds the whole model.
        model.to_empty(device=_CPU if self._stage == 3 else mesh.device)
        init(model)
        self._module, self._params = model, dict(model.named_parameters())
        basic = adamw(self._params, {name: len(shape) for name, shape in shapes.items()}, optim)
        if self._stage == 3:
            # A block's submodules reach into each other's weights, so that it is gathered whole, as FSDP does it.
            deepspeed.utils.set_z3_leaf_modules(model, sorted({type(unit) for unit in units}, key=lambda t: t.__name__))
            deepspeed.zero.Init(
                model, data_parallel_group=groups.everyone, config_dict_or_path=config, mpu=groups, mem_efficient_linear=False
            )
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=basic, config=config, mpu=groups, dist_init_required=False)
        self.model = self._engine
        self._optimizer: Any = self._engine.optimizer
        self._basic = basic
        self._buffers = {name: b for name, b in model.named_buffers() if name in model.state_dict()}
        self._places = {name: self._place(param) for name, param in self._params.items()}
        start_moments(basic, {id(place.flat): place.flat for place in self._places.values()}.values())
        self.weights = {name: place.part(place.flat) for name, place in self._places.items()}
        self._fragments: Fragments | None = None
        self._skipped = torch.zeros((), device=mesh.device)
        if self._stage > 0:
            spans = {name: place.span for name, place in self._places.items()}
            self._fragments = Fragments(spans, shapes=shapes, mesh=mesh.fsdp)
            self._measure = self._take_over_norm()
        # Sums are asked for, but stage 3 knows none: it divides by all ranks, those that share a sample included.
        self._undo = float(mesh.world) if self._stage == 3 else 1.0

    @contextmanager
    def forward_context(self, *, last_micro: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch. Stages 0 and 1 send no gradient before the last, stages 2 and 3 each time."""
        self._engine.set_gradient_accumulation_boundary(last_micro)
        yield

    @contextmanager
    def inference(self, weights: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """The unwrapped model without gradients, in eval mode. Collective under stages 1 to 3."""
        was_training = self._module.training
        self._module.eval()
        kept = {} if weights is None else {name: t.clone() for name, t in self.weights.items()}
        try:
            with torch.no_grad():
                if weights is not None:
                    self._put(weights)
                with self._autocast():
                    yield self._module
        finally:
            self._module.train(was_training)
            if self._stage == 3:
                # What was gathered when the block raised is let go of, or the next step would train on it.
                self._optimizer._partition_all_parameters()
            if kept:
                self._put(kept)

    def _autocast(self) -> AbstractContextManager[None]:
        if self._compute_dtype == torch.bfloat16:
            return torch.autocast(self._mesh.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of this rank's share of the global weighted sum."""
        self._engine.backward(loss * self._undo, scale_wrt_gas=False)

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Measures the norm over all parameters and ranks, once; stages 1 to 3 scale the gradients by it as they step."""
        if self._stage == 0:
            norm = nn.utils.clip_grad_norm_(self._params.values(), max_norm)
        else:
            self._optimizer.clip_grad = max_norm
            self._norm = self._measure()
            norm = self._norm if self._norm.ndim == 0 else torch.linalg.vector_norm(self._norm)
            # DeepSpeed says -1 for what is not finite.
            norm = torch.where((self._norm < 0).any(), torch.nan, norm)
        self._skipped = (~torch.isfinite(norm)).float()
        if self._stage == 0:
            self._basic.found_inf = self._skipped  # type: ignore[attr-defined]  # read by the fused kernel
        return norm

    def _take_over_norm(self) -> Callable[[], Tensor]:
        """Lets DeepSpeed's step read the norm that ``clip`` has measured, instead of measuring it again.

        Returns:
            What measures it: one number, or one for each of DeepSpeed's groups of parameters (stage 3).
        """
        if self._stage < 3:
            whole: Callable[[], Tensor] = self._optimizer.scaled_global_norm
            self._optimizer.scaled_global_norm = lambda norm_type=2: self._norm
            return whole
        groups: Callable[[], list[Tensor]] = self._optimizer._get_norm_groups
        self._optimizer._get_norm_groups = lambda: list(self._norm)
        return lambda: torch.stack(groups())

    def step(self, *, lr: float) -> None:
        """AdamW; skipped where ``clip`` saw a non-finite norm."""
        for group in self._basic.param_groups:
            group["lr"] = lr
        self._engine.step()

    def skipped(self) -> Tensor:
        """1 where the last step was skipped, else 0; on the device."""
        return self._skipped

    def state_dict(self, *, ema: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows of whole tensors by canonical name, as DTensors; stage 0: live tensors. Collective."""
        return {name: t for part in self.state_parts(ema=ema) for name, t in part.items()}

    def state_parts(self, *, ema: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """``state_dict`` kind by kind. Collective."""
        yield {f"model.{name}": b for name, b in self._buffers.items()}
        for kind, parts in self._kinds(ema).items():
            rows = self._fragments.to_rows if self._fragments is not None else dict
            yield {f"{kind}.{name}": t for name, t in rows(parts).items()}  # nothing here holds them after it

    def load_state_dict(self, state: Mapping[str, Tensor], *, ema: Mapping[str, Tensor], steps: int) -> None:
        """Rows back into fragments; then weights into the model. Collective."""
        if self._fragments is not None:
            for kind, parts in self._kinds(ema).items():
                self._fragments.from_rows({name: state[f"{kind}.{name}"] for name in parts}, parts)
            self._put(self.weights)
        for moments in self._basic.state.values():
            moments["step"].fill_(steps)

    def optimizer_steps(self) -> int:
        """Steps taken, skipped ones left out: AdamW's bias correction counts these."""
        return int(next(iter(self._basic.state.values()))["step"].item())

    def _kinds(self, ema: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
        """What a checkpoint has of each parameter, as this rank holds it."""
        moments: dict[str, Mapping[str, Tensor]] = {
            kind: {name: place.part(self._basic.state[place.flat][kind]) for name, place in self._places.items()}
            for kind in ("exp_avg", "exp_avg_sq")
        }
        return {"model": self.weights, **moments, "ema": ema}

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        """``weights`` to what the optimizer steps, and from there into the model. Collective under stages 1 to 3."""
        for name, weight in self.weights.items():
            weight.copy_(weights[name])
        if self._stage in (1, 2):
            self._optimizer.update_lp_params()
        elif self._stage == 3:
            self._optimizer._partition_all_parameters()
            for group in range(len(self._optimizer.fp16_groups)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)

    def _place(self, param: nn.Parameter) -> _Place:
        """Where DeepSpeed holds this rank's share of a parameter."""
        if self._stage == 0:
            return _Place(flat=param, offset=None, span=Span(start=0, stop=param.numel()))
        if self._stage == 3:
            group, offset, padded = self._optimizer.grad_position[self._optimizer.get_param_id(param)]
            start = min(dist.get_rank(self._mesh.fsdp.get_group()) * padded, param.ds_numel)  # type: ignore[attr-defined]
            span = Span(start=start, stop=min(start + padded, param.ds_numel))  # type: ignore[attr-defined]
            return _Place(flat=self._optimizer.fp32_partitioned_groups_flat[group], offset=offset, span=span)
        held = param._hp_mapping  # type: ignore[attr-defined]
        if held is None:
            return _Place(flat=self._optimizer.single_partition_of_fp32_groups[0], offset=0, span=Span(start=0, stop=0))
        flat = self._optimizer.single_partition_of_fp32_groups[held.param_group_index]
        first = held.lp_fragment_address.start
        return _Place(
            flat=flat, offset=held.hp_fragment_address.start, span=Span(start=first, stop=first + held.hp_fragment_address.numel)
        )


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where this rank's share of a parameter lies.

    Args:
        flat: What the optimizer steps.
        offset: Where the share starts in ``flat``; None where ``flat`` is the parameter itself.
        span: What the share is of the flattened parameter.
    """

    flat: Tensor
    offset: int | None
    span: Span

    def part(self, flat: Tensor) -> Tensor:
        """The share of this parameter, of a tensor laid out as ``flat``."""
        whole = flat.detach()
        return whole if self.offset is None else whole[self.offset : self.offset + self.span.size]


class _Groups:
    """Our groups in DeepSpeed's words (its ``mpu``): who sees different samples, who shares one, and both together."""

    def __init__(self, mesh: Mesh) -> None:
        self.everyone = mesh.fsdp.get_group()
        self._data = mesh.device_mesh[AxisName.DP_SHARD].get_group()
        self._sample = mesh.links[mesh.sp_size].sp.group if mesh.sp_size > 1 else None

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._data)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._data)

    def get_sequence_parallel_group(self) -> dist.ProcessGroup | None:
        return self._sample

    def get_sequence_parallel_world_size(self) -> int:
        return 1 if self._sample is None else dist.get_world_size(self._sample)

    def get_sequence_parallel_rank(self) -> int:
        return 0 if self._sample is None else dist.get_rank(self._sample)

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup:
        return self.everyone

    def get_sequence_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.everyone)

    def get_sequence_data_parallel_rank(self) -> int:
        return dist.get_rank(self.everyone)

    def get_model_parallel_group(self) -> None:
        return None

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


def import_deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed, told what it would otherwise guess.

    Raises:
        ConfigError: It is not installed.
    """
    require_extra("deepspeed", extra="deepspeed", wanted_by="parallel.zero.backend=deepspeed")
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # a single process has no launcher to set it
    deepspeed = importlib.import_module("deepspeed")
    # An operator for inference, which it would compile at the first start on a CPU.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It calls torch by names that torch 2.13 renames; once for each call would be many.
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    return deepspeed
