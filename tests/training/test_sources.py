"""Names of sources and their weights."""

import pytest

from quietstar.training.sources import with_weights


@pytest.mark.parametrize(
    ("sources", "names", "weights"),
    [
        (["a.txt"], ["a.txt"], None),
        (["a.txt:0.7", "b/*.jsonl:3"], ["a.txt", "b/*.jsonl"], [0.7, 3]),
        (["a:1e-1", "group/name:2"], ["a", "group/name"], [0.1, 2]),
        ([r"C:\text\a.txt", r"D:\b.txt"], [r"C:\text\a.txt", r"D:\b.txt"], None),
        ([r"C:\text\a.txt:0.5", "b:0.5"], [r"C:\text\a.txt", "b"], [0.5, 0.5]),
        (["hf://datasets/a", "b:main"], ["hf://datasets/a", "b:main"], None),
        ([":1"], [":1"], None),
    ],
)
def test_weights_stand_behind_a_colon(sources, names, weights):
    assert with_weights("data", sources) == (names, weights)


def test_a_file_whose_name_ends_like_a_weight(tmp_path):
    (tmp_path / "a:1").touch()
    assert with_weights("data", [f"{tmp_path}/a:1"]) == ([f"{tmp_path}/a:1"], None)
    assert with_weights("data", [f"{tmp_path}/a:1:2"]) == ([f"{tmp_path}/a:1"], [2])


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["a:0.5", "b"], r"data must have weights for all sources or for none, got a:0\.5 b"),
        (["a:0", "b:1"], r"the weight of a in data must be > 0, got 0\.0"),
        (["a:-1", "b:1"], r"the weight of a in data must be > 0, got -1\.0"),
        (["a:1", "b:inf"], r"the weight of b in data must be finite, got inf"),
        (["a:nan", "b:1"], r"the weight of a in data must be > 0, got nan"),
    ],
)
def test_weights_that_make_no_sense(sources, message):
    with pytest.raises(ValueError, match=message):
        with_weights("data", sources)
