"""These tests run in an environment of their own (``make test-colossalai``), where a test that doesn't run is a failure.

Elsewhere they aren't collected. The folder isn't named after the package, which it would hide from ``import``.
"""

from __future__ import annotations

import importlib.util

collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("colossalai") is None else []
