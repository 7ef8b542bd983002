"""`xent audit` on files of every format, its outputs, and what it says of bad input."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pandas
import pyarrow as pa
import pytest
from click.testing import CliRunner
from pyarrow import parquet

import xent
from running import run
from xent.cli import audit_job
from xent.cli.commands import cli

CLASSES = ["cat", "dog", "eel"]


def problem(n=400, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    z = 2 * rng.standard_normal((n, classes))
    y = (z + rng.gumbel(size=z.shape)).argmax(1)
    return z, y


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.fixture
def frame():
    z, y = problem()
    table = pandas.DataFrame(softmax(z), columns=CLASSES)
    table["label"] = np.array(CLASSES)[y]
    table["id"] = [f"r{i}" for i in range(len(y))]
    table["w"] = np.random.default_rng(1).integers(0, 3, len(y)).astype(float)
    return table


def audited(*arguments, code=0):
    return json.loads(run("audit", *arguments, "--json", code=code).stdout)


def expected(frame, **options):
    return xent.audit(
        frame[CLASSES].to_numpy(), target=frame["label"].to_numpy(), classes=CLASSES, **options
    ).to_dict()


def numbers_alike(one, other, rel, abs):
    assert one["measures"].keys() == other["measures"].keys()
    for name, value in other["measures"].items():
        found = one["measures"][name]
        assert found == value or found == pytest.approx(value, rel=rel, abs=abs), name


def same(one, other):
    numbers_alike(one, other, 1e-9, 1e-12)
    assert [row["name"] for row in one["per_class"]] == [row["name"] for row in other["per_class"]]


@pytest.mark.parametrize("form", ["csv", "parquet", "folder", "csv.gz", "npz", "npy"])
def test_every_format(frame, form, tmp_path):
    options = ["--label", "label", "--classes", ",".join(CLASSES)]
    if form == "csv":
        frame.to_csv("p.csv", index=False)
        data = "p.csv"
    elif form == "csv.gz":
        frame.to_csv("p.csv.gz", index=False)
        data = "p.csv.gz"
    elif form == "parquet":
        frame.to_parquet("p.parquet", row_group_size=70)
        data = "p.parquet"
    elif form == "folder":
        (tmp_path / "parts").mkdir()
        for i in range(3):
            frame[i * 150 : (i + 1) * 150].to_parquet(f"parts/{i}.parquet")
        data = "parts"
    elif form == "npz":
        np.savez("p.npz", X=frame[CLASSES].to_numpy(), y=frame["label"].to_numpy().astype(str))
        data, options = "p.npz", ["--label", "y", "--classes", ",".join(CLASSES)]
    else:
        np.save("p.npy", frame[CLASSES].to_numpy())
        np.save("y.npy", frame["label"].to_numpy().astype(str))
        data, options = "p.npy", ["--label", "y.npy", "--classes", ",".join(CLASSES)]
    same(audited(data, "--kind", "probs", *options), expected(frame))


def test_weights_ids_and_columns_by_prefix(frame):
    frame = frame.rename(columns={name: f"p_{name}" for name in CLASSES})
    frame.to_parquet("p.parquet")
    found = audited(
        "p.parquet", "--kind", "probs", "--label", "label", "--prefix", "p_", "--id", "id", "--weight", "w"
    )
    plain = frame.rename(columns={f"p_{name}": name for name in CLASSES})
    same(found, expected(plain, sample_weight=plain["w"].to_numpy()))
    worst = found["worst"][0]
    assert worst["id"] == f"r{worst['row'] - 1}"


@pytest.mark.parametrize("kind", ["logits", "log-probs"])
def test_other_kinds(frame, kind):
    values = np.log(frame[CLASSES].to_numpy())
    frame[CLASSES] = values + (3.0 if kind == "logits" else 0.0)
    frame.to_csv("p.csv", index=False)
    found = audited("p.csv", "--kind", kind, "--label", "label", "--classes", ",".join(CLASSES))
    frame[CLASSES] = softmax(values)
    same(found, expected(frame))


@pytest.mark.parametrize("kind", ["probs", "logits", "log-probs"])
def test_a_single_column(kind):
    z, y = problem(classes=2)
    p = softmax(z)[:, 1]
    values = {"probs": p, "logits": np.log(p) - np.log1p(-p), "log-probs": np.log(p)}[kind]
    pandas.DataFrame({"score": values, "label": np.array(["no", "yes"])[y]}).to_csv("p.csv", index=False)
    found = audited("p.csv", "--kind", kind, "--label", "label", "--positive", "yes")
    assert found["measures"]["log_loss"] == pytest.approx(xent.metrics.log_loss(y, p))
    assert [row["name"] for row in found["per_class"]] == ["no", "yes"]
    said = run("audit", "p.csv", "--kind", kind, "--label", "label", code=2).stderr
    assert "--positive" in said


def test_soft_labels(frame):
    mass = softmax(problem(seed=4)[0])
    for c, name in reversed(list(enumerate(CLASSES))):
        frame[f"t_{name}"] = mass[:, c]
    frame.drop(columns="label").to_csv("p.csv", index=False)
    found = audited("p.csv", "--kind", "probs", "--classes", ",".join(CLASSES), "--soft-prefix", "t_")
    p = frame[CLASSES].to_numpy()
    assert found["measures"]["log_loss"] == pytest.approx(-(mass * np.log(p)).sum(1).mean())
    assert found["measures"]["brier"] == pytest.approx(((p - mass) ** 2).sum(1).mean())
    assert sum(pair["loss"] for pair in found["pairs"]) == pytest.approx(found["measures"]["log_loss"])


def test_a_model_and_what_it_predicts_give_the_same():
    run("fit", "--demo", "--out", "demo", "--quiet")
    run("predict", "demo/model.safetensors", "demo/held-out.parquet", "-o", "p.parquet", "--keep", "digit")
    run("predict", "demo/model.safetensors", "demo/held-out.parquet", "-o", "p.csv", "--keep", "digit")
    of_model = audited("--model", "demo/model.safetensors", "demo/held-out.parquet", "--rows", "r.parquet")
    for file in ("p.parquet", "p.csv"):
        of_file = audited(file, "--kind", "probs", "--label", "digit")
        numbers_alike(of_file, of_model, 1e-6, 1e-9)
    rows = parquet.read_table("r.parquet")
    assert rows.num_rows == of_model["rows"]
    assert np.mean(rows["loss"]) == pytest.approx(of_model["measures"]["log_loss"])
    norms = np.array(rows["head_gradient_norm"])
    assert (norms >= 0).all()
    assert norms.max() > 0


def test_a_threshold_ends_with_3(frame):
    frame.to_csv("p.csv", index=False)
    options = ("--kind", "probs", "--label", "label", "--classes", ",".join(CLASSES))
    loss = expected(frame)["measures"]["log_loss"]
    assert run("audit", "p.csv", *options, "--fail-on", f"log_loss>{loss + 0.01}").exit_code == 0
    done = run("audit", "p.csv", *options, "--fail-on", "log_loss>0.01", "--fail-on", "accuracy<1", code=3)
    assert "log_loss is" in done.stderr
    assert "accuracy is" in done.stderr
    assert "top_2_accuracy" in run("audit", "p.csv", *options, "--fail-on", "loss>1", code=2).stderr
    assert (
        "second sweep"
        in run("audit", "p.csv", *options, "--fail-on", "suspects>1", "--sweeps", "1", code=2).stderr
    )
    run("audit", "p.csv", *options, "--fail-on", "log_loss=1", code=2)


def test_comparisons(frame):
    frame.to_csv("a.csv", index=False)
    other = frame.copy()
    other[CLASSES] = softmax(0.5 * np.log(frame[CLASSES].to_numpy()))
    other.to_csv("b.csv", index=False)
    other.sample(frac=1, random_state=0).to_csv("shuffled.csv", index=False)
    options = ("--kind", "probs", "--label", "label", "--classes", ",".join(CLASSES))
    a, b = expected(frame), expected(other)
    difference = a["measures"]["log_loss"] - b["measures"]["log_loss"]
    for file, more in (("b.csv", ()), ("b.csv", ("--id", "id")), ("shuffled.csv", ("--id", "id"))):
        found = audited("a.csv", *options, "--against", file, *more)["against"]
        assert found["difference"] == pytest.approx(difference)
        assert found["low"] < difference < found["high"]
        assert found["higher_rows"] + found["lower_rows"] == len(frame)
        assert {row["name"] for row in found["per_class"]} == {*CLASSES}
    assert (
        "match rows with --id" in run("audit", "a.csv", *options, "--against", "shuffled.csv", code=2).stderr
    )
    other[:100].to_csv("short.csv", index=False)
    for more in ((), ("--id", "id")):
        run("audit", "a.csv", *options, "--against", "short.csv", *more, code=2)
        run("audit", "short.csv", *options, "--against", "a.csv", *more, code=2)
    Path("b.json").write_text(run("audit", "b.csv", *options, "--json").stdout)
    found = audited("a.csv", *options, "--compare", "b.json")["compare"]
    assert found["differences"]["log_loss"] == pytest.approx(difference)
    assert "beside b.csv" in run("audit", "a.csv", *options, "--compare", "b.json").stdout
    run("audit", "a.csv", *options, "--compare", "a.csv", code=2)
    run("audit", "a.csv", *options, "--compare", "none.json", code=2)


def test_two_models_on_the_same_rows():
    for name, l2 in (("a", 1), ("b", 30)):
        run("fit", "--demo", "--out", name, "--l2", l2, "--quiet")
    losses = [
        audited("--model", f"{name}/model.safetensors", "a/held-out.parquet")["measures"]["log_loss"]
        for name in "ab"
    ]
    options = ("--model", "a/model.safetensors", "a/held-out.parquet", "--against", "b/model.safetensors")
    found = audited(*options)["against"]
    assert found["difference"] == pytest.approx(losses[0] - losses[1])
    assert found["source"] == "b/model.safetensors"
    assert "Against b/model.safetensors the loss is" in run("audit", *options).stdout


BAD = {
    "nan": ({"cat": {3: np.nan}}, "row 4, column 'cat'"),
    "inf": ({"dog": {3: np.inf}}, "row 4, column 'dog' holds inf"),
    "negative": ({"dog": {3: -0.5}}, "row 4, column 'dog' holds -0.5 where a probability"),
    "sum": ({"eel": {5: 0.0, 9: 0.0}}, "row 6 sums to"),
    "label": ({"label": {7: "fox"}}, "row 8, column 'label' holds 'fox', which is none of the classes"),
    "missing label": ({"label": {7: None}}, "row 8"),
    "text": ({"cat": {2: "much"}}, "'much'"),
}


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named(frame, name, suffix):
    changes, message = BAD[name]
    frame = frame.astype(dict.fromkeys(changes, object))
    for column, rows in changes.items():
        for row, value in rows.items():
            frame.loc[row, column] = value
    if suffix == "csv":
        frame.to_csv("p.csv", index=False)
    else:
        if name == "text":
            pytest.skip("a column of Parquet is of one type")
        frame.to_parquet("p.parquet")
    said = run(
        "audit", f"p.{suffix}", "--kind", "probs", "--label", "label", "--classes", ",".join(CLASSES), code=2
    ).stderr
    assert message in said or (name == "nan" and "is missing" in said), said
    assert said.count("\n") == 1
    if name == "sum":
        assert "2 rows are bad" in said


def test_columns_that_were_taken_are_named(frame):
    """A weight without --weight is taken for a class; rows then do not sum to 1."""
    frame.drop(columns="id").to_csv("p.csv", index=False)
    said = run("audit", "p.csv", "--kind", "probs", "--label", "label", code=2).stderr
    assert "taken are the columns 'cat', 'dog', 'eel', 'w': --classes or --prefix names others" in said


def test_a_probability_of_0_needs_a_word(frame):
    frame.loc[2, CLASSES] = [0.0, 1.0, 0.0]
    frame.loc[2, "label"] = "cat"
    frame.to_csv("p.csv", index=False)
    options = ("--kind", "probs", "--label", "label", "--classes", ",".join(CLASSES))
    said = run("audit", "p.csv", *options, code=2).stderr
    assert "row 3 has probability 0 for its class 'cat'" in said
    assert "--allow-zero" in said
    found = audited("p.csv", *options, "--allow-zero")
    assert found["measures"]["log_loss"] is None
    assert found["measures"]["infinite_rows"] == 1
    others = frame.drop(index=2)
    assert found["measures"]["finite_log_loss"] == pytest.approx(expected(others)["measures"]["log_loss"])
    assert [each["loss"] for each in found["per_class"]] == pytest.approx(
        [each["loss"] for each in expected(others)["per_class"]]
    )
    assert sum(cell["weight"] for cell in found["losses"]) == len(others)
    run("audit", "p.csv", *options, "--allow-zero", "--fail-on", "log_loss>5", code=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--label", "label"), "--kind"),
        (("--kind", "probs"), "--label"),
        (("--kind", "probs", "--label", "no"), "no column 'no'"),
        (("--kind", "probs", "--label", "label", "--classes", "cat,fox"), "'fox'"),
        (("--kind", "probs", "--label", "label", "--classes", "cat,cat"), "class 'cat'"),
        (("--kind", "probs", "--label", "label", "--prefix", "q_"), "'q_'"),
        (("--kind", "probs", "--label", "label", "--classes", "cat,dog", "--prefix", "p"), "give one"),
        (("--kind", "probs", "--label", "label", "--classes", "cat"), "--positive"),
        (("--kind", "probs", "--label", "label", "--positive", "cat"), "--positive"),
        (("--kind", "logits", "--label", "label", "--renormalize"), "--renormalize"),
        (("--kind", "probs", "--label", "label", "--id", "no"), "'no'"),
        (("--kind", "probs", "--label", "label", "--html", "p.txt"), ".html"),
        (("--kind", "probs", "--label", "label", "--rows", "p.csv"), "Parquet"),
        (
            (
                "--model",
                "p.csv",
            ),
            "p.csv",
        ),
        (("--model", "p.csv", "--kind", "probs"), "--kind"),
    ],
)
def test_options_that_do_not_fit(frame, options, message):
    frame[[*CLASSES, "label"]].to_csv("p.csv", index=False)
    said = run("audit", "p.csv", *options, code=2).stderr
    assert message in said, said
    assert said.count("\n") == 1


def test_two_thousand_mutated_files_end_in_one_line(frame):
    """Cells, lines and bytes of a file are changed at random: an answer, or one line and exit code 2."""
    frame = frame.head(12).round(4)
    frame[CLASSES] = frame[CLASSES].div(frame[CLASSES].sum(axis=1), axis=0)
    original = frame[[*CLASSES, "label"]].to_csv(index=False)
    random.seed(0)
    pieces = [
        "nan",
        "inf",
        "-inf",
        "",
        "1e999",
        "-1",
        "0",
        "1",
        '"',
        ",",
        "\n",
        "\x00",
        "é",
        "\x1b[31m",
        "cat",
        "2.5",
        " ",
    ]
    codes = set()
    for trial in range(2000):
        lines = original.split("\n")
        for _ in range(random.randint(1, 3)):
            row = random.randrange(len(lines))
            cells = lines[row].split(",")
            cells[random.randrange(len(cells))] = random.choice(pieces)
            lines[row] = ",".join(cells)
            if random.random() < 0.15:
                lines.insert(row, random.choice(["", ",,,", "a", lines[row]]))
        with open("p.csv", "w", encoding="utf-8") as file:
            file.write("\n".join(lines))
        kind = random.choice(["probs", "logits", "log-probs"])
        more = random.choice([(), ("--allow-zero",), ("--classes", "cat,dog,eel"), ("--sweeps", "1")])
        arguments = ["audit", "p.csv", "--kind", kind, "--label", "label", "--json", *more]
        done = CliRunner().invoke(cli, arguments)
        assert done.exit_code in (0, 2), (trial, done.output, done.exception, lines)
        codes.add(done.exit_code)
        if done.exit_code == 0:
            json.loads(done.stdout, parse_constant=pytest.fail)
        else:
            assert done.stderr.count("\n") == 1, done.stderr
            assert "\x1b" not in done.stderr
    assert codes == {0, 2}


def test_mutated_parquet_ends_in_one_line(frame):
    frame.head(50).to_parquet("p.parquet")
    whole = Path("p.parquet").read_bytes()
    random.seed(1)
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(random.randint(1, 8)):
            data[random.randrange(len(data))] = random.randrange(256)
        with open("q.parquet", "wb") as file:
            file.write(data)
        done = CliRunner().invoke(
            cli,
            [
                "audit",
                "q.parquet",
                "--kind",
                "probs",
                "--label",
                "label",
                "--classes",
                "cat,dog,eel",
                "--json",
            ],
        )
        assert done.exit_code in (0, 1, 2), (done.output, done.exception)
        assert done.exit_code == 0 or done.stderr.count("\n") == 1


def test_names_are_text_in_the_terminal_and_on_the_page():
    z, y = problem(50, 2)
    names = ["<script>alert(1)</script>", '\x1b[31mred & "quoted"']
    table = pa.table({**dict(zip(names, softmax(z).T, strict=True)), "label": np.array(names)[y]})
    parquet.write_table(table, "p.parquet")
    done = run("audit", "p.parquet", "--kind", "probs", "--label", "label", "--html", "p.html")
    assert "\x1b" not in done.stdout
    page = Path("p.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "\x1b" not in page
    assert len(page) < 1 << 20


def test_what_is_written_is_whole_or_not_there(frame):
    frame.loc[300, "cat"] = 7.0
    frame.to_csv("p.csv", index=False)
    run(
        "audit", "p.csv", "--kind", "probs", "--label", "label", "--classes", ",".join(CLASSES),
        "--rows", "r.parquet", "--html", "p.html", code=2,
    )  # fmt: skip
    assert sorted(os.listdir()) == ["p.csv"]


def test_standard_input_goes_by_its_name(frame):
    text = frame[[*CLASSES, "label"]].to_csv(index=False)
    done = run("audit", "-", "--kind", "probs", "--label", "label", input=text)
    assert done.stdout.startswith("standard input: 400 rows, 3 classes")


def test_thresholds_and_signs():
    assert audit_job.thresholds(["log_loss >= 1e-3"], 2) == [("log_loss", ">=", 1e-3)]


def test_columns_as_predict_writes_them(tmp_path, monkeypatch):
    """Kept columns of CSV are text in Parquet; there is no audit of the most probable classes alone."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    table = pandas.DataFrame(rng.standard_normal((60, 2)), columns=["u", "v"])
    table["kind"], table["wt"] = np.array(list("abc"))[rng.integers(3, size=60)], rng.random(60)
    table.to_csv("rows.csv", index=False)
    run("fit", "rows.csv", "--label", "kind", "--exclude", "wt", "--out", "m", "--quiet")
    for name, more in (("all.parquet", ()), ("top.csv", ("--top", "2"))):
        run("predict", "m/model.safetensors", "rows.csv", "-o", name, "--keep", "kind,wt", "--quiet", *more)
    found = audited("all.parquet", "--kind", "probs", "--label", "kind", "--weight", "wt")
    assert found["weight"] == pytest.approx(table["wt"].sum())
    said = run("audit", "top.csv", "--kind", "probs", "--label", "kind", code=2).stderr
    assert "predict without --top" in said


