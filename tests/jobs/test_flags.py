"""A flag without effect is refused, and one flag is enough to change the kind of a part. What a wrong flag and --help
show."""

import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import tyro

from jobs import generate, train_autoregressive, train_ldm, train_pixel_diffusion, train_resnet_captioner, train_vqvae
from jobs.export import ExportSettings
from jobs.runtime.job import Job, parse_job
from mmcore.errors import InputError
from mmcore.flags import Help, read_flags, read_settings

JOBS = {
    "autoregressive": train_autoregressive,
    "ldm": train_ldm,
    "pixel_diffusion": train_pixel_diffusion,
    "resnet_captioner": train_resnet_captioner,
    "vqvae": train_vqvae,
}
FROZEN = ["--text-encoder", "some/encoder"]


def parsed(name: str, *flags: str) -> Job:
    job: Any = JOBS[name]
    return parse_job(job.__file__, job.VARIANTS, "", list(flags))


@pytest.mark.parametrize(
    ("name", "flags", "needs"),
    [
        ("ldm", [*FROZEN, "--tokenizer", "some/tokenizer"], "--text-encoder scratch"),
        ("ldm", [*FROZEN, "--text-width", "64"], "--text-encoder scratch"),
        ("autoregressive", [*FROZEN, "--text-layers", "1"], "--text-encoder scratch"),
        ("pixel_diffusion", [*FROZEN, "--text-layers", "1"], "--text-encoder scratch"),
        ("pixel_diffusion", ["--variant", "report", "--text-heads", "2"], "--text-encoder scratch"),
        ("ldm", ["--beta-start", "0.001"], "--beta-schedule linear or scaled_linear"),
        ("ldm", ["--beta-end", "0.01"], "--beta-schedule linear or scaled_linear"),
        ("ldm", ["--variant", "best", "--unshifted-share", "0.5"], "--timestep-shift"),
        ("vqvae", ["--codebook-weight", "0.5"], "--codebook-ema-decay None"),
        ("vqvae", ["--perceptual-weight", "0.5"], "--perceptual MODEL"),
        ("vqvae", ["--adversarial-weight", "0.1"], "--discriminator-from-step STEP"),
        ("vqvae", ["--discriminator-channels", "32", "64"], "--discriminator-from-step STEP"),
        ("resnet_captioner", ["--step-epoch", "3"], "--schedule step"),
        ("resnet_captioner", ["--tokens", "pooled"], "a frozen --encoder"),
    ],
)
def test_a_flag_without_effect_is_refused(name: str, flags: list[str], needs: str) -> None:
    flag = [flag for flag in flags if flag.startswith("--")][-1]
    with pytest.raises(InputError, match=f"^{flag} .*: has no effect without {needs}; .*leave {flag} out$"):
        parsed(name, *flags)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("ldm", ["--text-width", "64", "--tokenizer", "some/tokenizer"]),
        ("ldm", ["--beta-schedule", "linear", "--beta-start", "0.001"]),
        ("ldm", ["--timestep-shift", "3", "--unshifted-share", "0.25"]),
        ("vqvae", ["--codebook-ema-decay", "None", "--revive-below", "0", "--codebook-weight", "0.5"]),
        ("vqvae", ["--perceptual", "some/model", "--perceptual-weight", "0.5"]),
        ("vqvae", ["--discriminator-from-step", "5", "--adversarial-weight", "0.1"]),
        ("resnet_captioner", ["--schedule", "step", "--step-epoch", "3"]),
    ],
)
def test_with_what_it_needs_it_is_taken(name: str, flags: list[str]) -> None:
    assert parsed(name, *flags).recipe != JOBS[name].VARIANTS["shapes"]


@pytest.mark.parametrize(
    ("name", "flags", "variant"),
    [
        (name, flags, variant)
        for name, flags in [
            *((name, []) for name in JOBS),
            ("autoregressive", FROZEN),
            ("ldm", FROZEN),
            ("pixel_diffusion", FROZEN),
            ("ldm", ["--text-encoder", "scratch"]),
            ("ldm", ["--beta-schedule", "squaredcos_cap_v2"]),
            ("ldm", ["--timestep-shift", "1"]),
            ("vqvae", ["--codebook-ema-decay", "0.99"]),
            ("vqvae", ["--discriminator-from-step", "None"]),
            ("vqvae", ["--perceptual", "None"]),
        ]
        for variant in JOBS[name].VARIANTS
    ],
)
def test_every_variant_takes_the_flag_that_changes_a_part(name: str, flags: list[str], variant: str) -> None:
    """Although sizes that the variant set for the other part then have no effect."""
    assert parsed(name, "--variant", variant, *flags).variant == variant


def test_without_a_variant_the_report_is_named_where_it_has_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    variants = train_ldm.VARIANTS
    for those, named in ((variants, True), ({"shapes": variants["shapes"]}, False)):
        parse_job(train_ldm.__file__, those, "", [])
        said = capsys.readouterr().out
        assert said.startswith("no --variant given: running `shapes`")
        assert ("--variant report" in said) == named


def test_a_flag_of_other_jobs_is_no_mistyped_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["jobs/export.py", "--dry-run"])
    with pytest.raises(InputError, match=r"^--dry-run: no such flag; `python jobs/export\.py --help` shows the flags$"):
        read_settings(ExportSettings, "", "python jobs/export.py")


