"""Schema of a training run: the sections ``run model objective data parallel optim checkpoint validation resilience
track fault``."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from opensora_dist.config.base import Section


class RunConfig(Section):
    """What the run is called and how long it goes."""

    name: str = Field("run", min_length=1, description="Name of the run.")
    dir: str = Field("runs/run", min_length=1, description="Run directory: config, metrics, checkpoints, samples, report.")
    steps: int = Field(1000, ge=1, description="Optimizer steps.")
    seed: int = Field(0, ge=0, description="The one seed; every random draw is keyed by it, a purpose, a sample and a step.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes CUDA where there is a GPU.")
    dtype: Literal["float32", "bfloat16", "float64"] = Field(
        "float32", description="Compute precision; weights stay float32 (float64)."
    )
    kernels: Literal["torch", "triton"] = Field(
        "torch",
        description="Who does norms, gates, GELU and short attentions: torch, or this project's Triton kernels, which need a GPU and "
        "have not been run on one yet.",
    )
    attention: Literal["auto", "sdpa", "flash_attn"] = Field(
        "auto",
        description="Who does attention: sdpa is torch's, flash_attn the package of that name (version 3 on Hopper, or 2), auto that "
        "where it is installed and takes the run's GPU and dtype. Short ones are run.kernels's.",
    )
    compile: Literal["off", "blocks", "graphs"] = Field(
        "off",
        description="blocks: torch.compile makes kernels of each block, or of what it does between communications; graphs: and replays "
        "them as CUDA graphs. Neither has been run on a GPU yet.",
    )
    compile_cache: str = Field(
        "~/.cache/opensora-dist/compiled",
        min_length=1,
        description="Folder, yours alone, in which what was compiled is found again; on a disk that nodes share, by all of them.",
    )
    log_every: int = Field(10, ge=1, description="Steps between progress lines and metric flushes.")


class ModelSize(NamedTuple):
    """Depth, width and heads of a published size."""

    depth: int
    width: int
    heads: int


SIZES = {
    "S": ModelSize(12, 384, 6),
    "B": ModelSize(12, 768, 12),
    "L": ModelSize(24, 1024, 16),
    "XL": ModelSize(28, 1152, 16),
}


ModelName = Literal["stdit", "dit"]
SizeName = Literal["S", "B", "L", "XL"]
"""Keys of ``SIZES``."""
SchemeName = Literal["dsp", "ulysses", "fastseq", "ring", "usp", "allgather"]
"""Of sequence parallelism; ``parallel.sequence.registry`` has them."""


class ImportConfig(Section):
    """Weights to start from. A run that resumes doesn't read them again."""

    format: Literal["open_sora", "pixart", "run"] = Field(
        "open_sora", description="Open-Sora 1.0 STDiT; pixart: the PixArt-alpha image model; run: the averaged weights of a run."
    )
    path: str = Field(min_length=1, description="A .safetensors file, or a .pth read with weights_only; for run, its directory.")


class ModelConfig(Section):
    """The diffusion transformer."""

    name: ModelName = Field("stdit", description="stdit: factorised space and time; dit: joint attention.")
    size: SizeName = Field("S", description="Published size; depth, width and heads override it.")
    depth: int | None = Field(None, ge=1, description="Blocks.")
    width: int | None = Field(None, ge=4, description="Width of the residual stream; a multiple of heads and of 4.")
    heads: int | None = Field(None, ge=1, description="Attention heads.")
    patch: tuple[int, int, int] = Field((1, 2, 2), description="Latent [frames, height, width] per token.")
    mlp_ratio: float = Field(4.0, gt=0, description="Hidden width of the MLP over the model's width.")
    space_scale: float = Field(
        1.0, gt=0, description="Spatial positions are index / space_scale (0.5: 256 px from a 512 px image model)."
    )
    time_scale: float = Field(1.0, gt=0, description="Temporal positions are index / time_scale.")
    temporal_positions: Literal["attention", "residual"] = Field(
        "attention",
        description="stdit: temporal positions enter the first block's temporal attention (Open-Sora 1.0), or the residual stream.",
    )
    pooled_text: bool = Field(
        False, description="The caption's mean vector joins the timestep in every modulation (as in SD3); Open-Sora 1.0 has none."
    )
    init_from: ImportConfig | None = Field(None, description="Weights to start from.")

    @property
    def shape(self) -> ModelSize:
        """Depth, width and heads after overrides."""
        size = SIZES[self.size]
        return ModelSize(self.depth or size.depth, self.width or size.width, self.heads or size.heads)


