"""Recipes: overrides, and one clear sentence for each mistake."""

import pathlib

import pytest

from ernie_jax.errors import UserError
from ernie_jax.train import load_recipe
from ernie_jax.train.sources import Source, read_sources

GOOD = """
model = "m"
data = "d"
sources = { english = 1 }
output = "o"
steps = 10
batch_size = 2
sequence_length = 8
learning_rate = 1e-3
"""


@pytest.fixture
def recipe(tmp_path) -> pathlib.Path:
    path = tmp_path / "recipe.toml"
    path.write_text(GOOD)
    return path


def test_overrides(recipe):
    loaded = load_recipe(recipe, ["steps=20", "learning_rate=1", "output=out/elsewhere", "sources={a=1, b=2}"])
    assert (loaded.steps, loaded.learning_rate, loaded.output) == (20, 1.0, "out/elsewhere")
    assert loaded.sources == {"a": 1, "b": 2}
    assert loaded.model == "m"
    loaded = load_recipe(recipe, ["sources.chat.train=chat.jsonl", "sources.chat.times=0.5", "sources.english=3"])
    assert loaded.sources == {"english": 3, "chat": {"train": "chat.jsonl", "times": 0.5}}
    loaded = load_recipe(recipe, ["sources={a={train='a.jsonl', times=0.5}}", "skip_bad_lines=true"])
    assert read_sources(loaded.sources) == [Source("a", "a.jsonl", None, 0.5)] and loaded.skip_bad_lines


def test_a_source_may_be_only_a_number(recipe):
    assert read_sources(load_recipe(recipe).sources) == [Source("english", "english.train.npy", "english.heldout.npy")]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stpes=3", "unknown recipe field stpes"),
        ("steps", "--set steps: expected name=value"),
        ("steps.more=3", "--set steps.more=3: steps is no table"),
        ("steps=many", "steps must be a whole number, found 'many'"),
        ("steps=true", "steps must be a whole number"),
        ("steps=0", "steps is 0"),
        ("model=3", "model must be a text, found 3"),
        ("checkpoint=c", "either the recipe field model"),
        ("frozen=router", "frozen must be a list of texts, found 'router'"),
        ("token_balanced=1", "token_balanced must be true or false, found 1"),
        ("schedule=linear", "schedule is 'linear': choose one of cosine, wsd"),
        ("accumulate=3", "batch_size is 2: it must be a multiple of accumulate, 3"),
        ("decay_steps=11", "decay_steps is 11"),
        ("learning_rate=-1.0", "learning_rate is -1.0"),
        ("learning_rate=nan", "learning_rate is nan"),
        ("warmup_steps=10", "warmup_steps is 10"),
        ("sources=english", "sources must be"),
        ("sources={}", "sources must name"),
        ("sources={a=0}", "sources.a: its times must be a number above 0, found 0"),
        ("sources={a=true}", "sources.a: its times must be a number above 0, found True"),
        ("sources={a={times=2}}", "sources.a needs field train, its file"),
        ("sources={a={train='x', path='y'}}", "sources.a has no field path; fields are train, heldout, times, format"),
        ("sources={a={train=3}}", "sources.a.train must be text, found 3"),
        ("sources={a={train='x', format='sharegpt'}}", "sources.a.format is 'sharegpt'; formats are .*alpaca"),
        ("long_examples=cut", "long_examples is 'cut': choose one of error, skip, truncate"),
        ("skip_bad_lines=1", "skip_bad_lines must be true or false, found 1"),
    ],
)
def test_bad_fields_are_named(recipe, override, message):
    with pytest.raises(UserError, match=message):
        load_recipe(recipe, [override])


def test_bad_files_are_named(recipe, tmp_path):
    with pytest.raises(UserError, match="absent.toml: no such file"):
        load_recipe(tmp_path / "absent.toml")
    recipe.write_text(GOOD.replace("steps = 10", ""))
    with pytest.raises(UserError, match="recipe.toml: missing recipe field steps"):
        load_recipe(recipe)
    recipe.write_text("steps = = 3")
    with pytest.raises(UserError, match="recipe.toml: not valid TOML"):
        load_recipe(recipe)


CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipes_that_come_with_the_project_are_valid(path):
    load_recipe(path)
