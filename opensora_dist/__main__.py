"""``python -m opensora_dist`` is ``opensora-dist``, so that torchrun can start it with ``-m opensora_dist``."""

import sys

from opensora_dist.cli.main import main

sys.exit(main())
