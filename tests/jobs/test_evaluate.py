"""jobs/evaluate.py as a program: one JSON object on stdout, one error line, and no heavy imports."""

import csv
import hashlib
import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu

from jobs.evaluate import CaptionScoreSettings, evaluate_captions, main
from jobs.runtime.commandline import run
from mmcore.errors import InputError

ROOT = Path(__file__).parents[2]
SHARED_CAPTIONS = ROOT.parent / "shared" / "data" / "flickr8k" / "captions.txt"
WEIGHTS = [(1, 0, 0, 0), (0.5, 0.5, 0, 0), (0.333, 0.333, 0.334, 0), (0.25, 0.25, 0.25, 0.25)]
REFERENCES = {
    "a1.jpg": ["A dog runs on the grass .", "The brown dog , running .", "Dog .", "A dog", "A dog on grass"],
    "b2.jpg": ["Two men play football in a park .", "Two men play ."],
    "c3.jpg": ["A red ball", "A ball that is red", "Ball", "The red ball", "A ball", "One more than five"],
}
PREDICTIONS = {"a1.jpg": "a dog runs on the grass .", "b2.jpg": "Two men play football in the snow ."}


def evaluate(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The job in this process. test_commandline.py runs it as a program."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["evaluate.py", "captions", *arguments])
        patch.chdir(cwd)
        try:
            run(main)
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
    return subprocess.CompletedProcess(["evaluate.py", *arguments], code, out.getvalue(), err.getvalue())


def scored(*arguments: str, cwd: Path = ROOT) -> dict:
    done = evaluate(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # fails if stdout holds anything but one JSON value


def refused(*arguments: str) -> str:
    done = evaluate(*arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def nltk_scores(
    predictions: dict[str, str], references: dict[str, list[str]], *, most: int = 5, lowercase: bool = False
) -> dict[str, float]:
    def words(text: str) -> list[str]:
        return (text.lower() if lowercase else text).split()

    scores = corpus_bleu(
        [[words(text) for text in references[name][:most]] for name in predictions],
        [words(text) for text in predictions.values()],
        WEIGHTS,
        SmoothingFunction().method1,
    )
    return {f"bleu{order}": 100 * score for order, score in enumerate(scores, start=1)}


def bleu(result: dict) -> dict[str, float]:
    return {f"bleu{order}": result[f"bleu{order}"] for order in range(1, 5)}


def write_csv(path: Path, rows: list[tuple[str, str]]) -> str:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    return str(path)


@pytest.fixture
def references(tmp_path: Path) -> str:
    rows = [(name, text) for name, texts in REFERENCES.items() for text in texts]
    return write_csv(tmp_path / "captions.txt", rows)


@pytest.fixture
def predictions(tmp_path: Path) -> str:
    return write_csv(tmp_path / "predictions.csv", list(PREDICTIONS.items()))


@pytest.fixture
def storage(tmp_path: Path) -> str:
    folder = tmp_path / "my store" / "data" / "flickr8k"
    folder.mkdir(parents=True)
    table = pa.table(
        {
            "image_id": [name.removesuffix(".jpg") for name in REFERENCES],
            "file_name": list(REFERENCES),
            "image": [b"never read"] * 3,
            "captions": list(REFERENCES.values()),
            "split_report": ["validation", "validation", "train"],
        }
    )
    pq.write_table(table, folder / "part-00000.parquet")
    (folder / "_SUCCESS").write_text("{}")
    return str(tmp_path / "my store")


def test_scores_and_protocol(predictions: str, references: str) -> None:
    result = scored("--predictions", predictions, "--references", references)
    assert bleu(result) == pytest.approx(nltk_scores(PREDICTIONS, REFERENCES), rel=1e-12)
    assert result["num_images"] == 2
    protocol = result["protocol"]
    assert protocol["scorer"].startswith("nltk ")
    assert protocol["scorer"].endswith(" corpus_bleu")
    assert protocol["weights"]["bleu3"] == [0.333, 0.333, 0.334, 0.0]
    assert {key: value for key, value in protocol.items() if key not in ("scorer", "weights")} == {
        "name": "plain",
        "quotation_marks": "removed",
        "smoothing": "method1",
        "tokenization": "str.split()",
        "case": "kept",
        "references_per_image": {"asked": 5, "min": 2, "max": 5},
        "split": None,
        "dataset": None,
        "storage": None,
        "references": references,
        "predictions": predictions,
    }
    assert "run" not in result


def test_the_reports_protocol_scores_as_its_code_does(tmp_path: Path, predictions: str, storage: str) -> None:
    """Its code splits each line of captions.txt at the first comma and keeps quotation marks."""
    lines = ["image,caption", 'a1.jpg,"A dog , running ."', 'a1.jpg,A man with "a dog"', 'b2.jpg,"Two men , a ball ."']
    path = tmp_path / "quoted.txt"
    path.write_text("\n".join(lines) + "\n")
    raw: dict[str, list[str]] = {}
    for line in lines[1:]:
        name, caption = line.split(",", 1)
        raw.setdefault(name, []).append(caption.strip())
    result = scored("--predictions", predictions, "--references", str(path), "--protocol", "report")
    assert bleu(result) == pytest.approx(nltk_scores(PREDICTIONS, raw), rel=1e-12)
    assert (result["protocol"]["name"], result["protocol"]["quotation_marks"]) == ("report", "kept")
    assert bleu(result) != bleu(scored("--predictions", predictions, "--references", str(path)))
    for flags, reason in (
        (["--storage", storage], "needs --references"),
        (["--references", str(path), "--lowercase"], "case"),
    ):
        assert reason in refused("--predictions", predictions, "--protocol", "report", *flags)


def test_columns_that_are_not_read_are_named(tmp_path: Path, predictions: str) -> None:
    path = tmp_path / "captions.txt"
    rows = "".join(f"{name},{index},{text}\n" for name, texts in REFERENCES.items() for index, text in enumerate(texts))
    path.write_text("image_name,comment_number,comment\n" + rows)
    done = evaluate("--predictions", predictions, "--references", str(path))
    assert bleu(json.loads(done.stdout)) == pytest.approx(nltk_scores(PREDICTIONS, REFERENCES), rel=1e-12)
    assert "columns image_name and comment, comma between columns; not read: comment_number" in done.stderr


def test_the_scores_stand_in_a_line_below_the_result(predictions: str, references: str, storage: str) -> None:
    done = evaluate("--predictions", predictions, "--storage", storage, "--split", "split_report:validation")
    score = json.loads(done.stdout)
    told, where = done.stderr.splitlines()[-2:]
    numbers = f"BLEU-1 {score['bleu1']:.1f}, BLEU-4 {score['bleu4']:.1f} (of 100)"
    assert told == f"{numbers}, 2 images of split_report:validation"
    assert where.startswith("not saved: name the run that made the captions")
    assert "captions of 3 images, prepared dataset" in done.stderr
    run = Path(storage) / "runs" / "tiny" / "a"
    run.mkdir(parents=True)
    (run / "recipe.json").write_text("{}")
    done = evaluate("--predictions", predictions, "--references", references, "--run", str(run))
    assert done.stderr.splitlines()[-1] == f"{numbers}, 2 images"


def test_sixth_reference_is_not_used(tmp_path: Path, references: str) -> None:
    path = write_csv(tmp_path / "p.csv", [("c3.jpg", "One more than five")])
    result = scored("--predictions", path, "--references", references)
    assert bleu(result) == {"bleu1": 0.0, "bleu2": 0.0, "bleu3": 0.0, "bleu4": 0.0}
    assert result["protocol"]["references_per_image"]["max"] == 5


def test_one_reference_and_lower_case(predictions: str, references: str) -> None:
    result = scored(
        "--predictions", predictions, "--references", references, "--references-per-image", "1", "--lowercase"
    )
    expected = nltk_scores(PREDICTIONS, REFERENCES, most=1, lowercase=True)
    assert bleu(result) == pytest.approx(expected, rel=1e-12)
    assert expected["bleu1"] != nltk_scores(PREDICTIONS, REFERENCES)["bleu1"]
    assert result["protocol"]["references_per_image"] == {"asked": 1, "min": 1, "max": 1}
    assert result["protocol"]["case"] == "lowered"


def test_marks_of_punctuation_are_tokens_on_both_sides(tmp_path: Path) -> None:
    references = write_csv(tmp_path / "r.csv", [("a.jpg", "The dog 's two-tone ball , and a girl .")])
    path = write_csv(tmp_path / "p.csv", [("a.jpg", "The dog's two - tone ball, and a girl.")])
    result = scored("--predictions", path, "--references", references, "--tokens", "marks")
    assert bleu(result) == dict.fromkeys(("bleu1", "bleu2", "bleu3", "bleu4"), 100.0)
    assert result["hypothesis_length"] == result["reference_length"] == 13
    assert result["protocol"]["tokenization"] == "words and marks of punctuation"
    assert bleu(scored("--predictions", path, "--references", references))["bleu1"] < 60
    flags = ["--references", references, "--tokens", "marks", "--protocol", "report"]
    assert "--protocol report: splits at spaces; leave --tokens out" in refused("--predictions", path, *flags)


def test_all_forms_of_predictions_score_the_same(tmp_path: Path, predictions: str, references: str) -> None:
    jsonl = tmp_path / "p.jsonl"
    jsonl.write_text("".join(json.dumps({"image": name, "caption": text}) + "\n" for name, text in PREDICTIONS.items()))
    parts = tmp_path / "parts"
    parts.mkdir()
    for name, text in PREDICTIONS.items():
        table = pa.table({"image_id": [name.removesuffix(".jpg")], "file_name": [name], "caption": [text]})
        pq.write_table(table, parts / f"{name}.parquet")
    results = [
        bleu(evaluate_captions(CaptionScoreSettings(predictions=str(path), references=references)))
        for path in (predictions, jsonl, parts)
    ]
    assert results[0] == results[1] == results[2]


def test_split_must_be_complete(tmp_path: Path, predictions: str, references: str, storage: str) -> None:
    split = ["--split", "split_report:validation", "--storage", storage, "--references", references]
    result = scored("--predictions", predictions, *split)
    assert bleu(result) == pytest.approx(nltk_scores(PREDICTIONS, REFERENCES), rel=1e-12)
    assert result["protocol"]["split"] == "split_report:validation"
    assert result["protocol"]["dataset"] == "flickr8k"

    one = write_csv(tmp_path / "one.csv", [("a1.jpg", "A dog")])
    assert "1 of the split's 2 images have no prediction: 'b2'" in refused("--predictions", one, *split)
    all_three = write_csv(tmp_path / "all.csv", [*PREDICTIONS.items(), ("c3.jpg", "A ball")])
    assert "outside the split: 'c3'" in refused("--predictions", all_three, *split)


def test_split_image_without_references(tmp_path: Path, predictions: str, storage: str) -> None:
    few = write_csv(tmp_path / "few.txt", [("a1.jpg", "A dog"), ("c3.jpg", "A ball")])
    with pytest.raises(InputError, match=r"1 of the 2 images of split_report:validation have no references"):
        evaluate_captions(
            CaptionScoreSettings(
                predictions=predictions, references=few, split="split_report:validation", storage=storage
            )
        )


def test_references_of_the_prepared_dataset(predictions: str, references: str, storage: str) -> None:
    result = scored("--predictions", predictions, "--storage", storage)
    assert bleu(result) == bleu(scored("--predictions", predictions, "--references", references))
    assert result["protocol"]["references"].endswith("data/flickr8k/*.parquet")


@pytest.mark.parametrize("place", ["recipe.json", "model/recipe.json"])
def test_run_writes_its_scores(predictions: str, references: str, storage: str, place: str) -> None:
    run = Path(storage) / "runs" / "resnet_captioner" / "first"
    (run / place).parent.mkdir(parents=True)
    (run / place).write_text("{}")
    result = scored("--predictions", predictions, "--references", references, "--run", f"{run}/")
    written = Path(storage) / "scores" / "resnet_captioner" / "first.json"
    assert json.loads(written.read_text()) == result
    assert result["run"] == f"{run}/"
    assert result["predictions"] == predictions
    assert result["predictions_sha256"] == hashlib.sha256(Path(predictions).read_bytes()).hexdigest()


def test_scores_of_other_predictions_are_not_overwritten(predictions: str, references: str, storage: str) -> None:
    run = Path(storage) / "runs" / "resnet_captioner" / "first"
    run.mkdir(parents=True)
    (run / "recipe.json").write_text("{}")
    flags = ["--references", references, "--run", str(run)]
    scored("--predictions", predictions, *flags)
    scores = Path(storage) / "scores" / "resnet_captioner" / "first.json"
    before = scores.read_bytes()
    other = Path(predictions).with_name("other.csv")
    other.write_bytes(Path(predictions).read_bytes())
    settings = CaptionScoreSettings(str(other), references=references, run=str(run))
    message = re.escape(f"first.json: holds the scores of {predictions}, which those of {other} would replace")
    with pytest.raises(InputError, match=message):
        evaluate_captions(settings)
    assert scores.read_bytes() == before
    # The same path after a repeated training counts as the same run, however it is written.
    text = Path(predictions).read_text()
    Path(predictions).write_text(text.replace("dog", "cat"))
    again = scored("--predictions", Path(predictions).name, *flags, cwd=Path(predictions).parent)
    assert again["predictions"] == predictions
    assert json.loads(scores.read_text()) == again != json.loads(before)


def test_scores_of_a_sweep_are_not_overwritten_by_those_of_captions(
    predictions: str, references: str, storage: str
) -> None:
    run = Path(storage) / "runs" / "resnet_captioner" / "first"
    run.mkdir(parents=True)
    (run / "recipe.json").write_text("{}")
    scores = Path(storage) / "scores" / "resnet_captioner" / "first.json"
    scores.parent.mkdir(parents=True)
    scores.write_text('{"sweep": "/storage/sweep"}')
    with pytest.raises(InputError, match="holds the scores of something else, which those of"):
        evaluate_captions(CaptionScoreSettings(predictions, references=references, run=str(run)))
    assert scores.read_text() == '{"sweep": "/storage/sweep"}'


def test_run_named_from_within_its_storage(predictions: str, references: str, storage: str) -> None:
    run = Path(storage) / "runs" / "resnet_captioner" / "first"
    run.mkdir(parents=True)
    (run / "recipe.json").write_text("{}")
    scored(
        "--predictions", predictions, "--references", references, "--run", "runs/resnet_captioner/first",
        cwd=Path(storage),
    )  # fmt: skip
    assert (Path(storage) / "scores" / "resnet_captioner" / "first.json").exists()


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ("runs/resnet_captioner/nowhere", "no such run"),
        ("somewhere/else", "expected STORAGE/runs/RECIPE/NAME"),
        ("s3://runs/recipe/name", "expected STORAGE/runs/RECIPE/NAME"),
    ],
)
def test_wrong_run_writes_nothing(predictions: str, references: str, tmp_path: Path, run: str, expected: str) -> None:
    run = run if "://" in run else f"{tmp_path}/{run}"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=expected):
        evaluate_captions(CaptionScoreSettings(predictions=predictions, references=references, run=run))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "no references"),
        ({"references": "R", "split": "split_report:train"}, "needs --storage"),
        ({"references": "R", "dataset": "shapes"}, "needs --storage"),
        ({"references": "R", "storage": "S"}, "not read with --references"),
        ({"storage": "S", "split": "split_report"}, "expected COLUMN:NAME"),
        ({"storage": "S", "split": "split_reprot:train"}, "columns there: image_id, file_name, image, captions"),
        ({"storage": "S", "split": "split_report:val"}, "values there: 'train', 'validation'"),
        ({"storage": "S", "dataset": "shapes"}, "no prepared dataset"),
    ],
)
def test_settings_that_do_not_fit(
    predictions: str, references: str, storage: str, settings: dict[str, str], expected: str
) -> None:
    places = {"R": references, "S": storage}
    given = {key: places.get(value, value) for key, value in settings.items()}
    with pytest.raises(InputError, match=expected) as error:
        evaluate_captions(CaptionScoreSettings(predictions=predictions, **given))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_bad_input_is_one_line_and_exit_code_1(tmp_path: Path, predictions: str, references: str) -> None:
    unknown = write_csv(tmp_path / "unknown.csv", [(f"x{i}.jpg", "A dog") for i in range(9)])
    line = refused("--predictions", unknown, "--references", references)
    assert "9 predictions" in line
    assert "'x4.jpg' and 4 more" in line
    assert "no such file" in refused("--predictions", str(tmp_path / "none.csv"), "--references", references)