class IddpmConfig(Section):
    """Discrete diffusion with learned sigma (Open-Sora 1.0)."""

    name: Literal["iddpm"] = "iddpm"
    timesteps: int = Field(
        1000, ge=21, description="Diffusion steps of the linear schedule, whose last beta, 20 / timesteps, must be below 1."
    )
    caption_dropout: float = Field(
        0.1, ge=0, le=1, description="Probability that a sample's caption is replaced by the null caption."
    )


class RectifiedFlowConfig(Section):
    """Straight paths from data to noise; the model predicts data minus noise."""

    name: Literal["rectified_flow"] = "rectified_flow"
    logit_mean: float = Field(0.0, description="Mean of the logit-normal draw of sigma.")
    logit_std: float = Field(1.0, gt=0, description="Standard deviation of the logit-normal draw of sigma.")
    shift: Literal["none", "constant", "resolution_frames", "token_line"] = Field(
        "none", description="Noise shift: none; constant (shift_value); resolution_frames (Open-Sora 1.2); token_line (2.0)."
    )
    shift_value: float = Field(1.0, gt=0, description="The ratio r of shift=constant: sigma' = r sigma / (1 + (r-1) sigma).")
    caption_dropout: float = Field(
        0.1, ge=0, le=1, description="Probability that a sample's caption is replaced by the null caption."
    )


ObjectiveConfig = Annotated[IddpmConfig | RectifiedFlowConfig, Field(discriminator="name")]


class MixtureConfig(Section):
    """One data set of several that are trained on together."""

    path: str = Field(description="As data.path.")
    name: str | None = Field(None, description="What its samples' keys begin with; default: the folder's name.")
    weight: float | None = Field(
        None, gt=0, description="Its share of the samples, relative to the others; default: how many it has."
    )
    layout: str | None = Field(None, description="As data.layout.")


class CacheConfig(Section):
    """Where shards of remote data sets are kept on this machine."""

    path: str = Field("~/.cache/opensora-dist/shards", description="Folder, shared by the ranks of a machine.")
    max_gib: float = Field(200.0, gt=0, description="The shards used least recently go first beyond this.")
    prefetch_shards: int = Field(4, ge=0, description="Shards fetched ahead of the reader.")
    patience_s: float = Field(300.0, gt=0, description="Seconds a store may fail before what was asked for is given up.")


class DataConfig(Section):
    """The data sets and the batch."""

    path: str | None = Field(
        None,
        description="Folder or URL (s3://, gs://, https://, pipe:) of a data set made by `opensora-dist data prepare`, or of WebDataset tars.",
    )
    layout: str | None = Field(
        None, description="File that says what WebDataset tars made by others hold; default: dataset.yaml beside them."
    )
    mixture: tuple[MixtureConfig, ...] = Field((), description="Several data sets, instead of data.path.")
    batching: Literal["samples", "tokens", "packed"] = Field(
        "samples",
        description="What a unit of a batch is. samples: one sample; tokens: as many samples of one shape as data.unit_tokens takes; "
        "packed: samples of any shapes in one sequence of at most data.unit_tokens.",
    )
    global_batch: int = Field(8, ge=1, description="Units per optimizer step, over all ranks and micro-batches.")
    unit_tokens: int | None = Field(None, ge=1, description="Tokens of a unit at most; for batching=tokens and packed.")
    image_share: float | None = Field(
        None, ge=0, le=1, description="Share of the samples that are images (one frame); default: as the data sets have them."
    )
    shuffle_shards: int | None = Field(
        None, ge=1, description="Samples are shuffled among so many shards at a time, for remote data; default: among all."
    )
    allow_pipe: bool = Field(
        False, description="Lets data.path name a command (pipe:...), which is run without a shell and whose output is a shard."
    )
    cache: CacheConfig = CacheConfig()
    loss_weight: Literal["sample", "token"] = Field("sample", description="What counts once in the loss: a sample, or a token.")
    reader_threads: int = Field(1, ge=1, le=8, description="Threads that read shards.")
    prefetch_batches: int = Field(2, ge=1, description="Micro-batches read ahead.")


