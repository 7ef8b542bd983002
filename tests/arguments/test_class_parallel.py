"""A head whose classes are spread over real processes is the head in one piece."""

from __future__ import annotations

import pytest

from process_pool import ProcessPool
from table import OTHERS, ROWS, dtypes

SAMPLED = "the classes of a sample are those of one process"
SPREAD = [
    row
    for row in ROWS + OTHERS
    if row.loss in ("cross_entropy", "entropy", "log_prob", "log_probs") and not row.sampled
]


@pytest.fixture(scope="module", params=[2, 3], ids=lambda size: f"{size}-ranks")
def pools(request):
    made = []

    def pool() -> ProcessPool:
        if not made or not made[-1].serves:  # after a failure the next test has another
            made.append(ProcessPool(request.param))
        return made[-1]

    yield pool
    for one in made:
        one.close()


@pytest.mark.parametrize("row", [pytest.param(row.name, id=row.name) for row in SPREAD])
@dtypes()
def test_every_option_is_that_of_the_whole_head(pools, row, dtype):
    pools().run("law", row, dtype)


@dtypes()
def test_rows_say_the_same(pools, dtype):
    pools().run("rows", dtype)


CASES = [
    "uneven_shards",
    "tied_maxima",
    "extremes",
    "known_values",
    "buckets",
    "low_rank",
    "language_models",
    "which_tensors",
    "other_slices",
    "beside_a_graph",
    "learnt",
    "sparse_and_sure",
    "shapes",
]


@pytest.mark.parametrize("case", CASES)
def test_case(pools, case):
    pools().run(case)


def test_what_is_sent_does_not_grow_with_the_classes(pools):
    pools().run("traffic", 50, 16)


def test_blocks_of_rows_go_out_one_after_the_other(pools):
    pools().run("blocks", 300, 16)


ALONE = ("class weights", "bias", "probabilities", "shape", "type")  # what one rank finds by itself


def test_ranks_that_disagree_say_so_on_every_rank(pools):
    every = pools().run("disagreements")
    last = len(every) - 1
    for rank, said in enumerate(every):
        for name, what in said.items():
            if name.startswith("agreement") or name == "another type of number":
                assert what == "nothing", (name, what)
            elif name not in ALONE:
                assert what.startswith("RanksDisagree: the ranks of the group disagree about"), (name, what)
                assert "its own slice of the classes" in what
                assert what == every[0][name]
            elif rank == last:
                assert what.startswith(("ValueError", "TypeError")), (name, what)
            else:
                assert what == f"RanksDisagree: rank {last} of the group has an error: {every[last][name]}"
        assert "rows: (4,) on rank 0, (5,) on rank" in said["rows"]
        assert "label_smoothing: 0 on rank 0" in said["smoothing later"]
        assert "denominator: 1 on rank 0, 2 on rank" in said["denominator later"]


def test_what_is_not_taken_is_named(pools):
    for said in pools().run("refusals"):
        assert said["label"].startswith("IndexError: target")
        assert "classes does not go with group" in said["classes"]
        assert "log_q does not go with group" in said["log_q"]
        assert said["group"].startswith("TypeError: group must be a torch.distributed process group")
        for name in ("vmap", "hessian"):
            assert "take group= out of vmap" in said[name]
        assert "reduction is 'sum'" in said["sum over data"]
        assert "drop denominator" in said["denominator"]
        assert "have nothing to say of tensors without data" in said["meta"]
        assert said["graph"] != "nothing"


def test_a_classifier_placed_by_classes_is_used_as_it_is(pools):
    for said in pools().run("dtensors"):
        for name in ("columns", "replicated", "rows"):
            assert said[name].startswith("ValueError"), (name, said[name])
            assert "redistribute(placements=[" in said[name]
        assert "DTensor.from_local(linear_weight.to_local(), mesh['classes'], [Shard(0)])" in said["two"]
        for name in ("elsewhere", "curvature"):
            assert "is a DTensor, which is not taken here" in said[name]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_the_mean_over_all_ranks_rows(pools, kind):
    pools().run("rows_spread", kind)


def test_a_layer_that_fsdp2_shards_by_itself(pools):
    for said in pools().run("sharded_layers"):
        assert "apply fully_shard to the loss module too" in said


def test_rows_and_classes_on_a_mesh_of_two_dimensions(pools):
    pool = pools()
    for shape in ((1, pool.size), (pool.size, 1)):
        pool.run("both", shape)


@pytest.mark.slow
def test_rows_and_classes_each_over_two_ranks():
    pool = ProcessPool(4)
    pool.run("both", (2, 2))
    pool.run("sharded_both_ways")
    pool.close()
