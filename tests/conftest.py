"""Triton's kernels run in its interpreter here; it must be told before anything imports triton (transformers does).

`make gpu-test` sets TRITON_INTERPRET=0 and so runs them compiled.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
