"""The short form of sums of rewards on a command line and in YAML."""

import pytest
import yaml

from svdd import UserError
from svdd.commands.registry import import_all
from svdd.commands.reward_sums import expand
from svdd.commands.score import score_parser
from svdd.rewards.weighted_sum import WeightedSum

import_all()

SUM = "svdd.rewards.weighted_sum.WeightedSum"


def of(name: str, **arguments):
    return {"class_path": name, **({"init_args": arguments} if arguments else {})}


def sum_of(rewards, weights):
    return of(SUM, rewards=rewards, weights=weights)


CASES = {
    "Aesthetic + 0.5 * CLIPScore": sum_of([of("Aesthetic"), of("CLIPScore")], [1.0, 0.5]),
    "-Brightness": sum_of([of("Brightness")], [-1.0]),
    "Brightness*2 - (Sharpness + Colorfulness)/4": sum_of(
        [of("Brightness"), of("Sharpness"), of("Colorfulness")], [2.0, -0.25, -0.25]
    ),
    "1/4 * Brightness - 2 * 3 * Sharpness": sum_of([of("Brightness"), of("Sharpness")], [0.25, -6.0]),
    "CLIPScore(pretrained=emoji-judge)": of("CLIPScore", pretrained="emoji-judge"),
    'CLIPScore("/a folder/x")': of("CLIPScore", pretrained="/a folder/x"),
    "Classifier(pretrained=some/dir, label=cat) - 1e-2 * my_rewards.Redness": sum_of(
        [of("Classifier", pretrained="some/dir", label="cat"), of("my_rewards.Redness")], [1.0, -0.01]
    ),
    "ZScored(Threshold(Brightness, at_least=.3) + Sharpness, mean=-2, std=1)": of(
        "ZScored",
        reward=sum_of([of("Threshold", reward="Brightness", at_least=0.3), of("Sharpness")], [1.0, 1.0]),
        mean=-2,
        std=1,
    ),
    "Brightness": "Brightness",
    "my_rewards.Redness": "my_rewards.Redness",
    "my-reward.yaml": "my-reward.yaml",
    "{class_path: Brightness}": "{class_path: Brightness}",
}


@pytest.mark.parametrize("text", CASES)
def test_short_forms(text):
    assert expand(text) == CASES[text]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Brightness + 0.5*CLIPScor", "character 18: unknown reward 'CLIPScor'.*did you mean 'CLIPScore'"),
        ("Brightness + 3", "character 14: '3' is a number without a reward"),
        ("Brightness * Sharpness", "character 1: 'Brightness . Sharpness' is no reward"),
        ("Brightness/0", "character 1: 'Brightness/0' is no reward"),
        ("Brightness + +", "cannot be read"),
        (
            "CLIPScore(pretraind=emoji)",
            "character 11: CLIPScore has no argument.*did you mean 'pretrained'",
        ),
        ("CLIPScore(pretrained=/abs)", "cannot be read at character 22.*put quotes around"),
        ("Similarity(clip", "in a list in brackets it needs quotes of its own"),
        ("Brightness(3)", "character 12: an argument without a name: Brightness takes no arguments"),
        ("math.fsum(3)", "character 11: an argument without a name: give math.fsum its arguments by name"),
        ("Threshold(Brightnes, at_least=1)", "character 11: unknown reward 'Brightnes'"),
        ("__import__('os').system('x')", "is no reward"),
        ("CLIPScore(**{'a': 1})", "expected name=value once"),
        ("(" * 5000 + "Brightness" + ")" * 4000, "cannot be read|nested too deeply"),
    ],
)
def test_mistakes_name_the_place(text, message):
    with pytest.raises(UserError, match=message):
        expand(text)


def test_the_parser_expands_before_it_checks(tmp_path):
    parser, words = score_parser(), ["--images", "x", "--reward=Brightness - 0.5 * Sharpness"]
    words += ["--eval_rewards=[Brightness + Sharpness, 'CLIPScore(emoji-judge)']", "--eval_rewards+=2*Colorfulness"]
    settings = parser.parse_args(words)
    recorded = yaml.safe_load(parser.dump(settings))
    assert recorded["reward"]["init_args"]["weights"] == [1.0, -0.5]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"reward": "Brightness - 0.5 * Sharpness"}))
    assert parser.parse_args(["--config", str(tmp_path / "config.yaml"), *words[:2], *words[3:]]) is not None
    made = parser.instantiate_classes(settings)
    assert isinstance(made.reward, WeightedSum)
    assert [each.name for each in made.eval_rewards] == ["WeightedSum", "CLIPScore-judge", "WeightedSum"]
    with pytest.raises(UserError, match=r"^reward: in 'Brightness \+ Sharpnes', character 14: unknown reward"):
        parser.parse_args([*words, "--reward", "Brightness + Sharpnes"])
