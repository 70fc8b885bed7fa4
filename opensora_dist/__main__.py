"""``python -m opensora_dist`` is ``opensora-dist``, so that torchrun can start it with ``-m opensora_dist``."""

from opensora_dist.cli.main import run

run()
