"""The attention room needs PyTorch and its neighbours, and nothing else that foveal depends on.

So that it runs from the source tree on a machine that has only those.
"""

import subprocess
import sys

BARE = ("foveal", "torch", "numpy", "psutil", "triton")

SCRIPT = f"""
import sys
import torch, numpy, psutil, torch._dynamo  # with whatever they themselves import

class Guard:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        known = top in {BARE!r} or top in sys.stdlib_module_names or top in sys.modules
        if not known:
            raise ImportError(f"the bare rooms imported {{name}}")

sys.meta_path.insert(0, Guard())

for blocked in ("tokenizers", "safetensors", "typer"):
    try:
        __import__(blocked)
    except ImportError:
        continue
    raise SystemExit(f"{{blocked}} is not blocked")

from foveal.attention.api import attend, attend_varlen
from foveal.attention.explain import explain
from foveal.attention.trace import trace

x = torch.randn(1, 2, 3, 4)
assert attend(x, x, x).shape == x.shape
assert str(trace(x, x, x))
assert str(explain(x, x, x))
assert attend_varlen(x[0], x[0], x[0], None, torch.tensor([0, 2]), torch.tensor([0, 2])).any()
print("bare")
"""


def test_attention_needs_only_torch_and_its_neighbours() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert done.stdout == "bare\n", done.stderr
