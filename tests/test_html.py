"""Results as tables in notebooks: of every kind of tensor that a result may hold, or its repr."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from html import escape, unescape

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import xent
from xent import sinkhorn, triplets
from xent._util import html

LOSSES = {
    "bounds": triplets.bounds,
    "attribution": triplets.attribution,
    "pair_matrix": triplets.pair_matrix,
    "sparse_pair_matrix": lambda z, y: triplets.pair_matrix(z, y, top_k=2),
    "row_statistics": xent.row_statistics,
}
BY_ROW = {name: LOSSES[name] for name in ("bounds", "attribution", "row_statistics")}
EVERY = {**LOSSES, "assignment": lambda z, _: sinkhorn.assign(z)}


def rows(text: str) -> list[list[str]]:
    """Return the cells of a table's body."""
    body = re.search(r"<tbody>(.*)</tbody>", text, re.S)
    assert body is not None, text
    return [
        [unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", line)]
        for line in re.findall(r"<tr>(.*?)</tr>", body[1])
    ]


def header(text: str) -> list[str]:
    return [unescape(name) for name in re.findall(r'<th scope="col">(.*?)</th>', text)]


def check(text: str) -> str:
    """Check what holds of every table, and return it."""
    assert "tensor" not in text
    assert "background" not in text
    assert "color" not in text
    assert re.search(r"<caption[^>]*>[^<]*(nats|mass)[^<]*</caption>", text), "no unit"
    assert len(rows(text)) <= html.MOST
    for row in rows(text):
        assert len(row) == len(header(text))
        for digits in re.findall(r"\d+(?:\.\d+)?(?:e[+-]\d+)?", " ".join(row)):
            assert len(digits.split("e")[0].replace(".", "").lstrip("0")) <= 4, digits
    for name in set(re.findall(r"</?(\w+)", text)):
        assert text.count(f"<{name}>") + text.count(f"<{name} ") == text.count(f"</{name}>"), name
    return text


def logits(*shape: int, classes: int = 7, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    z = torch.randn(*shape, classes).to(dtype)
    y = torch.randint(classes, shape)
    return (z.movedim(-1, 1) if len(shape) > 1 else z), y


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_types_and_gradients(name, dtype, requires_grad):
    z, y = logits(12, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = EVERY[name](z.requires_grad_(requires_grad), y)
        text = check(found._repr_html_())
    assert len(rows(text)) == 10
    assert re.search(r"The (first|largest) 10 of \d+ (rows|pairs)\.", text)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(name):
    z, y = (t.cuda() for t in logits(12))
    check(EVERY[name](z, y)._repr_html_())


@pytest.mark.parametrize("name", LOSSES)
def test_without_rows(name):
    text = check(LOSSES[name](*logits(0))._repr_html_())
    assert rows(text) == []
    assert "<p>0 " in text


@pytest.mark.parametrize("name", BY_ROW)
def test_without_dimensions(name):
    text = check(BY_ROW[name](*logits())._repr_html_())
    assert len(rows(text)) == 1
    assert header(text)[0] != "row"
    assert "<p>" not in text


@pytest.mark.parametrize("name", BY_ROW)
def test_rows_of_several_dimensions_are_numbered_by_all(name):
    text = check(BY_ROW[name](*logits(3, 2))._repr_html_())
    assert [row[0] for row in rows(text)] == ["0, 0", "0, 1", "1, 0", "1, 1", "2, 0", "2, 1"]
    assert "<p>6 rows.</p>" in text
    text = check(BY_ROW[name](*logits(3, 2, 5))._repr_html_())
    assert rows(text)[-1][0] == "0, 1, 4"
    assert "<p>The first 10 of 30 rows.</p>" in text
    assert "<p>0 rows.</p>" in check(BY_ROW[name](*logits(3, 0))._repr_html_())


@pytest.mark.parametrize("name", LOSSES)
def test_one_class(name):
    check(LOSSES[name](*logits(3, classes=1))._repr_html_())


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_are_infinite_or_nan(name):
    z, y = logits(3)
    z[0, y[0]] = -torch.inf
    z[1] = torch.nan
    check(LOSSES[name](z, y)._repr_html_())


@pytest.mark.parametrize("name", LOSSES)
def test_made_under_inference_mode(name):
    with torch.inference_mode():
        found = LOSSES[name](*logits(3))
    check(found._repr_html_())


@pytest.mark.parametrize("name", EVERY)
def test_under_another_default_device(name):
    found = EVERY[name](*logits(3))
    with torch.device("meta"):
        check(found._repr_html_())


def test_numbers_are_those_of_the_rows():
    z, y = logits(3)
    y[1] = -100
    found = xent.row_statistics(z, y)
    text = found._repr_html_()
    assert header(text) == ["row", "loss", "log p", "logsumexp", "entropy", "argmax", "correct"]
    right = "yes" if found.correct[0] else "no"
    assert rows(text)[0][1:5] == [f"{value[0].item():.4g}" for value in found[:4]]
    assert rows(text)[0][5:] == [str(found.argmax[0].item()), right]
    assert rows(text)[1] == ["1", "0", "0", "0", "0", "ignored", ""]
    assert header(xent.row_statistics(z)._repr_html_()) == ["row", "logsumexp", "entropy", "argmax"]


def test_rivals_and_what_the_others_carry():
    z, y = logits(2)
    y[1] = -100
    found = triplets.attribution(z, y, top_k=6)
    text = found._repr_html_()
    assert header(text)[1:3] == ["loss", "first rival"]
    assert header(text)[-2:] == ["fifth rival", "other rivals"]
    first = f"{found.classes[0, 0]}: {found.losses[0, 0].item():.4g} ({100 * found.shares[0, 0]:.0f} %)"
    assert rows(text)[0][2] == first
    assert rows(text)[0][-1] == f"{(found.losses[0, 5] + found.remainder[0]).item():.4g}"
    assert rows(text)[1] == ["1", "0", "", "", "", "", "", "0"]


def test_pairs_and_all_loss():
    z, y = logits(50)
    found = triplets.pair_matrix(z, y)
    text = found._repr_html_()
    assert [row[:2] for row in rows(text)] == [[str(p.true), str(p.rival)] for p in found.largest(10)]
    assert f"of 42 pairs. All loss: {found.loss.sum().item():.4g} nats in 50 rows." in text


def test_an_assignment_says_whether_it_has_converged():
    scores = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    text = check(sinkhorn.assign(scores)._repr_html_())
    assert rows(text)[0][1] == "0: 1"
    assert "Converged, after" in text
    some = sinkhorn.assign(torch.stack([scores, torch.randn(2, 2)]), max_iterations=1, tolerance=None)
    text = check(some._repr_html_())
    assert [row[0] for row in rows(text)] == ["0, 0", "0, 1", "1, 0", "1, 1"]
    assert re.search(r"\d of 2 assignments converged, after at most 1 iteration;", text)
    none = sinkhorn.assign(torch.randn(0, 2, 2))
    assert "0 assignments." in check(none._repr_html_())
    check(sinkhorn.assign(torch.randn(4, 1))._repr_html_())


# Where there are no numbers to read


def is_text_of(found, text: str) -> bool:
    return text == f"<pre>{escape(repr(found))}</pre>"


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", BY_ROW)
def test_under_vmap_the_repr_is_shown(name):
    z, y = logits(4, 3)
    shown = []

    def one(z, y):
        found = BY_ROW[name](z, y)
        shown.append(is_text_of(found, found._repr_html_()))
        return found[0]

    torch.vmap(one)(z.movedim(1, -1), y)
    assert shown == [True]


def test_under_grad_the_repr_is_shown():
    z, y = logits(4)
    shown = []

    def loss(z):
        found = xent.row_statistics(z, y)
        shown.append((is_text_of(found, found._repr_html_()), found))
        return found.loss.sum()

    torch.func.grad(loss)(z)
    ((is_text, found),) = shown
    assert is_text
    assert found._repr_html_().startswith("<pre>RowStatistics(")  # tensors of a transform that has ended


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad], ids=["vmap", "grad"])
def test_results_of_before_are_shown_as_their_repr_under_a_transform(name, transform):
    found = EVERY[name](*logits(4))
    shown = []

    def f(x):
        shown.append(found._repr_html_())
        return x

    transform(f)(torch.ones(2) if transform is torch.vmap else torch.tensor(1.0))
    assert shown[0].startswith("<pre>")


def test_under_a_jvp_the_tangent_is_not_in_the_way():
    z, y = logits(4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, torch.ones_like(z))
        check(xent.row_statistics(dual, y)._repr_html_())


def test_tensors_without_data_are_shown_as_their_repr():
    z, y = logits(4)
    found = xent.row_statistics(z.to("meta"), y.to("meta"))
    assert is_text_of(found, found._repr_html_())
    with FakeTensorMode() as mode:
        fake = xent.row_statistics(mode.from_tensor(z), mode.from_tensor(y))
        assert is_text_of(fake, fake._repr_html_())
        real = triplets.Bounds(*[z] * 7)
        assert is_text_of(real, real._repr_html_())
    assert is_text_of(fake, fake._repr_html_())
    empty = [torch.empty(3, device="meta")] * 3
    for found in (
        triplets.Bounds(*[empty[0]] * 7),
        triplets.Attribution(*[empty[0]] * 5),
        triplets.PairMatrix(*empty),
        sinkhorn.Assignment(empty[0], (empty[0], empty[0]), *empty),
    ):
        assert is_text_of(found, found._repr_html_())


def test_subclasses_of_tensors_are_shown_as_their_repr():
    class Own(torch.Tensor):
        pass

    found = triplets.Bounds(*[torch.zeros(2).as_subclass(Own)] * 7)
    assert is_text_of(found, found._repr_html_())


def test_text_is_escaped():
    text = html.table("a < b", ["<i>"], [["<script>"], ["\x1b[31m"]], "&")
    assert "a &lt; b" in text
    assert "<i>" not in text
    assert "<script>" not in text
    assert "\x1b" not in text
    assert "<p>&amp;</p>" in text


def test_rows_are_numbered_in_constant_memory():
    values = torch.zeros(1).expand(1 << 40)
    text = html.table_by_row("Zeros, in nats", values.shape, {"zero": [0.0] * html.MOST})
    assert "The first 10 of 1,099,511,627,776 rows." in text


def test_importing_xent_reads_no_table_of_entities():
    code = "import sys, torch; before = set(sys.modules); import xent; print(*set(sys.modules) - before)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "html.entities" not in loaded.split()
