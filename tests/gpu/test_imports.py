"""A GPU machine may lack Ray, and what only other tests need."""

import subprocess
import sys

_COLLECT = """
import sys
sys.modules["ray"] = sys.modules["redis"] = None  # whoever imports them now fails
import pytest
status = pytest.main(["-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"])
import workers.attention.__main__, workers.dense.__main__, workers.gateway.__main__
assert not [name for name in sys.modules if name.startswith("ray.")]
sys.exit(status)
"""


def test_nothing_under_gpu_imports_what_a_gpu_machine_may_lack() -> None:
    """`pytest -m gpu` finds its tests, and the roles they start can be imported, where there is neither Ray
    nor Redis's client."""
    done = subprocess.run([sys.executable, "-c", _COLLECT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/gpu/test_split_over_devices.py: 1" in done.stdout
    assert "tests/gpu/test_triton_kernels.py: " in done.stdout
