"""Rules of a preparation's shots, filters, saved clips and executor."""

from __future__ import annotations

from opensora_dist.config.load import Problem, expand
from opensora_dist.config.prepare import PrepareConfig, ShotsConfig
from opensora_dist.core.extras import missing_extra


def preparing_problems(config: PrepareConfig) -> list[Problem]:
    """Every one."""
    problems, shots = list[Problem](), config.shots
    if shots.detector != "none":
        missing = missing_extra("scenedetect", extra="prepare", wanted_by=f"shots.detector={shots.detector}")
        if missing is not None:
            problems.append(Problem(fields=("shots.detector",), message=f"{missing}, or use shots.detector=none", here=True))
    elif shots.threshold is not None:
        message = (
            f"shots.threshold={shots.threshold:g} is of a detector, and shots.detector=none; use content or adaptive, or drop it"
        )
        problems.append(Problem(fields=("shots.threshold", "shots.detector"), message=message))
    if shots.trim_s and shots.detector == "none" and not shots.dissolves:
        message = f"shots.trim_s={shots.trim_s:g} trims shots, and no shots are looked for; set shots.detector, or drop it"
        problems.append(Problem(fields=("shots.trim_s", "shots.detector"), message=message))
    if shots.min_s != ShotsConfig().min_s and shots.detector == "none" and not shots.dissolves:
        message = (
            f"shots.min_s={shots.min_s:g} leaves out short shots, and no shots are looked for; set shots.detector, or drop it"
        )
        problems.append(Problem(fields=("shots.min_s", "shots.detector"), message=message))
    if config.filter.camera == ():
        message = "filter.camera=[] keeps nothing; name the motions that are kept, or drop it"
        problems.append(Problem(fields=("filter.camera",), message=message))
    for name, low_high in (("brightness", config.filter.brightness), ("motion", config.filter.motion)):
        if low_high is not None and None not in low_high and low_high[0] > low_high[1]:  # type: ignore[operator]  # neither is None
            message = f"filter.{name}={list(low_high)} keeps nothing: its lowest value is above its highest; swap them"
            problems.append(Problem(fields=(f"filter.{name}",), message=message))
    if config.executor == "ray":
        missing = missing_extra("ray", extra="ray", wanted_by="executor=ray")
        if missing is not None:
            problems.append(Problem(fields=("executor",), message=f"{missing}, or use executor=local", here=True))
    folders = {"input.path": config.input.path, "output.path": config.output.path, "clip.save": config.clip.save}
    saved = folders.pop("clip.save")
    for name, path in folders.items():
        if saved is not None and path is not None and expand(saved).resolve() == expand(path).resolve():
            message = f"clip.save={saved!r} is {name} too; give it a folder of its own"
            problems.append(Problem(fields=("clip.save", name), message=message))
    source = config.input.path
    if saved is not None and source is not None and expand(source).resolve() in expand(saved).resolve().parents:
        message = (
            f"clip.save={saved!r} lies in input.path={source!r}, so the next run would take its clips for sources; put it beside"
        )
        problems.append(Problem(fields=("clip.save", "input.path"), message=message))
    return problems
