"""The models to serve, as arguments name them: the run of each, and where its frozen parts lie now."""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from mmcore import recipe
from mmcore.errors import InputError
from mmcore.storage import Storage

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# The flags by which jobs name frozen parts, with their value, and the arguments of the service.
_FLAG = re.compile(r"(--encoder|--text-encoder|--language-model) '([^']*)'")
_ARGUMENTS = {"--encoder": "encoder", "--text-encoder": "encoder", "--language-model": "language_model"}


@dataclass(frozen=True)
class Source:
    """A finished run. Its methods raise InputError, which names arguments of the service.

    Models are imported in the methods: the process that answers requests needs none of PyTorch's models.
    """

    name: str
    """By which requests name the model."""
    uri: str
    encoder: str | None
    """Folder of the frozen encoder; None where it lies where the run had it."""
    language_model: str | None
    """The same of the frozen language model."""

    def open_captioner(self) -> recipe.Captioner:
        from mmcore.trained.captioner import open_captioner

        with self._arguments_named():
            return open_captioner(self.uri, encoder=self.encoder, language_model=self.language_model)

    def open_generator(self) -> recipe.Generator:
        from mmcore.trained.generator import open_generator

        with self._arguments_named():
            return open_generator(self.uri, text_encoder=self.encoder)

    def load_captioner(self, device: str) -> recipe.Captioner:
        with self._arguments_named():
            return self.open_captioner().load(device)

    def load_generator(self, device: str) -> recipe.Generator:
        with self._arguments_named():
            return self.open_generator().load(device)

    @contextlib.contextmanager
    def _arguments_named(self) -> Iterator[None]:
        """Within the block, an error names the arguments of the service in the place of the flags of jobs."""
        try:
            yield
        except InputError as error:
            text = _FLAG.sub(lambda found: f"{_ARGUMENTS[found[1]]}={self.name}:{found[2]}", str(error))
            raise InputError(text.replace("leave the flag out", "leave the argument out")) from None


def sources(
    captioner: str, generator: str, encoder: str, language_model: str
) -> tuple[dict[str, Source], dict[str, Source]]:
    """The captioners and the generators by name, of the arguments of these names. Raises InputError."""
    captioners, generators = named(captioner, "captioner"), named(generator, "generator")
    encoders, language_models = named(encoder, "encoder"), named(language_model, "language_model")
    if not captioners and not generators:
        raise InputError("nothing to serve: give captioner=NAME:URI, generator=NAME:URI, or both")
    if twice := sorted(set(captioners) & set(generators)):
        raise InputError(f"{twice[0]!r} is a captioner and a generator; every model needs a name of its own")
    for what, given, models in (
        ("encoder", encoders, [*captioners, *generators]),
        ("language_model", language_models, [*captioners]),
    ):
        if unknown := sorted(set(given) - set(models)):
            kind = "model" if what == "encoder" else "captioner"
            raise InputError(f"{what}={unknown[0]}:...: no {kind} of that name; they are {models}")

    def source(name: str, uri: str) -> Source:
        return Source(name, Storage(uri).uri, _local(encoders.get(name)), _local(language_models.get(name)))

    return (
        {name: source(name, uri) for name, uri in captioners.items()},
        {name: source(name, uri) for name, uri in generators.items()},
    )


def named(text: str, what: str) -> dict[str, str]:
    """``name1:URI1,name2:URI2`` as a dictionary. Raises InputError."""
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, colon, uri = part.partition(":")
        if not colon or not uri or uri.startswith("//"):
            raise InputError(f"{what}={part}: give each a name: {what}=NAME:URI[,NAME:URI]")
        if not _NAME.fullmatch(name):
            raise InputError(f"{what}={part}: a name has letters, digits, '.', '_' and '-', 64 of them at most")
        if name in found:
            raise InputError(f"{what}={part}: {name!r} stands there twice")
        found[name] = uri
    return found


def _local(folder: str | None) -> str | None:
    """A folder by its absolute path, as a replica has another working directory. A name of the hub is unchanged."""
    return os.path.abspath(folder) if folder and os.path.isdir(folder) else folder