class ZeroConfig(Section):
    """Who holds parameters, gradients and optimizer state."""

    backend: Literal["native", "deepspeed", "colossalai"] = Field(
        "native", description="native: PyTorch itself (FSDP2); deepspeed and colossalai need those packages."
    )
    stage: Literal[0, 1, 2, 3] = Field(
        0, description="0 replicates; 1 shards optimizer state; 2 gradients too; 3 parameters too."
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="What lives in CPU memory: nothing; the optimizer's state and step; sharded parameters too."
    )
    nvme_path: str | None = Field(
        None,
        description="deepspeed, stage 3 with offload=all: sharded parameters go to files in this folder; master weights and moments "
        "stay in CPU memory.",
    )
    prefetch: int = Field(1, ge=0, description="Stage 3 only: blocks whose parameters are gathered ahead of the one that runs.")


class SpConfig(Section):
    """Sequence parallelism: ranks that share a sample, each with some of its frames (or rows)."""

    degree: int = Field(1, ge=1, description="Ranks that share one sample.")
    scheme: Literal[SchemeName, "auto"] = Field(
        "dsp",
        description="How tokens on different ranks meet: dsp (stdit only; fewest bytes), ulysses, fastseq, ring, usp (ulysses inside, "
        "ring outside), allgather (the baseline); auto predicts which is fastest for each shape.",
    )
    ulysses: int | None = Field(
        None, ge=1, description="Size of the inner mesh axis; degree / ulysses is that of ring. Default: all of degree (ring: 1)."
    )
    min_degree: int | None = Field(
        None, ge=1, description="auto may spread a sample over as few ranks as this where that is faster; default: degree."
    )
    overlap: bool = Field(True, description="Hide communication under compute; false is the blocking form, for comparison.")
    chunks: int = Field(2, ge=1, description="Pieces that a pipeline cuts its tokens into, where a scheme has one.")
    fastseq_dw: Literal["gather", "keep"] = Field(
        "gather", description="What fastseq's weight gradient is made from: a second gather in backward, or the first one, kept."
    )
    network: str | None = Field(
        None, description="What auto predicts with, a file of `opensora-dist bench network`; default: measured at the start."
    )


class ParallelConfig(Section):
    """How ranks share the work."""

    nproc: int | None = Field(
        None, ge=1, description="Ranks on this machine when torchrun has not set them; default: one per GPU, or 1."
    )
    dp_replicate: int = Field(1, ge=1, description="Groups of ranks that hold copies of each other's shards (HSDP).")
    grad_accum: int = Field(1, ge=1, description="Micro-batches per optimizer step.")
    sp: SpConfig = SpConfig()
    tp: int = Field(1, ge=1, description="Ranks that share each linear of attention and MLP (tensor parallelism).")
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="Activations computed again in backward: full keeps of a block its input and what it received; selective keeps "
        "the outputs of attention, too.",
    )
    offload_activations: bool = Field(
        False, description="What is kept for backward waits in CPU memory, moved there and back beside the computation."
    )
    tile_tokens: int | None = Field(
        None, ge=1, description="MLP, final layer and loss run over this many tokens at a time, and again in backward."
    )
    zero: ZeroConfig = ZeroConfig()
    max_restarts: int = Field(
        0,
        ge=0,
        description="How often ranks that `train` starts itself are started again after a failure; under a launcher use its own flag.",
    )
    timeout_s: float = Field(600.0, gt=0, description="Seconds after which a stuck collective ends the run.")


