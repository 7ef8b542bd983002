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
import json, resource, sys, time
import torch, torch.nn.functional as F
import xent
O = torch.nn.LinearCrossEntropyOptions
def now(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def call(n, d, c):
    torch.manual_seed(0)
    x = torch.randn(n, d, dtype=torch.{dtype}, requires_grad=True)
    w = (torch.randn(c, d) * 0.02).to(torch.{dtype}).requires_grad_()
    t = torch.randint(c, (n,))
    before, start = now(), time.perf_counter()
    loss = {form}
    loss.backward()
    seconds = time.perf_counter() - start
    gradients = x.grad.nbytes + w.grad.nbytes
    return {{"loss": float(loss), "seconds": seconds, "extra": peak() - before - gradients}}
call(300, 8, 300)
print(json.dumps(call({shape})))
"""


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
        code = ONE.format(form=form, shape=options.shape, dtype=options.dtype)
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
        if done.returncode:
            print(f"{name:42} {'failed: ' + done.stderr.strip().splitlines()[-1]}")
            continue
        row = json.loads(done.stdout)
        print(f"{name:42} {row['extra'] / 2**20:32.1f} {row['seconds']:8.2f}  {row['loss']:.6f}")


if __name__ == "__main__":
    main()
