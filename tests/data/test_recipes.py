import pytest

from fastrssm.data.recipes import RECIPES, parse
from fastrssm.envs import TASKS


def test_names():
    random, buffer, expert = map(
        parse, ("walker-random", "cheetah-run-buffer", "walker-run-expert")
    )
    assert (random.kind, random.episodes) == ("random", 1000)
    assert (buffer.env_id, buffer.kind, buffer.episodes) == ("cheetah-run", "tape", 500)
    assert (expert.env_id, expert.kind, expert.episodes) == ("walker-run", "expert", 100)


def test_every_recipe_has_its_environment():
    for name, recipe in RECIPES.items():
        assert recipe.env_id in TASKS, name
        assert bool(recipe.recorded) == (recipe.kind == "tape"), name
        # an expert without a constant could not be scored
        assert recipe.kind == "random" or TASKS[recipe.env_id].expert_return, name


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="called 'walker-fly', expected one of walker-random, "):
        parse("walker-fly")
