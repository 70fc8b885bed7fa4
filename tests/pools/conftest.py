"""SkyPilot keeps files of its own in the home folder from where it is imported on; these tests leave the user's alone."""

from __future__ import annotations

import os
import tempfile

_home = tempfile.TemporaryDirectory()  # gone with this process
os.environ["HOME"] = _home.name
os.environ["SKYPILOT_DISABLE_USAGE_COLLECTION"] = "1"
