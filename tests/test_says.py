"""The helper of the tests for what errors name: it must be able to say no."""

import pytest
from says import holds, lines_with, refused, says, suggests

from wmjax.errors import UserError


@pytest.mark.parametrize(
    ("text", "token", "wanted"),
    [
        ("data.frames=17: give 16.", "data.frames=17", True),
        ("data.frames=17: give 16.", 16, True),
        ("--config.data.frames=17", "data.frames=17", True),
        ("data.frames=17.5", "data.frames=17", False),
        ("data.frames=171", "data.frames=17", False),
        ("metadata.frames=17", "data.frames=17", False),
        ("found 160, 1.16, 16.5 and 16,000 in pytest-16/", 16, False),
        ("found -1", "1", False),
        ("workers=-1, or 0", "-1", True),
        ("step 4, then", 4, True),
        ("target_encoder", "encoder", False),
        ("--config.seeds", "--config.seed", False),
        ("'a/b.mp4'", "b.mp4", True),
        ("'a/b.mp4.part4'", "b.mp4", True),
        ("seed=VALUE", "seed=", True),
    ],
)
def test_a_token_is_held_by_itself(text, token, wanted):
    assert holds(text, token) is wanted


def test_what_is_not_said_fails():
    says("a=1\nwanted 2", "a=1", 2, lines=2)
    says("0 of 4 devices, of 4", 0, 4, 4)
    with pytest.raises(AssertionError):
        says("a=1", "a=1", 2)
    with pytest.raises(AssertionError):
        says("0 of 4 devices", 0, 4, 4)
    with pytest.raises(AssertionError):
        says("a=1\n2\n3", "a=1", lines=2)
    with pytest.raises(AssertionError):
        says(" ", lines=2)


def test_a_refusal_is_of_the_right_kind_and_text():
    with refused("a=1") as told:
        raise UserError("a=1")
    assert str(told.value) == "a=1"
    with pytest.raises(AssertionError), refused("a=1"):
        raise UserError("a=2")
    with pytest.raises(AssertionError), refused("a=1"):
        raise UserError("a=1\n\n\n.")
    with pytest.raises(ValueError, match="a=1"), refused("a=1"):
        raise ValueError("a=1")


def test_a_suggestion_is_told_from_a_list():
    choices = ("cosine", "linear")
    suggests("cosinus (cosine?): cosine, linear", "cosine", ["linear"])
    suggests("cosinus: cosine?", "cosine", ["linear"])
    for text in ("cosinus: cosine, linear", "cosinus (linear?): cosine, linear", "cosinus"):
        with pytest.raises(AssertionError):
            suggests(text, "cosine", choices[1:])


def test_lines_hold_all_tokens_together():
    assert lines_with("step 3\nsaved\nsaved 3 in /x", 3, "/x") == ["saved 3 in /x"]
    assert lines_with("saved 30 in /x\n3", 3, "/x") == []
