"""The difficulty score: learned from pairs, judged on prompts it hasn't seen, recommended only where it helps."""

from __future__ import annotations

from pathlib import Path
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.cli import run
from millicent.core.errors import ConfigError
from millicent.routing.difficulty import Pair, Scorer, features_of, train
from millicent.routing.evaluation import Report, evaluate, held_out_scores
from millicent.routing.pairs import read_contaminated, read_pairs, without

HARD = ["integral", "theorem", "prove", "eigenvalue", "manifold", "lemma"]
EASY = ["weather", "dinner", "colour", "greeting", "holiday", "music"]


def pairs(count: int, *, told: bool, seed: int = 0) -> list[Pair]:
    """The strong model helps with hard words; `told`: the words say which are hard."""
    random = Random(seed)
    made = []
    for number in range(count):
        hard = random.random() < 0.4
        words = HARD if (hard if told else random.random() < 0.5) else EASY
        strong = random.random() < 0.9
        weak = strong and not hard
        made.append(Pair(f"{number} " + " ".join(random.choices(words, k=8)), float(weak), float(strong)))
    return made


def judged(given_pairs: list[Pair], **options: float) -> Report:
    return evaluate(given_pairs, held_out_scores(given_pairs, 4, 0), resamples=60, **options)  # type: ignore[arg-type]


def test_a_score_that_tells_beats_the_control_and_is_recommended() -> None:
    report = judged(pairs(600, told=True), recover=0.8)
    assert report.gain.low > 0.2
    assert report.cpt50.value < 0.3 < report.control_cpt50.low
    assert report.recommended is not None
    assert report.recommended.recovered.low >= 0.8
    assert report.recommended.strong_share < 0.6
    assert 0 < report.recommended.threshold < 1


def test_a_score_that_tells_nothing_is_not_recommended() -> None:
    report = judged(pairs(400, told=False))
    assert report.recommended is None
    assert report.why_not is not None
    assert report.gain.low <= 0
    assert report.control_apgr.value == pytest.approx(0.5)


def test_curves_begin_at_the_weak_model_and_end_at_the_strong_one() -> None:
    report = judged(pairs(400, told=True))
    for curve in (report.curve, report.control):
        assert (curve[0].value, curve[-1].value) == (0.0, 1.0)
        assert all(each.low <= each.high for each in curve)
    # By definition: an oracle's curve rises at once, its APGR is near one.
    known = pairs(400, told=True)
    oracle = evaluate(known, [pair.strong - pair.weak for pair in known], resamples=50)
    assert oracle.apgr.value > 0.8


def test_the_same_pairs_give_the_same_score_also_from_a_file(tmp_path: Path) -> None:
    given_pairs = pairs(200, told=True)
    one, other = train(given_pairs), train(given_pairs)
    assert one == other
    one.save(tmp_path / "scores.json")
    loaded = Scorer.load(tmp_path / "scores.json")
    assert loaded.score("prove the theorem") == one.score("prove the theorem")
    assert loaded.score("prove this lemma theorem") > loaded.score("holiday music dinner")


@given(st.text())
def test_any_prompt_has_a_score_between_0_and_1(prompt: str) -> None:
    assert features_of(prompt)
    assert 0 <= Scorer(1, 1, 0.3, {1: 2.0, 5: -3.0}).score(prompt) <= 1


def test_duplicates_share_a_fold() -> None:
    """A prompt that stands there twice, with grades that only its own text tells, isn't scored by its twin."""
    noise = Random(1)
    texts = [f"{noise.getrandbits(60):x} {noise.getrandbits(60):x}" for _ in range(150)]
    # Every prompt is unlike the others: only its twin could tell its grade.
    twins = [Pair(text, float(number % 2), 1.0) for number, text in enumerate(texts) for _ in range(2)]
    assert abs(judged(twins).apgr.value - 0.5) < 0.12


def test_too_few_or_hopeless_pairs_are_refused() -> None:
    with pytest.raises(ConfigError, match="too few"):
        held_out_scores(pairs(20, told=True), 4, 0)
    with pytest.raises(ConfigError, match="nothing to learn"):
        train([Pair("a", 1.0, 1.0)] * 5)
    worse = [Pair(str(number), 1.0, 0.5) for number in range(120)]
    with pytest.raises(ConfigError, match="isn't above"):
        evaluate(worse, [0.0] * 120)
    with pytest.raises(ConfigError, match="no scores can be read"):
        Scorer.load(Path("nowhere.json"))


def written(path: Path, given_pairs: list[Pair]) -> Path:
    lines = [f'"{pair.prompt}",{bool(pair.weak)},{bool(pair.strong)}\n' for pair in given_pairs]
    path.write_text("prompt,weak,strong\n" + "".join(lines))
    return path


def test_pairs_are_read_and_contaminated_prompts_left_out(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text('prompt,a,b\n"two\nlines",True,False\nplain,0.25,1\n')
    found = read_pairs([path])
    assert found == [Pair("two\nlines", 1.0, 0.0), Pair("plain", 0.25, 1.0)]
    (tmp_path / "bad.jsonl").write_text('{"eval_prompt": "two lines"}\n{"prompt": "other"}\n')
    assert without(found, read_contaminated(tmp_path / "bad.jsonl")) == found[1:]


@pytest.mark.parametrize(
    ("line", "said"), [("a,1", r":2: has 2 columns"), ("a,1,2", r":2: the grade '2'"), ("a,x,1", r":2: the grade 'x'")]
)
def test_a_bad_line_is_named(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(f"prompt,a,b\n{line}\n")
    with pytest.raises(ConfigError, match=said):
        read_pairs([path])


def test_the_commands_train_and_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = str(written(tmp_path / "good.csv", pairs(300, told=True)))
    assert run(["router", "train", good, "--output", str(tmp_path / "scores.json")]) == 0
    assert Scorer.load(tmp_path / "scores.json").pairs == 300
    capsys.readouterr()
    options = ["--folds", "3", "--resamples", "50"]
    assert run(["router", "eval", good, *options, "--weak-usd", "0.001", "--strong-usd", "0.01"]) == 0
    said = capsys.readouterr().out
    assert "threshold = 0." in said
    assert "USD PER REQUEST" in said
    noise = str(written(tmp_path / "noise.csv", pairs(300, told=False)))
    assert run(["router", "eval", noise, *options, "--json"]) == 3
    told = msgspec.json.decode(capsys.readouterr().out)
    assert (told["recommended"], len(told["curve"])) == (None, 101)
    assert run(["router", "eval", good, "--weak-usd", "1"]) == 2
