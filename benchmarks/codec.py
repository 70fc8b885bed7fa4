"""Reconstruction quality of the training-free codec on video files: PSNR of pixels -> latents -> pixels.

    python benchmarks/codec.py VIDEO [VIDEO ...] --out benchmarks/results/cpu/codec.json

Each frame is resized on its short side and cropped at the centre, as preparation does. PSNR is pooled over frames: from the mean
squared error of all pixels of the first N frames.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from opensora_dist.codecs.registry import build_codec
from opensora_dist.config.codec import DctCodecConfig
from opensora_dist.core.io import write_json
from opensora_dist.core.video import iter_frames
from opensora_dist.prepare.clips import resize_and_crop

BATCH_FRAMES = 16


def psnr_by_length(path: Path, *, config: DctCodecConfig, size: int, lengths: list[int]) -> dict[str, float]:
    """PSNR in dB over the first N frames, for each N of ``lengths`` the video reaches, and over all of it."""
    codec = build_codec(config, device=torch.device("cpu"))
    frames = (resize_and_crop(frame, height=size, width=size) for _, frame in iter_frames(path))
    squared_error, count, found = 0.0, 0, {}
    while len(batch := list(islice(frames, BATCH_FRAMES))) >= config.temporal_factor:
        batch = batch[: len(batch) // config.temporal_factor * config.temporal_factor]
        clip = torch.from_numpy(np.stack(batch))[None]
        again = codec.decode(codec.encode(clip))
        squared_error += float(((again.double() - clip.double()) ** 2).sum())
        count += len(batch)
        if count in lengths:
            found[f"first {count}"] = _psnr(squared_error / (count * size * size * 3))
    found[f"all {count}"] = _psnr(squared_error / (count * size * size * 3))
    return found


def _psnr(mean_squared_error: float) -> float:
    return round(float(10 * np.log10(255**2 / mean_squared_error)), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", type=Path)
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels")
    parser.add_argument("--channels", type=int, nargs="+", default=[16])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for path in args.videos:
        for channels in args.channels:
            for temporal_factor in (1, 4):
                config = DctCodecConfig(channels=channels, temporal_factor=temporal_factor)
                found = psnr_by_length(path, config=config, size=args.size, lengths=[16, 48, 96])
                rows.append({"video": path.name, "channels": channels, "temporal_factor": temporal_factor, "psnr_db": found})
                print(path.name, f"channels {channels}, temporal factor {temporal_factor}:", found)
    write_json(args.out, {"size": args.size, "rows": rows})


if __name__ == "__main__":
    main()
