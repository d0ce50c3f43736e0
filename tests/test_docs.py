"""The documents: the program that a command starts parses it, quick ones run, names and links lead somewhere."""

import base64
import importlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import click
import pytest
import ray
import tiny
import tyro
from pydantic import ValidationError

from jobs.evaluate import CaptionScoreSettings, check_settings
from jobs.prepare import PrepareSettings
from jobs.runtime.job import Job, parse_job, parse_staged_job
from mmcore.captioners.search_options import SearchOptions
from mmcore.catalogue import RECIPES
from mmcore.errors import InputError
from mmcore.generators.autoregressive_options import AutoregressiveOptions
from mmcore.generators.diffusion_options import DiffusionOptions
from mmcore.generators.infinity_options import InfinityOptions
from mmcore.storage import Storage

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")))
}
PACKAGES = ("jobs", "mmcore", "serve")
FENCE = re.compile(r"^(`{3,4})(\w*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:python|make|pytest) [^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
RUN = re.compile(r"runs/(\w+)/([\w.-]+)$")
# Lines of a shell that start nothing of ours.
SHELL = {"[", "export", "for", "(umask", "source"}
# Its commands are of a recipe that is not here: tests/test_contributing.py follows them.
WORKED_EXAMPLE = "CONTRIBUTING.md"
NEW_FILES = {"jobs/train_recurrent_captioner.py", "mmcore/captioners/recurrent.py", "tests/mmcore/test_recurrent.py"}
# Where Ray takes a submitted job.
RAY_JOBS = Path(ray.__file__).parent / "dashboard" / "modules" / "job" / "job_head.py"
SERVED_AT = "http://127.0.0.1:8000"
# Made by `make demo`.
DEMO = {("resnet_captioner", "default"), ("vqvae", "default"), ("autoregressive", "default")}


class Parsed(BaseException):
    """Raised in place of a job's work; no job takes it for a failure of its own."""


def without_environment(words: list[str]) -> list[str]:
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


def without_redirection(words: list[str]) -> list[str]:
    return words[: words.index(">")] if ">" in words else words


def commands(name: str) -> Iterator[list[str]]:
    """The words of each command of a text, in blocks and in sentences."""
    for _fence, _language, block in FENCE.findall(TEXTS[name]):
        if _language == "bash":
            for line in block.replace("\\\n", " ").splitlines():
                yield without_redirection(without_environment(shlex.split(line, comments=True)))
    for command in INLINE.findall(FENCE.sub("", TEXTS[name])):
        yield shlex.split(" ".join(command.split()))


ALL = [(name, words) for name in TEXTS if name != WORKED_EXAMPLE for words in commands(name)]


def id_of(value: object) -> str:
    return " ".join(value)[:100] if isinstance(value, list) else str(value)


def module_of(file: str) -> ModuleType:
    assert (ROOT / file).is_file(), f"{file} is not there"
    return importlib.import_module(file.removesuffix(".py").replace("/", "."))


def opened(kind: str, run: str, **_folders: object) -> Any:
    """The options of a run by its recipe, as if the run were there; of any other name, a diffusion's."""
    found = RUN.search(run)
    if found and RECIPES[found[1]].kind != kind:
        raise InputError(f"--run {run}: no {kind}")
    if kind == "captioner":
        return SimpleNamespace(options=SearchOptions())
    options = {"autoregressive": AutoregressiveOptions(), "infinity": InfinityOptions()}
    return SimpleNamespace(options=options.get(found[1] if found else "", DiffusionOptions()))


def without_runs(patch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """Let a job read its flags where no run is."""
    for kind in ("captioner", "generator"):
        patch.setattr(module, f"open_{kind}", partial(opened, kind), raising=False)


def parse(file: str, argv: list[str]) -> Any:
    """What a job makes of its flags; it does not begin its work. Raises SystemExit and InputError as the job does."""
    module = module_of(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [file, *argv])
        without_runs(patch, module)
        if Path(file).name.startswith("train_"):
            if (stages := getattr(module, "STAGES", None)) is not None:
                return parse_staged_job(file, stages, "", argv)
            return parse_job(file, module.VARIANTS, "", argv)

        def parsed_by(cli: Callable[..., Any]) -> Callable[..., Any]:
            def stop(*args: Any, **keywords: Any) -> None:
                raise Parsed(cli(*args, **keywords))

            return stop

        patch.setattr(tyro, "cli", parsed_by(tyro.cli))
        patch.setattr(tyro.extras, "subcommand_cli_from_dict", parsed_by(tyro.extras.subcommand_cli_from_dict))
        with pytest.raises(Parsed) as caught:
            module.main()
    (settings,) = caught.value.args
    if isinstance(settings, PrepareSettings):
        settings.check()
    if isinstance(settings, CaptionScoreSettings):
        check_settings(settings)
    return settings


def parse_click(command: click.Command, words: list[str]) -> None:
    """The flags of Ray's own command lines; a file that they name is there."""
    while isinstance(command, click.Group):
        command, words = command.commands[words[0]], words[1:]
    ours = words.index("--") if "--" in words else len(words)
    command.make_context(command.name, words[:])
    for word in words[:ours]:
        assert not word.endswith(".yaml") or (ROOT / word).is_file(), f"{word} is not there"
    if ours < len(words):
        check(words[ours + 1 :])


def parse_service(words: list[str]) -> None:
    from serve.app import Args
    from serve.control import _parse
    from serve.sources import named

    arguments = _parse([word for word in words if word not in ("start", "serve.app:build")])
    args = Args.model_validate({name: value for name, value in arguments.items() if name not in ("host", "port")})
    for what in ("captioner", "generator", "encoder"):
        named(getattr(args, what), what)


def check(words: list[str]) -> None:
    match words:
        case ["python", "-m", "serve.control", "stop", *rest]:
            assert all(re.fullmatch(r"port=\d+", word) for word in rest)
        case ["python", "-m", "serve.control", *rest] | ["serve", "run", *rest]:
            parse_service(rest)
        case ["python", "-m", "mmcore.catalogue", "sizes"]:
            pass  # tests/mmcore/test_full_size.py
        case ["python", "-c", code]:
            compile(code, "-c", "exec")
        case ["python", "-m", module, *argv]:
            parse(f"{module.replace('.', '/')}.py", argv)
        case ["python", _, *flags] if "--help" in flags:
            pass  # test_help
        case ["python", file, *argv]:
            parse(file, argv)
        case ["make", *rest]:
            makefile = (ROOT / "Makefile").read_text()
            for word in rest:
                name, variable, _ = word.partition("=")
                assert re.search(rf"^{name} \?=|\$\({name}\)" if variable else rf"^{name}:", makefile, re.M), word
        case ["pytest", *rest]:
            assert all(word in ("-s",) or (ROOT / word).is_file() for word in rest)
        case ["ray", *rest]:
            from ray.scripts.scripts import cli

            parse_click(cli, rest)
        case ["curl", *rest]:
            (path,) = [word.removeprefix(SERVED_AT) for word in rest if word.startswith(SERVED_AT)]
            path = path.replace("/ID", "/{job_id}")
            assert f'"{path}"' in (ROOT / "serve/routes.py").read_text(), f"no route {path}"
        case []:
            pass
        case [first, *_]:
            assert first in SHELL, f"{first}: say here how such a command is checked"


@pytest.mark.parametrize(("name", "words"), ALL, ids=id_of)
def test_its_program_parses_a_command(name: str, words: list[str]) -> None:
    try:
        check(words)
    except (SystemExit, InputError, ValidationError, click.ClickException) as error:
        pytest.fail(f"{name}: {shlex.join(words)}: {error}")


@pytest.mark.parametrize("words", [words for _, words in ALL if "--help" in words], ids=id_of)
def test_help(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _python, file, *argv = words
    monkeypatch.setattr(sys, "argv", [file, *argv])
    module = module_of(file)
    without_runs(monkeypatch, module)
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    assert f"usage: python {file}" in capsys.readouterr().out


# Of the trainings: those on Shapes that need no other run and no weights.
NEEDS = {"--vqvae", "--encoder", "--dataset", "best", "report", "--help"}
TRAININGS = {
    shlex.join(words): words
    for _, words in ALL
    for words in [words[words.index("python") :] if "python" in words else words]
    if words[1:] and words[1].startswith("jobs/train_") and not NEEDS & {*words} and "s3:" not in " ".join(words)
}


@pytest.mark.parametrize("words", TRAININGS.values(), ids=id_of)
def test_dry_run(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On 48 images of the dataset that it reads."""
    _python, file, *argv = words
    argv = [word.replace("$HOME/", "") for word in argv]
    monkeypatch.chdir(tmp_path)
    job: Job[Any] = parse(file, argv)
    tiny.write_dataset(job.storage, job.recipe.dataset)
    monkeypatch.setattr(sys, "argv", [file, *argv, "--dry-run"])
    module_of(file).main()
    out = capsys.readouterr().out
    assert f"writes: {job.run}" in out
    assert "steps: " in out


def test_scores_of_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The documents' own command, on captions as the job before it writes them."""
    words = next(words for _, words in ALL if words[1:3] == ["jobs/evaluate.py", "captions"])
    _python, file, *argv = words
    monkeypatch.chdir(tmp_path)
    settings = parse(file, argv)
    column, _, part = settings.split.partition(":")
    tiny.write_dataset(Storage(settings.storage), "flickr8k", split=column)
    Path(settings.run).mkdir(parents=True)
    (Path(settings.run) / "recipe.json").write_text("{}")
    Path(settings.predictions).parent.mkdir(parents=True)
    rows = [row for row, split in enumerate(tiny.table(40, 8).splits) if split == part]
    lines = [f"image-{row}.png,{tiny.captions_of(row)[1]}" for row in rows]
    Path(settings.predictions).write_text("\n".join(["image,caption", *lines]))
    monkeypatch.setattr(sys, "argv", [file, *argv])
    module_of(file).main()
    assert '"bleu4": 100.0' in capsys.readouterr().out


def test_images_of_a_job_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [words[2] for _, words in ALL if words[:2] == ["python", "-c"]]
    data = [{"b64_json": base64.b64encode(image).decode()} for image in (b"first", b"second")]
    monkeypatch.chdir(tmp_path)
    Path("job.json").write_text(json.dumps({"status": "done", "result": {"data": data}}))
    exec(compile(code, "docs/serving.md", "exec"), {})
    assert [Path(name).read_bytes() for name in ("0.png", "1.png")] == [b"first", b"second"]


def test_runs_that_are_read_are_trained() -> None:
    """By a command of the documents."""
    trained, read = set(DEMO), set()
    for name, words in ALL:
        if "--help" in words or not any(word.startswith("jobs/") for word in words):
            continue
        words = words[words.index("python") :]
        if words[1].startswith("jobs/train_"):
            run = parse(words[1], words[2:]).run
            trained.add((run.parent.name, run.name))
        for flag, value in pairwise(words):
            if flag in ("--run", "--vqvae"):
                found = RUN.search(value)
                assert found, f"{name}: {flag} {value}"
                read.add(found.groups())
    assert read - trained == set()


def test_every_job_has_an_example() -> None:
    there = {f"jobs/{path.name}" for path in (ROOT / "jobs").glob("*.py")} - {"jobs/__init__.py"}
    named = {word for _, words in ALL for word in words} | {"jobs/demo.py"}  # make demo
    assert there - named == set(), "jobs without an example in README.md or docs/"


def test_the_tree_names_every_folder() -> None:
    tree = TEXTS["README.md"].partition("## The tree")[2].split("```")[1]
    named = {line.split()[0] for line in tree.splitlines()[1:]}
    packages = {path.parent for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    there = {f"{folder.relative_to(ROOT)}/" for folder in packages} | {"tests/", "docs/", "serve/web/"}
    assert named == there


def anchors(text: str) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    for link in LINK.findall(TEXTS[name]):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name}: {link}"
        assert not anchor or anchor in anchors(target.read_text()), f"{name}: {link}"


@pytest.mark.parametrize("name", TEXTS)
def test_files_and_variables_are_there(name: str) -> None:
    from serve.limits import KEY_VARIABLES, Limits

    files = set(re.findall(r"(?:jobs|mmcore|serve|tests)/[\w/]+\.(?:py|yaml|png)", TEXTS[name]))
    missing = {file for file in files if not (ROOT / file).is_file()}
    assert missing <= (NEW_FILES if name == WORKED_EXAMPLE else set())
    known = {f"SERVE_{field.upper()}" for field in Limits.__dataclass_fields__} | set(KEY_VARIABLES)
    assert set(re.findall(r"\bSERVE_\w+", TEXTS[name])) - known == set()


@pytest.mark.parametrize("name", TEXTS)
def test_a_block_says_what_it_is(name: str) -> None:
    """A command in a block of another language would not be checked."""
    for _fence, language, block in FENCE.findall(TEXTS[name]):
        assert language in ("bash", "python", "text", "markdown"), block
        if language == "python":
            compile(block, name, "exec")
        assert language != "text" or not re.search(r"^(python|make|ray|export) ", block, re.MULTILINE), block


def test_the_messages_are_those_of_the_code() -> None:
    """Of the table of failures: each part between `...` and `;` stands in a file of ours, or where Ray takes a job."""
    table = TEXTS["README.md"].partition("## When it fails")[2].partition("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(messages) > 5
    files = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    # Texts go on in the next line.
    code = [re.sub(r'"\s*\n\s*f?"', "", path.read_text()) for path in (*files, ROOT / "Makefile", RAY_JOBS)]
    for message in messages:
        parts = [part.strip() for part in re.split(r"\.\.\.|;", message) if part.strip()]
        assert any(all(part in text for part in parts) for text in code), f"{message}: {parts}"
