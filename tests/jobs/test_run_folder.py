"""Whether a job may continue the unfinished run in its folder."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from jobs import train_ldm, train_qformer_llm, train_resnet_captioner
from jobs.runtime.job import Job, parse_job
from jobs.runtime.run_folder import check_begun, open_run
from mmcore.captioners.facts import CaptionerFacts, tokenizer_path
from mmcore.captioners.qformer_llm import LanguageCaptionerFacts
from mmcore.errors import InputError
from mmcore.frozen.text import TextInputs
from mmcore.generators.facts import DiffusionFacts
from mmcore.recipe import recipe_to_json
from mmcore.text import TokenIds

FACTS = DiffusionFacts(
    TextInputs(vocabulary_size=40, pad_id=0, bos_id=1, eos_id=2),
    (4, 8, 8),
    resolution=64,
    scaling_factor=0.5,
    vqvae_fingerprint="of a VQ-VAE",
    dataset_fingerprint="of the data",
    columns=("latents",),
    text_fingerprint="of the words",
    text=("tokenizers", "of the words"),
)
YOUNGER = "unshifted_share"


def job(storage: Path, *flags: str) -> Job[Any]:
    return parse_job(train_ldm.__file__, train_ldm.VARIANTS, "", ["--storage", str(storage), *flags])


def begun_before(job: Job[Any]) -> None:
    """An unfinished run of `job`, written by a version without the field."""
    open_run(job, FACTS)
    there = json.loads(job.run.read("recipe.json"))
    del there["settings"]["noise"][YOUNGER]
    job.run.write("recipe.json", json.dumps(there).encode())


def test_a_run_begun_before_a_field_was_there_goes_on_with_its_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_then = job(tmp_path, "--unshifted-share", "0")
    begun_before(as_then)
    open_run(as_then, FACTS)
    told = f"going on with the unfinished run {as_then.run} from "
    assert f"{told}the beginning, as no checkpoint was saved\n" in capsys.readouterr().out
    for latest, begin in ((None, "the beginning"), ({"metrics": {"step": 1200}}, "step 1,200\n")):
        snapshot = json.dumps({"latest_checkpoint_result": latest})
        as_then.run.write("checkpoint_manager_snapshot.json", snapshot.encode())
        open_run(as_then, FACTS)
        assert f"{told}{begin}" in capsys.readouterr().out


def test_another_value_than_the_default_is_another_run(tmp_path: Path) -> None:
    begun_before(job(tmp_path, "--unshifted-share", "0"))
    with pytest.raises(InputError, match=r"other settings: settings\.noise\.unshifted_share: 0\.25 \(there: 0\.0\)"):
        open_run(job(tmp_path, "--unshifted-share", "0.25"), FACTS)


def test_a_field_that_is_no_more_is_named(tmp_path: Path) -> None:
    same = job(tmp_path)
    open_run(same, FACTS)
    there = json.loads(same.run.read("recipe.json"))
    there["settings"]["noise"]["of_old"] = 3
    same.run.write("recipe.json", json.dumps(there).encode())
    with pytest.raises(InputError, match=r"other settings: settings\.noise\.of_old: None \(there: 3\)"):
        open_run(same, FACTS)


@pytest.mark.parametrize(
    ("facts", "named"), [({"columns": ("pixels",)}, "columns"), ({"scaling_factor": 2.0}, "scaling")]
)
def test_other_facts_are_another_run(tmp_path: Path, facts: dict[str, Any], named: str) -> None:
    same = job(tmp_path)
    open_run(same, FACTS)
    with pytest.raises(InputError, match=f"other settings: {named}.*--fresh to start anew"):
        open_run(same, dataclasses.replace(FACTS, **facts))


def test_what_is_known_yet_is_compared_before_the_work(tmp_path: Path) -> None:
    planned = DiffusionFacts(FACTS.text_inputs, (4, 8, 8), resolution=64, dataset_fingerprint="of the data")
    same = job(tmp_path)
    check_begun(same, planned)
    open_run(same, FACTS)
    check_begun(same, planned)
    for changes in ({"x_0_shape": (4, 16, 16)}, {"vqvae_fingerprint": "of another"}):
        (name,) = changes
        with pytest.raises(InputError, match=rf"other settings: {name}: .*--fresh to start anew"):
            check_begun(same, dataclasses.replace(planned, **changes))
    with pytest.raises(InputError, match=r"other settings: settings\.train\.lr: "):
        check_begun(job(tmp_path, "--lr", "0.5"), planned)
    check_begun(job(tmp_path, "--lr", "0.5", "--fresh"), planned)


def test_a_language_model_may_lie_elsewhere_but_is_the_same(tmp_path: Path) -> None:
    def of(name: str) -> Job[Any]:
        flags = ["--storage", str(tmp_path), "--variant", "smoke", "--language-model", name]
        return parse_job(train_qformer_llm.__file__, train_qformer_llm.VARIANTS, "", flags)

    facts = LanguageCaptionerFacts(TokenIds(10, 1, 2, (0,)), 4, 3, language_model_fingerprint="of a Llama")
    open_run(of("here/llama"), facts)
    open_run(of("there/llama"), facts)
    with pytest.raises(InputError, match="other settings: language_model_fingerprint"):
        open_run(of("here/llama"), dataclasses.replace(facts, language_model_fingerprint="of another"))


# -- runs that commit 34e6a7a began, before facts had types ----------------------------------------------------------


def begun_by_34e6a7a(job: Job[Any], facts: dict[str, Any]) -> None:
    """The file as that commit wrote it."""
    settings = recipe_to_json(job.recipe)
    there = {"recipe": job.recipe_name, "variant": job.variant, "settings": settings, **facts, "commit": "34e6a7a"}
    job.run.write("recipe.json", json.dumps(there, indent=1).encode())


def test_a_diffusion_of_34e6a7a_goes_on(tmp_path: Path) -> None:
    same = job(tmp_path)
    facts = {
        "resolution": 64,
        "x_0_shape": [4, 8, 8],
        "scaling_factor": 0.5,
        "vqvae_fingerprint": "of a VQ-VAE",
        "dataset_fingerprint": "of the data",
        "columns": ["latents"],
        "text_inputs": {"width": None, "vocabulary_size": 40, "pad_id": 0, "bos_id": 1, "eos_id": 2},
        "text_fingerprint": "of the words",
        "text": ["tokenizers", "of the words"],
    }
    begun_by_34e6a7a(same, facts)
    open_run(same, FACTS)
    begun_by_34e6a7a(same, facts | {"scaling_factor": 0.25})
    with pytest.raises(InputError, match=r"other settings: scaling_factor: 0\.5 \(there: 0\.25\)"):
        open_run(same, FACTS)


def test_a_captioner_of_34e6a7a_goes_on(tmp_path: Path) -> None:
    flags = ["--storage", str(tmp_path)]
    same = parse_job(train_resnet_captioner.__file__, train_resnet_captioner.VARIANTS, "", flags)
    vocabulary = tiny.vocabulary(same.recipe)
    facts = {
        "encoder_fingerprint": "pixels",
        "image_tokens": 4096,
        "encoder_width": 3,
        "dataset_fingerprint": "of the data",
        "columns": ["pixels"],
        "vocabulary": vocabulary.to_json(),
    }
    fingerprint, path = vocabulary.fingerprint(), tokenizer_path(vocabulary)
    mine = CaptionerFacts(vocabulary.token_ids, 4096, 3, "pixels", "of the data", ("pixels",), fingerprint, path)
    begun_by_34e6a7a(same, facts)
    open_run(same, mine)
    begun_by_34e6a7a(same, facts | {"vocabulary": vocabulary.to_json().replace('"square"', '"circle"')})
    with pytest.raises(InputError, match=r"other settings: text: .*text_fingerprint: "):
        open_run(same, mine)
