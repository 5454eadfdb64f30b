"""The shelf, the training loop and the scores: what is stored is what is loaded, and a run that was killed goes on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import nn

from paperlab import zoo
from paperlab.zoo import shelf
from paperlab.zoo.__main__ import main
from paperlab.zoo.recipes import RECIPES
from paperlab.zoo.scores import mean, share
from paperlab.zoo.training import Recipe, train


class Squares:
    """A task whose solution is known: bring y = W x to y = 3 x."""

    seen_per_step = 8

    def __init__(self, device):
        self.device = device

    def loss(self, model, step):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).to(self.device)
        return (model(x).float() - 3 * x).square().mean()


def recipe(steps=200, **changes):
    build = lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 4, bias=False)))  # noqa: E731  inside a block: Muon's
    return Recipe("squares", build, Squares, lambda model, _: {"seen": mean([1.0, 2.0])}, steps=steps, **changes)


class Silent:
    """A stream that is no terminal."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return False


def test_training_solves_its_task_and_keeps_a_log(tmp_path):
    model, log = train(recipe(800), tmp_path, stream=Silent())
    torch.testing.assert_close(model[0][0].weight, 3 * torch.eye(4), atol=0.05, rtol=0)
    assert log["steps"] == 800
    assert log["seen"] == 6400
    assert not model.training
    assert json.loads((tmp_path / "log.json").read_text())["losses"][-1][0] == 800


def test_two_runs_are_equal_and_an_interrupted_one_ends_with_the_same_weights(tmp_path):
    whole, _ = train(recipe(), tmp_path / "a", stream=Silent())
    again, _ = train(recipe(), tmp_path / "b", stream=Silent())
    train(recipe(), tmp_path / "c", steps=70, stream=Silent())
    resumed, log = train(recipe(), tmp_path / "c", stream=Silent())
    assert torch.equal(whole[0][0].weight, again[0][0].weight)
    assert torch.equal(whole[0][0].weight, resumed[0][0].weight)
    assert log["steps"] == 200


def test_what_is_adopted_from_the_base_is_there_before_the_first_step(tmp_path):
    class Adopting(nn.Sequential):
        def adopt(self, other):
            self[0][0].load_state_dict(other.state_dict())
            self[0].requires_grad_(False)

    build = lambda: Adopting(nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4)))  # noqa: E731
    base = nn.Linear(4, 4)
    taught = Recipe("adopted", build, Squares, lambda model, _: {}, steps=20, base="base")
    model, _ = train(taught, tmp_path, base=base, stream=Silent())
    assert torch.equal(model[0][0].weight, base.weight)  # and it is not trained


def test_the_rate_rises_holds_and_falls_to_nothing():
    r = recipe(1000, warmup=100, decay_from=0.5)
    assert r.rate(0) == pytest.approx(0.01)
    assert r.rate(99) == r.rate(400) == 1.0
    assert r.rate(750) == pytest.approx(0.5)
    assert r.rate(1000) == 0.0


def test_snapshots_are_evenly_spaced_in_the_logarithm(tmp_path):
    train(recipe(100), tmp_path, snapshots=4, stream=Silent())
    steps = sorted(int(path.stem.split("-")[1]) for path in tmp_path.glob("step-*.pt"))
    assert steps == [3, 10, 32, 100]


def test_progress_says_how_far_it_is_and_how_long_it_takes(tmp_path):
    stream = Silent()
    train(recipe(), tmp_path, stream=stream)
    assert "squares 200/200  loss" in stream.text
    assert "0 min left" in stream.text


def test_a_loss_that_is_not_finite_is_an_error(tmp_path):
    with pytest.raises(FloatingPointError, match="squares: the loss is"):
        train(recipe(matrix_lr=1e30), tmp_path, stream=Silent())


@pytest.fixture
def shelf_of_one(tmp_path, monkeypatch):
    """A shelf with one tiny model on it."""
    monkeypatch.setattr(shelf, "WEIGHTS", tmp_path)
    monkeypatch.setitem(RECIPES, "squares", recipe(20))
    model, log = train(recipe(20), tmp_path / "run", stream=Silent())
    shelf.put("squares", model, log)
    return model


