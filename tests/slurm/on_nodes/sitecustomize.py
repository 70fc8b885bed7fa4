"""On the path of every Python of a job: makes a run from its very start take its time, so that something can happen to it, or fail.

``OPENSORA_TEST_PAUSE_S`` is slept before each step of a run that began at step 0: one that goes on from a checkpoint hurries.
``OPENSORA_TEST_BUG_AT`` is a step, from 0, that raises what a bug in the code would.
"""

import os
import sys

_PAUSE_S, _BUG_AT = (os.environ.get(f"OPENSORA_TEST_{name}") for name in ("PAUSE_S", "BUG_AT"))
if "RANK" in os.environ and "train" in sys.orig_argv and (_PAUSE_S or _BUG_AT):
    import time

    from opensora_dist.train import loop

    _first = []
    _real = loop.train_step

    def _train_step(backend, data, **kwargs):
        _first.append(data.step)
        if _BUG_AT and data.step == int(_BUG_AT):
            raise ZeroDivisionError("a bug")
        if _PAUSE_S and _first[0] == 0:
            time.sleep(float(_PAUSE_S))
        return _real(backend, data, **kwargs)

    loop.train_step = _train_step
