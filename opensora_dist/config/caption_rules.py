"""Rules of a preparation's captions, of the scores that a CLIP-like model gives, and of what is refused for safety."""

from __future__ import annotations

from opensora_dist.config.load import Problem, expand
from opensora_dist.config.prepare import CaptionConfig, PrepareConfig, SafetyConfig
from opensora_dist.core.extras import missing_extra
from opensora_dist.core.registry import nearest


def caption_problems(config: PrepareConfig) -> list[Problem]:
    """Every one."""
    return [*_prompt_problems(config), *_clip_model_problems(config), *_safety_problems(config), *_model_problems(config)]


def _prompt_problems(config: PrepareConfig) -> list[Problem]:
    caption, problems = config.caption, list[Problem]()
    if caption.use not in caption.prompts:
        forms = ", ".join(sorted(caption.prompts)) or "none"
        message = (
            f"caption.use={caption.use!r} must be one of the forms in caption.prompts ({forms}){nearest(caption.use, caption.prompts)}; "
            "use one of them, or add a prompt for it"
        )
        problems.append(Problem(fields=("caption.use", "caption.prompts"), message=message))
    for form, prompt in caption.prompts.items():
        if not prompt.strip():
            message = f"caption.prompts.{form} is empty; say what the model is asked, or drop the form"
            problems.append(Problem(fields=("caption.prompts",), message=message))
    if caption.model is None and not caption.keep_existing:
        message = (
            "caption.keep_existing=false without caption.model leaves no caption; give the folder of a vision-language model, or use "
            "keep_existing=true"
        )
        problems.append(Problem(fields=("caption.keep_existing", "caption.model"), message=message))
    asked = ("prompts", "use", "frames", "batch", "max_new_tokens", "dtype")
    if caption.model is None and (names := [name for name in asked if getattr(caption, name) != getattr(CaptionConfig(), name)]):
        fields = tuple(f"caption.{name}" for name in names)
        message = f"{', '.join(fields)}: what a model is asked, and caption.model is not set; set it, or drop {'it' if len(names) == 1 else 'them'}"
        problems.append(Problem(fields=("caption.model", *fields), message=message))
    return problems


def _clip_model_problems(config: PrepareConfig) -> list[Problem]:
    """What wants a score that a CLIP-like model gives, and what such a model lacks."""
    scores, problems = config.scores, list[Problem]()
    wanted: dict[str, list[str]] = {"aesthetic": [], "match": []}
    for name, fields in wanted.items():
        if name in scores.also:
            fields.append("scores.also")
        if getattr(config.filter, name) is not None:
            fields.append(f"filter.{name}")
        if name in config.caption.append:
            fields.append("caption.append")
    fields = [field for named in wanted.values() for field in named]
    if fields and scores.clip_model is None:
        names = " and ".join(name for name, named in wanted.items() if named)
        message = (
            f"scores.clip_model is not set, and {', '.join(dict.fromkeys(fields))} want {names}; give the folder of a CLIP or SigLIP model, "
            f"or leave {names} out"
        )
        problems.append(Problem(fields=("scores.clip_model", *fields), message=message))
    if wanted["aesthetic"] and scores.aesthetic_head is None:
        message = (
            f"scores.aesthetic_head is not set, and {', '.join(wanted['aesthetic'])} want aesthetic; give the safetensors file of a head "
            "that was trained on scores.clip_model (docs/captions.md), or leave aesthetic out"
        )
        problems.append(Problem(fields=("scores.aesthetic_head", *wanted["aesthetic"]), message=message))
    for name, used in (("clip_model", fields), ("aesthetic_head", wanted["aesthetic"])):
        if getattr(scores, name) is not None and not used:
            message = f"scores.{name} is set, and nothing wants a score of it; add one to scores.also, set a filter, or drop scores.{name}"
            problems.append(Problem(fields=(f"scores.{name}", "scores.also"), message=message))
    if scores.aesthetic_head is not None and not expand(scores.aesthetic_head).is_file():
        message = f"scores.aesthetic_head={scores.aesthetic_head!r} is not a file; correct the path"
        problems.append(Problem(fields=("scores.aesthetic_head",), message=message, here=True))
    return problems


def _safety_problems(config: PrepareConfig) -> list[Problem]:
    safety, problems = config.safety, list[Problem]()
    if safety.words is not None and not expand(safety.words).is_file():
        message = (
            f"safety.words={safety.words!r} is not a file; give a text file with one word or phrase a line, or drop safety.words"
        )
        problems.append(Problem(fields=("safety.words",), message=message, here=True))
    unused = [
        name
        for name in ("image_classes", "image_threshold", "image_frames")
        if getattr(safety, name) != getattr(SafetyConfig(), name)
    ]
    if safety.images == "none" and unused:
        fields = tuple(f"safety.{name}" for name in unused)
        message = f"{', '.join(fields)}: of a detector, and safety.images=none; use nudenet, or drop {'it' if len(unused) == 1 else 'them'}"
        problems.append(Problem(fields=("safety.images", *fields), message=message))
    if safety.images == "nudenet":
        missing = missing_extra("nudenet", extra="safety", wanted_by="safety.images=nudenet")
        if missing is not None:
            problems.append(Problem(fields=("safety.images",), message=f"{missing}, or use safety.images=none", here=True))
    return problems


def _model_problems(config: PrepareConfig) -> list[Problem]:
    """Models are loaded when the first clip needs them, which may be hours later: what can be said of them is said before."""
    problems = []
    for name, path in (("caption.model", config.caption.model), ("scores.clip_model", config.scores.clip_model)):
        if path is None:
            continue
        missing = missing_extra("transformers", extra="hf", wanted_by=name)
        if missing is not None:
            problems.append(Problem(fields=(name,), message=missing, here=True))
        if path.startswith(("/", ".", "~", "$")) and not expand(path).is_dir():
            message = f"{name}={path!r} is not a folder; give one that save_pretrained of transformers wrote, or a hub name"
            problems.append(Problem(fields=(name,), message=message, here=True))
    return problems