def test_a_job_that_the_catalogue_does_not_name_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"^jobs/train_x\.py: mmcore/catalogue\.py has no recipe 'x'; add it to RECIPES"
    ):
        parse_job("jobs/train_x.py", train_ldm.VARIANTS, "", [])


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--batch-sise", "4"], r"--batch-sise: no such flag; did you mean --batch-size\? `.* --help` shows the flags"),
        (["--train.lr=3"], r"--train\.lr: no such flag; did you mean --lr\? .*"),
        (["--zzz"], r"--zzz: no such flag; `python jobs/train_ldm\.py --help` shows the flags"),
        # Nobody is sent to a flag that is refused afterwards.
        (["--strea"], r"--strea: no such flag; did you mean --storage\? `python .*"),
        (["--step-epoc", "3"], r"--step-epoc: no such flag; (did you mean --(?!step-epoch)\S+\? )?`python .*"),
        (["--schedule=step", "--step-epoc", "3"], r"--step-epoc: no such flag; did you mean --step-epoch\? .*"),
        (["--lr", "3", "4"], r"4: belongs to no flag; `python jobs/train_ldm\.py --help` shows the flags"),
        (["--batch_size", "x"], r"--batch-size 'x': give a whole number"),
        (["--lr", "x"], r"--lr 'x': give a number"),
        (["--max-steps", "x"], r"--max-steps 'x': give INT or None"),
        (["--optimizer", "sgd"], r"--optimizer sgd: choose one of 'adam', 'adamw'"),
        (["--lr"], r"--lr: its value is missing"),
    ],
)
def test_a_wrong_flag_is_one_line_with_its_mend(flags: list[str], line: str) -> None:
    with pytest.raises(InputError, match=f"^{line}$"):
        parsed("ldm", "--variant", "smoke", *flags)


@dataclass(frozen=True)
class Part:
    """Of a job."""

    depth: int = 1
    """How deep."""


@dataclass(frozen=True)
class Whole:
    """A job."""

    width: int
    """How wide, at the place where it is widest and after all that was said of it here. The next line is that of
    `width` alone; there are
    three lines of it."""
    part: Part = field(default_factory=Part)
    """Another group."""


def parse_whole(argv: list[str]) -> Whole:
    description = "All that it does, in a line that is longer than the terminal, in a docstring of several\nlines." * 2
    return tyro.cli(Whole, args=argv, prog="job", description=f"{description}\n\n    job --width 3\n")


def test_what_is_missing_is_named() -> None:
    with pytest.raises(InputError, match=r"^--width: needed; `job --help` says what for$"):
        read_flags(parse_whole, [], "job")
    assert read_flags(parse_whole, ["--width", "3"], "job") == Whole(3)


def test_the_help_has_no_ragged_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_flags(parse_whole, ["--help"], "job")
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "    job --width 3" in lines
    start = next(number for number, line in enumerate(lines) if line.startswith("  --width INT"))
    end = next(number for number, line in enumerate(lines) if line.endswith("(required)"))
    assert end - start >= 2
    assert min(map(len, lines[start:end])) > 65, lines[start : end + 1]
    assert text.count("--part.depth") == 2, "in the usage, too"


def test_a_help_without_its_groups_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_flags(parse_whole, ["--help"], "job", Help(hidden="The flags of the part begin with --part."))
    text = capsys.readouterr().out
    assert "--width" in text
    assert text.count("--part.depth") == 1
    assert text.endswith("\n\nThe flags of the part begin with --part.\n")


@dataclass(frozen=True)
class Optional:
    """A job."""

    first: int | None = None
    """How many."""
    unusual: bool = False
    """What nobody
    needs."""
    last: int | None = None
    """Of another kind, which the help tells in so many words that a line of the terminal does not hold them."""


def test_a_help_leaves_flags_out_and_names_whose_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Help(left_out=["--unusual"], titles={"--last": "of the last"}, ending="No more.")
    monkeypatch.setattr("sys.argv", ["job", "--help"])
    with pytest.raises(SystemExit):
        read_settings(Optional, "A job.\n\n    job --first 3\n\nNo more of it.", "job", shown)
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert "{None}" not in text
    assert "    job --first 3" in lines
    at = lines.index(" of the last")
    assert lines[at - 1] == ""
    first, last = lines[at - 2], lines[at + 2]
    assert first.startswith("  --first INT ")
    assert last.startswith("  --last INT ")
    assert first.index("How many.") == last.index("Of another kind"), "in one column"
    assert lines[-1] == "No more."
    assert "needs" not in " ".join(lines)
    monkeypatch.setattr("sys.argv", ["job", "--unusual"])
    assert read_settings(Optional, "", "job", shown).unusual, "taken nevertheless"


def test_the_help_of_a_sweep_says_whose_options_it_lists(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["generate.py", "--help"])
    with pytest.raises(SystemExit):
        generate.main()
    text = capsys.readouterr().out
    assert "\n    python jobs/generate.py --run URI --prompts FILE --out URI --guidance 3\n" in text
    assert text.index("--stall-timeout") < text.index(" options of a diffusion\n") < text.index("\n  --steps")
    assert "a Transformer over codes has --guidance, --guidance-end, --temperature" in " ".join(text.split())


@pytest.mark.parametrize(
    ("name", "flag", "shown"),
    [
        ("ldm", "--stream", False), ("resnet_captioner", "--stream", True),
        ("ldm", "--step-epoch", False), ("resnet_captioner", "--variant report --step-epoch", True),
        ("ldm", "--schedule step --step-epoch", True), ("ldm", "--schedule=step --step-epoch", True),
        ("resnet_captioner", "--variant report --schedule cosine --step-epoch", False),
    ],
)  # fmt: skip
def test_a_help_has_no_flag_that_cannot_matter(
    name: str, flag: str, shown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    *variant, flag = flag.split()
    with pytest.raises(SystemExit):
        parsed(name, *variant, "--help")
    assert (f"\n  {flag}" in capsys.readouterr().out) == shown
