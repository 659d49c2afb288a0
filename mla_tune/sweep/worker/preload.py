"""What the server process imports before it forks workers: everything that is slow to import and touches no device.

The kernel libraries are not among it: importing DeepGEMM looks for a GPU, and a CUDA context does not survive a fork.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)  # an interpreter's timings would be stored as the kernels'

import mla_tune.sweep.worker.server  # noqa: F401