def test_ids_of_two_formats_meet_as_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = pandas.DataFrame({"a": [0.9, 0.2], "b": [0.1, 0.8], "id": [7, 8], "kind": ["a", "b"]})
    table.to_csv("a.csv", index=False)
    table[::-1].to_parquet("b.parquet")
    options = ("--kind", "probs", "--label", "kind", "--id", "id")
    assert audited("a.csv", *options, "--against", "b.parquet")["against"]["difference"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fail-on", "top_5_accuracy<0.9"), "there are 2 classes"),
        (("--compare", "."), "(--compare)"),
        (("--compare", "huge.json"), "(--compare)"),
        (("--id", "nope"), "(--id)"),
        (("--fail-on", "standard_error>0.5"), "no such measure"),
        (("--classes", "a,c"), "(--classes)"),
    ],
)
def test_what_cannot_be_is_said_in_the_audits_own_words(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("a,b,kind\n0.9,0.1,a\n")
    Path("huge.json").write_text('{"schema": "xent.audit", "version": Infinity, "measures": {}}')
    assert message in run("audit", "a.csv", "--kind", "probs", "--label", "kind", *options, code=2).stderr


def test_a_page_has_the_comparisons(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("a,b,kind\n0.9,0.1,a\n0.2,0.8,b\n")
    Path("b.csv").write_text("a,b,kind\n0.8,0.2,a\n0.2,0.8,b\n")
    options = ("--kind", "probs", "--label", "kind")
    Path("old.json").write_text(run("audit", "b.csv", *options, "--json").stdout)
    run("audit", "a.csv", *options, "--against", "b.csv", "--compare", "old.json", "--html", "p.html")
    page = Path("p.html").read_text()
    assert "Against b.csv" in page
    assert "it is higher in 0 rows and lower in 1 row" in page
    assert "Beside b.csv" in page
