"""Images without an engine: buildah and debootstrap, from this machine's own Debian mirror and pip configuration."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_PROGRAMS = {"buildah": "buildah", "debootstrap": "debootstrap"}
_BUILD_S = 1500.0


def problems() -> str | None:
    """Why images can't be built here, or None."""
    if os.geteuid() != 0:
        return (
            "building images without an engine needs root; run `make test-docker` as root, in a machine where that is all right"
        )
    if shutil.which("apt-get") is None:
        return "a Debian base is made by debootstrap from this machine's mirror; run `make test-docker` on Debian or Ubuntu"
    return None


def install_programs() -> None:
    missing = [package for program, package in _PROGRAMS.items() if shutil.which(program) is None]
    if missing:
        env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", *missing]):
            subprocess.run(command, env=env, check=True)


@dataclass(frozen=True)
class Store:
    """Images and containers under one folder, apart from the machine's own."""

    folder: Path

    def buildah(self, *args: str, limit_s: float = _BUILD_S) -> subprocess.CompletedProcess[str]:
        places = ["--root", str(self.folder / "images"), "--runroot", str(self.folder / "run")]
        env = os.environ | {"BUILDAH_ISOLATION": "chroot", "TMPDIR": str(self.folder)}
        return subprocess.run(["buildah", *places, *args], capture_output=True, text=True, env=env, timeout=limit_s, check=False)

    def must(self, *args: str) -> str:
        done = self.buildah(*args)
        assert done.returncode == 0, f"buildah {' '.join(args)}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        return done.stdout.strip()

    def remove(self) -> None:
        self.buildah("rm", "--all")
        self.buildah("rmi", "--all", "--force")
        shutil.rmtree(self.folder, ignore_errors=True)


def make_base(store: Store, name: str) -> None:
    """A minimal Debian, or Ubuntu, of this machine's release, from the mirror that its apt is configured with."""
    release = dict(line.partition("=")[::2] for line in Path("/etc/os-release").read_text().splitlines())["VERSION_CODENAME"]
    fields = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME)", "Created-By: Packages", "Component: main"]
    targets = [line.split() for line in subprocess.check_output(fields, text=True).splitlines()]
    mirror = next(uri for uri, codename in targets if codename == release)
    root = store.folder / "base"
    subprocess.run(["debootstrap", "--variant=minbase", release, str(root), mirror], check=True, stdout=subprocess.DEVNULL)
    # How this machine's apt reaches that mirror: proxies, dates that it doesn't check.
    ways = [
        line for line in subprocess.check_output(["apt-config", "dump"], text=True).splitlines() if line.startswith("Acquire::")
    ]
    kept = [line for line in ways if "Check-" in line or "Proxy" in line]
    (root / "etc/apt/apt.conf.d/90machine").write_text("".join(f"{line}\n" for line in kept))
    container = store.must("from", "scratch")
    store.must("add", container, str(root), "/")
    store.must("commit", "--format", "docker", "--rm", container, name)
    shutil.rmtree(root)


@dataclass(frozen=True)
class PipConfig:
    """This machine's, for steps of a build to see, and no layer to keep.

    Args:
        arguments: Of ``buildah bud``.
        marks: Texts by which it would be known again in an image.
    """

    arguments: tuple[str, ...]
    marks: tuple[str, ...]


def pip_config(folder: Path) -> PipConfig:
    """Files that it names are copied beside it; folders are mounted where they are."""
    lines = subprocess.check_output([sys.executable, "-m", "pip", "config", "list"], text=True).splitlines()
    options: dict[str, str] = {}
    for line in lines:  # the environment's come first, and win
        name, _, value = line.partition("=")
        options.setdefault(name.rpartition(".")[2], ast.literal_eval(value))
    folder.mkdir(mode=0o700)
    mounts = [f"{folder}:/mnt/pip:ro"]
    marks = ["a-mark-of-this-build.invalid"]
    for name in ("cert", "client-cert", "constraint"):
        if name in options:
            shutil.copy(options[name], folder / name)
            options[name] = f"/mnt/pip/{name}"
    for word in " ".join(options.get(name, "") for name in ("find-links", "index-url", "extra-index-url")).split():
        marks.append(word)
        place = Path(word.removeprefix("file://"))
        if place.is_dir():
            # Pages of an index link to files that lie beside it.
            place = place.parent if word.startswith("file://") else place
            mounts.append(f"{place}:{place}:ro")
    hosts = f"{options.get('trusted-host', '')} {marks[0]}".strip()
    text = "".join(f"{name} = {value}\n" for name, value in {**options, "trusted-host": hosts}.items())
    (folder / "pip.conf").write_text(f"[global]\n{text}")
    volumes = [word for mount in dict.fromkeys(mounts) for word in ("--volume", mount)]
    return PipConfig(arguments=("--secret", f"id=pip,src={folder / 'pip.conf'}", *volumes), marks=tuple(dict.fromkeys(marks)))


def build(store: Store, source: Path, *, name: str, pip: PipConfig, file: Path | None = None, **arguments: str) -> list[str]:
    """Builds; returns what was said of each step: ``"RUN ..."`` or ``"cached RUN ..."``."""
    given = [word for key, value in arguments.items() for word in ("--build-arg", f"{key}={value}")]
    command = ["bud", "--format", "docker", "--layers", "--network", "host", *pip.arguments, *given, "--tag", name]
    said = store.must(*command, "--file", str(file or source / "Dockerfile"), str(source))
    steps: list[str] = []
    for line in said.splitlines():
        if line.startswith("STEP "):
            steps.append(line.partition(": ")[2])
        elif line.startswith("--> Using cache") and steps:
            steps[-1] = f"cached {steps[-1]}"
    return steps


class Container:
    """A container of an image, in which its entry point is run as its user."""

    def __init__(self, store: Store, image: str) -> None:
        self._store = store
        described = json.loads(store.must("inspect", "--type", "image", image))
        self.config = described["Docker"]["config"]
        self.history = json.dumps(described)
        self._name = store.must("from", "--pull-never", image)
        self.root = Path(store.must("mount", self._name))

    def run(self, *command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        return self._store.buildah("run", *options, self._name, "--", *command, limit_s=900)

    def enter(self, *args: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """The entry point."""
        return self.run(*self.config["Entrypoint"], *args, options=options)
