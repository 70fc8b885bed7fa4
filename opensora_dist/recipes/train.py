"""The training recipe: check everything, start ranks, put the parts together, run the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from opensora_dist.checkpoint.commit import Resumable, last_step
from opensora_dist.codecs.registry import build_codec, build_text_encoder
from opensora_dist.config.dataset import DatasetSpec
from opensora_dist.config.load import dump_yaml, expand, load_config
from opensora_dist.config.train import TrainConfig
from opensora_dist.core.errors import CheckpointError, ConfigError
from opensora_dist.core.io import exclusive_lock, write_json, write_text
from opensora_dist.core.layout import CHECKPOINTS_DIR, CONFIG_NAME, ENVIRONMENT_NAME, LOGS_DIR, METRICS_NAME
from opensora_dist.core.logging import get_logger, setup_logging
from opensora_dist.core.types import Thw
from opensora_dist.data.index import Index
from opensora_dist.data.loader import Loader
from opensora_dist.data.mixture import open_data
from opensora_dist.data.order import Order
from opensora_dist.diffusion.base import Objective
from opensora_dist.models.base import VideoTransformer
from opensora_dist.models.levers import set_levers
from opensora_dist.models.tensor import share_blocks
from opensora_dist.observe.environment import describe_environment
from opensora_dist.observe.events import EventLog
from opensora_dist.observe.metrics import MetricLog
from opensora_dist.observe.progress import TrainProgress
from opensora_dist.observe.report import write_report
from opensora_dist.observe.trackers import build_trackers
from opensora_dist.ops.choice import choose, current, using
from opensora_dist.ops.compiled import keep_compiled
from opensora_dist.parallel.failures import lost_contact_said
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.mesh import Mesh, build_mesh, launched_world, process_group, resolve_device
from opensora_dist.parallel.sequence.auto import AutoChoice, StepWatch
from opensora_dist.parallel.sequence.base import Shard
from opensora_dist.parallel.sequence.layout import SequenceParallel, describe_shard
from opensora_dist.parallel.spawn import run_ranks
from opensora_dist.parallel.zero.base import ZeroBackend
from opensora_dist.parallel.zero.registry import build_backend
from opensora_dist.plan.hardware import peak_flops
from opensora_dist.plan.memory import estimate
from opensora_dist.recipes.auto import auto_choice
from opensora_dist.recipes.build import initialiser, meta_model
from opensora_dist.recipes.checks import training_problems, validation_clip, world_of
from opensora_dist.recipes.data import budget_tokens, memory_case, order_of, said_of_order, same_order_everywhere
from opensora_dist.recipes.guards import OnStart, guards
from opensora_dist.recipes.shards import LatentShards
from opensora_dist.resilience.faults import Faults
from opensora_dist.resilience.restarts import Progress, note_start, refuse_without_progress
from opensora_dist.resilience.startup import StopWhileStarting
from opensora_dist.train.callbacks import Callbacks
from opensora_dist.train.ema import Ema
from opensora_dist.train.generate import SamplingOptions
from opensora_dist.train.logbook import Logbook, StepNote
from opensora_dist.train.loop import BatchCost, Trainer
from opensora_dist.train.quarantine import Quarantine
from opensora_dist.train.saving import Saver, TrainerState
from opensora_dist.train.step import TiledLoss
from opensora_dist.train.validation import Validator

_log = get_logger(__name__)


def train(path: Path | None, *, overrides: Sequence[str] = ()) -> int:
    """Trains what a config says; returns the exit code.

    Under a launcher (RANK and WORLD_SIZE are set) this process is one rank. Otherwise it checks the config and the data set first, so
    that a mistake costs no start-up, and spawns ``parallel.nproc`` ranks of itself where that is more than one.

    Raises:
        ConfigError: Every problem of the config, the layout and the data set it names.
        DataError: The data set can't be used.
        CommunicationError: Another rank ended, was stuck for ``parallel.timeout_s``, or was about to do something else.
    """
    config = check(path, overrides=overrides)
    nproc = world_of(config)
    run_dir, restarts = expand(config.run.dir), config.parallel.max_restarts
    saved_step = partial(last_step, run_dir / CHECKPOINTS_DIR)
    if launched_world() is None and (nproc > 1 or restarts):
        args = ["train", *([str(path)] if path else []), *overrides]
        stuck = Progress(run_dir, saved_step=saved_step).stuck
        return run_ranks(args, nproc=nproc, log_dir=run_dir / LOGS_DIR, max_restarts=restarts, stuck=stuck)
    refuse_without_progress(run_dir, saved_step=saved_step)
    device, parallel = resolve_device(config.run.device), config.parallel
    timeout_s = parallel.timeout_s
    starting = StopWhileStarting(run_dir, saved_step=saved_step, launched=launched_world() is not None)
    with lost_contact_said(timeout_s=timeout_s), starting, process_group(device, timeout_s=timeout_s):
        mesh = build_mesh(
            device, dp_replicate=parallel.dp_replicate, sp=parallel.sp, tp=parallel.tp, timeout_s=parallel.timeout_s
        )
        setup_logging(rank=mesh.rank, world=mesh.world)
        train_rank(config, mesh, on_start=starting.over)
    return 0


def check(path: Path | None, *, overrides: Sequence[str] = ()) -> TrainConfig:
    """The config, after every rule that can be checked without a process group or a GPU.

    Raises:
        ConfigError: All problems at once.
        DataError: The index can't be read.
    """
    return load_config(TrainConfig, path, overrides=overrides, rules=training_problems)


def train_rank(config: TrainConfig, mesh: Mesh, *, on_start: Callable[[], None] = lambda: None) -> None:
    """One rank's whole run: build or resume, train, report. Collective.

    Args:
        on_start: Called once the loop begins.
    Raises:
        CheckpointError: There is nothing to resume from that verifies, or the last save failed.
        CommunicationError: On every rank: they would train on different data, or in another order.
        DataError: The data set can't be read.
    """
    run_dir = expand(config.run.dir)
    keys = Keys(config.run.seed)
    dtype = torch.float64 if config.run.dtype == "float64" else torch.float32
    with ExitStack() as stack:
        if mesh.is_main:
            # Two runs writing one directory would ruin each other's checkpoints.
            said = f"run.dir={str(run_dir)!r} is in use by another process; wait for it, stop it, or choose another run.dir"
            stack.enter_context(exclusive_lock(run_dir / ".lock", busy=ConfigError(said)))
        index = open_data(config.data, max_lost=config.resilience.max_bad_samples)
        stack.callback(index.shard_source.close)
        model, objective = meta_model(config.model, config.objective, index.spec, dtype=dtype)
        order = order_of(config.data, index, model, keys=keys)
        same_order_everywhere(config, index, order, mesh)
        share_blocks(model, mesh)
        run = config.run
        operators = choose(run.kernels, device=mesh.device, dtype=run.dtype, compile=run.compile, attention=run.attention)
        stack.enter_context(using(replace(operators, dynamic_shapes=len(order.latents) > 1)))
        _log.info("%s", current())
        if config.run.compile != "off":
            _log.info("what is compiled is kept in %s", keep_compiled(expand(config.run.compile_cache)))
        set_levers(model, config.parallel, device=mesh.device)
        if config.parallel.tile_tokens is not None:
            objective = TiledLoss(of=objective, positions=config.parallel.tile_tokens * model.patch.volume)
        sp = config.parallel.sp
        # A group of one has no network to measure, and no choice.
        choosing = sp.scheme == "auto" and sp.degree > 1
        choice = auto_choice(config, mesh, model, text_tokens=index.spec.max_tokens) if choosing else None
        shards = LatentShards(mesh, SequenceParallel(mesh, sp, choose=choice), model)
        faults = Faults(config.fault, run_dir=run_dir, rank=mesh.rank)
        saver = Saver(run_dir, config=config, spec=index.spec, mesh=mesh, on_phase=faults.save_phase)
        # Asked before the collective `find`: once past it, the main rank may already write metrics.
        used = (run_dir / METRICS_NAME).exists()
        found = saver.find()
        if config.checkpoint.resume == "never" and (used or found.path or found.rejected):
            raise CheckpointError(
                f"checkpoint.resume=never, but {run_dir} holds a run; use another run.dir, or checkpoint.resume=auto to go on"
            )
        backend = build_backend(
            model,
            mesh=mesh,
            units=list(model.blocks),
            init=initialiser(keys, None if found.path else config.model.init_from),
            parallel=config.parallel,
            optim=config.optim,
            compute_dtype=torch.bfloat16 if config.run.dtype == "bfloat16" else dtype,
        )
        ema = Ema(backend.weights, decay=config.optim.ema_decay)
        start = _start_state(config, saver, found, backend=backend, ema=ema, dataset_hash=index.dataset_hash)
        state = start.state
        if mesh.is_main:
            note_start(run_dir, step=state.step)
        logbook = _open_logbook(config, mesh, run_dir=run_dir, step=state.step, stack=stack, watch=_watch(choice, model))
        for name, fields in start.events:
            logbook.event(name, **fields)
        _note_start(config, mesh, logbook, backend=backend, order=order, shards=shards, step=state.step, samples=len(index))
        for line in said_of_order(config.data, order, index, model):
            _log.info("%s", line)
        if config.parallel.zero.backend == "native":
            most = estimate(memory_case(config, order, index, model, world=mesh.world))
            _log.info("a rank holds at most %.3g GiB by formula, without the process itself: %s", most.total / 2**30, most.moment)
        if choice is not None:
            for grid in choice.predictions:
                logbook.event("sequence_prediction", **choice.event(grid))
        validator = _build_validator(
            config, mesh, run_dir=run_dir, index=index, objective=objective, keys=keys, shards=shards.shard
        )

        quarantine = Quarantine(mesh=mesh, logbook=logbook, limit=config.resilience.max_bad_samples)

        def make_loader(step: int) -> Loader:
            return Loader(
                index,
                order,
                share=shards.share,
                accum=config.parallel.grad_accum,
                start_step=step,
                num_steps=config.run.steps - step,
                loss_weight=config.data.loss_weight,
                reader_threads=config.data.reader_threads,
                prefetch_batches=config.data.prefetch_batches,
                dtype=dtype,
                device=mesh.device,
                damaged=faults.bad_sample,
                on_bad=quarantine.note,
            )

        if state.step < config.run.steps:
            watching = guards(
                config, mesh=mesh, model=model, backend=backend, ema=ema, logbook=logbook, faults=faults, run_dir=run_dir
            )
            trainer = Trainer(
                config,
                run_dir=run_dir,
                mesh=mesh,
                keys=keys,
                backend=backend,
                ema=ema,
                objective=objective,
                state=state,
                make_loader=make_loader,
                shards=shards.shard,
                agree=shards.agree,
                cost=lambda latent, tokens: _cost(model, latent, text_tokens=tokens),
                budget_tokens=budget_tokens(config.data),
                saver=saver,
                validator=validator,
                logbook=logbook,
                callback=Callbacks([OnStart(on_start), quarantine, *watching]),
            )
            state, left_out = trainer.run(), trainer.left_out
        else:
            left_out = 0
            _log.warning(
                "nothing to do: step %d of run.steps=%d is reached; raise run.steps to go on", state.step, config.run.steps
            )
        if validator is not None:
            validator.close()
        failures = torch.tensor(validator.failures if validator else 0)
        # Reached by every rank once its videos are written or given up: now they can be counted and shown.
        torch.distributed.all_reduce(failures, group=mesh.control)
        done = {"step": state.step, "samples": state.samples, "bad_samples": quarantine.num_bad}
        packed = {"left_out": left_out} if config.data.batching == "packed" else {}
        logbook.event("end", validation_failures=int(failures), **done, **packed)
        logbook.show_videos(validator.take_finished() if validator else [])
    if mesh.is_main:
        _log.info("report: %s", write_report(run_dir))


def _note_start(
    config: TrainConfig,
    mesh: Mesh,
    logbook: Logbook,
    *,
    backend: ZeroBackend,
    order: Order,
    shards: LatentShards,
    step: int,
    samples: int,
) -> None:
    """Says, in the event log and to the reader, what is trained and how it is laid out."""
    shapes = {str(latent): describe_shard(shards.shard(latent)) for latent in order.latents}
    logbook.event(
        "start",
        step=step,
        mesh=str(mesh),
        mesh_table=mesh.table().splitlines(),
        parameters=backend.num_parameters,
        samples=samples,
        dropped=order.dropped,
        buckets={
            str(y.bucket): {"samples": y.samples, "used": y.used_per_epoch, "steps": y.steps_per_epoch} for y in order.yields()
        },
        latents=shapes,
    )
    _log.info("%s with %s parameters on %s", config.model.name, f"{backend.num_parameters:,}", mesh)
    if mesh.world > 1:
        _log.info("the mesh:\n%s", mesh.table())
    if mesh.sp_size > 1:
        for latent, how in shapes.items():
            _log.info("latents of %s: %s", latent, how)


def _watch(choice: AutoChoice | None, model: VideoTransformer) -> Callable[[StepNote], dict[str, Any] | None] | None:
    """Holds measured steps against what ``auto`` predicted."""
    if choice is None:
        return None
    watch = StepWatch(choice.predictions)

    def of_one_shape(note: StepNote) -> dict[str, Any] | None:
        return watch.note(model.token_grid(note.shapes[0]), note.step_s) if len(note.shapes) == 1 else None

    return of_one_shape


def _cost(model: VideoTransformer, latent: Thw, *, text_tokens: int) -> BatchCost:
    """Backward costs twice the forward."""
    return BatchCost(tokens=model.token_grid(latent).volume, flops=3 * model.flops(latent, text_tokens=text_tokens))


@dataclass(frozen=True, kw_only=True)
class _Start:
    """Where a run starts, and what is to be noted of it once the event log is open."""

    state: TrainerState
    events: tuple[tuple[str, dict[str, object]], ...]


def _start_state(
    config: TrainConfig, saver: Saver, found: Resumable, *, backend: ZeroBackend, ema: Ema, dataset_hash: str
) -> _Start:
    """A fresh state, or the newest checkpoint's. Collective."""
    events: list[tuple[str, dict[str, object]]] = []
    for rejected in found.rejected:
        events.append(("checkpoint_rejected", {"path": rejected.path.name, "problems": list(rejected.problems)}))
        _log.warning("checkpoint %s does not verify (%s); trying the one before", rejected.path, "; ".join(rejected.problems))
    if found.path is None:
        if found.rejected:
            raise CheckpointError(f"{saver.root}: no checkpoint verifies; restore one, or start again with another run.dir")
        fresh = TrainerState(step=0, optimizer_steps=0, samples=0, tokens=0, seed=config.run.seed, dataset_hash=dataset_hash)
        return _Start(state=fresh, events=())
    state = saver.load(found.path, backend, ema, dataset_hash=dataset_hash)
    events.append(("resume", {"step": state.step, "path": found.path.name}))
    _log.info("resumed from %s at step %d", found.path, state.step)
    return _Start(state=state, events=tuple(events))


