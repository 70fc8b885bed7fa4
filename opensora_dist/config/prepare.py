"""Schema of ``opensora-dist data prepare``: raw video and images to latent shards."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from opensora_dist.config.base import Section
from opensora_dist.config.codec import CodecConfig, DctCodecConfig, HashTextConfig, TextConfig

Range = tuple[float | None, float | None]
CameraMotion = Literal[
    "static",
    "pan left",
    "pan right",
    "tilt up",
    "tilt down",
    "zoom in",
    "zoom out",
    "roll clockwise",
    "roll counterclockwise",
    "undetermined",
]
NudeNetClass = Literal[
    "ANUS_COVERED",
    "ANUS_EXPOSED",
    "ARMPITS_COVERED",
    "ARMPITS_EXPOSED",
    "BELLY_COVERED",
    "BELLY_EXPOSED",
    "BUTTOCKS_COVERED",
    "BUTTOCKS_EXPOSED",
    "FACE_FEMALE",
    "FACE_MALE",
    "FEET_COVERED",
    "FEET_EXPOSED",
    "FEMALE_BREAST_COVERED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_COVERED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_BREAST_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
]


class InputConfig(Section):
    """Where the videos, images and captions are."""

    path: str | None = Field(
        None,
        description="Folder of videos and images, or of WebDataset tars that hold them; captions in metadata.parquet, metadata.csv or a "
        ".txt per clip.",
    )


class OutputConfig(Section):
    """Where the shards go."""

    path: str | None = Field(None, description="Folder for the tar shards and the index.")
    shard_samples: int = Field(256, ge=1, description="Samples per tar shard.")
    dtype: Literal["float16", "float32"] = Field("float16", description="Stored precision of latents and text vectors.")


class ShotsConfig(Section):
    """Where a video is cut."""

    detector: Literal["none", "content", "adaptive"] = Field(
        "none", description="none: a video is one shot; content and adaptive: PySceneDetect's."
    )
    threshold: float | None = Field(None, gt=0, description="The detector's; default: its own.")
    min_s: float = Field(0.5, gt=0, description="Shorter shots are left out.")
    dissolves: bool = Field(False, description="Also cut where one shot fades into another, which both detectors miss.")
    windows: Literal["first", "all"] = Field(
        "first", description="first: one clip from the start of each shot; all: as many as follow each other in it."
    )
    trim_s: float = Field(0.0, ge=0, description="Left out at each end of a shot that was cut.")


class ClipConfig(Section):
    """How a clip is cut out of a shot."""

    fps: float = Field(8.0, gt=0, description="Frames per second after sampling.")
    buckets: tuple[tuple[int, int, int], ...] = Field(
        ((16, 64, 64),), min_length=1, description="Allowed clip shapes [frames, height, width] in pixels."
    )
    save: str | None = Field(
        None, description="Folder that kept clips are also written to, as H.264; default: no video is written."
    )


ScoreName = Literal[
    "brightness", "static", "sharpness", "motion", "text_area", "compression", "camera", "duplicates", "aesthetic", "match"
]
"""What can be measured of a clip; filters have these names."""


class ScoresConfig(Section):
    """What is measured of every clip, beyond what a filter asks for."""

    also: tuple[
        ScoreName,
        ...,
    ] = Field((), description="Scores to compute though no filter needs them.")
    clip_model: str | None = Field(None, description="A CLIP-like model of transformers, by path: for aesthetic and match.")
    aesthetic_head: str | None = Field(
        None, description="safetensors of the linear layers that turn an image embedding into an aesthetic score."
    )
    frames: int = Field(
        8, ge=2, description="Frames of a clip that are looked at, evenly spaced; motion takes each with the next."
    )


class FilterConfig(Section):
    """Which clips are kept; what is not set is not asked."""

    min_s: float | None = Field(None, gt=0, description="Shortest clip, in seconds of video.")
    min_side: int | None = Field(None, ge=1, description="Shortest side of the video, in pixels.")
    brightness: Range | None = Field(None, description="Lowest and highest mean grey, 0 to 255.")
    static: float | None = Field(None, ge=0, le=1, description="Largest share of frames equal to the one before.")
    sharpness: float | None = Field(None, ge=0, description="Lowest variance of the Laplacian.")
    motion: Range | None = Field(
        None, description="Lowest and highest mean optical flow, in pixels per frame at 256 pixels height."
    )
    text_area: float | None = Field(None, ge=0, le=1, description="Largest share of the picture under text.")
    compression: float | None = Field(None, ge=0, description="Lowest bits per pixel of the source.")
    camera: tuple[CameraMotion, ...] | None = Field(None, description="Camera motions that are kept.")
    duplicates: int | None = Field(
        None, ge=0, le=64, description="Of clips whose perceptual hashes differ in at most so many bits, the first is kept."
    )
    aesthetic: float | None = Field(None, description="Lowest aesthetic score.")
    match: float | None = Field(None, description="Lowest cosine of caption and picture.")


class CaptionConfig(Section):
    """What is said about a clip."""

    model: str | None = Field(
        None, description="A vision-language model of transformers, by path; default: existing captions only."
    )
    keep_existing: bool = Field(True, description="A clip that has a caption keeps it.")
    prompts: dict[str, str] = Field(
        {
            "short": "Describe this video in one short sentence.",
            "descriptive": "Describe this video in detail: subjects, actions, setting, light, camera.",
        },
        description="Forms of caption, and what the model is asked for each.",
    )
    use: str = Field("descriptive", description="The form that is trained on.")
    frames: int = Field(4, ge=1, description="Frames that the model is shown.")
    batch: int = Field(4, ge=1, description="Clips captioned at once.")
    max_new_tokens: int = Field(200, ge=1, description="Longest answer.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Precision the model computes in.")
    append: tuple[Literal["aesthetic", "motion", "camera"], ...] = Field(
        (), description="Scores that captions end with: `motion score: 10, camera motion: pan left`."
    )


class CleanConfig(Section):
    """What is taken out of captions."""

    enabled: bool = Field(False, description="Strip URLs, markup, phrases like `The video shows`, repeated words and spaces.")
    min_words: int = Field(0, ge=0, description="Clips with shorter captions are dropped.")


class SafetyConfig(Section):
    """What is not to be trained on."""

    words: str | None = Field(None, description="File of words, one a line: clips whose captions hold one are dropped.")
    images: Literal["none", "nudenet"] = Field("none", description="Detector run on frames; nudenet needs the `safety` extra.")
    image_classes: tuple[NudeNetClass, ...] = Field(
        (
            "ANUS_EXPOSED",
            "BUTTOCKS_EXPOSED",
            "FEMALE_BREAST_EXPOSED",
            "FEMALE_GENITALIA_EXPOSED",
            "MALE_GENITALIA_EXPOSED",
        ),
        min_length=1,
        description="What the detector may not find.",
    )
    image_threshold: float = Field(0.5, gt=0, le=1, description="Confidence from which on a clip is dropped.")
    image_frames: int = Field(8, ge=1, description="Frames of a clip that it looks at, evenly spaced.")


class PrepareConfig(Section):
    """The whole preparation."""

    input: InputConfig = InputConfig()
    output: OutputConfig = OutputConfig()
    shots: ShotsConfig = ShotsConfig()
    clip: ClipConfig = ClipConfig()
    scores: ScoresConfig = ScoresConfig()
    filter: FilterConfig = FilterConfig()
    caption: CaptionConfig = CaptionConfig()
    clean: CleanConfig = CleanConfig()
    safety: SafetyConfig = SafetyConfig()
    codec: CodecConfig = DctCodecConfig()
    text: TextConfig = HashTextConfig()
    workers: int = Field(1, ge=1, description="Processes that decode and score video.")
    executor: Literal["local", "ray"] = Field(
        "local", description="ray: the cluster that RAY_ADDRESS names, or one started here."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where codec, text encoder and models run.")
    seed: int = Field(0, ge=0, description="Keys a sampling codec's posterior; a training-free one draws nothing.")
