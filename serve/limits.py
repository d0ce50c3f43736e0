"""Every limit of the service: its default, its environment variable ``SERVE_{NAME}`` and what it means."""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass

from mmcore.errors import InputError

PREFIX = "SERVE_"
MIB = 2**20
# Variables with the same prefix that are no limits: serve/security.py reads them.
KEY_VARIABLES = ("SERVE_API_KEYS", "SERVE_API_KEYS_FILE")
# A variable this similar to one of ours counts as misspelt. Kubernetes makes other variables of this prefix.
_TYPO = 0.85
# S3 signs no link for longer than a week.
_MAX_URL_EXPIRES_S = 7 * 86_400


@dataclass(frozen=True)
class Limits:
    """A field ``max_n`` is set by ``SERVE_MAX_N``. Sizes are in bytes, times in seconds."""

    max_body_bytes: int = 20 * MIB
    """Body of one request; refused with 413 by its Content-Length, or while it is read."""
    max_json_bytes: int = 64 * 1024
    """Body of a request that carries no image."""
    max_bodies_bytes: int = 200 * MIB
    """Bodies of all requests at one time; past it 429. Bodies without a key have as much room of their own."""
    body_timeout_s: float = 30.0
    """Time in which a body must arrive; past it 408."""
    max_image_bytes: int = 10 * MIB
    """One image as it is stored in its file."""
    max_data_uri_bytes: int = 6 * MIB
    """One image that comes as base64 in JSON, by the size of its file. Base64 takes ten times the work of a form."""
    max_pixels: int = 25_000_000
    """Width times height of one image, read from its header before it is decoded."""
    max_frames: int = 1
    """Frames of one image; the first is captioned. Counted before anything is decoded."""
    max_images: int = 16
    """Images of one request for captions."""
    max_prompt_chars: int = 1000
    """Characters of a prompt, and of a negative prompt."""
    max_prompt_tokens: int = 256
    """Tokens of a prompt as the model counts them; a model that takes fewer refuses earlier."""
    max_n: int = 8
    """Images of one request for images."""
    max_job_n: int = 64
    """Images of one job."""
    max_steps: int = 250
    """Sampling steps."""
    max_guidance_scale: float = 30.0
    """Guidance scale; the least is 1, which is none."""
    max_queue: int = 64
    """Images that wait or are in work, for each model; past it 429 with Retry-After."""
    key_share: float = 0.5
    """The part of each model's queue, and of the bodies, that one of several keys may fill; 1 is all."""
    max_jobs: int = 100
    """Jobs that are not finished; past it 429."""
    max_jobs_per_key: int = 20
    """Jobs of one key that are not finished; past it 429."""
    job_concurrency: int = 2
    """Jobs in work at one time."""
    job_ttl_s: float = 86_400.0
    """How long a job can be fetched, from its submission on."""
    rate_per_minute: float = 600.0
    """Requests that one key may send in the long run; past it 429 with Retry-After."""
    rate_burst: int = 100
    """Requests that one key may send at once."""
    request_timeout_s: float = 300.0
    """Time in which a request must be answered; past it the work ends and the answer is 503."""
    url_expires_s: float = 3600.0
    """How long a link to an image (response_format url) works; a week at most."""
    drain_timeout_s: float = 120.0
    """How long the end waits for requests in flight."""
    caption_beams: int = 3
    """Beams of the search for a caption; 1 is greedy. Captioners with a language model are always greedy."""
    caption_words: int = 30
    """Longest caption, in words."""
    captioner_batch_size: int = 0
    """Images captioned together; 0 chooses 16 on a CPU, 64 on a GPU."""
    generator_batch_size: int = 0
    """Images made together; 0 chooses 4 on a CPU, 8 on a GPU. A smaller batch is filled up, so that an image does not
    depend on other requests. On a CPU 1 answers a single image soonest."""
    batch_wait_s: float = 0.0
    """How long an idle model waits for more images after the first. While it works, images gather without a wait. So a
    busy service gains nothing by one, and every lone request would pay for it."""
    model_threads: int = 0
    """CPU threads of each model's replica; 0 takes as many as its affinity and the quota of its
    container allow."""

    def __post_init__(self) -> None:
        """Raises InputError for limits that would refuse every request."""
        for name, whole in (
            ("max_n", "max_queue"),
            ("max_images", "max_queue"),
            ("max_body_bytes", "max_bodies_bytes"),
        ):
            if getattr(self, name) > getattr(self, whole):
                raise InputError(
                    f"{PREFIX}{name.upper()} {getattr(self, name)}: no such request could ever be admitted, as "
                    f"{PREFIX}{whole.upper()} is {getattr(self, whole)}; raise that one, or lower this one"
                )
        for field in dataclasses.fields(self):
            # A rate or a time of 0 does not switch the limit off: it would refuse everything.
            if isinstance(field.default, float) and field.default and not getattr(self, field.name) > 0:
                raise InputError(f"{PREFIX}{field.name.upper()} {getattr(self, field.name):g}: give more than 0")
        if not 1 <= self.url_expires_s <= _MAX_URL_EXPIRES_S:
            raise InputError(f"{PREFIX}URL_EXPIRES_S {self.url_expires_s:g}: give 1 to {_MAX_URL_EXPIRES_S} (a week)")
        if self.key_share > 1:
            raise InputError(f"{PREFIX}KEY_SHARE {self.key_share:g}: give 1, which is all, or less")
        if self.max_guidance_scale < 1:
            raise InputError(f"{PREFIX}MAX_GUIDANCE_SCALE {self.max_guidance_scale:g}: give 1, which is none, or more")

    def most_of_options(self) -> dict[str, float]:
        """The largest value of some sampling options, by the API's names; a model need not have them."""
        return {
            "num_inference_steps": self.max_steps,
            "guidance_scale": self.max_guidance_scale,
            "guidance_scale_end": self.max_guidance_scale,
        }

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Limits":
        """Raises InputError for a value that is not a number of its kind, and for a variable that looks misspelt."""
        fields = {PREFIX + field.name.upper(): field for field in dataclasses.fields(cls)}
        values: dict[str, int | float] = {}
        for name, text in environment.items():
            if not name.startswith(PREFIX) or name in KEY_VARIABLES:
                continue
            if name not in fields:
                near = difflib.get_close_matches(name, [*fields, *KEY_VARIABLES], n=1, cutoff=_TYPO)
                if near:
                    raise InputError(f"{name}: no such variable; did you mean {near[0]}?")
                continue
            field = fields[name]
            values[field.name] = _number(name, text, field.default)
        return cls(**values)  # type: ignore[arg-type]


def _number(name: str, text: str, default: object) -> int | float:
    kind, least = (int, 0 if default == 0 else 1) if isinstance(default, int) else (float, 0.0)
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < least:
        raise InputError(f"{name}={text!r}: give a {'whole ' if kind is int else ''}number of at least {least}")
    return value
