"""The benchmarks count the launches of Triton's kernels, on any machine, but not without Triton."""

from __future__ import annotations

import importlib.util

collect_ignore = [] if importlib.util.find_spec("triton") else ["test_traffic.py", "test_suites.py"]
