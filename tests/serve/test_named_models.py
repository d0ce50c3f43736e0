"""The models that arguments of the service name, and where their frozen parts lie."""

from pathlib import Path

import numpy as np
import pytest
from tiny_runs import write_language_model, write_language_run, write_resnet

from mmcore.errors import InputError
from mmcore.storage import Storage
from mmcore.trained.captioner import open_captioner
from serve.bench.measuring import write_captioner
from serve.sources import sources


def test_a_language_model_that_was_moved(tmp_path: Path) -> None:
    there, here = write_language_model(tmp_path / "there"), tmp_path / "here"
    run = write_language_run(tmp_path / "run", str(there))
    trained = open_captioner(str(run)).load()
    pixels = np.random.default_rng(0).integers(0, 256, (2, trained.image_size, trained.image_size, 3), np.uint8)
    captions = trained.caption(pixels, trained.options)
    there.rename(here)
    gone, found = (sources(f"lm:{run}", "", "", given)[0]["lm"] for given in ("", f"lm:{here}"))
    gone.open_captioner()
    with pytest.raises(InputError) as caught:
        gone.load_captioner("cpu")
    message = f"language_model=lm:{there}: no such folder; name the one where the tokenizer is now"
    assert str(caught.value) == message
    served = found.load_captioner("cpu")
    assert served.caption(pixels, served.options) == captions


def test_an_encoder_that_was_moved(tmp_path: Path) -> None:
    encoder = write_resnet(tmp_path / "there")
    run = write_captioner(Storage(str(tmp_path)) / "run", smoke=True, encoder=str(encoder))
    encoder.rename(tmp_path / "here")
    with pytest.raises(InputError) as caught:
        sources(f"a:{run}", "", "", "")[0]["a"].load_captioner("cpu")
    assert str(caught.value) == f"encoder=a:{encoder}: no such folder; name the one where the vision model is now"
    sources(f"a:{run}", "", f"a:{tmp_path / 'here'}", "")[0]["a"].load_captioner("cpu")
    with pytest.raises(InputError, match=f"^language_model=a:{tmp_path}: .* has none; leave the argument out$"):
        sources(f"a:{run}", "", "", f"a:{tmp_path}")[0]["a"].open_captioner()


def test_parts_of_unknown_models_are_refused() -> None:
    with pytest.raises(InputError, match=r"^encoder=c:\.\.\.: no model of that name; they are \['a', 'b'\]$"):
        sources("a:/x", "b:/y", "c:/z", "")
    with pytest.raises(InputError, match=r"^language_model=b:\.\.\.: no captioner of that name; they are \['a'\]$"):
        sources("a:/x", "b:/y", "", "b:/z")