def test_what_is_loaded_is_what_was_put_in_half_precision(shelf_of_one):
    model = zoo.load("squares", dtype=torch.float64)
    assert torch.equal(model[0][0].weight, shelf_of_one[0][0].weight.half().double())
    assert not model.training
    assert zoo.names() == ["squares"]


def test_loading_does_not_shift_the_callers_random_numbers(shelf_of_one):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    zoo.load("squares")
    assert torch.equal(torch.rand(3), expected)


def test_a_damaged_or_missing_file_is_an_error_that_says_what_to_do(shelf_of_one, tmp_path):
    path = tmp_path / "squares.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(zoo.ZooError, match="damaged.*restore it"):
        zoo.load("squares")
    path.unlink()
    with pytest.raises(zoo.ZooError, match="missing: restore it"):
        zoo.load("squares")
    (tmp_path / "squares.json").unlink()
    with pytest.raises(zoo.ZooError, match="python -m paperlab.zoo train squares"):
        zoo.load("squares")


def test_an_unknown_name_lists_the_known(shelf_of_one):
    with pytest.raises(ValueError, match="name must be one of .*'pocket-resnet'"):
        zoo.load("pocket-elephant")


def test_describe_shows_the_scores_beside_their_bars(shelf_of_one):
    card = zoo.card("squares")
    card["scores"] = {"being square": share([True] * 9 + [False], bar=0.8)}
    shelf.write_card(card)
    text = zoo.describe()
    assert "squares: 0.00 M parameters" in text
    assert "being square" in text
    assert "0.900" in text
    assert "bar 0.8" in text


@pytest.mark.parametrize("name", zoo.names())
def test_every_model_on_the_shelf_loads_and_has_scores(name):
    model, card = zoo.load(name), zoo.card(name)
    assert sum(p.numel() for p in model.parameters()) == card["parameters"]
    assert card["scores"]
    assert all(score["low"] <= score["value"] <= score["high"] for score in card["scores"].values())


def test_all_weights_together_stay_within_their_budget():
    assert sum(path.stat().st_size for path in shelf.WEIGHTS.glob("*.safetensors")) < 40e6


@pytest.mark.parametrize("name", {recipe.task: name for name, recipe in RECIPES.items()}.values())  # one a task
def test_the_first_steps_of_a_recipe_repeat_exactly(name, tmp_path):
    base = RECIPES[name].base and shelf.load(RECIPES[name].base)
    few = [
        train(RECIPES[name], tmp_path / str(k), base=base, steps=3, stream=Silent())[0].state_dict() for k in range(2)
    ]
    assert all(torch.equal(few[0][key], few[1][key]) for key in few[0])


def test_wilsons_interval_covers_as_often_as_it_says():
    # The exact coverage at n = 50, by summing the binomial distribution over the intervals that contain the truth.
    for truth in (0.5, 0.8, 0.95):
        found = [share([True] * k + [False] * (50 - k)) for k in range(51)]
        covered = sum(binom.pmf(k, 50, truth) for k, s in enumerate(found) if s["low"] <= truth <= s["high"])
        assert 0.92 < covered < 0.99


def test_mean_is_students():
    found = mean([1.0, 2.0, 3.0], bar=2.0)
    half = 4.302653 / np.sqrt(3)  # t quantile of 2 degrees of freedom; the standard deviation is 1
    assert found == {"value": 2.0, "low": round(2 - half, 4), "high": round(2 + half, 4), "n": 3, "bar": 2.0}


def test_the_command_line(shelf_of_one, capsys, tmp_path):
    assert main(["describe"]) == 0
    assert "squares" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main(["train", "elephant"])
    assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: share([]), "hits"),
        (lambda: mean([1.0]), "values"),
        (lambda: train(recipe(), Path("unused"), steps=0), "steps"),
        (lambda: train(recipe(), Path("unused"), snapshots=-1), "snapshots"),
        (lambda: train(recipe(), Path("unused"), base=nn.Linear(1, 1)), "base must be None"),
        (lambda: train(recipe(base="other"), Path("unused")), "base must be other"),
    ],
)
def test_bad_input_names_the_argument(call, name):
    with pytest.raises(ValueError, match=name):
        call()