def test_wrong_flag_gets_a_suggestion_on_stderr(predictions: str, references: str) -> None:
    line = refused("--prediction", predictions, "--references", references)
    assert "--prediction: no such flag; did you mean --predictions? `python jobs/evaluate.py captions --help`" in line


@pytest.mark.process
def test_evaluate_imports_neither_torch_nor_ray() -> None:
    heavy = "torch", "ray", "transformers", "boto3", "pandas"
    code = f"import sys, jobs.evaluate; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_real_captions(tmp_path: Path) -> None:
    """The fifth caption of 200 images as the prediction. nltk with the csv module gives the same score."""
    if not SHARED_CAPTIONS.exists():
        pytest.skip("../shared/data/flickr8k is not there")
    texts: dict[str, list[str]] = {}
    with open(SHARED_CAPTIONS, encoding="utf-8", newline="") as file:
        for name, caption in list(csv.reader(file))[1:1001]:
            texts.setdefault(name, []).append(caption)
    rotated = dict(zip(texts, [captions[4] for captions in texts.values()][1:], strict=False))
    path = write_csv(tmp_path / "rotated.csv", list(rotated.items()))
    result = scored("--predictions", path, "--references", str(SHARED_CAPTIONS))
    assert result["num_images"] == 199
    assert bleu(result) == pytest.approx(nltk_scores(rotated, texts), rel=1e-12)