def _open_logbook(
    config: TrainConfig,
    mesh: Mesh,
    *,
    run_dir: Path,
    step: int,
    stack: ExitStack,
    watch: Callable[[StepNote], dict[str, Any] | None] | None,
) -> Logbook:
    if not mesh.is_main:
        return Logbook(mesh=mesh, metrics=None, events=None, progress=None, trackers=None, peak_flops=None, watch=None)
    write_text(run_dir / CONFIG_NAME, dump_yaml(config))
    write_json(run_dir / ENVIRONMENT_NAME, describe_environment(world=mesh.world))
    metrics = MetricLog(run_dir, steps_done=step)
    stack.callback(metrics.close)
    events = EventLog(run_dir)
    stack.callback(events.close)
    progress = stack.enter_context(TrainProgress(total_steps=config.run.steps, steps_done=step, enabled=True))
    trackers = build_trackers(
        config.track, run_dir=run_dir, run_name=config.run.name, config_dump=config.model_dump(mode="json"), steps_done=step
    )
    stack.callback(trackers.close)
    peak = peak_flops(mesh.device, dtype=config.run.dtype)
    how = "data sheet" if mesh.device.type == "cuda" else "measured"
    events.log("device_peak", {"device": str(mesh.device), "flops_per_s": peak, "how": how})
    return Logbook(mesh=mesh, metrics=metrics, events=events, progress=progress, trackers=trackers, peak_flops=peak, watch=watch)


def _build_validator(
    config: TrainConfig,
    mesh: Mesh,
    *,
    run_dir: Path,
    index: Index,
    objective: Objective,
    keys: Keys,
    shards: Callable[[Thw], Shard],
) -> Validator | None:
    validation = config.validation
    if not validation.every_steps:
        return None
    spec: DatasetSpec = index.spec
    codec = build_codec(spec.codec, device=mesh.device)
    encoder = build_text_encoder(spec.text, device=mesh.device)
    return Validator(
        run_dir,
        prompts=validation.prompts,
        texts=[t.cpu() for t in encoder.encode(validation.prompts)],
        latent=codec.latent_shape(validation_clip(config, index)),
        spec=spec,
        codec=codec,
        objective=objective,
        options=SamplingOptions(sampler=validation.sampler, steps=validation.sampling_steps, cfg_scale=validation.cfg_scale),
        keys=keys,
        mesh=mesh,
        shards=shards,
    )
