"""Peak memory of one forward + backward through a linear head, each form as a whole process of its own.

    python benchmarks/memory.py [--shape N,D,C] [--dtype float32]

Prints, beside the time of that one call, what the process needed at its peak beyond inputs and gradients: the
resident set's high-water mark after the call, less the resident set before it (inputs made, library warm),
less the bytes of the gradients. Linux only.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from datetime import date

FORMS = {
    "xent.linear_cross_entropy": "xent.linear_cross_entropy(x, w, t)",
    "F.linear_cross_entropy, 256 rows": "F.linear_cross_entropy(x, w, t, options=O(batch_chunk_size=256))",
    "F.linear_cross_entropy, 1024 rows": "F.linear_cross_entropy(x, w, t, options=O(batch_chunk_size=1024))",
    "F.linear + F.cross_entropy": "F.cross_entropy(F.linear(x, w), t)",
}

ONE = """
import json, re, time
import torch, torch.nn.functional as F
import xent
O = torch.nn.LinearCrossEntropyOptions
def status(name): return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
def reset(): open("/proc/self/clear_refs", "w").write("5")  # getrusage's peak cannot be: it is the parent's
def call(n, d, c):
    torch.manual_seed(0)
    x = torch.randn(n, d, dtype=torch.{dtype}, requires_grad=True)
    w = (torch.randn(c, d) * 0.02).to(torch.{dtype}).requires_grad_()
    t = torch.randint(c, (n,))
    reset()
    before, start = status("VmRSS"), time.perf_counter()
    loss = {form}
    loss.backward()
    seconds = time.perf_counter() - start
    gradients = x.grad.nbytes + w.grad.nbytes
    return {{"loss": float(loss), "seconds": seconds, "extra": status("VmHWM") - before - gradients}}
call(600, 64, 8192)
print(json.dumps(call({shape})))
"""


def once(form: str, shape: str, dtype: str) -> dict:
    """Loss, seconds and extra bytes of one call in a process of its own; or why it failed."""
    code = ONE.format(form=form, shape=shape, dtype=dtype)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="8192,256,65536", help="N,D,C")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, {date.today()}")
    print(f"N, D, C = {options.shape}, {options.dtype}\n")
    print(f"{'form':42} {'MiB beyond inputs and gradients':>32} {'seconds':>8}  loss")
    for name, form in FORMS.items():
        row = once(form, options.shape, options.dtype)
        if "failed" in row:
            print(f"{name:42} failed: {row['failed']}")
            continue
        print(f"{name:42} {row['extra'] / 2**20:32.1f} {row['seconds']:8.2f}  {row['loss']:.6f}")


if __name__ == "__main__":
    main()
