"""A head whose classes are spread over 1 to 4 processes: memory a rank, bytes on the wire, time.

    python benchmarks/parallel.py [--shape N,D,C] [--ranks 1,2,3,4] [--json FILE]

Each number of ranks is a gloo group of fresh processes with one thread each, on this machine; one forward +
backward is measured after one of a small head. Memory is the resident set's high-water mark less the resident
set before (inputs made), less the bytes of the gradients. Bytes are those of the tensors handed to
torch.distributed, of one rank. The peers are torch's own, DTensor logits under `loss_parallel`, and the plain
form that Megatron-LM has: each rank's logits, and three all-reduces of a number a row. Linux only.

More ranks than cores share these, so times say only what a rank computes where there are as many cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

FORMS = ("xent", "loss_parallel", "Megatron-style")


def status(name: str) -> int:
    found = re.search(name + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def cut(total: int, rank: int, size: int) -> slice:
    """Cut a dimension as DTensor does."""
    part = -(-total // size)
    return slice(min(rank * part, total), min((rank + 1) * part, total))


class VocabularyParallel(torch.autograd.Function):
    """The cross-entropy (N,) of logits of which each rank has some classes, from all of a rank's at once."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, first: int) -> Tensor:
        largest = z.amax(1)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        z = z - largest[:, None]
        here = (y >= first) & (y < first + z.shape[1])
        local = torch.where(here, y - first, 0)
        own = z.gather(1, local[:, None])[:, 0].masked_fill(~here, 0.0)
        dist.all_reduce(own)
        p = z.exp_()
        total = p.sum(1)
        dist.all_reduce(total)
        ctx.save_for_backward(p.div_(total[:, None]), local, here)
        return total.log() - own

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        p, local, here = ctx.saved_tensors
        rows = torch.arange(len(local))
        p[rows, local] -= here.to(p.dtype)
        return p.mul_(upstream[:, None]), None, None


class Copied(torch.autograd.Function):
    """Features that every rank has, whose gradient is the sum of the ranks' own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        dist.all_reduce(upstream)
        return upstream


def megatron(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    sizes = [torch.tensor([0]) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(w)]))
    first = sum(int(size) for size in sizes[: dist.get_rank()])
    losses: Tensor = VocabularyParallel.apply(Copied.apply(x) @ w.t(), y, first)
    return losses.mean()


def forward(form: str, group: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    import xent

    if form == "xent":
        return lambda x, w, y: xent.linear_cross_entropy(x, w, y, group=group)
    if form == "Megatron-style":
        return megatron
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def peer(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        features = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
        count = torch.tensor([w.shape[0]])
        dist.all_reduce(count)
        shape = torch.Size((int(count), w.shape[1]))
        head = DTensor.from_local(w, mesh, [Shard(0)], run_check=False, shape=shape, stride=(shape[1], 1))
        return torch.nn.functional.cross_entropy(features @ head.t(), y)

    return peer


def step(form: str, loss: Callable[..., Tensor], x: Tensor, w: Tensor, y: Tensor) -> float:
    if form != "loss_parallel":
        value = loss(x, w, y)
        value.backward()
        return value.item()
    from torch.distributed.tensor.parallel import loss_parallel

    with loss_parallel():
        value = loss(x, w, y)
        value.backward()
    return value.full_tensor().item()  # type: ignore[attr-defined]


def one_rank(rank: int, size: int, form: str, shape: tuple[int, int, int], at: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{at}", rank=rank, world_size=size)
    n, d, c = shape
    torch.manual_seed(0)
    x, y = torch.randn(n, d, requires_grad=True), torch.randint(c, (n,))
    classes = cut(c, rank, size)
    w = (torch.randn(c, d) * 0.02)[classes].clone().requires_grad_()  # the same head, however it is cut
    loss = forward(form, dist.group.WORLD)
    small, few = torch.randn(32, 16, requires_grad=True), torch.randn(64, 16, requires_grad=True)
    step(form, loss, small, few, torch.arange(32))
    if form == "xent":
        with torch.no_grad():  # the ranks learn how the classes are cut
            loss(x[:32], w, y[:32])

    sent: list[int] = []
    real = dist.all_reduce

    def counting(tensor: Tensor, *given: Any, **options: Any) -> Any:
        sent.append(tensor.nbytes)
        return real(tensor, *given, **options)

    dist.all_reduce = counting
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")
    before, start = status("VmRSS"), time.perf_counter()
    apart = form != "loss_parallel"  # whose forward and backward need one setting around both
    value = loss(x, w, y) if apart else None
    halfway, ahead = time.perf_counter() - start, list(sent)
    if value is not None:
        value.backward()
        answer = value.item()
    else:
        answer = step(form, loss, x, w, y)
    seconds = time.perf_counter() - start
    assert x.grad is not None
    assert w.grad is not None
    said = {
        "rank": rank,
        "loss": answer,
        "seconds": seconds,
        "forward_seconds": halfway,
        "extra": status("VmHWM") - before - x.grad.nbytes - w.grad.nbytes,
        "held": x.nbytes + 2 * w.nbytes + x.grad.nbytes,
        "forward_bytes": sum(ahead) if apart else None,
        "backward_bytes": sum(sent) - sum(ahead) if apart else None,
        "collectives": len(sent),
    }
    Path(out, f"{rank}.json").write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()


def measure(form: str, size: int, shape: tuple[int, int, int]) -> list[dict[str, Any]] | str:
    with tempfile.TemporaryDirectory() as folder:
        given = (size, form, shape, str(Path(folder, "meeting")), folder)
        try:
            torch.multiprocessing.start_processes(one_rank, given, nprocs=size, start_method="spawn")
        except Exception as error:
            return str(error).strip().splitlines()[-1]
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="2048,256,200003", help="N,D,C")
    parser.add_argument("--ranks", default="1,2,3,4")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    n, d, c = (int(part) for part in options.shape.split(","))
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, torch {torch.__version__}, {date.today()}")
    print(f"N, D, C = {n}, {d}, {c}, float32, one thread a rank, gloo\n")
    print(
        f"{'form':15}{'ranks':>6}{'held MiB':>10}{'extra MiB':>11}{'KiB forward':>13}{'KiB backward':>14}"
        f"{'seconds':>9}  loss"
    )
    results = {}
    for size in (int(part) for part in options.ranks.split(",")):
        for form in FORMS:
            found = results[f"{form} {size}"] = measure(form, size, (n, d, c))
            if isinstance(found, str):
                print(f"{form:15}{size:6}  {found}")
                continue
            most = {key: max(row[key] or 0 for row in found) for key in found[0]}
            wire = (
                f"{most['forward_bytes'] / 1024:13.1f}{most['backward_bytes'] / 1024:14.1f}"
                if form != "loss_parallel"
                else f"{'':27}"
            )
            print(
                f"{form:15}{size:6}{most['held'] / 2**20:10.1f}{most['extra'] / 2**20:11.1f}{wire}"
                f"{most['seconds']:9.2f}  {found[0]['loss']:.6f}"
            )
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