class OptimConfig(Section):
    """AdamW, its schedule and the moving average."""

    lr: float = Field(1e-4, gt=0, description="Peak learning rate.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's decay rates.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay, on the weights of linears and convolutions.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    schedule: Literal["constant", "cosine", "linear"] = Field("constant", description="Learning rate after warm-up.")
    min_lr_ratio: float = Field(
        0.0, ge=0, le=1, description="What the learning rate falls to over lr, for cosine and linear; reached at run.steps."
    )
    clip_norm: float = Field(1.0, gt=0, description="Global gradient norm above which gradients are scaled down.")
    ema_decay: float = Field(
        0.9999, ge=0, lt=1, description="Decay of the fp32 moving average; early steps use (1+n)/(10+n) where that is less."
    )


class CheckpointConfig(Section):
    """When state is committed, and what a start does with what it finds."""

    every_steps: int = Field(500, ge=1, description="Steps between checkpoints; the last step always writes one.")
    asynchronous: bool = Field(True, description="Write beside training, from a copy in CPU memory; false makes training wait.")
    keep_last: int = Field(3, ge=1, description="Checkpoints kept; the only verified one is never pruned.")
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto continues from the newest checkpoint that verifies; never refuses a used run directory."
    )


class ResilienceConfig(Section):
    """What ends a run that goes wrong, and what it puts up with."""

    watchdog_s: float = Field(
        90.0, ge=0, description="Seconds without progress (at least 3 x the 99th percentile of steps) that make a hang; 0: off."
    )
    max_skipped_steps: int = Field(10, ge=1, description="Steps with non-finite gradients in a row that end the run.")
    replica_check_every: int = Field(
        200, ge=0, description="Steps between comparisons of what several ranks hold alike, also made before each save; 0: off."
    )
    straggler_ratio: float = Field(
        1.2, gt=1, description="A rank whose own work takes this many times the median's is named, over the last 20 steps."
    )
    max_bad_samples: int = Field(
        100, ge=0, description="Samples that can't be read and are replaced before the run ends; 0: the first one ends it."
    )


class FaultConfig(Section):
    """Faults to inject, in drills and tests. Each happens once in a run directory, but slow_rank at every start. Off unless named here."""

    kill_rank: str | None = Field(None, description="RANK@stepN: SIGKILL in that step.")
    hang_rank: str | None = Field(None, description="RANK@stepN: sleeps for ever in that step.")
    nan_loss: str | None = Field(None, description="RANK@stepN: the loss of that step is not a number.")
    flip_bit: str | None = Field(None, description="RANK@stepN: one bit of one parameter flips after that step.")
    slow_rank: str | None = Field(None, description="RANK@xF: computes F times as long, from the start on.")
    kill_in_save: str | None = Field(None, description="RANK@PHASE: SIGKILL at that phase of the first save.")
    bad_sample: str | None = Field(None, description="RANK@stepN: the first sample of that step reads as damaged.")


class ValidationConfig(Section):
    """Videos drawn from the moving average during training."""

    every_steps: int = Field(0, ge=0, description="Steps between validation videos; 0 draws none.")
    prompts: tuple[str, ...] = Field((), description="Captions to draw.")
    clip: tuple[int, int, int] | None = Field(
        None, description="[frames, height, width] in pixels; default: the data set's largest bucket."
    )
    sampler: Literal["ddpm", "ddim", "dpm_solver", "flow_euler"] | None = Field(
        None, description="Default: flow_euler for rectified_flow, dpm_solver for iddpm."
    )
    sampling_steps: int = Field(20, ge=1, description="Model evaluations per video (twice that with guidance).")
    cfg_scale: float = Field(3.0, ge=1, description="Classifier-free guidance; 1 turns it off.")


class WandbConfig(Section):
    """Weights & Biases; the key comes from the environment (WANDB_API_KEY)."""

    mode: Literal["off", "offline", "online"] = Field("off", description="offline needs no network.")
    project: str = Field("opensora_dist", min_length=1, description="Project name.")


class TrackConfig(Section):
    """Where metrics go besides metrics.jsonl, which is always written."""

    wandb: WandbConfig = WandbConfig()
    tensorboard: bool = Field(False, description="Write TensorBoard event files under <run>/tensorboard.")


class TrainConfig(Section):
    """A whole training run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = RectifiedFlowConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    resilience: ResilienceConfig = ResilienceConfig()
    track: TrackConfig = TrackConfig()
    fault: FaultConfig = FaultConfig()
